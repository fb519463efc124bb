"""A new kind of block is its mixer and a row of the table: all else asks these two. The mixer is that of tests/toy_mixer.py."""

import inspect
import shutil

import pytest
import torch
from commands import SMALL, assert_same_training, run_in_process, script
from forked import run_forked
from safetensors.torch import load_file
from small_models import CODE_DIM, NUM_CLASSES, seeded, small_tokenizer, small_transformer
from toy_mixer import FAMILIES, FAMILY, KIND, RunningMean

import train
from models.generate import generate
from models.transformer import ScaleTransformer
from scripts.benchmarks.table import attention_gflops
from utils.checkpoint import load_transformer
from utils.runs.checkpoints import checkpoint_path, checkpoints
from utils.runs.config import TrainConfig
from utils.runs.flops import training_flops
from utils.runs.log import read_repeatable_metrics

LEARN = ["--family", FAMILY, "--tblr=0.05", "--alng=0.1", "--wp=0.1", "--save_every=2", "--drop_path=0.3", "--val_every=2"]


@pytest.fixture(autouse=True, scope="module")
def in_the_table():
    """While these tests run only, so that others do not take it for one of ours."""
    FAMILIES[FAMILY] = KIND
    yield
    FAMILIES.pop(FAMILY)


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda main, *arguments: run_in_process(main, list(arguments), monkeypatch, capsys)


@pytest.fixture(scope="module")
def source(images, tokenizer):
    return [*SMALL, *LEARN, "--vae", str(tokenizer), "--data_path", str(images)]


def test_it_is_short():
    assert len(inspect.getsource(RunningMean).splitlines()) < 40


@pytest.mark.parametrize("config", [{}, {"shared_modulation": True}, {"global_blocks": 1}], ids=str)
def test_scale_by_scale_is_the_full_pass(config):
    model = small_transformer(FAMILY, **config).double()
    inputs = torch.randn(2, model.pyramid.num_inputs, CODE_DIM, generator=seeded(), dtype=torch.float64)
    labels = torch.tensor([0, NUM_CLASSES])
    with torch.no_grad():
        whole = model(labels, inputs)
        conditioning, states, parts = model.condition(labels), model.init_state(2), []
        for k in model.pyramid.scales:
            own = inputs[:, model.pyramid.inputs(range(k, k + 1))]
            logits, states = model.advance(own, range(k, k + 1), conditioning, states)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-9, rtol=0)


def test_its_scales_are_known_to_depend_on_one_another():
    assert not small_transformer(FAMILY).scales_are_independent
    with pytest.raises(ValueError, match="scales depend on one another in family running-mean"):
        TrainConfig(family=FAMILY, scale_groups="each")


def test_it_samples():
    generation = generate(small_transformer(FAMILY), small_tokenizer(), torch.tensor([0, 1]), generator=seeded())
    assert generation.images.isfinite().all()


def test_its_operations_are_counted():
    config, deeper = (small_transformer(FAMILY, depth=depth).config for depth in (2, 3))
    of_a_token = (1 + 2 * 4) * config.width**2  # multiply-adds of its projection and of the feed-forward
    of_an_image = 6 * config.width**2  # of the modulation
    block = 3 * 2 * (config.pyramid.num_tokens * of_a_token + of_an_image)
    assert training_flops(deeper) - training_flops(config) == block
    assert attention_gflops(config) == 0


def test_all_its_gammas_start_alike():
    model = ScaleTransformer(small_transformer(FAMILY).config)
    model.init_weights(gamma=1e-3, scale_shift=0.5, generator=seeded())
    gammas, scales, shifts = model.blocks[0].modulation[1].weight.detach().unflatten(0, (3, 2, -1))
    assert gammas.std() == pytest.approx(1e-3 * scales.std().item() / 0.5, rel=0.05)
    assert gammas[0].std() == pytest.approx(gammas[1].std().item(), rel=0.05)
    assert shifts.std() == pytest.approx(scales.std().item(), rel=0.05)


def test_the_card_names_it(tmp_path):
    small_transformer(FAMILY).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# Running mean d2, 9x9 tokens" in card
    assert "2 blocks running-mean, the mean of all scales so far, of no paper" in card


def test_it_trains_resumes_and_is_sampled_from(source, tmp_path, command):
    for name in ("whole", "stopped"):
        code, _, errors = command(train.main, *source, "--local_out_dir_path", tmp_path / name)
        assert code == 0, errors
    losses = [entry["loss"] for entry in read_repeatable_metrics(tmp_path / "whole") if "loss" in entry]
    assert losses[-1] < losses[0] - 0.01
    shutil.rmtree(checkpoint_path(tmp_path / "stopped", 4))
    assert command(train.main, *source, "--local_out_dir_path", tmp_path / "stopped")[0] == 0
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")

    import sample

    out = tmp_path / "grid.png"
    code, _, errors = command(sample.main, "--ckpt", tmp_path / "whole", "--classes=0,1", "--num=2", "--out", out)
    assert code == 0, errors
    assert out.exists()


def test_two_sharded_ranks_train_and_resume_it(source, tmp_path):
    flags = [*source, "--parallel=fsdp", "--fp16=2", "--keep=3", "--local_out_dir_path"]
    for name in ("whole", "stopped"):
        result = run_forked("tests/toy_mixer.py", *flags, tmp_path / name, ranks=2)
        assert result.returncode == 0, result.stderr
        if name == "whole":  # as it was when half of it was done
            shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
            shutil.rmtree(checkpoint_path(tmp_path / "stopped", 4))
    assert "resuming at step 2" in result.stdout
    assert read_repeatable_metrics(tmp_path / "whole") == read_repeatable_metrics(tmp_path / "stopped")
    for file in (checkpoints(tmp_path / "whole")[-1] / "shards").glob("*.safetensors"):
        whole, stopped = load_file(file), load_file(checkpoints(tmp_path / "stopped")[-1] / "shards" / file.name)
        assert whole.keys() == stopped.keys()
        assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert load_transformer(tmp_path / "whole").config.blocks == (FAMILY, FAMILY)


def test_the_benchmark_takes_it(command):
    """Its state is measured like any other."""
    flags = ["--family", FAMILY, "--depth=1", "--pn=1_2", "--batch=1", "--repeats=1"]
    code, output, errors = command(script("benchmark").main, "table", *flags)
    assert code == 0, errors
    assert FAMILY in output
