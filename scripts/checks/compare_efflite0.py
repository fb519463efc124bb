"""Compare EfficientNet-Lite0 of timm with this project's own: features to the bit, and time, on a CPU.

Photographs of ImageNet (in the package foolbox) and images of random pixels, in the batches that evaluation takes. Both
networks have batch normalisation folded into the convolutions. They take turns; times are medians, of the clock and of the
processor, as machines are shared.
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.storage import read_tensors
from utils import cli, evidence
from utils.cli import flag
from utils.metrics.features import Features, efflite0_file, efflite0_network, load_extractor

THREADS = (1, 2)
SIDES = (32, 224, 256)
BATCHES = (1, 7, 8, 64)
TIMED = {8: 25, 64: 9}  # images in a batch: repeats


@dataclass(frozen=True)
class CompareConfig:
    """Flags of scripts/checks/compare_efflite0.py."""

    json: str = flag("", "file to store the figures in, with command, machine, versions and commit")


def photographs() -> list[Tensor]:
    """(1, H, W, 3) uint8 each."""
    folder = Path(importlib.util.find_spec("foolbox").origin).parent / "data"
    return [torch.from_numpy(np.array(Image.open(path).convert("RGB")))[None] for path in sorted(folder.glob("imagenet_*.jpg"))]


def timm_extractor() -> Callable[[Tensor], Features]:
    network = efflite0_network(read_tensors(efflite0_file()), "weights")

    def extract(images: Tensor) -> Features:
        x = images.permute(0, 3, 1, 2).float()
        x = (F.interpolate(x, (224, 224), mode="bilinear") - 127) / 128
        pooled = network.forward_head(network.forward_features(x), pre_logits=True)
        return Features(pooled, network.classifier(pooled))

    return extract


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, over the largest value; 0 where all bits are the same."""
    return ((a - b).abs().max() / b.abs().max()).item()


def compare_features(ours: Callable, timms: Callable, threads: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    sets = {f"{n} of random pixels, side {side}": (n, side, side, 3) for n in BATCHES for side in SIDES}
    images = {name: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for name, shape in sets.items()}
    images |= {f"photograph {i}": photograph for i, photograph in enumerate(photographs())}
    rows = []
    for name, batch in images.items():
        pairs = list(zip(timms(batch)[:2], ours(batch)[:2], strict=True))
        pooled, logits = (difference(*pair) for pair in pairs)
        same = all(torch.equal(*pair) for pair in pairs)
        rows.append({"threads": threads, "images": name, "pooled": pooled, "logits": logits, "same_bits": same})
    return rows


def compare_times(ours: Callable, timms: Callable, threads: int) -> list[dict]:
    rows = []
    for size, repeats in TIMED.items():
        images = torch.randint(0, 256, (size, 224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        times: dict[str, list] = {"ours": [], "timm": []}
        for repeat in range(repeats + 1):
            for name, extract in (("ours", ours), ("timm", timms)):
                clock, processor = time.perf_counter(), time.process_time()
                extract(images)
                if repeat:  # the first is to warm up
                    times[name].append((time.perf_counter() - clock, time.process_time() - processor))
        medians = {name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in times.items()}
        row = {"threads": threads, "batch": size, "repeats": repeats}
        for i, what in enumerate(("seconds", "processor_seconds")):
            row |= {f"{what}_{name}": round(medians[name][i], 4) for name in medians}
            row[f"{what}_ratio"] = round(medians["timm"][i] / medians["ours"][i], 3)
        rows.append(row)
        print(row, flush=True)
    return rows


@torch.inference_mode()
def main() -> None:
    config = cli.parse(CompareConfig, __doc__)
    ours, timms = load_extractor("efflite0"), timm_extractor()
    features, times = [], []
    for threads in THREADS:
        torch.set_num_threads(threads)
        features += compare_features(ours, timms, threads)
        times += compare_times(ours, timms, threads)
    print(f"{sum(row['same_bits'] for row in features)} of {len(features)} sets of features are the same to the bit")
    if config.json:
        versions = {"timm": timm.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
        figures = {"with": versions, "features": features, "times": times}
        evidence.store(Path(config.json), figures)


if __name__ == "__main__":
    cli.run(main)
