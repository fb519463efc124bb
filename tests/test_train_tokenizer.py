import shutil

import pytest
import torch
from commands import assert_same_training, make_images, run_in_process, run_in_shell, script

from models.tokenizer import TOKENIZER_PRESETS, TokenizerConfig
from utils.checkpoint import load_tokenizer
from utils.runs.checkpoints import checkpoints
from utils.runs.log import read_metrics

TINY = TokenizerConfig(sides=(1, 2, 4), channels=32, multipliers=(1, 1), num_blocks=1, num_codes=16, code_dim=4)  # 8 px
FLAGS = ["--preset=tiny", "--bs=6", "--max_steps=30", "--log_every=5", "--save_every=10", "--restart_every=3", "--gan_width=8"]

MEANS = ["--scale_dropout=0.5", "--perturbation=0.3", "--matching=0.1", "--perceptual=0.1", "--perceptual_logits=0.01"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images", pixels=10)


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setitem(TOKENIZER_PRESETS, "tiny", TINY)
    return lambda *arguments: run_in_process(script("train_tokenizer").main, list(arguments), monkeypatch, capsys)


def test_training_improves_the_reconstruction_and_uses_the_codebook(images, tmp_path, command):
    code, _, errors = command(*FLAGS, "--data_path", images, "--out", tmp_path)
    assert code == 0, errors
    validations = [entry for entry in read_metrics(tmp_path) if "val_psnr" in entry]
    assert [entry["step"] for entry in validations] == [10, 20, 30]
    assert validations[-1]["val_psnr"] > validations[0]["val_psnr"]
    assert validations[-1]["codes_used"] >= 8
    assert list(validations[-1]["val_perplexity"]) == ["1x1", "2x2", "4x4"]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.config == TINY
    assert [len(i[0]) for i in tokenizer.encode(torch.zeros(1, 3, 8, 8))] == [1, 4, 16]


@pytest.mark.parametrize(
    "flags", [[], ["--gan=0"], ["--fp16=1", "--ema=0.9"], ["--gan_from=0.5", "--gan_ramp=0.2"], MEANS], ids=str
)
def test_a_stopped_run_goes_on_to_the_same_end(flags, images, tmp_path, command):
    def train(name):
        return command(*FLAGS, *flags, "--keep=3", "--data_path", images, "--out", tmp_path / name)

    assert train("whole")[0] == 0
    assert train("stopped")[0] == 0
    for step in (20, 30):  # stopped at step 10, between two restarts of unused codes
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step_{step}")
    code, output, errors = train("stopped")
    assert code == 0, errors
    assert "resuming at step 10" in output
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_without_a_discriminator_goes_on_with_one(images, tmp_path, command):
    run = ["--data_path", images, "--out", tmp_path]
    assert command(*FLAGS, *run, "--gan=0", "--max_steps=10")[0] == 0
    before = load_tokenizer(tmp_path)
    code, output, errors = command(*FLAGS, *run, "--gan=0.01", "--max_steps=12", "--lr=1e-6", "--keep=9")
    assert code == 0, errors
    assert "step_10 has no discriminator, which starts anew" in output
    assert "resuming at step 10" in output
    after = load_tokenizer(tmp_path)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-3 for a, b in pairs)  # not the initial weights
    assert (checkpoints(tmp_path)[-1] / "discriminator.safetensors").exists()


def test_the_discriminator_waits_for_its_time_and_learns_to_tell_images_apart(images, tmp_path, command):
    code, _, errors = command(*FLAGS, "--log_every=1", "--gan_from=0.5", "--data_path", images, "--out", tmp_path)
    assert code == 0, errors
    entries = [entry for entry in read_metrics(tmp_path) if "loss" in entry]
    judged = [entry for entry in entries if "discriminator_loss" in entry]
    assert [entry["step"] for entry in judged] == list(range(16, 31))
    assert {entry["grad_norm_discriminator"] for entry in entries[:15]} == {0.0}
    assert judged[-1]["discriminator_loss"] < judged[0]["discriminator_loss"]
    assert judged[-1]["judged_real"] > judged[-1]["judged_made"]


def test_bfloat16_trains(images, tmp_path, command):
    code, _, errors = command(*FLAGS, "--max_steps=2", "--fp16=2", "--data_path", images, "--out", tmp_path)
    assert code == 0, errors


def test_two_ranks_train(images, tmp_path):
    flags = ["--preset=f8-32", "--bs=4", "--max_steps=2", "--data_path", images, "--out", tmp_path]
    result = run_in_shell("scripts/train_tokenizer.py", *flags, ranks=2)
    assert result.returncode == 0, result.stderr
    assert checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path=/missing"], "/missing: no such directory"),
        (["--preset=huge"], "invalid choice: 'huge'"),
        (["--bs=0"], "--bs=0: give a number above 0"),
    ],
)
def test_wrong_flags_get_one_line(flags, message, images, tmp_path, command):
    code, _, errors = command(*FLAGS, "--data_path", images, "--out", tmp_path / "run", *flags)
    assert code != 0
    assert message in errors
    assert "Traceback" not in errors


def test_a_tokenizer_of_another_size_is_not_overwritten(images, tmp_path, command):
    assert command(*FLAGS, "--max_steps=1", "--data_path", images, "--out", tmp_path)[0] == 0
    code, _, errors = command(*FLAGS, "--preset=f8-32", "--data_path", images, "--out", tmp_path)
    assert code == 1
    assert "a tokenizer of other sizes is there" in errors
