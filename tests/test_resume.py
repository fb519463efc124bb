"""Runs that end badly: stopped, killed, damaged, out of disk, and what the same command makes of them afterwards."""

import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import (
    ROOT,
    SMALL,
    TINY_TOKENIZER,
    assert_same_training,
    environment,
    run_in_process,
    script,
    shell_words,
)
from forked import Forked, run_forked

import train
from dist import Ranks
from models.tokenizer import VQVAE
from trainer import Trainer
from utils.checkpoint import Description, load_transformer, save_model
from utils.files import written_aside
from utils.runs.checkpoints import checkpoint_path, checkpoints, seal
from utils.runs.log import read_metrics
from utils.runs.resume import chosen_seed


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments: run_in_process(train.main, list(arguments), monkeypatch, capsys)


@pytest.fixture(scope="module")
def source(images, tokenizer):
    return [*SMALL, "--vae", tokenizer, "--data_path", images, "--save_every=2", "--drop_path=0.5", "--class_dropout=0.3"]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An uninterrupted run of four steps, with dropouts on."""
    run = tmp_path_factory.mktemp("whole")
    result = run_forked("train.py", *source, "--local_out_dir_path", run)
    assert result.returncode == 0, result.stderr
    return run


def steps(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


# --- resumed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--ac=2", "--workers=1", "--hflip"],
        ["--fp16=1", "--tblr=0.01"],
        ["--fp16=2", "--tblr=0.01", "--ema=0"],
        ["--pg=0.9", "--pg0=0", "--twde=0.2", "--ls=0.1"],
        ["--family=markov", "--scale_groups=each", "--recompute"],
        ["--family=markov-mamba", "--saln", "--val_every=3"],
        ["--family=var", "--val_every=2"],
    ],
    ids=" ".join,
)
def test_the_same_command_resumes_and_ends_as_if_never_stopped(flags, source, tmp_path, command):
    for name in ("whole", "stopped"):
        assert command(*source, *flags, "--local_out_dir_path", tmp_path / name)[0] == 0
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_4")
    code, output, _ = command(*source, *flags, "--local_out_dir_path", tmp_path / "stopped")
    assert code == 0
    assert "resuming at step 2" in output
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_from_cached_views_resumes_too(source, images, tokenizer, tmp_path, command, monkeypatch, capsys):
    words = ["--vae", tokenizer, "--data_path", images, "--out", tmp_path / "cache", "--views=2"]
    assert run_in_process(script("cache_tokens").main, words, monkeypatch, capsys)[0] == 0
    flags = [*source, "--data_path=imagenet", "--token_cache", tmp_path / "cache", "--local_out_dir_path"]
    for name in ("whole", "stopped"):
        assert command(*flags, tmp_path / name)[0] == 0
    shutil.rmtree(checkpoint_path(tmp_path / "stopped", 4))
    assert command(*flags, tmp_path / "stopped")[0] == 0
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_goes_on_with_another_precision_and_starts_an_average(images, tokenizer, tmp_path, command):
    run = ["--vae", tokenizer, "--data_path", images, "--local_out_dir_path", tmp_path]
    assert command(*SMALL, *run, "--max_steps=2", "--ema=0")[0] == 0
    trained = load_transformer(tmp_path, ema=False)
    code, output, errors = command(*SMALL, *run, "--max_steps=3", "--fp16=1", "--tblr=1e-9")
    assert code == 0, errors
    assert "resuming at step 2" in output
    assert (load_transformer(tmp_path).head.weight - trained.head.weight).abs().max() < 1e-6  # not the initial weights


@pytest.mark.parametrize("text", ["", "{}", "null", '{"training": {"seed": null}}'])
def test_a_run_that_does_not_say_its_seed(text, tmp_path):
    checkpoint_path(tmp_path, 1).mkdir(parents=True)
    seal(checkpoint_path(tmp_path, 1))
    (tmp_path / "config.json").write_text(text)
    ranks = Ranks(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"config.json: does not say the seed of the run in .*, or give --seed"):
        chosen_seed(None, tmp_path, ranks)
    assert chosen_seed(3, tmp_path, ranks) == 3


def test_a_finished_run_is_left_as_it_is(whole, source, command):
    before = {path: path.read_bytes() for path in (whole / "checkpoints").rglob("*") if path.is_file()}
    code, output, _ = command(*source, "--local_out_dir_path", whole)
    assert code == 0
    assert "nothing left to do at step 4" in output
    assert {path: path.read_bytes() for path in (whole / "checkpoints").rglob("*") if path.is_file()} == before


# --- asked to stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_leaves(number, whole, source, tmp_path, command, monkeypatch):
    usual = Trainer.train_step

    def step_with_signal(trainer, batches):
        if trainer.state.step == 2:
            os.kill(os.getpid(), number)
        return usual(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_with_signal)
        code, output, _ = command(*source, "--local_out_dir_path", tmp_path / "run")
    assert code == 128 + number
    assert f"stopped by {number.name} after step 3, which is saved" in output
    assert steps(tmp_path / "run") == ["step_2", "step_3"]
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert command(*source, "--local_out_dir_path", tmp_path / "run")[0] == 0
    assert_same_training(whole, tmp_path / "run")


def test_a_signal_during_validation_leaves_it_to_the_next_run(source, tmp_path, command, monkeypatch):
    flags = [*source, "--val_every=2", "--local_out_dir_path"]
    assert command(*flags, tmp_path / "whole")[0] == 0
    usual = train.NextScalePrediction.evaluate

    def evaluate_with_signal(task, state, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return usual(task, state, stop)

    with monkeypatch.context() as patch:
        patch.setattr(train.NextScalePrediction, "evaluate", evaluate_with_signal)
        assert command(*flags, tmp_path / "run")[0] == 143
    assert steps(tmp_path / "run") == ["step_2"]
    assert not any("val_loss" in entry for entry in read_metrics(tmp_path / "run"))
    assert command(*flags, tmp_path / "run")[0] == 0
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_two_ranks_under_torchrun_stop_together(source, tmp_path):
    """With processes that load images, which get no say in it."""
    words = shell_words("train.py", *source, "--max_steps=4000", "--workers=1", "--local_out_dir_path", tmp_path, ranks=2)
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        wait_for(lambda: checkpoints(tmp_path))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    text = (tmp_path / "output").read_text()
    assert "stopped by SIGTERM after step" in text
    step = int(text.split("stopped by SIGTERM after step ")[1].split(",")[0])
    assert steps(tmp_path)[-1] == f"step_{step}"


def test_a_signal_in_the_last_validation_costs_that_validation_once(source, tmp_path, command, monkeypatch):
    """It is done by the next command and logged once, however often the finished run is started again."""
    flags = [*source, "--local_out_dir_path", tmp_path / "run"]
    usual = train.NextScalePrediction.evaluate

    def evaluate_with_signal(task, state, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return usual(task, state, stop)

    with monkeypatch.context() as patch:
        patch.setattr(train.NextScalePrediction, "evaluate", evaluate_with_signal)
        assert command(*flags)[0] == 143
    for _ in range(3):
        assert command(*flags)[0] == 0
        assert [entry["step"] for entry in read_metrics(tmp_path / "run") if "val_loss" in entry] == [4]
        assert (tmp_path / "run" / "val_classes.jsonl").read_text().count("\n") == 1


def test_signals_to_everyone_twice_are_one_request(source, tmp_path):
    """As schedulers send them, also to the processes that load images, and torchrun passes them on."""
    words = shell_words("train.py", *source, "--max_steps=4000", "--workers=2", "--local_out_dir_path", tmp_path)
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        wait_for(lambda: checkpoints(tmp_path))
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.01)
        assert process.wait(60) == 143, (tmp_path / "output").read_text()
    assert "stopped by SIGTERM after step" in (tmp_path / "output").read_text()


# --- killed -------------------------------------------------------------------------------------------------------------


KILL_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, ".")
import train
import utils.runs.saving as module
from utils import cli

usual, calls = module.{function}, []

def kill_at_the_second_call(*arguments):
    calls.append(arguments)
    if len(calls) == {call}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return usual(*arguments)

module.{function} = kill_at_the_second_call
cli.run(train.main)
"""


@pytest.mark.parametrize(
    ("function", "call", "before"),
    [("write_tensors", 5, "open(arguments[0], 'wb').write(b'half')"), ("seal", 2, ""), ("prune", 2, "")],
)
def test_a_kill_while_a_checkpoint_is_written_costs_that_checkpoint_at_most(
    function, call, before, whole, source, tmp_path, command
):
    code = KILL_WHILE_SAVING.format(function=function, call=call, before=before)
    (tmp_path / "killed.py").write_text(code)
    words = [tmp_path / "killed.py", *source, "--local_out_dir_path", tmp_path / "run"]
    assert run_forked(*words).returncode == -signal.SIGKILL
    assert steps(tmp_path / "run")[0] == "step_2"
    result, output, _ = command(*source, "--local_out_dir_path", tmp_path / "run")
    assert result == 0
    assert f"resuming at step {4 if function == 'prune' else 2}" in output or "nothing left to do at step 4" in output
    assert_same_training(whole, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_2", "step_4"]


def test_one_killed_rank_of_two_is_restarted_by_torchrun_and_nothing_is_lost(source, tmp_path):
    """Elastic restart: the result is that of a run that nobody killed, bit for bit."""
    flags = [*source, "--ac=2", "--max_steps=40", "--save_every=5", "--keep=1", "--local_out_dir_path"]
    assert run_forked("train.py", *flags, tmp_path / "whole", ranks=2).returncode == 0
    words = shell_words("train.py", *flags, tmp_path / "killed", ranks=2)
    words.insert(words.index("--standalone"), "--max-restarts=1")
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        wait_for(lambda: checkpoints(tmp_path / "killed"))
        victim = children(process.pid)[-1]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(120) == 0, (tmp_path / "output").read_text()
    assert "resuming at step" in (tmp_path / "output").read_text()
    assert_same_training(tmp_path / "whole", tmp_path / "killed")


def test_a_killed_run_of_two_ranks_goes_on_with_one(source, tmp_path, command):
    flags = [*source, "--max_steps=4000", "--local_out_dir_path", tmp_path]
    with Forked("train.py", *flags, ranks=2) as killed:
        wait_for(lambda: checkpoints(tmp_path))
        killed.kill()
    saved = int(steps(tmp_path)[-1].removeprefix("step_"))
    code, output, errors = command(*flags, f"--max_steps={saved + 2}")
    assert code == 0, errors
    assert f"resuming at step {saved}" in output
    assert "the run so far had 2 rank(s), now 1: same batches" in output
    assert steps(tmp_path)[-1] == f"step_{saved + 2}"


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_runs_do_not_share_a_directory(source, tmp_path, command):
    with Forked("train.py", *source, "--max_steps=4000", "--local_out_dir_path", tmp_path):
        wait_for(lambda: checkpoints(tmp_path))
        code, _, errors = command(*source, "--local_out_dir_path", tmp_path)
        assert code == 1
        assert "another process is writing there: end it first, or give another directory" in errors
    saved = int(steps(tmp_path)[-1].removeprefix("step_"))
    code, output, _ = command(*source, f"--max_steps={saved + 1}", "--local_out_dir_path", tmp_path)
    assert code == 0  # the dead process keeps nobody out
    assert f"resuming at step {saved}" in output


# --- damaged, out of disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model", "ema", "optimizer"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(file, whole, source, tmp_path, command):
    shutil.copytree(whole, tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", 4) / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    code, output, _ = command(*source, "--local_out_dir_path", tmp_path / "run")
    assert code == 0
    assert f"step_4: damaged, {file}.safetensors is not what was written (SHA-256 differs): going back to step_2" in output
    assert "resuming at step 2" in output
    assert_same_training(whole, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_2", "step_4"]


def test_weights_are_not_taken_from_a_truncated_checkpoint(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    os.truncate(checkpoint_path(tmp_path / "run", 4) / "ema.safetensors", 1000)
    expected = load_transformer(checkpoint_path(whole, 2))
    assert load_transformer(tmp_path / "run").head.weight.equal(expected.head.weight)


def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint_whole(whole, source, tmp_path, command, monkeypatch):
    """A limit on the size of files stands for the full disk: the system refuses to write on, in the middle of a file."""
    usual = Trainer.save

    def save_with_little_room(trainer):
        if trainer.state.step == 2:
            return usual(trainer)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        try:
            return usual(trainer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_with_little_room)
        code, _, errors = command(*source, "--local_out_dir_path", tmp_path / "run")
    assert code == 1
    assert len([line for line in errors.splitlines() if "error" in line.lower()]) == 1
    assert "could not be written" in errors
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2"]
    assert command(*source, "--local_out_dir_path", tmp_path / "run")[0] == 0
    assert_same_training(whole, tmp_path / "run")


def test_other_circumstances_are_told(whole, source, images, tmp_path, command):
    shutil.copytree(whole, tmp_path / "run")
    code, output, errors = command(*source, "--seed=2", "--bs=4", "--max_steps=5", "--local_out_dir_path", tmp_path / "run")
    assert code == 0, errors
    assert "the run so far had seed 1, now 2: from here on other batches" in output
    assert "the run so far had batch size 8, now 4: from here on other batches" in output


def test_a_changed_schedule_is_told_with_old_and_new_values(whole, source, tmp_path, command):
    """A longer run raises its learning rate again, and a cosine that had ended goes on in its middle."""
    shutil.copytree(whole, tmp_path / "run")
    flags = ["--max_steps=6", "--tblr=0.5", "--local_out_dir_path", tmp_path / "run"]
    code, output, errors = command(*source, *flags)
    assert code == 0, errors
    told = [line for line in output.splitlines() if "from here on its schedule is that of the new flags" in line]
    assert len(told) == 1
    assert "(now 6)" in told[0]
    assert "(now 0.5)" in told[0]
    code, output, _ = command(*source, *flags)
    assert code == 0
    assert "its schedule" not in output


def test_a_run_is_not_resumed_on_the_tokens_of_another_tokenizer(whole, source, tmp_path, command):
    other = VQVAE(TINY_TOKENIZER)
    with written_aside(tmp_path / "tokenizer") as directory:
        save_model(directory, other, Description("tokenizer"))
    code, _, errors = command(*source, "--vae", tmp_path / "tokenizer", "--local_out_dir_path", whole)
    assert code == 1
    assert "trained on tokens of a tokenizer with hash" in errors


def test_a_run_is_not_resumed_with_other_classes(whole, source, images, tmp_path, command):
    shutil.copytree(images, tmp_path / "images")
    for split in ("train", "val"):
        (tmp_path / "images" / split / "dog").rename(tmp_path / "images" / split / "eel")
    code, _, errors = command(*source, "--data_path", tmp_path / "images", "--local_out_dir_path", whole)
    assert code == 1
    assert "number 1, is 'dog' in the one and 'eel' in the other" in errors
