"""What a process on a CPU does with memory that it has freed."""

import ctypes
import sys

import torch

MAPPED_BLOCKS, TRIM_THRESHOLD = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of glibc's malloc.h
MOST = 2**31 - 1  # bytes, of the largest int


def keep_memory() -> None:
    """Keep what the main thread frees for its next tensor instead of giving it back to the system; on Linux.

    glibc gives large blocks back as soon as they are free, and every page that comes anew is cleared by the kernel first: a
    fifth of the time of a small training on a CPU (results/allocator.json). With a GPU the large tensors are on it, and memory
    is left as it is.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # musl has it not
        library.mallopt(MAPPED_BLOCKS, 0)
        library.mallopt(TRIM_THRESHOLD, MOST)
