"""Train a transformer on the tokens of a frozen tokenizer: python train.py, or torchrun --nproc_per_node=N train.py.

Flags are those of the released VAR and M-VAR trainers (--help explains each). The same command resumes a run that was killed.
"""

from dataclasses import replace
from pathlib import Path

import torch

from dist import Ranks, process_group
from models.pyramid import Pyramid
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from trainer import Trainer
from utils import cli
from utils.checkpoint import load_fitting_tokenizer, load_tokenizer_for
from utils.data.images import check_root
from utils.data.sources import CachedData, FolderData
from utils.data.token_cache import read_manifest
from utils.metrics.fidelity import Fidelity
from utils.runs.config import RELEASED_TOKENIZER, TrainConfig
from utils.runs.resume import with_seed

HUB_TOKENIZER = f"FoundationVision/var:{RELEASED_TOKENIZER}"


def tokenizer_source(config: TrainConfig) -> str:
    """--vae, or the cache's tokenizer, or the released one from here or the hub."""
    if config.vae:
        return config.vae
    if config.token_cache:
        return read_manifest(config.token_cache).tokenizer
    return RELEASED_TOKENIZER if Path(RELEASED_TOKENIZER).exists() else HUB_TOKENIZER


def build_data(config: TrainConfig, tokenizer: VQVAE) -> FolderData | CachedData:
    """The images or tokens that the flags name. ValueError where they do not fit the tokenizer."""
    if config.token_cache:
        return CachedData(config.token_cache, tokenizer, Pyramid.parse(config.pn) if config.pn else None)
    height, width = tokenizer.config.image_shape
    if height != width:
        raise ValueError(f"pyramid {tokenizer.pyramid}: training from folders needs square images")
    return FolderData(config.data_path, height, config.mid_reso, config.hflip, config.seed, config.workers)


def build_trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    """Everything that the flags ask for, loaded, checked and initialised."""
    config.rank_batch(ranks.world)
    if not config.token_cache or config.val_fd:
        check_root(config.data_path)
    config = replace(with_seed(config, ranks), vae=tokenizer_source(config))
    if config.token_cache and not config.pn:
        tokenizer = load_tokenizer_for(config.vae, read_manifest(config.token_cache).pyramid)
    else:
        tokenizer = load_fitting_tokenizer(config.vae, config.pn)
    source = build_data(config, tokenizer)
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
