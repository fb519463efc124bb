"""What a stored figure needs so that it can be made again: command, machine, versions and commit."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from utils.files import replace_text

ROOT = Path(__file__).resolve().parents[1]


def command() -> str:
    """This program as it was called, from the root of the repository."""
    return shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])


def commit() -> str:
    """The commit checked out, with -dirty behind it where files differ from it; "unknown" outside git."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def circumstances() -> dict:
    """Everything but the figures."""
    return {
        "command": command(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
    }


def with_spread(values: Sequence[float], form: str) -> str:
    """Mean and, behind ±, the standard deviation of some runs; of one run no spread, of none nothing."""
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}" if values else ""


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    first, *others = [f"| {' | '.join(line)} |" for line in (head, *body)]
    return "\n".join([first, "|---" * len(head) + "|", *others]) + "\n"


def store(path: Path, figures: dict) -> None:
    """Write the figures with their circumstances as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({**circumstances(), **figures}, indent=1) + "\n")


# --- runs with several seeds --------------------------------------------------------------------------------------------

Columns = dict[str, Callable[[list[dict]], str]]  # heading -> what stands there, from the runs of a row


def over_seeds(key: str, form: str) -> Callable[[list[dict]], str]:
    """For a column: `with_spread` of what runs have under a key."""
    return lambda runs: with_spread([run[key] for run in runs if key in run], form)


def table_of(runs: list[dict], row: str, columns: Columns) -> str:
    """Markdown: a line for each value that runs have under the key `row`, in the order of the first of them."""
    lines = [["", *columns]]
    for name in dict.fromkeys(run[row] for run in runs):
        own = [run for run in runs if run[row] == name]
        lines.append([name, *(cell(own) for cell in columns.values())])
    return markdown(lines)


@dataclass(frozen=True)
class GrowingRuns:
    """Figures of runs, each with a "row" and a seed, stored one by one, so that a second call goes on where one was stopped.

    path: of the JSON; the table of them is kept beside it, as .md.
    """

    path: Path
    columns: Columns

    def known(self) -> list[dict]:
        return json.loads(self.path.read_text())["runs"] if self.path.exists() else []

    def has(self, **values) -> bool:
        """Whether a run with these values is there."""
        return any(all(run.get(name) == value for name, value in values.items()) for run in self.known())

    def add(self, run: dict, **further) -> None:
        """Store one more, and tell it. further: what else the file is to hold."""
        runs = [*self.known(), run]  # read anew: another process may have added some
        store(self.path, {**further, "runs": runs})
        replace_text(self.path.with_suffix(".md"), table_of(runs, "row", {"seeds": lambda own: str(len(own)), **self.columns}))
        print(json.dumps(run), flush=True)
