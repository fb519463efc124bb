"""Generation scale by scale: the loop that computes every scale exactly once.

What is carried from scale to scale is explicit: the mixers' states and the sum of codes so far. Nothing is re-run and nothing
is stored on a module. Guidance is VAR's (arXiv 2404.02905, released sampler): its strength grows linearly from 0 at the first
scale, unless told otherwise. What is done to the logits of a scale stands in models/drawing.py.

The loop, `sample_scales`, takes its random numbers from the caller and no decision depends on a value, so that the whole of it
can be recorded as one CUDA graph (models/captured.py).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.drawing import Generators, draw_indices, exponential_noise, filter_logits, guide, image_seed, mix_weights
from models.editing import Kept
from models.tokenizer import VQVAE
from models.transformer import BlockState, Conditioning, ScaleTransformer

# Images of a series that are always computed together. The rounding of a matrix product depends on its size, so the same image
# in a batch of another size could come out otherwise.
COHORT_SIZE = {"cpu": 16, "cuda": 64}

LARGEST_LOGIT = 1e30  # beyond it guidance has left nothing of what the transformer said

Noise = Callable[[Tensor], Tensor]  # exponential random numbers of the shape of its argument (B, ..., V)


# The share of the guidance's strength at the share p of the scales, 0 at the first, 1 at the last.
GUIDANCE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: p,
    "constant": lambda p: 1.0,
    "cosine": lambda p: (1 - math.cos(math.pi * p)) / 2,
}


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn; what stands here is as published with VAR.

    guidance_scale: strength of guidance, 0 for none. top_k, top_p, min_p: see filter_logits. smooth: mix code vectors by
    Gumbel-softmax. guidance_schedule: how the strength grows over the scales, one of GUIDANCE_SCHEDULES. guidance_scales: first
    and last scale that is guided, counted from 1, None: all. temperature: what logits are divided by, at the first and at the
    last scale, evenly between them; below 1 is likelier.
    """

    guidance_scale: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    smooth: bool = False
    guidance_schedule: str = "linear"
    guidance_scales: tuple[int, int] | None = None
    temperature: tuple[float, float] = (1.0, 1.0)
    min_p: float = 0.0

    def __post_init__(self):
        if self.guidance_scale < 0 or self.top_k < 0 or not 0 <= self.top_p <= 1:
            given = f"guidance_scale={self.guidance_scale}, top_k={self.top_k}, top_p={self.top_p}"
            raise ValueError(f"{given}: give at least 0, and top_p at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: give a share from 0 to 1")
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(f"guidance_schedule={self.guidance_schedule!r}: give one of {', '.join(GUIDANCE_SCHEDULES)}")
        if self.guidance_scales is not None and not 1 <= self.guidance_scales[0] <= self.guidance_scales[1]:
            raise ValueError(f"guidance_scales={self.guidance_scales}: give the first and the last guided scale, from 1 on")
        if not all(0 < value < math.inf for value in self.temperature):
            raise ValueError(f"temperature={self.temperature}: give numbers above 0")

    def guided(self, num_scales: int) -> range:
        """The scales that are guided, counted from 0. ValueError where the pyramid has not that many."""
        if self.guidance_scale == 0:  # Differs from MVAR: its sampler takes guidance 1 for none; here as in VAR only 0 is none
            return range(0)
        first, last = self.guidance_scales or (1, num_scales)
        if last > num_scales:
            raise ValueError(f"guided scales {first}-{last}: the pyramid has {num_scales} scales")
        return range(first - 1, last)

    def strength(self, progress: float) -> float:
        """Of guidance, at the share of the scales that has passed."""
        return self.guidance_scale * GUIDANCE_SCHEDULES[self.guidance_schedule](progress)

    def divisor(self, progress: float) -> float:
        """The temperature there."""
        first, last = self.temperature
        return first + (last - first) * progress


class Refiner(NamedTuple):
    """A second transformer that takes over where another one has drawn the coarse scales (CoDe, arXiv 2411.17787).

    drafted: the first so many scales are the other one's.
    """

    transformer: ScaleTransformer
    drafted: int


class GenerationState(NamedTuple):
    """Everything that one scale hands to the next."""

    blocks: tuple[BlockState, ...]  # of the transformer
    f_hat: Tensor  # (B, code_dim, h_K, w_K), sum of the scales so far
    inputs: Tensor  # (B, h_k * w_k, code_dim), what the transformer sees at the next scale; none at the first


class SampledScales(NamedTuple):
    """What the transformer made of a batch, before it is decoded."""

    indices: list[Tensor]  # K LongTensors (B, h_k * w_k)
    sums: list[Tensor]  # K times (B, code_dim, h_K, w_K): the features after each scale
    finite: Tensor  # () bool: whether all guided logits were numbers, and no absurd ones


class Generation(NamedTuple):
    """A batch of generated images."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    indices: list[Tensor]  # K LongTensors (B, h_k * w_k)
    sums: list[Tensor]  # K times (B, code_dim, h_K, w_K): the features after each scale


class ScaleStep(NamedTuple):
    """One scale of a batch, as it has just been drawn."""

    indices: Tensor  # LongTensor (B, h_k * w_k)
    f_hat: Tensor  # (B, code_dim, h_K, w_K), the features after this scale
    finite: Tensor  # () bool, as in SampledScales


def sample_scales(
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    labels: Tensor,
    config: SamplingConfig,
    noise: Noise,
    refiner: Refiner | None = None,
    kept: Kept | None = None,
) -> SampledScales:
    """All scales of `sample_steps`."""
    indices, sums, finite = zip(*sample_steps(transformer, tokenizer, labels, config, noise, refiner, kept), strict=True)
    return SampledScales(list(indices), list(sums), torch.stack(finite).all())


@torch.no_grad()
def sample_steps(
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    labels: Tensor,
    config: SamplingConfig,
    noise: Noise,
    refiner: Refiner | None = None,
    kept: Kept | None = None,
) -> Iterator[ScaleStep]:
    """The scales of images of the given classes (B,), or of mixed ones (B, num_classes + 1), one after another.

    refiner: who goes on after the first scales, with a state made of them in one pass. kept: what is not drawn.

    noise is asked for random numbers in a fixed order: at each scale those that draw its tokens (B, h_k * w_k, V), and with
    config.smooth as many again. Nothing here waits for the device or depends on a value. What the transformer computes is in
    the precision of its weights, all else in float32.
    """
    codebook, quantizer, pyramid = tokenizer.quantizer.codebook, tokenizer.quantizer, transformer.pyramid
    guided = config.guided(pyramid.num_scales)
    predictor = Predictor(transformer, labels, guided)
    f_hat = quantizer.initial(labels.shape[0])
    state = GenerationState(predictor.init_state(), f_hat, f_hat.flatten(2).transpose(1, 2)[:, :0])
    inputs = []
    for k in pyramid.scales:
        progress = k / max(pyramid.num_scales - 1, 1)
        if refiner is not None and k == refiner.drafted:
            predictor = Predictor(refiner.transformer, labels, guided)
            state = state._replace(blocks=predictor.state_after(inputs))
        inputs.append(state.inputs)
        logits, blocks = predictor.advance(state.inputs, k, state.blocks, config.strength(progress))
        finite = (logits.abs() < LARGEST_LOGIT).all()  # not where one is NaN
        divisor = config.divisor(progress)
        logits = filter_logits(logits if divisor == 1 else logits / divisor, config.top_k, config.top_p, config.min_p)
        indices = draw_indices(logits, noise(logits))
        if kept is not None:
            indices = torch.where(kept.tokens[k], kept.indices[k], indices)
        if config.smooth:
            temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
            weights = mix_weights(logits * (1 + progress), temperature, noise(logits))
            with torch.autocast(logits.device.type, enabled=False):
                vectors = weights @ codebook.weight
            if kept is not None:
                vectors = torch.where(kept.tokens[k][:, None], codebook(kept.indices[k]), vectors)
        else:
            vectors = codebook(indices)
        f_hat = quantizer.add_scale(state.f_hat, k, vectors)
        if kept is not None:
            f_hat = torch.where(kept.places[k], kept.sums[k], f_hat)
        yield ScaleStep(indices, f_hat, finite)
        is_last = k + 1 == pyramid.num_scales
        state = GenerationState(blocks, f_hat, state.inputs if is_last else quantizer.next_input(f_hat, k))


class Predictor:
    """A transformer that gives logits scale by scale, with rows of no class where guidance needs them.

    labels (B,), or mixed, (B, num_classes + 1); guided: consecutive scales that are guided.
    """

    def __init__(self, transformer: ScaleTransformer, labels: Tensor, guided: range):
        self.transformer, self.batch, self.guided = transformer, labels.shape[0], guided
        # scales with rows of no class: those that are guided, and those before them that these remember
        self.doubled = guided if transformer.scales_are_independent else range(guided.stop)
        unconditional = torch.full((len(labels),), transformer.unconditional, device=labels.device)
        if labels.is_floating_point():  # shares of classes
            unconditional = F.one_hot(unconditional, transformer.unconditional + 1).to(labels.dtype)
        self.both = transformer.condition(torch.cat([labels, unconditional]) if guided else labels)
        self.conditional = first_rows(self.both, self.batch)

    def init_state(self) -> tuple[BlockState, ...]:
        return self.transformer.init_state(len(self.both.start))

    def state_after(self, inputs: list[Tensor]) -> tuple[BlockState, ...]:
        """The state after the scales with these inputs, each (B, h_k * w_k, code_dim), that another transformer has drawn."""
        if self.transformer.scales_are_independent:
            return self.init_state()
        drawn, conditioning = self._rows(torch.cat(inputs, dim=1), len(inputs))
        return self.transformer.hidden(drawn, range(len(inputs)), conditioning)[1]

    def advance(
        self, inputs: Tensor, k: int, states: tuple[BlockState, ...], strength: float
    ) -> tuple[Tensor, tuple[BlockState, ...]]:
        """Inputs (B, h_k * w_k, code_dim) of scale k -> its logits (B, h_k * w_k, V), guided or not, and the next state."""
        inputs, conditioning = self._rows(inputs, k)
        hidden, states = self.transformer.hidden(inputs, range(k, k + 1), conditioning, first_rows(states, len(inputs)))
        # The head is linear and guidance a sum with the weights 1 + t and -t: guiding what it reads is half of its products.
        hidden = guide(hidden, strength) if k in self.guided else hidden[: self.batch]
        return self.transformer.logits(hidden), states

    def _rows(self, inputs: Tensor, k: int) -> tuple[Tensor, Conditioning]:
        """Inputs (B, n, code_dim) and what they depend on, with the rows of no class where scale k has them."""
        return (inputs.repeat(2, 1, 1), self.both) if k in self.doubled else (inputs, self.conditional)


def first_rows(parts: Any, count: int) -> Any:
    """The first rows of every tensor (B, ...) in nested tuples."""
    if isinstance(parts, Tensor):
        return parts[:count]
    if parts is None:
        return None
    rows = [first_rows(part, count) for part in parts]
    return type(parts)(*rows) if hasattr(parts, "_fields") else tuple(rows)


def state_bytes(transformer: ScaleTransformer, rows: int) -> int:
    """What is carried from scale to scale for a batch of so many rows, guidance's included.

    After the first scale: it grows no more, keys and values have room for all scales then.
    """
    conditioning = transformer.condition(torch.zeros(rows, dtype=torch.long, device=transformer.head.weight.device))
    inputs = conditioning.start.new_zeros(rows, 0, transformer.config.code_dim)
    with torch.no_grad():
        _, states = transformer.hidden(inputs, range(1), conditioning, transformer.init_state(rows))
    return sum(part.nbytes for block in states for state in block for part in state)


def sample(
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    labels: Tensor,
    config: SamplingConfig,
    generator: Generators = None,
    refiner: Refiner | None = None,
    kept: Kept | None = None,
) -> SampledScales:
    """`sample_scales` with random numbers of a generator on the labels' device, or of one for each image.

    ValueError if the models do not fit.
    """
    check_models(transformer, tokenizer, refiner)
    noise = functools.partial(exponential_noise, generator=generator)
    return sample_scales(transformer, tokenizer, labels, config, noise, refiner, kept)


def decode_sampled(tokenizer: VQVAE, sampled: SampledScales) -> Tensor:
    """Images (B, 3, H, W) in [0, 1]."""
    return (tokenizer.decode_features(sampled.sums[-1]) + 1) / 2


def check_finite(sampled: SampledScales) -> None:
    """ValueError where the transformer gave no numbers; waits for the device."""
    if not sampled.finite:
        raise ValueError(
            "the transformer's logits are not finite: its weights are damaged, its precision is too low, or guidance too strong"
        )


def generate(
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    labels: Tensor,
    guidance_scale: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    generator: Generators = None,
    kept: Kept | None = None,
    **further: Any,
) -> Generation:
    """Images of the given classes.

    labels (B,) in 0 .. num_classes; num_classes stands for no class; or mixed: (B, num_classes + 1) shares. guidance_scale:
    strength t = guidance_scale * k / (K - 1) at scale k = 0 .. K - 1, logits (1 + t) * cond - t * uncond; 0 computes no
    unconditional rows (and gives what strength 0 gives). top_k, top_p: see filter_logits. smooth: mix code vectors by Gumbel-
    softmax instead of choosing one, for pictures, never for FID; the indices returned are then those drawn and not used.
    generator: on the labels' device; one, or one for each image, whose random numbers then do not depend on the others in the
    batch. kept: what is not drawn (models/editing.py). further: fields of SamplingConfig.

    Returns images (B, 3, H, W) in [0, 1], K index tensors (B, h_k * w_k) and the features after each scale.
    ValueError if tokenizer and transformer do not fit, or if the transformer gives no numbers.
    """
    config = SamplingConfig(guidance_scale, top_k, top_p, smooth, **further)
    sampled = sample(transformer, tokenizer, labels, config, generator, kept=kept)
    check_finite(sampled)
    return Generation(decode_sampled(tokenizer, sampled), sampled.indices, sampled.sums)


class Cohort(NamedTuple):
    """Images of a series that are always computed together."""

    numbers: range  # of its images in the series
    labels: Tensor  # (COHORT_SIZE,): the last cohort is filled up, so that it is as large as the others
    generators: list[torch.Generator]  # one for each

    @classmethod
    def of(cls, labels: Sequence[int], cohort: int, seed: int, device: torch.device) -> "Cohort":
        """Number `cohort`, from 0, of the series with these labels. Image n depends on its label, the seed and n alone."""
        size = COHORT_SIZE[device.type]
        numbers = range(cohort * size, (cohort + 1) * size)
        own = torch.tensor([labels[n] if n < len(labels) else labels[0] for n in numbers], device=device)
        generators = [torch.Generator(device).manual_seed(image_seed(seed, n)) for n in numbers]
        return cls(numbers[: len(labels) - numbers.start], own, generators)


def num_cohorts(count: int, device_type: str) -> int:
    """Cohorts of a series of `count` images."""
    return -(-count // COHORT_SIZE[device_type])


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


def check_models(transformer: ScaleTransformer, tokenizer: VQVAE, refiner: Refiner | None = None) -> None:
    """ValueError unless they fit; a refiner has to know the same classes, and both transformers need scales to draw."""
    check_fit(transformer, tokenizer)
    if refiner is None:
        return
    check_fit(refiner.transformer, tokenizer)
    ours, theirs = transformer.config.num_classes, refiner.transformer.config.num_classes
    if ours != theirs:
        raise ValueError(f"the one that refines has {theirs} classes, the one that drafts {ours}: load a pair that fits")
    num_scales = transformer.pyramid.num_scales
    if not 1 <= refiner.drafted < num_scales:
        raise ValueError(f"{refiner.drafted} drafted scales: the pyramid has {num_scales}: give 1 to {num_scales - 1}")
