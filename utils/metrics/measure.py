"""Features of sets of images and their statistics: on one process, or shared out over ranks.

    extractor = load_extractor("efflite0", device=device)        # utils/metrics/features.py
    real = measure(extractor, open_images("val"))                # a folder or an .npz, utils/metrics/image_sets.py
    made = measure_batches(extractor, batches, "samples")        # batches (N, H, W, 3) uint8 from anywhere
    frechet_distance(*made.statistics.pooled, *real.statistics.pooled)    # utils/metrics/distances.py

With `ranks`, every rank calls the same: `measure` takes its part of the images by itself, `measure_batches` is given it.
Statistics are then those of all ranks' images, on every rank; features those of all, in order, on the main rank alone.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dist import Ranks
from utils.metrics.distances import Moments
from utils.metrics.features import Extractor, Features, extract
from utils.metrics.image_sets import Gaussian, ImageSet, Statistics

BATCH = {"cpu": 8, "cuda": 256}  # on a CPU larger ones are slower
ALONE = Ranks(0, 1, torch.device("cpu"))
ROWS = 1024  # of features that ranks hand over at once


class Measured(NamedTuple):
    """Statistics of images and, on the CPU, the features (N, ...) of every one; None where only statistics are known."""

    statistics: Statistics
    features: Features | None


def batch_size(extractor: Extractor) -> int:
    """Images at a time that suit the extractor's device."""
    return BATCH[extractor.device.type]


def share(count: int, batch: int, ranks: Ranks) -> slice:
    """This rank's part of so many images, in whole batches: the same as those of one rank alone, so features are the same."""
    num_batches = -(-count // batch)
    first, end = (num_batches * rank // ranks.world * batch for rank in (ranks.rank, ranks.rank + 1))
    return slice(min(first, count), min(end, count))


class Measurement:
    """Takes in images batch by batch. With several ranks each takes its own; `result` is that of all.

    source: what messages call the images. keep_features: else a million images need no more memory than a few.
    first: how many images other ranks have before those of this one, for messages.
    """

    def __init__(self, extractor: Extractor, source: str, keep_features: bool = True, first: int = 0):
        self.extractor, self.source, self.first = extractor, source, first
        self.size: tuple[int, int] | None = None
        self.count = 0
        self.pooled = Moments(extractor.dim, extractor.device)
        self.spatial = Moments(extractor.spatial_dim, extractor.device) if extractor.spatial_dim else None
        self.kept: list[Features] | None = [] if keep_features else None

    def add(self, images: np.ndarray) -> None:
        """images (N, H, W, 3) uint8, all of one size. ValueError for another size, or features that are not finite."""
        size = images.shape[1:3]
        if self.size not in (None, size):
            raise ValueError(f"{self.source}: images of {size[1]}x{size[0]} pixels after {self.size[1]}x{self.size[0]}")
        features = extract(self.extractor, images, self.source, self.first + self.count)
        self.size = size
        self.count += len(images)
        self.pooled.add(features.pooled)
        if self.spatial:
            self.spatial.add(features.spatial)
        if self.kept is not None:
            self.kept.append(Features(*(None if part is None else part.cpu() for part in features)))

    def result(self, ranks: Ranks = ALONE) -> Measured:
        """Of all ranks' images, each rank's behind those of the one before. ValueError for fewer than two images in all."""
        sizes = ranks.gather(torch.tensor([self.count, *(self.size or (0, 0))]))
        counts, (height, width) = sizes[:, 0].tolist(), sizes[:, 1:].amax(0).tolist()  # ranks without images know no size
        sums = (part.over_ranks(ranks.sum) for part in (self.pooled, self.spatial) if part)
        with ranks.failing_together():
            if sum(counts) < 2:
                raise ValueError(f"{self.source}: {sum(counts)} images have no covariance: give at least 2")
        statistics = Statistics(self.source, sum(counts), height, width, *(Gaussian(*part.result()) for part in sums))
        if self.kept is None:
            return Measured(statistics, None)
        dims = (self.extractor.dim, self.extractor.num_classes, self.extractor.spatial_dim)
        features = [_gathered([batch[i] for batch in self.kept], dim, counts, ranks) for i, dim in enumerate(dims)]
        return Measured(statistics, Features(*features) if ranks.is_main else None)


def _gathered(parts: list[Tensor], dim: int, counts: list[int], ranks: Ranks) -> Tensor | None:
    """All ranks' features (N, dim) one below another on the main rank; None on others, and for features that are not there."""
    if dim == 0:
        return None
    own = torch.cat(parts) if parts else torch.empty(0, dim)
    if ranks.world == 1:
        return own
    whole = torch.empty(sum(counts), dim) if ranks.is_main else None
    for start in range(0, max(counts), ROWS):
        rows = own[start : start + ROWS]
        filled = torch.zeros(min(ROWS, max(counts) - start), dim)  # of one length on all ranks
        filled[: len(rows)] = rows
        for rank, theirs in enumerate(ranks.gather(filled)):
            if whole is not None:
                length = min(max(counts[rank] - start, 0), ROWS)
                offset = sum(counts[:rank]) + start
                whole[offset : offset + length] = theirs[:length]
    return whole


def measure(
    extractor: Extractor, images: ImageSet, batch: int = 0, ranks: Ranks = ALONE, keep_features: bool = True
) -> Measured:
    """Of a set of images. batch: images at a time, 0: as suits the device.

    ValueError for images that cannot be read or whose features are not finite, which with several ranks ends all.
    """
    batch = batch or batch_size(extractor)
    part = share(images.count, batch, ranks)
    measurement = Measurement(extractor, images.source, keep_features, part.start)
    with progress(images.source, images.count, ranks) as advance, ranks.failing_together():
        for images_of_batch in images.batches(batch, range(images.count)[part]):
            measurement.add(images_of_batch)
            advance(len(images_of_batch))
    return measurement.result(ranks)


def measure_batches(
    extractor: Extractor, batches: Iterable[np.ndarray], source: str, ranks: Ranks = ALONE, keep_features: bool = True
) -> Measured:
    """Of images (N, H, W, 3) uint8 in batches, with several ranks those of each; source: what messages call them."""
    measurement = Measurement(extractor, source, keep_features)
    with ranks.failing_together():
        for images in batches:
            measurement.add(images)
    return measurement.result(ranks)


@contextlib.contextmanager
def progress(source: str, count: int, ranks: Ranks) -> Iterator[Callable[[int], None]]:
    """A bar on the main rank, moved on by calls with how many images it has done; the others are taken to be as far."""
    interval = 0.2 if sys.stderr.isatty() else 20
    name = Path(source).name
    with tqdm(total=count, unit="image", desc=name, mininterval=interval, disable=not ranks.is_main) as bar:
        yield lambda done: bar.update(min(ranks.world * done, bar.total - bar.n))
        bar.update(bar.total - bar.n)
