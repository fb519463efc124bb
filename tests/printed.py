"""The commands that README.md, CONTRIBUTING.md and docs/ print: found, their flags read, or run as a reader would run them."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from commands import ROOT, script
from forked import run_forked

from utils import cli

PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^(?P<indent> *)```(?P<kind>bash|python)\n(?P<body>.*?)^(?P=indent)```$", flags=re.M | re.S)
MARKER = re.compile(r"\*((?:needs|takes) [^*]+)\*")  # on the line above a block: what it needs, or how long it takes
INLINE = re.compile(r"`(python (?:scripts/)?\w+\.py [^`]+)`")  # commands within a sentence
# No run may be longer than these, nor have more of it, where flags say how long and how much.
LIMITS = {"--max_minutes": 0.004, "--max_steps": 2, "--num": 24}


@dataclass(frozen=True)
class Block:
    """kind: bash or python. marker: what stands above it in italics, empty: it runs as it stands."""

    page: str
    line: int
    kind: str
    marker: str
    body: str

    @property
    def commands(self) -> list[list[str]]:
        """Without comments and empty lines."""
        lines = [shlex.split(line, comments=True) for line in self.body.splitlines()]
        return [words for words in lines if words]


def blocks(page: str) -> list[Block]:
    """Of a page, in order."""
    text, found = (ROOT / page).read_text(), []
    for match in BLOCK.finditer(text):
        before = text[: match.start()].splitlines()
        marker = MARKER.fullmatch(before[-1].strip()) if before else None
        found.append(Block(page, len(before) + 1, match["kind"], marker[1] if marker else "", match["body"]))
    assert len(found) == len(re.findall(r"^ *```(?:bash|python)$", text, flags=re.M)), f"{page}: a block that is not closed"
    return found


def inline_commands(page: str) -> list[list[str]]:
    """Those within sentences that have flags."""
    text = BLOCK.sub("", (ROOT / page).read_text())
    found = [shlex.split(" ".join(command.split())) for command in INLINE.findall(text)]
    return [words for words in found if "--help" not in words]


class Read(Exception):  # noqa: N818 - it is none
    """The flags of a command have been read without complaint."""


def parse(words: list[str]) -> None:
    """Read the flags of a command of this project, however it is started, as the command itself does, and go no further."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables
        words = words[1:]
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        return
    if words[0].endswith(".sh"):
        assert os.access(ROOT / words[0], os.X_OK), words
        return
    if words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:]), words
        return
    path = next(word for word in words if word.endswith(".py"))
    module = script(path.removeprefix("scripts/")[:-3]) if path.startswith("scripts/") else importlib.import_module(path[:-3])
    read = cli.parse

    def and_stop(*arguments, **options) -> None:
        read(*arguments, **options)
        raise Read

    with patch.object(cli, "parse", and_stop), patch.object(sys, "argv", words[words.index(path) :]):
        try:
            module.main()
        except Read:
            return
    raise AssertionError(f"{path} has read no flags")


def shortened(words: list[str]) -> list[str]:
    """A command with less to do: fewer minutes, steps and samples, and the precision named, which takes seconds to choose."""
    words = list(words)
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in LIMITS and value:
            words[place] = f"{name}={min(float(value), LIMITS[name]):g}"
        elif name in LIMITS:
            words[place + 1] = f"{min(float(words[place + 1]), LIMITS[name]):g}"
    return [*words, "--precision=float32"] if words[0] == "sample.py" else words


def run(words: list[str], directory: Path) -> None:
    """A command as it is printed, in a directory in place of the root of the repository; what it is to write is there then."""
    if words[0] == "python" and words[1] != "-c":
        words = shortened(words[1:])
        result = run_forked(*words, cwd=directory)
    else:
        words = [sys.executable if word == "python" else word for word in words]
        surroundings = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(words, cwd=directory, env=surroundings, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (words, result.stderr)
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        name, _, own = flag.partition("=")
        if name in ("--out", "--json", "--local_out_dir_path"):
            assert (directory / (own or value)).exists(), (words, name)


def run_page(page: str, directory: Path) -> list[dict]:
    """All blocks of a page that have no marker, in order; returns the variables of those in Python."""
    variables: list[dict] = []
    for block in blocks(page):
        if block.marker:
            continue
        if block.kind == "bash":
            for words in block.commands:
                run(words, directory)
            continue
        variables.append({})
        here = Path.cwd()
        os.chdir(directory)
        try:
            exec(block.body, variables[-1])
        finally:
            os.chdir(here)
    return variables
