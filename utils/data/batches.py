"""Which images or tokens each step and rank gets, a function of (seed, step) alone, and images loaded in that order."""

import atexit
import functools
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.cli import lost_worker
from utils.data.images import Images
from utils.signals import check_stopped, ignore_requests

LOOK_EVERY = 5.0  # seconds, for a request to stop, while a batch is waited for
LONGEST_WAIT = 300.0  # seconds for a batch
STUCK = (
    "the disk may hang, or shared memory (/dev/shm) may be full: give containers more of it (docker --shm-size=8g), "
    "or give --workers=0"
)
MOST_WORKERS = 16  # of one rank, where their number is not given


def _collate(items: list) -> tuple[Tensor, Tensor] | ValueError:
    for item in items:
        if isinstance(item, ValueError):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of all samples in one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(size)


@dataclass(frozen=True)
class TrainOrder:
    """Which samples each step, micro-batch and rank gets: an endless row of permutations, one per epoch, cut into batches.

    size: images in the dataset. batch: of all ranks together. Every rank takes batch / (world * micro_batches) at a time.
    views: encodings stored of every image, one behind another; each epoch takes the next one of all images.
    Independent of the number of ranks: step s always trains on positions s * batch .. (s + 1) * batch of the row.
    """

    # Differs from VAR: no batch is cut short or filled up at the end of an epoch, so steps and epochs need not divide.

    size: int
    batch: int
    seed: int
    rank: int = 0
    world: int = 1
    micro_batches: int = 1
    views: int = 1

    def positions(self, step: int, micro_batch: int) -> np.ndarray:
        share = self.batch // (self.world * self.micro_batches)
        return step * self.batch + (micro_batch * self.world + self.rank) * share + np.arange(share)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The image at each position, or the row of its encoding where there are several views."""
        epochs, offsets = np.divmod(positions, self.size)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            images = permutation(self.seed, int(epoch), self.size)[offsets[chosen]]
            indices[chosen] = images * self.views + epoch % self.views
        return indices

    def micro_batches_from(self, step: int, last_step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, indices) of every micro-batch of this rank, from `step` up to `last_step`."""
        for current in range(step, last_step):
            for micro_batch in range(self.micro_batches):
                positions = self.positions(current, micro_batch)
                yield positions, self.indices(positions)


class _Batches(torch.utils.data.Sampler):
    """Lists of (position, index) for the loader, made as they are needed."""

    def __init__(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]):
        self.batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for positions, indices in self.batches:
            yield list(zip(positions.tolist(), indices.tolist(), strict=True))


def worker_count(workers: int | Literal["auto"]) -> int:
    """Processes that load images for a rank; auto: the cores of this machine shared out over its ranks, less one for each rank.

    Without a GPU auto is none: there the model needs the cores.
    """
    if workers != "auto":
        return workers
    if not torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 0), MOST_WORKERS)


@functools.cache  # once
def _end_workers_at_exit() -> None:
    """Python ends what is left of its workers by SIGTERM, which they ignore, and then waits for them."""

    def kill() -> None:
        for process in multiprocessing.active_children():
            process.kill()

    atexit.register(kill)  # before multiprocessing's own, which was registered earlier


def _leave_signals_to_the_trainer(worker: int) -> None:
    ignore_requests()


def batches_at(
    images: Images, batches: Iterable[tuple[np.ndarray, np.ndarray]], workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images (B, 3, h, w), labels (B,)) for each (positions, indices).

    ValueError names a file that cannot be read, OSError says what became of the workers where no batch comes, and Stopped is
    raised where a stop is requested while one is waited for.
    """
    loader = DataLoader(
        images,
        batch_sampler=_Batches(batches),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or opening a loader would draw from the generator that seeds the training step
        timeout=LOOK_EVERY if workers else 0,
    )
    if workers:
        _end_workers_at_exit()
    loaded, waited = iter(loader), 0.0
    while True:
        try:
            batch = next(loaded)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:  # it went while it was handing over a batch
            raise lost_worker(error) from error
        except RuntimeError as error:
            if "timed out" not in str(error):  # in the words of torch, on which nothing but this depends
                raise lost_worker(error) from error
            waited += LOOK_EVERY
            check_stopped()
            if waited >= LONGEST_WAIT:
                raise OSError(f"no batch of images for {waited:.0f} seconds: {STUCK}") from error
            continue
        if isinstance(batch, ValueError):
            raise batch
        waited = 0.0
        yield batch


def train_batches(
    images: Images, order: TrainOrder, first_step: int, last_step: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every micro-batch of this rank."""
    return batches_at(images, order.micro_batches_from(first_step, last_step), workers)


def val_batches(images: Images, batch: int, rank: int = 0, world: int = 1, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of a split, each image once."""
    return batches_at(images, ((mine, mine) for mine in in_order(len(images), batch, rank, world)), workers)


class Timed:
    """Batches as they come; `seconds` were spent waiting for them so far."""

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]]):
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> "Timed":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        start = time.monotonic()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.monotonic() - start


def in_order(size: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[np.ndarray]:
    """Sample numbers rank, rank + world, ... in batches."""
    mine = np.arange(rank, size, world)
    for start in range(0, len(mine), batch):
        yield mine[start : start + batch]
