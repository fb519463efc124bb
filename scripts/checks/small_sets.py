"""What few images do to scores, and that those for few images are the ones of torch-fidelity and of the package prdc.

    pip install --no-deps prdc        # its distances are scikit-learn's
    python scripts/checks/small_sets.py --json results/small_sets.json

Of the embedded photographs: one set of real images beside another, whose distance is 0 but for what numbers do to it, and noisy
ones beside real ones; as many on both sides, means over several sets. Prints a table and stores all figures.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from torch_fidelity.metric_kid import kid_features_to_metric

from utils import cli, evidence
from utils.cli import flag
from utils.data.fashion_mnist import read_fashion_mnist
from utils.metrics.bias import find_biases
from utils.metrics.distances import density_coverage, kernel_distance
from utils.metrics.features import Extractor, load_extractor
from utils.metrics.measure import Measured, measure_batches
from utils.metrics.scores import part_of, score

COUNTS = (50, 100, 200, 500, 1000)
SETS = 4  # of every number, at most: as many as there are images for
BATCH = 8
NOISE = 3.0  # standard deviation, of 255
SPLIT = 5000


@dataclass(frozen=True)
class SmallSetsConfig:
    """Flags of scripts/checks/small_sets.py."""

    num: int = flag(COUNTS[-1], "images of each of the three sets")
    json: str = flag("", "file to store the figures in, with command, machine, versions and commit")

    def __post_init__(self):
        if not COUNTS[0] <= self.num <= 3333:
            raise ValueError(f"--num={self.num}: give from {COUNTS[0]} to 3333, as there are 10,000 images for three sets")


def compute_prdc(real: np.ndarray, made: np.ndarray, k: int) -> dict[str, float]:
    try:
        import prdc
    except ImportError as error:
        raise ValueError("prdc is not there: pip install --no-deps prdc") from error
    return prdc.compute_prdc(real, made, k)


def draw_sets(num: int, extractor: Extractor) -> tuple[Measured, Measured, Measured]:
    """Real images, others, and noisy ones of which none is among these."""
    images = np.pad(read_fashion_mnist()[0], ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, axis=-1)
    rng = np.random.default_rng(0)
    one, other, third = (images[rows] for rows in rng.permutation(len(images))[: 3 * num].reshape(3, num))
    noisy = (third + NOISE * rng.normal(size=third.shape)).clip(0, 255).round().astype(np.uint8)
    sets = {"real": one, "other": other, "noisy": noisy}
    return tuple(
        measure_batches(extractor, (part[first : first + BATCH] for first in range(0, num, BATCH)), name)
        for name, part in sets.items()
    )


def compare_packages(name: str, reference: Measured, samples: Measured) -> list[dict]:
    """The same features, scored here and there."""
    real, made = reference.features.pooled, samples.features.pooled
    subset = len(real) // 2
    ours = dict(zip(("KD", "KD std"), kernel_distance(made, real, subset), strict=True))
    ours |= dict(zip(("density", "coverage"), density_coverage(real, made), strict=True))
    kid = kid_features_to_metric(made.double(), real.double(), kid_subsets=100, kid_subset_size=subset, verbose=False)
    theirs = {"KD": kid["kernel_inception_distance_mean"], "KD std": kid["kernel_inception_distance_std"]}
    theirs |= {name: float(value) for name, value in compute_prdc(real.numpy(), made.numpy(), 5).items()}
    return [
        {
            "samples": name,
            "score": score_name,
            "package": "torch-fidelity, in float64" if score_name.startswith("KD") else "prdc",
            "here": value,
            "there": theirs[score_name],
            "difference": abs(value - theirs[score_name]),
        }
        for score_name, value in ours.items()
    ]


def of_count(count: int, reference: Measured, samples: Measured, extractor: Extractor) -> dict[str, float]:
    """Means of all scores over some sets of so many images, and of what is said to be too much of the distance."""
    found = []
    for number in range(min(SETS, len(samples.features.pooled) // count)):
        rows = np.arange(number * count, (number + 1) * count)
        pair = part_of(samples, rows), part_of(reference, rows)
        bias = find_biases({"": pair}, extractor, SPLIT)[extractor.distance_name].by[""]
        found.append({**score(*pair, extractor, split=SPLIT), "said to be too large by": bias})
    return {"sets": len(found)} | {name: float(np.mean([row[name] for row in found])) for name in found[0]}


def main() -> None:
    config = cli.parse(SmallSetsConfig, __doc__)
    extractor = load_extractor("efflite0")
    reference, other, noisy = draw_sets(config.num, extractor)
    sets = {"real": other, "noisy": noisy}
    packages = [row for name, samples in sets.items() for row in compare_packages(name, reference, samples)]
    for row in packages:
        print(f"{row['score']:<10} {row['here']:.9f} here, {row['there']:.9f} by {row['package']}: {row['difference']:.1e}")
    rows = []
    for name, samples in sets.items():
        for count in (count for count in COUNTS if count <= config.num):
            rows.append({"samples": name, **of_count(count, reference, samples, extractor)})
            print(", ".join(f"{key} {value:.5g}" if key != "samples" else f"{value}" for key, value in rows[-1].items()))
    if config.json:
        evidence.store(Path(config.json), {"settings": asdict(config), "packages": packages, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
