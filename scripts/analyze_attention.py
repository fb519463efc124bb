"""Measure where a transformer looks, on real images with teacher forcing, and draw it.

Attention between the scales and inside them (the observations that M-VAR, arXiv 2411.10433, and MVAR, arXiv 2505.12742, begin
with), what a Mamba scan still holds of earlier scales, and what earlier scales change in later ones. Evaluation mode, the
images' own classes. --out gets attention.json and attention.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from models.generate import check_fit
from models.scan_backends import choose_scan_
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import cli, evidence
from utils.analysis.attention import AttentionShares, AttentionTally, cost_shares
from utils.analysis.history import RetentionTally, influence
from utils.analysis.pictures import draw
from utils.checkpoint import load_pair
from utils.cli import flag, required
from utils.data.batches import val_batches
from utils.data.images import Images, read_folders
from utils.data.token_cache import check_classes
from utils.files import check_folder

LARGEST_BATCH = 16
MOST_WEIGHTS = 2**25  # numbers in the maps of one head at once
INFLUENCE_IMAGES = 8  # each costs a pass back for every scale


@dataclass(frozen=True)
class AnalyzeConfig:
    """Flags of scripts/analyze_attention.py."""

    ckpt: str = required("transformer: run, checkpoint, file, or name on the hub")
    data_path: str = required("directory with the train/ and val/ images; those of val are looked at")
    out: str = required("directory for attention.json and attention.png")
    vae: str = flag("", "tokenizer; empty: the one that the checkpoint names")
    any_tokenizer: bool = flag(False, "take the tokenizer given, even where it is not the one that ckpt was trained with")
    num: int = flag(64, "images, evenly over those of val")
    overwrite: bool = flag(False, "replace those that are there")
    family: str = flag("", "kind of a released file, as for sample.py")

    def __post_init__(self):
        if self.num < 1:
            raise ValueError(f"--num={self.num}: give at least 1")


def main() -> None:
    config = cli.parse(AnalyzeConfig, __doc__)
    made = {name: Path(config.out) / f"attention.{name}" for name in ("json", "png")}
    check_folder(config.out, "--out")
    if not config.overwrite and (there := [path for path in made.values() if path.exists()]):
        raise ValueError(f"{there[0]}: is there already: give another --out, or --overwrite")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformer, tokenizer, class_names = load_models(config, device)
    images = held_out_images(config, transformer, tokenizer, class_names)
    attention, retention, changed = measured(transformer, tokenizer, images, device)
    title = f"{transformer.facts().title}, {attention.images} images"
    Path(config.out).mkdir(parents=True, exist_ok=True)
    draw(made["png"], title, attention, retention, changed)
    known = {"model": transformer.facts().title, "pyramid": str(transformer.pyramid), "images": attention.images}
    evidence.store(made["json"], known | figures_of(attention, retention, changed))
    shares = attention.shares()
    print(f"attention inside the own scale: {shares.own_of_all:.1%} of all queries, {shares.own_by_scale:.1%} by scale")
    print(f"wrote {made['json']} and {made['png']}")


def load_models(config: AnalyzeConfig, device: torch.device) -> tuple[ScaleTransformer, VQVAE, list[str]]:
    """Both in evaluation mode, and the names of the classes. ValueError where they do not fit, or no tokenizer is named."""
    *models, class_names = load_pair(config.ckpt, config.vae, config.family or None, any_tokenizer=config.any_tokenizer)
    transformer, tokenizer = (model.to(device).requires_grad_(False) for model in models)
    choose_scan_(transformer, "torch", device)  # the others have no gradients of their inputs alone
    check_fit(transformer, tokenizer)
    return transformer, tokenizer, class_names


def held_out_images(config: AnalyzeConfig, transformer: ScaleTransformer, tokenizer: VQVAE, class_names: list[str]) -> Images:
    """--num of those of val/, evenly. ValueError where they have other classes than the transformer."""
    _, val = read_folders(config.data_path)
    ours, theirs = transformer.config.num_classes, len(val.class_names)
    if ours != theirs:
        raise ValueError(f"{config.data_path}: has {theirs} classes, the transformer {ours}: give the images of its training")
    if class_names:
        check_classes(class_names, val.class_names, config.ckpt, config.data_path)
    rows = np.linspace(0, len(val) - 1, min(config.num, len(val))).round().astype(int)
    return Images(val.take(rows), tokenizer.config.image_shape[0])


def measured(
    transformer: ScaleTransformer, tokenizer: VQVAE, images: Images, device: torch.device
) -> tuple[AttentionTally, RetentionTally, Tensor]:
    """Attention and retention over all images, influence (K, K) over the first of them."""
    attention, retention = AttentionTally(transformer), RetentionTally(transformer)
    pyramid, generator = transformer.pyramid, torch.Generator(device).manual_seed(0)
    size = max(1, min(LARGEST_BATCH, MOST_WEIGHTS // (pyramid.lengths[-1] * pyramid.num_tokens)))
    influences: list[Tensor] = []
    for pixels, labels in val_batches(images, size):
        labels, inputs = labels.to(device), tokenizer.teacher_inputs(tokenizer.encode(pixels.to(device)))
        with torch.no_grad(), attention.watching(), retention.watching():
            transformer(labels, inputs)
        if len(influences) < INFLUENCE_IMAGES:
            pairs = zip(labels.split(1), inputs.split(1), strict=True)
            influences += [influence(transformer, *pair, generator) for pair in pairs][: INFLUENCE_IMAGES - len(influences)]
        print(f"{attention.images} of {len(images)} images", file=sys.stderr, flush=True)
    return attention, retention, torch.stack(influences).mean(0)


def figures_of(attention: AttentionTally, retention: RetentionTally, changed: Tensor) -> dict:
    """Everything that was measured, for a JSON."""
    pyramid = attention.pyramid
    kept = retention.shares()
    return {
        "cost_share": cost_shares(pyramid),
        "attention": attention.shares().figures(),
        "uniform": AttentionShares.uniform(pyramid, attention.attended_scales).figures(),
        "by_block": {str(block): shares.figures() for block, shares in attention.by_block().items()},
        "own_by_block_and_head": {
            f"{block}.{head}": shares.own_of_all for (block, head), shares in attention.by_head().items()
        },
        "retention": {str(block): heads.tolist() for block, heads in zip(retention.blocks, kept, strict=True)},
        "influence": changed.tolist(),
    }


if __name__ == "__main__":
    cli.run(main)
