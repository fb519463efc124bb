"""One transformer over a token pyramid, with exchangeable mixers (VAR, M-VAR, Markov MVAR and the last two together).

A block is a tuple of mixers and a feed-forward, each modulated by the class of the image. The kinds of block differ in their
mixers only and stand in models/families.py.

Training, evaluation and generation are one computation, `ScaleTransformer.advance`, called with all scales at once or with one
scale at a time and the state of those before it. The transformer knows nothing of images: it takes code vectors and gives
logits.

Letters: B images, L tokens, C width, V codes, S sub-layers of a block.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.families import FAMILIES, MixerConfig, State, check_family
from models.hub import HubModel
from models.layers import FeedForward, Modulation, ModulationOffset, drop_paths, modulate, modulation_projection
from models.model_card import Facts, parameter_count, weight_types
from models.pyramid import STANDARD_SIDES, Pyramid
from models.ssm import SCANS
from models.storage import HALF_TYPES, Description

# The published models; arguments of build_transformer beside the family.
PRESETS = {
    **{f"d{depth}": {"depth": depth, "pixels": 256} for depth in (12, 16, 20, 24, 30, 32, 36)},
    "d36-s": {"depth": 36, "pixels": 512, "shared_modulation": True},
}

MOST_NAMES = 20  # of classes that a card lists
USAGE = """```python
import torch
from models import generate
from utils.checkpoint import load_tokenizer, load_transformer

transformer = load_transformer("{source}")  # or models.ScaleTransformer.from_pretrained
tokenizer = load_tokenizer("{tokenizer}")
images = generate(transformer, tokenizer, torch.tensor({labels}), guidance_scale=1.5).images  # (2, 3, H, W) in [0, 1]
```

```bash
python sample.py --ckpt {source} {vae}--out samples.png
```"""

BlockState = tuple[State | None, ...]  # one entry per mixer


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides the computation of a transformer.

    sides: token-map sizes, coarse to fine. blocks: the kind of every block, one of FAMILIES; its length is the depth.
    width: C; heads: of the attention. num_classes: labels 0 .. num_classes - 1, and num_classes itself means "no class".
    num_codes, code_dim: of the tokenizer. ffn_ratio: hidden width of the feed-forward over C.
    normalize_attention: L2-normalised queries and keys. shared_modulation: one projection for all blocks plus an offset each.
    window: side of the neighbourhood in the markov kinds; window_from: it limits scales of at least this side, None: the last
    two in markov, those of side 13 and more in markov-mamba.
    attended_scales: so many scales are seen by attention over earlier scales, its own included; 0: all, as published.
    scan: what Mamba-2 passes over, one of models.ssm.SCANS; "across" all scales, as published.
    drop_path: rate of the last block; it grows linearly from 0 at the first.
    """

    sides: tuple[int | tuple[int, int], ...]
    blocks: tuple[str, ...]
    width: int
    heads: int
    num_classes: int = 1000
    num_codes: int = 4096
    code_dim: int = 32
    ffn_ratio: float = 4.0
    normalize_attention: bool = True
    shared_modulation: bool = False
    window: int = 7
    window_from: int | None = None
    attended_scales: int = 0
    scan: str = "across"
    drop_path: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "sides", Pyramid(self.sides).sides)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        unknown = sorted(set(self.blocks) - set(FAMILIES))
        if unknown or not self.blocks:
            raise ValueError(f"block kinds {unknown or '()'}: every block is one of {', '.join(FAMILIES)}")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window={self.window}: give an odd number, such as 7")
        if self.attended_scales < 0:
            raise ValueError(f"attended_scales={self.attended_scales}: give 1 or more, or 0 for all")
        if self.scan not in SCANS:
            raise ValueError(f"scan={self.scan!r}: give one of {', '.join(SCANS)}")
        if self.shared_modulation and len({FAMILIES[kind].num_sublayers for kind in self.blocks}) > 1:
            raise ValueError("shared_modulation needs blocks of one size: do not mix kinds with and without Mamba")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: give a rate from 0 up to 1")

    @property
    def pyramid(self) -> Pyramid:
        return Pyramid(self.sides)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def drop_path_rates(self) -> list[float]:
        """Of every block."""
        return [self.drop_path * index / max(self.depth - 1, 1) for index in range(self.depth)]

    def windowed_scales(self, kind: str) -> tuple[int, ...]:
        """Scales on which blocks of this kind limit attention to the window."""
        return FAMILIES[kind].windowed_scales(self.pyramid, self.window_from)

    def mixers(self, kind: str) -> MixerConfig:
        """What the mixers of a block of this kind are built from."""
        windowed = self.windowed_scales(kind)
        how = self.normalize_attention, self.window, windowed, self.attended_scales, self.scan
        return MixerConfig(self.width, self.heads, self.pyramid, *how)


class PrecisionPart(NamedTuple):
    """A module of a transformer; exact: its parameters stay in float32 where those of others are in half precision."""

    module: nn.Module
    exact: bool


class Conditioning(NamedTuple):
    """All that depends on the class alone: computed once per batch, whatever the number of scales."""

    start: Tensor  # (B, h_1 * w_1, C), input of the first scale
    blocks: tuple[Modulation, ...]
    head_scale: Tensor  # (B, 1, C)
    head_shift: Tensor  # (B, 1, C)


class Block(nn.Module):
    """Mixers and feed-forward with a residual around each: x (B, L_of_scales, C) -> the same shape, and the next state."""

    def __init__(self, config: TransformerConfig, index: int):
        super().__init__()
        kind = config.blocks[index]
        self.family = FAMILIES[kind]
        self.mixers = nn.ModuleList(self.family.build(config.mixers(kind)))
        self.ffn = FeedForward(config.width, config.ffn_ratio)
        self.num_sublayers = self.family.num_sublayers
        modulation = ModulationOffset if config.shared_modulation else modulation_projection
        self.modulation = modulation(config.width, 3 * self.num_sublayers)  # called by ScaleTransformer.condition

    def init_state(self, batch: int) -> BlockState:
        return tuple(mixer.init_state(batch) for mixer in self.mixers)

    def forward(self, x: Tensor, modulation: Modulation, scales: range, states: BlockState) -> tuple[Tensor, BlockState]:
        gammas, scaling, shifts = (part.unbind(1) for part in modulation)  # S x (B, 1, C) each
        next_states = []
        for i, mixer in enumerate(self.mixers):
            y, state = mixer(modulate(x, scaling[i], shifts[i]), scales, states[i])
            x = torch.addcmul(x, y, gammas[i])
            next_states.append(state)
        y = self.ffn(modulate(x, scaling[-1], shifts[-1]))
        return torch.addcmul(x, y, gammas[-1]), tuple(next_states)


class ScaleTransformer(nn.Module, HubModel):
    """Predicts every token of a pyramid from the scales before it.

    labels (B,) and the code vectors of scales 2..K, inputs (B, L - h_1 * w_1, code_dim) -> logits (B, L, V) in float32.
    """

    config_class = TransformerConfig
    description = Description("transformer")

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.pyramid = config.pyramid
        self.class_embed = nn.Embedding(config.num_classes + 1, config.width)
        self.code_embed = nn.Linear(config.code_dim, config.width)
        self.start_embed = nn.Parameter(torch.zeros(1, self.pyramid.lengths[0], config.width))
        self.position_embed = nn.Parameter(torch.zeros(1, self.pyramid.num_tokens, config.width))
        self.scale_embed = nn.Embedding(self.pyramid.num_scales, config.width)
        self.register_buffer("scale_ids", self.pyramid.scale_ids(), persistent=False)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        if config.shared_modulation:
            self.shared_modulation = modulation_projection(config.width, 3 * self.blocks[0].num_sublayers)
        self.head_modulation = modulation_projection(config.width, 2)
        self.head = nn.Linear(config.width, config.num_codes)

    @property
    def unconditional(self) -> int:
        """The label that means "no class"."""
        return self.config.num_classes

    @property
    def scales_are_independent(self) -> bool:
        """Whether nothing but the inputs connects the scales, so that any of them can be computed without the others."""
        return not any(mixer.carries_state for block in self.blocks for mixer in block.mixers)

    @property
    def precision_parts(self) -> list[PrecisionPart]:
        """The modules that have a precision of their own, inner ones first, the whole last; whatever lies in no other part has
        that of the smallest part around it."""
        parts = []
        for block in self.blocks:
            parts.append(PrecisionPart(block.modulation, exact=False))  # called outside of the block
            exact = [part for mixer in block.mixers for part in mixer.float32_parts]
            parts += [PrecisionPart(part, exact=True) for part in exact if isinstance(part, nn.Module)]
            parts.append(PrecisionPart(block, exact=False))
        return [*parts, PrecisionPart(self, exact=True)]

    def cast_(self, dtype: torch.dtype) -> None:
        """Cast the weights that need not be exact, those of the blocks; what is computed with them then is in that type too."""
        exact = {id(parameter) for block in self.blocks for mixer in block.mixers for parameter in _exact(mixer)}
        for parameter in self.blocks.parameters():
            if id(parameter) not in exact:
                parameter.data = parameter.data.to(dtype)

    def condition(self, labels: Tensor) -> Conditioning:
        """labels (B,) in 0 .. num_classes -> everything that depends on them alone; drop-path is drawn here while training.

        Labels may be mixed: (B, num_classes + 1) shares of every class.
        """
        embedding = labels @ self.class_embed.weight if labels.is_floating_point() else self.class_embed(labels)  # (B, C)
        with self._autocast():
            source = self.shared_modulation(embedding) if self.config.shared_modulation else embedding
            blocks = tuple(Modulation.from_flat(block.modulation(source), block.num_sublayers) for block in self.blocks)
        if self.training and self.config.drop_path > 0:
            blocks = tuple(drop_paths(gates, rate) for gates, rate in zip(blocks, self.config.drop_path_rates, strict=True))
        with torch.autocast(labels.device.type, enabled=False):
            head_scale, head_shift = self.head_modulation(embedding).unsqueeze(1).chunk(2, dim=-1)
        return Conditioning(embedding.unsqueeze(1) + self.start_embed, blocks, head_scale, head_shift)

    def init_state(self, batch: int) -> tuple[BlockState, ...]:
        """The state before the first scale."""
        return tuple(block.init_state(batch) for block in self.blocks)

    def advance(
        self, inputs: Tensor, scales: range, conditioning: Conditioning, states: tuple[BlockState, ...] | None = None
    ) -> tuple[Tensor, tuple[BlockState, ...]]:
        """Logits of consecutive scales and the state after them.

        inputs: code vectors (B, n, code_dim) of these scales, without the first scale, which has none. states: after the
        scales before these; None stands for the beginning. Returns logits (B, L_of_scales, V) float32, states.
        """
        hidden, states = self.hidden(inputs, scales, conditioning, states)
        return self.logits(hidden), states

    def hidden(
        self, inputs: Tensor, scales: range, conditioning: Conditioning, states: tuple[BlockState, ...] | None = None
    ) -> tuple[Tensor, tuple[BlockState, ...]]:
        """What `advance` turns into logits: (B, L_of_scales, C) in float32, and the state."""
        if states is None:
            states = tuple((None,) * len(block.mixers) for block in self.blocks)
        next_states = []
        with self._autocast():
            x = self._embed(inputs, scales, conditioning)  # (B, L_of_scales, C)
            for block, modulation, state in zip(self.blocks, conditioning.blocks, states, strict=True):
                x, state = block(x, modulation, scales, state)
                next_states.append(state)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = modulate(x.to(wide), conditioning.head_scale.to(wide), conditioning.head_shift.to(wide))
        return x, tuple(next_states)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        # Differs from VAR: under autocast too the head is float32; the released one is half precision in spite of its float().
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden, self.head.weight.to(hidden.dtype), self.head.bias.to(hidden.dtype))

    def forward(self, labels: Tensor, inputs: Tensor, first_scale: int = 0) -> Tensor:
        """Teacher forcing: labels (B,), inputs (B, L - h_1 * w_1, code_dim) -> logits (B, L, V) float32.

        Inputs of consecutive scales from first_scale on give the logits of these; the first scale itself has no inputs.
        ValueError if they end inside a scale, or start behind the first one where scales depend on one another.
        """
        if first_scale > 0 and not self.scales_are_independent:
            raise ValueError(f"first_scale={first_scale}: only where all blocks are of kind markov can scales be left out")
        length = self.pyramid.offsets[max(first_scale, 1)] + inputs.shape[1]
        if length not in self.pyramid.offsets:
            raise ValueError(
                f"{inputs.shape[1]} inputs do not end at a scale of the pyramid {self.pyramid}: "
                f"give {self.pyramid.num_inputs} for all of it"
            )
        scales = range(first_scale, self.pyramid.offsets.index(length))
        logits, _ = self.advance(inputs, scales, self.condition(labels))
        return logits

    def _autocast(self) -> contextlib.AbstractContextManager:
        """To the type of cast weights; where they are float32, what is around a call counts, such as a training's autocast."""
        weight = next(self.blocks[0].modulation.parameters())
        if weight.dtype in HALF_TYPES.values():
            return torch.autocast(weight.device.type, dtype=weight.dtype)
        return contextlib.nullcontext()

    def _embed(self, inputs: Tensor, scales: range, conditioning: Conditioning) -> Tensor:
        tokens = self.pyramid.tokens(scales)
        x = self.code_embed(inputs)  # (B, n, C), in autocast's type, which the whole stream then has
        dtype = x.dtype
        if scales.start == 0:
            x = torch.cat([conditioning.start.to(dtype), x], dim=1)
        x = x + self.scale_embed(self.scale_ids[tokens]) + self.position_embed[:, tokens]
        return x.to(dtype)

    @torch.no_grad()
    def init_weights(
        self,
        gamma: float = 1e-5,
        scale_shift: float = 0.5,
        head: float = 0.02,
        std: float | None = None,
        ffn_gamma: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise everything as the released trainers do (VAR's flags in brackets).

        linears, embeddings, positions   truncated normal, sqrt(1 / 3C) or `std` [ini], biases 0
        mixers                           what else their own init_weights says
        ffn fc2                          the same / sqrt(2 * depth)
        modulation, gammas of mixers     the same * gamma [alng]
        modulation, gamma of the ffn     the same * gamma; in kinds with a wide one * ffn_gamma, None: scale_shift, as in the
                                         released M-VAR, which scales the first two of three gammas only and whose published
                                         figures come from it; ffn_gamma = gamma is what was meant
        modulation, scales and shifts    the same * scale_shift [aln]
        head                             the same * head [hd]
        """
        width = self.config.width
        auto = math.sqrt(1 / (3 * width))

        def normal_(tensor: Tensor, deviation: float) -> Tensor:
            return nn.init.trunc_normal_(tensor, std=deviation, generator=generator)

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                normal_(module.weight, auto if std is None else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for parameter in (self.start_embed, self.position_embed):
            normal_(parameter, auto)

        for block in self.blocks:
            for mixer in block.mixers:
                mixer.init_weights(self.config.depth, generator)
            block.ffn.fc2.weight.div_(math.sqrt(2 * self.config.depth))
            if self.config.shared_modulation:
                rows = block.modulation.offset.normal_(std=width**-0.5, generator=generator)
            else:
                rows = block.modulation[-1].weight
            gammas, scales, shifts = rows.unflatten(0, (3, block.num_sublayers, width))  # (S, width, ...) each
            gammas[:-1].mul_(gamma)
            wide = scale_shift if ffn_gamma is None else ffn_gamma
            gammas[-1].mul_(wide if block.family.wide_feed_forward_gamma else gamma)
            for part in (scales, shifts):
                part.mul_(scale_shift)
        self.head_modulation[-1].weight.mul_(scale_shift)
        self.head.weight.mul_(head)

    def facts(self, source: str = "DIRECTORY") -> Facts:
        """What its card on the hub says; source: where it is loaded from."""
        config, pyramid, tokenizer = self.config, self.pyramid, self.description.tokenizer
        height, width = pyramid.shapes[-1]
        pixels = {sides: pixels for pixels, sides in STANDARD_SIDES.items()}.get(pyramid.sides)
        usual = f", {pixels} px where the tokenizer has {pixels // height} px per token" if pixels else ""
        names = self.description.class_names
        kinds = dict.fromkeys(config.blocks)
        rows = {
            "family": "; ".join(f"{config.blocks.count(kind)} blocks {kind}, {FAMILIES[kind].paper}" for kind in kinds),
            "depth, width, heads": f"{config.depth}, {config.width}, {config.heads}",
            "parameters": parameter_count(self),
            "precision of the file": weight_types(self),
            "pyramid": f"{pyramid}, {pyramid.num_tokens} tokens",
            "resolution": f"{height}x{width} tokens{usual}",
            "codes": f"{config.num_codes} of {config.code_dim} numbers",
            "classes": str(config.num_classes) + (f": {', '.join(names)}" if 0 < len(names) <= MOST_NAMES else ""),
            "tokenizer": f"`{tokenizer}`" if tokenizer else "not named",
            **({"hash of its tokens": f"`{self.description.tokenizer_hash}`"} if self.description.tokenizer_hash else {}),
        }
        title = f"{FAMILIES[config.blocks[-1]].title} d{config.depth}, {height}x{width} tokens"
        summary = "Class-conditional image generation, scale by scale. "
        summary += "The tokenizer that turns tokens into images is a model of its own."
        labels, vae = [0, min(1, config.num_classes - 1)], "" if tokenizer else "--vae TOKENIZER "
        usage = USAGE.format(source=source, tokenizer=tokenizer or "TOKENIZER", labels=labels, vae=vae)
        return Facts(title, summary, rows, usage)


def _exact(mixer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a mixer that stay in float32."""
    for part in mixer.float32_parts:
        if isinstance(part, nn.Module):
            yield from part.parameters()
        else:
            yield part


def recompute_blocks_(transformer: ScaleTransformer) -> None:
    """Activation checkpointing: keep only the inputs of every block for the backward pass and compute the rest again."""
    for block in transformer.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def family_config(
    family: str, depth: int, sides: tuple, num_classes: int, global_blocks: int = 0, **config
) -> TransformerConfig:
    """The published shape of a family at a depth: width 64 * depth, `depth` heads, drop-path 0.1 * depth / 24.

    global_blocks: this many blocks at the beginning are of kind "var" (M-VAR, arXiv 2411.10433, figure 5).
    config: further fields of TransformerConfig, which also override the derived ones. ValueError for an unknown family.
    """
    check_family(family)
    if not 0 <= global_blocks <= depth:
        raise ValueError(f"global_blocks={global_blocks}: give 0 to {depth}, the depth")
    derived = {
        "blocks": ("var",) * global_blocks + (family,) * (depth - global_blocks),
        "width": 64 * depth,
        "heads": depth,
        "drop_path": 0.1 * depth / 24,
    }
    return TransformerConfig(sides=sides, num_classes=num_classes, **(derived | config))


def build_transformer(
    family: str = "mvar",
    depth: int = 16,
    pixels: int = 256,
    num_classes: int = 1000,
    sides: tuple | None = None,
    **config,
) -> ScaleTransformer:
    """An initialised transformer of a family, for images of `pixels` with the standard pyramid, or for the pyramid `sides`.

    config: global_blocks and the fields of TransformerConfig, see family_config. ValueError for an unknown family or size.
    """
    if sides is None and pixels not in STANDARD_SIDES:
        raise ValueError(f"pixels={pixels}: give one of {sorted(STANDARD_SIDES)}, or sides=(1, 2, ...)")
    sides = STANDARD_SIDES[pixels] if sides is None else sides
    transformer = ScaleTransformer(family_config(family, depth, sides, num_classes, **config))
    transformer.init_weights()
    return transformer
