"""Turn a checkpoint of a run, sharded or not, into single files: model.safetensors, ema.safetensors and config.json."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli
from utils.checkpoint import load_description, load_transformer, locate, save_model, write_tensors
from utils.cli import argument, required
from utils.files import written_aside


@dataclass(frozen=True)
class ExportConfig:
    """Flags of scripts/export_checkpoint.py."""

    source: str = argument("run or checkpoint directory; of a run, its last complete checkpoint")
    out: str = required("directory to write; what is there already is not touched")


def main() -> None:
    config = cli.parse(ExportConfig, __doc__)
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"{out}: is there already: give another --out")
    checkpoint = locate(config.source, wanted="transformer").parent
    description = load_description(checkpoint)
    if description is None:
        raise ValueError(f"{config.source}: not a run or checkpoint of this project: give the directory of one")
    model, averaged = (load_transformer(checkpoint, ema=average) for average in (False, True))
    with written_aside(out) as directory:
        save_model(directory, model, description)
        write_tensors(directory / "ema.safetensors", averaged.state_dict())
    print(f"wrote {checkpoint} to {out}")


if __name__ == "__main__":
    cli.run(main)
