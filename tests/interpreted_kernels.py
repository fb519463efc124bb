"""The kernels of flash-linear-attention against the reference, in Triton's interpreter.

tests/test_scan_backends.py runs it with TRITON_INTERPRET=1. Its arguments are the lengths of consecutive pieces, such as
1,4,9, and float32 or float16 (the interpreter's bfloat16 does not compute).
"""

import builtins
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


class Timer:
    """In the place of a GPU's driver: every configuration of a kernel is as fast as the others, so the first is taken."""

    @staticmethod
    def get_benchmarker():
        return lambda call, quantiles: [1.0] * len(quantiles)


class Index(int):
    """A number of the interpreter's loops, which compiled kernels may convert."""

    def to(self, dtype) -> "Index":
        return self


def main() -> None:
    triton.runtime.driver.set_active(Timer())
    import fla.ops.common.chunk_h
    from scan_comparison import scan_errors

    fla.ops.common.chunk_h.range = lambda *bounds: map(Index, builtins.range(*map(int, bounds)))
    lengths = [int(length) for length in sys.argv[1].split(",")]
    precision, limit = {"float32": (torch.float32, 1e-5), "float16": (torch.float16, 1e-2)}[sys.argv[2]]
    errors = scan_errors("fla", lengths, dtype=precision, inner=32, state_dim=16, head_dim=16, batch=1)
    assert max(errors.values()) < limit, errors


if __name__ == "__main__":
    main()
