"""What lies in a folder of training images, looked at file by file, before a run does."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.data.images import Pictures
from utils.data.layouts import list_splits
from utils.data.pictures import WITH_ALPHA, read_picture

AT_ONCE = 64  # pictures that a process is given


class Place(NamedTuple):
    """Where a picture is."""

    split: str
    label: str  # name of its class
    path: str


class Picture(NamedTuple):
    """One file. error: why it cannot be read, or empty, and then all else is known."""

    path: str
    error: str
    size: tuple[int, int] = (0, 0)  # width, height, upright
    mode: str = ""
    is_transparent: bool = False  # has an alpha channel or a colour that stands for one
    is_turned: bool = False  # by its EXIF data
    has_several: bool = False  # pictures, such as frames, of which the first is taken
    digest: str = ""  # of the file's bytes


@dataclass
class Split:
    """What was found of a split: pictures by class, and names below the root that are something else."""

    layout: str  # in words
    classes: dict[str, list[Picture]]
    strangers: list[str]  # files of other kinds in the class folders
    beside: list[str]  # such files beside them
    loose: list[str]  # pictures beside the class folders, and links to nothing
    passed_over: list[str]  # hidden files and folders, and those of systems

    @property
    def pictures(self) -> list[Picture]:
        return [picture for pictures in self.classes.values() for picture in pictures]


class Unreadable(Dataset):
    """Of pictures asked for by (position, number): whether one cannot be read as training reads it, () bool, and its number."""

    def __init__(self, pictures: Pictures, background: tuple[int, int, int]):
        self.pictures, self.background = pictures, background

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        _, number = item
        try:
            self.pictures.picture(number, self.background)
        except ValueError:
            return torch.tensor(True), number
        return torch.tensor(False), number


def look(path: str) -> Picture:
    """Read one file as training does."""
    try:
        upright = read_picture(path)
        with Image.open(path) as file:
            is_transparent = file.mode in WITH_ALPHA or "transparency" in file.info
            is_turned = file.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
            mode, has_several = file.mode, getattr(file, "is_animated", False)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        return Picture(path, str(error))
    except Exception as error:  # such as EXIF data that cannot be understood
        return Picture(path, f"{path}: not a readable image ({error}): repair or remove it")
    return Picture(path, "", upright.size, mode, is_transparent, is_turned, has_several, digest)


def list_folder(root: Path, val_share: float = 0.0) -> tuple[dict[str, Split], list[Place]]:
    """The splits that there are, without their pictures, and where those are.

    val_share: as for training. ValueError where nothing says of which classes pictures are, and for folders that are linked
    into themselves.
    """
    splits, places = {}, []
    for name, listing in list_splits(root, val_share).items():
        found = listing.classes
        split = splits[name] = Split(listing.layout, {}, [], listing.strangers, listing.loose, [*listing.passed_over])
        for label in found:
            split.classes[label] = []
            split.strangers += found[label].strangers
            split.passed_over += found[label].passed_over
            places += [Place(name, label, str(root / picture)) for picture in found[label].pictures]
    return splits, places


def look_at(places: list[Place], workers: int) -> Iterator[tuple[Place, Picture]]:
    """All pictures, in their order, read by so many processes."""
    with ProcessPoolExecutor(workers) as processes:
        yield from zip(places, processes.map(look, [place.path for place in places], chunksize=AT_ONCE), strict=True)


def duplicates(splits: dict[str, Split]) -> list[list[str]]:
    """Groups of files with the same bytes, over all splits, largest first."""
    groups = defaultdict(list)
    for split in splits.values():
        for picture in split.pictures:
            if not picture.error:
                groups[picture.digest].append(picture.path)
    return sorted((paths for paths in groups.values() if len(paths) > 1), key=len, reverse=True)


def reasons_to_stop(splits: dict[str, Split]) -> list[str]:
    """What would end a training on these splits, each in a line."""
    lines = [f"{split}/ is not there" for split in ("train", "val") if split not in splits]
    for name, split in splits.items():
        if not split.classes:
            lines.append(f"{name}/ has no class folders")
        lines += [f"{picture} lies beside the class folders" for picture in split.loose]
        lines += [f"{stranger} is no image file" for stranger in split.strangers]
        lines += [f"{name}/{label} holds no images" for label, pictures in split.classes.items() if not pictures]
        lines += [picture.error for picture in split.pictures if picture.error]
    if {"train", "val"} <= splits.keys():
        unknown = sorted(splits["val"].classes.keys() - splits["train"].classes.keys())
        lines += [f"class {label!r} is in val/ but not in train/" for label in unknown]
    return lines


def most_common(values: Counter, count: int = 5) -> str:
    """'1200 of 32x32, 3 of 40x40 and 2 others'"""
    shown = ", ".join(f"{number:,} of {value}" for value, number in values.most_common(count))
    others = len(values) - count
    return shown + (f" and {others} others" if others > 0 else "")
