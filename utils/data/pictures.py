"""Pictures on disk: which files of a folder are some, and what pixels they have. One listing and one reader for all commands.

A picture is upright as its EXIF data say, has 8 bits per channel, 16 are scaled, and no transparency: it lies on a background.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from models.storage import in_place_of_a_file, start_of

# those of torchvision, whose import takes seconds
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
WHITE = "white"
BACKGROUND_HELP = "colour of what shows through where pictures are transparent: a name, or #rrggbb"
# Made by systems and storage devices beside people's own files, and often full of thumbnails.
OF_SYSTEMS = {"@eadir", "#recycle", "__macosx", "$recycle.bin", "system volume information", "lost+found"}
OF_SYSTEMS |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


class Found(NamedTuple):
    """Files under a folder, as paths below it with / between their parts, in the order of these."""

    pictures: list[str]
    strangers: list[str]  # with other endings
    passed_over: list[str]  # hidden, or of systems; of folders the folder alone


def uncounted() -> None:
    """Nobody wants to know."""


def find_pictures(folder: str | Path, below: str = "", seen: Callable[[], object] = uncounted) -> Found:
    """All files of a folder and the folders in it, links followed; hidden ones and those of systems are passed over.

    below: put before every path. seen: called for each picture. ValueError for a folder that is linked into itself.
    """
    pictures: list[str] = []
    strangers: list[str] = []
    passed_over: list[str] = []

    def scan(path: str, prefix: str, around: frozenset[str]) -> None:
        place = os.path.realpath(path)
        if place in around:
            raise ValueError(f"{path}: is a link to a folder around it: remove it")
        with os.scandir(path) as entries:
            for entry in entries:
                if is_of_a_system(entry.name):
                    passed_over.append(prefix + entry.name)
                elif entry.is_dir():
                    scan(entry.path, f"{prefix}{entry.name}/", around | {place})
                elif entry.name.lower().endswith(EXTENSIONS):
                    pictures.append(prefix + entry.name)
                    seen()
                else:
                    strangers.append(prefix + entry.name)

    scan(os.fspath(folder), below, frozenset())
    return Found(sorted(pictures), sorted(strangers), sorted(passed_over))


def is_of_a_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden or was made by a system, and is no data."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def background_colour(name: str) -> tuple[int, int, int]:
    """'white', '#ff8800' -> red, green and blue, 0 to 255. ValueError for what names no colour."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise ValueError(f"--background={name}: no colour: give a name such as white, or #rrggbb") from error


def read_picture(
    path: str | Path, background: tuple[int, int, int] = (255, 255, 255), contents: bytes | None = None
) -> Image.Image:
    """The first picture of a file, RGB. background: what shows through where it is transparent.

    contents: of a picture that lies in a file with others; path is then what messages call it. ValueError, in one line that
    names the file, where it cannot be read or its values have no known range.
    """
    source = str(path) if contents is None else io.BytesIO(contents)
    try:
        with Image.open(source) as file:
            check_range(file)
            transparency = file.info.get("transparency")
            upright = ImageOps.exif_transpose(file)
        return opaque(upright, transparency, background)
    except Exception as error:  # whatever a decoder raises: the name of the file is what helps
        if isinstance(error, UnidentifiedImageError):
            start = start_of(path) if contents is None else contents[:512]
            if what := in_place_of_a_file(start):
                raise ValueError(f"{path}: not a readable image: {what}") from error
        reason = " ".join(str(error).removesuffix(f" {source!r}").rstrip(":").split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable image ({reason}): repair or remove it") from error


def check_range(image: Image.Image) -> None:
    """ValueError for pixels of which nobody can say what is black and what is white."""
    # a PNG of 16 bits is of mode I in some versions of Pillow
    if image.mode == "F" or (image.mode.startswith("I") and image.mode not in SIXTEEN_BITS and image.format != "PNG"):
        raise ValueError(f"pixels of mode {image.mode} have no known range, 8 or 16 bits per channel are needed")


def opaque(image: Image.Image, transparency: object, background: tuple[int, int, int]) -> Image.Image:
    """An image of any mode as RGB of 8 bits; transparency: of its file, where it names a colour instead of an alpha channel."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        grey = Image.fromarray(np.rint(values / 257).clip(0, 255).astype(np.uint8))
        if not isinstance(transparency, int):
            return grey.convert("RGB")
        alpha = Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8))
        image = Image.merge("LA", (grey, alpha))
    if image.mode not in WITH_ALPHA and transparency is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(ground, image).convert("RGB")
