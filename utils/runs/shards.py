"""Tensors that lie in shards: every rank writes the parts that it holds (torch.distributed.checkpoint, as safetensors files).

The shards of any number of ranks are read into any number of ranks, or into whole tensors by one process.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor

SHARDS = "shards"  # the folder of a checkpoint that holds them


def is_sharded(checkpoint: Path) -> bool:
    return (checkpoint / SHARDS).is_dir()


def shard_sizes(checkpoint: Path) -> dict[str, torch.Size]:
    """Names and whole sizes of the tensors of a sharded checkpoint."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader  # here, as it takes a second

    reader = HuggingFaceStorageReader(str(checkpoint / SHARDS))
    return {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items()}


def fill_from_shards_(tensors: dict[str, Tensor], checkpoint: Path) -> None:
    """Fill whole tensors, or this rank's parts of sharded ones, by name."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        # each rank reads for itself what it needs, so nobody waits for anybody, and that is what it warns of
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint / SHARDS)), no_dist=True)


def read_shards(checkpoint: Path, sections: tuple[str, ...]) -> dict[str, Tensor]:
    """Whole tensors "NAME" of the first of the sections "SECTION.NAME" that the checkpoint has."""
    sizes = shard_sizes(checkpoint)
    section = next((section for section in sections if any(name.startswith(f"{section}.") for name in sizes)), sections[0])
    tensors = {name: torch.empty(size) for name, size in sizes.items() if name.startswith(f"{section}.")}
    fill_from_shards_(tensors, checkpoint)
    return {name.removeprefix(f"{section}."): tensor for name, tensor in tensors.items()}
