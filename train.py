"""Train a transformer on the tokens of a frozen tokenizer: python train.py, or torchrun --nproc_per_node=N train.py.

Flags are those of the released VAR and M-VAR trainers (--help explains each). The same command resumes a run that was killed.

The recipe is VAR's (arXiv 2404.02905, appendix, and the released trainers of VAR and M-VAR): AdamW, mean cross-entropy over all
tokens, class dropout for guidance, fp16 with loss scaling.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

from dist import Ranks, process_group
from models.adapters import Base, add_adapters_, shared_with
from models.inheritance import inherit_, table
from models.parts import train_only_
from models.pyramid import Pyramid
from models.storage import weights_hash
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from trainer import Trainer
from utils import cli
from utils.checkpoint import find_beside, load_fitting_tokenizer, load_tokenizer_for, load_transformer
from utils.data.images import Pictures, listing_hash
from utils.data.pictures import background_colour
from utils.data.sources import CachedData, FolderData
from utils.data.token_cache import is_of, read_manifest
from utils.files import check_folder
from utils.metrics.fidelity import Fidelity
from utils.runs.checkpoints import latest_checkpoint
from utils.runs.config import RELEASED_TOKENIZER, TrainConfig
from utils.runs.listing import RECORD, check_images, images_of
from utils.runs.resume import chosen_seed
from utils.runs.task import RunConfig
from utils.sampling.flags import read_sampling
from utils.tasks.alignment import ConditionAlignment
from utils.tasks.next_scale import NextScalePrediction

HUB_TOKENIZER = f"FoundationVision/var:{RELEASED_TOKENIZER}"
VALIDATION_EPOCHS = 10  # the released trainers validate and save this often
TASKS = {"likelihood": NextScalePrediction, "cca": ConditionAlignment}  # by --objective


def tokenizer_source(config: TrainConfig) -> str:
    """--vae, or the cache's tokenizer, or the released one from here or the hub."""
    if config.vae:
        return config.vae
    if config.token_cache:
        return find_beside(read_manifest(config.token_cache).tokenizer, config.token_cache)
    return RELEASED_TOKENIZER if Path(RELEASED_TOKENIZER).exists() else HUB_TOKENIZER


def tokenizer_of(config: TrainConfig) -> VQVAE:
    """From `tokenizer_source`. FileNotFoundError or ValueError where it cannot be had, or is of another pyramid than --pn."""
    source = tokenizer_source(config)
    try:
        if config.token_cache and not config.pn:
            return load_tokenizer_for(source, read_manifest(config.token_cache).pyramid)
        return load_fitting_tokenizer(source, config.pn)
    except FileNotFoundError as error:
        if config.vae or not config.token_cache:
            raise
        raise FileNotFoundError(
            f"{config.token_cache} names its tokenizer {source}, which cannot be had: give --vae ({error})"
        ) from error


def build_data(config: TrainConfig, tokenizer: VQVAE, images: tuple[Pictures, Pictures] | None) -> FolderData | CachedData:
    """Images, to train on and held out, or the tokens that the flags name. ValueError where they do not fit the tokenizer."""
    if config.token_cache:
        return CachedData(config.token_cache, tokenizer, Pyramid.parse(config.pn) if config.pn else None)
    height, width = tokenizer.config.image_shape
    if height != width:
        raise ValueError(f"pyramid {tokenizer.pyramid}: training from folders needs square images")
    how = height, config.mid_reso, config.hflip, config.seed, config.workers, config.background
    return FolderData(*images, *how)


def build_fidelity(
    config: TrainConfig,
    tokenizer: VQVAE,
    source: FolderData | CachedData,
    images: tuple[Pictures, Pictures],
    ranks: Ranks,
) -> Fidelity:
    """For --val_fd."""
    how = tokenizer.config.image_shape[0], source.resize, config.workers, ranks, config.background
    drawing = read_sampling(config.val_drawing)
    drawing.guided(tokenizer.pyramid.num_scales)
    return Fidelity(*images, config.val_fd, *how, drawing)


def check_images_of_cache(config: TrainConfig, train: Pictures, val: Pictures, ranks: Ranks) -> None:
    """ValueError unless the images beside a token cache are those that it was made from, on the same background."""
    manifest = read_manifest(config.token_cache)
    given, cache = f"--data_path={config.data_path}", f"the token cache {config.token_cache}"
    if train.class_names != manifest.class_names:
        raise ValueError(f"{given}: its classes are not those of {cache}: give the images that it was made from, or --val_fd=0")
    if ranks.once(lambda: listing_hash(train, val)) != manifest.listing:
        counts = f"{manifest.rows['train'] // manifest.views:,} + {manifest.rows['val']:,}"
        raise ValueError(
            f"{given}: its {len(train):,} + {len(val):,} images are not the {counts} of {cache}: give those that it was made "
            "from, with the same --val_share and --skip_bad, or --val_fd=0"
        )
    if background_colour(config.background) != background_colour(manifest.background):
        raise ValueError(
            f"--background={config.background}: {cache} was made with another: give --background={manifest.background}"
        )


def start_from_(
    transformer: ScaleTransformer, config: TrainConfig, tokenizer: VQVAE, class_names: list[str], ranks: Ranks
) -> tuple[list[str], Base | None]:
    """Take the weights of --init_from, unless the run has a checkpoint, which then counts.

    Returns what is to be told, and of --lora what its adapters are beside.
    """
    begun = ranks.is_main and latest_checkpoint(Path(config.local_out_dir_path)) is not None
    is_whole = config.objective == "likelihood" and not config.lora  # others have them as a reference, or beside them
    if not config.init_from or (ranks.largest(int(begun)) and is_whole):
        return [], None
    source = load_transformer(config.init_from)
    description = source.description
    if config.objective == "cca" and source.config.blocks != transformer.config.blocks:
        raise ValueError(
            f"--init_from={config.init_from}: is of other blocks: --objective=cca aligns a transformer as it is: "
            f"give its --family ({', '.join(dict.fromkeys(source.config.blocks))}) and --global_blocks"
        )
    rows = inherit_(transformer, source, class_names, description.class_names, f"--init_from={config.init_from}")
    lines = [f"weights from {config.init_from}, {source.facts().title}:", *table(rows)]
    if description.tokenizer_hash is None:
        lines.append("it does not say of which tokenizer its tokens are: they mean the same only where that is the one given")
    elif not is_of(description.tokenizer_hash, tokenizer):
        if config.objective == "cca":
            raise ValueError(f"--init_from={config.init_from}: is of another tokenizer: --objective=cca needs its own as --vae")
        lines.append("its tokens are of another tokenizer than the one given: what it knows of codes does not hold here")
    base = Base(config.init_from, weights_hash(source), shared_with(transformer, source)) if config.lora else None
    return lines, base


def choose_parts_(transformer: ScaleTransformer, config: TrainConfig) -> list[str]:
    """For --lora and --train_only; what is to be told of them."""
    trained = []
    try:
        if config.lora:
            where = f"--lora_parts={config.lora_parts}" if config.lora_parts else f"--lora={config.lora}"
            count = add_adapters_(transformer, config.lora, config.lora_alpha or config.lora, names_in(config.lora_parts))
            trained.append(f"adapters of rank {config.lora} beside {count} layers")
        if config.train_only:
            where = f"--train_only={config.train_only}"
            train_only_(transformer, names_in(config.train_only))
            trained.append(config.train_only)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not trained:
        return []
    count = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    return [f"trained: {' and '.join(trained)}, {count / 1e6:.2f}M parameters; all others stay as they are"]


def check_classes_differ(transformer: ScaleTransformer, config: TrainConfig, class_names: list[str]) -> None:
    """ValueError where classes start alike, as --init_from does not know them, and nothing could tell them apart."""
    embedding = transformer.class_embed.weight
    if not config.init_from or (embedding.requires_grad and config.objective != "cca"):
        return
    _, group, counts = embedding[:-1].detach().unique(dim=0, return_inverse=True, return_counts=True)
    alike = [class_names[label] for label in (counts[group] > 1).nonzero().flatten().tolist()]
    if alike:
        mend = (
            "--objective=cca aligns what a transformer knows: train it on them first"
            if config.objective == "cca"
            else f"embeddings have to be trained: give --train_only={','.join(filter(None, [config.train_only, 'embeddings']))}"
        )
        raise ValueError(f"--init_from={config.init_from}: does not know the classes {alike[0]!r} and {alike[1]!r}: {mend}")


def names_in(text: str) -> list[str]:
    """'head, mamba' -> ['head', 'mamba']"""
    return [name.strip() for name in text.split(",")] if text else []


def run_config(config: TrainConfig, size: int) -> RunConfig:
    """What the loop is told; size: training images."""
    steps_per_epoch = math.ceil(size / config.bs)
    total_steps = config.max_steps or math.ceil(config.ep * steps_per_epoch)
    return RunConfig(
        directory=Path(config.local_out_dir_path),
        seed=config.seed,
        batch=config.bs,
        micro_batches=config.ac,
        total_steps=total_steps,
        schedule_steps=total_steps - 1,  # as released: the last step has the last rate
        max_minutes=config.max_minutes,
        val_every=config.val_every or VALIDATION_EPOCHS * steps_per_epoch,
        save_every=config.save_every or steps_per_epoch,
        log_every=config.log_every,
        keep=config.keep,
        ema=config.ema,
        fp16=config.fp16,
        max_bad_steps=config.max_bad_steps,
        sharded=config.parallel == "fsdp",
        rate_flag="--tblr",
    )


def build_trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    """Everything that the flags ask for, loaded, checked and initialised."""
    config.rank_batch(ranks.world)
    check_folder(config.local_out_dir_path, "--local_out_dir_path")
    needs_images = not config.token_cache or config.val_fd
    if needs_images:
        check_images(config)
    seed = chosen_seed(config.seed, Path(config.local_out_dir_path), ranks)
    tokenizer = tokenizer_of(config)
    config = replace(config, seed=seed, vae=tokenizer_source(config))
    images, told = None, []
    if needs_images:
        *images, told = images_of(config, ranks, Path(config.local_out_dir_path) / RECORD)
    source = build_data(config, tokenizer, images)
    if config.token_cache and config.val_fd:
        check_images_of_cache(config, *images, ranks)
    if config.token_cache and ranks.is_main:
        source.verify()
    torch.manual_seed(config.seed)
    transformer = ScaleTransformer(config.transformer_config(tokenizer.config, len(source.class_names)))
    std = None if config.ini < 0 else config.ini
    transformer.init_weights(config.alng, config.aln, config.hd, std, config.alng if config.alng_all else config.aln)
    of_start, base = start_from_(transformer, config, tokenizer, source.class_names, ranks)
    told = [*told, *of_start, *choose_parts_(transformer, config)]
    check_classes_differ(transformer, config, source.class_names)
    fidelity = build_fidelity(config, tokenizer, source, images, ranks) if config.val_fd else None
    task = TASKS[config.objective](config, transformer, tokenizer, source, ranks, fidelity, told, base)
    return Trainer(task, run_config(config, source.size), ranks)


def main() -> None:
    config = cli.parse(TrainConfig, __doc__)
    with process_group() as ranks:
        build_trainer(config, ranks).fit()


if __name__ == "__main__":
    cli.run(main)
