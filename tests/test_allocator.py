import ctypes
import subprocess
import sys

import pytest
import torch

from utils import allocator

# In a process of its own: what other tests have left behind could serve the tensor.
TAKE_AND_FREE = """
import resource
import sys

import torch

from utils.allocator import keep_memory


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if sys.argv[1] == "keep":
    keep_memory()
before = resident()
torch.zeros(64 << 20, dtype=torch.uint8)
print(resident() - before >> 20)
"""


def mebibytes_kept(setting: str) -> int:
    """By how much the process has grown after a tensor of 64 MiB was made and freed."""
    run = subprocess.run([sys.executable, "-c", TAKE_AND_FREE, setting], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="left as it is there")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="of glibc")
def test_freed_memory_is_kept_for_the_next_tensor():
    assert mebibytes_kept("keep") > 60
    assert mebibytes_kept("leave") < 4


def test_a_library_without_the_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    allocator.keep_memory()
