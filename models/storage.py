"""A model on disk: model.safetensors and config.json in a directory, read strictly, never executed.

The hub stores the same two files. Checkpoints of a run hold further files beside them (utils/runs/saving.py), of which
this module knows the averaged weights only. Pickled objects are refused: .pth files, which are released ones, load with
weights_only=True, everything else is safetensors or JSON.

Weights are written as the model has them, in half precision where it was cast (models/precision.py), and read into float32.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, WEIGHTS, AVERAGED = "config.json", "model.safetensors", "ema.safetensors"
INDEX = ".index.json"  # how the name of the list of a sharded checkpoint's files ends
FILE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of weights in files
HALF_TYPES = {name: kind for name, kind in FILE_TYPES.items() if kind.itemsize == 2}
ZIP, PICKLE, GZIP = b"PK\x03\x04", b"\x80", b"\x1f\x8b"  # how files begin
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
UMASK = os.umask(0)  # can only be read by being set
os.umask(UMASK)
Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Description:
    """What config.json says beside the model's own configuration.

    kind: "tokenizer" or "transformer". class_names: of the labels, empty where unknown. tokenizer: where the transformer's
    tokenizer was loaded from. training: the resolved configuration of the run that made it. tokenizer_hash: of what makes the
    tokens that the transformer was trained on (utils/data/token_cache.py), None where unknown. precision: of the weights in the
    file, one of FILE_TYPES; beside those in half precision are some in float32. base, base_hash: of adapters, which are nothing
    alone, the transformer that they are beside and the hash of its weights (models/adapters.py); None for all others.
    """

    kind: str
    class_names: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    training: dict = field(default_factory=dict)
    tokenizer_hash: str | None = None
    precision: str = "float32"
    base: str | None = None
    base_hash: str | None = None


# --- reading ------------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict:
    """The contents of a weights file, or of all files that an index (*.index.json) names; nothing in it is executed.

    What kind of file it is its first bytes say, whatever its name. ValueError, in one line, for all that holds no tensors.
    """
    if path.name.endswith(INDEX):
        return _read_index(path)
    start = start_of(path)
    try:
        if _is_safetensors(start):
            return load_file(path)
        if start.startswith((ZIP, PICKLE)):
            with open(path, "rb") as file:  # by its name torch would take it for another format
                contents = torch.load(file, map_location="cpu", weights_only=True)
        else:
            raise ValueError("no tensors")
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable weights file: {_what_it_is(path, start, error)}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: holds a {type(contents).__name__}, not a dictionary of tensors")
    return contents


def _read_index(path: Path) -> dict:
    """The tensors of all files in the "weight_map" of an index, which lie beside it."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) and Path(name).name == name for name in files.values()):
        raise ValueError(f'{path}: has no "weight_map" from tensors to files beside it: give the index of a sharded checkpoint')
    parts: dict = {}
    for name in dict.fromkeys(files.values()):
        if not (path.parent / name).exists():
            raise FileNotFoundError(f"{path}: names {name}, which is not beside it: fetch all of its files")
        parts |= read_tensors(path.parent / name)
    return parts


def start_of(path: str | Path) -> bytes:
    """The first bytes of a file, by which `in_place_of_a_file` knows it."""
    with open(path, "rb") as file:
        return file.read(512)


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins with the length of a header and the header's bracket."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30


def in_place_of_a_file(start: bytes) -> str:
    """What one gets at times instead of a file, by its first bytes, and the mend; empty where it is none of that."""
    if not start:
        return "it is empty: fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS and not the file itself: fetch that with `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as one gets in place of a file that needs a login: fetch it again"
    return ""


def _what_it_is(path: Path, start: bytes, error: Exception) -> str:
    """What a file that cannot be read seems to be, and the mend, in our own words."""
    text = start.lstrip().lower()
    if in_place := in_place_of_a_file(start):
        return in_place
    if _is_safetensors(start):
        return "it is a damaged or truncated safetensors file: fetch it again"
    if "weights_only" in str(error) or "Unsupported" in str(error) or "GLOBAL" in str(error):
        return "it holds pickled objects beside tensors, which are not executed: save its state dict alone"
    if start.startswith((ZIP, PICKLE)):
        return "it is a damaged or truncated .pth file, or a zip of something else: fetch it again"
    if start.startswith(GZIP) or start[257:262] == b"ustar":
        return "it is a packed archive: unpack it first"
    if text.startswith((b"{", b"[")):
        return "it is JSON: give the weights that belong to it"
    return "give a .safetensors or a .pth of plain tensors"


def weights_file(directory: Path, averaged: bool = True) -> Path:
    """The weights of a checkpoint directory: the averaged ones where there are any and they are wanted."""
    path = directory / AVERAGED
    return path if averaged and path.exists() else directory / WEIGHTS


def read_averaged(directory: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint directory that has averaged ones: these, and of what was not trained the others."""
    averaged = read_tensors(directory / AVERAGED)
    with safe_open(directory / WEIGHTS, "pt") as file:
        left = {name: file.get_tensor(name) for name in file.keys() if name not in averaged}  # noqa: SIM118
    return averaged | left


def read_config(directory: Path, model_class: type[nn.Module]) -> Any:
    """The model's part of config.json; ValueError where it describes the other kind of model."""
    path = directory / CONFIG
    values, kind = read_json(path), model_class.description.kind
    if values.get("kind") != kind:
        raise ValueError(f"{path}: describes a {values.get('kind', 'model of other code')}, not a {kind}")
    if "model" not in values:
        raise ValueError(f'{path}: has no "model": it is not a config.json of this project')
    return from_dict(model_class.config_class, values["model"], str(path))


def read_description(directory: Path) -> Description:
    """Everything else in config.json."""
    path = directory / CONFIG
    return from_dict(Description, {name: value for name, value in read_json(path).items() if name != "model"}, str(path))


def read_json(path: Path) -> dict:
    """ValueError, with the name of the file, for what holds no JSON object."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:  # also of text that is none
        raise ValueError(f"{path}: not valid JSON ({error}): give a whole file") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a JSON {type(values).__name__} and no object: give a whole file")
    return values


def from_dict(config_class: type[Config], values: dict, source: str) -> Config:
    """A dataclass again from its asdict.

    ValueError names unknown and missing keys, or what is wrong with values, and `source`, the file they came from.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: holds a {type(values).__name__} in place of a {config_class.__name__}: restore the file")
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING)
    if unknown:
        raise ValueError(f"{source}: {config_class.__name__} has no field {', '.join(unknown)}: it was written by other code")
    if missing:
        raise ValueError(f"{source}: {config_class.__name__} needs {', '.join(missing)}")
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {config_class.__name__}: {error}") from error


def read_model(model_class: type[Model], path: Path, weights: dict[str, Tensor] | None = None, **changes) -> Model:
    """The model in eval mode, on the CPU, whose weights lie at `path`, beside their config.json.

    weights: in place of those of the file. changes: fields of the configuration that are to be otherwise. ValueError where the
    files belong to another model, or not together.
    """
    config = dataclasses.replace(read_config(path.parent, model_class), **changes)
    if weights is None:
        weights = read_averaged(path.parent) if path.name == AVERAGED else read_tensors(path)
    model = fill_(model_class(config), weights, path)
    model.description = dataclasses.replace(read_description(path.parent), precision=precision_of(weights))
    return model


def fill_(model: Model, weights: dict[str, Tensor], source: Path, seems: str = "") -> Model:
    """Put in all weights and set eval mode.

    ValueError for missing or unexpected names, wrong shapes, integers for weights, and values that are not finite: from NaN in
    an encoder a tokenizer makes nothing but code 0, without any error. Weights may be in half precision; parameters stay in
    that of the model. seems: what the file looks like, for the message.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    if missing or unexpected:
        lists = (("missing", missing), ("unexpected", unexpected))
        parts = [f"{word} {first_few(names)}" for word, names in lists if names]
        raise ValueError(f"{source}: {'; '.join(parts)}" + (f"; the file seems to be {seems}" if seems else ""))
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, the model wants {tuple(expected[name].shape)}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"{source}: {name} is of {tensor.dtype}, the model wants {expected[name].dtype}: give plain weights"
            )
    model.load_state_dict(weights)
    for name, tensor in model.state_dict().items():  # by now in types that all can be compared
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            raise ValueError(f"{source}: {name} is not finite: the file is damaged, or its run went wrong: give another")
    return model.eval()


def weights_hash(model: nn.Module, *further: str) -> str:
    """SHA-256 over the names and values of all weights, and over further words.

    Weights in half precision count as float32, so that a model has the hash of what its file loads as.
    """
    digest = hashlib.sha256("".join(further).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        tensor = tensor.float() if tensor.dtype in HALF_TYPES.values() else tensor
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def precision_of(tensors: dict[str, Tensor]) -> str:
    """The half precision that some of these weights are in, one of FILE_TYPES; float32 where none is, or some in either."""
    found = {tensor.dtype for tensor in tensors.values()}
    halves = [name for name, kind in HALF_TYPES.items() if kind in found]
    return halves[0] if len(halves) == 1 else "float32"


def first_line(error: Exception) -> str:
    """What an error says first, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_few(names: list) -> str:
    """Names of tensors for a message, where people's files may have anything in their place."""
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- writing ------------------------------------------------------------------------------------------------------------


def save_model(directory: Path, model: nn.Module, description: Description) -> None:
    """Write model.safetensors, with weights of the types that the model has, and config.json into an existing directory."""
    weights = model.state_dict()
    write_tensors(directory / WEIGHTS, weights)
    whole = dataclasses.replace(description, precision=precision_of(weights), base=None, base_hash=None)
    write_config(directory, model.config, whole)


def write_config(directory: Path, config: Any, description: Description) -> None:
    """config: the configuration dataclass of the model."""
    values = {**dataclasses.asdict(description), "model": dataclasses.asdict(config)}
    (directory / CONFIG).write_text(json.dumps(values, indent=1) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """OSError where the disk is full or the file cannot be written."""
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
        path.chmod(0o666 & ~UMASK)  # as every other file: the library gives it to its owner alone
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error}): make room on the disk") from error
