"""Measure what running this code costs. Prints a page in Markdown; --json also stores the figures with machine and commit."""

import sys
from collections.abc import Callable
from inspect import getdoc
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from scripts.benchmarks import attention, length, memory, sampling, scan, table, tokens, training
from scripts.benchmarks.config import BenchmarkConfig
from utils import cli, evidence

COMMANDS: dict[str, Callable[[BenchmarkConfig], list[dict]]] = {
    "tokens": tokens.tokens,
    "memory": memory.memory,
    "sampling": sampling.sampling,
    "training": training.training,
    "scan": scan.scan,
    "attention": attention.attention,
    "length": length.length,
    "table": table.table,
}
PLOTS: dict[str, Callable[[Path, list[dict]], None]] = {"length": length.draw}  # beside --json, as .png

# Column of the Markdown table: its heading, and how a value is written there.
COLUMNS: dict[str, tuple[str, Callable]] = {
    "batch": ("batch", str),
    "images_per_second": ("images per second", "{:,.0f}".format),
    "model": ("model", str),
    "family": ("family", str),
    **tokens.COLUMNS,
    **memory.COLUMNS,
    **sampling.COLUMNS,
    **training.COLUMNS,
    **scan.COLUMNS,
    **attention.COLUMNS,
    **length.COLUMNS,
    **table.COLUMNS,
}


def page(command: str, rows: list[dict]) -> str:
    """What a sub-command measures, how it was called, and the rows as a Markdown table."""
    title, text = getdoc(COMMANDS[command]).split("\n\n", 1)
    table = [[COLUMNS[name][0] for name in rows[0]], ["---"] * len(rows[0])]
    table += [[COLUMNS[name][1](value) for name, value in row.items()] for row in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([f"# {title}", "", text, "", f"Printed by `{evidence.command()}`.", "", *lines]) + "\n"


def main() -> None:
    config = cli.parse(BenchmarkConfig, __doc__)
    out = Path(config.json)
    if config.json and out.exists() and not config.overwrite:
        raise ValueError(f"{out}: is there already: give another --json, or --overwrite")
    rows = COMMANDS[config.command](config)
    if config.json:
        evidence.store(out, {"threads": torch.get_num_threads(), "rows": rows})
        if config.command in PLOTS:
            PLOTS[config.command](out.with_suffix(".png"), rows)
    print(page(config.command, rows), end="")


if __name__ == "__main__":
    cli.run(main)
