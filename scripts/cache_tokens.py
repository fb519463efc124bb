"""Encode a folder of images once, so that train.py --token_cache need not run the tokenizer at every step.

Under torchrun all ranks share the work. The same command, with any number of ranks, resumes a run that was killed.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from dist import Ranks, process_group
from models.precision import PRECISIONS, tokenizer_in, told_of_tokens
from models.tokenizer import VQVAE
from utils import cli
from utils.checkpoint import load_fitting_tokenizer
from utils.cli import flag, required
from utils.data import token_cache
from utils.data.batches import batches_at, val_batches, worker_count
from utils.data.hub_sets import DATA_PATH_HELP, IMAGE_COLUMN_HELP, LABEL_COLUMN_HELP
from utils.data.images import Images, Pictures, check_resize, listing_hash
from utils.data.layouts import VAL_SHARE_HELP, check_share
from utils.data.pictures import BACKGROUND_HELP, WHITE, background_colour
from utils.data.token_cache import ARRAYS, CacheShard, Plan
from utils.files import check_folder
from utils.runs.listing import MAX_HELP, RECORD, SKIP_HELP, check_max_bad, images_of

COMPARED_IMAGES = 16  # of which it is told how many tokens another precision changes


@dataclass(frozen=True)
class CacheConfig:
    """Flags of scripts/cache_tokens.py."""

    vae: str = required("tokenizer: released file, directory, or owner/name[:file]")
    data_path: str = required(DATA_PATH_HELP)
    out: str = required("directory of the cache; an unfinished one is resumed, a finished one not touched")
    image_column: str = flag("", IMAGE_COLUMN_HELP)
    label_column: str = flag("", LABEL_COLUMN_HELP)
    val_share: float = flag(0.0, VAL_SHARE_HELP)
    skip_bad: bool = flag(False, SKIP_HELP)
    max_bad: float = flag(0.001, MAX_HELP)
    pn: str = flag("", "pyramid: 256, 512, 1024 or sides such as 1_2_3_4; empty: the tokenizer's", "--pyramid")
    views: int = flag(1, "random crops per training image; 1 with --center_crop")
    center_crop: bool = flag(False, "cut training images out of the middle too, instead of at random")
    hflip: bool = flag(False, "mirror half of the training views")
    resize: float = flag(1.125, "images are resized to this times their final size, then cropped", "--mid_reso")
    batch: int = flag(128, "images per forward pass, per rank")
    background: str = flag(WHITE, BACKGROUND_HELP)
    workers: int | Literal["auto"] = flag("auto", "processes that load images, per rank; 0: none; auto: one less than cores")
    precision: str = flag("float32", "of the tokenizer's encoder; others change tokens, how many is told", choices=PRECISIONS)
    seed: int = flag(0, "of crops and mirroring")

    def __post_init__(self):
        object.__setattr__(self, "workers", worker_count(self.workers))
        background_colour(self.background)
        check_share(self.val_share)
        check_max_bad(self.max_bad)
        if self.views < 1 or self.batch < 1:
            raise ValueError(f"--views={self.views}, --batch={self.batch}: give at least 1")
        if self.workers < 0 or self.seed < 0:
            raise ValueError(f"--workers={self.workers}, --seed={self.seed}: give 0 or more")
        check_resize(self.resize)
        if self.views > 1 and self.center_crop and not self.hflip:
            raise ValueError(f"--views={self.views} with --center_crop would repeat the same tokens: give --views=1")


def make_plan(config: CacheConfig, tokenizer: VQVAE, train: Pictures, val: Pictures) -> Plan:
    """What this command would write. ValueError for a tokenizer whose tokens or images do not fit."""
    height, width = tokenizer.config.image_shape
    if height != width:
        raise ValueError(f"pyramid {tokenizer.pyramid}: encoding from folders needs square images")
    if tokenizer.config.num_codes > 1 << 16:
        raise ValueError(f"{config.vae}: {tokenizer.config.num_codes} codes do not fit into 16 bits: give another tokenizer")
    rows = {"train": len(train) * config.views, "val": len(val)}
    return Plan(
        sides=[side if isinstance(side, int) else list(side) for side in tokenizer.pyramid.sides],  # as JSON gives them back
        num_codes=tokenizer.config.num_codes,
        tokenizer=config.vae,
        fingerprint=token_cache.fingerprint(tokenizer),
        class_names=train.class_names,
        pixels=height,
        resize=config.resize,
        augment=not config.center_crop,
        flip=config.hflip,
        views=config.views,
        seed=config.seed,
        rows=rows,
        rows_per_shard={split: token_cache.rows_per_shard(count) for split, count in rows.items()},
        listing=listing_hash(train, val),
        precision=config.precision,
        background=config.background,
    )


def check_directory(out: Path, plan: Plan) -> None:
    """Look only: ValueError where `out` holds a cache begun with other settings, or things that are no part of one."""
    token_cache.check_plan(out, plan)
    shards = plan.shards(*token_cache.SPLITS) if (out / "plan.json").exists() else []  # without it they may be of anything
    ours = {"plan.json", *(shard.file(array) for shard in shards for array in ARRAYS)}
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    strangers = [name for name in found if name not in ours and not token_cache.UNFINISHED.fullmatch(name)]
    if strangers:
        raise ValueError(
            f"{out}: holds {strangers[0]!r}, which is no part of a token cache that can be resumed: give another --out"
        )


def check_room(out: Path, plan: Plan, shards: list[CacheShard]) -> None:
    """OSError, naming needed and free bytes, where these shards do not fit on the disk."""
    needed = sum(token_cache.array_bytes(count_rows(shards), 1, plan.pyramid.num_tokens).values())
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(f"{out}: {needed:,} bytes are still to be written, the disk has {free:,} free: make room there")


def begin(out: Path, plan: Plan) -> None:
    """Note the plan, before the first shard; remove what a killed run had not finished writing."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(".*.writing"):
        path.unlink()
    token_cache.write_plan(out, plan)


def encode_shards(
    tokenizer: VQVAE, images: Images, views: int, shards: list[CacheShard], out: Path, config: CacheConfig
) -> Iterator[int]:
    """Write these shards of one split, all views of an image behind one another; yields the images of every batch.

    ValueError, and no shard of them, where images have features that are not finite.
    """
    device = next(tokenizer.parameters()).device
    # batches end where shards end, so that what is computed together does not depend on who computes it
    batches = ((positions, positions // views) for shard in shards for positions in shard.batches(config.batch))
    loaded = batches_at(images, batches, config.workers)
    for shard in shards:
        parts = []
        for positions in shard.batches(config.batch):
            pixels, labels = next(loaded)
            indices, finite = tokenizer.encode_checked(pixels.to(device, non_blocking=True))
            tokens = torch.cat(indices, dim=1).cpu().numpy().astype(np.uint16)  # (B, L)
            if not finite:  # after the tokens, which have been waited for
                mend = "another tokenizer, as this is damaged" if config.precision == "float32" else "float32"
                raise ValueError(
                    f"--precision={config.precision}: features of images are not finite, so they have no tokens: give {mend}"
                )
            parts.append((tokens, labels.numpy(), positions // views))
            yield len(positions)
        arrays = map(np.concatenate, zip(*parts, strict=True))
        token_cache.write_shard(out, shard, dict(zip(ARRAYS, arrays, strict=True)))


def encode(config: CacheConfig, ranks: Ranks) -> None:
    """Encode what is missing, this rank its share of it; the main rank finishes the cache."""
    out = Path(config.out)
    check_folder(out, "--out")
    if (out / "manifest.json").exists():
        raise ValueError(f"{out}: a finished token cache is there: give another --out or remove it")
    # beside the cache, in which nothing else may be
    train, val, told = images_of(config, ranks, out.with_name(f"{out.name}.{RECORD}"))
    if ranks.is_main:
        print("\n".join(told))
    tokenizer = load_fitting_tokenizer(config.vae, config.pn).to(ranks.device)
    plan = make_plan(config, tokenizer, train, val)
    # every rank looks, and so stops with the same error, before any of them writes
    check_directory(out, plan)
    missing = token_cache.missing_shards(out, plan)
    check_room(out, plan, missing)
    ranks.barrier()
    if ranks.is_main:
        begin(out, plan)
    # what the main rank sees missing: on a network disk others may still see less, and shards would be left to nobody
    everything = plan.shards(*token_cache.SPLITS)
    missing = [everything[i] for i in ranks.numbers_from_main([everything.index(shard) for shard in missing])]

    splits = {
        "train": (Images(train, plan.pixels, plan.resize, plan.augment, plan.flip, plan.seed, plan.background), plan.views),
        "val": (Images(val, plan.pixels, plan.resize, background=plan.background), 1),
    }
    narrow = tokenizer_in(tokenizer, config.precision)
    if config.precision != "float32" and ranks.is_main:
        images, _ = next(val_batches(splits["val"][0], COMPARED_IMAGES))
        print(told_of_tokens(config.precision, tokenizer, narrow, images.to(ranks.device)))
    mine = missing[ranks.rank :: ranks.world]
    total, left, share = sum(plan.rows.values()), count_rows(missing), count_rows(mine)
    interval = 0.2 if sys.stderr.isatty() else 20
    with tqdm(
        total=total, initial=total - left, unit="image", desc="encoding", mininterval=interval, disable=not ranks.is_main
    ) as bar:
        done = 0
        for split, (images, views) in splits.items():
            shards = [shard for shard in mine if shard.split == split]
            for count in encode_shards(narrow, images, views, shards, out, config):
                done += count
                # images of all ranks, the others taken to be as far as this one
                bar.update(total - left + round(left * done / share) - bar.n)
    # Ranks wait for files, not in a collective: those time out, and one rank may be a shard behind the others.
    if ranks.is_main:
        wait_until(lambda: not token_cache.missing_shards(out, plan))
        token_cache.write_manifest(out, plan)
        print(f"wrote {plan.rows['train']} + {plan.rows['val']} token pyramids of {plan.pyramid} to {out}")
    else:
        wait_until((out / "manifest.json").exists)


def count_rows(shards: list[CacheShard]) -> int:
    return sum(len(shard.rows) for shard in shards)


def wait_until(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.2)


def main() -> None:
    config = cli.parse(CacheConfig, __doc__)
    with process_group() as ranks:
        encode(config, ranks)


if __name__ == "__main__":
    cli.run(main)
