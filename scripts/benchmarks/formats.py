"""How figures are written in the tables of scripts/benchmark.py."""

from collections.abc import Callable


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:#.3g} GB"


def optional(form: Callable[..., str]) -> Callable[..., str]:
    """Written by `form`, or a dash for what was not measured or is not known."""
    return lambda value: "–" if value is None else form(value)
