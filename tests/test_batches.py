"""Processes that load images, and what becomes of a run whose images do not come: real commands, which have to end."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from commands import ROOT, make_images

from utils.data import batches
from utils.data.images import Images, read_folders
from utils.processes import children, environment, shell_words
from utils.runs.checkpoints import checkpoints

SMALL = ["--depth=1", "--width=64", "--heads=1", "--bs=6", "--mid_reso=1.25", "--val_every=100000", "--save_every=2"]
ENDS_WITHIN = 60


@pytest.fixture
def stuck_images(images, tmp_path):
    """The data set, with a picture in it that never comes: a pipe that nobody writes to."""
    shutil.copytree(images, tmp_path / "images")
    os.mkfifo(tmp_path / "images" / "train" / "cat" / "zz.png")
    return tmp_path / "images"


def started(*words, ranks: int = 1, output) -> subprocess.Popen:
    with open(output, "w") as file:
        return subprocess.Popen(
            shell_words(*words, ranks=ranks), cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT
        )


def wait_for(happened, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def training(images, tokenizer, run) -> list:
    return ["train.py", "--vae", tokenizer, "--data_path", images, *SMALL, "--max_steps=100000", "--local_out_dir_path", run]


def descendants(pid: int) -> list[int]:
    return [own for child in children(pid) for own in (child, *descendants(child))]


def lasting(pid: int, seconds: float) -> int:
    """The last process below this one that has been there so long; others, such as git, come and go."""
    seen: dict[int, float] = {}

    def found() -> list[int]:
        now = time.monotonic()
        there = {child: seen.get(child, now) for child in descendants(pid)}
        seen.clear()
        seen.update(there)
        return [child for child, since in seen.items() if now - since > seconds]

    wait_for(found)
    return found()[-1]


def test_no_batch_for_long_names_shared_memory(tmp_path, monkeypatch):
    root = make_images(tmp_path / "images")
    os.mkfifo(root / "val" / "cat" / "zz.png")
    monkeypatch.setattr(batches, "LOOK_EVERY", 0.5)
    monkeypatch.setattr(batches, "LONGEST_WAIT", 1.0)
    with pytest.raises(OSError, match="no batch of images for 1 seconds: .*/dev/shm.*docker --shm-size.*--workers=0"):
        list(batches.val_batches(Images(read_folders(root)[1], 16), 4, workers=1))


def test_a_stop_is_seen_while_a_batch_does_not_come(stuck_images, tokenizer, tmp_path):
    """And what was trained until then is saved."""
    process = started(*training(stuck_images, tokenizer, tmp_path / "run"), "--workers=1", output=tmp_path / "output")
    lasting(process.pid, 5)  # every picture is asked for in the first epoch, of four steps
    process.send_signal(signal.SIGTERM)
    assert process.wait(ENDS_WITHIN) == 143, (tmp_path / "output").read_text()
    assert "stopped by SIGTERM after step" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_worker_ends_the_run_in_one_line(ranks, images, tokenizer, tmp_path):
    words = training(images, tokenizer, tmp_path / "run")
    process = started(*words, "--workers=1", ranks=ranks, output=tmp_path / "output")
    wait_for(lambda: checkpoints(tmp_path / "run"))
    os.kill(lasting(process.pid, 1), signal.SIGKILL)
    assert process.wait(ENDS_WITHIN) == 1, (tmp_path / "output").read_text()
    output = (tmp_path / "output").read_text()
    assert "a process that loads images has ended" in output
    assert ranks > 1 or "Traceback" not in output


BROKEN = """
import sys
sys.path.insert(0, ".")
import train, trainer
from utils import cli

usual, calls = trainer.Trainer.train_step, []

def fail_at_the_third(self, batches):
    calls.append(1)
    if len(calls) == 3:
        raise RuntimeError("not foreseen")
    return usual(self, batches)

trainer.Trainer.train_step = fail_at_the_third
cli.run(train.main)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_unforeseen_error_ends_the_run_whatever_its_workers_do(ranks, images, tokenizer, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    words = [tmp_path / "broken.py", *training(images, tokenizer, tmp_path / "run")[1:], "--workers=2"]
    process = started(*words, ranks=ranks, output=tmp_path / "output")
    assert process.wait(ENDS_WITHIN) == 1, (tmp_path / "output").read_text()
    assert "not foreseen" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("command", ["train_tokenizer", "cache_tokens"])
def test_other_commands_end_too_when_a_worker_is_killed(command, images, tokenizer, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    os.mkfifo(tmp_path / "images" / "train" / "cat" / "zz.png")
    words = ["--data_path", tmp_path / "images", "--out", tmp_path / "out", "--workers=1"]
    words += ["--vae", tokenizer] if command == "cache_tokens" else [f"--init_from={tokenizer}", "--bs=4", "--gan=0"]
    process = started(f"scripts/{command}.py", *words, output=tmp_path / "output")
    os.kill(lasting(process.pid, 3), signal.SIGKILL)
    assert process.wait(ENDS_WITHIN) == 1, (tmp_path / "output").read_text()
    assert "a process that loads images has ended" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_goes_while_it_hands_over_a_batch_is_told_like_any_other(images, monkeypatch, error):
    def lost(self):
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", lost)
    with pytest.raises(OSError, match="a process that loads images has ended"):
        list(batches.val_batches(Images(read_folders(images)[1], 16), 4, workers=1))
