"""What all tests share."""

import pytest
import torch
from commands import make_images, make_tokenizer

torch.set_num_threads(1)  # small models are many times slower with threads that wait for one another


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
