"""What runs of a study say together: means with spread over seeds, differences with a paired test, fits, as tables.

A run is a dictionary with "comparison", "row", "seed", "flags" and its figures, or with "failed", why it has none. Differences
are of runs with the same seed; their test is Student's t for pairs, two-sided, and p values are Holm's (1979), for as many rows
as are compared with one baseline. What is not below LEVEL is called not distinguishable.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from utils.evidence import markdown, with_spread

LEVEL = 0.05
Run = dict[str, Any]


class Figure(NamedTuple):
    """A column. form: of its values; factor: what is shown over what is stored."""

    title: str
    form: str
    factor: float = 1.0


FIGURES = {
    "parameters": Figure("parameters (M)", ".2f", factor=1e-6),
    "steps": Figure("steps", ".0f"),
    "training_flops": Figure("training (TFLOP)", ".3g", factor=1e-12),
    "val_loss": Figure("held-out loss", ".3f"),
    "fd": Figure("FD-EffLite0", ".1f"),
    "fd_classifier": Figure("FD-classifier", ".2f"),
    "inception_score": Figure("IS-EffLite0", ".2f"),
    "fid": Figure("FID", ".2f"),
    "is": Figure("Inception score", ".1f"),
    "precision": Figure("precision", ".3f"),
    "recall": Figure("recall", ".3f"),
    "recognised": Figure("recognised", ".3f"),
    "images_per_second": Figure("training images/s", ".0f"),
    "sampling_seconds": Figure("sampling (ms an image)", ".2f", factor=1e3),
    "state_bytes": Figure("state (kB an image)", ".1f", factor=1e-3),
    "memory_gb": Figure("memory (GB)", ".2f"),
}
TESTED = ("val_loss", "fd", "fd_classifier", "inception_score", "fid", "is", "precision", "recall", "recognised")


class Difference(NamedTuple):
    """Of a row from the baseline, in one figure: mean and standard deviation over the seeds both have, and p.

    p is None of one seed, and where all seeds differ alike, by which t would be infinite: counts of images are so by chance.
    """

    mean: float
    deviation: float | None
    p: float | None
    seeds: int

    @property
    def is_distinguishable(self) -> bool:
        return self.p is not None and self.p < LEVEL


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Ours less theirs, one of each for every seed, in the same order; p before it is adjusted."""
    from scipy.stats import ttest_rel  # here, as it takes a second

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return Difference(mean(differences), None, None, len(differences))
    deviation = stdev(differences)
    rounding = 1e-12 * max(map(abs, (*ours, *theirs, 1e-300)))
    if deviation > rounding:
        return Difference(mean(differences), deviation, float(ttest_rel(ours, theirs).pvalue), len(differences))
    p = 1.0 if abs(mean(differences)) <= rounding else None
    return Difference(mean(differences), 0.0, p, len(differences))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted so that the chance of a single false finding among them all stays below the level; None stays None."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(p * (len(known) - rank), 1.0))
        adjusted[place] = largest
    return adjusted


def finished(runs: Sequence[Run], comparison: str, row: str) -> list[Run]:
    """The runs of a row that have figures, by seed."""
    own = [run for run in runs if run["comparison"] == comparison and run["row"] == row and "failed" not in run]
    return sorted(own, key=lambda run: run["seed"])


def differences(runs: Sequence[Run], comparison: str, baseline: str, figure: str) -> dict[str, Difference]:
    """By row, from the baseline, with adjusted p; of rows that share a seed with it."""
    rows = dict.fromkeys(run["row"] for run in runs if run["comparison"] == comparison)
    theirs = {run["seed"]: run[figure] for run in finished(runs, comparison, baseline) if figure in run}
    found = {}
    for row in rows:
        ours = {run["seed"]: run[figure] for run in finished(runs, comparison, row) if figure in run}
        seeds = sorted(ours.keys() & theirs.keys())
        if row != baseline and seeds:
            found[row] = paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    adjusted = holm([difference.p for difference in found.values()])
    return {row: found[row]._replace(p=p) for row, p in zip(found, adjusted, strict=True)}


def shown(difference: Difference, figure: Figure) -> str:
    """Such as "-1.2 ± 0.3 (p = 0.01)", or that nothing can be said."""
    text = f"{difference.mean * figure.factor:+{figure.form}}"
    if difference.deviation is None:
        return f"{text}, one seed: no test"
    if difference.p is None:
        return f"{text} with every seed: no test"
    text += f" ± {difference.deviation * figure.factor:{figure.form}}"
    p = f"p = {difference.p:.2g}" if difference.p >= 0.001 else "p < 0.001"
    return f"{text} ({p})" if difference.is_distinguishable else f"{text}, not distinguishable ({p})"


class Fit(NamedTuple):
    """loss = factor * size ** -exponent, by least squares of the logarithms; error: standard error of the exponent."""

    exponent: float
    error: float
    factor: float
    r_squared: float
    points: int


FITTED_OVER = {"parameters": "parameters", "training_flops": "training operations"}


def power_law(sizes: Sequence[float], losses: Sequence[float]) -> Fit | None:
    """None of fewer than three different sizes, which say nothing of how well a line fits."""
    from scipy.stats import linregress

    if len(set(sizes)) < 3:
        return None
    line = linregress([math.log(size) for size in sizes], [math.log(loss) for loss in losses])
    return Fit(-line.slope, line.stderr, math.exp(line.intercept), line.rvalue**2, len(sizes))


# --- as text ------------------------------------------------------------------------------------------------------------


def cell(runs: Sequence[Run], key: str) -> str:
    values = [run[key] * FIGURES[key].factor for run in runs if run.get(key) is not None]
    if len(set(values)) == 1:  # of what seeds do not change
        return f"{values[0]:{FIGURES[key].form}}"
    return with_spread(values, FIGURES[key].form)


def table_of_scores(runs: Sequence[Run], comparison: str, real: Run) -> str:
    """A line for each row, means ± standard deviation over its seeds; below them the scores of real images."""
    own = [run for run in runs if run["comparison"] == comparison]
    keys = [key for key in FIGURES if any(run.get(key) is not None for run in own)]
    lines = [["", "seeds", *(FIGURES[key].title for key in keys)]]
    for row in dict.fromkeys(run["row"] for run in own):
        ours = finished(own, comparison, row)
        failed = sum(run["row"] == row for run in own) - len(ours)
        seeds = f"{len(ours)}, {failed} failed" if failed else str(len(ours))
        lines.append([row, seeds, *(cell(ours, key) for key in keys)])
    few = real.get("images", math.inf) < max((run.get("samples", 0) for run in own), default=0)
    name = f"real images, {real['images']} only" if few else "real images"
    lines.append([name, "", *(f"{real[key]:{FIGURES[key].form}}" if key in real else "" for key in keys)])
    return markdown(lines)


def table_of_differences(runs: Sequence[Run], comparison: str, baseline: str) -> str:
    """A line for each row but the baseline; empty where there is no other."""
    by_key = {key: found for key in TESTED if (found := differences(runs, comparison, baseline, key))}
    rows = dict.fromkeys(row for found in by_key.values() for row in found)
    if not rows:
        return ""
    lines = [[f"less {baseline}", *(FIGURES[key].title for key in by_key)]]
    lines += [
        [row, *(shown(found[row], FIGURES[key]) if row in found else "" for key, found in by_key.items())] for row in rows
    ]
    return markdown(lines)


def fits(runs: Sequence[Run], comparison: str, fit_by: str) -> Iterator[tuple[str, str, list[Run], Fit]]:
    """How the held-out loss falls with parameters and with operations, for each value of a flag that has three sizes.

    Yields the value, what the loss is fitted over (a key of runs), the runs and their fit.
    """
    own = [run for run in runs if run["comparison"] == comparison and "failed" not in run]
    for value in dict.fromkeys(run["flags"][fit_by] for run in own):
        group = [run for run in own if run["flags"][fit_by] == value]
        for key in FITTED_OVER:
            if any(run.get(key) is None for run in group):
                continue
            fit = power_law([run[key] for run in group], [run["val_loss"] for run in group])
            if fit is not None:
                yield str(value), key, group, fit


def table_of_fits(runs: Sequence[Run], comparison: str, fit_by: str) -> str:
    lines = [[fit_by, "loss over", "exponent", "R²", "runs"]]
    for value, key, _, fit in fits(runs, comparison, fit_by):
        figures = [f"{fit.exponent:.4f} ± {fit.error:.4f}", f"{fit.r_squared:.2f}", str(fit.points)]
        lines.append([value, FITTED_OVER[key], *figures])
    return markdown(lines) if len(lines) > 1 else ""


def as_csv(runs: Sequence[Run]) -> str:
    """All runs, a line each, without their curves; flags that any of them has are columns of their own."""
    flags = dict.fromkeys(name for run in runs for name in run["flags"])
    names = ["comparison", "row", "seed", *(f"--{name}" for name in flags), *FIGURES, "failed"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        writer.writerow({**run, **{f"--{name}": value for name, value in run["flags"].items()}})
    return text.getvalue()
