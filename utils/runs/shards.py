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
    """Whole tensors "NAME", each of the first of the sections "SECTION.NAME" that has it."""
    sizes = shard_sizes(checkpoint)
    places: dict[str, str] = {}
    for section in reversed(sections):
        places |= {name.removeprefix(f"{section}."): name for name in sizes if name.startswith(f"{section}.")}
    tensors = {place: torch.empty(sizes[place]) for place in places.values()}
    fill_from_shards_(tensors, checkpoint)
    return {name: tensors[place] for name, place in places.items()}
