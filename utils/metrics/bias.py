"""Which scores the numbers of images make too large or too small, and by about how much.

Distances and the Inception score are off by a share that goes down as 1 / N (Chong & Forsyth 2020, arXiv 1911.07023), so what
half of the images add to it is what all of them have: an estimate, and of a distance with no more images than features the
least that it can be (results/small_sets.json).
"""

import math
from typing import NamedTuple

import numpy as np

from utils.metrics.distances import DENSITY_K, frechet_distance, inception_score
from utils.metrics.features import Extractor
from utils.metrics.measure import Measured
from utils.metrics.scores import SHUFFLE_SEED, part_of

ENOUGH = 10_000  # images in a set, from which on distances and shares are usually given
ENOUGH_IN_SPLIT = 5000  # likewise of the Inception score
CLOSE_TO_ALL = 0.99  # coverage that need not be remarked on


class Bias(NamedTuple):
    """What the numbers of images do to a score.

    says: in words. by: of each column of scores that is off, by about how much, below 0 for too small; None: unknown.
    at_least: it may well be more.
    """

    says: str
    by: dict[str, float | None]
    at_least: bool = False

    def in_words(self, score: str) -> str:
        known = [f"{abs(by):.3g} ({column})" for column, by in self.by.items() if by is not None]
        by = f", by {'at least' if self.at_least else 'about'} " if known else ""
        return f"{score}: {self.says}{by}{', '.join(known)}"


def find_biases(columns: dict[str, tuple[Measured, Measured]], extractor: Extractor, split: int) -> dict[str, Bias]:
    """By the name of the score. columns: samples and reference of each; split: images per split of the Inception score."""
    found: dict[str, Bias] = {}

    def note(score: str, says: str, column: str, by: float | None, at_least: bool = False) -> None:
        before = found.get(score, Bias(says, {}))
        found[score] = Bias(says, {**before.by, column: by}, before.at_least or at_least)

    for column, (samples, reference) in columns.items():
        for score, by in _of_distances(samples, reference, extractor).items():
            says = f"too large with fewer than {ENOUGH:,} images: compare it with that of as many"
            fewest = min(samples.statistics.count, reference.statistics.count or ENOUGH)
            note(score, says, column, by, at_least=fewest <= max(extractor.dim, extractor.spatial_dim))
        if min(samples.statistics.count, split) < ENOUGH_IN_SPLIT:
            says = f"too small with fewer than {ENOUGH_IN_SPLIT:,} images in a split"
            note(extractor.score_name, says, column, _of_inception_score(samples, split))
        if reference.features is None:
            continue
        counts = len(reference.features.pooled), len(samples.features.pooled)
        if min(counts) < ENOUGH:
            for share in ("precision", "recall", "density"):
                says = f"depends on the numbers of images, here fewer than {ENOUGH:,}: compare it with that of as many"
                note(share, says, column, None)
        reached = coverage_of_the_same(*counts)
        if min(counts) < ENOUGH or reached < CLOSE_TO_ALL:
            says = "depends on the numbers of images: samples like the real ones would miss 1"
            note("coverage", says, column, reached - 1)
    return found


def coverage_of_the_same(references: int, samples: int, k: int = DENSITY_K) -> float:
    """Coverage to be expected, 0 to 1, where so many samples are of the distribution of so many references (Naeem et al. 2020,
    lemma 2: none of the samples is among the k nearest to a row of the reference)."""
    if references <= k:
        return 1.0  # there is none
    missed = math.prod((references - i) / (references + samples - i) for i in range(1, k + 1))
    return 1 - missed


def _of_distances(samples: Measured, reference: Measured, extractor: Extractor) -> dict[str, float | None]:
    """By the name of the distance; nothing where both sets are large enough, or the reference does not say how large it is."""
    ours, theirs = samples.statistics, reference.statistics
    few = [(images.statistics.count or ENOUGH) < ENOUGH for images in (samples, reference)]
    if not any(few):
        return {}
    names = {"pooled": extractor.distance_name}
    if ours.spatial and theirs.spatial:
        names["spatial"] = f"s{extractor.distance_name}"
    if not all(_can_be_halved(images) for images, is_small in zip((samples, reference), few, strict=True) if is_small):
        return dict.fromkeys(names.values())
    less = [
        (_half(images) if is_small else images).statistics for images, is_small in zip((samples, reference), few, strict=True)
    ]
    by = {}
    for part, name in names.items():
        half, whole = (frechet_distance(*getattr(a, part), *getattr(b, part)) for a, b in (less, (ours, theirs)))
        by[name] = max(half - whole, 0.0)
    return by


def _of_inception_score(samples: Measured, split: int) -> float:
    """Of as many samples as a split has, at random."""
    size = min(samples.statistics.count, split)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(samples.statistics.count)[:size]
    probabilities = samples.features.logits[order].softmax(1)
    halves, whole = (inception_score(probabilities, part) for part in (-(-size // 2), size))
    return min(halves - whole, 0.0)


def _can_be_halved(images: Measured) -> bool:
    """Whether the statistics are those of features that are at hand, and are enough for two covariances."""
    return images.features is not None and len(images.features.pooled) == images.statistics.count >= 4


def _half(images: Measured) -> Measured:
    """At random, always the same."""
    order = np.random.default_rng(SHUFFLE_SEED).permutation(images.statistics.count)
    return part_of(images, np.sort(order[: len(order) // 2]))
