"""The images of a run: listed by one rank for all, and without those that cannot be read."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from commands import CLASSES, SMALL, ImageFlags, assert_same_training, make_images, run_in_process, script

import dist
import train
from dist import Ranks
from utils.data.images import read_folders
from utils.runs import listing
from utils.runs.listing import images_of

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
BROKEN = ("train/cat/3.png", "train/fox/0.png", "val/dog/1.png")


def spoil(root: Path, names: tuple[str, ...] = BROKEN) -> Path:
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return root


@pytest.fixture
def spoilt(tmp_path):
    """36 pictures in all, of which three cannot be read."""
    return spoil(make_images(tmp_path / "images", val=4))


def in_two(work, meeting: Path) -> list:
    """What `work(ranks)` gives on each of two ranks, or what ended it; forked: importing torch takes longer than all else."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def take_part(rank: int) -> None:
        torch_dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        try:
            results.put((rank, work(Ranks(rank, 2, CPU))))
        except BaseException as error:
            results.put((rank, repr(error)))

    processes = [context.Process(target=take_part, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[0], found[1]]


def in_words(images: tuple) -> tuple:
    return (*(list(zip(files.names, files.labels.tolist(), strict=True)) for files in images[:2]), images[2])


# --- once for all -------------------------------------------------------------------------------------------------------


def test_one_rank_lists_for_both_however_long_it_takes(images, tmp_path, monkeypatch):
    flags = ImageFlags(images, skip_bad=False)
    alone = in_words(images_of(flags, ALONE, tmp_path / "none"))
    monkeypatch.setattr(dist, "STILL_AT_IT", 0.05)

    def slowly(root, share):
        time.sleep(0.3)
        return read_folders(root, share)

    def work(ranks: Ranks) -> tuple:
        monkeypatch.setattr(listing, "read_folders", slowly if ranks.is_main else None)
        return in_words(images_of(flags, ranks, tmp_path / "none"))

    both = in_two(work, tmp_path / "meeting")
    assert both == [alone, alone]
    assert alone[2] == [f"{images}: 24 images of 3 classes (train/<class>/*), 9 held out (val/<class>/*)"]


def test_what_is_wrong_with_a_folder_ends_both_in_one_line(tmp_path):
    make_images(tmp_path / "images")
    (tmp_path / "images" / "train" / "cat" / "notes.txt").touch()
    both = in_two(lambda ranks: images_of(ImageFlags(tmp_path / "images"), ranks, tmp_path / "none"), tmp_path / "meeting")
    assert "cat/notes.txt: not an image file" in both[0]
    assert both[1] == "SystemExit(1)"


# --- what cannot be read ------------------------------------------------------------------------------------------------


def test_bad_files_are_left_out_and_noted(spoilt, tmp_path):
    clean, _ = read_folders(spoilt)
    train_files, val_files, told = images_of(ImageFlags(spoilt), ALONE, tmp_path / "run" / "skipped.json")
    assert list(train_files.names) == [name for name in clean.names if name not in BROKEN]
    assert (len(train_files), len(val_files)) == (22, 11)
    assert train_files.labels.tolist() == [0] * 7 + [1] * 8 + [2] * 7
    assert told[1] == f"3 of 36 files cannot be read and are left out, listed in {tmp_path / 'run' / 'skipped.json'}"
    assert [line.partition(": not a readable image")[0] for line in told[2:]] == [
        f"left out: {spoilt / name}" for name in BROKEN
    ]
    record = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert list(record["train"]) == ["3", "16"]
    assert list(record["val"]) == ["5"]


def test_both_ranks_look_and_leave_out_the_same(spoilt, tmp_path):
    both = in_two(lambda ranks: in_words(images_of(ImageFlags(spoilt), ranks, tmp_path / "both.json")), tmp_path / "meeting")
    alone = in_words(images_of(ImageFlags(spoilt), ALONE, tmp_path / "alone.json"))
    assert both[0][:2] == both[1][:2] == alone[:2]
    assert (tmp_path / "both.json").read_text() == (tmp_path / "alone.json").read_text()


def test_a_run_that_goes_on_leaves_out_what_it_left_out_before(spoilt, tmp_path, monkeypatch):
    first = in_words(images_of(ImageFlags(spoilt), ALONE, tmp_path / "skipped.json"))
    make_images(tmp_path / "whole", val=4)
    (tmp_path / "whole" / BROKEN[0]).replace(spoilt / BROKEN[0])  # repaired meanwhile
    with monkeypatch.context() as patch:
        patch.setattr(listing, "find_unreadable", lambda *_: pytest.fail("looks at all files again"))
        assert in_words(images_of(ImageFlags(spoilt), ALONE, tmp_path / "skipped.json")) == first
    (spoilt / BROKEN[1]).unlink()  # other files: all are looked at
    names = set(images_of(ImageFlags(spoilt), ALONE, tmp_path / "skipped.json")[0].names)
    assert BROKEN[0] in names
    assert len(names) == 23


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_end_the_run(spoilt, tmp_path, workers):
    message = r"3 of 36 files cannot be read, more than --max_bad=0.08: they are listed in .*skipped.json: repair them"
    with pytest.raises(ValueError, match=message):
        images_of(ImageFlags(spoilt, max_bad=0.08, workers=workers), ALONE, tmp_path / "skipped.json")
    assert len(images_of(ImageFlags(spoilt, max_bad=3 / 36), ALONE, tmp_path / "skipped.json")[0]) == 22


def test_a_class_of_which_nothing_is_left_ends_the_run(tmp_path):
    root = spoil(make_images(tmp_path / "images", train=2), ("train/fox/0.png", "train/fox/1.png"))
    with pytest.raises(ValueError, match="no file of class 'fox' can be read"):
        images_of(ImageFlags(root, max_bad=0.5), ALONE, tmp_path / "skipped.json")
    spoil(root, tuple(f"val/{name}/{number}.png" for name in CLASSES for number in range(3)))
    (tmp_path / "skipped.json").unlink()
    (root / "train" / "fox" / "0.png").write_bytes((root / "train" / "cat" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="no held-out file can be read"):
        images_of(ImageFlags(root, max_bad=0.9), ALONE, tmp_path / "skipped.json")


def test_another_file_is_not_taken_for_a_record(spoilt, tmp_path):
    (tmp_path / "skipped.json").write_text("[1]")
    with pytest.raises(ValueError, match="skipped.json: not a list of skipped files"):
        images_of(ImageFlags(spoilt), ALONE, tmp_path / "skipped.json")
    assert (tmp_path / "skipped.json").read_text() == "[1]"


# --- through the commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def cleaned(tmp_path):
    """The same pictures without the bad ones."""
    root = make_images(tmp_path / "cleaned", val=4)
    for name in BROKEN:
        (root / name).unlink()
    return root


def test_training_is_that_without_the_bad_files(spoilt, cleaned, tokenizer, tmp_path, monkeypatch, capsys):
    for root, run, flags in ((cleaned, "cleaned_run", []), (spoilt, "run", ["--skip_bad", "--max_bad=0.1"])):
        words = [*SMALL, "--vae", tokenizer, "--data_path", root, "--local_out_dir_path", tmp_path / run, *flags]
        code, output, errors = run_in_process(train.main, words, monkeypatch, capsys)
        assert code == 0, errors
    assert "3 of 36 files cannot be read and are left out" in output
    assert_same_training(tmp_path / "run", tmp_path / "cleaned_run")


def test_a_cache_is_that_without_the_bad_files(spoilt, cleaned, tokenizer, tmp_path, monkeypatch, capsys):
    for root, out, flags in ((cleaned, "a", []), (spoilt, "b", ["--skip_bad", "--max_bad=0.1"])):
        words = ["--vae", tokenizer, "--data_path", root, "--out", tmp_path / out, *flags]
        code, _, errors = run_in_process(script("cache_tokens").main, words, monkeypatch, capsys)
        assert code == 0, errors
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab")
    assert ours == theirs
    assert list(json.loads((tmp_path / "b.skipped.json").read_text())["train"]) == ["3", "16"]


def test_a_tokenizer_is_trained_on_a_share_and_without_bad_files(spoilt, tmp_path, monkeypatch, capsys):
    (spoilt / "val").rename(tmp_path / "elsewhere")
    words = ["--preset=f8-32", "--bs=4", "--max_steps=1", "--gan=0", "--data_path", spoilt, "--out", tmp_path / "run"]
    words += ["--val_share=0.3", "--skip_bad", "--max_bad=0.1"]
    code, output, errors = run_in_process(script("train_tokenizer").main, words, monkeypatch, capsys)
    assert code == 0, errors
    assert "0.3 of it by a hash of file names" in output
    assert "2 of 24 files cannot be read and are left out" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_bad=1"], "--max_bad=1.0: give a share from 0 to below 1"),
        (["--val_share=-0.1"], "--val_share=-0.1: give a share from 0 to below 1"),
        (
            ["--skip_bad", "--token_cache=x"],
            "--skip_bad=True: is of images, and --token_cache has none: give it to scripts/cache_tokens.py",
        ),
    ],
)
def test_wrong_flags_get_one_line(flags, message, monkeypatch, capsys):
    code, _, errors = run_in_process(train.main, flags, monkeypatch, capsys)
    assert code == 2
    assert message in errors
