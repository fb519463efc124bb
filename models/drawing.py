"""What happens to logits before a token is drawn, and the draw: pure functions of tensors and random numbers.

Guidance is VAR's (arXiv 2404.02905, released sampler). On a GPU no decision depends on a value, so that all of it can be part
of a CUDA graph (models/captured.py). Letters: B images, l tokens of a scale, V codes.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None  # of a batch, or of each image in it

SORT_MULTIPLE = 64  # sums over so many numbers or a multiple of it are rounded as those over the vocabulary


def draw_labels(num_classes: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """(B,) labels, each class equally likely, drawn from the generator on its device."""
    device = generator.device if generator is not None else "cpu"
    return torch.multinomial(torch.ones(num_classes, device=device), batch, replacement=True, generator=generator)


def guide(logits: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance: logits (2B, l, V), conditional rows first -> (1 + strength) * cond - strength * uncond.

    Or of what a linear head makes logits from, (2B, l, C).
    """
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, 1 + strength)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 0.0, min_p: float = 0.0) -> Tensor:
    """Logits (..., V) with all but the top_k largest, then all outside the smallest set of mass top_p, then all that are less
    than min_p times as likely as the likeliest (arXiv 2407.01082), at -inf.

    0 switches a filter off. Ties with the k-th largest stay. Of the tokens that top_p looks at, the smallest whose cumulated
    probability is at most 1 - top_p go; the largest always stays. Which of several equal ones go is up to torch.sort, as in the
    released code: on GPUs, where it is stable, those that stand first.
    """
    if min_p > 0:
        least = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        return filter_logits(logits, top_k, top_p).masked_fill(logits < least, -torch.inf)
    if top_p == 0:
        return logits.masked_fill(logits < _kth_largest(logits, top_k), -torch.inf) if top_k > 0 else logits
    keep, is_split = _largest(logits, top_k, top_p)
    filtered = logits.masked_fill(~keep, -torch.inf)
    # Differs from GPUs, where no decision may depend on a value (see sample_scales), and which do not need it.
    if logits.device.type == "cpu" and is_split.any():
        filtered[is_split] = _filtered_by_sorting(logits[is_split], top_k, top_p)
    return filtered


def _kth_largest(logits: Tensor, k: int) -> Tensor:
    """(..., V) -> (..., 1)"""
    return logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]


def _filtered_by_sorting(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """filter_logits as it reads, by sorting all of the vocabulary."""
    if top_k > 0:
        logits = logits.masked_fill(logits < _kth_largest(logits, top_k), -torch.inf)
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def _largest(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Which of the logits (..., V) stay, of equal ones those that stand last; and (...) where some of equal ones go.

    Only the top_k are sorted, and of them only the values: where the cut falls does not depend on the order of equal ones.
    """
    num_codes = logits.shape[-1]
    top_k = min(top_k, num_codes) if top_k > 0 else num_codes
    num_sorted = min(-(-top_k // SORT_MULTIPLE) * SORT_MULTIPLE, num_codes)
    values = logits.topk(num_sorted, dim=-1).values  # (..., n) descending
    smallest_kept = values[..., top_k - 1 : top_k]
    values = values.masked_fill(values < smallest_kept, -torch.inf).flip(-1)  # (..., n) ascending

    # Ties with the k-th largest beyond the sorted ones stand before these, each with the probability of the first of them.
    others = (logits >= smallest_kept).sum(-1, keepdim=True, dtype=torch.int32)
    others = others - (values >= smallest_kept).sum(-1, keepdim=True, dtype=torch.int32)
    probabilities = values.softmax(dim=-1)  # of the sorted ones among themselves
    each = probabilities[..., :1]
    mass = 1 + others * each
    drop = (probabilities.cumsum(dim=-1) + others * each) / mass <= 1 - top_p
    drop[..., -1] = False
    dropped_others = torch.minimum(((1 - top_p) * mass / each.clamp(min=torch.finfo(each.dtype).tiny)).floor(), others)

    cut = values.masked_fill(drop, torch.inf).amin(dim=-1, keepdim=True)  # the smallest that stays
    dropped_equal = (drop & (values == cut)).sum(dim=-1, keepdim=True) + dropped_others * (cut == smallest_kept)
    equal = logits == cut
    keep = (logits > cut) | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) > dropped_equal))
    return keep, dropped_equal.squeeze(-1) > 0


def fill_exponential_(noise: Tensor, generator: Generators = None) -> Tensor:
    """Fill a contiguous tensor (B, ..., V) with random numbers of the exponential distribution."""
    if generator is None or isinstance(generator, torch.Generator):
        return noise.exponential_(generator=generator)
    for part, own in zip(noise.split(1), generator, strict=True):
        part.exponential_(generator=own)
    return noise


def exponential_noise(like: Tensor, generator: Generators = None) -> Tensor:
    """Such random numbers in the shape of `like` (B, ..., V)."""
    return fill_exponential_(torch.empty_like(like, memory_format=torch.contiguous_format), generator)


def draw_indices(logits: Tensor, noise: Tensor) -> Tensor:
    """One index per row: filtered logits (B, l, V) and exponential noise like them -> (B, l).

    The largest of p / noise is index i with probability p_i; torch.multinomial draws single samples so, with the same numbers.
    """
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


def mix_weights(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """Gumbel-softmax over the last dimension: (B, ..., V) and exponential noise like them -> weights that sum to 1."""
    return ((logits - noise.log()) / temperature).softmax(dim=-1)


def image_seed(seed: int, number: int) -> int:
    """What the random numbers of one image of a series start from."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]) >> 1
