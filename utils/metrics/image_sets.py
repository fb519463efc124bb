"""Sets of images to be scored: an .npz of samples, as evaluators of any model read them, pictures, or statistics.

Pictures are those of a folder, or of a split of a data set, hf:DIRECTORY or hf:OWNER/NAME[@REVISION] with :SPLIT.

Images are read batch by batch, so that 50,000 images need no more memory than one batch. Nothing in a file is executed.
`rows` are the numbers of the images to be read, ascending, such as the part that one of several processes takes; None: all.
"""

import contextlib
import itertools
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.data.hub_sets import is_hub_set, read_hub_images
from utils.data.images import ImageFiles, Names, Pictures
from utils.data.pictures import EXTENSIONS, WHITE, background_colour, find_pictures
from utils.files import replace_file

ORIGIN = ("extractor", "fingerprint", "count", "height", "width")  # of statistics: what they are of
READERS = min(os.cpu_count() or 1, 8)  # threads that decode pictures
AT_ONCE = 4 * READERS  # pictures in memory that have not been asked for yet
# What zipfile and NumPy raise on archives that are damaged or something else altogether.
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression that is unknown here
    OSError,
    RuntimeError,  # encrypted
    ValueError,
)


@dataclass(frozen=True)
class Array:
    """An array in an archive: shape and type as its header says."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.shape}{' in columns' * self.fortran_order}"

    @property
    def is_images(self) -> bool:
        return self.dtype == np.uint8 and len(self.shape) == 4 and self.shape[3] == 3 and not self.fortran_order


class _InBatches:
    """What sets of images share: `pictures`, one by one, make batches."""

    def batches(self, size: int, rows: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """(N, H, W, 3) uint8, N = size but for the last; ValueError for a file that cannot be read."""
        pictures = self.pictures(range(self.count) if rows is None else rows)
        while batch := list(itertools.islice(pictures, size)):
            yield np.stack(batch)


@dataclass(frozen=True)
class NpzImages(_InBatches):
    """Images of an archive, in its order."""

    source: str
    array: str
    count: int
    height: int
    width: int

    def pictures(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 each. What lies between the rows is passed over, in compressed archives by reading it."""
        shape = (self.height, self.width, 3)
        length = math.prod(shape)
        with reading(self.source), zipfile.ZipFile(self.source) as archive, archive.open(f"{self.array}.npy") as member:
            read_header(self.array, member)
            first = member.tell()
            for row in rows:
                if member.tell() != first + row * length:
                    member.seek(first + row * length)
                data = member.read(length)
                if len(data) < length:
                    raise EOFError(f"{self.array} ends in image {row}")
                yield np.frombuffer(data, np.uint8).reshape(shape)
            if rows and rows[-1] == self.count - 1:
                member.read(1)  # only at its end is the checksum compared


@dataclass(frozen=True)
class FolderImages(_InBatches):
    """Pictures of a folder and the folders in it, in the order of their paths, and how many other files lie among them.

    Or those of a data set, in the order of its rows.
    """

    source: str
    files: Pictures  # their labels are of no account
    height: int
    width: int
    background: tuple[int, int, int] = (255, 255, 255)
    strangers: int = 0

    @property
    def count(self) -> int:
        return len(self.files)

    def pictures(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 each; ValueError for a file that cannot be read or is of another size."""
        for row, image in zip(rows, self.of_any_size(rows), strict=True):
            if image.shape[:2] != (self.height, self.width):
                sizes = f"{image.shape[1]}x{image.shape[0]} pixels, others {self.width}x{self.height}"
                raise ValueError(f"{self.files.name(row)}: {sizes}: bring all to one size")
            yield image

    def of_any_size(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The same, each of the size it has; a few are read at once, which keeps a GPU busier."""
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(rows), AT_ONCE):
                some = rows[start : start + AT_ONCE]
                yield from map(np.asarray, readers.map(lambda row: self.files.picture(row, self.background), some))


@dataclass(frozen=True)
class FittedImages(_InBatches):
    """Images of a set brought to one size as for training: the shorter side resized (Lanczos), then the centre cut out."""

    whole: NpzImages | FolderImages
    height: int
    width: int

    @property
    def source(self) -> str:
        return self.whole.source

    @property
    def count(self) -> int:
        return self.whole.count

    def pictures(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 each; one that has this size stays as it is. ValueError for another size unless this is square."""
        from torchvision.transforms.v2 import functional as F  # here, as it takes seconds

        of_folder = isinstance(self.whole, FolderImages)
        for row, image in zip(rows, self.whole.of_any_size(rows) if of_folder else self.whole.pictures(rows), strict=True):
            if image.shape[:2] == (self.height, self.width):
                yield image
                continue
            if self.height != self.width:
                name = self.whole.files.name(row) if of_folder else self.source
                raise ValueError(
                    f"{name}: {image.shape[1]}x{image.shape[0]} pixels; {self.width}x{self.height} are needed, "
                    "and only squares are cut out: resize them first"
                )
            resized = F.resize(Image.fromarray(image), self.height, F.InterpolationMode.LANCZOS)
            yield np.asarray(F.center_crop(resized, self.height))


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D) of features."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class Statistics:
    """Of the pooled features of images, and of their spatial ones where an extractor has them.

    count, height, width: of the images; None in files of other evaluators, which do not say.
    """

    source: str
    count: int | None
    height: int | None
    width: int | None
    pooled: Gaussian
    spatial: Gaussian | None = None


class Reference(NamedTuple):
    """What there is to compare with: images, a file of statistics, or both in one file."""

    images: NpzImages | FolderImages | None
    statistics: Path | None


ImageSet = NpzImages | FolderImages | FittedImages


def open_images(source: str | Path, background: str = WHITE, array_name: str = "", image_column: str = "") -> ImageSet:
    """The images of an .npz (of the array named, of arr_0, or of its only array of images), of a folder or of a data set.

    background: what shows through where pictures are transparent. image_column: of a data set. FileNotFoundError where there
    is nothing, ValueError, in one line, where what is there are no 8-bit RGB images of one size, or several arrays of them.
    """
    if is_hub_set(source):
        return _open_pictures(str(source), read_hub_images(str(source), image_column), background_colour(background))
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, background_colour(background))
    arrays = read_arrays(path)
    array = next((array for array in arrays if array.name == (array_name or "arr_0")), None)
    if array is None and not array_name:
        candidates = [array for array in arrays if array.is_images]
        if len(candidates) > 1:
            names = ", ".join(map(str, candidates))
            raise ValueError(f"{path}: has several arrays of images, {names}, and no arr_0: give --array={candidates[0].name}")
        array = candidates[0] if candidates else None
    if array is None or not array.is_images:
        has = ", ".join(map(str, arrays[:4])) + (", ..." if len(arrays) > 4 else "")
        wanted = array_name or "arr_0"
        raise ValueError(f"{path}: has {has or 'no arrays'}: images are uint8 (count, height, width, 3) in {wanted}")
    if 0 in array.shape:
        raise ValueError(f"{path}: {array} holds no images: give a file that has some")
    return NpzImages(str(path), array.name, *array.shape[:3])


def open_reference(
    source: str | Path,
    extractor: str,
    background: str = WHITE,
    array_name: str = "",
    image_column: str = "",
    any_statistics: bool = False,
) -> Reference:
    """Images, statistics that `write_statistics` wrote, or for "inception" those of another evaluator.

    background, array_name, image_column: as for `open_images`; an array of this name counts where there is one.

    Statistics without a word of who made them are refused unless any_statistics: pytorch-fid's for instance are of images that
    were resized otherwise. The OpenAI evaluator's (VIRTUAL_*.npz) have statistics of a whole data set and, for precision and
    recall, some images of it.
    """
    path = Path(source)
    if is_hub_set(source) or path.is_dir():
        return Reference(open_images(source, background, image_column=image_column), None)
    arrays = read_arrays(path)
    names = {array.name for array in arrays}
    named = array_name if array_name in names else ""
    if {"mu", "sigma", "extractor"} <= names:
        return Reference(None, path)
    if {"mu", "sigma"} <= names and extractor == "inception":
        if not (any_statistics or {"mu_s", "sigma_s"} <= names):
            raise ValueError(
                f"{path}: statistics that do not say who made them; others resize images otherwise, which changes distances: "
                "give images, what scripts/evaluate.py stats wrote, or --any_statistics"
            )
        has_images = any(array.is_images for array in arrays)
        return Reference(open_images(path, array_name=named) if has_images else None, path)
    return Reference(open_images(path, array_name=named), None)


def read_statistics(path: Path, extractor: str, fingerprint: str, dim: int, spatial_dim: int) -> Statistics:
    """Statistics of this extractor, whose features have these widths. ValueError where they are damaged or of another."""
    shapes = {array.name: array.shape for array in read_arrays(path)}
    described = ORIGIN if "extractor" in shapes else ()
    with reading(path):
        missing = [name for name in ("mu", "sigma", *described) if name not in shapes]
        if missing:
            raise ValueError(f"statistics without {missing[0]}")
        if any(shapes[name] != () for name in described):
            raise ValueError("statistics described by more than single values")
        origin = dict(zip(described, _load(path, described), strict=True))
        count, height, width = (int(origin[name]) if origin else None for name in ("count", "height", "width"))
    if origin and origin["extractor"] != extractor:
        raise ValueError(f"{path}: statistics of {origin['extractor']}, not of {extractor}: give others, or its --extractor")
    if origin and origin["fingerprint"] != fingerprint:
        raise ValueError(f"{path}: statistics made with other weights of {extractor}: make them again with these")
    pooled = _gaussian(path, ("mu", "sigma"), shapes, dim)
    has_spatial = spatial_dim > 0 and {"mu_s", "sigma_s"} <= shapes.keys()
    spatial = _gaussian(path, ("mu_s", "sigma_s"), shapes, spatial_dim) if has_spatial else None
    return Statistics(str(path), count, height, width, pooled, spatial)


def _gaussian(path: Path, names: tuple[str, str], shapes: dict[str, tuple[int, ...]], dim: int) -> Gaussian:
    found, wanted = [shapes[name] for name in names], [(dim,), (dim, dim)]
    if found != wanted:  # found out from the headers: nothing that is too large is read
        raise ValueError(f"{path}: mean {found[0]} and covariance {found[1]} instead of {dim} features: give others")
    values = _load(path, names)
    if not all(part.dtype.kind == "f" and np.isfinite(part).all() for part in values):
        raise ValueError(f"{path}: has NaN or infinity: make these statistics again")
    return Gaussian(*values)


def _load(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of an archive whose headers have been seen."""
    with reading(path), np.load(path, allow_pickle=False) as archive:
        return [archive[name] for name in names]


def read_integers(path: Path, name: str) -> np.ndarray:
    """An array of an archive that `read_arrays` has found there."""
    return _load(path, [name])[0]


def write_statistics(out: Path, statistics: Statistics, extractor: str, fingerprint: str) -> None:
    """mu, sigma (mu_s, sigma_s) and what they are of. fingerprint: of the extractor's weights.

    OSError, which names the file, where it could not be written: nothing of it is left.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    values = dict(zip(("mu", "sigma"), statistics.pooled, strict=True))
    if statistics.spatial:
        values |= dict(zip(("mu_s", "sigma_s"), statistics.spatial, strict=True))
    origin = (extractor, fingerprint, statistics.count, statistics.height, statistics.width)
    with replace_file(out) as aside, open(aside, "wb") as file:  # given a name NumPy would add an ending to it
        np.savez(file, **values, **dict(zip(ORIGIN, origin, strict=True)))


def read_arrays(path: Path) -> list[Array]:
    """What an .npz holds, from the headers alone. ValueError for other files, truncated ones, and pickled objects."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder: give an .npz or a folder of pictures")
    arrays = []
    with reading(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            with archive.open(info) as member:
                array = read_header(info.filename.removesuffix(".npy"), member)
                expected = member.tell() + math.prod(array.shape) * array.dtype.itemsize
            if info.file_size != expected:
                raise ValueError(f"{array} needs {expected:,} bytes, there are {info.file_size:,}")
            arrays.append(array)
    return arrays


def read_header(name: str, member) -> Array:
    """The header of an .npy file, which is then read up to its data. ValueError where the data are pickled objects."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} is of the unknown version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(member)
    except (SyntaxError, TypeError, tokenize.TokenError) as error:
        raise ValueError(f"the header of {name} is damaged") from error
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which are not loaded")
    if any(side < 0 for side in shape):
        raise ValueError(f"{name} has the shape {shape}")
    return Array(name, shape, dtype, fortran_order)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns what damaged archives raise into a ValueError that names the file."""
    try:
        yield
    except DAMAGED as error:
        raise ValueError(
            f"{path}: not a readable .npz ({str(error) or type(error).__name__}): make or copy it again"
        ) from error


def _open_folder(folder: Path, background: tuple[int, int, int]) -> FolderImages:
    found = find_pictures(folder)
    if not found.pictures:
        raise ValueError(f"{folder}: no pictures ({', '.join(EXTENSIONS)}) in this folder or those in it: give another")
    files = ImageFiles(str(folder), Names.of(found.pictures), np.zeros(len(found.pictures), np.int64), [""])
    return _open_pictures(str(folder), files, background, len(found.strangers))


def _open_pictures(source: str, files: Pictures, background: tuple[int, int, int], strangers: int = 0) -> FolderImages:
    width, height = files.picture(0, background).size
    return FolderImages(source, files, height, width, background, strangers)
