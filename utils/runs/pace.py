"""What a run takes: how fast it goes from one log line to the next, how much of that it waits for its data, and its memory."""

import resource
import time

import torch

from utils.data.batches import Timed

LONGEST_WAIT = 0.1  # share of the time: more is told


class Pace:
    """Counts from the last `mark`: a log line, or the end of a validation, whose time is not training's.

    batches: of the run. mend: what helps where they come too slowly.
    """

    def __init__(self, batches: Timed, step: int, mend: str):
        self.batches, self.mend = batches, mend
        self.slow_lines = 0  # in a row before which the run waited for long
        self.mark(step)

    def mark(self, step: int) -> None:
        self.step, self.time, self.waited = step, time.monotonic(), self.batches.seconds

    def measure(self, step: int) -> tuple[float, float]:
        """Steps per second, and the share of the time, 0 to 1, that went by in waiting; then marks."""
        seconds = time.monotonic() - self.time
        figures = (step - self.step) / seconds, (self.batches.seconds - self.waited) / seconds
        self.mark(step)
        return figures

    def remarks(self, waited: float) -> list[str]:
        """What is told, once, of two log lines in a row before which the run waited for long; the first may hold the start."""
        self.slow_lines = self.slow_lines + 1 if waited > LONGEST_WAIT else 0
        return [f"{waited:.0%} of the time went by in waiting for data: {self.mend}"] if self.slow_lines == 2 else []


def peak_memory(device: torch.device) -> int:
    """Bytes at most in use so far: of the GPU by tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
