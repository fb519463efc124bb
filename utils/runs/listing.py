"""The images of a run: listed once for all ranks and, where that is asked for, without those that cannot be read."""

import json
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from dist import Ranks
from utils.data.batches import batches_at, in_order
from utils.data.images import ImageFiles, listing_hash, read_folders, told
from utils.data.pictures import background_colour
from utils.data.survey import AT_ONCE, Unreadable
from utils.files import replace_text

SKIP_HELP = "leave out files that cannot be read; all are looked at once, before the run, by --workers processes of each rank"
MAX_HELP = "--skip_bad: end the run where more than this share cannot be read"
RECORD = "skipped.json"  # in a run's directory
SHOWN = 10  # of skipped files, in the log


class FolderFlags(Protocol):
    """What a command was told of its images."""

    data_path: str
    val_share: float  # held out where there is no val/
    skip_bad: bool
    max_bad: float
    background: str
    workers: int


def check_max_bad(max_bad: float) -> None:
    if not 0 <= max_bad < 1:
        raise ValueError(f"--max_bad={max_bad}: give a share from 0 to below 1")


def images_of(flags: FolderFlags, ranks: Ranks, record: Path) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """The images to train on, the held-out ones, and what is to be told about them; all ranks ask together.

    The main rank lists them. Which cannot be read is found out once: `record` keeps their names, so that a run that goes on
    leaves out the same ones, whatever has happened to files meanwhile. ValueError and OSError, on one rank for all, for folders
    that do not fit and for too many bad files.
    """
    train, val = ranks.once(lambda: read_folders(flags.data_path, flags.val_share))
    notes = [told(train, val)]
    if not flags.skip_bad:
        return train, val, notes
    listing, total = listing_hash(train, val), len(train) + len(val)
    bad = ranks.once(lambda: read_record(record, listing))
    if bad is None:
        with ranks.failing_together():
            found = [find_unreadable(files, flags, ranks, split) for split, files in (("train", train), ("val", val))]
        rows = [torch.nonzero(ranks.sum(part)).flatten().numpy() for part in found]
        bad = ranks.once(lambda: write_record(record, listing, (train, val), rows, background_colour(flags.background)))
    with ranks.failing_together():
        check_few(len(bad), total, flags.max_bad, record)
        train, val = without(train, bad), without(val, bad)
        check_left(train, val)
    notes.append(f"{len(bad):,} of {total:,} files cannot be read and are left out{f', listed in {record}' if bad else ''}")
    return train, val, notes + [f"left out: {reason}" for reason in list(bad.values())[:SHOWN]]


def find_unreadable(files: ImageFiles, flags: FolderFlags, ranks: Ranks, split: str) -> torch.Tensor:
    """(N,) int32, 1 for each file that this rank has looked at and that cannot be read."""
    bad = torch.zeros(len(files), dtype=torch.int32)
    looked_at = Unreadable(files, background_colour(flags.background))
    batches = ((mine, mine) for mine in in_order(len(files), AT_ONCE, ranks.rank, ranks.world))
    interval = 0.2 if sys.stderr.isatty() else 20
    with tqdm(total=len(files), unit="image", desc=f"reading {split}", mininterval=interval, disable=not ranks.is_main) as bar:
        for is_bad, numbers in batches_at(looked_at, batches, flags.workers):
            bad[numbers] = is_bad.int()
            bar.update(min(len(numbers) * ranks.world, len(files) - bar.n))  # the others taken to be as far as this one
    return bad


def read_record(path: Path, listing: str) -> dict[str, str] | None:
    """Name below the root -> why it cannot be read; None where nothing is known of these files. ValueError for another file."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        bad = {str(name): str(reason) for name, reason in record["files"].items()}
        return bad if record["listing"] == listing else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of skipped files ({type(error).__name__}): remove it") from error


def write_record(
    path: Path, listing: str, splits: tuple[ImageFiles, ...], rows: list[np.ndarray], background: tuple[int, int, int]
) -> dict[str, str]:
    """Note these rows of the splits, with the reasons, which are found by looking again."""
    bad = {}
    for files, numbers in zip(splits, rows, strict=True):
        for number in numbers.tolist():
            try:
                files.picture(number, background)
                reason = f"{files.name(number)}: could not be read at first"
            except ValueError as error:
                reason = str(error)
            bad[files.names[number]] = reason
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"listing": listing, "files": bad}, indent=1) + "\n")
    return bad


def check_few(bad: int, total: int, max_bad: float, record: Path) -> None:
    """ValueError where more files than `max_bad` of all cannot be read."""
    if bad > max_bad * total:
        raise ValueError(
            f"{bad:,} of {total:,} files cannot be read, more than --max_bad={max_bad:g}: they are listed in {record}: "
            "repair them and remove that file, or give a larger share"
        )


def without(files: ImageFiles, bad: dict[str, str]) -> ImageFiles:
    if not bad:
        return files
    return files.take(np.array([number for number, name in enumerate(files.names) if name not in bad], np.int64))


def check_left(train: ImageFiles, val: ImageFiles) -> None:
    """ValueError where no file can be read of a class to be trained, or of all that are held out."""
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    if not counts.all():
        raise ValueError(f"{train.root}: no file of class {train.class_names[counts.argmin()]!r} can be read: repair some")
    if not len(val):
        raise ValueError(f"{val.root}: no held-out file can be read ({val.layout}): repair some")
