"""How figures are written in the tables of scripts/benchmark.py."""

from collections.abc import Callable

# Name in a row of figures -> heading in the table, and how a value is written there.
Columns = dict[str, tuple[str, Callable[..., str]]]


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:#.3g} GB"


def optional(form: Callable[..., str], missing: str = "–") -> Callable[..., str]:
    """Written by `form`, or as `missing` for what was not measured or is not known."""
    return lambda value: missing if value is None else form(value)


COMMON: Columns = {  # of several measurements
    "model": ("model", str),
    "family": ("family", str),
    "tokens": ("tokens", str),
    "batch": ("batch", str),
    "precision": ("precision", str),
    "images_per_second": ("images per second", "{:,.0f}".format),
}
