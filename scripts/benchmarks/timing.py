"""Times of things that are to be compared: taken in turn, so that what else the machine does meets all of them alike."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, int | None, object]:
    """Seconds of one call, the most memory that it took beyond what was there, and what it returned.

    Memory is that of the GPU, or of this process where Linux tells; else None.
    """
    wait(device)
    before = memory(device, begin=True)
    start = time.perf_counter()
    result = call()
    wait(device)
    seconds = time.perf_counter() - start
    after = memory(device, begin=False)
    return seconds, None if before is None or after is None else after - before, result


def memory(device: torch.device, begin: bool) -> int | None:
    """Bytes in use now, from which on the largest is looked for; or that largest."""
    if device.type == "cuda":
        if begin:
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if begin:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed counts as used until the system has it back
            Path("/proc/self/clear_refs").write_text("5")  # the largest begins anew
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmRSS" if begin else "VmHWM"].split()[0])
    except (OSError, KeyError, AttributeError):
        return None


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
