"""What a stored figure needs so that it can be made again: command, machine, versions and commit."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
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


def store(path: Path, figures: dict) -> None:
    """Write the figures with their circumstances as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({**circumstances(), **figures}, indent=1) + "\n")
