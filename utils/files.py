"""Files and directories that are either whole or not there: written aside, then renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: a reader, or a kill, finds the old one or the new one."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    os.replace(aside, path)


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new directory to write into, renamed to `target` once everything in it is on disk; on any error it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, replaced = (target.parent / f".{target.name}.{state}" for state in ("writing", "replaced"))
    shutil.rmtree(aside, ignore_errors=True)  # left by a killed process
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            os.rename(target, replaced)
        os.rename(aside, target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
