"""Measure what running this code costs. Prints a page in Markdown; --json also stores the figures with machine and commit."""

import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from models.families import FAMILIES
from models.pyramid import STANDARD_SIDES, Pyramid
from models.scan_backends import SCAN_BACKENDS
from models.ssm import StateSpace
from models.transformer import ScaleTransformer, TransformerConfig, family_config, recompute_blocks_
from scripts.benchmarks import attention, length, sampling, scan, table, training
from utils import cli, evidence
from utils.cli import argument, flag
from utils.data import token_cache

PIXELS, NUM_CLASSES = 256, 1000
IMAGENET_IMAGES = 1_281_167
STATE_BYTES = 4 + 4 + 8 + 4  # per parameter, float32: weight, gradient, two moments of AdamW, average
BATCHES_PER_REPEAT = 20
# What a command takes where a flag is not given, and what all others take.
COMMON = {"family": "mvar,var,markov", "depth": "12", "batch": 1, "pn": "256"}
DEFAULTS: dict[str, dict] = {
    "tokens": {"batch": 768},
    "memory": {"depth": "12,16,20,24,30,32"},
    "sampling": {"batch": 4},
    "training": {"batch": 16},
    "scan": {"depth": "12,16,24", "batch": 8, "pn": "256,512"},
    "attention": {},
    "length": {},
    "table": {
        "family": ",".join(("var", *(family for family in FAMILIES if family != "var"))),
        "depth": "16,20,24",
        "batch": 32,
    },
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """Arguments of scripts/benchmark.py."""

    command: str = argument("what is measured", choices=tuple(DEFAULTS))
    family: str | None = flag(None, f"memory, sampling, training, table: kinds of transformer, of {', '.join(FAMILIES)}")
    depth: str | None = flag(None, "memory, sampling, training, scan, table: depths, comma-separated")
    pn: str | None = flag(None, "sampling, training, scan, table: pyramids, as in train.py, comma-separated", "--pixels")
    tfast: str = flag("0,3", "training: modes of compilation, as in train.py, comma-separated")
    precision: str = flag("", "training; empty: bfloat16 on GPUs, else float32", choices=("", "float32", "float16", "bfloat16"))
    scan_backend: str = flag("auto", "training: as in train.py", choices=SCAN_BACKENDS)
    real: bool = flag(False, "memory: compute on this machine, which takes the memory and the time, instead of imitating a GPU")
    sides: str = flag("13,16,18,24,32,48,64", "attention: sides of maps, comma-separated")
    heads: str = flag("4,12", "attention: numbers of heads, comma-separated")
    batch: int | None = flag(None, "images per batch")
    rows: int = flag(1 << 17, "tokens: images in the cache that is made for it")
    repeats: int = flag(7, f"the median of so many measurements, tokens: of {BATCHES_PER_REPEAT} batches")
    json: str = flag("", "file to store the figures in, with command, machine, versions and commit")
    overwrite: bool = flag(False, "replace what is at --json")

    def __post_init__(self):
        for name, value in (COMMON | DEFAULTS[self.command]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        unknown = sorted(set(self.families) - set(FAMILIES))
        if unknown:
            raise ValueError(f"--family={self.family}: no {', '.join(unknown)}: give some of {','.join(FAMILIES)}")
        if not all(depth.isdigit() and int(depth) > 0 for depth in self.depth.split(",")):
            raise ValueError(f"--depth={self.depth}: give numbers of blocks such as 12,16")
        for name in ("sides", "heads"):
            if not all(number.isdigit() and int(number) > 0 for number in getattr(self, name).split(",")):
                raise ValueError(f"--{name}={getattr(self, name)}: give numbers such as {getattr(BenchmarkConfig, name)}")
        for name in ("batch", "rows", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: give at least 1")
        if not set(self.tfast.split(",")) <= set("0123"):
            raise ValueError(f"--tfast={self.tfast}: give some of 0,1,2,3")
        if self.command in ("training", "table") and len(self.pyramids) > 1:
            raise ValueError(f"--pn={self.pn}: {self.command} takes one pyramid")

    @property
    def families(self) -> list[str]:
        return self.family.split(",")

    @property
    def depths(self) -> list[int]:
        return self.numbers("depth")

    def numbers(self, name: str) -> list[int]:
        return [int(number) for number in getattr(self, name).split(",")]

    @property
    def pyramids(self) -> list[Pyramid]:
        return [Pyramid.parse(text) for text in self.pn.split(",")]


# --- tokens -------------------------------------------------------------------------------------------------------------


def tokens(config: BenchmarkConfig) -> list[dict]:
    """Reading a token cache

    Random rows of a token cache, gathered into batches as training does, by one thread. The cache is made for it, of random
    tokens in the real format (256 px, 680 tokens of 16 bits), and lies in memory (page cache), as ImageNet's does after an
    epoch on a machine with room for it. The size of a view of ImageNet follows from the format.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        cache = synthetic_cache(Path(directory), config.rows)
        rng = np.random.default_rng(0)
        seconds = []
        for _ in range(config.repeats + 1):
            batches = [rng.integers(0, len(cache), config.batch) for _ in range(BATCHES_PER_REPEAT)]
            start = time.perf_counter()
            for batch in batches:
                cache.gather(batch)
            seconds.append((time.perf_counter() - start) / BATCHES_PER_REPEAT)
    batch_seconds = median(seconds[1:])  # the first repeat warms up
    view = token_cache.array_bytes(IMAGENET_IMAGES, 1, cache.manifest.pyramid.num_tokens)
    return [
        {
            "batch": config.batch,
            "rows": config.rows,
            "shards": len(cache.shards),
            "images_per_second": config.batch / batch_seconds,
            "batch_seconds": batch_seconds,
            "imagenet_view_tokens_bytes": view["tokens"],
            "imagenet_view_bytes": sum(view.values()),
        }
    ]


def synthetic_cache(directory: Path, rows: int) -> token_cache.TokenCache:
    """The training split of a cache with random tokens, in the format of scripts/cache_tokens.py."""
    plan = token_cache.Plan(
        sides=list(STANDARD_SIDES[PIXELS]),
        num_codes=4096,
        tokenizer="none",
        fingerprint="none",
        class_names=[str(number) for number in range(NUM_CLASSES)],
        pixels=PIXELS,
        resize=1.125,
        augment=True,
        flip=False,
        views=1,
        seed=0,
        rows={"train": rows, "val": 0},
        rows_per_shard={split: token_cache.rows_per_shard(rows) for split in token_cache.SPLITS},
        listing="none",
    )
    rng = np.random.default_rng(0)
    for shard in plan.shards("train"):
        arrays = {
            "tokens": rng.integers(0, plan.num_codes, (len(shard.rows), plan.pyramid.num_tokens), np.uint16),
            "labels": rng.integers(0, NUM_CLASSES, len(shard.rows), np.int32),
            "source": np.array(shard.rows, np.int32),
        }
        token_cache.write_shard(directory, shard, arrays)
    token_cache.write_manifest(directory, plan)
    return token_cache.TokenCache(directory, "train")


# --- memory -------------------------------------------------------------------------------------------------------------


def memory(config: BenchmarkConfig) -> list[dict]:
    """Memory of training

    What a GPU holds under DDP, for images of 256 px (680 tokens); 1 GB is 10^9 bytes.

    - *State*: weights, gradients, the two moments of AdamW and averaged weights (`--ema`), 4 + 4 + 8 + 4 bytes per parameter;
      `--parallel=fsdp` divides it by the number of GPUs. While a step runs, autocast's half-precision copies of the weights
      come on top, 2 bytes per parameter.
    - *Activations*: what a forward pass with its loss keeps for the backward pass, per image, in bfloat16 or float16: every
      storage that autograd saves, once, in a batch of two less that in a batch of one. Measured on tensors with shapes and no
      values, which follow a GPU's rules of autocast and save what its fused attention saves; with `--real` on real ones, by the
      rules of this machine.
    - *Recomputed*: the same with `--recompute`, where a block keeps its input alone.
    - *Computed again*: what one block keeps while the backward pass is in it, on top of *recomputed*. Of this, the inside of
      Mamba, between its projections, comes on top of *activations* too, since it is always computed again.

    So a GPU needs the state, then for every image of a micro-batch *activations* and *inside Mamba*, or with `--recompute`
    *recomputed* and *computed again*, and a few GB for gradients on their way, other passing tensors and fragments.
    """
    device = torch.device("cuda" if torch.cuda.is_available() or not config.real else "cpu")
    rows = []
    for depth, family in tqdm(list(itertools.product(config.depths, config.families)), disable=None):
        model = family_config(family, depth, STANDARD_SIDES[PIXELS], NUM_CLASSES)
        with FakeTensorMode():
            parameters = sum(parameter.numel() for parameter in ScaleTransformer(model).parameters())
        with contextlib.nullcontext() if config.real else fake_device(device):
            activations, recomputed = (kept_per_image(training_pass, model, device, again) for again in (False, True))
            inside_mamba = kept_per_image(mamba_pass, model, device)
        rows.append(
            {
                "model": f"d{depth}",
                "family": family,
                "parameters": parameters,
                "state_bytes": STATE_BYTES * parameters,
                "activation_bytes": activations,
                "recomputed_bytes": recomputed,
                "computed_again_bytes": (activations - recomputed) // depth + inside_mamba,
                "inside_mamba_bytes": inside_mamba,
            }
        )
    return rows


def kept_per_image(make_pass: Callable[..., Callable[[], Tensor]], *arguments: Any) -> int:
    """Bytes that every further image of a batch makes a forward pass keep for its backward pass.

    make_pass(batch, *arguments) -> a function that computes it. Weights and their half-precision copies are the same in every
    batch, so they cancel.
    """
    return kept_bytes(make_pass(2, *arguments)) - kept_bytes(make_pass(1, *arguments))


def kept_bytes(compute: Callable[[], Tensor]) -> int:
    """Bytes of all distinct storages that autograd saves in a computation."""
    kept = {}  # the storages themselves: a freed one could give its id to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def training_pass(batch: int, config: TransformerConfig, device: torch.device, recompute: bool) -> Callable[[], Tensor]:
    """Logits under bfloat16 autocast and their loss, as in the trainer."""
    num_tokens = config.pyramid.num_tokens
    with device:
        transformer = ScaleTransformer(config).train()
        labels = torch.zeros(batch, dtype=torch.long)
        inputs = torch.zeros(batch, num_tokens - config.pyramid.lengths[0], config.code_dim)
        targets = torch.zeros(batch, num_tokens, dtype=torch.long)
    if recompute:
        recompute_blocks_(transformer)

    def compute() -> Tensor:
        with bfloat16_autocast(device.type):
            logits = transformer(labels, inputs)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return losses.sum(dim=1).mean() / num_tokens

    return compute


def mamba_pass(batch: int, config: TransformerConfig, device: torch.device) -> Callable[[], Tensor]:
    """What Mamba does between its projections in one block, in bfloat16; a constant where no block has any."""
    with device:
        insides = [module for module in ScaleTransformer(config).modules() if isinstance(module, StateSpace)]
        if not insides:
            return lambda: torch.zeros((), requires_grad=True)
        inside, num_tokens = insides[0], config.pyramid.num_tokens
        half = {"dtype": torch.bfloat16, "requires_grad": True}
        inputs = torch.zeros(batch, num_tokens, inside.inner + inside.conv_dim, **half)
        steps = torch.zeros(batch, num_tokens, inside.heads, **half)
    return lambda: inside(inputs, steps, inside.init_state(batch).conv, None)[0]


@contextlib.contextmanager
def bfloat16_autocast(device_type: str) -> Iterator[None]:
    """torch.autocast, but for CUDA on a machine without a GPU too, where torch.autocast would switch itself off."""
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, False)


@contextlib.contextmanager
def fake_device(device: torch.device) -> Iterator[None]:
    """Tensors made here have shapes and no values: models of any size cost no memory, on GPUs that need not be there."""
    with FakeTensorMode(), FusedAttention() if device.type == "cuda" else contextlib.nullcontext():
        yield


class FusedAttention(TorchFunctionMode):
    """Attention by the memory-efficient kernel, as a GPU would choose: for fake tensors PyTorch falls back to the plain one.

    Flash attention saves the same tensors: queries, keys, values, output and one number per query.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        queries, keys, values = args
        bias = kwargs["attn_mask"]
        if bias is not None:
            bias = queries.new_zeros(bias.shape).expand(*queries.shape[:2], *bias.shape[-2:])
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(queries, keys, values, bias, compute_log_sumexp=True, scale=kwargs["scale"])[0]


# --- common -------------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[BenchmarkConfig], list[dict]]] = {
    "tokens": tokens,
    "memory": memory,
    "sampling": sampling.sampling,
    "training": training.training,
    "scan": scan.scan,
    "attention": attention.attention,
    "length": length.length,
    "table": table.table,
}
PLOTS: dict[str, Callable[[Path, list[dict]], None]] = {"length": length.draw}  # beside --json, as .png


def gigabytes(count: float) -> str:
    return f"{count / 1e9:#.3g} GB"


# Column of the Markdown table: its heading, and how a value is written there.
COLUMNS: dict[str, tuple[str, Callable]] = {
    "batch": ("batch", str),
    "rows": ("images in the cache", "{:,}".format),
    "shards": ("shards", str),
    "images_per_second": ("images per second", "{:,.0f}".format),
    "batch_seconds": ("time per batch", lambda seconds: f"{1000 * seconds:.2f} ms"),
    "imagenet_view_tokens_bytes": ("tokens of a view of ImageNet", gigabytes),
    "imagenet_view_bytes": ("with labels and sources", gigabytes),
    "model": ("model", str),
    "family": ("family", str),
    "parameters": ("parameters", lambda count: f"{count / 1e6:.1f} M"),
    "state_bytes": ("state", gigabytes),
    "activation_bytes": ("activations per image", gigabytes),
    "recomputed_bytes": ("recomputed", gigabytes),
    "computed_again_bytes": ("computed again", gigabytes),
    "inside_mamba_bytes": ("inside Mamba", gigabytes),
    **sampling.COLUMNS,
    **training.COLUMNS,
    **scan.COLUMNS,
    **attention.COLUMNS,
    **length.COLUMNS,
    **table.COLUMNS,
}


def page(command: str, rows: list[dict]) -> str:
    """What a sub-command measures, how it was called, and the rows as a Markdown table."""
    title, text = getdoc(COMMANDS[command]).split("\n\n", 1)
    table = [[COLUMNS[name][0] for name in rows[0]], ["---"] * len(rows[0])]
    table += [[COLUMNS[name][1](value) for name, value in row.items()] for row in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([f"# {title}", "", text, "", f"Printed by `{evidence.command()}`.", "", *lines]) + "\n"


def main() -> None:
    config = cli.parse(BenchmarkConfig, __doc__)
    out = Path(config.json)
    if config.json and out.exists() and not config.overwrite:
        raise ValueError(f"{out}: is there already: give another --json, or --overwrite")
    rows = COMMANDS[config.command](config)
    if config.json:
        evidence.store(out, {"threads": torch.get_num_threads(), "rows": rows})
        if config.command in PLOTS:
            PLOTS[config.command](out.with_suffix(".png"), rows)
    print(page(config.command, rows), end="")


if __name__ == "__main__":
    cli.run(main)
