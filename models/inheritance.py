"""A transformer that starts from the weights of another one: other mixers, other classes, another pyramid.

Published: Markov MVAR from VAR, all tensors taken (arXiv 2505.12742, section 4.1). What two kinds of block share, attention,
feed-forward and their rows of the modulation, is taken; a mixer that the other one lacks starts new, with the small gamma of
its rows, so that the model computes at first what the other one does without it.

Between pyramids, scale k of K stands at the relative position k / (K - 1): every scale inherits from the one that stands
nearest to it. Copying by token or by side instead would pair scales whose tokens mean different things.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.families import Mixer, part_name
from models.pyramid import Pyramid
from models.transformer import Block, ScaleTransformer

FEED_FORWARD = "feed-forward"
# What has to be equal, in the words of train.py's flags; other fields of the configuration decide no tensor, or are adapted.
EQUAL = {
    "depth": "--depth",
    "width": "--width",
    "heads": "--heads",
    "ffn_ratio": "the ratio of the feed-forward",
    "normalize_attention": "--anorm",
    "shared_modulation": "--saln",
    "num_codes": "a tokenizer with as many codes",
    "code_dim": "a tokenizer with codes as wide",
}


class Inherited(NamedTuple):
    """What became of a part: how, such as "taken" or "new", and over how many numbers."""

    part: str
    how: str
    count: int


@torch.no_grad()
def inherit_(
    target: ScaleTransformer,
    source: ScaleTransformer,
    classes: Sequence[str] = (),
    source_classes: Sequence[str] = (),
    name: str = "the checkpoint",
) -> list[Inherited]:
    """Overwrite what an initialised transformer can have of another one; returns what was taken, adapted, new and left out.

    classes, source_classes: the names of their labels, empty where unknown; name: of the other one, for messages. ValueError
    where depth, width, heads, feed-forward, kind of attention or modulation, or the codes differ, with what would fit.
    """
    check_inheritable(target, source, name)
    rows = [
        _classes_(target, source, classes, source_classes),
        _taken("code embedding", target.code_embed, source.code_embed),
        *_positions_(target, source),
        *_blocks_(target, source),
    ]
    rows.append(_taken("head", target.head_modulation, source.head_modulation))
    rows.append(_taken("head", target.head, source.head))
    return merged(rows)


def check_inheritable(target: ScaleTransformer, source: ScaleTransformer, name: str) -> None:
    """ValueError, in one line, where nothing sensible can be taken."""
    wrong = []
    for field, mend in EQUAL.items():
        theirs, wanted = getattr(source.config, field), getattr(target.config, field)
        if theirs != wanted:
            fits = f"{mend}={theirs}" if mend.startswith("--") else f"{mend}: {theirs}"
            wrong.append(f"{field.replace('_', ' ')} {theirs}, not {wanted} (give {fits})")
    if wrong:
        raise ValueError(f"{name}: cannot be started from: it has {'; '.join(wrong)}")


def _taken(part: str, target: nn.Module, source: nn.Module) -> Inherited:
    target.load_state_dict(source.state_dict())
    return Inherited(part, "taken", parameter_count(target))


# --- classes ------------------------------------------------------------------------------------------------------------


def _classes_(target: ScaleTransformer, source: ScaleTransformer, names: Sequence[str], theirs: Sequence[str]) -> Inherited:
    """Rows of the class embedding by name where both sides know names; new classes start at the mean of all old ones."""
    ours, old = target.class_embed.weight, source.class_embed.weight  # (classes + 1, C), the last: no class
    part, count = "class embedding", ours.numel()
    if names and theirs and list(names) != list(theirs):
        places = {name: place for place, name in enumerate(theirs)}
        matched = {label: places[name] for label, name in enumerate(names) if name in places}
        how = f"adapted: {len(matched)} of {len(names)} classes by name, the others at the mean"
    elif len(ours) == len(old):
        ours.copy_(old)
        return Inherited(part, "taken" if names and theirs else "taken, class by class: names are not known", count)
    else:
        matched = {}
        how = f"adapted: {len(ours) - 1} classes at the mean of {len(old) - 1}, whose names are not known"
    ours[:-1] = old[:-1].mean(dim=0)
    for label, place in matched.items():
        ours[label] = old[place]
    ours[-1] = old[-1]
    return Inherited(part, how, count)


# --- pyramid ------------------------------------------------------------------------------------------------------------


def _positions_(target: ScaleTransformer, source: ScaleTransformer) -> list[Inherited]:
    """Position embeddings scale by scale, bicubic; scale embeddings between those of the two nearest scales."""
    ours, theirs = target.pyramid, source.pyramid
    count = target.position_embed.numel() + target.start_embed.numel()
    if ours == theirs:
        target.position_embed.copy_(source.position_embed)
        target.start_embed.copy_(source.start_embed)
        levels_row = _taken("scale embedding", target.scale_embed, source.scale_embed)
        return [Inherited("position embedding", "taken", count), levels_row]

    maps = theirs.split(source.position_embed)  # K x (1, h * w, C)
    nearest = [math.ceil(place - 0.5) for place in relative_places(ours, theirs)]
    resized = [resize(maps[j], theirs.shapes[j], ours.shapes[k]) for k, j in enumerate(nearest)]
    target.position_embed.copy_(torch.cat(resized, dim=1))
    target.start_embed.copy_(resize(source.start_embed, theirs.shapes[0], ours.shapes[0]))
    same = sum(ours.shapes[k] == theirs.shapes[j] for k, j in enumerate(nearest))
    how = f"adapted: {same} of {ours.num_scales} scales as they are, the others bicubic"

    levels = source.scale_embed.weight  # (K, C)
    for k, place in enumerate(relative_places(ours, theirs)):
        low = int(place)
        target.scale_embed.weight[k] = torch.lerp(levels[low], levels[min(low + 1, len(levels) - 1)], place - low)
    levels_how = "taken" if ours.num_scales == theirs.num_scales else "adapted: interpolated by relative position"
    return [
        Inherited("position embedding", how, count),
        Inherited("scale embedding", levels_how, target.scale_embed.weight.numel()),
    ]


def relative_places(ours: Pyramid, theirs: Pyramid) -> list[float]:
    """Where each of our scales stands among theirs, from 0 to their number less 1."""
    last, theirs_last = ours.num_scales - 1, theirs.num_scales - 1
    return [k * theirs_last / last if last else 0.0 for k in ours.scales]


def resize(positions: Tensor, shape: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Embeddings of a map's positions for a map of another size: (1, h * w, C) -> (1, h' * w', C)."""
    if shape == wanted:
        return positions
    maps = positions.transpose(1, 2).unflatten(2, shape)  # (1, C, h, w)
    return F.interpolate(maps, wanted, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


# --- blocks -------------------------------------------------------------------------------------------------------------


def _blocks_(target: ScaleTransformer, source: ScaleTransformer) -> list[Inherited]:
    rows = []
    if target.config.shared_modulation:
        ours, theirs = target.shared_modulation[-1], source.shared_modulation[-1]
        rows += _modulation_(ours, theirs, target.blocks[0], source.blocks[0])
        _without_new_gammas_(ours, target.blocks[0], source.blocks[0])
    for block, other in zip(target.blocks, source.blocks, strict=True):
        pairs = paired(block, other)
        for mixer, partner in pairs:
            rows.append(_mixer_(mixer, partner))
        left = [mixer for mixer in other.mixers if not any(partner is mixer for _, partner in pairs)]
        rows += [Inherited(part_name(mixer), "left out", parameter_count(mixer)) for mixer in left]
        rows.append(_taken(FEED_FORWARD, block.ffn, other.ffn))
        shared = target.config.shared_modulation
        ours, theirs = (part.modulation if shared else part.modulation[-1] for part in (block, other))
        rows += _modulation_(ours, theirs, block, other)
    return rows


def paired(block: Block, other: Block) -> list[tuple[Mixer, Mixer | None]]:
    """Every mixer of a block with the one of the same class of another block, None where that has none left."""
    free = list(other.mixers)
    pairs = []
    for mixer in block.mixers:
        partner = next((candidate for candidate in free if type(candidate) is type(mixer)), None)
        if partner is not None:
            free.remove(partner)
        pairs.append((mixer, partner))
    return pairs


def _mixer_(mixer: Mixer, partner: Mixer | None) -> Inherited:
    if partner is None:
        return Inherited(part_name(mixer), "new", parameter_count(mixer))
    return _taken(part_name(mixer), mixer, partner)


def _modulation_(ours: nn.Module, theirs: nn.Module, block: Block, other: Block) -> list[Inherited]:
    """Rows of gammas, scales and shifts (3 * S * C, ...) of the sub-layers that both blocks have; all others stay as they are.

    ours, theirs: linear layers, or offsets of a shared modulation.
    """
    places = [list(other.mixers).index(partner) if partner is not None else None for _, partner in paired(block, other)]
    places.append(len(other.mixers))  # the feed-forward stands last
    count = 0
    for name, parameter in ours.named_parameters():
        rows = parameter.unflatten(0, (3, block.num_sublayers, -1))  # (3, S, C, ...)
        old = theirs.get_parameter(name).unflatten(0, (3, other.num_sublayers, -1))
        for i, place in enumerate(places):
            if place is not None:
                rows[:, i] = old[:, place]
                count += rows[:, i].numel()
    total = parameter_count(ours)
    parts = [Inherited("modulation", "taken", count)]
    if count < total:
        parts.append(Inherited("modulation", "new, of new mixers", total - count))
    return parts


def _without_new_gammas_(shared: nn.Linear, block: Block, other: Block) -> None:
    """Zero the gammas of new mixers in the projection that all blocks share: the small ones are in the blocks' offsets."""
    for parameter in shared.parameters():
        gammas = parameter.unflatten(0, (3, block.num_sublayers, -1))[0]  # (S, C, ...)
        for i, (_, partner) in enumerate(paired(block, other)):
            if partner is None:
                gammas[i].zero_()


# --- what is told -------------------------------------------------------------------------------------------------------


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def merged(rows: list[Inherited]) -> list[Inherited]:
    """One row for all that is of the same part and became the same."""
    counts: dict[tuple[str, str], int] = {}
    for part, how, count in rows:
        counts[part, how] = counts.get((part, how), 0) + count
    return [Inherited(part, how, count) for (part, how), count in counts.items()]


def table(rows: list[Inherited]) -> list[str]:
    """The rows in columns, one line each."""
    width = max(len(row.part) for row in rows)
    return [f"  {row.part:<{width}}  {row.count / 1e6:9.3f}M  {row.how}" for row in rows]
