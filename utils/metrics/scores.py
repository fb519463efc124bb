"""Scores of samples against a reference, both as utils/metrics/measure.py measures them, and what their reader should know."""

import numpy as np
import torch

from utils.metrics.distances import (
    DENSITY_K,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
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
    subset: int = 0,
) -> dict[str, int | float | None]:
    """By name, in this order: images, reference images, Fréchet distances, kernel distance and its standard deviation,
    Inception score, precision, recall, density, coverage.

    None for what cannot be known from the statistics of a reference, or from so few images. k, dtype: of precision and recall;
    split: images per split of the Inception score; subset: images per subset of the kernel distance, 0: as suits the sets.
    """
    ours, theirs = samples.statistics, reference.statistics
    figures = {
        "images": ours.count,
        "reference images": theirs.count,
        extractor.distance_name: frechet_distance(*ours.pooled, *theirs.pooled),
    }
    if ours.spatial:
        figures[f"s{extractor.distance_name}"] = frechet_distance(*ours.spatial, *theirs.spatial) if theirs.spatial else None
    kernel = precision = recall = density = coverage = deviation = None
    if reference.features is not None:
        real, made, device = reference.features.pooled, samples.features.pooled, extractor.device
        kernel, deviation = kernel_distance(made, real, subset, device=device)
        precision, recall = precision_recall(real, made, k, dtype=dtype, device=device)
        if len(real) > DENSITY_K:
            density, coverage = density_coverage(real, made, device=device)
    return {
        **figures,
        extractor.kernel_name: kernel,
        f"{extractor.kernel_name} std": deviation,
        extractor.score_name: inception_score(samples.features.logits.softmax(1), split),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def notes_on_weights(extractor: Extractor) -> list[str]:
    if extractor.fingerprint == extractor.published:
        return []
    return [f"the weights are not those published for {extractor.distance_name}: compare these scores only among themselves"]


def notes_on_judge(dump: dict, extractor: Extractor) -> list[str]:
    """dump: the settings of the samples, which may have been chosen among candidates by a network (sample.py --best_of)."""
    if dump.get("judge_sha256") != extractor.fingerprint:
        return []
    return [
        f"{extractor.name} has chosen these samples, the best of {dump['best_of']}: its scores say more of the choice than of "
        "the images: score them with another --extractor"
    ]


def notes_on_distance(extractor: Extractor, name: str, fewest: int) -> list[str]:
    """What a reader of a Fréchet distance should know; fewest: images in the smaller set."""
    notes = notes_on_weights(extractor)
    if fewest <= extractor.dim:
        notes.append(
            f"{name} from {fewest} images, not more than the {extractor.dim} features, is too large: "
            "compare it only with that of as many images"
        )
    return notes


def notes_on_scores(samples: Measured, reference: Measured, extractor: Extractor, split: int) -> list[str]:
    """What a reader of the scores of `score` should know, but for what utils/metrics/bias.py finds."""
    count = samples.statistics.count
    notes = notes_on_weights(extractor)
    if reference.features is None:
        scores = f"{extractor.kernel_name}, precision, recall, density and coverage"
        notes.append(f"{reference.statistics.source} holds statistics alone: {scores} need a reference of images")
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
