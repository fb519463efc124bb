"""The kinds of block: which mixers make each of them, where windows limit its attention, what it is called and where published.

Whoever adds a kind adds a row to FAMILIES, and for a new mixer a module that is a `Mixer`. Everything else asks these two: the
transformer builds and initialises its blocks from them, training asks whether scales depend on one another, sharding and half
precision what must stay in float32, the counts of operations what is computed in vain, the cards what a model is called.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.attention import Attention
from models.pyramid import Pyramid
from models.ssm import Mamba2

LARGE_SIDE = 13  # markov-mamba: the scales from here on all have windows, or its cost would not be linear

State = Any  # a NamedTuple of tensors, of the mixer's own kind


class Mixer(Protocol):
    """What mixes tokens in a block: a module that says everything about itself.

    carries_state: whether a scale depends on earlier ones through its state. float32_parts: modules in it whose parameters stay
    in float32 where all others are in half precision, and single parameters, which sharded training cannot keep apart.
    hidden_flops: floating-point operations of a forward pass over one image that are computed and masked.
    attention_multiply_adds: of a forward pass over one image, as MVAR (arXiv 2505.12742, table 1) counts attention: projections
    to queries, keys and values and both products with seen scores; 0 for what is no attention.
    """

    carries_state: bool
    float32_parts: list[nn.Module | nn.Parameter]
    hidden_flops: int
    attention_multiply_adds: int

    def __call__(self, x: Tensor, scales: range, state: State | None = None) -> tuple[Tensor, State | None]:
        """x (B, L_of_scales, C), the state of the scales before them, None at the first -> y like x, the next state."""

    def init_state(self, batch: int) -> State:
        """The state before the first scale."""

    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        """Start what is not a plain linear layer, which the transformer starts; depth: of the transformer, in blocks."""


def part_name(mixer: Mixer) -> str:
    """What people call it: the name of its class without a version, such as "mamba"."""
    return type(mixer).__name__.rstrip("0123456789").lower()


@dataclass(frozen=True)
class MixerConfig:
    """What the mixers of a block are built from.

    width: C; heads: of attention; normalize_attention: L2-normalised queries and keys; window: side of the neighbourhood on the
    windowed_scales; attended_scales: of attention with a history, 0: all; scan: of Mamba-2, one of models.ssm.SCANS.
    """

    width: int
    heads: int
    pyramid: Pyramid
    normalize_attention: bool = True
    window: int = 7
    windowed_scales: tuple[int, ...] = ()
    attended_scales: int = 0
    scan: str = "across"


def _attention(config: MixerConfig, history: bool) -> Mixer:
    return Attention(
        config.width,
        config.heads,
        config.pyramid,
        history,
        normalize=config.normalize_attention,
        window=config.window,
        windowed_scales=config.windowed_scales,
        attended_scales=config.attended_scales,
    )


_attention_over_all = functools.partial(_attention, history=True)
_attention_inside = functools.partial(_attention, history=False)


def _mamba(config: MixerConfig) -> Mixer:
    return Mamba2(config.width, config.pyramid.lengths, config.scan)


def _last_two(pyramid: Pyramid) -> tuple[int, ...]:
    return tuple(pyramid.scales[-2:])


def _large(pyramid: Pyramid) -> tuple[int, ...]:
    return pyramid.scales_from_side(LARGE_SIDE)


@dataclass(frozen=True)
class Family:
    """A kind of block.

    title: its name in prose; paper: what it is and where it was published, a line of Markdown. mixers: what builds each of
    them, in their order. windows: the scales with windows unless told, None where the kind has none whatever is told.
    wide_feed_forward_gamma: the gamma of the feed-forward starts like scales and shifts and not like those of the mixers, as in
    the released M-VAR, see `ScaleTransformer.init_weights`.
    """

    title: str
    paper: str
    mixers: tuple[Callable[[MixerConfig], Mixer], ...]
    windows: Callable[[Pyramid], tuple[int, ...]] | None = None
    wide_feed_forward_gamma: bool = False

    @property
    def num_sublayers(self) -> int:
        """Modulated parts of a block: its mixers and the feed-forward."""
        return len(self.mixers) + 1

    def windowed_scales(self, pyramid: Pyramid, from_side: int | None = None) -> tuple[int, ...]:
        """Scales on which attention sees a window only; from_side: those of at least this side, None: as the kind has it."""
        if self.windows is None:
            return ()
        return self.windows(pyramid) if from_side is None else pyramid.scales_from_side(from_side)

    def build(self, config: MixerConfig) -> list[Mixer]:
        """The mixers of a block, their weights not started yet."""
        return [mixer(config) for mixer in self.mixers]

    @functools.cached_property
    def traits(self) -> "Traits":
        """What holds for the kind whatever its size."""
        with torch.device("meta"):  # shapes alone
            mixers = self.build(MixerConfig(width=64, heads=1, pyramid=Pyramid((1, 2))))
        return Traits(
            any(mixer.carries_state for mixer in mixers),
            any(isinstance(mixer, Attention) and mixer.history for mixer in mixers),
            any(isinstance(mixer, Mamba2) for mixer in mixers),
        )


class Traits(NamedTuple):
    """carries_state: scales depend on one another. has_history: attention sees earlier scales. has_mamba: its tensors are those
    of released M-VAR weights."""

    carries_state: bool
    has_history: bool
    has_mamba: bool


FAMILIES = {
    "mvar": Family(
        "M-VAR",
        "[M-VAR](https://arxiv.org/abs/2411.10433): attention inside the scale, then Mamba-2 across scales",
        (_attention_inside, _mamba),
        wide_feed_forward_gamma=True,
    ),
    "var": Family(
        "VAR",
        "[VAR](https://arxiv.org/abs/2404.02905): attention over all scales so far",
        (_attention_over_all,),
    ),
    "markov": Family(
        "Markov MVAR",
        "[Markov MVAR](https://arxiv.org/abs/2505.12742): attention inside the scale, windows on the large scales",
        (_attention_inside,),
        windows=_last_two,
    ),
    "markov-mamba": Family(
        "Markov M-VAR",
        "attention as in [Markov MVAR](https://arxiv.org/abs/2505.12742), then Mamba-2 as in "
        "[M-VAR](https://arxiv.org/abs/2411.10433)",
        (_attention_inside, _mamba),
        windows=_large,
        wide_feed_forward_gamma=True,
    ),
}


def check_family(family: str) -> None:
    """ValueError for a kind of block that is not there."""
    if family not in FAMILIES:
        raise ValueError(f"family {family!r}: give one of {', '.join(FAMILIES)}")
