"""Pictures of a study: held-out loss over steps, operations and seconds, scores by row with every seed, and laws of size."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from utils.plots import plain, save_figure
from utils.studies.tables import FIGURES, FITTED_OVER, Run, finished, fits

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
                if run[key] is None:
                    continue
                unit = run[key] * FIGURES[key].factor if key in FIGURES else run[key]
                points = [(step / run["steps"] * unit, loss) for step, loss in run["curve"]]
                name = plain(row) if number == 0 else None
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
        axis.set_yticks(range(len(rows)), list(map(plain, rows)))
        axis.set(title=f"{FIGURES[key].title}, every seed, mean ± deviation", ylim=(len(rows) - 0.5, -0.5))
        axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    save_figure(figure, path, dpi=80)


def draw_fits(path: Path, runs: Sequence[Run], comparison: str, fit_by: str) -> None:
    """Held-out loss over parameters and over operations, each run a dot, both axes logarithmic, with the fitted power laws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5))
    axes = dict(zip(FITTED_OVER, figure.subplots(1, len(FITTED_OVER)), strict=True))
    colours: dict[str, str] = {}
    for value, key, group, fit in fits(runs, comparison, fit_by):
        colour = colours.setdefault(value, f"C{len(colours) % 10}")
        sizes = sorted({run[key] for run in group})
        unit = FIGURES[key].factor
        dots = [run[key] * unit for run in group], [run["val_loss"] for run in group]
        law = [size * unit for size in sizes], [fit.factor * size**-fit.exponent for size in sizes]
        axes[key].plot(*dots, "o", color=colour, alpha=0.5)
        axes[key].plot(*law, color=colour, label=f"{plain(value)}: exponent {fit.exponent:.4f} ± {fit.error:.4f}")
    for key, name in FITTED_OVER.items():
        axes[key].set(title=f"held-out loss over {name}", xlabel=FIGURES[key].title, ylabel="nats per token")
        axes[key].set(xscale="log", yscale="log")
        for scale in (axes[key].xaxis, axes[key].yaxis):
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter("{x:g}")
        axes[key].grid(alpha=0.3, which="both")
        if axes[key].lines:
            axes[key].legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path, dpi=80)
