"""Models from wherever they are: released files, runs and checkpoints of ours, the hub.

Our format is described and written by models/storage.py: model.safetensors and config.json. In a checkpoint of a run
(utils/runs/saving.py) the averaged weights stand beside them, or all tensors in shards. Released files are read through
utils/official.py.
"""

import functools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.adapters import merged
from models.hub import HubName, download
from models.pyramid import Pyramid
from models.storage import (
    AVERAGED,
    CONFIG,
    FILE_TYPES,
    WEIGHTS,
    Description,
    fill_,
    precision_of,
    read_averaged,
    read_config,
    read_description,
    read_model,
    read_tensors,
    save_model,
    weights_file,
    weights_hash,
    write_tensors,
)
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import official
from utils.data.token_cache import check_trained_on
from utils.runs.checkpoints import check_intact, latest_intact
from utils.runs.shards import SHARDS, is_sharded, read_shards

__all__ = [
    "DTYPES",
    "DTYPE_HELP",
    "Description",
    "find_beside",
    "is_ours",
    "load_description",
    "load_fitting_tokenizer",
    "load_pair",
    "load_tokenizer",
    "load_tokenizer_for",
    "load_transformer",
    "locate",
    "read_tensors",
    "released_tokenizer",
    "released_transformer",
    "save_model",
    "unwrapped",
    "weights_hash",
    "write_tensors",
]

DTYPES = ("", *FILE_TYPES)
DTYPE_HELP = "of the weights in the file, but for those that must be exact, which are in float32; empty: that of the source"


def load_tokenizer(source: str | Path, sides: tuple | None = None, ema: bool = True) -> VQVAE:
    """A tokenizer in eval mode, on the CPU.

    source: a released .pth, a run or checkpoint directory of ours, or "owner/name[@revision][:file]" on the hub. sides: of the
    pyramid, such as (1, 2, 3, 4); None takes what our config says, or for a released file the standard pyramid with as many
    scales. ema: of our checkpoints, load the averaged weights where there are any. ValueError or FileNotFoundError for anything
    else, with the first keys and what the file seems to be. Files may be in half precision, the parameters are in float32.
    """
    path = locate(source, "tokenizer", ema)
    if is_ours(path):
        if not Path(source).is_file():  # a file that is named is the file that is loaded
            path = weights_file(path.parent, averaged=ema)
        return read_model(VQVAE, path, **({} if sides is None else {"sides": sides}))
    return released_tokenizer(unwrapped(read_tensors(path), path), sides, path)


def released_tokenizer(tensors: dict, sides: tuple | None, path: Path) -> VQVAE:
    """A tokenizer in eval mode from the contents of a released file; sides: as in `load_tokenizer`."""
    config, weights = official.tokenizer_from_official(tensors, sides, str(path))
    tokenizer = fill_(VQVAE(config), weights, path, official.describe(list(tensors)))
    tokenizer.description = replace(tokenizer.description, precision=precision_of(weights))
    return tokenizer


def load_tokenizer_for(source: str | Path, pyramid: Pyramid) -> VQVAE:
    """A tokenizer for a pyramid: released ones serve any, ours the one they were trained with, whatever was asked for."""
    return load_tokenizer(source, None if is_ours(locate(source, "tokenizer", ema=True)) else pyramid.sides)


def find_beside(named: str, checkpoint: str | Path) -> str:
    """Where the model is that a checkpoint names: as it says, or below or beside a folder around the checkpoint."""
    here = Path(checkpoint)
    if here.exists() and not Path(named).exists() and not Path(named).is_absolute():
        for folder in (here.resolve(), *here.resolve().parents):
            for path in (folder / named, folder / Path(named).name):
                if path.exists():
                    return str(path)
    return named


def load_fitting_tokenizer(source: str, pn: str) -> VQVAE:
    """The tokenizer, for the pyramid that --pn asks for; ValueError where that is not the one it was trained with."""
    if not pn:
        return load_tokenizer(source)
    wanted = Pyramid.parse(pn)
    tokenizer = load_tokenizer_for(source, wanted)
    if tokenizer.pyramid != wanted:
        raise ValueError(
            f"--pn={pn}: its last side {wanted.sides[-1]} does not fit the tokenizer {source}, "
            f"which makes {tokenizer.pyramid}: give --pn={tokenizer.pyramid}"
            if wanted.sides[-1] != tokenizer.pyramid.sides[-1]
            else f"--pn={pn} is not the pyramid of the tokenizer {source}: give --pn={tokenizer.pyramid}"
        )
    return tokenizer


def load_transformer(source: str | Path, family: str | None = None, ema: bool = True) -> ScaleTransformer:
    """A transformer in eval mode, on the CPU; everything about it is read from the file.

    source: as for `load_tokenizer`. family: "markov" tells MVAR weights from VAR's, which have the same tensors; "markov-mamba"
    puts windows on M-VAR's. ema: of our checkpoints, load the averaged weights where there are any.
    """
    path = locate(source, "transformer", ema)
    if not is_ours(path):
        return released_transformer(unwrapped(read_tensors(path), path), family, path)
    depth = read_config(path.parent, ScaleTransformer).depth
    changes = {} if family is None else {"blocks": (family,) * depth}
    if is_sharded(path.parent):
        weights = read_shards(path.parent, ("ema", "model") if ema else ("model",))
        return read_model(ScaleTransformer, path, weights, **changes)
    if not Path(source).is_file():  # a file that is named is the file that is loaded
        path = weights_file(path.parent, averaged=ema)
    if (description := read_description(path.parent)).base is None:
        return read_model(ScaleTransformer, path, **changes)
    transformer = read_model(ScaleTransformer, path, beside_base(path, description), **changes)
    transformer.description = replace(transformer.description, base=None, base_hash=None)
    return transformer


def beside_base(path: Path, description: Description) -> dict[str, Tensor]:
    """The weights of a checkpoint of adapters, merged into those of the transformer that they are beside.

    ValueError or FileNotFoundError where that cannot be had, or has other weights by now.
    """
    try:
        base = load_transformer(find_beside(description.base, path.parent))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: adapters beside {description.base}, which is not there: put it there") from error
    if weights_hash(base) != description.base_hash:
        raise ValueError(f"{path}: adapters beside {description.base}, which has other weights by now: give those back")
    own = read_averaged(path.parent) if path.name == AVERAGED else read_tensors(path)
    training = description.training
    return merged(base.state_dict(), own, (training["lora_alpha"] or training["lora"]) / training["lora"])


def load_pair(
    ckpt: str | Path, vae: str = "", family: str | None = None, ema: bool = True, any_tokenizer: bool = False
) -> tuple[ScaleTransformer, VQVAE, list[str]]:
    """A transformer, its tokenizer, and the names of the classes, empty where the checkpoint does not know them.

    vae: the tokenizer, empty: the one that the checkpoint names. any_tokenizer: take it even where the transformer was trained
    on the tokens of another one. Else as `load_transformer`; ValueError too where no tokenizer is named, or another one.
    """
    transformer, description = load_transformer(ckpt, family, ema), load_description(ckpt, ema)
    named = description.tokenizer if description else None
    if not (vae or named):
        raise ValueError(f"{ckpt}: does not name its tokenizer: give --vae")
    try:
        tokenizer = load_tokenizer_for(vae or find_beside(named, ckpt), transformer.pyramid)
    except FileNotFoundError as error:
        if vae:
            raise
        raise FileNotFoundError(f"{ckpt} names its tokenizer {named}, which cannot be had: give --vae ({error})") from error
    if description and not any_tokenizer:
        check_trained_on(description.tokenizer_hash, tokenizer, ckpt, vae or named)
    return transformer, tokenizer, description.class_names if description else []


def released_transformer(tensors: dict, family: str | None, path: Path) -> ScaleTransformer:
    """A transformer in eval mode from the contents of a released file; family: as in `load_transformer`."""
    config, weights = official.transformer_from_official(tensors, family, str(path))
    transformer = fill_(ScaleTransformer(config), weights, path, official.describe(list(tensors)))
    transformer.description = replace(transformer.description, precision=precision_of(weights))
    return transformer


def unwrapped(contents: dict, path: Path) -> dict:
    """The tensors in what people's files have around them; what is taken off is told on stderr."""
    tensors, layers = official.unwrap(contents)
    if layers:
        print(f"{path}: took the tensors out of {', '.join(layers)}", file=sys.stderr)
    return tensors


def load_description(source: str | Path, ema: bool = True) -> Description | None:
    """What the config.json of our checkpoint says beside the model; None for a released file. ema: as in `load_transformer`."""
    path = locate(source, "checkpoint", ema)
    return read_description(path.parent) if is_ours(path) else None


def is_ours(path: Path) -> bool:
    """Whether a weights file, or the folder of shards, is part of a checkpoint of this project; else it is a released one."""
    return (path.suffix == ".safetensors" or path.name == SHARDS) and describes_ours(path.with_name(CONFIG))


def describes_ours(config: Path) -> bool:
    """Whether a config.json is one of this project; others have one beside released tensors, too."""
    try:
        values = json.loads(config.read_text())
    except (OSError, ValueError):
        return config.exists()  # a damaged one is told by what reads it
    return isinstance(values, dict) and not values.keys().isdisjoint(("kind", "model"))


def locate(source: str | Path, wanted: str, ema: bool | None = None) -> Path:
    """The weights file, or the folder of shards, that `source` means; a name on the hub is downloaded.

    Checkpoints of runs have checksums: of a run its newest one without damage is meant, and one that is named is a ValueError
    where it is damaged. ema: look at the averaged weights, False: at the others, None: at both.
    """
    path = Path(source)
    if path.is_dir():
        if is_sharded(path) or all((path / name).exists() for name in (CONFIG, WEIGHTS)):
            check_intact(path, files_read(path, ema))
            directory: Path | None = path
        else:
            directory = latest_intact(path, functools.partial(files_read, ema=ema))
        if directory is None:
            raise FileNotFoundError(
                f"{path}: no complete checkpoint in it: give a run directory, a checkpoint directory or a released .pth"
            )
        return directory / (SHARDS if is_sharded(directory) else WEIGHTS)
    if path.is_file():
        if is_ours(path):
            check_intact(path.parent, files_read(path.parent, path.name == AVERAGED))
        return path
    name = HubName.parse(str(source))
    if name is None or (name.file is None and path.suffix in (".pth", ".pt", ".safetensors")):
        raise FileNotFoundError(f"{source}: no such file or directory; give a {wanted} file, a directory or owner/name:file")
    return download(name)


def files_read(checkpoint: Path, ema: bool | None) -> re.Pattern:
    """The names of the files that are read of a checkpoint; ema: as in `locate`."""
    names = [CONFIG, *([AVERAGED] if ema is not False else []), *([] if ema and _is_average_whole(checkpoint) else [WEIGHTS])]
    return re.compile("|".join([*map(re.escape, names), f"{SHARDS}/.*"]))


def _is_average_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has averaged weights, and of all that it has weights of."""
    try:
        names = [set(safe_open(checkpoint / file, "pt").keys()) for file in (AVERAGED, WEIGHTS)]
    except (OSError, SafetensorError):
        return False
    return names[0] >= names[1]
