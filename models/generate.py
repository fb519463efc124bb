"""Generation scale by scale: guidance, top-k and top-p, and the loop that computes every scale exactly once.

What is carried from scale to scale is explicit: the mixers' states and the sum of codes so far. Nothing is re-run and nothing
is stored on a module. Guidance is VAR's (arXiv 2404.02905, released sampler): its strength grows linearly from 0 at the first
scale.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.tokenizer import VQVAE
from models.transformer import BlockState, ScaleTransformer

Generators = torch.Generator | Sequence[torch.Generator] | None  # of a batch, or of each image in it

# Images of a series that are always computed together. The rounding of a matrix product depends on its size, so the same image
# in a batch of another size could come out otherwise.
GROUP_SIZE = {"cpu": 16, "cuda": 64}


class GenerationState(NamedTuple):
    """Everything that one scale hands to the next."""

    blocks: tuple[BlockState, ...]  # of the transformer
    f_hat: Tensor  # (B, code_dim, h_K, w_K), sum of the scales so far
    inputs: Tensor  # (B, h_k * w_k, code_dim), what the transformer sees at the next scale; none at the first


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
    return (1 + strength) * conditional - strength * unconditional


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits (..., V) with all but the top_k largest, then all outside the smallest set of mass top_p, at -inf.

    0 switches a filter off. Ties with the k-th largest stay. Of the tokens that top_p looks at, the smallest whose cumulated
    probability is at most 1 - top_p go; the largest always stays.
    """
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def sample_indices(logits: Tensor, generator: Generators = None) -> Tensor:
    """One index per row: filtered logits (B, l, V) -> (B, l)."""
    probabilities = logits.softmax(dim=-1)
    drawn = [torch.multinomial(part.flatten(0, -2), 1, True, generator=g) for part, g in _portions(probabilities, generator)]
    return torch.cat(drawn).view(logits.shape[:-1])


def gumbel_weights(logits: Tensor, temperature: float, generator: Generators = None) -> Tensor:
    """Gumbel-softmax over the last dimension: (B, ..., V) -> weights that sum to 1."""
    noise = torch.empty_like(logits)
    for part, g in _portions(noise, generator):
        part.exponential_(generator=g)
    return ((logits - noise.log()) / temperature).softmax(dim=-1)


def _portions(values: Tensor, generator: Generators) -> list[tuple[Tensor, torch.Generator | None]]:
    """Views of values (B, ...), each with the generator that its random numbers come from."""
    if generator is None or isinstance(generator, torch.Generator):
        return [(values, generator)]
    return list(zip(values.split(1), generator, strict=True))


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
    ValueError if tokenizer and transformer do not fit.
    """
    check_fit(transformer, tokenizer)
    if guidance_scale < 0 or top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"guidance_scale={guidance_scale}, top_k={top_k}, top_p={top_p}: give at least 0, and top_p at most 1")
    indices, sums = [], []
    with torch.no_grad():
        # Differs from MVAR: its sampler takes guidance 1 for none; here as in VAR only 0 is none.
        guided = guidance_scale > 0
        rows = torch.cat([labels, torch.full_like(labels, transformer.unconditional)]) if guided else labels
        conditioning = transformer.condition(rows)
        codebook, quantizer = tokenizer.quantizer.codebook, tokenizer.quantizer
        f_hat = quantizer.initial(labels.shape[0])
        state = GenerationState(transformer.init_state(rows.shape[0]), f_hat, f_hat.flatten(2).transpose(1, 2)[:, :0])
        for k in transformer.pyramid.scales:
            progress = k / max(transformer.pyramid.num_scales - 1, 1)
            inputs = state.inputs.repeat(2, 1, 1) if guided else state.inputs
            logits, blocks = transformer.advance(inputs, range(k, k + 1), conditioning, state.blocks)
            if guided:
                logits = guide(logits, guidance_scale * progress)
            logits = filter_logits(logits, top_k, top_p)
            indices.append(sample_indices(logits, generator))
            if smooth:
                temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
                vectors = gumbel_weights(logits * (1 + progress), temperature, generator) @ codebook.weight
            else:
                vectors = codebook(indices[k])
            f_hat = quantizer.add_scale(state.f_hat, k, vectors)
            sums.append(f_hat)
            is_last = k + 1 == transformer.pyramid.num_scales
            state = GenerationState(blocks, f_hat, state.inputs if is_last else quantizer.next_input(f_hat, k))
        images = tokenizer.decode_features(state.f_hat)
    return Generation((images + 1) / 2, indices, sums)


def generate_group(
    transformer: ScaleTransformer, tokenizer: VQVAE, labels: Sequence[int], group: int, seed: int, **settings: Any
) -> Generation:
    """One group of a series of images of which image n depends on its label, the seed and n alone.

    labels: of all images of the series. group: from 0, of GROUP_SIZE images, the last one of those that are left; images do not
    depend on which groups are made, nor in which order. settings: of `generate`.
    """
    device = next(transformer.parameters()).device
    size = GROUP_SIZE[device.type]
    numbers = range(group * size, (group + 1) * size)  # the last group is filled up: it is as large as the others
    own = torch.tensor([labels[n] if n < len(labels) else labels[0] for n in numbers], device=device)
    generators = [torch.Generator(device).manual_seed(image_seed(seed, n)) for n in numbers]
    made = generate(transformer, tokenizer, own, generator=generators, **settings)
    count = min(size, len(labels) - numbers.start)
    indices, sums = ([part[:count] for part in parts] for parts in (made.indices, made.sums))
    return Generation(made.images[:count], indices, sums)


def num_groups(count: int, device_type: str) -> int:
    """Groups of a series of `count` images."""
    return -(-count // GROUP_SIZE[device_type])


def image_seed(seed: int, number: int) -> int:
    """What the random numbers of one image of a series start from."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)


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
