"""The `scan` command of scripts/benchmark.py: Mamba-2 between its projections, by every backend that is there."""

import itertools
from collections.abc import Callable

import torch
from tqdm import tqdm

from models.pyramid import Pyramid
from models.scan_backends import SCAN_BACKENDS, choose_scan_
from models.ssm import Mamba2
from scripts.benchmarks.config import BenchmarkConfig
from scripts.benchmarks.formats import Columns, gigabytes, milliseconds, optional
from scripts.benchmarks.timing import Measured, measure

COLUMNS: Columns = {
    "backend": ("backend", str),
    "forward_seconds": ("forward", milliseconds),
    "forward_spread": ("spread", "{:.0%}".format),
    "training_seconds": ("forward and backward", milliseconds),
    "training_spread": ("spread", "{:.0%}".format),
    "training_peak_bytes": ("memory", optional(gigabytes, "not measured")),
    "scales_seconds": ("scale by scale", milliseconds),
    "prefix_seconds": ("whole prefix at every scale", milliseconds),
}


def scan(config: BenchmarkConfig) -> list[dict]:
    """Mamba-2 between its projections

    Convolution, scan and gated norm of one block, at the widths of published depths, over the tokens of a pyramid (680 at
    256 px, 2240 at 512 px), by every backend that this machine can use (`--scan_backend` of train.py and sample.py).

    - *Forward*: all tokens at once, without gradients.
    - *Forward and backward*: as in training, with what the backward pass computes again; *memory* is the most it takes of a GPU
      beyond its inputs.
    - *Scale by scale*: as in generation, one scale after the other from the carried state. *Whole prefix at every scale* is the
      way of the released M-VAR, which keeps no state: at every scale all tokens up to it.

    Medians of repeats in which the backends take turns; the spread is the largest less the smallest over the median.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for depth, pyramid in tqdm(list(itertools.product(config.depths, config.pyramids)), disable=None):
        calls = {}
        for backend in available_backends(device):
            for way, call in ways(backend, 64 * depth, pyramid, config.batch, device, precision).items():
                calls[backend, way] = call
        measured = measure(calls, config.repeats, device)
        for backend in dict.fromkeys(backend for backend, _ in calls):
            by_way = {way: measured[backend, way] for way in ("forward", "training", "scales", "prefix")}
            place = {"model": f"d{depth}", "tokens": pyramid.num_tokens, "batch": config.batch}
            rows.append(place | {"precision": str(precision).removeprefix("torch."), "backend": backend} | figures(by_way))
    return rows


def figures(by_way: dict[str, Measured]) -> dict:
    return {
        "forward_seconds": by_way["forward"].seconds,
        "forward_spread": by_way["forward"].spread,
        "training_seconds": by_way["training"].seconds,
        "training_spread": by_way["training"].spread,
        "training_peak_bytes": by_way["training"].peak_bytes,
        "scales_seconds": by_way["scales"].seconds,
        "prefix_seconds": by_way["prefix"].seconds,
    }


def available_backends(device: torch.device) -> list[str]:
    """All that can be used on the device."""
    available = []
    for backend in SCAN_BACKENDS:
        if backend != "auto":
            try:
                choose_scan_(torch.nn.Module(), backend, device)
            except ValueError:
                continue
            available.append(backend)
    return available


def ways(
    backend: str, width: int, pyramid: Pyramid, batch: int, device: torch.device, precision: torch.dtype
) -> dict[str, Callable[[], object]]:
    """What is measured of one backend, by name."""
    torch.manual_seed(0)
    mixer = Mamba2(width).to(device)
    mixer.ssm.init_weights()
    choose_scan_(mixer, backend, device)
    ssm = mixer.ssm
    options = {"device": device, "dtype": precision}
    zxBC = torch.randn(batch, pyramid.num_tokens, ssm.inner + ssm.conv_dim, **options).requires_grad_()
    dt = torch.randn(batch, pyramid.num_tokens, ssm.heads, **options).requires_grad_()
    gradient = torch.randn(batch, pyramid.num_tokens, ssm.inner, **options)
    leaves = [zxBC, dt, *ssm.parameters()]

    @torch.no_grad()
    def forward() -> None:
        mixer.between_projections(zxBC, dt, None)

    def training() -> None:
        torch.autograd.grad(mixer.between_projections(zxBC, dt, None)[0], leaves, gradient)

    @torch.no_grad()
    def scales() -> None:
        state = mixer.init_state(batch)
        for part, steps in zip(pyramid.split(zxBC), pyramid.split(dt), strict=True):
            _, state = mixer.between_projections(part, steps, state)

    @torch.no_grad()
    def prefix() -> None:
        for end in pyramid.offsets[1:]:
            mixer.between_projections(zxBC[:, :end], dt[:, :end], None)

    return {"forward": forward, "training": training, "scales": scales, "prefix": prefix}
