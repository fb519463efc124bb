"""The `attention` command of scripts/benchmark.py: what windows cost on one map, by tiles and otherwise."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.attention import Tiling, window_mask, windowed_attention
from scripts.benchmarks.config import BenchmarkConfig
from scripts.benchmarks.formats import Columns, milliseconds
from scripts.benchmarks.timing import measure

WINDOW, HEAD_DIM = 7, 64
WAYS = ("whole", "mask", "tiles")


COLUMNS: Columns = {
    "heads": ("heads", str),
    "map": ("map", str),
    "tiles": ("tiles", str),
    **{f"{way}_seconds": (f"{way}, forward", milliseconds) for way in WAYS},
    **{f"{way}_training_seconds": (f"{way}, forward and backward", milliseconds) for way in WAYS},
    "largest_spread": ("largest spread", "{:.0%}".format),
}


def attention(config: BenchmarkConfig) -> list[dict]:
    """Windows on one map

    Attention of square maps without its projections, heads of 64 channels, float32 on CPUs and bfloat16 on GPUs, without
    gradients (forward) and with them (forward and backward).

    - *Whole*: every query sees the whole map, as in M-VAR.
    - *Mask*: windows of 7x7 as a mask over the whole map.
    - *Tiles*: the same windows as this repository computes them: by a mask where *tiles* is 1x1, else by so many tiles of
      queries, each with the keys around it.

    Medians of repeats in which all take turns; the spread is the largest less the smallest over the median.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for heads, side in tqdm(list(itertools.product(config.numbers("heads"), config.numbers("sides"))), disable=None):
        measured = measure(ways(config.batch, heads, side, device), config.repeats, device)
        count = Tiling.of(side, WINDOW).count
        rows.append(
            {"batch": config.batch, "heads": heads, "map": f"{side}x{side}", "tiles": f"{count}x{count}"}
            | {f"{name}_seconds": result.seconds for name, result in measured.items()}
            | {"largest_spread": max(result.spread for result in measured.values())}
        )
    return rows


def ways(batch: int, heads: int, side: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is measured on a map, by name."""
    options = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    qkv = torch.randn(batch, side * side, 3, heads, HEAD_DIM, **options).requires_grad_()
    gradient = torch.randn(batch, side * side, heads * HEAD_DIM, **options)
    tilings = (Tiling.of(side, WINDOW),) * 2
    visible = tuple(tiling.visible().to(device) for tiling in tilings)
    mask = window_mask(side, side, WINDOW).to(device)

    def dense(attn_mask: Tensor | None) -> Tensor:
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=attn_mask, scale=1.0)
        return y.transpose(1, 2).flatten(2)

    compute: dict[str, Callable[[], Tensor]] = {
        "whole": lambda: dense(None),
        "mask": lambda: dense(mask),
        "tiles": lambda: windowed_attention(*qkv.permute(2, 0, 3, 1, 4), tilings, visible, scale=1.0),
    }
    training = {
        f"{way}_training": lambda call=call: torch.autograd.grad(call(), qkv, gradient) for way, call in compute.items()
    }
    return {way: torch.no_grad()(call) for way, call in compute.items()} | training
