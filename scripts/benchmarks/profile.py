"""The `profile` command of scripts/benchmark.py: where the time of sampling goes, and what the machine could do at best."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.generate import SampledScales, decode_sampled, sample
from models.precision import TYPES, Precision
from models.pyramid import Pyramid
from scripts.benchmarks.config import BenchmarkConfig
from scripts.benchmarks.formats import Columns
from scripts.benchmarks.sampling import HOW, SEED, random_models
from scripts.benchmarks.timing import measure, wait

SHOWN = 0.02  # shares below it are summed up
OTHER = "others"
PEAK_REPEATS = 20
# What PyTorch calls them -> what they are, several to one name.
OPERATIONS = {
    "addmm": "products",
    "mm": "products",
    "linear": "products",
    "mkldnn::_linear_pointwise": "products",  # of packed weights
    "bmm": "products of the scan",
    "baddbmm": "products of the scan",
    "mkldnn_convolution": "convolutions",
    "cudnn_convolution": "convolutions",
    "convolution_overrideable": "convolutions",
    "_convolution": "transposed convolutions",
    "copy_": "copies and casts",
    "exponential_": "random numbers",
    "topk": "top-k",
    "native_group_norm": "group norm",
    "silu_": "SiLU",
    "silu": "SiLU",
    "gelu": "GELU",
}

COLUMNS: Columns = {
    "part": ("part", str),
    "seconds": ("seconds", "{:.2f}".format),
    "shares": ("shares of its time", lambda shares: ", ".join(f"{name} {share:.0%}" for name, share in shares.items())),
    "product": ("a large product, GFLOP/s", "{:.0f}".format),
    "convolution": ("a large convolution, GFLOP/s", "{:.0f}".format),
}


def sampling_profile(config: BenchmarkConfig) -> list[dict]:
    """Where the time goes

    Images of 256 px with guidance 1.5, top-k 900 and top-p 0.96, one thread on a CPU: the operations of PyTorch's profiler,
    each without those that it calls. Seconds are those of the whole part without the profiler. Beside them what one product
    (512 x 768 by 768 x 3072) and one convolution (320 channels, 64 x 64, 3 x 3) reach alone, in multiply-adds counted twice:
    where products and convolutions take most of the time, a part cannot become much faster than these.
    """
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for family in config.families:
        for depth in config.depths:
            transformer, tokenizer = random_models(family, depth, Pyramid.parse("256"), device)
            precision = config.precision_on(device)
            Precision(precision, precision).apply_(transformer, tokenizer)
            labels = torch.arange(config.batch, device=device)

            def draw(models: tuple = (transformer, tokenizer), labels: Tensor = labels) -> SampledScales:
                return sample(*models, labels, HOW, torch.Generator(labels.device).manual_seed(SEED))

            sampled = draw()
            parts = {"transformer": draw, "decoder": lambda made=sampled, model=tokenizer: decode_sampled(model, made)}
            measured = measure(parts, config.repeats, device)
            for part, call in parts.items():
                rows.append(
                    {
                        "model": f"{family} d{depth}",
                        "batch": config.batch,
                        "precision": precision,
                        "part": part,
                        "seconds": measured[part].seconds,
                        "shares": shares(call, device),
                        **peaks(TYPES[precision], device),
                    }
                )
    return rows


def shares(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Of the time of a call, by operation, the largest first."""
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        call()
        wait(device)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        name = "attention" if "scaled_dot_product" in name or "flash" in name else OPERATIONS.get(name, name)
        times[name] = times.get(name, 0.0) + spent
    total = sum(times.values())
    large = {name: spent / total for name, spent in sorted(times.items(), key=lambda item: -item[1]) if spent > SHOWN * total}
    return large | {OTHER: 1 - sum(large.values())}


def peaks(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """GFLOP/s of one large product and of one large convolution."""
    x, weight = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((512, 768), (3072, 768)))
    maps = torch.randn(1, 320, 64, 64, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    kernel = torch.randn(320, 320, 3, 3, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    flops = {"product": 2 * 512 * 768 * 3072, "convolution": 2 * 64 * 64 * 320 * 320 * 9}
    calls = {"product": lambda: F.linear(x, weight), "convolution": lambda: F.conv2d(maps, kernel, padding=1)}
    with torch.no_grad():
        measured = measure(calls, PEAK_REPEATS, device)
    return {name: flops[name] / 1e9 / measured[name].seconds for name in flops}
