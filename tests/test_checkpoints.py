import os
from pathlib import Path

import pytest

from utils.runs.checkpoints import checkpoint_path, checkpoints, choose_intact, latest_checkpoint, prune, seal


def make_checkpoint(run: Path, step: int, content: bytes = b"weights") -> Path:
    directory = checkpoint_path(run, step)
    (directory / "shards").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(content)
    (directory / "shards" / "part").write_bytes(content)
    seal(directory)
    return directory


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 3)


def remove_file(checkpoint: Path) -> None:
    (checkpoint / "shards" / "part").unlink()


def remove_checksums(checkpoint: Path) -> None:
    (checkpoint / "checksums.json").unlink()


def truncate_checksums(checkpoint: Path) -> None:
    os.truncate(checkpoint / "checksums.json", 20)


def other_checksums(checkpoint: Path) -> None:
    (checkpoint / "checksums.json").write_text('["model.safetensors"]')


def flip_a_byte(checkpoint: Path) -> None:
    (checkpoint / "shards" / "part").write_bytes(b"weightz")


VISIBLE = [
    (truncate, "model.safetensors has 3 of 7 bytes"),
    (remove_file, "shards/part is missing"),
    (remove_checksums, "checksums.json is missing or unreadable"),
    (truncate_checksums, "checksums.json is missing or unreadable"),
    (other_checksums, "checksums.json is missing or unreadable"),
]


@pytest.mark.parametrize(("change", "fault"), [*VISIBLE, (flip_a_byte, "shards/part is not what was written")])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(tmp_path, change, fault):
    older, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    change(newer)
    chosen, notes = choose_intact(tmp_path)
    assert chosen == older
    assert len(notes) == 1
    assert str(newer) in notes[0]
    assert fault in notes[0]
    assert notes[0].endswith("going back to step_9")
    assert names(tmp_path) == ["step_10.damaged", "step_9"]


@pytest.mark.parametrize("change", [change for change, _ in VISIBLE])
def test_what_is_not_whole_is_never_the_latest(tmp_path, change):
    older = make_checkpoint(tmp_path, 1)
    change(make_checkpoint(tmp_path, 2))
    assert latest_checkpoint(tmp_path) == older


def test_a_run_with_nothing_but_damage_is_not_started_anew(tmp_path):
    truncate(make_checkpoint(tmp_path, 1))
    with pytest.raises(ValueError, match="no earlier checkpoint of the run is whole: restore one, or remove"):
        choose_intact(tmp_path)
    assert names(tmp_path) == ["step_1"]


def test_an_intact_run_is_left_alone(tmp_path):
    make_checkpoint(tmp_path, 1)
    newest = make_checkpoint(tmp_path, 2)
    assert choose_intact(tmp_path) == (newest, [])


def test_no_checkpoint_yet(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert choose_intact(tmp_path) == (None, [])


def test_latest_ignores_half_written_and_foreign_directories(tmp_path):
    make_checkpoint(tmp_path, 5)
    for name in (".step_7.writing", "step_final", "step_8.tmp", "step_9.damaged", "other"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert latest_checkpoint(tmp_path).name == "step_5"


def test_pruning_bounds_the_disk_and_takes_what_killed_processes_left(tmp_path):
    for step in (8, 9, 10, 11):
        make_checkpoint(tmp_path, step)
    for name in (".step_7.writing", ".step_8.replaced", "step_12.damaged", "mine"):
        (tmp_path / "checkpoints" / name).mkdir()
    prune(tmp_path, checkpoint_path(tmp_path, 11), keep=2)
    assert names(tmp_path) == ["mine", "step_10", "step_11"]


def test_pruning_spares_the_newest_even_behind_a_later_step(tmp_path):
    """After going back, a step is saved again while one of a later step is still there."""
    for step in (3, 4, 9):
        make_checkpoint(tmp_path, step)
    prune(tmp_path, checkpoint_path(tmp_path, 4), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_4", "step_9"]
