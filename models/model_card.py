"""The card of a model on the hub, README.md; no model is known here, each hands over its `Facts`."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult
from torch import nn

MARK = "<!-- made by the project; this line says whether anybody has edited it: "
COUNTS = ("images", "reference images")  # in the table of scores, but no scores
SPREAD = " std"  # at the end of the name of what is none either

Columns = dict[str, dict[str, float | int | None]]


class Facts(NamedTuple):
    """What a model says of itself: a title such as "M-VAR d16, 16x16 tokens", a sentence or two, names and values for a table,
    and how it is loaded, in Markdown."""

    title: str
    summary: str
    rows: dict[str, str]
    usage: str


def parameter_count(model: nn.Module) -> str:
    """For people: 310.3 M, or 12,345 below a million."""
    return _in_millions(sum(parameter.numel() for parameter in model.parameters()))


def _in_millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def weight_types(model: nn.Module) -> str:
    """For people: float32, or bfloat16 (12.6 M of them float32)."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    exact = counts.pop("float32", 0)
    halves = ", ".join(counts)
    return f"{halves} ({_in_millions(exact)} of them float32)" if halves and exact else halves or "float32"


def card_text(facts: Facts, training: dict, scores: dict, columns: Columns) -> str:
    """Everything below the metadata. training: all settings of the run; scores and columns: see `read_scores`."""
    parts = [f"# {facts.title}", facts.summary, _table(["", ""], facts.rows.items()), "## How to load it"]
    parts += ["With the code of the project, from the root of its repository:", facts.usage]
    if columns:
        names = dict.fromkeys(name for figures in columns.values() for name in figures)
        rows = [[name, *(_number(figures.get(name)) for figures in columns.values())] for name in names]
        parts += ["## Scores", _table(["", *columns], rows)]
        if "extractor" in scores:
            against = f" against `{_reference(scores)}`" if _reference(scores) else ""
            parts.append(f"By `scripts/evaluate.py` with the extractor {scores['extractor']['name']}{against}.")
        parts += [f"- {note}" for note in scores.get("notes", [])]
    if training:
        settings = json.dumps(training, indent=1)
        parts += ["## Training", f"<details><summary>All settings</summary>\n\n```json\n{settings}\n```\n\n</details>"]
    return "\n\n".join(parts) + "\n"


def signed(text: str) -> str:
    """The text of a card with a last line by which it is known again, see `is_edited`."""
    return f"{text}\n{MARK}{_digest(text)} -->\n"


def is_edited(text: str) -> bool:
    """Whether anybody but `signed` has written in a card."""
    ours, mark, rest = text.rpartition(f"\n{MARK}")
    return not mark or rest.rstrip() != f"{_digest(ours)} -->"


def _digest(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()[:16]


def read_scores(scores: dict) -> Columns:
    """Column -> name -> number, the column of the model first.

    scores: what scripts/evaluate.py --json wrote, or names with numbers, or nothing. ValueError for anything else.
    """
    columns = scores.get("scores", {"samples": scores} if scores else {})
    if "tokenizer" in scores:  # of evaluate.py reconstruction, which has one column
        columns = {"reconstructions": columns}
    for figures in columns.values() if isinstance(columns, dict) else [columns]:
        if not isinstance(figures, dict):
            raise ValueError('scores: give what scripts/evaluate.py --json wrote, or names with numbers, such as {"FID": 3.07}')
        for name, value in figures.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise ValueError(f"scores: {name!r} is {value!r}, not a number: give what scripts/evaluate.py --json wrote")
    return columns


def eval_results(scores: dict, columns: Columns, dataset: str | None) -> list[EvalResult]:
    """The first column as the hub's metadata; what is unknown is left out."""
    images = dataset or _reference(scores) or "reference images"
    task = {"task_type": "image-generation", "dataset_name": images, "dataset_type": re.sub(r"[^\w./-]+", "-", images.lower())}
    return [
        EvalResult(**task, metric_type=re.sub(r"\W+", "-", name.lower()), metric_name=name, metric_value=value)
        for name, value in next(iter(columns.values())).items()
        if value is not None and name not in COUNTS and not name.endswith(SPREAD)
    ]


def _reference(scores: dict) -> str:
    """Name of the reference images that scripts/evaluate.py was given, without the path to them; empty where unknown."""
    return Path(scores.get("settings", {}).get("reference") or "").stem


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    digits = 4 if abs(value) >= 0.01 else 6  # kernel distances are small
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")
