"""The parts of a transformer by their plain names, for people who train some of them only."""

from collections.abc import Sequence

from torch import nn

from models.families import part_name
from models.transformer import ScaleTransformer

LOWER, UPPER = ".lora_A.default.weight", ".lora_B.default.weight"  # how names of adapters end, see models/adapters.py


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return name.endswith((LOWER, UPPER))


def modules_of(transformer: ScaleTransformer) -> dict[str, list[nn.Module]]:
    """The modules by part: embeddings, modulation, feed-forward, head, and the names of the mixers that there are."""
    modules: dict[str, list[nn.Module]] = {
        "embeddings": [transformer.class_embed, transformer.code_embed, transformer.scale_embed],
        "modulation": [block.modulation for block in transformer.blocks],
        "feed-forward": [block.ffn for block in transformer.blocks],
        "head": [transformer.head_modulation, transformer.head],
    }
    if transformer.config.shared_modulation:
        modules["modulation"].append(transformer.shared_modulation)
    for block in transformer.blocks:
        for mixer in block.mixers:
            modules.setdefault(part_name(mixer), []).append(mixer)
    return modules


def parts_of(transformer: ScaleTransformer) -> dict[str, list[nn.Parameter]]:
    """All parameters by part, as `modules_of`; those that belong to no module are embeddings."""
    modules = modules_of(transformer)
    parts = {name: [parameter for module in found for parameter in module.parameters()] for name, found in modules.items()}
    parts["embeddings"] += [transformer.start_embed, transformer.position_embed]
    return parts


def train_only_(transformer: ScaleTransformer, names: Sequence[str]) -> None:
    """Leave all but these parts, and adapters, as they are. ValueError for a part that it has not."""
    parts = parts_of(transformer)
    if unknown := [name for name in names if name not in parts]:
        raise ValueError(f"no part {unknown[0]!r}: give some of {', '.join(parts)}")
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    for name in names:
        for parameter in parts[name]:
            parameter.requires_grad_(True)
