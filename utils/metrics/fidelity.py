"""FD-EffLite0 of what a model makes while it trains, beside that of real images: only the two together mean anything."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from dist import Ranks
from models.generate import Cohort, generate, num_cohorts
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import plots
from utils.data.batches import val_batches
from utils.data.hub_sets import FOUND_BY_TYPE, Columns
from utils.data.images import ImageFiles, Images
from utils.data.pictures import WHITE
from utils.data.sources import read_images
from utils.metrics.distances import frechet_distance
from utils.metrics.features import load_extractor
from utils.metrics.image_sets import Gaussian
from utils.metrics.measure import Measurement, batch_size, measure_batches
from utils.signals import StopRequest

SEED = 0  # the same samples at every validation


class Fidelity:
    """Compares samples, or decoded training images, with all held-out images; and as many training images likewise.

    root: directory with train/ and val/, or hf:... with its columns. count: samples. pixels, resize: how images are prepared,
    as for training, but cut out of the middle; background: what shows through transparent ones. Every rank makes and looks at
    its share, and reads its images with so many workers.
    """

    def __init__(
        self,
        root: str | Path,
        count: int,
        pixels: int,
        resize: float,
        workers: int,
        ranks: Ranks,
        background: str = WHITE,
        columns: Columns = FOUND_BY_TYPE,
    ):
        self.train, self.val = read_images(root, columns)
        if len(self.val.paths) < 2:
            raise ValueError(f"{root}/val: holds 1 image, a distance needs more: add some, or give --val_fd=0")
        self.count, self.pixels, self.resize, self.background = count, pixels, resize, background
        self.workers, self.ranks = workers, ranks
        self.labels = [n * len(self.val.class_names) // count for n in range(count)]
        self.extractor = load_extractor("efflite0", device=ranks.device)

    @functools.cached_property
    def reference(self) -> Gaussian:
        """Of the held-out images; all ranks ask for it together."""
        return self._measure(self.val, "held-out images")

    @functools.cached_property
    def real(self) -> float:
        """The distance of training images from the held-out ones; all ranks ask for it together."""
        return frechet_distance(*self._measure(self._some(), "training images"), *self.reference)

    def _some(self) -> ImageFiles:
        """As many training images as there are to be samples, spread evenly over the classes."""
        chosen = np.linspace(0, len(self.train.paths) - 1, min(self.count, len(self.train.paths))).astype(int)
        return replace(self.train, **{name: [getattr(self.train, name)[i] for i in chosen] for name in ("paths", "labels")})

    def _measure(self, files: ImageFiles, source: str, change: Callable[[Tensor], Tensor] | None = None) -> Gaussian:
        batches = self._batches(files, change)
        return measure_batches(self.extractor, batches, source, self.ranks, keep_features=False).statistics.pooled

    def _batches(self, files: ImageFiles, change: Callable[[Tensor], Tensor] | None) -> Iterator[np.ndarray]:
        images = Images(files, self.pixels, self.resize, background=self.background)
        size, ranks = batch_size(self.extractor), self.ranks
        for batch, _ in val_batches(images, size, ranks.rank, ranks.world, self.workers):
            batch = batch if change is None else change(batch.to(ranks.device))
            yield plots.to_uint8((batch + 1) / 2)

    def of_reconstructions(self, tokenizer: VQVAE) -> float:
        """The distance of training images, as the tokenizer decodes them, from the held-out ones."""
        decoded = self._measure(self._some(), "reconstructions", lambda images: tokenizer.decode(tokenizer.encode(images)))
        return frechet_distance(*decoded, *self.reference)

    def of_samples(self, transformer: ScaleTransformer, tokenizer: VQVAE, stop: StopRequest) -> float | None:
        """The distance of samples, drawn as for FID, from the held-out images; None where a stop was requested meanwhile."""
        ranks = self.ranks
        cohorts = num_cohorts(self.count, ranks.device.type)
        measurement = Measurement(self.extractor, "samples", keep_features=False)
        for first in range(0, cohorts, ranks.world):
            if ranks.largest(stop.number):
                return None
            # a rank without a cohort of its own makes the last again: the ranks of a sharded model compute together
            cohort = Cohort.of(self.labels, min(first + ranks.rank, cohorts - 1), SEED, ranks.device)
            made = generate(transformer, tokenizer, cohort.labels, generator=cohort.generators)
            if first + ranks.rank < cohorts:
                for images in made.images[: len(cohort.numbers)].split(batch_size(self.extractor)):
                    measurement.add(plots.to_uint8(images))
        return frechet_distance(*measurement.result(ranks).statistics.pooled, *self.reference)
