"""Encode a folder of images once, so that train.py --token_cache need not run the tokenizer at every step."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from models.tokenizer import VQVAE
from utils import cli, data
from utils.checkpoint import load_tokenizer
from utils.cli import flag, required
from utils.token_cache import CacheWriter, Manifest, fingerprint, write_manifest


@dataclass(frozen=True)
class CacheConfig:
    """Flags of scripts/cache_tokens.py."""

    vae: str = required("tokenizer: released file, directory, or owner/name[:file]")
    data_path: str = required("directory with train/<class>/* and val/<class>/*")
    out: str = required("directory of the cache; a finished cache in it is not touched")
    views: int = flag(1, "random crops per training image; 1 with --center_crop")
    center_crop: bool = flag(False, "cut training images out of the middle too, instead of at random")
    hflip: bool = flag(False, "mirror half of the training views")
    resize: float = flag(1.125, "images are resized to this times their final size, then cropped", "--mid_reso")
    batch: int = flag(128, "images per forward pass")
    workers: int = flag(0, "processes that load images")
    seed: int = flag(0, "of crops and mirroring")

    def __post_init__(self):
        if self.views < 1 or self.batch < 1:
            raise ValueError(f"--views={self.views}, --batch={self.batch}: give at least 1")
        data.check_resize(self.resize)
        if self.views > 1 and self.center_crop and not self.hflip:
            raise ValueError(f"--views={self.views} with --center_crop would repeat the same tokens: give --views=1")


def encode_split(
    tokenizer: VQVAE, images: data.Images, views: int, split: str, out: Path, config: CacheConfig
) -> tuple[int, dict[str, str]]:
    """Write one split, all views of an image behind one another; returns its rows and the hashes of its files."""
    rows = len(images) * views
    device = next(tokenizer.parameters()).device
    writer = CacheWriter(out, split, rows, tokenizer.pyramid.num_tokens)
    batches = [(positions, positions // views) for positions in data.in_order(rows, config.batch)]
    with tqdm(total=rows, unit="image", desc=f"encoding {split}", mininterval=0.2 if sys.stderr.isatty() else 20) as bar:
        loaded = data.batches_at(images, batches, config.workers)
        for (_, source), (pixels, labels) in zip(batches, loaded, strict=True):
            indices = tokenizer.encode(pixels.to(device, non_blocking=True))
            writer.add(torch.cat(indices, dim=1), labels, source)
            bar.update(len(source))
    return rows, writer.close()


def clear_leftovers(out: Path) -> None:
    """Remove what an interrupted run left; ValueError, and nothing removed, where other things lie there."""
    found = list(out.glob("*")) if out.exists() else []
    strangers = [
        path.name for path in found if not re.fullmatch(r"(train|val)_\d{5}_\w+\.npy|\.manifest\.json\.writing", path.name)
    ]
    if strangers:
        raise ValueError(f"{out}: holds {strangers[0]!r}, which is no part of a token cache: give another --out")
    for path in found:
        path.unlink()


def main() -> None:
    config = cli.parse(CacheConfig, __doc__)
    out = Path(config.out)
    if (out / "manifest.json").exists():
        raise ValueError(f"{out}: a finished token cache is there: give another --out or remove it")
    train, val = data.read_folders(config.data_path)
    tokenizer = load_tokenizer(config.vae).to("cuda" if torch.cuda.is_available() else "cpu")
    pixels = tokenizer.config.image_shape[0]
    augment = not config.center_crop
    clear_leftovers(out)
    out.mkdir(parents=True, exist_ok=True)
    rows, hashes = {}, {}
    for split, images, views in (
        ("train", data.Images(train, pixels, config.resize, augment, config.hflip, config.seed), config.views),
        ("val", data.Images(val, pixels, config.resize), 1),
    ):
        rows[split], split_hashes = encode_split(tokenizer, images, views, split, out, config)
        hashes |= split_hashes
    write_manifest(
        out,
        Manifest(
            sides=list(tokenizer.pyramid.sides),
            num_codes=tokenizer.config.num_codes,
            tokenizer=config.vae,
            fingerprint=fingerprint(tokenizer),
            class_names=train.class_names,
            pixels=pixels,
            resize=config.resize,
            augment=augment,
            flip=config.hflip,
            views=config.views,
            rows=rows,
            hashes=hashes,
        ),
    )
    print(f"wrote {rows['train']} + {rows['val']} token pyramids of {tokenizer.pyramid} to {out}")


if __name__ == "__main__":
    cli.run(main)
