import json
import math

import numpy as np
import pytest
from commands import run_in_process, script
from PIL import Image

from models.pyramid import STANDARD_SIDES
from utils.runs.log import RunLog

plot_run = script("plot_run")
SIDES_256 = list(STANDARD_SIDES[256])


def make_run(directory, steps: int = 300, epochs: float | None = 30.0, sides: list | None = None, level: float = 6.0):
    """A run directory with a falling loss: a log line every 10 steps, a validation every 100."""
    log = RunLog(directory, is_main=True)
    rng = np.random.default_rng(0)
    for step in range(10, steps + 1, 10):
        place = {} if epochs is None else {"epoch": epochs * step / steps}
        loss = level + 2.5 * math.exp(-4 * step / steps)
        noisy = loss + rng.normal(0, 0.05)
        grad_norm = math.nan if step == 10 else 0.2 + math.exp(-step / 40)
        speed = {"learning_rate": 3e-4 * (1 - step / steps), "grad_norm": grad_norm, "images_per_second": rng.normal(800, 20)}
        log.metrics(step, {"loss": noisy, "accuracy": 0.05 * step / steps, **speed, **place})
        if step % 100 == 0:
            by_scale = {f"{side}x{side}": loss - 1 + side / 10 for side in sides or (1, 2, 3)}
            log.metrics(step, {"val_loss": loss, "val_accuracy": 0.05, "val_loss_by_scale": by_scale, **place})
    log.close()
    model = {"sides": sides or [1, 2, 3], "num_codes": 4096}
    (directory / "config.json").write_text(json.dumps({"training": {"bs": 768}, "model": model}))
    return directory


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn, instead of the picture."""
    calls = []
    monkeypatch.setattr(plot_run.plots, "curves", lambda path, panels, columns: calls.append(panels))
    return calls


@pytest.fixture
def plot(monkeypatch, capsys, tmp_path):
    def call(*words):
        return run_in_process(plot_run.main, [*words, "--out", tmp_path / "curves.png"], monkeypatch, capsys)

    return call


def test_runs_become_a_picture_with_all_panels(tmp_path, plot):
    runs = [make_run(tmp_path / name, level=level) for name, level in (("a", 6.0), ("b", 5.0))]
    code, shown, errors = plot(*runs)
    assert (code, errors) == (0, "")
    assert "2 run(s) over epoch" in shown
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 2 * picture.height > 0  # four panels in each of two rows
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_every_panel_holds_the_lines_of_every_run(tmp_path, plot, drawn):
    plot(make_run(tmp_path / "a"), make_run(tmp_path / "b", epochs=None))
    panels = {panel["title"]: panel for panel in drawn[0]}
    assert len(panels) == 7
    assert all(list(panel["lines"]) == ["a", "b"] for panel in panels.values())
    assert {panel["x"] for panel in panels.values()} == {"step", "scale"}  # one run has no epochs
    assert [x for x, _ in panels["validation loss"]["lines"]["a"]] == [100, 200, 300]
    assert len(panels["norm of the gradient"]["lines"]["a"]) == 29  # without the one that was not finite
    assert [x for x, _ in panels["validation loss by scale, last validation"]["lines"]["a"]] == ["1x1", "2x2", "3x3"]
    assert not panels["validation loss"]["dashed"]


@pytest.mark.parametrize(("x", "last"), [("step", 300), ("epoch", 30.0), ("images", 300 * 768)])
def test_the_axis_can_be_chosen(tmp_path, plot, drawn, x, last):
    plot(make_run(tmp_path / "a"), f"--x={x}")
    assert drawn[0][0]["lines"]["a"][-1][0] == last


def test_hours_are_counted_from_the_first_line(tmp_path, plot, drawn):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "time": {1e9 + 1800 * i}, "loss": 1}}\n' for i in (1, 2)))
    plot(tmp_path, "--x=hours")
    assert drawn[0][0]["lines"][tmp_path.name] == [(0, 1), (0.5, 1)]


@pytest.mark.parametrize(
    ("sides", "words", "epochs"),
    [
        (SIDES_256, [], [10, 20, 50]),  # as far as the run went, and one point more
        (SIDES_256, ["--reference=none"], None),
        (SIDES_256, ["--x=step"], None),
        ([1, 2, 3], [], None),
        ([1, 2, 3], ["--reference=var-d16"], [10, 20, 50]),
    ],
)
def test_the_public_curve_is_drawn_where_it_can_be_compared(tmp_path, plot, drawn, sides, words, epochs):
    plot(make_run(tmp_path / "a", sides=sides), *words)
    panel = next(panel for panel in drawn[0] if panel["title"] == "validation loss")
    curve = panel["dashed"].get("VAR-d16, public run")
    assert (curve and [epoch for epoch, _ in curve]) == epochs


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = tuple(str(tmp_path / path) for path in ("x/run", "y/run", "other"))
    assert plot_run.unique_names(paths) == ["x/run", "y/run", "other"]


def bad_directory(kind: str, tmp_path):
    directory = tmp_path / "bad"
    directory.mkdir()
    texts = {"empty": "", "foreign": "epoch,loss\n1,2\n", "other figures": '{"step": 1, "time": 0.0, "bleu": 2}\n'}
    if kind in texts:
        (directory / "metrics.jsonl").write_text(texts[kind])
    return directory


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("missing", [], "bad: no metrics.jsonl there: give the directory of a run"),
        ("empty", [], "bad: its metrics.jsonl has no line yet"),
        ("foreign", [], "metrics.jsonl: line 1 is no line of a run's log"),
        ("other figures", [], "bad: none of loss, val_loss"),
        ("other figures", ["--x=epoch"], "bad: no line of its metrics.jsonl has an epoch: give --x=step"),
        ("other figures", ["--x=images"], "bad: no config.json that names the batch size: give --x=step"),
    ],
)
def test_directories_that_cannot_be_drawn_get_one_line(tmp_path, plot, kind, words, message):
    code, _, errors = plot(bad_directory(kind, tmp_path), *words)
    assert code == 1
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def test_a_run_is_not_drawn_twice(tmp_path, plot):
    run = make_run(tmp_path / "a")
    code, _, errors = plot(run, run / ".." / "a")
    assert code == 1
    assert "given twice" in errors


@pytest.mark.parametrize("text", ["[]", "", '{"model": null}'])
def test_a_broken_config_is_named(text, tmp_path, plot):
    run = make_run(tmp_path / "a")
    (run / "config.json").write_text(text)
    code, _, errors = plot(run)
    assert code == 1
    assert "not the config.json of a run" in errors


def test_nothing_is_overwritten_unasked(tmp_path, plot):
    run = make_run(tmp_path / "a")
    (tmp_path / "curves.png").write_text("mine")
    code, _, errors = plot(run)
    assert code == 1
    assert "is there already: give another --out, or --overwrite" in errors
    assert (tmp_path / "curves.png").read_text() == "mine"
    assert plot(run, "--overwrite")[0] == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out=curves.txt"], "--out=curves.txt: no name of a picture"),
        (["--x=step", "--reference=var-d16"], "--x=step: --reference=var-d16 is a curve over epochs"),
    ],
)
def test_wrong_flags_get_one_line(monkeypatch, capsys, words, message):
    code, _, errors = run_in_process(plot_run.main, ["run", *words], monkeypatch, capsys)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
