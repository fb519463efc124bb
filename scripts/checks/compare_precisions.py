"""Sample the same images in several precisions: how many tokens stay the same, and whether the images are as good.

    python scripts/checks/compare_precisions.py --ckpt out/demo/transformer --vae out/demo/refined --data_path out/demo/images

Every seed draws the same random numbers in every precision. Where one token of an image becomes another, the rest of the image
is another draw, so equal tokens and PSNR say how often that happens, and the scores, with their spread over the seeds, whether
it matters. Prints a table and stores all figures.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from models.generate import Cohort, SamplingConfig, decode_sampled, num_cohorts, sample
from models.precision import Precision
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import cli, evidence
from utils.checkpoint import load_tokenizer_for, load_transformer
from utils.cli import flag, required
from utils.evidence import over_seeds
from utils.files import replace_text
from utils.metrics.judges import Judges
from utils.metrics.similarity import psnr
from utils.plots import to_uint8

REFERENCE = "float32"


@dataclass(frozen=True)
class Comparison:
    """Flags of scripts/checks/compare_precisions.py."""

    ckpt: str = required("transformer")
    vae: str = required("its tokenizer")
    data_path: str = required("directory with the train/ and val/ that they were trained on")
    precisions: str = flag("bfloat16,float16", "to be compared with float32, separated by commas; of both models")
    num: int = flag(1000, "samples of each seed and precision, evenly over the classes")
    seeds: int = flag(3, "0, 1, ...")
    cfg: float = flag(1.5, "guidance scale")
    top_k: int = flag(0, "keep so many of the likeliest codes, 0: all")
    top_p: float = flag(0.96, "of those the likeliest with this mass")
    json: str = flag("results/precisions.json", "file to store the figures in; the table goes beside it, as .md")


def main() -> None:
    config = cli.parse(Comparison, __doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformer = load_transformer(config.ckpt)
    tokenizer = load_tokenizer_for(config.vae, transformer.pyramid)
    judges = Judges(config.data_path, tokenizer.config.image_shape[0], config.num, device)
    labels = [n * transformer.config.num_classes // config.num for n in range(config.num)]
    names = [REFERENCE, *(name.strip() for name in config.precisions.split(","))]
    rows, exact = [], {}
    for name in names:  # weights are cast once, so each precision loads its own
        transformer = load_transformer(config.ckpt).to(device)
        tokenizer = load_tokenizer_for(config.vae, transformer.pyramid).to(device)
        Precision(name, name).apply_(transformer, tokenizer)
        for seed in range(config.seeds):
            start = time.monotonic()
            indices, images = draw(config, transformer, tokenizer, labels, seed)
            seconds = time.monotonic() - start
            if name == REFERENCE:
                exact[seed] = indices, images
            row = {"computed_in": name, "seed": seed, "images_per_second": config.num / seconds}
            row |= likeness(*exact[seed], indices, images) | judges.scores(images, np.array(labels))
            rows.append(row)
            print(row, flush=True)
    path = Path(config.json)
    evidence.store(path, {"threads": torch.get_num_threads(), "rows": rows})
    table = evidence.table_of(rows, "computed_in", COLUMNS)
    replace_text(path.with_suffix(".md"), table)
    print(table)


def draw(
    config: Comparison, transformer: ScaleTransformer, tokenizer: VQVAE, labels: list[int], seed: int
) -> tuple[list[Tensor], np.ndarray]:
    """Tokens, K x (N, h_k * w_k), and images (N, H, W, 3) uint8, as sample.py draws them."""
    how = SamplingConfig(config.cfg, config.top_k, config.top_p)
    device = transformer.head.weight.device
    tokens, images = [], []
    for number in range(num_cohorts(len(labels), device.type)):
        cohort = Cohort.of(labels, number, seed, device)
        sampled = sample(transformer, tokenizer, cohort.labels, how, cohort.generators)
        count = len(cohort.numbers)
        tokens.append([part[:count].cpu() for part in sampled.indices])
        images.append(to_uint8(decode_sampled(tokenizer, sampled))[:count])
    return [torch.cat(parts) for parts in zip(*tokens, strict=True)], np.concatenate(images)


def likeness(exact_tokens: list[Tensor], exact: np.ndarray, tokens: list[Tensor], images: np.ndarray) -> dict:
    """Shares of equal tokens, by scale, and of images all of whose tokens are; median PSNR, and its mean over those images."""
    equal = [ours == theirs for ours, theirs in zip(tokens, exact_tokens, strict=True)]
    whole = torch.cat(equal, dim=1).all(dim=1)
    ratios = psnr(torch.from_numpy(exact), torch.from_numpy(images)).clamp(max=100)  # equal images have no noise
    return {
        "equal_tokens": [part.float().mean().item() for part in equal],
        "equal_images": whole.float().mean().item(),
        "psnr_median": ratios.median().item(),
        "psnr_of_equal": ratios[whole].mean().item() if whole.any() else None,
    }


def mean_equal_tokens(runs: list[dict]) -> str:
    return ", ".join(f"{share:.1%}" for share in np.mean([run["equal_tokens"] for run in runs], axis=0))


COLUMNS: evidence.Columns = {
    "FD-EffLite0": over_seeds("fd", ".1f"),
    "FD-classifier": over_seeds("fd_classifier", ".2f"),
    "IS-EffLite0": over_seeds("inception_score", ".2f"),
    "recognised": over_seeds("recognised", ".3f"),
    "equal images": over_seeds("equal_images", ".1%"),
    "median PSNR (dB)": over_seeds("psnr_median", ".1f"),
    "images/s": over_seeds("images_per_second", ".1f"),
    "equal tokens by scale": mean_equal_tokens,
}


if __name__ == "__main__":
    cli.run(main)
