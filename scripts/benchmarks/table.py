"""The `table` command of scripts/benchmark.py: the efficiency table of MVAR (arXiv 2505.12742), published and ours."""

import itertools
import os
import tempfile
from collections import Counter
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from models.families import FAMILIES
from models.generate import state_bytes
from models.pyramid import Pyramid
from models.transformer import ScaleTransformer, TransformerConfig, family_config
from scripts.benchmarks.config import NUM_CLASSES, BenchmarkConfig
from scripts.benchmarks.formats import Columns, gigabytes, optional
from scripts.benchmarks.memory import TRAINING_BYTES, num_parameters
from scripts.benchmarks.sampling import Ways, random_models
from scripts.benchmarks.timing import free, measure
from scripts.benchmarks.training import training_row
from utils.runs.flops import training_flops

STATE_ROWS = 2 * 32  # the published states are of 32 images with guidance, in float32


class Published(NamedTuple):
    """What MVAR's slides say of a transformer, on an RTX 4090, batch 32."""

    seconds: float  # of sampling
    attention_gflops: float
    state_mib: int  # keys and values
    memory_mb: int  # of sampling
    training_seconds: float | None  # per step


PUBLISHED = {
    ("var", 16): Published(0.34, 43.61, 5440, 10882, 0.99),
    ("markov", 16): Published(0.27, 35.44, 0, 3846, 0.61),
    ("var", 20): Published(0.52, 81.52, 8500, 16244, 1.35),
    ("markov", 20): Published(0.45, 68.75, 0, 5432, 0.79),
    ("var", 24): Published(0.81, 136.63, 12240, 23056, None),
    ("markov", 24): Published(0.71, 118.25, 0, 7216, None),
}


COLUMNS: Columns = {
    "sampling_seconds": ("sampling", optional("{:.3g} s".format)),
    "sampling_spread": ("spread", optional("{:.0%}".format)),
    "published_seconds": ("published", optional("{:.2f} s".format)),
    "attention_gflops": ("attention, GFLOPs as published", "{:.2f}".format),
    "published_attention_gflops": ("published", optional("{:.2f}".format)),
    "model_gflops": ("whole model, counted so", "{:.1f}".format),
    "state_mib": ("state", "{:.0f} MiB".format),
    "published_state_mib": ("published", optional("{} MiB".format)),
    "sampling_peak_bytes": ("memory, sampling", optional(lambda count: f"{count / 1e6:,.0f} MB")),
    "published_memory_mb": ("published", optional("{:,} MB".format)),
    "training_batch": ("training batch", optional(str)),
    "training_seconds": ("training step", optional("{:.3g} s".format)),
    "published_training_seconds": ("published", optional("{:.2f} s".format)),
    "training_peak_bytes": ("memory, training", optional(gigabytes)),
}


def table(config: BenchmarkConfig) -> list[dict]:
    """Efficiency

    The figures by which MVAR compares itself with VAR, for all kinds of transformer, on this device. The published ones are of
    an RTX 4090 with batch 32 and say nothing about this device; they stand beside ours for their ratios.

    - *Sampling*: whole images, guidance and decoder included, of one batch; the median of repeats, its spread the largest less
      the smallest over the median.
    - *Attention, GFLOPs as published*: multiply-adds of the projections to queries, keys and values and of the two products
      with scores that are seen, in all blocks, of one image; nothing else of a block, and of M-VAR no Mamba. *Whole model*
      counts the multiply-adds of all matrix products in the same way.
    - *State*: what is carried from scale to scale, of 32 images with guidance in float32.
    - *Memory, sampling*: what a GPU needs beyond the weights. *Training*: a step of the trainer from cached tokens, not
      compiled, and all the memory of it; left out where the weights and what belongs to them do not fit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pyramid = config.pyramids[0]
    rows = []
    for depth, family in tqdm(list(itertools.product(config.depths, config.families)), disable=None):
        published = PUBLISHED.get((family, depth)) if pyramid == Pyramid.standard(10) else None
        row = {"model": f"d{depth}", "family": family, "batch": config.batch}
        row |= sampled(config, device, depth, family, published) | counted(family, depth, pyramid, published)
        rows.append(row | trained(config, device, depth, family, published))
        free(device)
    order = ("model", "family", "batch", *COLUMNS)
    return [{name: row[name] for name in order} for row in rows]


def sampled(config: BenchmarkConfig, device: torch.device, depth: int, family: str, published: Published | None) -> dict:
    ways = Ways(*random_models(family, depth, config.pyramids[0], device), config.batch, config.precision_on(device))
    result = measure({"whole": ways.ours_whole}, config.repeats, device)["whole"]
    return {
        "sampling_seconds": result.seconds,
        "sampling_spread": result.spread,
        "sampling_peak_bytes": result.peak_bytes,
        "published_seconds": published and published.seconds,
        "published_memory_mb": published and published.memory_mb,
    }


def counted(family: str, depth: int, pyramid: Pyramid, published: Published | None) -> dict:
    """What needs no device."""
    model = family_config(family, depth, pyramid.sides, NUM_CLASSES)
    with FakeTensorMode(), torch.no_grad():
        state = state_bytes(ScaleTransformer(model), STATE_ROWS)
    return {
        "attention_gflops": attention_gflops(model),
        "published_attention_gflops": published and published.attention_gflops,
        "model_gflops": training_flops(model) / 3 / 2 / 1e9,
        "state_mib": state / 2**20,
        "published_state_mib": published and published.state_mib,
    }


def attention_gflops(config: TransformerConfig) -> float:
    """Multiply-adds, in 10^9, of one image in all blocks: x to queries, keys and values, and both products with seen scores."""
    total = 0
    for kind, count in Counter(config.blocks).items():
        with torch.device("meta"):  # shapes alone
            mixers = FAMILIES[kind].build(config.mixers(kind))
        total += count * sum(mixer.attention_multiply_adds for mixer in mixers)
    return total / 1e9


def trained(config: BenchmarkConfig, device: torch.device, depth: int, family: str, published: Published | None) -> dict:
    """A training step, where there is room for one."""
    model = family_config(family, depth, config.pyramids[0].sides, NUM_CLASSES)
    step = None
    if 1.2 * TRAINING_BYTES * num_parameters(model) < available_bytes(device):
        with tempfile.TemporaryDirectory() as run:
            step = training_row(config, device, run, depth, family, tfast=0)
    return {
        "training_batch": step and step["batch"],
        "training_seconds": step and step["step_seconds"],
        "published_training_seconds": published and published.training_seconds,
        "training_peak_bytes": step and step["peak_bytes"],
    }


def available_bytes(device: torch.device) -> int:
    """Memory of the device that nothing uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
