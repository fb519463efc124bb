"""Measure what running this code costs. Prints a page in Markdown; --json also stores the figures with machine and commit."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from scripts.benchmarks import (
    attention,
    check_data,
    length,
    listing,
    memory,
    peer,
    profile,
    sampling,
    scan,
    table,
    tokenizer,
    tokens,
    training,
)
from scripts.benchmarks.config import BenchmarkConfig
from scripts.benchmarks.formats import COMMON, Columns
from utils import cli, evidence
from utils.cli import argument
from utils.files import check_file

PICTURE = ".png"  # of figures that are drawn, too


class Measurement(NamedTuple):
    """One command."""

    measure: Callable[[BenchmarkConfig], list[dict]]  # its docstring is the text of the page
    columns: Columns  # of the rows that it returns, beside COMMON
    draw: Callable[[Path, list[dict]], None] | None = None  # a picture of them, beside --json


MEASUREMENTS = {
    "tokens": Measurement(tokens.tokens, tokens.COLUMNS),
    "listing": Measurement(listing.listing, listing.COLUMNS),
    "memory": Measurement(memory.memory, memory.COLUMNS),
    "sampling": Measurement(sampling.sampling, sampling.COLUMNS),
    "peer": Measurement(peer.peer, peer.COLUMNS),
    "profile": Measurement(profile.sampling_profile, profile.COLUMNS),
    "tokenizer": Measurement(tokenizer.tokenizer, tokenizer.COLUMNS),
    "training": Measurement(training.training, training.COLUMNS),
    "scan": Measurement(scan.scan, scan.COLUMNS),
    "attention": Measurement(attention.attention, attention.COLUMNS),
    "length": Measurement(length.length, length.COLUMNS, length.draw),
    "table": Measurement(table.table, table.COLUMNS),
    "check_data": Measurement(check_data.check_data, check_data.COLUMNS),
}


@dataclass(frozen=True)
class Arguments(BenchmarkConfig):
    """With the commands there are."""

    command: str = argument("what is measured", choices=tuple(MEASUREMENTS))


def page(measurement: Measurement, rows: list[dict]) -> str:
    """What is measured, how it was called, and the rows as a Markdown table."""
    title, text = getdoc(measurement.measure).split("\n\n", 1)
    columns = COMMON | measurement.columns
    cells = [[columns[name][0] for name in rows[0]], ["---"] * len(rows[0])]
    cells += [[columns[name][1](value) for name, value in row.items()] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([f"# {title}", "", text, "", f"Printed by `{evidence.command()}`.", "", *lines]) + "\n"


def main() -> None:
    config = cli.parse(Arguments, __doc__)
    out = Path(config.json)
    measurement = MEASUREMENTS[config.command]
    if config.json:
        if measurement.draw is not None and out.suffix == PICTURE:
            raise ValueError(f"--json={out}: is the name of the picture beside it: give another")
        for path in (out, out.with_suffix(PICTURE)) if measurement.draw is not None else (out,):
            check_file(path, "--json", config.overwrite)
    rows = measurement.measure(config)
    if config.json:
        evidence.store(out, {"threads": torch.get_num_threads(), "rows": rows})
        if measurement.draw is not None:
            measurement.draw(out.with_suffix(PICTURE), rows)
    print(page(measurement, rows), end="")


if __name__ == "__main__":
    cli.run(main)
