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


def aside_of(target: Path) -> Path:
    """An empty directory to write into what is to become `target`; what a killed process left of it is removed."""
    aside = target.parent / f".{target.name}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def put_in_place(aside: Path, target: Path) -> None:
    """Rename a directory to `target`, replacing what is there, once everything in it is on disk."""
    replaced = target.parent / f".{target.name}.replaced"
    for path in [*aside.rglob("*"), aside]:
        _to_disk(path)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(aside, target)
    _to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new directory to write into, renamed to `target` once everything in it is on disk; on any error it is removed."""
    aside = aside_of(target)
    try:
        yield aside
        put_in_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
