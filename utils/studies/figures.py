"""Pictures of a study: held-out loss over steps, operations and seconds, and scores by row with every seed."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from utils.studies.tables import FIGURES, Run, finished

SHOWN = ("val_loss", "fd", "recognised", "fid", "is")  # scores by row, the first three that there are


def draw(path: Path, runs: Sequence[Run], comparison: str, real: Run) -> None:
    """One picture of a comparison; runs have "steps", "training_flops", "seconds" and a "curve" of (step, held-out loss)."""
    from matplotlib.figure import Figure  # here, as it takes half a second

    rows = list(dict.fromkeys(run["row"] for run in runs if run["comparison"] == comparison))
    rows = [row for row in rows if finished(runs, comparison, row)]
    colours = {row: f"C{number % 10}" for number, row in enumerate(rows)}
    figure = Figure(figsize=(16, 5 + max(3.0, 0.4 * len(rows))))
    axes = figure.subplots(2, 3)
    for axis, (key, label) in zip(
        axes[0], (("steps", "steps"), ("training_flops", "training operations (TFLOP)"), ("seconds", "seconds")), strict=True
    ):
        for row in rows:
            for number, run in enumerate(finished(runs, comparison, row)):
                unit = run[key] * FIGURES[key].factor if key in FIGURES else run[key]
                points = [(step / run["steps"] * unit, loss) for step, loss in run["curve"]]
                name = row if number == 0 else None
                axis.plot(*zip(*points, strict=True), color=colours[row], label=name, linewidth=1, marker=".", alpha=0.7)
        axis.set(title=f"held-out loss over {label}, every seed", xlabel=label, ylabel="nats per token")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    shown = [key for key in SHOWN if all(key in run for row in rows for run in finished(runs, comparison, row))]
    for axis, key in zip(axes[1], shown, strict=False):
        for place, row in enumerate(rows):
            values = [run[key] * FIGURES[key].factor for run in finished(runs, comparison, row)]
            axis.plot(values, [place] * len(values), "o", color=colours[row], markersize=5, alpha=0.5)
            spread = stdev(values) if len(values) > 1 else 0.0
            axis.errorbar(mean(values), place, xerr=spread, color=colours[row], marker="|", capsize=4)
        if key in real:
            axis.axvline(real[key], linestyle="--", color="grey", linewidth=1, label="real images")
            axis.legend(fontsize=8)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(title=f"{FIGURES[key].title}, every seed, mean ± deviation", ylim=(len(rows) - 0.5, -0.5))
        axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
