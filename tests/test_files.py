import errno
import os
from pathlib import Path

import pytest
from commands import run_in_process, script

import sample
import train
from utils.files import check_file, check_folder, replace_file, written_aside


def write_and_fail(target: Path) -> None:
    with written_aside(target) as directory:
        (directory / "file").write_text("new")
        raise KeyboardInterrupt


def test_written_aside_appears_under_its_name_at_the_end(tmp_path):
    target = tmp_path / "new" / "step_1"
    with written_aside(target) as directory:
        (directory / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_full_disk_is_told_with_the_file_and_leaves_the_older_one(tmp_path):
    target = tmp_path / "figures.json"
    target.write_text("old")
    told = pytest.raises(OSError, match="figures.json: could not be written .File too large.: make room there, or give")
    with told, replace_file(target):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_error_leaves_no_target(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(tmp_path / "step_1")
    assert list(tmp_path.iterdir()) == []


def test_error_leaves_an_older_target_untouched(tmp_path):
    target = tmp_path / "step_1"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(target)
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "file").read_text() == "old"


def test_older_target_and_remains_of_a_killed_process_are_replaced(tmp_path):
    target = tmp_path / "step_1"
    for path in (target, tmp_path / ".step_1.writing"):
        path.mkdir()
        (path / "stale").touch()
    with written_aside(target) as directory:
        (directory / "file").touch()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_name_that_can_be_written_is_let_through(tmp_path):
    (tmp_path / "there").touch()
    check_file(tmp_path / "there", "--out", overwrite=True)
    check_file(tmp_path / "new" / "deep" / "file", "--out", overwrite=False)
    check_folder(tmp_path, "--out")
    check_folder(tmp_path / "new" / "deep", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


# Each with input that is not there: what is wrong with the output is said before that is looked for.
WRITING = {
    "plot_run": ["none", "--out=OUT.png"],
    "export_checkpoint": ["none", "--out=OUT"],
    "convert_official": ["none.pth", "--out=OUT"],
    "cache_tokens": ["--vae=none", "--data_path=none", "--out=OUT"],
    "train_tokenizer": ["--preset=f8-32", "--data_path=none", "--out=OUT"],
    "train": ["--vae=none", "--data_path=none", "--local_out_dir_path=OUT"],
    "sample": ["--ckpt=none", "--out=OUT.png"],
    "demo": ["--out=OUT"],
    "check_data": [".", "--json=OUT"],
    "benchmark": ["tokens", "--json=OUT"],
    "evaluate": ["none", "none", "--json=OUT"],
    "evaluate stats": ["stats", "none", "--out=OUT.npz"],
    "evaluate reconstruction": ["reconstruction", "none", "--vae=none", "--out=OUT.png"],
}


@pytest.mark.parametrize("command", WRITING)
def test_every_command_says_first_that_it_cannot_write(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    commands = {"train": train.main, "sample": sample.main}
    main = commands.get(command) or script(command.split()[0]).main
    words = [word.replace("OUT", f"{tmp_path}/file/out") for word in WRITING[command]]
    code, _, errors = run_in_process(main, words, monkeypatch, capsys)
    assert code == 1
    assert f"{tmp_path}/file is a file and no folder: give another name" in errors
    assert errors.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["cache_tokens", "train_tokenizer", "train", "demo"])
def test_a_file_where_a_directory_is_wanted(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    main = train.main if command == "train" else script(command).main
    words = [word.replace("OUT", f"{tmp_path}/file") for word in WRITING[command]]
    code, _, errors = run_in_process(main, words, monkeypatch, capsys)
    assert code == 1
    assert f"{tmp_path}/file: is a file: give --" in errors
    assert "the name of a directory\n" in errors


@pytest.mark.parametrize("command", ["plot_run", "check_data", "benchmark"])
def test_a_directory_where_a_file_is_wanted(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.png").mkdir()
    words = [word.replace("OUT.png", "OUT").replace("OUT", f"{tmp_path}/out.png") for word in WRITING[command]]
    code, _, errors = run_in_process(script(command).main, [*words, "--overwrite"], monkeypatch, capsys)
    assert code == 1
    assert f"{tmp_path}/out.png: is a directory: give --" in errors
    assert "the name of a file\n" in errors
