"""Where a run's batches come from: folders of images, or tokens that were made of them beforehand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from models.pyramid import Pyramid
from models.tokenizer import VQVAE
from utils.data.batches import TrainOrder, train_batches, val_batches
from utils.data.images import Images, Pictures
from utils.data.token_cache import TokenCache, check_cache


class Data(Protocol):
    """Where batches come from: images (B, 3, H, W) in [-1, 1] or tokens (B, L), with labels (B,)."""

    class_names: list[str]
    size: int  # training images
    val_size: int  # held-out images
    views: int  # stored encodings of each
    mend: str  # of batches that come too slowly

    def train_batches(self, order: TrainOrder, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def val_batches(self, batch: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]: ...


class FolderData:
    """Images from folders, to be encoded by a tokenizer as they come.

    train, val: where they are; pixels: their final side; resize: they are resized to this times it, then cropped, of
    the training half at random; flip: half of these are mirrored; workers: processes that load them; background: what shows
    through transparent ones.
    """

    views = 1
    mend = "give more --workers, or let a transformer train on tokens made once (scripts/cache_tokens.py)"

    def __init__(
        self, train: Pictures, val: Pictures, pixels: int, resize: float, flip: bool, seed: int, workers: int, background: str
    ):
        self.class_names, self.size, self.val_size = train.class_names, len(train), len(val)
        self.pixels, self.resize, self.workers = pixels, resize, workers
        self.train = Images(train, pixels, resize, augment=True, flip=flip, seed=seed, background=background)
        self.val = Images(val, pixels, resize, background=background)

    def train_batches(self, order: TrainOrder, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        return train_batches(self.train, order, first_step, last_step, self.workers)

    def val_batches(self, batch: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        return val_batches(self.val, batch, rank, world, self.workers)


class CachedData:
    """Tokens made beforehand by scripts/cache_tokens.py.

    tokenizer: the one that they were made with. ValueError for another one, or for another pyramid than is wanted.
    """

    mend = "put the cache on a faster disk"

    def __init__(self, directory: str | Path, tokenizer: VQVAE, wanted: Pyramid | None = None):
        self.train, self.val = (TokenCache(directory, split) for split in ("train", "val"))
        manifest = self.train.manifest
        if wanted not in (None, manifest.pyramid):
            raise ValueError(
                f"--pn={wanted}: the cache {directory} holds pyramids {manifest.pyramid}: "
                f"give --pn={manifest.pyramid} or encode again"
            )
        check_cache(manifest, tokenizer, directory)
        self.class_names, self.views, self.resize = manifest.class_names, manifest.views, manifest.resize
        self.size, self.val_size = len(self.train) // self.views, len(self.val)

    def verify(self) -> None:
        """ValueError where a file of the cache is not what was written; reading all of it also brings it into memory."""
        for split in (self.train, self.val):
            split.verify()

    def train_batches(self, order: TrainOrder, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.train.train_batches(order, first_step, last_step)

    def val_batches(self, batch: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.val.val_batches(batch, rank, world)
