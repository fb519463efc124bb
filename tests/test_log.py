import contextlib
import json
import math
import os
import resource
import sys
import threading

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.runs.log import RunLog, clock, console_line, read_entries, read_metrics, read_repeatable_metrics, silent_writer

FIGURES = {
    "loss": 6.1234,
    "loss_last": 7.01,
    "accuracy": 0.052,
    "grad_norm": 0.31,
    "learning_rate": 3e-4,
    "loss_scale": 2048.0,
    "images_per_second": 812.3,
    "mfu": 0.31,
    "memory_gb": 41.2,
}


def events(run) -> EventAccumulator:
    return EventAccumulator(str(run)).Reload()


def strict(line: str) -> dict:
    """What a JSON reader other than Python's sees."""

    def refuse(word: str):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.fixture
def clock_hand(monkeypatch):
    """Seconds that pass only when told to."""
    hand = {"now": 0.0}
    monkeypatch.setattr("utils.runs.log.time.monotonic", lambda: hand["now"])
    return hand


def test_a_resumed_log_drops_what_will_be_redone_and_a_torn_line(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    for step in (1, 2, 3):
        log.metrics(step, {"loss": 1.0 / step})
        log.classes(step, [1.0 / step, 2.0], [0.5, 0.25])
        if step == 1:
            log.metrics(step, {"loss": 1.0, "val_loss": 3.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss_by_scale": {"1x1": 2.0}')  # torn behind a bracket
    with open(tmp_path / "val_classes.jsonl", "a") as file:
        file.write('{"step": 2')
    log = RunLog(tmp_path, is_main=True, step=2)
    log.metrics(3, {"loss": 0.25})
    log.close()
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)] == [(1, 1.0), (1, 1.0), (2, 0.5), (3, 0.25)]
    assert log.has_validation(1)
    assert not log.has_validation(2)
    # the validation of step 2 was not finished: it will be done again
    assert [entry["step"] for entry in read_entries(tmp_path / "val_classes.jsonl")] == [1]


def test_nested_figures_stay_nested_in_the_file_and_become_curves(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    log.metrics(7, {"loss": 3.2, "loss_by_scale": {"1x1": 2.0, "2x2": 2.2}})
    log.close()
    assert read_metrics(tmp_path)[0]["loss_by_scale"] == {"1x1": 2.0, "2x2": 2.2}
    written = events(tmp_path)
    assert sorted(written.Tags()["scalars"]) == ["loss", "loss_by_scale/1x1", "loss_by_scale/2x2"]
    point = written.Scalars("loss_by_scale/2x2")[0]
    assert (point.step, point.value) == (7, pytest.approx(2.2))


def test_figures_that_json_cannot_hold_are_null(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    log.metrics(1, {"grad_norm": math.inf, "loss_by_scale": {"1x1": math.nan}})
    log.classes(1, [2.5, math.nan], [0.1, None])
    log.close()
    entry = strict((tmp_path / "metrics.jsonl").read_text())
    assert (entry["grad_norm"], entry["loss_by_scale"]) == (None, {"1x1": None})
    classes = strict((tmp_path / "val_classes.jsonl").read_text())
    assert classes == {"step": 1, "loss": [2.5, None], "accuracy": [0.1, None]}


def test_pictures_are_whole_in_tensorboard(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    log.image(5, "samples", Image.new("L", (6, 4), 200))
    log.close()
    image = events(tmp_path).Images("samples")[0]
    assert (image.step, image.width, image.height) == (5, 6, 4)


def test_only_the_main_rank_writes(tmp_path, capsys):
    log = RunLog(tmp_path / "run", is_main=False)
    log.metrics(1, {"loss": 1.0})
    log.classes(1, [1.0], [0.5])
    log.image(1, "samples", Image.new("RGB", (2, 2)))
    log.text("hello")
    log.progress(1, 2, 0.5, 10, {})
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_there_is_a_line_now_and_then_and_the_last_one_always(tmp_path, capsys, clock_hand):
    log = RunLog(tmp_path, is_main=True)
    for step, now in ((1, 0), (2, 19), (3, 21), (4, 22), (5, 23)):
        clock_hand["now"] = now
        log.progress(step, 8, step / 8, now, {"loss": 2.0})
    log.close()
    shown = capsys.readouterr()
    assert [line.split(" (")[0] for line in shown.out.splitlines()] == ["step 1/8", "step 3/8", "step 5/8"]
    assert shown.err == ""
    assert not (tmp_path / "log.txt").exists()


def test_the_last_line_is_not_printed_twice(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=True)
    log.progress(8, 8, 1.0, 60, {"loss": 2.0})
    log.close()
    assert capsys.readouterr().out == "step 8/8 (100.0%) | loss 2.000 | 00:00 left\n"


def test_a_terminal_gets_a_bar_with_the_same_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    log = RunLog(tmp_path, is_main=True)
    log.progress(1, 8, 0.125, 60, {"loss": 3.0})
    log.progress(2, 8, 0.25, 60, {"loss": 2.0})  # too soon after the first to be drawn at once
    log.close()
    shown = capsys.readouterr()
    assert "| step 2/8 (25.0%) | loss 2.000 | 03:00 left" in shown.err
    assert shown.out == ""


def test_the_console_line():
    assert console_line(1200, 50000, FIGURES, 3723) == (
        "step 1200/50000 (2.4%) | loss 6.123 (last 7.01) | acc 5.2% | grad 0.31 | lr 3.0e-04 | scale 2048 | 812 img/s | "
        "mfu 31% | 41.2 GB | 1:02:03 left"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ""),
        ({"loss": 0.05, "psnr": 21.34, "vq_loss": 1.0}, " | loss 0.05000 | 21.3 dB"),
        ({"loss_last": 7.0, "images_per_second": 0.42}, " | (last 7.00) | 0.42 img/s"),
        ({"loss_scale": 2.0**20, "grad_norm": math.inf}, " | grad inf | scale 1048576"),
    ],
)
def test_the_console_line_leaves_out_what_is_absent(values, expected):
    assert console_line(1, 3, values, None) == "step 1/3 (33.3%)" + expected


def test_text_is_kept_with_its_time(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=True)
    log.text("step 3 done")
    log.close()
    assert capsys.readouterr().out == "step 3 done\n"
    assert (tmp_path / "log.txt").read_text().endswith(" step 3 done\n")


@contextlib.contextmanager
def little_room(size: int):
    """No file may become larger than this many bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_full_disk_is_told_once_and_lines_wait_for_room(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=True)
    log.metrics(1, {"loss": 1.0})
    log.classes(1, [1.0], [0.5])
    with little_room(120):
        for step in (2, 3, 4, 5):
            log.metrics(step, {"loss": 1.0 / step})
            log.text(f"step {step} " + 60 * ".")
        log.image(5, "samples", Image.effect_noise((64, 64), 50).convert("RGB"))
    told = capsys.readouterr().err.splitlines()
    for name in ("metrics.jsonl: could", "log.txt: could", "TensorBoard's file could", "a picture is left out: "):
        assert sum(name in line for line in told) == 1, told
    assert len(told) == 4
    assert all(line.startswith("warning: ") and "File too large" in line and "make room" in line for line in told)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]  # no part of a line is left
    log.metrics(6, {"loss": 0.1})
    log.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "log.txt").read_text().count("\n") == 4
    assert list((tmp_path / "pictures").iterdir()) == []
    assert capsys.readouterr().err == ""


def test_what_never_found_room_is_told_at_the_end(tmp_path, capsys):
    with little_room(10):
        log = RunLog(tmp_path, is_main=True)
        log.metrics(1, {"loss": 1.0})
        log.metrics(2, {"loss": 1.0})
        log.close()
    told = capsys.readouterr().err
    assert "TensorBoard's file could not be written (File too large)" in told
    assert f"{tmp_path / 'metrics.jsonl'}: could not be written to the end, lines lost: 2" in told
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_other_threads_still_say_what_ended_them(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: seen.append((arguments.thread, arguments.exc_type)))
    writer_class = type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary.writer"})
    silent, faulty = (writer_class(target=target) for target in (lambda: os.stat(tmp_path / "gone"), lambda: [][0]))
    other = threading.Thread(target=lambda: os.stat(tmp_path / "gone"))
    with silent_writer():
        for thread in (silent, faulty, other):
            thread.start()
            thread.join()
    assert seen == [(faulty, IndexError), (other, FileNotFoundError)]


@pytest.mark.parametrize("line", ["loss 3", "3", '{"loss": 3}', '{"step": "x"}', "\x00\xff"])
def test_files_of_others_are_named_with_the_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match="metrics.jsonl: line 2 is no line of a run's log"):
        read_metrics(tmp_path)


def test_a_directory_without_metrics_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no metrics.jsonl there: give the directory of a run"):
        read_metrics(tmp_path)


def test_what_is_compared_between_runs_leaves_out_the_clock_alone(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    log.metrics(1, FIGURES)
    log.close()
    kept = ("loss", "loss_last", "accuracy", "grad_norm", "learning_rate", "loss_scale")
    assert read_repeatable_metrics(tmp_path) == [{"step": 1, **{name: FIGURES[name] for name in kept}}]


def test_clock():
    assert [clock(seconds) for seconds in (5.4, 125, 3723)] == ["00:05", "02:05", "1:02:03"]
