"""Round the weights of a tokenizer and a transformer to half precision, in part and all over: what changes.

    python scripts/checks/round_weights.py --ckpt out/demo/transformer --vae out/demo/tokenizer --data_path out/demo/images

What a file in half precision keeps in float32 (`cast_for_file_` in models/precision.py) is judged by it: tokens and what they
decode to, logits and loss over the held-out images. Everything is computed in float32, so that nothing but the rounding counts.
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import cast_for_file_
from models.storage import HALF_TYPES
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import cli, evidence
from utils.checkpoint import load_tokenizer, load_transformer
from utils.cli import flag, required
from utils.data.batches import val_batches
from utils.data.images import Images, read_folders
from utils.files import check_file

BATCH = 100


@dataclass(frozen=True)
class Rounding:
    """Flags of scripts/checks/round_weights.py."""

    ckpt: str = required("transformer")
    vae: str = required("its tokenizer")
    data_path: str = required("directory with the train/ and val/ that they were trained on")
    json: str = flag("results/round_weights.json", "file to store the figures in")
    overwrite: bool = flag(False, "replace what is at --json")


def rounded(model: nn.Module, precision: str, what: str) -> nn.Module:
    """A copy in float32 whose weights have been rounded: "file", as a file has them, "all", or "exact" (`float32_parts`)."""
    model = copy.deepcopy(model)
    kind = HALF_TYPES[precision]
    if what == "file":
        cast_for_file_(model, precision)
    elif what == "all":
        model.to(kind)
    else:
        for mixer in (mixer for block in model.blocks for mixer in block.mixers):
            for part in mixer.float32_parts:
                for parameter in part.parameters() if isinstance(part, nn.Module) else (part,):
                    parameter.data = parameter.data.to(kind)
    return model.float()


@torch.inference_mode()
def of_tokenizer(exact: VQVAE, other: VQVAE, batches: list[tuple[Tensor, Tensor]]) -> dict:
    """Shares of changed tokens by scale; of pixels, decoded from the same tokens, the rms difference, of 255."""
    changed, squares = torch.zeros(exact.pyramid.num_scales, dtype=torch.float64), []
    for images, _ in batches:
        expected, found = exact.encode(images), other.encode(images)
        changed += torch.tensor([(a != b).double().mean() for a, b in zip(expected, found, strict=True)]) / len(batches)
        squares.append((exact.decode(expected) - other.decode(expected)).square().mean())
    return {"changed_tokens": changed.tolist(), "pixel_rms": 255 / 2 * torch.stack(squares).mean().sqrt().item()}


@torch.inference_mode()
def of_transformer(
    exact: ScaleTransformer, other: ScaleTransformer, tokenizer: VQVAE, batches: list[tuple[Tensor, Tensor]]
) -> dict:
    """Loss in nats per token, and of the logits the root mean square difference over their standard deviation."""
    losses, differences, variances = [], [], []
    for images, labels in batches:
        indices = tokenizer.encode(images)
        inputs, targets = tokenizer.teacher_inputs(indices), torch.cat(indices, dim=1)
        expected, found = exact(labels, inputs), other(labels, inputs)
        losses.append(F.cross_entropy(found.flatten(0, 1), targets.flatten()).double())
        differences.append((found - expected).square().mean())
        variances.append(expected.var())
    loss, difference, variance = (torch.stack(values).mean().item() for values in (losses, differences, variances))
    return {"loss": loss, "logits_rms": (difference / variance) ** 0.5}


def measure(config: Rounding) -> Iterator[dict]:
    tokenizer, transformer = load_tokenizer(config.vae), load_transformer(config.ckpt)
    _, val = read_folders(config.data_path)
    batches = list(val_batches(Images(val, tokenizer.config.image_shape[0], 1.0), BATCH))
    yield {"model": "transformer", "rounded": "nothing"} | of_transformer(transformer, transformer, tokenizer, batches)
    for precision in HALF_TYPES:
        for what in ("file", "all"):
            figures = of_tokenizer(tokenizer, rounded(tokenizer, precision, what), batches)
            yield {"model": "tokenizer", "precision": precision, "rounded": what} | figures
        for what in ("file", "exact", "all"):
            figures = of_transformer(transformer, rounded(transformer, precision, what), tokenizer, batches)
            yield {"model": "transformer", "precision": precision, "rounded": what} | figures


def main() -> None:
    config = cli.parse(Rounding, __doc__)
    check_file(config.json, "--json", config.overwrite)
    rows = []
    for row in measure(config):
        rows.append(row)
        print(row, flush=True)
    evidence.store(Path(config.json), {"threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    cli.run(main)
