"""Generation scale by scale: guidance, top-k and top-p, and the loop that computes every scale exactly once.

What is carried from scale to scale is explicit: the mixers' states and the sum of codes so far. Nothing is re-run and nothing
is stored on a module. Guidance is VAR's (arXiv 2404.02905, released sampler): its strength grows linearly from 0 at the first
scale.

The loop, `sample_scales`, takes its random numbers from the caller and no decision depends on a value, so that the whole of it
can be recorded as one CUDA graph (models/captured.py).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.tokenizer import VQVAE
from models.transformer import BlockState, ScaleTransformer

Generators = torch.Generator | Sequence[torch.Generator] | None  # of a batch, or of each image in it

# Images of a series that are always computed together. The rounding of a matrix product depends on its size, so the same image
# in a batch of another size could come out otherwise.
GROUP_SIZE = {"cpu": 16, "cuda": 64}
SORT_MULTIPLE = 64  # sums over so many numbers or a multiple of it are rounded as those over the vocabulary
# Of the decoder. Half precision is slower on CPUs; what it loses: scripts/benchmark.py sampling.
DECODER_TYPE = {"cpu": torch.float32, "cuda": torch.float16}

Noise = Callable[[Tensor], Tensor]  # exponential random numbers of the shape of its argument (B, ..., V)


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn, see `generate`."""

    guidance_scale: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    smooth: bool = False

    def __post_init__(self):
        if self.guidance_scale < 0 or self.top_k < 0 or not 0 <= self.top_p <= 1:
            given = f"guidance_scale={self.guidance_scale}, top_k={self.top_k}, top_p={self.top_p}"
            raise ValueError(f"{given}: give at least 0, and top_p at most 1")


class GenerationState(NamedTuple):
    """Everything that one scale hands to the next."""

    blocks: tuple[BlockState, ...]  # of the transformer
    f_hat: Tensor  # (B, code_dim, h_K, w_K), sum of the scales so far
    inputs: Tensor  # (B, h_k * w_k, code_dim), what the transformer sees at the next scale; none at the first


class SampledScales(NamedTuple):
    """What the transformer made of a batch, before it is decoded."""

    indices: list[Tensor]  # K LongTensors (B, h_k * w_k)
    sums: list[Tensor]  # K times (B, code_dim, h_K, w_K): the features after each scale
    finite: Tensor  # () bool: whether all logits were numbers


class Generation(NamedTuple):
    """A batch of generated images."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    indices: list[Tensor]  # K LongTensors (B, h_k * w_k)
    sums: list[Tensor]  # K times (B, code_dim, h_K, w_K): the features after each scale


def draw_labels(num_classes: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """(B,) labels, each class equally likely, drawn from the generator on its device."""
    device = generator.device if generator is not None else "cpu"
    return torch.multinomial(torch.ones(num_classes, device=device), batch, replacement=True, generator=generator)


def guide(logits: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance: logits (2B, l, V), conditional rows first -> (1 + strength) * cond - strength * uncond."""
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, 1 + strength)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits (..., V) with all but the top_k largest, then all outside the smallest set of mass top_p, at -inf.

    0 switches a filter off. Ties with the k-th largest stay. Of the tokens that top_p looks at, the smallest whose cumulated
    probability is at most 1 - top_p go; the largest always stays. Which of several equal ones go is up to torch.sort, as in the
    released code: on GPUs, where it is stable, those that stand first.
    """
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


def sample_indices(logits: Tensor, generator: Generators = None) -> Tensor:
    """One index per row: filtered logits (B, l, V) -> (B, l), as torch.multinomial draws them."""
    return draw_indices(logits, exponential_noise(logits, generator))


def mix_weights(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """Gumbel-softmax over the last dimension: (B, ..., V) and exponential noise like them -> weights that sum to 1."""
    return ((logits - noise.log()) / temperature).softmax(dim=-1)


def gumbel_weights(logits: Tensor, temperature: float, generator: Generators = None) -> Tensor:
    """Gumbel-softmax over the last dimension: (B, ..., V) -> weights that sum to 1."""
    return mix_weights(logits, temperature, exponential_noise(logits, generator))


@torch.no_grad()
def sample_scales(
    transformer: ScaleTransformer, tokenizer: VQVAE, labels: Tensor, config: SamplingConfig, noise: Noise
) -> SampledScales:
    """All scales of images of the given classes (B,), one after another.

    noise is asked for random numbers in a fixed order: at each scale those that draw its tokens (B, h_k * w_k, V), and with
    config.smooth as many again. Nothing here waits for the device or depends on a value.
    """
    # Differs from MVAR: its sampler takes guidance 1 for none; here as in VAR only 0 is none.
    guided = config.guidance_scale > 0
    rows = torch.cat([labels, torch.full_like(labels, transformer.unconditional)]) if guided else labels
    conditioning = transformer.condition(rows)
    codebook, quantizer = tokenizer.quantizer.codebook, tokenizer.quantizer
    f_hat = quantizer.initial(labels.shape[0])
    state = GenerationState(transformer.init_state(rows.shape[0]), f_hat, f_hat.flatten(2).transpose(1, 2)[:, :0])
    indices, sums, finite = [], [], []
    for k in transformer.pyramid.scales:
        progress = k / max(transformer.pyramid.num_scales - 1, 1)
        inputs = state.inputs.repeat(2, 1, 1) if guided else state.inputs
        logits, blocks = transformer.advance(inputs, range(k, k + 1), conditioning, state.blocks)
        finite.append(logits.sum().isfinite())
        if guided:
            logits = guide(logits, config.guidance_scale * progress)
        logits = filter_logits(logits, config.top_k, config.top_p)
        indices.append(draw_indices(logits, noise(logits)))
        if config.smooth:
            temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
            vectors = mix_weights(logits * (1 + progress), temperature, noise(logits)) @ codebook.weight
        else:
            vectors = codebook(indices[k])
        f_hat = quantizer.add_scale(state.f_hat, k, vectors)
        sums.append(f_hat)
        is_last = k + 1 == transformer.pyramid.num_scales
        state = GenerationState(blocks, f_hat, state.inputs if is_last else quantizer.next_input(f_hat, k))
    return SampledScales(indices, sums, torch.stack(finite).all())


def decode_sampled(tokenizer: VQVAE, sampled: SampledScales) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], in half precision where there is a GPU."""
    f_hat = sampled.sums[-1]
    return (tokenizer.decode_features(f_hat, DECODER_TYPE[f_hat.device.type]) + 1) / 2


def check_finite(sampled: SampledScales) -> None:
    """ValueError where the transformer gave no numbers; waits for the device."""
    if not sampled.finite:
        raise ValueError("the transformer's logits are not finite: its weights are damaged, or its precision is too low")


def generate(
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    labels: Tensor,
    guidance_scale: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    generator: Generators = None,
) -> Generation:
    """Images of the given classes.

    labels (B,) in 0 .. num_classes; num_classes stands for no class. guidance_scale: strength t = guidance_scale * k / (K - 1)
    at scale k = 0 .. K - 1, logits (1 + t) * cond - t * uncond; 0 computes no unconditional rows (and gives what strength 0
    gives). top_k, top_p: see filter_logits. smooth: mix code vectors by Gumbel-softmax instead of choosing one, for pictures,
    never for FID; the indices returned are then those drawn and not used. generator: on the labels' device; one, or one for
    each image, whose random numbers then do not depend on the others in the batch.

    Returns images (B, 3, H, W) in [0, 1], K index tensors (B, h_k * w_k) and the features after each scale.
    ValueError if tokenizer and transformer do not fit, or if the transformer gives no numbers.
    """
    check_fit(transformer, tokenizer)
    config = SamplingConfig(guidance_scale, top_k, top_p, smooth)
    sampled = sample_scales(transformer, tokenizer, labels, config, functools.partial(exponential_noise, generator=generator))
    check_finite(sampled)
    return Generation(decode_sampled(tokenizer, sampled), sampled.indices, sampled.sums)


class Group(NamedTuple):
    """Images of a series that are computed together."""

    numbers: range  # of its images in the series
    labels: Tensor  # (GROUP_SIZE,): the last group is filled up, so that it is as large as the others
    generators: list[torch.Generator]  # one for each

    @classmethod
    def of(cls, labels: Sequence[int], group: int, seed: int, device: torch.device) -> "Group":
        """Group number `group`, from 0, of the series with these labels. Image n depends on its label, the seed and n alone."""
        size = GROUP_SIZE[device.type]
        numbers = range(group * size, (group + 1) * size)
        own = torch.tensor([labels[n] if n < len(labels) else labels[0] for n in numbers], device=device)
        generators = [torch.Generator(device).manual_seed(image_seed(seed, n)) for n in numbers]
        return cls(numbers[: len(labels) - numbers.start], own, generators)


def num_groups(count: int, device_type: str) -> int:
    """Groups of a series of `count` images."""
    return -(-count // GROUP_SIZE[device_type])


def image_seed(seed: int, number: int) -> int:
    """What the random numbers of one image of a series start from."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]) >> 1


def check_fit(transformer: ScaleTransformer, tokenizer: VQVAE) -> None:
    """ValueError unless both speak of the same pyramid and codebook."""
    ours, theirs = transformer.config, tokenizer.config
    for name, value, other in (
        ("pyramid", ours.pyramid, theirs.pyramid),
        ("number of codes", ours.num_codes, theirs.num_codes),
        ("code width", ours.code_dim, theirs.code_dim),
    ):
        if value != other:
            raise ValueError(f"the transformer's {name} is {value}, the tokenizer's {other}: load a pair that fits")
