"""Measure by how much scores change with what evaluators do differently: numbers, order, rounding, resizing, arithmetic.

Every row is one score of the same images, as this project computes it and otherwise. With FD-EffLite0, since its weights need
no network; each effect has the same cause with Inception, and another size.
"""

import io
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import scipy.linalg
import torch
from PIL import Image

from utils import cli, evidence, plots
from utils.checkpoint import load_tokenizer
from utils.cli import flag
from utils.data.batches import val_batches
from utils.data.images import Images, read_folders
from utils.metrics.distances import frechet_distance, inception_score, moments, precision_recall
from utils.metrics.features import Features, load_extractor
from utils.metrics.measure import measure_batches

BATCH = 8
SPLITS = 10  # of the Inception score, as many evaluators have it


@dataclass(frozen=True)
class CompareConfig:
    """Flags of scripts/checks/compare_evaluators.py."""

    samples: str = flag("out/demo/samples.npz", "dump of samples, of all classes")
    images: str = flag("out/demo/images", "real images, with train/ and val/ inside")
    vae: str = flag("out/demo/tokenizer", "tokenizer, whose decoded images are rounded in two ways")
    json: str = flag("", "file to store the figures in, with command, machine, versions and commit")


class Comparison:
    """Features of one extractor, and rows of figures."""

    def __init__(self):
        self.extractor = load_extractor("efflite0")
        self.rows: list[dict] = []

    def features(self, images: np.ndarray) -> Features:
        """Of images (N, H, W, 3) uint8."""
        batches = (images[first : first + BATCH] for first in range(0, len(images), BATCH))
        return measure_batches(self.extractor, batches, "images").features

    def note(self, score: str, what: str, usual: float, other: float) -> None:
        self.rows.append({"score": score, "what": what, "here": usual, "otherwise": other})
        print(f"{score:<12} {usual:12.6g} {other:12.6g}   {what}", flush=True)


def load_real(root: str, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out images, (N, pixels, pixels, 3) uint8 each."""
    splits = []
    for files in read_folders(root):
        batches = val_batches(Images(files, pixels, resize=1.0), BATCH)
        splits.append(np.concatenate([plots.to_uint8((batch + 1) / 2) for batch, _ in batches]))
    return splits[0], splits[1]


def decoded(vae: str, images: np.ndarray) -> np.ndarray:
    """What the tokenizer makes of images, (N, H, W, 3) float32 in [0, 255], before they are rounded."""
    tokenizer, kept = load_tokenizer(vae), []
    for first in range(0, len(images), BATCH):
        pixels = torch.from_numpy(images[first : first + BATCH]).permute(0, 3, 1, 2).float() / 127.5 - 1
        kept.append(((tokenizer.decode(tokenizer.encode(pixels)) + 1) / 2).clamp(0, 1).mul(255).permute(0, 2, 3, 1))
    return torch.cat(kept).numpy()


def each(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def as_jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return change


def compare_numbers(comparison: Comparison, real: Features, reference: tuple) -> None:
    """Fewer images, and images that repeat."""
    pooled = real.pooled
    whole = frechet_distance(*moments(pooled), *reference)
    for count in (len(pooled) // 2, len(pooled) // 4, len(pooled) // 8):
        fewer = frechet_distance(*moments(pooled[:count]), *reference)
        comparison.note("FD-EffLite0", f"{count} real images in place of {len(pooled)}", whole, fewer)
    repeated = pooled[:1000].repeat(len(pooled) // 1000, 1)
    same = frechet_distance(*moments(repeated), *reference)
    comparison.note("FD-EffLite0", f"1000 real images {len(pooled) // 1000} times: seeds repeat", whole, same)


def compare_scores(comparison: Comparison, made: Features, labels: np.ndarray, real: Features) -> None:
    """The Inception score of sorted samples; precision and recall in float32, and taken for each other."""
    split = len(labels) // SPLITS
    probabilities = made.logits.softmax(1)
    sorted_rows = torch.from_numpy(np.argsort(labels, kind="stable"))
    shuffled, in_order = (inception_score(rows, split) for rows in (probabilities, probabilities[sorted_rows]))
    comparison.note("IS-EffLite0", f"samples sorted by class, in {SPLITS} splits", shuffled, in_order)
    comparison.note("IS-EffLite0", f"one split in place of {SPLITS}", shuffled, inception_score(probabilities, len(labels)))
    half = precision_recall(real.pooled, made.pooled)
    wide = precision_recall(real.pooled, made.pooled, dtype=torch.float32)
    for name, ours, other, exchanged in zip(("precision", "recall"), half, wide, reversed(half), strict=True):
        comparison.note(name, "distances in float32 in place of float16", ours, other)
        comparison.note(name, "taken for the other, as in old libraries", ours, exchanged)


def compare_pixels(comparison: Comparison, config: CompareConfig, samples: np.ndarray, held_out: np.ndarray) -> None:
    """Rounding, compression and resizing."""
    reference = moments(comparison.features(held_out).pooled)

    def distance(images: np.ndarray, against: tuple = reference) -> float:
        return frechet_distance(*moments(comparison.features(images).pooled), *against)

    exact = decoded(config.vae, held_out)
    rounded = distance(exact.round().astype(np.uint8))
    comparison.note(
        "FD-EffLite0", "decoded images cut off to 8 bits in place of rounded", rounded, distance(exact.astype(np.uint8))
    )
    usual = distance(samples)
    for quality in (95, 75):
        comparison.note(
            "FD-EffLite0", f"samples stored as JPEG, quality {quality}", usual, distance(each(samples, as_jpeg(quality)))
        )
    size = (comparison.extractor.pixels,) * 2
    for name in ("BICUBIC", "LANCZOS"):

        def resize(image: Image.Image, name: str = name) -> Image.Image:
            return image.resize(size, Image.Resampling[name])

        otherwise = distance(each(samples, resize))
        comparison.note("FD-EffLite0", f"samples alone resized by Pillow, {name.lower()}", usual, otherwise)
        both = distance(each(samples, resize), moments(comparison.features(each(held_out, resize)).pooled))
        comparison.note("FD-EffLite0", f"both resized by Pillow, {name.lower()}", usual, both)


def compare_arithmetic(comparison: Comparison, made: Features, reference: tuple) -> None:
    mean, covariance = moments(made.pooled)
    usual = frechet_distance(mean, covariance, *reference)
    root = scipy.linalg.sqrtm(covariance @ reference[1]).real
    by_root = np.square(mean - reference[0]).sum() + np.trace(covariance + reference[1] - 2 * root)
    comparison.note("FD-EffLite0", "matrix square root by scipy.linalg.sqrtm", usual, float(by_root))
    count = len(made.pooled)
    biased = frechet_distance(mean, covariance * (count - 1) / count, *reference)
    comparison.note("FD-EffLite0", "covariance divided by N in place of N - 1, samples alone", usual, biased)
    narrow = np.cov(made.pooled.numpy(), rowvar=False, dtype=np.float32)
    in_float32 = frechet_distance(made.pooled.numpy().mean(0), narrow, *reference)
    comparison.note("FD-EffLite0", "mean and covariance in float32", usual, in_float32)


def main() -> None:
    config = cli.parse(CompareConfig, __doc__)
    with np.load(config.samples, allow_pickle=False) as archive:
        samples, labels = archive["arr_0"], archive["labels"]
    training, held_out = load_real(config.images, samples.shape[1])
    comparison = Comparison()
    order = np.random.default_rng(0).permutation(len(training))[:8000]
    real, made, reference = (comparison.features(images) for images in (training[order], samples, held_out))
    gaussian = moments(reference.pooled)
    compare_numbers(comparison, real, gaussian)
    compare_scores(comparison, made, labels, reference)
    compare_pixels(comparison, config, samples, held_out)
    compare_arithmetic(comparison, made, gaussian)
    if config.json:
        counts = {"samples": len(samples), "training images": len(training), "held-out images": len(held_out)}
        evidence.store(Path(config.json), {"settings": asdict(config), "images": counts, "rows": comparison.rows})


if __name__ == "__main__":
    cli.run(main)
