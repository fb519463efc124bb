"""The `length` command of scripts/benchmark.py: what a token costs in a small image and in a large one."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from models.pyramid import STANDARD_SIDES, Pyramid
from models.transformer import ScaleTransformer, build_transformer
from scripts.benchmarks.config import BenchmarkConfig
from scripts.benchmarks.formats import Columns
from scripts.benchmarks.timing import measure
from utils import plots

DEPTH, WINDOW_FROM = 4, 13
PIXELS = (256, 512, 1024)
MODELS: dict[str, dict] = {
    "VAR": {"family": "var"},
    "M-VAR": {"family": "mvar"},
    "Markov, windows": {"family": "markov", "window_from": WINDOW_FROM},
    "M-VAR, windows": {"family": "markov-mamba", "window_from": WINDOW_FROM},
}

COLUMNS: Columns = {
    "pixels": ("image", "{} px".format),
    "token_seconds": ("time per token", lambda seconds: f"{1e6 * seconds:.4g} us"),
    "over_smallest": ("over that of the smallest image", "{:.2f}".format),
    "spread": ("spread", "{:.0%}".format),
    "token_peak_bytes": ("memory per token", lambda count: f"{count / 1e3:.4g} kB"),
}


def length(config: BenchmarkConfig) -> list[dict]:
    """Cost of a token by the size of the image

    A forward pass of whole transformers, head included, over all tokens of an image, without gradients: depth 4, width 256,
    4096 codes, random weights, float32. *Windows* are 7x7 on every scale of side 13 and more.

    *Time* is that of the pass over the number of tokens: the median of repeats in which all models and sizes take turns; the
    spread is the largest less the smallest over the median. *Memory* is the most that the pass holds at once of what it
    allocates, its logits (16 kB per token) included, over the number of tokens.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = {(name, pixels): forward_pass(name, pixels, config.batch, device) for name in MODELS for pixels in PIXELS}
    measured = measure(calls, config.repeats, device)
    rows = []
    for (name, pixels), call in calls.items():
        tokens, smallest = (config.batch * Pyramid(STANDARD_SIDES[size]).num_tokens for size in (pixels, PIXELS[0]))
        result = measured[name, pixels]
        peak_bytes = cpu_peak_bytes(call) if result.peak_bytes is None else result.peak_bytes
        rows.append(
            {
                "model": name,
                "pixels": pixels,
                "tokens": tokens // config.batch,
                "batch": config.batch,
                "token_seconds": result.seconds / tokens,
                "over_smallest": result.seconds / tokens / (measured[name, PIXELS[0]].seconds / smallest),
                "spread": result.spread,
                "token_peak_bytes": peak_bytes / tokens,
            }
        )
    return rows


def forward_pass(name: str, pixels: int, batch: int, device: torch.device) -> Callable[[], object]:
    torch.manual_seed(0)
    transformer: ScaleTransformer = build_transformer(depth=DEPTH, pixels=pixels, **MODELS[name]).to(device).eval()
    pyramid = transformer.pyramid
    inputs = torch.randn(batch, pyramid.num_tokens - pyramid.lengths[0], transformer.config.code_dim, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    return torch.no_grad()(lambda: transformer(labels, inputs))


def cpu_peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call holds of what it allocates on the CPU, by the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        record.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def draw(path: Path, rows: list[dict]) -> None:
    """Time and memory per token over the number of tokens, a line for every model."""
    panels = []
    for title, key, factor, y in (
        ("time", "token_seconds", 1e6, "microseconds per token"),
        ("memory", "token_peak_bytes", 1e-3, "kB per token"),
    ):
        lines = {name: [(row["tokens"], factor * row[key]) for row in rows if row["model"] == name] for name in MODELS}
        panels.append({"title": title, "x": "tokens of an image", "y": y, "lines": lines})
    plots.curves(path, panels)
