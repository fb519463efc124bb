"""Images from ImageNet-style folders.

A dataset is a directory with train/<class>/* and val/<class>/*; class names sorted give the labels 0, 1, ...
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2 as transforms

from utils.data.pictures import EXTENSIONS, WHITE, Stored, background_colour, list_classes, read_picture


@dataclass(frozen=True)
class ImageFiles:
    """Files of one split, or pictures in larger ones, and their labels; class_names[label] is the folder they lie in."""

    paths: Sequence[str | Stored]
    labels: list[int]
    class_names: list[str]


def read_folders(root: str | Path) -> tuple[ImageFiles, ImageFiles]:
    """The splits train/ and val/ under `root`.

    FileNotFoundError where a folder is missing, ValueError where one is empty, holds a file that is no image (by its name), or
    val/ has a class that train/ lacks. Hidden files and folders, and those that systems make, are passed over.
    """
    check_root(root)
    train, val = (_read_split(Path(root), split) for split in ("train", "val"))
    unknown = sorted(set(val.class_names) - set(train.class_names))
    if unknown:
        raise ValueError(f"{root}: class {unknown[0]!r} is in val/ but not in train/: remove it, or add its images to train/")
    labels = [train.class_names.index(val.class_names[label]) for label in val.labels]
    return train, ImageFiles(val.paths, labels, train.class_names)


def check_root(root: str | Path) -> None:
    """FileNotFoundError unless root/train and root/val are there: a cheap look before anything slow is loaded."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such directory; --data_path names one with train/<class>/* and val/<class>/*")
    for split in ("train", "val"):
        if not (Path(root) / split).is_dir():
            raise FileNotFoundError(f"{Path(root) / split}: no such directory; images belong into {split}/<class>/* there")


def _read_split(root: Path, split: str) -> ImageFiles:
    folder = root / split
    listing = list_classes(folder)
    if not listing.classes:
        raise ValueError(f"{folder}: no class folders in it; images belong into {split}/<class>/*")
    if listing.loose:
        raise ValueError(f"{folder / listing.loose[0]}: lies beside the class folders: move it into one, or remove it")
    paths: list[str] = []
    labels: list[int] = []
    for label, (name, found) in enumerate(listing.classes.items()):
        if found.strangers:
            endings = ", ".join(EXTENSIONS)
            raise ValueError(f"{folder / name / found.strangers[0]}: not an image file ({endings}): remove it from the folder")
        if not found.pictures:
            raise ValueError(f"{folder / name}: no images in it: add some or remove the folder")
        paths += [os.path.join(folder, name, picture) for picture in found.pictures]
        labels += [label] * len(found.pictures)
    return ImageFiles(paths, labels, list(listing.classes))


def check_resize(factor: float) -> None:
    """ValueError unless resized images are large enough to be cut to their final size."""
    if factor < 1:
        raise ValueError(f"--resize={factor}: images must not become smaller than their final size: give 1 or more")


class Images(Dataset):
    """Images (3, pixels, pixels) in [-1, 1] with their labels.

    Shorter side resized to resize * pixels (Lanczos), then a random crop (`augment`) or the centre. Items are asked for by
    (position, index): the position in the run seeds the crop, so a resumed run sees the same crops. background: what shows
    through where a picture is transparent.
    """

    def __init__(
        self,
        files: ImageFiles,
        pixels: int,
        resize: float = 1.125,
        augment: bool = False,
        flip: bool = False,
        seed: int = 0,
        background: str = WHITE,
    ):
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
        return len(self.files.paths)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int] | ValueError:
        position, index = item
        path = self.files.paths[index]
        try:
            pixels = self._prepared(read_picture(path, self.background), position)
        except ValueError as error:  # handed over as a value: raised inside a worker it would come in the worker's traceback
            return error
        except Exception as error:
            return ValueError(f"{path}: cannot be brought to size ({error or type(error).__name__}): repair or remove it")
        return pixels.float() / 127.5 - 1, self.files.labels[index]

    def _prepared(self, image: Image.Image, position: int) -> Tensor:
        """(3, pixels, pixels) uint8."""
        if not self.random:
            return self.transform(image)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPUs too, under the feet of the training step
            seed = int(np.random.SeedSequence((self.seed, position)).generate_state(1, np.uint64)[0]) >> 1
            torch.default_generator.manual_seed(seed)
            return self.transform(image)
