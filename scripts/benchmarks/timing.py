"""Times of things that are to be compared: taken in turn, so that what else the machine does meets all of them alike."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Measured:
    """Seconds of one call, over the repeats, and what it took of a GPU's memory beyond what was there before."""

    seconds: float  # median
    spread: float  # largest less smallest, over the median
    peak_bytes: int | None  # None on a CPU


def measure(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Measured]:
    """Every call once to warm up (kernels are compiled and tuned there), then all of them in turn, `repeats` times."""
    peaks = {name: _peak(call, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Measured(median(times), (max(times) - min(times)) / median(times), peaks[name]) for name, times in seconds.items()
    }


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back the memory of what nothing refers to any more, before the next thing is measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Of a second call: the first may tune kernels."""
    call()
    if device.type != "cuda":
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before
