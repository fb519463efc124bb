"""FD-EffLite0 in validation: of samples and of real images, on one rank and on two."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from commands import SMALL, run_in_process
from forked import run_forked
from PIL import Image

import train
from dist import Ranks
from utils.data.images import read_folders
from utils.metrics.distances import frechet_distance, moments
from utils.metrics.features import extract, load_extractor
from utils.metrics.fidelity import Fidelity
from utils.runs.log import read_metrics
from utils.signals import StopRequest

ALONE = Ranks(0, 1, torch.device("cpu"))
TRAINING = ["--val_fd=20", "--val_every=2"]


def test_real_images_are_compared_as_they_are_prepared_for_training(images):
    """Of 20 px images cut to 16 out of the middle, without being resized."""
    fidelity = Fidelity(*read_folders(images), 6, 16, resize=20 / 16, workers=0, ranks=ALONE)

    def features(paths: list) -> np.ndarray:
        pictures = np.stack([np.asarray(Image.open(path))[2:18, 2:18] for path in paths])
        return extract(load_extractor("efflite0"), pictures, "").pooled.numpy()

    held_out, training = (sorted((images / split).rglob("*.png")) for split in ("val", "train"))
    some = [training[i] for i in np.linspace(0, len(training) - 1, 6).astype(int)]
    expected = frechet_distance(*moments(features(some)), *moments(features(held_out)))
    assert fidelity.real == pytest.approx(expected, rel=1e-4)
    assert expected > 1


def test_a_stop_leaves_the_distance_undone(images):
    fidelity = Fidelity(*read_folders(images), 6, 16, resize=1.0, workers=0, ranks=ALONE)
    stop = StopRequest()
    stop.number = 15
    assert fidelity.of_samples(None, None, stop) is None


def test_training_logs_the_same_distances_on_one_rank_and_on_two(images, tokenizer, tmp_path):
    words = ["train.py", *SMALL, *TRAINING, "--vae", tokenizer, "--data_path", images, "--drop_path=0"]
    figures = {}
    for ranks, parallel in ((1, "ddp"), (2, "fsdp")):  # sharded: no rank may be without a part in drawing the samples
        run = tmp_path / parallel
        result = run_forked(*words, f"--parallel={parallel}", "--local_out_dir_path", run, ranks=ranks)
        assert result.returncode == 0, result.stderr
        entries = [entry for entry in read_metrics(run) if "val_fd" in entry]
        figures[ranks] = np.array([[entry["val_fd"], entry["val_fd_real"]] for entry in entries])
    assert figures[1].shape == (2, 2)
    assert (figures[1][:, 0] > figures[1][:, 1]).all()  # nothing has been learnt
    np.testing.assert_allclose(figures[1][:, 1], figures[2][:, 1], rtol=1e-8)
    # two ranks add gradients up in another order, and then a sample may take another code
    np.testing.assert_allclose(figures[1][:, 0], figures[2][:, 0], rtol=1e-2)


def test_a_token_cache_takes_its_images_from_the_data_path(images, tokenizer, tmp_path, monkeypatch, capsys):
    cache = ["scripts/cache_tokens.py", "--vae", tokenizer, "--data_path", images, "--out", tmp_path / "tokens", "--resize=1"]
    assert run_forked(*cache).returncode == 0
    words = [*SMALL, *TRAINING, "--token_cache", tmp_path / "tokens", "--local_out_dir_path", tmp_path / "run"]
    code, _, errors = run_in_process(train.main, [*words, "--data_path=/missing"], monkeypatch, capsys)
    assert code == 1
    assert "/missing: no such directory; --data_path names one with train/<class>/* and val/<class>/*" in errors
    code, output, errors = run_in_process(train.main, [*words, "--data_path", images], monkeypatch, capsys)
    assert code == 0, errors
    real = float(re.search(r"FD-EffLite0 of 20 training images from the held-out ones: ([\d.]+)", output)[1])
    stored = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert stored["val_fd_real"] == pytest.approx(real, abs=0.01)
    words[-1] = tmp_path / "other"
    code, _, errors = run_in_process(train.main, [*words, "--data_path", images, "--background=black"], monkeypatch, capsys)
    assert code == 1
    assert f"the token cache {tmp_path / 'tokens'} was made with another: give --background=white" in errors
    fewer = shutil.copytree(images, tmp_path / "fewer")
    (fewer / "val" / "cat" / "2.png").unlink()
    code, _, errors = run_in_process(train.main, [*words, "--data_path", fewer], monkeypatch, capsys)
    assert code == 1
    assert "its 24 + 8 images are not the 24 + 9 of the token cache" in errors
    (fewer / "val" / "cat" / "3.png").touch()
    code, _, errors = run_in_process(train.main, [*words, "--data_path", fewer], monkeypatch, capsys)
    assert code == 1
    assert "its 24 + 9 images are not the 24 + 9 of the token cache" in errors
    assert "give those that it was made from, with the same --val_share and --skip_bad, or --val_fd=0" in errors
    other = shutil.copytree(images, tmp_path / "images")
    for split in ("train", "val"):
        (other / split / "cat").rename(other / split / "wolf")
    code, _, errors = run_in_process(train.main, [*words, "--data_path", other], monkeypatch, capsys)
    assert code == 1
    assert "its classes are not those of the token cache" in errors


def test_one_sample_has_no_distance(monkeypatch, capsys):
    code, _, errors = run_in_process(train.main, ["--val_fd=1"], monkeypatch, capsys)
    assert code == 2
    assert "--val_fd=1: a distance needs more images: give 2 or more" in errors
