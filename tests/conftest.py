"""What all tests share."""

import os
import signal

# Small models are many times slower with threads that wait for one another: here, and in commands that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from commands import SMALL, make_images, make_tokenizer
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from utils.allocator import keep_memory

keep_memory()  # as in commands
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with it ignored


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A data set of three classes; not to be changed."""
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A checkpoint of a tiny tokenizer with random weights."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights for Inception; the published ones are not at hand in tests."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, tensors: None)
        network = FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # or nothing of an image would be left behind so many layers
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def trained_var(images, tokenizer, tmp_path_factory):
    """A VAR of two steps, whose classes have names."""
    import train  # here, as it takes seconds
    from dist import Ranks
    from utils import cli
    from utils.runs.config import TrainConfig

    run = tmp_path_factory.mktemp("var")
    words = [*SMALL, "--family=var", "--max_steps=2", "--vae", tokenizer, "--data_path", images, "--local_out_dir_path", run]
    config = cli.parse(TrainConfig, "", list(map(str, words)))
    train.build_trainer(config, Ranks(0, 1, torch.device("cpu"))).fit()
    return run
