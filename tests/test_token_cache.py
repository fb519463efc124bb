import shutil

import numpy as np
import pytest
import torch
from commands import SMALL, TINY_TOKENIZER, run_in_process, script

import train
from models.tokenizer import VQVAE
from utils import data, token_cache
from utils.checkpoint import load_tokenizer, load_transformer
from utils.log import read_metrics
from utils.token_cache import TokenCache, check_cache


@pytest.fixture
def cache(images, tokenizer, tmp_path, monkeypatch, capsys):
    """A function that runs scripts/cache_tokens.py with further flags and returns the directory."""

    def make(*flags):
        words = ["--vae", tokenizer, "--data_path", images, "--out", tmp_path / "cache", *flags]
        code, _, errors = run_in_process(script("cache_tokens").main, words, monkeypatch, capsys)
        assert code == 0, errors
        return tmp_path / "cache"

    return make


def test_cached_tokens_are_those_of_the_tokenizer(cache, images, tokenizer):
    directory = cache("--center_crop")
    train_files, val_files = data.read_folders(images)
    model = load_tokenizer(tokenizer)
    for split, files in (("train", train_files), ("val", val_files)):
        stored = TokenCache(directory, split)
        tokens, labels = stored.gather(np.arange(len(stored)))
        pixels = torch.stack([data.Images(files, 16)[(i, i)][0] for i in range(len(files.paths))])
        assert torch.equal(tokens, torch.cat(model.encode(pixels), dim=1))
        assert labels.tolist() == files.labels
    assert stored.tokens[0].dtype == np.uint16


def test_views_are_different_crops_of_one_image(cache):
    directory = cache("--views=3", "--hflip")
    stored = TokenCache(directory, "train")
    assert len(stored) == 3 * 24
    source = np.load(directory / "train_00000_source.npy")
    assert source.tolist() == [i // 3 for i in range(72)]
    tokens, labels = stored.gather(np.arange(72))
    assert (labels.view(24, 3) == labels.view(24, 3)[:, :1]).all()
    assert (tokens.view(24, 3, -1)[:, 0] != tokens.view(24, 3, -1)[:, 1]).any()
    assert len(TokenCache(directory, "val")) == 9


def test_many_shards_read_like_one(cache, monkeypatch):
    order = np.array([3, 23, 0, 11, 12])
    directory = cache("--center_crop")
    expected = TokenCache(directory, "train").gather(order)
    shutil.rmtree(directory)
    monkeypatch.setattr(token_cache, "ROWS_PER_SHARD", 5)
    sharded = TokenCache(cache("--center_crop", "--batch=7"), "train")
    assert len(sharded.tokens) == 5
    assert all(torch.equal(a, b) for a, b in zip(sharded.gather(order), expected, strict=True))


def test_training_from_the_cache_is_training_from_the_same_crops(cache, images, tokenizer, tmp_path, monkeypatch, capsys):
    """Square images resized to their final size are not cut, so both ways see the same tokens."""
    flags = [*SMALL, "--max_steps=2"]
    folder = ["--vae", tokenizer, "--data_path", images, "--mid_reso=1"]
    for name, source in (("folder", folder), ("cache", ["--token_cache", cache("--center_crop", "--resize=1")])):
        words = [*flags, *source, "--local_out_dir_path", tmp_path / name]
        code, _, errors = run_in_process(train.main, words, monkeypatch, capsys)
        assert code == 0, errors
    first, second = (load_transformer(tmp_path / name, ema=False) for name in ("folder", "cache"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert read_metrics(tmp_path / "folder")[-1]["val_loss"] == read_metrics(tmp_path / "cache")[-1]["val_loss"]


def test_a_cache_of_another_tokenizer_is_refused_naming_both(cache, tmp_path):
    manifest = token_cache.read_manifest(cache("--center_crop"))
    torch.manual_seed(5)
    other = VQVAE(TINY_TOKENIZER)
    with pytest.raises(ValueError, match="hash .* the one given has"):
        check_cache(manifest, other, "cache")


def test_two_views_do_not_make_an_epoch_longer(cache, tmp_path, monkeypatch, capsys):
    words = [*SMALL, "--max_steps=0", "--ep=1", "--token_cache", cache("--views=2"), "--local_out_dir_path", tmp_path / "run"]
    code, output, errors = run_in_process(train.main, words, monkeypatch, capsys)
    assert code == 0, errors
    assert "24 images, 3 steps" in output


def test_a_directory_of_others_is_not_touched(images, tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    words = ["--vae", tokenizer, "--data_path", images, "--out", tmp_path]
    code, _, errors = run_in_process(script("cache_tokens").main, words, monkeypatch, capsys)
    assert code == 1
    assert "holds 'thesis.txt', which is no part of a token cache" in errors
    assert (tmp_path / "thesis.txt").exists()


def test_a_finished_cache_is_not_overwritten(cache, images, tokenizer, tmp_path, monkeypatch, capsys):
    directory = cache("--center_crop")
    words = ["--vae", tokenizer, "--data_path", images, "--out", directory]
    code, _, errors = run_in_process(script("cache_tokens").main, words, monkeypatch, capsys)
    assert code == 1
    assert "a finished token cache is there" in errors
