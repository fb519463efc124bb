"""FD-EffLite0 of what a model makes while it trains, beside that of real images: only the two together mean anything."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from dist import Ranks
from models.generate import Cohort, SamplingConfig, check_finite, decode_sampled, num_cohorts, sample
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import plots
from utils.data.batches import val_batches
from utils.data.images import Images, Pictures
from utils.data.pictures import WHITE
from utils.metrics.distances import frechet_distance
from utils.metrics.features import load_extractor
from utils.metrics.image_sets import Gaussian
from utils.metrics.measure import Measurement, batch_size, measure_batches
from utils.signals import StopRequest

PUBLISHED = SamplingConfig()
SEED = 0  # the same samples at every validation


class Fidelity:
    """Compares samples, or decoded training images, with all held-out images; and as many training images likewise.

    train, val: where real ones are. count: samples. pixels, resize: how images are prepared, as for training, but cut out
    of the middle; background: what shows through transparent ones. Every rank makes and looks at its share, and reads its
    images with so many workers. drawing: of samples.
    """

    def __init__(
        self,
        train: Pictures,
        val: Pictures,
        count: int,
        pixels: int,
        resize: float,
        workers: int,
        ranks: Ranks,
        background: str = WHITE,
        drawing: SamplingConfig = PUBLISHED,
    ):
        self.train, self.val = train, val
        if len(val) < 2:
            raise ValueError(f"{val.name(0)}: is the only held-out image, a distance needs more: add some, or give --val_fd=0")
        self.count, self.pixels, self.resize, self.background = count, pixels, resize, background
        self.workers, self.ranks, self.drawing = workers, ranks, drawing
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

    def _some(self) -> Pictures:
        """As many training images as there are to be samples, spread evenly over the classes."""
        return self.train.take(np.linspace(0, len(self.train) - 1, min(self.count, len(self.train))).astype(int))

    def _measure(self, files: Pictures, source: str, change: Callable[[Tensor], Tensor] | None = None) -> Gaussian:
        batches = self._batches(files, change)
        return measure_batches(self.extractor, batches, source, self.ranks, keep_features=False).statistics.pooled

    def _batches(self, files: Pictures, change: Callable[[Tensor], Tensor] | None) -> Iterator[np.ndarray]:
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
        """The distance of samples from the held-out images; None where a stop was requested meanwhile."""
        ranks = self.ranks
        cohorts = num_cohorts(self.count, ranks.device.type)
        measurement = Measurement(self.extractor, "samples", keep_features=False)
        for first in range(0, cohorts, ranks.world):
            if ranks.largest(stop.number):
                return None
            # a rank without a cohort of its own makes the last again: the ranks of a sharded model compute together
            cohort = Cohort.of(self.labels, min(first + ranks.rank, cohorts - 1), SEED, ranks.device)
            sampled = sample(transformer, tokenizer, cohort.labels, self.drawing, cohort.generators)
            check_finite(sampled)
            if first + ranks.rank < cohorts:
                made = decode_sampled(tokenizer, sampled)
                for images in made[: len(cohort.numbers)].split(batch_size(self.extractor)):
                    measurement.add(plots.to_uint8(images))
        return frechet_distance(*measurement.result(ranks).statistics.pooled, *self.reference)
