"""The process group: one process, or many under torchrun (NCCL on GPUs, gloo on CPUs)."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Who this process is: rank of world processes, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks; every rank gets it."""
        if self.world == 1:
            return values
        total = values.clone()
        torch_dist.all_reduce(total)
        return total

    def from_main(self, value: float) -> float:
        """Rank 0's number on every rank."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch_dist.broadcast(shared, src=0)
        return shared.item()

    def barrier(self) -> None:
        if self.world > 1:
            torch_dist.barrier()


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the group that torchrun's environment describes, or be alone; leave it at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world == 1:
        yield Ranks(0, 1, device)
        return
    torch_dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(torch_dist.get_rank(), world, device)
    finally:
        torch_dist.destroy_process_group()
