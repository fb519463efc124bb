"""The card of a model on the hub: README.md with metadata for the hub's search and tables for people."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult

from models.families import FAMILIES
from models.pyramid import STANDARD_SIDES, Pyramid

if TYPE_CHECKING:
    from models.tokenizer import VQVAE
    from models.transformer import ScaleTransformer

LIBRARY = "m-var"
TAGS = ["image-generation", "visual-autoregressive", "pytorch"]
TEMPLATE = "---\n{{ card_data }}\n---\n\n{{ text }}"
COUNTS = ("images", "reference images")  # in the table of scores, but no scores
MOST_NAMES = 20  # of classes that are listed

Columns = dict[str, dict[str, float | int | None]]


# --- text ---------------------------------------------------------------------------------------------------------------


def card_title(model: "VQVAE | ScaleTransformer") -> str:
    """Such as "M-VAR d16, 16x16 tokens"."""
    config = model.config
    if model.description.kind == "tokenizer":
        return f"Multi-scale VQVAE tokenizer, {_by(config.image_shape)} px"
    return f"{FAMILIES[config.blocks[-1]].title} d{config.depth}, {_by(config.pyramid.shapes[-1])} tokens"


def card_text(model: "VQVAE | ScaleTransformer", name: str | None, scores: dict, columns: Columns) -> str:
    """Everything below the metadata. name: owner/name; scores and columns: see `read_scores`."""
    is_transformer = model.description.kind == "transformer"
    source = name or "DIRECTORY"
    parts = [
        f"# {card_title(model)}",
        "Class-conditional image generation, scale by scale. The tokenizer that turns tokens into images is a model of its own."
        if is_transformer
        else "Images to and from a pyramid of tokens, from coarse to fine ([VAR](https://arxiv.org/abs/2404.02905)).",
        _table(["", ""], list((_transformer_rows(model) if is_transformer else _tokenizer_rows(model)).items())),
        "## How to load it",
        "With the code of the project, from the root of its repository:",
        _transformer_usage(model, source) if is_transformer else _tokenizer_usage(source),
    ]
    if columns:
        parts += ["## Scores", _scores_text(scores, columns)]
    if model.description.training:
        settings = json.dumps(model.description.training, indent=1)
        parts += ["## Training", f"<details><summary>All settings</summary>\n\n```json\n{settings}\n```\n\n</details>"]
    return "\n\n".join(parts) + "\n"


def _transformer_rows(model: "ScaleTransformer") -> dict[str, str]:
    config, description = model.config, model.description
    kinds = list(dict.fromkeys(config.blocks))
    names = description.class_names
    return {
        "family": "; ".join(f"{config.blocks.count(kind)} blocks {kind}, {FAMILIES[kind].paper}" for kind in kinds),
        "depth, width, heads": f"{config.depth}, {config.width}, {config.heads}",
        "parameters": _parameters(model),
        "pyramid": f"{config.pyramid}, {config.pyramid.num_tokens} tokens",
        "resolution": _resolution(config.pyramid),
        "codes": f"{config.num_codes} of {config.code_dim} numbers",
        "classes": str(config.num_classes) + (f": {', '.join(names)}" if 0 < len(names) <= MOST_NAMES else ""),
        "tokenizer": f"`{description.tokenizer}`" if description.tokenizer else "not named",
    }


def _tokenizer_rows(model: "VQVAE") -> dict[str, str]:
    config = model.config
    return {
        "resolution": f"{_by(config.image_shape)} px, {config.downsampling} px per token of the finest map",
        "pyramid": f"{config.pyramid}, {config.pyramid.num_tokens} tokens",
        "codes": f"{config.num_codes} of {config.code_dim} numbers",
        "channels": f"{config.channels} times {', '.join(map(str, config.multipliers))}",
        "parameters": _parameters(model),
    }


def _parameters(model: "VQVAE | ScaleTransformer") -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _resolution(pyramid: Pyramid) -> str:
    """The finest map, whose tokens have as many pixels as the tokenizer decides; standard pyramids have a usual one."""
    text = f"{_by(pyramid.shapes[-1])} tokens"
    pixels = next((pixels for pixels, sides in STANDARD_SIDES.items() if sides == pyramid.sides), None)
    return text if pixels is None else f"{text}, {pixels} px where the tokenizer has {pixels // pyramid.sides[-1]} px per token"


def _transformer_usage(model: "ScaleTransformer", source: str) -> str:
    named = model.description.tokenizer
    tokenizer = named or "TOKENIZER"
    labels = [0, min(1, model.config.num_classes - 1)]
    return f"""```python
import torch
from models import generate
from utils.checkpoint import load_tokenizer, load_transformer

transformer = load_transformer("{source}")  # or models.ScaleTransformer.from_pretrained
tokenizer = load_tokenizer("{tokenizer}")
images = generate(transformer, tokenizer, torch.tensor({labels}), guidance_scale=1.5).images  # (2, 3, H, W) in [0, 1]
```

```bash
python sample.py --ckpt {source} {"" if named else f"--vae {tokenizer} "}--out samples.png
```"""


def _tokenizer_usage(source: str) -> str:
    return f"""```python
from models import VQVAE

tokenizer = VQVAE.from_pretrained("{source}")
indices = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> the token maps
images = tokenizer.decode(indices)
```"""


def _table(head: list[str], rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


# --- scores -------------------------------------------------------------------------------------------------------------


def read_scores(scores: dict) -> Columns:
    """Column -> name -> number, the column of the model first.

    scores: what scripts/evaluate.py --json wrote, or names with numbers, or nothing. ValueError for anything else.
    """
    columns = scores.get("scores", {"samples": scores} if scores else {})
    for figures in columns.values() if isinstance(columns, dict) else [columns]:
        if not isinstance(figures, dict):
            raise ValueError('scores: give what scripts/evaluate.py --json wrote, or names with numbers, such as {"FID": 3.07}')
        for name, value in figures.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise ValueError(f"scores: {name!r} is {value!r}, not a number: give what scripts/evaluate.py --json wrote")
    return columns


def eval_results(columns: Columns, scores: dict, dataset: str | None) -> list[EvalResult]:
    """The first column as the hub's metadata; what is unknown is left out."""
    first, *_ = columns.values()
    dataset = dataset or _reference(scores) or "reference images"
    return [
        EvalResult(
            task_type="image-generation",
            dataset_type=re.sub(r"[^\w./-]+", "-", dataset.lower()),
            dataset_name=dataset,
            metric_type=re.sub(r"\W+", "-", name.lower()),
            metric_name=name,
            metric_value=value,
        )
        for name, value in first.items()
        if value is not None and name not in COUNTS
    ]


def _reference(scores: dict) -> str | None:
    """Name of the reference images that scripts/evaluate.py was given, without the path to them."""
    path = scores.get("settings", {}).get("reference")
    return Path(path).stem if path else None


def _scores_text(scores: dict, columns: Columns) -> str:
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    rows = [[name, *(_number(figures.get(name)) for figures in columns.values())] for name in names]
    parts = [_table(["", *columns], rows)]
    if "extractor" in scores:
        reference = _reference(scores)
        against = f" against `{reference}`" if reference else ""
        parts.append(f"By `scripts/evaluate.py` with the extractor {scores['extractor']['name']}{against}.")
    parts += [f"- {note}" for note in scores.get("notes", [])]
    return "\n\n".join(parts)


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}".rstrip("0").rstrip(".")
