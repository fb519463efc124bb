"""Score samples of any model against reference images: Fréchet distance, Inception score, precision and recall.

`scripts/evaluate.py stats FOLDER --out FILE` stores the statistics of a reference, so that they are computed once. Scores
depend on the extractor and on the numbers of images: compare those of the same extractor and the same numbers, and look at the
score of real images (--real, --halves) beside that of samples.
"""

import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from utils import cli, evidence
from utils.cli import argument, flag, required
from utils.features import EXTRACTORS, Features, extract, load_extractor
from utils.metrics import Moments, frechet_distance, inception_score, moments, precision_recall
from utils.samples import (
    Gaussian,
    ImageSet,
    Reference,
    Statistics,
    open_images,
    open_reference,
    read_statistics,
    write_statistics,
)

BATCH = {"cpu": 8, "cuda": 256}  # on a CPU larger ones are slower
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class EvaluateConfig:
    """Arguments of scripts/evaluate.py."""

    samples: str = argument("images to be scored: an .npz or a folder of PNG or JPEG")
    reference: str = argument("real images, likewise, or statistics of them")
    extractor: str = flag("efflite0", "network that looks at the images", choices=EXTRACTORS)
    weights: str = flag("", "file of its weights; empty: those it comes with")
    real: str = flag("", "further real images, scored beside the samples")
    halves: bool = flag(False, "score one half of the reference against the other, beside the samples")
    k: int = flag(3, "precision and recall: neighbours within a ball")
    split: int = flag(5000, "Inception score: images per split")
    batch: int = flag(0, f"images at a time; 0: {BATCH['cpu']} on a CPU, {BATCH['cuda']} on a GPU")
    json: str = flag("", "also write the scores, with all settings, to this file")
    overwrite: bool = flag(False, "replace what is at --json")

    def __post_init__(self):
        check_batch(self.batch)
        if self.k < 1 or self.split < 1:
            raise ValueError(f"--k={self.k}, --split={self.split}: give at least 1 each")
        if self.real and self.halves:
            raise ValueError(f"--real={self.real} with --halves: both are scores of real images: give one of them")


@dataclass(frozen=True)
class StatsConfig:
    """Arguments of scripts/evaluate.py stats."""

    images: str = argument("real images: an .npz or a folder of PNG or JPEG")
    out: str = required("file to write, .npz")
    extractor: str = flag("efflite0", "network that looks at the images", choices=EXTRACTORS)
    weights: str = flag("", "file of its weights; empty: those it comes with")
    batch: int = flag(0, f"images at a time; 0: {BATCH['cpu']} on a CPU, {BATCH['cuda']} on a GPU")
    overwrite: bool = flag(False, "replace what is at --out")

    def __post_init__(self):
        check_batch(self.batch)
        if not self.out.endswith(".npz"):
            raise ValueError(f"--out={self.out}: statistics are an .npz: give a name that ends so")


class Measured(NamedTuple):
    """Statistics of images and, on the CPU, the features (N, ...) of every one; None where only statistics are known."""

    statistics: Statistics
    features: Features | None


def check_batch(batch: int) -> None:
    if batch < 0:
        raise ValueError(f"--batch={batch}: give at least 1, or 0 for a size that suits the device")


def check_free(path: str, flag: str, overwrite: bool) -> None:
    """ValueError before anything is computed where the result would replace a file unasked."""
    if path and Path(path).is_dir():
        raise ValueError(f"{path}: is a directory: give {flag} the name of a file")
    if path and Path(path).exists() and not overwrite:
        raise ValueError(f"{path}: is there already: give another {flag}, or --overwrite")


# --- looking before anything is computed --------------------------------------------------------------------------------


def check_sizes(samples: ImageSet, other: ImageSet | Statistics) -> None:
    """ValueError for images of different sizes: how they are resized would count more than how they look."""
    if other.height is not None and (samples.height, samples.width) != (other.height, other.width):
        sizes = [f"{images.source}: {images.width}x{images.height} pixels" for images in (samples, other)]
        raise ValueError(f"{', '.join(sizes)}: only images of one size can be compared: resize one of them")


def check_count(source: str, count: int, needed: int, reason: str) -> None:
    if count < needed:
        raise ValueError(f"{source}: {count} image{'s' * (count != 1)}, {reason} at least {needed}: give more")


# --- measuring ----------------------------------------------------------------------------------------------------------


def batch_size(config: EvaluateConfig | StatsConfig, extractor: nn.Module) -> int:
    return config.batch or BATCH[next(extractor.parameters()).device.type]


def progress(images: ImageSet) -> tqdm:
    return tqdm(total=images.count, unit="image", desc=Path(images.source).name, mininterval=0.2 if sys.stderr.isatty() else 20)


class Sums:
    """Statistics of features that come in batches, on the extractor's device."""

    def __init__(self, extractor: nn.Module):
        device = next(extractor.parameters()).device
        self.pooled = Moments(extractor.dim, device)
        self.spatial = Moments(extractor.spatial_dim, device) if extractor.spatial_dim else None

    def add(self, features: Features) -> None:
        self.pooled.add(features.pooled)
        if self.spatial:
            self.spatial.add(features.spatial)

    def result(self, images: ImageSet) -> Statistics:
        gaussians = [Gaussian(*sums.result()) for sums in (self.pooled, self.spatial) if sums]
        return Statistics(images.source, images.count, images.height, images.width, *gaussians)


def features_of(extractor: nn.Module, images: ImageSet, batch: int) -> Iterator[Features]:
    interval = 0.2 if sys.stderr.isatty() else 20
    with tqdm(total=images.count, unit="image", desc=Path(images.source).name, mininterval=interval) as bar:
        for features in extract(extractor, images.batches(batch), images.source):
            yield features
            bar.update(len(features.pooled))


def measure(extractor: nn.Module, images: ImageSet, batch: int) -> Measured:
    """Features of all images, and their statistics."""
    sums, parts = Sums(extractor), []
    for features in features_of(extractor, images, batch):
        sums.add(features)
        parts.append([part if part is None else part.cpu() for part in features])
    whole = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return Measured(sums.result(images), Features(*whole))


def measure_statistics(extractor: nn.Module, images: ImageSet, batch: int) -> Statistics:
    """The statistics alone: a million images need no more memory than a few."""
    sums = Sums(extractor)
    for features in features_of(extractor, images, batch):
        sums.add(features)
    return sums.result(images)


def measure_reference(extractor: nn.Module, reference: Reference, batch: int) -> Measured:
    """Statistics that are stored count; images beside them are for precision and recall."""
    statistics = None
    if reference.statistics is not None:
        widths = extractor.dim, extractor.spatial_dim
        statistics = read_statistics(reference.statistics, extractor.name, extractor.fingerprint, *widths)
    if reference.images is None:
        return Measured(statistics, None)
    measured = measure(extractor, reference.images, batch)
    return measured._replace(statistics=statistics or measured.statistics)


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


# --- scoring ------------------------------------------------------------------------------------------------------------


def score(samples: Measured, reference: Measured, extractor: nn.Module, config: EvaluateConfig) -> dict:
    """One column of the table; None for what cannot be known from the statistics of a reference."""
    ours, theirs = samples.statistics, reference.statistics
    figures = {
        "images": ours.count,
        "reference images": theirs.count,
        extractor.distance_name: frechet_distance(*ours.pooled, *theirs.pooled),
    }
    if ours.spatial:
        figures[f"s{extractor.distance_name}"] = frechet_distance(*ours.spatial, *theirs.spatial) if theirs.spatial else None
    figures[extractor.score_name] = inception_score(samples.features.logits.softmax(1), config.split)
    precision = recall = None
    if reference.features is not None:
        device = next(extractor.parameters()).device
        precision, recall = precision_recall(reference.features.pooled, samples.features.pooled, config.k, device=device)
    return {**figures, "precision": precision, "recall": recall}


def notes_on(samples: Measured, reference: Measured, extractor: nn.Module, config: EvaluateConfig) -> list[str]:
    """What a reader of the scores should know."""
    notes = []
    count = samples.statistics.count
    if extractor.fingerprint != extractor.published:
        notes.append(
            f"the weights are not those published for {extractor.distance_name}: compare these scores only among themselves"
        )
    fewest = min(count, reference.statistics.count or count)
    if fewest <= extractor.dim:
        notes.append(
            f"{extractor.distance_name} from {fewest} images, not more than the {extractor.dim} features, is too large: "
            "compare it only with that of as many images"
        )
    if reference.statistics.count is None:
        notes.append(f"{reference.statistics.source} does not say how many images its statistics are of")
    if count > config.split:  # otherwise all is one split, in which order does not matter
        order = np.random.default_rng(SHUFFLE_SEED).permutation(count)
        logits = samples.features.logits
        as_stored, shuffled = (inception_score(rows.softmax(1), config.split) for rows in (logits, logits[order]))
        if abs(shuffled / as_stored - 1) > 0.02:
            notes.append(
                f"{extractor.score_name} is {shuffled:.4f} where the samples are shuffled: they seem to be sorted by class, "
                "which lowers the score of every split"
            )
    return notes


def table(columns: dict[str, dict]) -> str:
    """Scores below one another, samples and real images side by side."""
    first, *_ = columns.values()
    lines = ["".join([" " * 18, *(f"{name:>16}" for name in columns)])]
    for name in first:
        lines.append("".join([f"{name:<18}", *(f"{as_text(name, column[name]):>16}" for column in columns.values())]))
    return "\n".join(lines)


def as_text(name: str, value: float | None) -> str:
    if value is None:
        return "unknown" if name == "reference images" else "needs images"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


# --- the commands -------------------------------------------------------------------------------------------------------


def load(config: EvaluateConfig | StatsConfig) -> nn.Module:
    extractor = load_extractor(config.extractor, config.weights)
    return extractor.to("cuda" if torch.cuda.is_available() else "cpu")


def evaluate(config: EvaluateConfig) -> None:
    check_free(config.json, "--json", config.overwrite)
    began = time.monotonic()
    samples, reference = open_images(config.samples), open_reference(config.reference, config.extractor)
    real = open_images(config.real) if config.real else None
    neighbours = f"k={config.k} neighbours need"
    for images in (samples, reference.images, real):
        if images is not None:
            check_sizes(samples, images)
            check_count(images.source, images.count, config.k + 1, neighbours)
    if config.halves:
        if reference.statistics is not None:
            raise ValueError(f"{config.reference}: statistics cannot be halved: give a reference of images, or no --halves")
        check_count(config.reference, reference.images.count, 2 * (config.k + 1), f"halves and {neighbours}")

    extractor = load(config)
    batch = batch_size(config, extractor)
    against = measure_reference(extractor, reference, batch)
    check_sizes(samples, against.statistics)
    made = measure(extractor, samples, batch)
    columns = {"samples": score(made, against, extractor, config)}
    if real is not None:
        columns["real"] = score(measure(extractor, real, batch), against, extractor, config)
    elif config.halves:
        columns["real, halves"] = score(*in_halves(against), extractor, config)
    notes = notes_on(made, against, extractor, config)
    print("\n".join([table(columns), *notes]))
    if config.json:
        figures = {
            "settings": {**asdict(config), "batch": batch},
            "extractor": {"name": extractor.name, "weights_sha256": extractor.fingerprint},
            "pixels": [samples.height, samples.width],
            "scores": columns,
            "notes": notes,
            "threads": torch.get_num_threads(),
            "seconds": round(time.monotonic() - began, 1),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        }
        evidence.store(Path(config.json), figures)


def stats(config: StatsConfig) -> None:
    check_free(config.out, "--out", config.overwrite)
    images = open_images(config.images)
    check_count(images.source, images.count, 2, "a covariance needs")
    extractor = load(config)
    statistics = measure_statistics(extractor, images, batch_size(config, extractor))
    write_statistics(Path(config.out), statistics, extractor.name, extractor.fingerprint)
    print(f"wrote the statistics of {images.count} images of {images.width}x{images.height} pixels to {config.out}")


def main() -> None:
    if sys.argv[1:2] == ["stats"]:
        config = cli.parse(StatsConfig, "Store the statistics of reference images.", sys.argv[2:])
    else:
        config = cli.parse(EvaluateConfig, __doc__)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("scripts/evaluate.py does not share out its images over ranks: run it without torchrun")
    if isinstance(config, StatsConfig):
        stats(config)
    else:
        evaluate(config)


if __name__ == "__main__":
    cli.run(main)
