import ctypes
import resource
import sys

import pytest
import torch

from utils import allocator

BYTES = 256 << 20


def faults_of_tensor() -> int:
    """Pages that the system gives anew for a large tensor that is freed at once."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(BYTES, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="left as it is there")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="of glibc")
def test_freed_memory_serves_the_next_tensor():
    allocator.keep_memory()
    faults_of_tensor()
    assert faults_of_tensor() < BYTES // resource.getpagesize() // 100


def test_a_library_without_the_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    allocator.keep_memory()
