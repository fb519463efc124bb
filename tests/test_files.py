from pathlib import Path

import pytest

from utils.files import written_aside


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
