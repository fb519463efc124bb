"""The same images over the checkpoints of a run, and from one class to another."""

import shutil

import pytest
import torch
from commands import SMALL, assert_refused, run_in_process
from PIL import Image
from small_models import seeded, small_tokenizer, small_transformer

import sample
import train
from dist import Ranks
from models.generate import generate
from models.storage import AVERAGED
from utils import cli
from utils.runs.config import TrainConfig


@pytest.fixture(scope="module")
def run(images, tokenizer, tmp_path_factory):
    """Three checkpoints."""
    directory = tmp_path_factory.mktemp("history")
    words = [*SMALL, "--family=var", "--max_steps=3", "--save_every=1", "--keep=3", "--vae", tokenizer, "--data_path", images]
    config = cli.parse(TrainConfig, "", [*map(str, words), f"--local_out_dir_path={directory}"])
    train.build_trainer(config, Ranks(0, 1, torch.device("cpu"))).fit()
    return directory


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments: run_in_process(sample.main, list(map(str, arguments)), monkeypatch, capsys)


def test_a_row_and_a_frame_for_every_checkpoint(run, tmp_path, command):
    code, _, errors = command("--history", run, "--classes=0,2", "--out", tmp_path / "history.png", "--precision=float32")
    assert code == 0, errors
    with Image.open(tmp_path / "history.png") as grid, Image.open(tmp_path / "history.gif") as film:
        assert grid.size[1] > 3 * 60
        assert film.n_frames == 3
        assert film.size[0] == grid.size[0]
    (tmp_path / "history.png").unlink()
    film = (tmp_path / "history.gif").read_bytes()
    code, _, errors = command("--history", run, "--classes=0", "--out", tmp_path / "history.png")
    assert_refused(code, errors, "history.gif: is there already: give another --out, or --overwrite")
    assert (tmp_path / "history.gif").read_bytes() == film


def test_a_damaged_checkpoint_is_left_out(run, tmp_path, command):
    damaged = shutil.copytree(run, tmp_path / "run") / "checkpoints" / "step_2" / AVERAGED
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    code, output, errors = command("--history", tmp_path / "run", "--classes=0", "--out", tmp_path / "history.png")
    assert code == 0, errors
    assert f"step_2: damaged, {AVERAGED} is not what was written (SHA-256 differs): left out" in errors
    assert "by each of 2 checkpoints" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to sample from: give --ckpt, a transformer, or --history, a run"),
        (["--history=RUN", "--ckpt=elsewhere"], "--ckpt=elsewhere --history="),
        (["--history=RUN", "--format=npz"], "is a grid of plain samples"),
        (
            ["--history=RUN", "--interpolate=3"],
            "--interpolate=3: gives a grid of 2 or more: leave out what asks for other things",
        ),
        (["--history=RUN", "--out=a.gif"], "--out=a.gif: of --history this is the grid, beside which a .gif is made"),
        (["--history=RUN/checkpoints/step_3"], "no run with checkpoints: give the directory of one"),
    ],
)
def test_wrong_words_are_refused(flags, message, run, tmp_path, command):
    code, _, errors = command("--out", tmp_path / "history.png", *[flag.replace("RUN", str(run)) for flag in flags])
    assert_refused(code, errors, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [0, 1.5])
def test_mixed_labels(scale):
    """One class alone is that class; two halves are neither."""
    models, how = (small_transformer(), small_tokenizer()), {"guidance_scale": scale, "top_k": 1}
    shares = torch.zeros(3, models[0].config.num_classes + 1)
    shares[0, 1] = shares[1, 4] = 1
    shares[2, [1, 4]] = 0.5
    mixed = generate(*models, shares, generator=seeded(3), **how).images
    plain = generate(*models, torch.tensor([1, 4, 4]), generator=seeded(3), **how).images
    torch.testing.assert_close(mixed[:2], plain[:2])
    assert (mixed[2] - plain[2]).abs().max() > 0.01


def test_a_row_from_class_to_class(run, tmp_path, command):
    words = ["--ckpt", run, "--interpolate=4", "--out", tmp_path / "between.png", "--precision=float32"]
    code, _, errors = command(*words, "--classes=0,1,2")
    assert code == 0, errors
    with Image.open(tmp_path / "between.png") as made:
        assert made.size[1] < 3 * 66  # two rows
    code, _, errors = command(*words[:-2], tmp_path / "alone.png", "--classes=0")
    assert_refused(code, errors, "--interpolate=4: from one class to another: give two or more as --classes")
