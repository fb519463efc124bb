"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear layers of a transformer, trained by the library peft.

A layer W x becomes W x + (alpha / rank) * B A x: A (rank, inputs) starts random, B (outputs, rank) at zero, so that the model
starts as the one without adapters; W stays as it is. To sample, B A is added to W, for which peft is not needed.
"""

from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.parts import LOWER, UPPER, is_adapter, modules_of
from models.transformer import ScaleTransformer

INSTALL = "pip install peft"
USUAL_PARTS = ("attention", "mamba", "feed-forward")
WHOLE_ONLY = ("embeddings", "head")  # their layers are called otherwise than as modules, or are lookups
WRAPPED = ".base_layer."  # where peft puts the layer itself


class Base(NamedTuple):
    """The transformer that adapters are beside.

    source: where it was loaded from; hash: of all its weights; shared: names of the tensors that are taken from it unchanged.
    """

    source: str
    hash: str
    shared: Set[str]


def add_adapters_(transformer: ScaleTransformer, rank: int, alpha: float, parts: Sequence[str] = ()) -> int:
    """Put an adapter beside every linear layer of these parts, none: of USUAL_PARTS; nothing but adapters is trained then.

    Returns how many layers have one. ValueError without peft, or for a part that has no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # here, as it is optional, and takes seconds
    except ImportError as error:
        raise ValueError(f"adapters need the package peft: {INSTALL} ({error})") from error
    there = {name: linears for name, modules in modules_of(transformer).items() if (linears := _linears(name, modules))}
    if unknown := [name for name in parts if name not in there]:
        raise ValueError(f"no part {unknown[0]!r} with linear layers for adapters: give some of {', '.join(there)}")
    chosen = {linear for name in parts or [name for name in USUAL_PARTS if name in there] for linear in there[name]}
    names = [name for name, module in transformer.named_modules() if module in chosen]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names), transformer)
    return len(names)


def _linears(part: str, modules: Sequence[nn.Module]) -> list[nn.Linear]:
    if part in WHOLE_ONLY:
        return []
    return [inner for module in modules for inner in module.modules() if isinstance(inner, nn.Linear)]


def plain_name(name: str) -> str:
    """The name that a parameter has without adapters."""
    return name.replace(WRAPPED, ".")


@torch.no_grad()
def shared_with(transformer: ScaleTransformer, other: ScaleTransformer) -> set[str]:
    """Names of the tensors that are the same in both."""
    theirs = other.state_dict()
    pairs = ((name, tensor, theirs.get(name)) for name, tensor in transformer.state_dict().items())
    return {name for name, tensor, its in pairs if its is not None and torch.equal(tensor, its)}


def own_tensors(transformer: ScaleTransformer, base: Base) -> set[str]:
    """Names of the parameters that have to be kept with adapters: all but those that the base has and nothing has trained."""
    named = transformer.named_parameters()
    return {name for name, parameter in named if parameter.requires_grad or plain_name(name) not in base.shared}


def merged(base: dict[str, Tensor], own: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights of a transformer without adapters: those of the base, what stands beside them, and B A added to its layer.

    base: by name, what it has; own: what `own_tensors` names; scaling: alpha / rank.
    """
    weights = base | {plain_name(name): tensor for name, tensor in own.items() if not is_adapter(name)}
    for name in own:
        if name.endswith(LOWER):
            layer = name.removesuffix(LOWER)
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + scaling * own[layer + UPPER] @ own[name]
    return weights
