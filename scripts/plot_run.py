"""Draw training runs against each other: losses, accuracy, learning rate, gradient, speed, and the loss of every scale.

A run is the directory that train.py or scripts/train_tokenizer.py writes; one that is still training can be drawn too.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.pyramid import STANDARD_SIDES
from utils import cli, plots
from utils.cli import arguments, flag
from utils.files import check_file
from utils.runs.log import read_metrics

PICTURES = (".png", ".pdf", ".svg", ".jpg")
COLUMNS = 4


class Panel(NamedTuple):
    """One figure of metrics.jsonl over the run. pale: the key of lines drawn in pale behind those of `key`."""

    key: str
    title: str
    unit: str = ""
    pale: str | None = None
    log: bool = False


PANELS = (
    Panel("loss", "training loss", "nats per token"),
    Panel("val_loss", "validation loss", "nats per token"),
    Panel("val_accuracy", "accuracy (pale: in training)", "share of tokens", pale="accuracy"),
    Panel("learning_rate", "learning rate"),
    Panel("grad_norm", "norm of the gradient", log=True),
    Panel("images_per_second", "speed", "images per second"),
)
BY_SCALE = "val_loss_by_scale"
# Validation loss of one public run of VAR-d16 on ImageNet: 256 px, batch 768, float16.
VAR_D16 = ((10, 6.541), (20, 6.376), (50, 6.252), (100, 6.164), (200, 6.046))
VAR_D16_NUM_CODES = 4096


@dataclass(frozen=True)
class PlotConfig:
    """Arguments of scripts/plot_run.py."""

    runs: tuple[str, ...] = arguments("run directories, each with a metrics.jsonl")
    out: str = flag("curves.png", f"picture to write: {', '.join(PICTURES)}")
    x: str = flag(
        "auto",
        "what the curves are drawn over; hours are by the clock, pauses included; auto: epoch where all runs have it, or step",
        choices=("auto", "step", "epoch", "images", "hours"),
    )
    reference: str = flag(
        "auto",
        "the public validation curve of VAR-d16, over epochs; auto: where a run has its pyramid and its number of codes",
        choices=("auto", "var-d16", "none"),
    )
    overwrite: bool = flag(False, "replace what is at --out")

    def __post_init__(self):
        if Path(self.out).suffix.lower() not in PICTURES:
            raise ValueError(f"--out={self.out}: no name of a picture: end it in one of {', '.join(PICTURES)}")
        if self.reference == "var-d16" and self.x not in ("auto", "epoch"):
            raise ValueError(f"--x={self.x}: --reference=var-d16 is a curve over epochs: give --x=epoch, or leave it out")


class Run:
    """What is drawn of one run directory. ValueError or FileNotFoundError where there is nothing to draw."""

    def __init__(self, directory: str, name: str):
        self.directory, self.name = directory, name
        self.entries = read_metrics(directory)
        if not self.entries:
            raise ValueError(f"{directory}: its metrics.jsonl has no line yet: wait for the first, or leave this run out")
        path = Path(directory) / "config.json"
        try:
            config = json.loads(path.read_text()) if path.exists() else {}
            self.batch = config.get("training", {}).get("bs")
            self.model = dict(config.get("model", {}))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: not the config.json of a run ({error}): repair it, or move it away") from error

    def has_epochs(self) -> bool:
        return any("epoch" in entry for entry in self.entries)

    def is_like_var_d16(self) -> bool:
        """Whether its losses are over the same pyramid and number of codes."""
        return self.model.get("sides") == list(STANDARD_SIDES[256]) and self.model.get("num_codes") == VAR_D16_NUM_CODES

    def points(self, key: str, x: str) -> list[tuple[float, float]]:
        """(x, value) of every line that has both; numbers that were not finite, null in the file, are left out."""
        places = self._places(x)
        return [
            (place, entry[key])
            for place, entry in zip(places, self.entries, strict=True)
            if place is not None and isinstance(entry.get(key), int | float)
        ]

    def _places(self, x: str) -> list[float | None]:
        """Where each line stands on the x axis."""
        if x in ("step", "epoch"):
            if not any(x in entry for entry in self.entries):
                raise ValueError(f"{self.directory}: no line of its metrics.jsonl has an {x}: give --x=step")
            return [entry.get(x) for entry in self.entries]
        if x == "images":
            if self.batch is None:
                raise ValueError(f"{self.directory}: no config.json that names the batch size: give --x=step")
            return [entry["step"] * self.batch for entry in self.entries]
        if any("time" not in entry for entry in self.entries):
            raise ValueError(f"{self.directory}: not all lines of its metrics.jsonl have a time: give --x=step")
        return [(entry["time"] - self.entries[0]["time"]) / 3600 for entry in self.entries]

    def by_scale(self) -> list[tuple[str, float]]:
        """(scale, loss) of the last validation."""
        last = next((entry[BY_SCALE] for entry in reversed(self.entries) if BY_SCALE in entry), {})
        return [(scale, loss) for scale, loss in last.items() if loss is not None]


def unique_names(directories: tuple[str, ...]) -> list[str]:
    """The name of each directory, with as many of those above it as it takes to tell them apart."""
    paths = [Path(directory).resolve() for directory in directories]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise ValueError(f"{directories[number]}: given twice: leave one out")
    names = []
    for path in paths:
        length = 1
        while sum(other.parts[-length:] == path.parts[-length:] for other in paths) > 1:
            length += 1
        names.append("/".join(path.parts[-length:]))
    return names


def reference_points(epochs: float) -> list[tuple[float, float]]:
    """The public curve as far as runs of so many epochs go, and the next point behind them."""
    passed = [point for point in VAR_D16 if point[0] < epochs]
    return list(VAR_D16[: len(passed) + 1])


def make_panels(runs: list[Run], x: str, with_reference: bool) -> list[dict]:
    """The panels for which some run has figures."""
    panels = []
    for panel in PANELS:
        lines = {run.name: points for run in runs if (points := run.points(panel.key, x))}
        pale = {run.name: points for run in runs if panel.pale and (points := run.points(panel.pale, x))}
        dashed = {}
        if panel.key == "val_loss" and with_reference:
            last = max((place for run in runs for place, _ in run.points("loss", x)), default=0)
            dashed = {"VAR-d16, public run": reference_points(last)}
        if lines or pale or dashed:
            drawn = {"lines": lines, "faint": pale, "dashed": dashed}
            panels.append({"title": panel.title, "x": x, "y": panel.unit, "log": panel.log, **drawn})
    scales = {run.name: points for run in runs if (points := run.by_scale())}
    if scales:
        # the run with most scales first: it decides the order of the words along the axis
        ordered = dict(sorted(scales.items(), key=lambda item: -len(item[1])))
        title = "validation loss by scale, last validation"
        panels.append({"title": title, "x": "scale", "y": "nats per token", "lines": ordered})
    return panels


def main() -> None:
    config = cli.parse(PlotConfig, __doc__)
    out = Path(config.out)
    check_file(out, "--out", config.overwrite)
    runs = [Run(directory, name) for directory, name in zip(config.runs, unique_names(config.runs), strict=True)]
    x = config.x
    if x == "auto":
        x = "epoch" if config.reference == "var-d16" or all(run.has_epochs() for run in runs) else "step"
    alike = any(run.is_like_var_d16() for run in runs)
    with_reference = x == "epoch" and (config.reference == "var-d16" or (config.reference == "auto" and alike))
    panels = make_panels(runs, x, with_reference)
    if not panels:
        raise ValueError(f"{', '.join(config.runs)}: none of {', '.join(panel.key for panel in PANELS)} in metrics.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.curves(out, panels, COLUMNS)
    print(f"{out}: {len(runs)} run(s) over {x}")


if __name__ == "__main__":
    cli.run(main)
