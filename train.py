"""Train a transformer on the tokens of a frozen tokenizer: python train.py, or torchrun --nproc_per_node=N train.py.

Flags are those of the released VAR and M-VAR trainers (--help explains each). The same command resumes a run that was killed.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dist import Ranks, process_group
from fidelity import Fidelity
from models.pyramid import Pyramid
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from resume import with_seed
from trainer import Trainer
from utils import cli, data
from utils.checkpoint import load_fitting_tokenizer, load_tokenizer_for
from utils.data import Images, TrainOrder
from utils.recipe import RELEASED_TOKENIZER, TrainConfig
from utils.token_cache import TokenCache, check_cache, read_manifest

HUB_TOKENIZER = f"FoundationVision/var:{RELEASED_TOKENIZER}"


class FolderData:
    """Images from folders, encoded by the tokenizer as they come."""

    views = 1

    def __init__(self, config: TrainConfig, tokenizer: VQVAE):
        train, val = data.read_folders(config.data_path)
        height, width = tokenizer.config.image_shape
        if height != width:
            raise ValueError(f"pyramid {tokenizer.pyramid}: training from folders needs square images")
        self.class_names, self.size, self.val_size = train.class_names, len(train.paths), len(val.paths)
        self.resize = config.mid_reso
        self.workers = config.workers
        self.train = Images(train, height, config.mid_reso, augment=True, flip=config.hflip, seed=config.seed)
        self.val = Images(val, height, config.mid_reso)

    def train_batches(self, order: TrainOrder, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        return data.train_batches(self.train, order, first_step, last_step, self.workers)

    def val_batches(self, batch: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        return data.val_batches(self.val, batch, rank, world, self.workers)


class CachedData:
    """Tokens made beforehand by scripts/cache_tokens.py."""

    def __init__(self, config: TrainConfig, tokenizer: VQVAE):
        self.train, self.val = (TokenCache(config.token_cache, split) for split in ("train", "val"))
        manifest = self.train.manifest
        if config.pn and Pyramid.parse(config.pn) != manifest.pyramid:
            raise ValueError(
                f"--pn={config.pn}: the cache {config.token_cache} holds pyramids {manifest.pyramid}: "
                f"give --pn={manifest.pyramid} or encode again"
            )
        check_cache(manifest, tokenizer, config.token_cache)
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


def tokenizer_source(config: TrainConfig) -> str:
    """--vae, or the cache's tokenizer, or the released one from here or the hub."""
    if config.vae:
        return config.vae
    if config.token_cache:
        return read_manifest(config.token_cache).tokenizer
    return RELEASED_TOKENIZER if Path(RELEASED_TOKENIZER).exists() else HUB_TOKENIZER


def build_trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    """Everything that the flags ask for, loaded, checked and initialised."""
    config.rank_batch(ranks.world)
    if not config.token_cache or config.val_fd:
        data.check_root(config.data_path)
    config = replace(with_seed(config, ranks), vae=tokenizer_source(config))
    if config.token_cache and not config.pn:
        tokenizer = load_tokenizer_for(config.vae, read_manifest(config.token_cache).pyramid)
    else:
        tokenizer = load_fitting_tokenizer(config.vae, config.pn)
    source = CachedData(config, tokenizer) if config.token_cache else FolderData(config, tokenizer)
    if config.token_cache and ranks.is_main:
        source.verify()
    torch.manual_seed(config.seed)
    transformer = ScaleTransformer(config.transformer_config(tokenizer, len(source.class_names)))
    std = None if config.ini < 0 else config.ini
    transformer.init_weights(config.alng, config.aln, config.hd, std, config.alng if config.alng_all else config.aln)
    fidelity = build_fidelity(config, tokenizer, source, ranks) if config.val_fd else None
    return Trainer(config, transformer, tokenizer, source, ranks, fidelity)


def build_fidelity(config: TrainConfig, tokenizer: VQVAE, source: FolderData | CachedData, ranks: Ranks) -> Fidelity:
    """For --val_fd."""
    fidelity = Fidelity(config.data_path, config.val_fd, tokenizer.config.image_shape[0], source.resize, config.workers, ranks)
    if fidelity.train.class_names != source.class_names:
        raise ValueError(
            f"--data_path={config.data_path}: its classes are not those of the token cache {config.token_cache}: "
            "give the images that it was made from, or --val_fd=0"
        )
    return fidelity


def main() -> None:
    config = cli.parse(TrainConfig, __doc__)
    with process_group() as ranks:
        build_trainer(config, ranks).fit()


if __name__ == "__main__":
    cli.run(main)
