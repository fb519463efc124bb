"""Edit held-out images into other classes, and see whether the class changes and the rest stays.

    python scripts/checks/compare_editing.py --ckpts out/starts/VAR_0,out/starts/M-VAR_from_VAR_0 --vae VAE --data_path IMAGES

Every image is drawn anew inside of a box, as each of --num images of another class, with guidance. What a classifier of the
training images takes for the new class stands beside the same share of plain samples; outside of the box the features have to
be those of the reconstruction. --picture shows some of them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from models.editing import Kept, covered
from models.generate import SamplingConfig, decode_sampled, sample
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import cli, evidence, plots
from utils.checkpoint import load_tokenizer_for, load_transformer
from utils.cli import flag, required
from utils.metrics.judges import Judges
from utils.sampling.editing import parse_box

BATCH = 20
SHOWN = 8


@dataclass(frozen=True)
class Comparison:
    """Flags of scripts/checks/compare_editing.py."""

    ckpts: str = required("transformers, separated by commas")
    vae: str = required("their tokenizer")
    data_path: str = required("directory with the train/ and val/ that they were trained on")
    boxes: str = flag(
        "8,4,24,28;4,0,28,32;0,0,32,24", "what is drawn anew: left,top,right,bottom in pixels, with ; between them"
    )
    num: int = flag(200, "images of each")
    cfg: float = flag(3.0, "guidance scale")
    seed: int = flag(0, "of the sampling")
    json: str = flag("results/editing.json", "file to store the figures in; grows")
    picture: str = flag("", "picture of some images of the last transformer, for each box")


def main() -> None:
    config = cli.parse(Comparison, __doc__)
    tokenizer = load_tokenizer_for(config.vae, load_transformer(config.ckpts.split(",")[0]).pyramid)
    judges = Judges(config.data_path, tokenizer.config.image_shape[0], config.num)
    rows = np.linspace(0, len(judges.val) - 1, config.num).astype(int)
    images = torch.from_numpy(judges.val[rows]).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(judges.val_labels[rows])
    wanted = (labels + 1 + torch.arange(config.num) % (int(labels.max()))) % (int(labels.max()) + 1)  # never its own
    stored, shown = evidence.GrowingRuns(Path(config.json), COLUMNS), {}
    for ckpt in config.ckpts.split(","):
        transformer = load_transformer(ckpt.strip())
        title = transformer.facts().title
        plain, _ = drawn(config, transformer, tokenizer, wanted, None, None)
        recognised = judges.classifier.accuracy(plain, wanted.numpy())
        stored.add({"row": f"{title}: plain samples", "seed": config.seed, "recognised": recognised})
        for box in config.boxes.split(";"):
            redrawn = mask_of(box, tokenizer.config.image_shape)
            made, apart = drawn(config, transformer, tokenizer, wanted, images, redrawn)
            recognised = judges.classifier.accuracy(made, wanted.numpy())
            before = judges.classifier.accuracy(made, labels.numpy())
            figures = {"recognised": recognised, "still_the_old_class": before, "largest_difference_outside": apart}
            stored.add({"row": f"{title}: {box}", "seed": config.seed, **figures, "redrawn": redrawn.float().mean().item()})
            shown[box] = made[:: config.num // SHOWN][:SHOWN]
    if config.picture:
        originals = plots.to_uint8(images)[:: config.num // SHOWN][:SHOWN]
        plots.save(plots.grid([originals, *shown.values()], ["original", *shown]), config.picture)


def mask_of(box: str, shape: tuple[int, int]) -> Tensor:
    """(H, W) bool."""
    left, top, right, bottom = parse_box(box)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def drawn(
    config: Comparison,
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    labels: Tensor,
    images: Tensor | None,
    redrawn: Tensor | None,
) -> tuple[np.ndarray, float]:
    """Images (N, H, W, 3) uint8 of these labels, and the largest difference of features from those kept outside of the mask.

    images (N, 3, H, W) in [0, 1] and redrawn (H, W) bool: None for plain samples.
    """
    how, generator = SamplingConfig(config.cfg, top_k=0, top_p=0.96), torch.Generator().manual_seed(config.seed)
    parts, apart = [], 0.0
    for first in range(0, len(labels), BATCH):
        kept = None if images is None else Kept.of(tokenizer, images[first : first + BATCH] * 2 - 1, redrawn)
        sampled = sample(transformer, tokenizer, labels[first : first + BATCH], how, generator, kept=kept)
        parts.append(plots.to_uint8(decode_sampled(tokenizer, sampled)))
        if kept is not None:
            outside = ~covered(redrawn, tokenizer.pyramid.shapes[-1])
            difference = (sampled.sums[-1] - kept.sums[-1])[:, :, outside].abs()
            apart = max(apart, difference.max().item() if outside.any() else 0.0)
    return np.concatenate(parts), apart


COLUMNS: evidence.Columns = {
    "recognised as the new class": evidence.over_seeds("recognised", ".3f"),
    "as the old one": evidence.over_seeds("still_the_old_class", ".3f"),
    "largest difference outside": evidence.over_seeds("largest_difference_outside", ".1e"),
}


if __name__ == "__main__":
    cli.run(main)
