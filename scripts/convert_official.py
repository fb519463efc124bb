"""Turn a released tokenizer or transformer (VAR, M-VAR, Markov MVAR) into a checkpoint of ours: model.safetensors, config.json.

What the file holds is read off its tensors; a training checkpoint that holds both gives its transformer, or with --sides its
tokenizer.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.families import FAMILIES
from models.precision import cast_for_file_
from models.pyramid import Pyramid
from models.storage import Description
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import cli, official
from utils.checkpoint import (
    DTYPE_HELP,
    DTYPES,
    is_ours,
    locate,
    read_tensors,
    released_tokenizer,
    released_transformer,
    save_model,
    unwrapped,
)
from utils.cli import argument, flag, required
from utils.files import check_writable, written_aside


@dataclass(frozen=True)
class ConvertConfig:
    """Flags of scripts/convert_official.py."""

    source: str = argument("released file, or owner/name[@revision]:file on the hub")
    out: str = required("directory to write; what is there already is not touched")
    family: str = flag("", "of a transformer: markov for MVAR weights, which look like VAR's", choices=("", *FAMILIES))
    sides: str = flag("", "of a tokenizer: pyramid such as 1,2,3,4; empty: the standard one with as many scales")
    tokenizer: str = flag("", "of a transformer: its tokenizer, for config.json, so that sample.py needs no --vae")
    dtype: str = flag("", DTYPE_HELP, choices=DTYPES)


def convert(config: ConvertConfig, path: Path) -> VQVAE | ScaleTransformer:
    """The model in a released file. ValueError where it holds none, or flags are of the other kind of model."""
    tensors = unwrapped(read_tensors(path), path)
    has_tokenizer, has_transformer = official.holds_tokenizer(tensors), official.holds_transformer(tensors)
    if has_tokenizer and (config.sides or not has_transformer):
        if config.family or config.tokenizer:
            raise ValueError(f"{config.source}: is a tokenizer: --family and --tokenizer are for transformers, leave them out")
        sides = Pyramid.parse(config.sides.replace(",", "_")).sides if config.sides else None
        return released_tokenizer(tensors, sides, path)
    if config.sides:
        raise ValueError(f"{config.source}: has no tokenizer: --sides is for one, leave it out")
    return released_transformer(tensors, config.family or None, path)


def main() -> None:
    config = cli.parse(ConvertConfig, __doc__)
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"{out}: is there already: give another --out")
    check_writable(out)
    path = locate(config.source, wanted="released")
    if is_ours(path):
        raise ValueError(f"{config.source}: is a checkpoint of this project already: use it as it is")
    model = convert(config, path)
    kind, dtype = model.description.kind, config.dtype or model.description.precision
    cast_for_file_(model, dtype)
    with written_aside(out) as directory:
        save_model(directory, model, Description(kind, tokenizer=config.tokenizer or None))
    print(f"{config.source}: {kind}, {model.facts().title}")
    if kind == "transformer" and not config.family and "var" in model.config.blocks:
        print("MVAR's weights look the same: if these are, convert them with --family=markov")
    print(f"wrote it to {out}, weights in {dtype}")


if __name__ == "__main__":
    cli.run(main)
