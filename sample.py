"""Generate images: a labelled grid, a picture of the scales building up, a folder of PNG, or an .npz for evaluation.

The transformer and its tokenizer may be ours or released ones. Every batch has random numbers of its own: the same command with
the same seed and batch size gives the same images, and no two batches are alike.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from models.generate import Generation, draw_labels, generate
from models.ssm import SCANS, choose_scan_
from models.tokenizer import VQVAE
from models.transformer import FAMILIES, ScaleTransformer
from utils import cli, plots
from utils.checkpoint import load_description, load_tokenizer_for, load_transformer
from utils.cli import flag, required

PRESETS = {
    "fid": {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "smooth": False},
    "visual": {"cfg": 4.0, "top_k": 900, "top_p": 0.95, "smooth": True},
}
GRID_COLUMNS = 8
DEFAULT_CLASSES = 10  # rows of a grid where neither --classes nor --num says otherwise


@dataclass(frozen=True)
class SampleConfig:
    """Flags of sample.py."""

    ckpt: str = required("transformer: released file, run or checkpoint directory, or owner/name[:file]")
    out: str = required("picture, directory (png) or file (npz) to write")
    vae: str = flag("", "tokenizer, likewise; empty: the one the checkpoint names")
    family: str = flag("", "needed for released MVAR weights: markov", choices=("", *FAMILIES))
    format: str = flag("grid", "what to write", choices=("grid", "scales", "png", "npz"))
    classes: str = flag(
        "", "labels, such as 0,3,7, or class names, in quotes where they hold a comma; none: no class; random: drawn"
    )
    num: int = flag(0, "images in all, spread evenly over the classes; 0: a row per class of a grid, one of scales")
    seed: int = flag(0, "of the sampling")
    preset: str = flag("fid", "cfg, top_k, top_p and smooth at once; flags given beside it win", choices=tuple(PRESETS))
    cfg: float | None = flag(None, "guidance scale, 0 for none")
    top_k: int | None = flag(None, "keep the so many likeliest codes, 0: all")
    top_p: float | None = flag(None, "of those keep the likeliest with this mass, 0: all")
    smooth: bool | None = flag(None, "mix codes by Gumbel-softmax: for pictures only")
    batch: int = flag(32, "images at a time")
    scan_backend: str = flag("torch", "how Mamba-2 is computed; mamba_ssm needs a GPU", choices=tuple(SCANS))
    ema: bool = flag(True, "use the averaged weights of our checkpoints")
    overwrite: bool = flag(False, "replace what is at --out")

    def __post_init__(self):
        if self.batch < 1 or self.num < 0:
            raise ValueError(f"--batch={self.batch}, --num={self.num}: give at least 1 image at a time and 0 or more in all")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


def parse_classes(text: str, class_names: list[str], num_classes: int) -> list[int]:
    """'0,3,Bag' -> [0, 3, 8]; a number is a label even where a class has it for a name. ValueError for an unknown class."""
    labels = []
    for name in [text] if text in class_names else next(csv.reader([text], skipinitialspace=True)):
        if name == "none":
            labels.append(num_classes)
        elif name.isdigit() and int(name) < num_classes:
            labels.append(int(name))
        elif name in class_names:
            labels.append(class_names.index(name))
        else:
            known = f", or names such as {class_names[0]!r}" if class_names else ""
            raise ValueError(f"--classes: no class {name!r}: give numbers from 0 to {num_classes - 1}{known}")
    return labels


def all_labels(config: SampleConfig, classes: list[int], num_classes: int) -> list[int]:
    """The label of every image, class after class."""
    per_class = GRID_COLUMNS if config.format == "grid" else 1
    num = config.num or per_class * len(classes)
    if config.classes == "random":
        return sorted(draw_labels(num_classes, num, torch.Generator().manual_seed(config.seed)).tolist())
    return [classes[n * len(classes) // num] for n in range(num)]


def sample_batches(
    transformer: ScaleTransformer, tokenizer: VQVAE, labels: list[int], config: SampleConfig
) -> Iterator[Generation]:
    """Batches of images in the order of the labels; every batch has random numbers of its own."""
    device = next(transformer.parameters()).device
    for number, start in enumerate(range(0, len(labels), config.batch)):
        seed = int(np.random.SeedSequence((config.seed, number)).generate_state(1, np.uint64)[0] >> 1)
        yield generate(
            transformer,
            tokenizer,
            torch.tensor(labels[start : start + config.batch], device=device),
            guidance_scale=config.cfg,
            top_k=config.top_k,
            top_p=config.top_p,
            smooth=config.smooth,
            generator=torch.Generator(device).manual_seed(seed),
        )


def scale_pictures(tokenizer: VQVAE, generation: Generation) -> np.ndarray:
    """The images from the first scale, the first two, ..., (B, K, H, W, 3) uint8."""
    # from the sums, not the indices: in smooth mode those were drawn but not used
    steps = torch.stack([tokenizer.decode_features(f_hat) for f_hat in generation.sums], dim=1)  # (B, K, 3, H, W)
    return plots.to_uint8((steps.flatten(0, 1) + 1) / 2).reshape(*steps.shape[:2], *steps.shape[3:], 3)


def write_grid(out: Path, images: np.ndarray, labels: list[int], names: list[str]) -> None:
    """One row per class, its name beside it."""
    rows = {label: images[np.array(labels) == label] for label in dict.fromkeys(labels)}
    plots.grid(list(rows.values()), [names[label] for label in rows]).save(out)


def write_scales(out: Path, pictures: np.ndarray, labels: list[int], names: list[str], tokenizer: VQVAE) -> None:
    """One row per image: how it looks after each scale."""
    heads = [f"{height}x{width}" for height, width in tokenizer.pyramid.shapes]
    plots.grid(list(pictures), [names[label] for label in labels], heads).save(out)


def write_npz(out: Path, images: np.ndarray, labels: list[int], config: SampleConfig) -> None:
    """arr_0 (N, H, W, 3) uint8 and labels, as the field's evaluators read them, and the settings; renamed when whole."""
    aside = out.with_name(f".{out.name}.writing.npz")
    np.savez(aside, arr_0=images, labels=np.array(labels, np.int64), settings=np.array(json.dumps(asdict(config))))
    os.replace(aside, out)


def check_out(out: Path, config: SampleConfig) -> None:
    """ValueError before anything is computed where the result could not be written."""
    if config.format in ("grid", "scales") and out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{out}: --format={config.format} writes a picture: give a name that ends in .png")
    if config.format != "png" and out.is_dir():
        raise ValueError(f"{out}: is a directory, --format={config.format} writes one file: give its name")
    if not config.overwrite and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise ValueError(f"{out}: is there already: give another --out, or --overwrite")


def main() -> None:
    config = cli.parse(SampleConfig, __doc__)
    out = Path(config.out)
    check_out(out, config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sample.py does not share out its images over ranks yet: run it without torchrun")
    transformer = load_transformer(config.ckpt, config.family or None, config.ema)
    choose_scan_(transformer, config.scan_backend)
    description = load_description(config.ckpt)
    source = config.vae or (description.tokenizer if description else None)
    if not source:
        raise ValueError(f"{config.ckpt}: does not name its tokenizer: give --vae")
    tokenizer = load_tokenizer_for(source, transformer.pyramid)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformer.to(device), tokenizer.to(device)

    num_classes = transformer.config.num_classes
    class_names = description.class_names if description else []
    names = [*(class_names or [str(label) for label in range(num_classes)]), "none"]
    if config.classes and config.classes != "random":
        classes = parse_classes(config.classes, class_names, num_classes)
    else:
        classes = list(range(num_classes if config.format in ("png", "npz") else min(num_classes, DEFAULT_CLASSES)))
    labels = all_labels(config, classes, num_classes)

    out.parent.mkdir(parents=True, exist_ok=True)
    if config.format == "png":
        out.mkdir(exist_ok=True)
        for old in out.glob("[0-9]*_class*.png"):  # with --overwrite: no image of an earlier command may stay
            old.unlink()
    kept: list[np.ndarray] = []
    done = 0
    with tqdm(total=len(labels), unit="image") as bar:
        for generation in sample_batches(transformer, tokenizer, labels, config):
            in_scales = config.format == "scales"
            images = scale_pictures(tokenizer, generation) if in_scales else plots.to_uint8(generation.images)
            if config.format == "png":
                for n, image in enumerate(images, start=done):
                    Image.fromarray(image).save(out / f"{n:06d}_class{labels[n]:04d}.png")
            else:
                kept.append(images)
            done += len(images)
            bar.update(len(images))
    if config.format == "grid":
        write_grid(out, np.concatenate(kept), labels, names)
    elif config.format == "scales":
        write_scales(out, np.concatenate(kept), labels, names, tokenizer)
    elif config.format == "npz":
        write_npz(out, np.concatenate(kept), labels, config)
    print(f"wrote {len(labels)} images ({config.format}) to {out}")


if __name__ == "__main__":
    cli.run(main)
