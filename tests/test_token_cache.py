import errno
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CLASSES, SMALL, TINY_TOKENIZER, run_in_process, script
from forked import Forked, run_forked

import train
from models.pyramid import Pyramid
from models.tokenizer import VQVAE
from utils.checkpoint import Description, load_tokenizer, load_transformer, save_model
from utils.data import token_cache
from utils.data.images import Images, read_folders
from utils.data.sources import CachedData
from utils.data.token_cache import ARRAYS, Plan, TokenCache, array_bytes, check_cache, check_classes, read_manifest
from utils.runs.log import read_metrics

TWO_SHARDS = ("--views=50", "--hflip")  # of 1200 rows, and one held out
THREE_SHARDS = ("--views=100", "--hflip")


@pytest.fixture
def command(images, tokenizer, tmp_path, monkeypatch, capsys):
    """A function that runs scripts/cache_tokens.py with further flags in this process: exit code, stdout, stderr."""

    def run(*flags):
        words = ["--vae", tokenizer, "--data_path", images, "--out", tmp_path / "cache", *flags]
        return run_in_process(script("cache_tokens").main, words, monkeypatch, capsys)

    return run


@pytest.fixture
def cache(command, tmp_path):
    """The same where it succeeds; returns the directory."""

    def make(*flags):
        code, _, errors = command(*flags)
        assert code == 0, errors
        return tmp_path / "cache"

    return make


@pytest.fixture
def small_shards(monkeypatch):
    """Five shards to train on and two held out."""
    monkeypatch.setattr(token_cache, "rows_per_shard", lambda rows: 5)


class CountedEncoder:
    """Stands in for VQVAE.encode_checked: notes the number of images of every call, and fails at call number `stop_at`."""

    def __init__(self):
        self.calls, self.stop_at, self.encode = [], None, VQVAE.encode_checked

    def __call__(self, model: VQVAE, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        if len(self.calls) == self.stop_at:
            raise RuntimeError("interrupted")
        self.calls.append(len(images))
        return self.encode(model, images)


@pytest.fixture
def encoder(monkeypatch):
    counted = CountedEncoder()
    monkeypatch.setattr(VQVAE, "encode_checked", lambda model, images: counted(model, images))
    return counted


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_cache(directory: Path, rows: int, per_shard: int, num_tokens: int) -> TokenCache:
    """A finished cache of random tokens; token 0 of every row is its number modulo 4096."""
    counts = {"train": rows, "val": 1}
    plan = Plan(
        sides=[1] * num_tokens,
        num_codes=4096,
        tokenizer="none",
        fingerprint="",
        class_names=[],
        pixels=16,
        resize=1.0,
        augment=True,
        flip=False,
        views=1,
        seed=0,
        rows=counts,
        rows_per_shard=dict.fromkeys(counts, per_shard),
        listing="",
    )
    rng = np.random.default_rng(0)
    directory.mkdir()
    for shard in plan.shards("train", "val"):
        source = np.arange(shard.rows.start, shard.rows.stop)
        tokens = rng.integers(0, 4096, (len(shard.rows), num_tokens), dtype=np.uint16)
        tokens[:, 0] = source % 4096
        token_cache.write_shard(directory, shard, {"tokens": tokens, "labels": source % 1000, "source": source})
    token_cache.write_manifest(directory, plan)
    return TokenCache(directory, "train")


# --- what a cache holds -------------------------------------------------------------------------------------------------


def test_cached_tokens_are_those_of_the_tokenizer(cache, images, tokenizer):
    directory = cache("--center_crop")
    train_files, val_files = read_folders(images)
    model = load_tokenizer(tokenizer)
    for split, files in (("train", train_files), ("val", val_files)):
        stored = TokenCache(directory, split)
        tokens, labels = stored.gather(np.arange(len(stored)))
        pixels = torch.stack([Images(files, 16)[(i, i)][0] for i in range(len(files))])
        assert torch.equal(tokens.long(), torch.cat(model.encode(pixels), dim=1))
        assert labels.tolist() == files.labels.tolist()
        assert (tokens.dtype, labels.dtype) == (torch.uint16, torch.int64)


def test_views_are_different_crops_of_one_image(cache):
    directory = cache("--views=3", "--hflip")
    stored = TokenCache(directory, "train")
    assert len(stored) == 3 * 24
    source = np.load(directory / "train_00000_source.npy")
    assert source.tolist() == [i // 3 for i in range(72)]
    tokens, labels = stored.gather(np.arange(72))
    assert (labels.view(24, 3) == labels.view(24, 3)[:, :1]).all()
    tokens = tokens.long().view(24, 3, -1)
    assert (tokens[:, 0] != tokens[:, 1]).any()
    assert len(TokenCache(directory, "val")) == 9


def test_images_are_mirrored_only_when_asked_for(cache, tmp_path):
    """Squares resized to their final size can only be mirrored: without that, all views are the same."""
    tokens, _ = TokenCache(cache("--views=4", "--resize=1"), "train").gather(np.arange(96))
    tokens = tokens.long().view(24, 4, -1)
    assert (tokens == tokens[:, :1]).all()
    shutil.rmtree(tmp_path / "cache")
    mirrored, _ = TokenCache(cache("--views=4", "--resize=1", "--hflip"), "train").gather(np.arange(96))
    assert (mirrored.long().view(24, 4, -1) != tokens).any()


def test_held_out_images_are_cut_from_the_middle_whatever_is_asked_for(cache, tmp_path):
    plain = contents(cache("--center_crop"))
    shutil.rmtree(tmp_path / "cache")
    varied = contents(cache("--views=2", "--hflip", "--seed=3"))
    for array in ARRAYS:
        assert plain[f"val_00000_{array}.npy"] == varied[f"val_00000_{array}.npy"]


def test_the_manifest_says_how_the_cache_was_made(cache, tokenizer):
    directory = cache("--views=2", "--hflip", "--resize=1.25", "--seed=7")
    manifest = read_manifest(directory)
    assert manifest.sides == [1, 2, 3, 4]
    assert manifest.pyramid == TINY_TOKENIZER.pyramid
    assert manifest.fingerprint == token_cache.fingerprint(load_tokenizer(tokenizer))
    assert (manifest.tokenizer, manifest.num_codes) == (str(tokenizer), 32)
    assert manifest.class_names == list(CLASSES)
    assert (manifest.pixels, manifest.resize, manifest.augment, manifest.flip) == (16, 1.25, True, True)
    assert (manifest.views, manifest.seed, manifest.rows) == (2, 7, {"train": 48, "val": 9})
    assert set(manifest.hashes) == set(contents(directory)) - {"manifest.json"}


def test_an_image_net_takes_1_74_gb_per_view(tmp_path):
    assert array_bytes(1_281_167, views=1, num_tokens=680)["tokens"] == pytest.approx(1.74e9, rel=2e-3)
    assert array_bytes(1_281_167, views=2, num_tokens=680)["tokens"] == pytest.approx(3.48e9, rel=2e-3)
    write_cache(tmp_path / "cache", rows=1000, per_shard=1000, num_tokens=30)
    for array, size in array_bytes(1000, views=1, num_tokens=30).items():
        assert (tmp_path / "cache" / f"train_00000_{array}.npy").stat().st_size == size + 128


@pytest.mark.parametrize(
    ("rows", "expected"), [(9, 1024), (9000, 1024), (1_281_167, 20019), (2 * 1_281_167, 32768), (10**8, 32768)]
)
def test_shards_are_neither_tiny_nor_huge(rows, expected):
    assert token_cache.rows_per_shard(rows) == expected


# --- one cache, however it comes about ----------------------------------------------------------------------------------


def test_many_shards_read_like_one(cache, monkeypatch):
    order = np.array([3, 23, 0, 11, 12, 3])
    directory = cache("--center_crop")
    expected = TokenCache(directory, "train").gather(order)
    shutil.rmtree(directory)
    monkeypatch.setattr(token_cache, "rows_per_shard", lambda rows: 5)
    sharded = TokenCache(cache("--center_crop", "--batch=7"), "train")
    assert len(sharded.tokens) == 5
    assert all(torch.equal(a, b) for a, b in zip(sharded.gather(order), expected, strict=True))


def test_two_ranks_write_what_one_writes(cache, images, tokenizer, tmp_path):
    expected = contents(cache(*TWO_SHARDS))
    assert len(expected) == 3 * len(ARRAYS) + 1
    words = ["scripts/cache_tokens.py", "--vae", tokenizer, "--data_path", images, "--out", tmp_path / "two", *TWO_SHARDS]
    done = run_forked(*words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote 1200 + 9 token pyramids") == 1
    assert contents(tmp_path / "two") == expected
    again = run_forked(*words, ranks=2, timeout=60)
    assert again.returncode == 1
    assert "a finished token cache is there" in again.stderr
    assert contents(tmp_path / "two") == expected


def test_a_killed_run_is_resumed_by_another_number_of_ranks(cache, images, tokenizer, tmp_path):
    out = tmp_path / "killed"
    words = ["scripts/cache_tokens.py", "--vae", tokenizer, "--data_path", images, "--out", out, *THREE_SHARDS]
    with Forked(*words) as command:
        while not (out / "train_00000_source.npy").exists():
            assert command.is_running()
            time.sleep(0.01)
        command.kill()
    left = contents(out)
    assert "manifest.json" not in left
    assert "plan.json" in left
    (out / ".train_00001_tokens.npy.1.writing").write_bytes(b"half")  # had it been killed while writing
    stamp = (out / "train_00000_tokens.npy").stat().st_mtime_ns

    done = run_forked(*words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert (out / "train_00000_tokens.npy").stat().st_mtime_ns == stamp
    assert contents(out) == contents(cache(*THREE_SHARDS))


def test_only_missing_shards_are_encoded_again(cache, command, encoder, small_shards, tmp_path):
    expected = contents(cache("--views=2", "--batch=3"))
    assert sum(encoder.calls) == 48 + 9
    shutil.rmtree(tmp_path / "cache")

    encoder.calls, encoder.stop_at = [], 7  # in the fourth shard: five rows take two calls
    with pytest.raises(RuntimeError, match="interrupted"):
        command("--views=2", "--batch=3")
    assert len(contents(tmp_path / "cache")) == 3 * len(ARRAYS) + 1
    (tmp_path / "cache" / "train_00001_labels.npy").unlink()  # killed before the last of the three was renamed

    encoder.calls, encoder.stop_at = [], None
    code, _, errors = command("--views=2", "--batch=3")
    assert code == 0, errors
    assert sum(encoder.calls) == 48 + 9 - 2 * 5
    assert "10/57" in errors  # the progress bar, first and last
    assert "57/57" in errors
    assert contents(tmp_path / "cache") == expected


def test_nothing_is_encoded_where_only_the_manifest_is_missing(cache, encoder, small_shards):
    directory = cache("--center_crop")
    expected = contents(directory)
    plan = json.loads(expected["manifest.json"])
    del plan["hashes"]
    (directory / "manifest.json").unlink()
    (directory / "plan.json").write_text(json.dumps(plan))
    encoder.calls = []
    assert contents(cache("--center_crop")) == expected
    assert encoder.calls == []


# --- what is refused in --out -------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(command, encoder, small_shards, tmp_path, capsys):
    """A function that begins a cache with --views=2 and further flags, interrupts it in its second shard, and returns it."""

    def begin(*flags):
        encoder.stop_at = 1
        with pytest.raises(RuntimeError, match="interrupted"):
            command("--views=2", *flags)
        encoder.stop_at = None
        capsys.readouterr()
        return contents(tmp_path / "cache")

    return begin


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--views=3"], "an unfinished cache with views 2 is there, this command has 3: "),
        (["--views=2", "--hflip"], "with flip False is there, this command has True"),
        (["--views=2", "--hflip", "--center_crop"], "with augment True is there, this command has False"),
        (["--views=2", "--resize=1.5"], "with resize 1.125 is there, this command has 1.5"),
        (["--views=2", "--seed=1"], "with seed 0 is there, this command has 1"),
        (["--views=2", "--precision=bfloat16"], "with precision float32 is there, this command has bfloat16"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_other_settings_are_refused_naming_both(flags, message, unfinished, command, tmp_path):
    before = unfinished()
    code, _, errors = command(*flags)
    assert code == 1
    assert message in errors
    assert errors.count("\n") == 1
    assert contents(tmp_path / "cache") == before


def test_another_tokenizer_is_refused_but_the_same_may_have_moved(unfinished, command, tokenizer, tmp_path):
    before = unfinished()
    other = tmp_path / "other"
    other.mkdir()
    torch.manual_seed(5)
    save_model(other, VQVAE(TINY_TOKENIZER), Description("tokenizer"))
    code, _, errors = command("--views=2", "--vae", other)
    assert code == 1
    assert re.search(r"with tokenizer hash \w{12} is there, this command has \w{12}", errors)
    assert contents(tmp_path / "cache") == before

    shutil.copytree(tokenizer, tmp_path / "moved")
    code, _, errors = command("--views=2", "--vae", tmp_path / "moved")
    assert code == 0, errors
    assert read_manifest(tmp_path / "cache").tokenizer == str(tmp_path / "moved")


def rename_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "dog").rename(root / split / "ape")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train/dog/0.png").rename(root / "train/dog/9.png"), "with hash of file names "),
        (lambda root: shutil.copy(root / "val/dog/0.png", root / "val/dog/9.png"), "'val': 9} is there, this command has "),
        (rename_class, "is 'cat' in the one and 'ape' in the other"),
    ],
    ids=["renamed", "more images", "another class"],
)
def test_a_folder_that_changed_is_refused_naming_both(change, message, unfinished, command, images, tmp_path):
    root = shutil.copytree(images, tmp_path / "images")
    before = unfinished("--data_path", root)
    change(root)
    code, _, errors = command("--views=2", "--data_path", root)
    assert code == 1
    assert message in errors
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize("name", ["thesis.txt", "train_00000_tokens.npy", ".notes.writing"])
def test_a_directory_of_others_is_not_touched(name, command, tmp_path):
    """Shards without a plan.json are others too: nothing says how they were made."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / name).write_text("mine")
    code, _, errors = command()
    assert code == 1
    assert f"holds {name!r}, which is no part of a token cache" in errors
    assert contents(tmp_path / "cache") == {name: b"mine"}


def test_a_finished_cache_is_not_overwritten(cache, command):
    directory = cache("--center_crop")
    before = contents(directory)
    code, _, errors = command("--center_crop")
    assert code == 1
    assert "a finished token cache is there" in errors
    assert contents(directory) == before


@pytest.mark.parametrize("flag", ["--views=0", "--batch=0", "--workers=-1", "--seed=-1", "--resize=0.9"])
def test_wrong_flags_get_one_line(flag, command):
    code, _, errors = command(flag)
    assert code == 2
    assert flag in errors
    assert errors.count("\n") == 1


# --- a full disk --------------------------------------------------------------------------------------------------------


def test_too_little_room_is_noticed_before_anything_is_written(command, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    code, _, errors = command("--views=2")
    assert code == 1
    assert f"{57 * (30 * 2 + 8):,} bytes are still to be written, the disk has 100 free" in errors
    assert not (tmp_path / "cache").exists()


def test_features_that_are_not_finite_have_no_tokens(command, tokenizer, tmp_path, monkeypatch):
    """In float16, which ends at 65,504, they are code 0 all over, and training on them would work."""
    model = load_tokenizer(tokenizer)
    with torch.no_grad():
        model.before_quantizer.weight.mul_(1e6)
    (tmp_path / "steep").mkdir()
    save_model(tmp_path / "steep", model, Description("tokenizer"))
    words = ["--vae", tmp_path / "steep", "--precision=float16", "--workers=0"]
    code, _, errors = command(*words)
    assert code == 1
    assert "features of the tokenizer are not finite in float16, which is too narrow for it: give float32" in errors
    monkeypatch.setattr("models.precision.told_of_tokens", lambda *_: "as if the first images had been small")
    code, _, errors = command(*words)
    assert code == 1
    assert "--precision=float16: features of images are not finite, so they have no tokens: give float32" in errors
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"plan.json"}


def test_a_disk_that_fills_up_keeps_the_shards_before(cache, command, encoder, small_shards, monkeypatch, tmp_path):
    expected = contents(cache("--views=2"))
    shutil.rmtree(tmp_path / "cache")
    save = np.save

    def fails_in_the_third_shard(file, array, **options):
        if "train_00002_labels" in file.name:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, array, **options)

    monkeypatch.setattr(np, "save", fails_in_the_third_shard)
    code, _, errors = command("--views=2")
    assert code == 1
    assert "train_00002_tokens.npy: could not be written ([Errno 28] No space left on device)" in errors
    left = contents(tmp_path / "cache")
    assert len(left) == 2 * len(ARRAYS) + 1
    assert all(left[name] == expected[name] for name in left if name != "plan.json")

    monkeypatch.setattr(np, "save", save)
    encoder.calls = []
    assert contents(cache("--views=2")) == expected
    assert sum(encoder.calls) == 57 - 10


# --- reading ------------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


MEND = "copy the cache again, or remove it and encode again"


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"),
    [
        ("train_00001_tokens.npy", lambda path: path.unlink(), FileNotFoundError, "missing; the manifest has 5 x 30 uint16"),
        ("train_00001_source.npy", lambda path: path.unlink(), FileNotFoundError, "missing; the manifest has 5 int32"),
        (
            "train_00001_tokens.npy",
            lambda path: os.truncate(path, path.stat().st_size - 1),
            ValueError,
            "not a whole .npy array (mmap length is greater than file size); the manifest has 5 x 30 uint16",
        ),
        ("train_00001_tokens.npy", lambda path: os.truncate(path, 50), ValueError, "not a whole .npy array"),
        ("train_00001_labels.npy", lambda path: path.write_bytes(b""), ValueError, "not a whole .npy array"),
        ("train_00001_labels.npy", lambda path: path.write_bytes(b"\x80\x04N." * 50), ValueError, "not a whole .npy array"),
        (
            "train_00001_tokens.npy",
            lambda path: np.save(path, np.load(path).astype(np.int64)),
            ValueError,
            "holds 5 x 30 int64, the manifest has 5 x 30 uint16",
        ),
        (
            "train_00001_tokens.npy",
            lambda path: np.save(path, np.load(path)[:, :29]),
            ValueError,
            "holds 5 x 29 uint16, the manifest has 5 x 30 uint16",
        ),
        (
            "train_00001_labels.npy",
            lambda path: np.save(path, np.array([Bomb(path.with_name("trace"))] * 5), allow_pickle=True),
            ValueError,
            "not a whole .npy array (Array can't be memory-mapped: Python objects in dtype.)",
        ),
    ],
    ids=["missing", "missing source", "truncated", "short", "empty", "pickle", "other type", "other length", "objects"],
)
def test_a_damaged_shard_is_refused_in_one_line(name, damage, error, message, tmp_path):
    directory = write_cache(tmp_path / "cache", rows=12, per_shard=5, num_tokens=30).directory
    damage(directory / name)
    with pytest.raises(error) as raised:
        TokenCache(directory, "train")
    assert str(raised.value).startswith(f"{directory / name}: {message}")
    assert MEND in str(raised.value)
    assert not (directory / "trace").exists()
    TokenCache(directory, "val")


@pytest.mark.parametrize("array", ARRAYS)
def test_a_flipped_byte_is_found_by_verify(array, tmp_path):
    stored = write_cache(tmp_path / "cache", rows=12, per_shard=5, num_tokens=30)
    stored.verify()
    path = stored.directory / f"train_00001_{array}.npy"
    values = bytearray(path.read_bytes())
    values[-1] ^= 1
    path.write_bytes(values)
    damaged = TokenCache(stored.directory, "train")  # looks right
    with pytest.raises(ValueError, match=rf"{path}: damaged: its SHA-256 is \w{{12}}, the manifest has \w{{12}}: {MEND}"):
        damaged.verify()
    TokenCache(stored.directory, "val").verify()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "3", '{"sides": [1]}'])
def test_a_manifest_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json: not of a token cache of this version \(.*\): remove the cache"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("rows", None), ("rows", {"train": 3}), ("rows_per_shard", {}), ("sides", None)])
def test_a_manifest_that_tells_of_no_files_is_refused(name, value, tmp_path):
    path = write_cache(tmp_path / "cache", 4, 2, 5).directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=r"manifest.json: not of a token cache of this version \(.+\): remove the cache"):
        read_manifest(path.parent)


def test_rows_come_in_the_order_asked_for(tmp_path):
    stored = write_cache(tmp_path / "cache", rows=5000, per_shard=700, num_tokens=4)
    indices = np.random.default_rng(1).integers(0, 5000, 768)
    tokens, labels = stored.gather(indices)
    assert tokens[:, 0].tolist() == (indices % 4096).tolist()
    assert labels.tolist() == (indices % 1000).tolist()
    for start in range(0, 768, 100):
        part = stored.gather(indices[start : start + 100])
        assert torch.equal(part[0], tokens[start : start + 100])
        assert torch.equal(part[1], labels[start : start + 100])
    assert stored.gather(indices[:0])[0].shape == (0, 4)


@pytest.mark.parametrize("index", [-1, 12])
def test_rows_outside_the_cache_are_an_error(index, tmp_path):
    stored = write_cache(tmp_path / "cache", rows=12, per_shard=5, num_tokens=4)
    with pytest.raises((IndexError, ValueError)):
        stored.gather(np.array([3, index]))


# --- training from it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_from_the_cache_is_training_from_the_same_crops(
    precision, cache, images, tokenizer, tmp_path, monkeypatch, capsys
):
    """Square images resized to their final size are not cut, so both ways see the same tokens."""
    flags = [*SMALL, "--max_steps=2"]
    folder = ["--vae", tokenizer, "--data_path", images, "--mid_reso=1", f"--vae_precision={precision}"]
    stored = cache("--center_crop", "--resize=1", f"--precision={precision}")
    for name, source in (("folder", folder), ("cache", ["--token_cache", stored])):
        words = [*flags, *source, "--local_out_dir_path", tmp_path / name]
        code, output, errors = run_in_process(train.main, words, monkeypatch, capsys)
        assert code == 0, errors
        assert ("tokens in bfloat16: " in output) == (precision == "bfloat16" and name == "folder")
    first, second = (load_transformer(tmp_path / name, ema=False) for name in ("folder", "cache"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert read_metrics(tmp_path / "folder")[-1]["val_loss"] == read_metrics(tmp_path / "cache")[-1]["val_loss"]


def test_two_views_do_not_make_an_epoch_longer(cache, tmp_path, monkeypatch, capsys):
    words = [*SMALL, "--max_steps=0", "--ep=1", "--token_cache", cache("--views=2"), "--local_out_dir_path", tmp_path / "run"]
    code, output, errors = run_in_process(train.main, words, monkeypatch, capsys)
    assert code == 0, errors
    assert "24 images, 3 steps" in output


def test_a_cache_of_another_tokenizer_is_refused_naming_both(cache):
    manifest = read_manifest(cache("--center_crop"))
    torch.manual_seed(5)
    with pytest.raises(ValueError, match=r"hash \w{12}, the one given has \w{12}: encode again or give that one"):
        check_cache(manifest, VQVAE(TINY_TOKENIZER), "cache")
    other = VQVAE(replace(TINY_TOKENIZER, sides=(1, 2, 4)))
    with pytest.raises(ValueError, match="cache: holds pyramids 1_2_3_4, the tokenizer makes 1_2_4: give --pn=1_2_3_4"):
        check_cache(manifest, other, "cache")


def test_how_codes_are_looked_up_is_part_of_the_fingerprint(tokenizer):
    model = load_tokenizer(tokenizer)
    other = VQVAE(replace(TINY_TOKENIZER, normalize_lookup=True))
    other.load_state_dict(model.state_dict())
    assert token_cache.fingerprint(model) != token_cache.fingerprint(other)


def test_another_pyramid_is_refused_naming_both(cache, tokenizer):
    with pytest.raises(ValueError, match=r"--pn=1_2_4: the cache .* holds pyramids 1_2_3_4: give --pn=1_2_3_4 or encode again"):
        CachedData(cache("--center_crop"), load_tokenizer(tokenizer), wanted=Pyramid.parse("1_2_4"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            ["cat", "cow", "fox"],
            "A has 3 classes, B 3; the first to differ, number 1, is 'dog' in the one and 'cow' in the other",
        ),
        (["cat", "dog"], "A has 3 classes, B 2; the first to differ, number 2, is 'fox' in the one and missing in the other"),
        (["cat", "dog", "fox", "owl"], "number 3, is missing in the one and 'owl' in the other"),
    ],
)
def test_other_classes_are_refused_naming_both(other, message):
    check_classes(list(CLASSES), list(CLASSES), "A", "B")
    with pytest.raises(ValueError, match=message):
        check_classes(list(CLASSES), other, "A", "B")
