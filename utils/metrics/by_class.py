"""Scores of every class on its own, for samples and a reference whose classes are known.

A class of a small set has too few images for a Fréchet distance; what holds for few is a kernel distance, density and coverage,
and whether samples are recognised: whether the real image that is nearest to a sample is of its class.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.images import ImageFiles
from utils.metrics.distances import DENSITY_K, density_coverage, kernel_distance, nearest
from utils.metrics.features import Extractor, Features
from utils.metrics.image_sets import FolderImages, ImageSet, NpzImages, Reference, read_arrays, read_integers

NUMBERED = re.compile(r"_class(\d+)$")  # names of pictures that sample.py wrote


class Labels(NamedTuple):
    """Of every image of a set a number (N,), and what numbers stand for; names: None where only numbers are known."""

    numbers: np.ndarray
    names: list[str] | None


class ByClass(NamedTuple):
    """classes: scores by name of class; recognised: share of all samples that are; real_recognised: of the reference."""

    classes: dict[str, dict[str, int | float | None]]
    recognised: float
    real_recognised: float


def read_classes(samples: ImageSet, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """The name of the class of every image, of the samples and of the reference. ValueError where one of them has none."""
    if reference.images is None:
        raise ValueError(f"{reference.statistics}: statistics know no classes: give a reference of images, or no --by_class")
    found = []
    for images in (samples, reference.images):
        labels = read_labels(images)
        if labels is None:
            where = "in the array labels, in folders of their own, or at the end of names, as sample.py writes them"
            raise ValueError(f"{images.source}: --by_class needs the classes of the images, {where}: none are there")
        found.append(labels)
    return named_alike(*found, samples.source)


def read_labels(images: ImageSet) -> Labels | None:
    """From the array labels (or arr_1, as guided-diffusion has it) of an .npz, from class folders, or from names of PNG files.

    None where there are none. Folders are numbered in the order of their names, as for training.
    """
    if isinstance(images, NpzImages):
        names = ("labels", "arr_1") if images.array == "arr_0" else ("labels",)
        fitting = [array for array in read_arrays(Path(images.source)) if array.shape == (images.count,)]
        found = [array.name for name in names for array in fitting if array.name == name and array.dtype.kind in "iu"]
        return Labels(read_integers(Path(images.source), found[0]), None) if found else None
    if not isinstance(images, FolderImages) or not isinstance(images.files, ImageFiles):
        return None
    below = [Path(images.files.name(row)).relative_to(images.source) for row in range(images.count)]
    if all(len(path.parts) > 1 for path in below):
        names = sorted({path.parts[0] for path in below})
        return Labels(np.array([names.index(path.parts[0]) for path in below]), names)
    numbers = [NUMBERED.search(path.stem) for path in below]
    return Labels(np.array([int(number[1]) for number in numbers]), None) if all(numbers) else None


def named_alike(samples: Labels, reference: Labels, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Names of the classes of both, (N,) and (M,) strings; numbers stand for the other set's names, where it has some.

    source: of the samples. ValueError for a number without a name, and where no class of the samples is in the reference.
    """
    names = samples.names or reference.names
    both = []
    for labels in (samples, reference):
        own = labels.names or names
        outside = [number for number in np.unique(labels.numbers) if own and not 0 <= number < len(own)]
        if outside:
            raise ValueError(f"{source}: label {outside[0]} beside {len(own)} class folders: give a reference with all classes")
        both.append(np.array([own[number] if own else str(number) for number in labels.numbers]))
    if not set(both[0]) & set(both[1]):
        raise ValueError(
            f"{source}: no class of it, such as {str(both[0][0])!r}, is in the reference: give one of the same classes"
        )
    return both[0], both[1]


def score_by_class(
    samples: Features, reference: Features, names: np.ndarray, reference_names: np.ndarray, extractor: Extractor
) -> ByClass:
    """names (N,), reference_names (M,): the class of each image, as `named_alike` gives them. M from 2.

    Of each class of the samples: images, reference images, kernel distance, density, coverage, which are None with too few
    images, and recognised, the share of its samples whose nearest real image is of it. Beside this "real recognised": of its
    real images by the others, which samples cannot be expected to exceed.
    """
    made, real, device = samples.pooled, reference.pooled, extractor.device
    hits = reference_names[nearest(made, real, device=device)] == names
    real_hits = reference_names[nearest(real, None, device=device)] == reference_names
    classes = {}
    for name in dict.fromkeys([*np.unique(reference_names), *np.unique(names)]):
        ours, theirs = names == name, reference_names == name
        if not ours.any():
            continue
        a, b = made[ours], real[theirs]
        row: dict[str, int | float | None] = {"images": len(a), "reference images": len(b)}
        row[extractor.kernel_name] = kernel_distance(a, b, device=device)[0] if min(len(a), len(b)) > 1 else None
        row["density"] = row["coverage"] = None
        if len(b) > DENSITY_K:
            row["density"], row["coverage"] = density_coverage(b, a, device=device)
        row["recognised"] = float(hits[ours].mean())
        row["real recognised"] = float(real_hits[theirs].mean()) if len(b) else None
        classes[str(name)] = row
    return ByClass(classes, float(hits.mean()), float(real_hits.mean()))
