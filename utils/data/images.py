"""Images of a run: which files there are, with their labels, and what training makes of them.

A dataset is a directory with train/<class>/* and val/<class>/*, or one of the other layouts in `utils.data.layouts`; class
names sorted give the labels 0, 1, ...
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.data.layouts import Listing, check_root, list_splits
from utils.data.pictures import EXTENSIONS, WHITE, background_colour, read_picture


class Pictures(Protocol):
    """What gives pictures and labels by number, from wherever they are; all that training asks of it."""

    root: str  # what they are of, for people
    layout: str  # how they lie there, in words
    labels: np.ndarray  # (N,) int64
    class_names: list[str]  # by label

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """For people: where the picture is."""
        ...

    def picture(self, index: int, background: tuple[int, int, int]) -> Image.Image:
        """RGB, upright. ValueError, in one line that names it, where it cannot be read."""
        ...

    def listing(self) -> Iterator[str]:
        """What tells each from others, wherever all of them lie: cheap to have, no pixels are read."""
        ...

    def take(self, rows: np.ndarray) -> Self:
        """Those of these numbers."""
        ...


class Names(Sequence[str]):
    """Strings, one behind another in an array.

    Processes that load images share it. Of a list of strings each would get a copy of its own, page by page: looking at an
    object of Python changes its count of references, and so writes to it (pytorch issue 13246).
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        """text: (bytes,) uint8; ends: (N + 1,) int64, where each begins and the last ends."""
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        encoded = [os.fsencode(name) for name in names]
        ends = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(name) for name in encoded], out=ends[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes())


@dataclass(frozen=True)
class ImageFiles:
    """Files of one split and their labels, in arrays alone.

    root: what names are below; names: with / between their parts; labels: (N,) int64; layout: how they lie there, in words.
    """

    root: str
    names: Names
    labels: np.ndarray
    class_names: list[str]
    layout: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def picture(self, index: int, background: tuple[int, int, int]) -> Image.Image:
        return read_picture(self.name(index), background)

    def listing(self) -> Iterator[str]:
        return iter(self.names)

    def take(self, rows: np.ndarray) -> "ImageFiles":
        names = Names.of(self.names[row] for row in rows)
        return ImageFiles(self.root, names, self.labels[rows], self.class_names, self.layout)

    @property
    def paths(self) -> list[str]:
        """All of them as strings, which is what these arrays are there to avoid: for few."""
        return [self.name(index) for index in range(len(self))]


def read_folders(root: str | Path, val_share: float = 0.0) -> tuple[ImageFiles, ImageFiles]:
    """The images to train on and the held-out ones under `root`; val_share: how many of them are held out where no val/ is.

    FileNotFoundError where a folder is missing, ValueError where one is empty, holds a file that is no image (by its name), or
    a held-out image is of a class that is not trained. Hidden files and folders, and those that systems make, are passed over.
    """
    check_root(root, val_share)
    splits = list_splits(root, val_share)
    class_names = list(splits["train"].classes)
    train, val = (_packed(root, splits[name], class_names, bool(val_share)) for name in ("train", "val"))
    return train, val


def _packed(root: str | Path, listing: Listing, class_names: list[str], by_rule: bool) -> ImageFiles:
    """by_rule: the split was made by a share, so classes and splits may be empty where files are few."""
    folder = Path(root) / listing.folder
    if listing.loose:
        raise ValueError(f"{Path(root) / listing.loose[0]}: lies beside the class folders: move it into one, or remove it")
    if not listing.classes:
        if by_rule and class_names:
            raise ValueError(f"{root}: --val_share holds out none of its images: give a larger share, or add images")
        raise ValueError(f"{folder}: no class folders in it; images belong into {listing.layout}")
    label_of = {name: label for label, name in enumerate(class_names)}
    for name, found in listing.classes.items():
        if name not in label_of:
            where = "in val/ but not in train/"
            raise ValueError(f"{root}: class {name!r} is {where} ({listing.layout}): remove it, or add its images to train/")
        if found.strangers:
            endings = ", ".join(EXTENSIONS)
            raise ValueError(f"{Path(root) / found.strangers[0]}: not an image file ({endings}): remove it from the folder")
        if not found.pictures:
            left = " left to train on, at this --val_share" if by_rule else " in it"
            raise ValueError(f"{folder / name}: no images{left}: add some or remove the folder")
    counts = [len(found.pictures) for found in listing.classes.values()]
    labels = np.repeat(np.array([label_of[name] for name in listing.classes], np.int64), counts)
    names = Names.of(name for found in listing.classes.values() for name in found.pictures)
    return ImageFiles(str(root), names, labels, class_names, listing.layout)


def told(train: Pictures, val: Pictures) -> str:
    """Both splits in a line for people."""
    return (
        f"{train.root}: {len(train):,} images of {len(train.class_names):,} classes ({train.layout}), "
        f"{len(val):,} held out ({val.layout})"
    )


def listing_hash(train: Pictures, val: Pictures) -> str:
    """SHA-256 over the file names below the root and their labels, in the order of the rows."""
    digest = hashlib.sha256()
    for files in (train, val):
        for name, label in zip(files.listing(), files.labels.tolist(), strict=True):
            digest.update(f"{name}\n{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_resize(factor: float) -> None:
    """ValueError unless resized images are large enough to be cut to their final size."""
    if not factor >= 1:
        raise ValueError(f"--resize={factor}: images must not become smaller than their final size: give 1 or more")


class Images(Dataset):
    """Images (3, pixels, pixels) in [-1, 1] with their labels.

    Shorter side resized to resize * pixels (Lanczos), then a random crop (`augment`) or the centre. Items are asked for by
    (position, index): the position in the run seeds the crop, so a resumed run sees the same crops. background: what shows
    through where a picture is transparent.
    """

    def __init__(
        self,
        files: Pictures,
        pixels: int,
        resize: float = 1.125,
        augment: bool = False,
        flip: bool = False,
        seed: int = 0,
        background: str = WHITE,
    ):
        from torchvision.transforms import v2 as transforms  # here, as it takes seconds

        self.files, self.background = files, background_colour(background)
        self.seed = seed
        self.random = augment or flip
        crop = transforms.RandomCrop if augment else transforms.CenterCrop
        self.transform = transforms.Compose(
            [
                transforms.Resize(round(resize * pixels), interpolation=transforms.InterpolationMode.LANCZOS),
                crop((pixels, pixels)),
                *([transforms.RandomHorizontalFlip()] if flip else []),
                transforms.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int] | ValueError:
        position, index = item
        try:
            pixels = self._prepared(self.files.picture(index, self.background), position)
        except ValueError as error:  # handed over as a value: raised inside a worker it would come in the worker's traceback
            return error
        except Exception as error:
            return ValueError(
                f"{self.files.name(index)}: cannot be brought to size ({error or type(error).__name__}): repair or remove it"
            )
        return pixels.float() / 127.5 - 1, int(self.files.labels[index])

    def _prepared(self, image: Image.Image, position: int) -> Tensor:
        """(3, pixels, pixels) uint8."""
        if not self.random:
            return self.transform(image)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPUs too, under the feet of the training step
            seed = int(np.random.SeedSequence((self.seed, position)).generate_state(1, np.uint64)[0]) >> 1
            torch.default_generator.manual_seed(seed)
            return self.transform(image)
