"""The checkpoints of a run: which of them are whole, how a new one comes in and old ones go.

A checkpoint is a directory checkpoints/step_N. It is written beside its place and renamed, and its last file, checksums.json,
holds size and SHA-256 of all others, so that a kill, a full disk or a damaged disk cannot make a part pass for the whole.
"""

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from re import Pattern

from utils.files import sha256

CHECKSUMS = "checksums.json"
BEST = "best"  # a link beside the checkpoints
ALL = re.compile(r".*")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step}"


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run under their final names, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=step_of)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files are all there in full length; None where there is none."""
    return next((path for path in reversed(checkpoints(run)) if find_truncation(path) is None), None)


def latest_intact(run: Path, files: Callable[[Path], Pattern]) -> Path | None:
    """The newest whole checkpoint in which such files are what was written; None where the run has no checkpoint.

    files: of each checkpoint, those that are to be read. Newer ones that are damaged are told of on stderr. ValueError where
    all are damaged.
    """
    faults: list[str] = []
    for checkpoint in reversed(checkpoints(run)):
        fault = _find_fault(checkpoint, files)
        if fault is None:
            for line in faults:
                _tell(f"{line}: taking {checkpoint.name}")
            return checkpoint
        faults.append(f"{checkpoint}: damaged, {fault}")
    if faults:
        raise ValueError(f"{faults[0]}, and no earlier checkpoint of the run is whole: restore one")
    return None


def intact_checkpoints(run: Path, files: Callable[[Path], Pattern]) -> list[Path]:
    """All whole checkpoints in which such files are what was written, oldest first; damaged ones are told of on stderr."""
    faults = {path: _find_fault(path, files) for path in checkpoints(run)}
    for path, fault in faults.items():
        if fault is not None:
            _tell(f"{path}: damaged, {fault}: left out")
    return [path for path, fault in faults.items() if fault is None]


def _find_fault(checkpoint: Path, files: Callable[[Path], Pattern]) -> str | None:
    """What is wrong with a checkpoint whose such files are to be read; None where nothing is."""
    return find_truncation(checkpoint) or find_damage(checkpoint, files(checkpoint))


@functools.cache
def _tell(line: str) -> None:
    """Once, as a command looks at the same run at several places."""
    print(line, file=sys.stderr)


def check_intact(checkpoint: Path, files: Pattern) -> None:
    """ValueError where such files of a checkpoint are not what was written; a model by itself has no checksums to tell."""
    if (checkpoint / CHECKSUMS).exists() and (fault := find_damage(checkpoint, files)):
        raise ValueError(f"{checkpoint}: damaged, {fault}: restore it, or give another checkpoint of its run")


def seal(directory: Path) -> None:
    """Write checksums.json over all files of a checkpoint."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    sums = {str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (directory / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")


def find_truncation(checkpoint: Path, files: Pattern = ALL) -> str | None:
    """What is missing of a checkpoint, or of such files of it, judged by names and lengths; None where nothing is."""
    try:
        for name, expected in _checksums(checkpoint, files).items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} of {expected['bytes']} bytes"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS} is missing or unreadable ({type(error).__name__})"
    return None


def find_damage(checkpoint: Path, files: Pattern = ALL) -> str | None:
    """What is wrong with a checkpoint, or with such files of it, judged by reading them; None where nothing is."""
    short = find_truncation(checkpoint, files)
    if short is not None:
        return short
    for name, expected in _checksums(checkpoint, files).items():
        if _sha256_of(checkpoint / name) != expected.get("sha256"):
            return f"{name} is not what was written (SHA-256 differs)"
    return None


def _checksums(checkpoint: Path, files: Pattern) -> dict[str, dict]:
    sums = json.loads((checkpoint / CHECKSUMS).read_bytes())
    return {name: expected for name, expected in sums.items() if files.fullmatch(name)}


def _sha256_of(file: Path) -> str:
    """Read once: a command asks for the same file at several places."""
    found = file.stat()
    return _sha256_of_state(file.absolute(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.cache
def _sha256_of_state(file: Path, *_: int) -> str:
    return sha256(file)


def choose_intact(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and what is wrong with the newer ones.

    These are renamed to step_N.damaged, out of the way of the steps that will be done again; `prune` removes them once there is
    a new checkpoint. ValueError, and nothing renamed, where all checkpoints of the run are damaged.
    """
    faults: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints(run)):
        fault = find_damage(checkpoint)
        if fault is None:
            for broken, _ in faults:
                aside = broken.with_name(f"{broken.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(broken, aside)
            return checkpoint, [f"{broken}: damaged, {fault}: going back to {checkpoint.name}" for broken, fault in faults]
        faults.append((checkpoint, fault))
    if faults:
        broken, fault = faults[0]
        raise ValueError(
            f"{broken}: damaged, {fault}, and no earlier checkpoint of the run is whole: restore one, "
            f"or remove {run / 'checkpoints'} to start anew"
        )
    return None, []


def mark_best(run: Path, step: int) -> None:
    """Let checkpoints/best lead to the checkpoint of that step."""
    link = run / "checkpoints" / BEST
    aside = link.with_name(f".{BEST}.writing")
    aside.unlink(missing_ok=True)
    aside.symlink_to(checkpoint_path(run, step).name)
    os.replace(aside, link)


def prune(run: Path, newest: Path, keep: int, best: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints, damaged ones and what killed processes left; `newest` stays always.

    best: step of a checkpoint that checkpoints/best leads to from then on, 0 for none. What that leads to stays as well.
    """
    if best:
        mark_best(run, best)
    link = run / "checkpoints" / BEST
    kept = {newest, link.with_name(os.readlink(link)) if link.is_symlink() else newest}
    old = [path for path in checkpoints(run)[:-keep] if path not in kept]
    leftovers = [
        path
        for path in (run / "checkpoints").iterdir()
        if re.fullmatch(r"step_\d+\.damaged|\.step_\d+\.(writing|replaced)", path.name)
    ]
    for path in old + leftovers:
        shutil.rmtree(path, ignore_errors=True)  # what cannot go now, because somebody reads it, goes the next time
