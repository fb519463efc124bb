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
from utils.data.hub_sets import Columns, check_hub_set, is_hub_set, read_hub_set
from utils.data.images import Pictures, listing_hash, read_folders, told
from utils.data.layouts import check_root
from utils.data.pictures import background_colour
from utils.data.survey import AT_ONCE, Unreadable
from utils.files import replace_text

SKIP_HELP = "leave out files that cannot be read; all are looked at once, before the run, by --workers processes of each rank"
MAX_HELP = "--skip_bad: end the run where more than this share cannot be read"
RECORD = "skipped.json"  # in a run's directory
SHOWN = 10  # of skipped files, in the log
Bad = dict[str, dict[int, str]]  # split -> row -> why it cannot be read


class FolderFlags(Protocol):
    """What a command was told of its images."""

    data_path: str
    image_column: str  # of a data set at hf:...
    label_column: str
    val_share: float  # held out where there is no val/
    skip_bad: bool
    max_bad: float
    background: str
    workers: int


def check_max_bad(max_bad: float) -> None:
    if not 0 <= max_bad < 1:
        raise ValueError(f"--max_bad={max_bad}: give a share from 0 to below 1")


def check_images(flags: FolderFlags) -> None:
    """A cheap look at --data_path, before anything slow is done: ValueError or FileNotFoundError for what cannot be one."""
    if is_hub_set(flags.data_path):
        check_hub_set(flags.data_path)
    elif flags.image_column or flags.label_column:
        raise ValueError(f"--data_path={flags.data_path}: a folder has no columns: leave --image_column and --label_column out")
    else:
        check_root(flags.data_path, flags.val_share)


def read_images(flags: FolderFlags, ranks: Ranks) -> tuple[Pictures, Pictures]:
    """Those to train on and the held-out ones. The main rank lists a folder; a data set is mapped into memory by each."""
    with ranks.failing_together():
        check_images(flags)
    if not is_hub_set(flags.data_path):
        return ranks.once(lambda: read_folders(flags.data_path, flags.val_share))
    with ranks.failing_together():  # those of one machine wait for the first, which converts it for all
        return read_hub_set(flags.data_path, flags.val_share, Columns(flags.image_column, flags.label_column))


def images_of(flags: FolderFlags, ranks: Ranks, record: Path) -> tuple[Pictures, Pictures, list[str]]:
    """The images to train on, the held-out ones, and what is to be told about them; all ranks ask together.

    Which cannot be read is found out once: `record` keeps that, so that a run that goes on leaves out
    the same ones, whatever has happened to files meanwhile. ValueError and OSError, on one rank for all, for folders and
    data sets that do not fit and for too many bad files.
    """
    train, val = read_images(flags, ranks)
    notes = [told(train, val)]
    if not flags.skip_bad:
        return train, val, notes
    splits, total = {"train": train, "val": val}, len(train) + len(val)
    listing = ranks.once(lambda: listing_hash(train, val))
    bad = ranks.once(lambda: read_record(record, listing))
    if bad is None:
        with ranks.failing_together():
            found = {split: find_unreadable(pictures, flags, ranks, split) for split, pictures in splits.items()}
        rows = {split: torch.nonzero(ranks.sum(part)).flatten().tolist() for split, part in found.items()}
        bad = ranks.once(lambda: write_record(record, listing, splits, rows, background_colour(flags.background)))
    reasons = [reason for by_row in bad.values() for reason in by_row.values()]
    with ranks.failing_together():
        check_few(len(reasons), total, flags.max_bad, record)
        train, val = (without(pictures, list(bad[split])) for split, pictures in splits.items())
        check_left(splits["train"], train, val)
    where = f", listed in {record}" if reasons else ""
    notes.append(f"{len(reasons):,} of {total:,} files cannot be read and are left out{where}")
    return train, val, notes + [f"left out: {reason}" for reason in reasons[:SHOWN]]


def find_unreadable(files: Pictures, flags: FolderFlags, ranks: Ranks, split: str) -> torch.Tensor:
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


def read_record(path: Path, listing: str) -> Bad | None:
    """None where nothing is known of these pictures. ValueError for another file."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        bad = {split: {int(row): str(reason) for row, reason in record[split].items()} for split in ("train", "val")}
        return bad if record["listing"] == listing else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of skipped files ({type(error).__name__}): remove it") from error


def write_record(
    path: Path, listing: str, splits: dict[str, Pictures], rows: dict[str, list[int]], background: tuple[int, int, int]
) -> Bad:
    """Note these rows of the splits, with the reasons, which are found by looking again."""
    bad = {split: {row: reason_against(pictures, row, background) for row in rows[split]} for split, pictures in splits.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"listing": listing, **bad}, indent=1) + "\n")
    return bad


def reason_against(pictures: Pictures, row: int, background: tuple[int, int, int]) -> str:
    try:
        pictures.picture(row, background)
    except ValueError as error:
        return str(error)
    return f"{pictures.name(row)}: could not be read at first"


def check_few(bad: int, total: int, max_bad: float, record: Path) -> None:
    """ValueError where more files than `max_bad` of all cannot be read."""
    if bad > max_bad * total:
        raise ValueError(
            f"{bad:,} of {total:,} files cannot be read, more than --max_bad={max_bad:g}: they are listed in {record}: "
            "repair them and remove that file, or give a larger share"
        )


def without(pictures: Pictures, bad: list[int]) -> Pictures:
    return pictures.take(np.delete(np.arange(len(pictures)), bad)) if bad else pictures


def check_left(listed: Pictures, train: Pictures, val: Pictures) -> None:
    """ValueError where no file can be read of a class to be trained, or of all that are held out."""
    emptied = np.setdiff1d(listed.labels, train.labels)  # a data set may name classes of which it has no pictures
    if len(emptied):
        raise ValueError(f"{train.root}: no file of class {train.class_names[emptied[0]]!r} can be read: repair some")
    if not len(val):
        raise ValueError(f"{val.root}: no held-out file can be read ({val.layout}): repair some")
