"""Models on disk: read strictly, never executed.

Our format is a directory with model.safetensors and config.json; in a checkpoint of a run (utils/training_checkpoint.py) the
averaged weights stand beside them, or all tensors in shards. Released files are read through utils/official.py. Pickled objects
are refused: .pth files load with weights_only=True, everything else is safetensors or JSON.
"""

import hashlib
import json
import pickle
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.pyramid import Pyramid
from models.tokenizer import VQVAE, TokenizerConfig
from models.transformer import ScaleTransformer, TransformerConfig
from utils import official
from utils.config import from_dict, to_dict
from utils.run_checkpoints import latest_checkpoint
from utils.shards import SHARDS, is_sharded, read_shards

# What torch.load and safetensors raise on files that are damaged or something else altogether.
UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
KINDS = {"tokenizer": (TokenizerConfig, VQVAE), "transformer": (TransformerConfig, ScaleTransformer)}
MODEL_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Description:
    """What config.json says beside the model's own configuration.

    kind: "tokenizer" or "transformer". class_names: of the labels, empty where unknown. tokenizer: where the transformer's
    tokenizer was loaded from. training: the resolved configuration of the run that made it.
    """

    kind: str
    class_names: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    training: dict = field(default_factory=dict)


# --- loading models -----------------------------------------------------------------------------------------------------


def load_tokenizer(source: str | Path, sides: tuple | None = None) -> VQVAE:
    """A tokenizer in eval mode, on the CPU.

    source: a released .pth, a run or checkpoint directory of ours, or "owner/name[:file]" on the hub. sides: of the pyramid,
    such as (1, 2, 3, 4); None takes what our config says, or for a released file the standard pyramid with as many scales.
    ValueError or FileNotFoundError for anything else, with the first keys and what the file seems to be.
    """
    path = locate(source, wanted="tokenizer")
    if is_ours(path):
        config = read_model_config(path.parent, "tokenizer")
        config = config if sides is None else TokenizerConfig(**{**to_dict(config), "sides": sides})
        return _fill(VQVAE(config), read_tensors(path), path)
    tensors = read_tensors(path)
    config, weights = official.tokenizer_from_official(tensors, sides, str(path))
    return _fill(VQVAE(config), weights, path, official.describe(list(tensors)))


def load_tokenizer_for(source: str | Path, pyramid: Pyramid) -> VQVAE:
    """A tokenizer for a pyramid: released ones serve any, ours the one they were trained with, whatever was asked for."""
    return load_tokenizer(source, None if is_ours(locate(source, wanted="tokenizer")) else pyramid.sides)


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
    path = locate(source, wanted="transformer")
    if is_ours(path):
        config = read_model_config(path.parent, "transformer")
        if family is not None:
            config = TransformerConfig(**{**to_dict(config), "blocks": (family,) * config.depth})
        if is_sharded(path.parent):
            return _fill(ScaleTransformer(config), read_shards(path.parent, ("ema", "model") if ema else ("model",)), path)
        averaged = path.with_name("ema.safetensors")
        if ema and averaged.exists() and not Path(source).is_file():  # a file that is named is the file that is loaded
            path = averaged
        return _fill(ScaleTransformer(config), read_tensors(path), path)
    tensors = read_tensors(path)
    config, weights = official.transformer_from_official(tensors, family, str(path))
    return _fill(ScaleTransformer(config), weights, path, official.describe(list(tensors)))


def load_description(source: str | Path) -> Description | None:
    """What the config.json of our checkpoint says beside the model; None for a released file."""
    path = locate(source, wanted="checkpoint")
    if not is_ours(path):
        return None
    config = path.with_name("config.json")
    values = {name: value for name, value in _read_json(config).items() if name != "model"}
    return from_dict(Description, values, str(config))


def is_ours(path: Path) -> bool:
    """Whether a weights file, or the folder of shards, is part of a checkpoint of this project; else it is a released one."""
    return (path.suffix == ".safetensors" or path.name == SHARDS) and path.with_name("config.json").exists()


def locate(source: str | Path, wanted: str) -> Path:
    """The weights file, or the folder of shards, that `source` means; a name on the hub is downloaded."""
    path = Path(source)
    if path.is_dir():
        is_checkpoint = is_sharded(path) or all((path / name).exists() for name in MODEL_FILES)
        directory = path if is_checkpoint else latest_checkpoint(path)
        if directory is None:
            raise FileNotFoundError(
                f"{path}: no complete checkpoint in it: give a run directory, a checkpoint directory or a released .pth"
            )
        return directory / (SHARDS if is_sharded(directory) else "model.safetensors")
    if path.is_file():
        return path
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?", str(source))
    if match is None or (match[2] is None and path.suffix in (".pth", ".pt", ".safetensors")):
        raise FileNotFoundError(f"{source}: no such file or directory; give a {wanted} file, a directory or owner/name:file")
    return _download(match[1], match[2], str(source))


def _download(repository: str, filename: str | None, source: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if filename is not None:
            return Path(hf_hub_download(repository, filename))
        return [Path(hf_hub_download(repository, name)) for name in MODEL_FILES][-1]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{source}: neither a path here nor to be had from the hub ({reason}): check the spelling or download it yourself"
        ) from error


def read_tensors(path: Path) -> dict:
    """The contents of a .safetensors or .pth file; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: not a readable weights file ({reason}): give a .safetensors or a .pth of plain tensors"
        ) from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: holds a {type(contents).__name__}, not a dictionary of tensors")
    return contents


def read_model_config(directory: Path, kind: str) -> TokenizerConfig | TransformerConfig:
    """The model part of config.json; ValueError where it describes the other kind of model."""
    path = directory / "config.json"
    values = _read_json(path)
    if values.get("kind") != kind:
        raise ValueError(f"{path}: describes a {values.get('kind', 'model of other code')}, not a {kind}")
    if "model" not in values:
        raise ValueError(f'{path}: has no "model": it is not a config.json of this project')
    return from_dict(KINDS[kind][0], values["model"], str(path))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path, seems: str | None = None) -> nn.Module:
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    if missing or unexpected:
        lists = (("missing", missing), ("unexpected", unexpected))
        parts = [f"{word} {official.first_few(names)}" for word, names in lists if names]
        raise ValueError(f"{path}: {'; '.join(parts)}; the file seems to be {seems or official.describe(list(weights))}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model wants {tuple(expected[name].shape)}")
    model.load_state_dict(weights)
    return model.eval()


# --- writing ------------------------------------------------------------------------------------------------------------


def save_model(directory: Path, model: VQVAE | ScaleTransformer, description: Description) -> None:
    """Write model.safetensors and config.json into an existing directory."""
    write_tensors(directory / "model.safetensors", model.state_dict())
    write_config(directory, model.config, description)


def weights_hash(model: nn.Module, *further: str) -> str:
    """SHA-256 over the names and values of all weights, and over further words."""
    digest = hashlib.sha256("".join(further).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_config(directory: Path, config: TokenizerConfig | TransformerConfig, description: Description) -> None:
    values = {**to_dict(description), "model": to_dict(config)}
    (directory / "config.json").write_text(json.dumps(values, indent=1) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """OSError where the disk is full or the file cannot be written."""
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error}): make room on the disk") from error
