"""Scores of samples against a reference, both as utils/metrics/measure.py measures them, and what their reader should know."""

import numpy as np
import torch

from utils.metrics.distances import frechet_distance, inception_score, moments, precision_recall
from utils.metrics.features import Extractor, Features
from utils.metrics.image_sets import Gaussian, Statistics
from utils.metrics.measure import Measured

SHUFFLE_SEED = 0


def score(
    samples: Measured,
    reference: Measured,
    extractor: Extractor,
    k: int = 3,
    split: int = 5000,
    dtype: torch.dtype = torch.float16,
) -> dict[str, int | float | None]:
    """By name, in this order: images, reference images, Fréchet distances, Inception score, precision, recall.

    None for what cannot be known from the statistics of a reference. k, dtype: of precision and recall; split: images per split
    of the Inception score.
    """
    ours, theirs = samples.statistics, reference.statistics
    figures = {
        "images": ours.count,
        "reference images": theirs.count,
        extractor.distance_name: frechet_distance(*ours.pooled, *theirs.pooled),
    }
    if ours.spatial:
        figures[f"s{extractor.distance_name}"] = frechet_distance(*ours.spatial, *theirs.spatial) if theirs.spatial else None
    figures[extractor.score_name] = inception_score(samples.features.logits.softmax(1), split)
    precision = recall = None
    if reference.features is not None:
        precision, recall = precision_recall(
            reference.features.pooled,
            samples.features.pooled,
            k,
            dtype=dtype,
            device=extractor.device,
        )
    return {**figures, "precision": precision, "recall": recall}


def notes_on_distance(extractor: Extractor, name: str, fewest: int) -> list[str]:
    """What a reader of a Fréchet distance should know; fewest: images in the smaller set."""
    notes = []
    if extractor.fingerprint != extractor.published:
        notes.append(
            f"the weights are not those published for {extractor.distance_name}: compare these scores only among themselves"
        )
    if fewest <= extractor.dim:
        notes.append(
            f"{name} from {fewest} images, not more than the {extractor.dim} features, is too large: "
            "compare it only with that of as many images"
        )
    return notes


def notes_on_scores(samples: Measured, reference: Measured, extractor: Extractor, split: int) -> list[str]:
    """What a reader of the scores of `score` should know."""
    count = samples.statistics.count
    notes = notes_on_distance(extractor, extractor.distance_name, min(count, reference.statistics.count or count))
    if reference.statistics.count is None:
        notes.append(f"{reference.statistics.source} does not say how many images its statistics are of")
    if count > split:  # otherwise all is one split, in which order does not matter
        order = np.random.default_rng(SHUFFLE_SEED).permutation(count)
        logits = samples.features.logits
        as_stored, shuffled = (inception_score(rows.softmax(1), split) for rows in (logits, logits[order]))
        if abs(shuffled / as_stored - 1) > 0.02:
            notes.append(
                f"{extractor.score_name} is {shuffled:.4f} where the samples are shuffled: they seem to be sorted by class, "
                "which lowers the score of every split"
            )
    return notes


def part_of(images: Measured, rows: np.ndarray) -> Measured:
    """Some of the images."""
    features = Features(*(part if part is None else part[rows] for part in images.features))
    gaussians = [Gaussian(*moments(part)) for part in (features.pooled, features.spatial) if part is not None]
    whole = images.statistics
    return Measured(Statistics(whole.source, len(rows), whole.height, whole.width, *gaussians), features)


def in_halves(images: Measured) -> tuple[Measured, Measured]:
    """Two halves without an image in common, drawn at random, always the same."""
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(images.features.pooled))
    middle = len(order) // 2
    return part_of(images, np.sort(order[:middle])), part_of(images, np.sort(order[middle:]))
