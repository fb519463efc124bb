"""Turn a checkpoint of a run, sharded or not, into single files: model.safetensors, ema.safetensors and config.json.

With --released, of a tokenizer: one .pth with the released names, which the released VAR code loads.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.precision import cast_for_file_
from models.storage import AVERAGED
from utils import cli
from utils.checkpoint import (
    DTYPE_HELP,
    DTYPES,
    load_description,
    load_tokenizer,
    load_transformer,
    locate,
    save_model,
    write_tensors,
)
from utils.cli import argument, flag, required
from utils.files import check_writable, replace_file, written_aside
from utils.official import tokenizer_to_official


@dataclass(frozen=True)
class ExportConfig:
    """Flags of scripts/export_checkpoint.py."""

    source: str = argument("run or checkpoint directory; of a run, its last complete checkpoint")
    out: str = required("directory to write, with --released a .pth; what is there already is not touched")
    released: bool = flag(False, "of a tokenizer: under the released names, its averaged weights where there are any")
    dtype: str = flag("", DTYPE_HELP, choices=DTYPES)


def main() -> None:
    config = cli.parse(ExportConfig, __doc__)
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"{out}: is there already: give another --out")
    check_writable(out)
    checkpoint = locate(config.source, "checkpoint", ema=True if config.released else None).parent
    description = load_description(checkpoint)
    if description is None:
        raise ValueError(f"{config.source}: not a run or checkpoint of this project: give the directory of one")
    load = load_tokenizer if description.kind == "tokenizer" else load_transformer
    if config.released:
        if description.kind != "tokenizer":
            raise ValueError(f"{config.source}: is a {description.kind}: --released is for tokenizers, leave it out")
        if out.suffix != ".pth":
            raise ValueError(f"--out={out}: the released code reads .pth files: give such a name")
        tokenizer = load(checkpoint)
        dtype = config.dtype or tokenizer.description.precision
        cast_for_file_(tokenizer, dtype)
        out.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(out) as path:
            torch.save(tokenizer_to_official(tokenizer.config, tokenizer.state_dict()), path)
    else:
        model, averaged = (load(checkpoint, ema=average) for average in (False, True))
        dtype = config.dtype or model.description.precision
        for each in (model, averaged):
            cast_for_file_(each, dtype)
        with written_aside(out) as directory:
            save_model(directory, model, description)
            write_tensors(directory / AVERAGED, averaged.state_dict())
    print(f"wrote {checkpoint} to {out}, weights in {dtype}")


if __name__ == "__main__":
    cli.run(main)
