"""Attention over the token pyramid, with a history of earlier scales (VAR) or inside each scale only (M-VAR, Markov).

Inside a scale attention is bidirectional. `history=True` also sees earlier scales, all of them (VAR, arXiv 2404.02905, section
3.1) or a number; `history=False` sees the token's own scale alone (M-VAR, arXiv 2411.10433, section 3.2; Markov MVAR, arXiv
2505.12742, section 3.2). On chosen scales a k x k window limits what is seen to the neighbourhood of the token (Markov MVAR,
section 3.3).

The first, small scales are attended together in one masked call, each later scale in a call of its own. So the same
code serves training (all scales) and generation (one scale), and no mask over the whole sequence exists.

Windows cost time and memory linear in the tokens: a large map is cut into tiles of queries, each of which is attended with the
keys of the tile and of a halo around it, under a small mask.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import LinearOfOtherBias
from models.pyramid import Pyramid

LEADING_TOKENS = 160  # the first scales that fit in here share one masked call: 155 tokens of the 256 px pyramid
TILE = 8  # side of a tile of queries: of 6 to 16 the fastest on sides 24 to 64, forward and backward
UNDIVIDED = 1.5  # sides shorter than so many tiles with their halos are not cut: one masked call is faster up to side 20
MAX_LOG_SCALE = math.log(100)  # cap of the learned logit scale of normalised attention


class AttentionState(NamedTuple):
    """Keys and values of all scales so far, (B, heads, L, head_dim); without history it stays empty.

    L is 0 at first, then the length of the whole pyramid: later scales are written behind the earlier ones, in place. So all
    that continues from a state shares its memory: to follow two ways from one state, clone its tensors.
    """

    keys: Tensor
    values: Tensor


def _in_window(queries: Tensor, keys: Tensor, size: int, window: int) -> Tensor:
    """Which keys each query sees along one side of a map, from their positions (broadcast together).

    At a border the window is moved inside the map, so every query sees exactly `window` keys (neighbourhood attention, NATTEN);
    along a side shorter than the window it sees the whole side.
    """
    first = (queries - window // 2).clamp(0, max(size - window, 0))
    return (keys >= first) & (keys < first + window)


def window_mask(height: int, width: int, window: int) -> Tensor:
    """(h * w, h * w) bool: which keys each query sees through a window x window neighbourhood, on the whole map at once."""
    rows, columns = (_in_window(torch.arange(n)[:, None], torch.arange(n), n, window) for n in (height, width))
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(height * width, height * width)


@dataclass(frozen=True)
class Tiling:
    """One side of a map, cut into `count` tiles of `tile` queries; the keys of a tile are its own and `reach` on either side.

    All tiles are equal, so the side is padded to count * tile queries. Half of that stands at either end, which leaves every
    tile more than `reach` queries of the map: the window of a query at the border then lies within the halo of its tile.
    """

    size: int
    window: int
    count: int
    tile: int
    reach: int

    @classmethod
    def of(cls, size: int, window: int) -> "Tiling":
        tile, reach = max(TILE, window + 1), window // 2
        if size < UNDIVIDED * (tile + 2 * reach):
            return cls(size, window, count=1, tile=size, reach=0)
        count = math.ceil(size / tile)
        return cls(size, window, count, math.ceil(size / count), reach)

    @property
    def halo(self) -> int:
        """Keys of a tile."""
        return self.tile + 2 * self.reach

    @property
    def scores(self) -> tuple[int, int]:
        """Along this side: how many pairs of query and key are computed, and how many are seen."""
        return self.count * self.tile * self.halo, self.size * min(self.window, self.size)

    @property
    def before(self) -> int:
        """Padding before the first query."""
        return (self.count * self.tile - self.size) // 2

    @property
    def after(self) -> int:
        return self.count * self.tile - self.size - self.before

    @property
    def apart(self) -> int:
        """Tiles so far apart share no keys."""
        return math.ceil(self.halo / self.tile)

    def every(self, x: Tensor, dim: int, first: int) -> Tensor:
        """Halos of tiles `first`, first + apart, ... along a dimension of a padded map, as a view: (..., tiles, halo, ...).

        Slices, not unfold: what is written through an unfolded view torch.compile loses (PyTorch 2.15).
        """
        count, period = math.ceil((self.count - first) / self.apart), self.apart * self.tile
        x = x.narrow(dim, first * self.tile, count * period).unflatten(dim, (count, period))
        return x.narrow(dim + 1, 0, self.halo)

    def visible(self) -> Tensor:
        """(count, tile, halo) bool: which keys of its tile each query sees along this side; queries in the padding see some."""
        tiles = torch.arange(self.count).view(-1, 1, 1) * self.tile - self.before
        queries = (tiles + torch.arange(self.tile).view(-1, 1)).clamp(0, self.size - 1)
        return _in_window(queries, tiles - self.reach + torch.arange(self.halo), self.size, self.window)


class _Halos(torch.autograd.Function):
    """The keys of every tile: x (B, H, h, w, D) -> (B, H, tiles down, tiles across, halo down, halo across, D).

    A view of the padded map, copied. In the backward pass tiles far enough apart not to share keys are added at once: linear
    in the tokens and always in the same order, while autograd takes three times as long for the same view.
    """

    @staticmethod
    def forward(ctx, x: Tensor, down: Tiling, across: Tiling) -> Tensor:
        ctx.tilings = down, across
        borders = [(side.reach + side.before, side.reach + side.after) for side in (across, down)]
        x = F.pad(x, (0, 0, *borders[0], *borders[1]))  # (B, H, h + padding, w + padding, D)
        return x.unfold(2, down.halo, down.tile).unfold(3, across.halo, across.tile).movedim(4, -1).contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        down, across = ctx.tilings
        grad = grad.transpose(3, 4)  # (B, H, tiles down, halo down, tiles across, halo across, D)
        sizes = [(side.count + side.apart - 1) * side.tile for side in (down, across)]
        x = grad.new_zeros(*grad.shape[:2], *sizes, grad.shape[-1])  # (B, H, h + padding, w + padding, D)
        for i in range(min(down.apart, down.count)):
            for j in range(min(across.apart, across.count)):
                halos = across.every(down.every(x, 2, i), 4, j)
                halos += grad[:, :, i :: down.apart, :, j :: across.apart]
        top, left = (side.reach + side.before for side in (down, across))
        return x[:, :, top : top + down.size, left : left + across.size], None, None


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, tilings: tuple[Tiling, Tiling], visible: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """Attention through windows on one map: (B, H, h * w, D) each -> (B, h * w, H * D).

    tilings, visible: of the map's height and width.
    """
    (down, across), (batch, heads, _, dim) = tilings, q.shape
    # (tiles down, tiles across, tile down, tile across, halo down, halo across)
    rows, columns = (q.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf) for seen in visible)
    mask = rows[:, None, :, None, :, None] + columns[None, :, None, :, None, :]
    num_tiles = down.count * across.count
    mask = mask.view(1, num_tiles, down.tile * across.tile, down.halo * across.halo)
    if num_tiles == 1:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)  # (B, H, h * w, D)
        return y.transpose(1, 2).flatten(2)

    q, k, v = (x.unflatten(2, (down.size, across.size)) for x in (q, k, v))  # (B, H, h, w, D)
    if down.after or across.after:  # else padding would copy
        q = F.pad(q, (0, 0, across.before, across.after, down.before, down.after))
    q = q.unflatten(3, (across.count, across.tile)).unflatten(2, (down.count, down.tile)).transpose(3, 4)
    # One mask for all images and heads: these make the batch, tiles stand where the kernels have heads.
    q = q.reshape(batch * heads, num_tiles, -1, dim)  # (B * H, tiles, queries, D)
    k, v = (_Halos.apply(x, down, across).view(batch * heads, num_tiles, -1, dim) for x in (k, v))  # (B * H, tiles, keys, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    y = y.view(batch, heads, down.count, across.count, down.tile, across.tile, dim)
    y = y.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)  # (B, h + padding, w + padding, H, D)
    y = y[:, down.before : down.before + down.size, across.before : across.before + across.size]
    return y.reshape(batch, -1, heads * dim)


def _length(vectors: Tensor) -> Tensor:
    """(..., D) -> (..., 1), what F.normalize divides by."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=1e-12)


class Attention(nn.Module):
    """Multi-head attention: x (B, L_of_scales, C), scales -> (B, L_of_scales, C), state.

    history: whether earlier scales are seen; attended_scales: with history so many, its own included, are; 0: all.
    window: side of the neighbourhood on the scales named by windowed_scales.
    normalize: L2-normalise queries and keys, with a learned scale per head (VAR's `anorm`); else softmax scale 0.25 / sqrt(d).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        pyramid: Pyramid,
        history: bool,
        normalize: bool = True,
        window: int = 7,
        windowed_scales: tuple[int, ...] = (),
        attended_scales: int = 0,
    ):
        super().__init__()
        assert not (history and windowed_scales), "a window limits attention inside a scale"
        self.pyramid = pyramid
        self.heads = heads
        self.attended_scales = (attended_scales or pyramid.num_scales) if history else 1
        self.history = self.carries_state = self.attended_scales > 1
        self.normalize = normalize
        self.window = window
        self.qkv = LinearOfOtherBias(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))  # keys have no bias: it would cancel in the softmax
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        if normalize:
            self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))

        windowed_scales = tuple(k for k in windowed_scales if max(pyramid.shapes[k]) > window)
        self.windowed_scales = windowed_scales
        fits = [end <= LEADING_TOKENS and k not in windowed_scales for k, end in enumerate(pyramid.offsets[1:])]
        self.num_leading = fits.index(False) if False in fits else pyramid.num_scales
        ids = pyramid.scale_ids()[: pyramid.offsets[self.num_leading]]
        distance = ids[:, None] - ids  # scales from the query back to the key
        leading_mask = (distance >= 0) & (distance < self.attended_scales)
        self.register_buffer("leading_mask", leading_mask, persistent=False)
        self.tilings = {size: Tiling.of(size, window) for k in windowed_scales for size in pyramid.shapes[k]}
        for size, tiling in self.tilings.items():
            self.register_buffer(f"visible_{size}", tiling.visible(), persistent=False)

    @property
    def float32_parts(self) -> list[nn.Module | nn.Parameter]:
        return [self.log_scale] if self.normalize else []

    @property
    def hidden_scores(self) -> int:
        """Per head: scores that are computed in windows, all scales together, and masked."""
        pairs = [[self.tilings[size].scores for size in self.pyramid.shapes[k]] for k in self.windowed_scales]
        return sum(down[0] * across[0] - down[1] * across[1] for down, across in pairs)

    @property
    def hidden_flops(self) -> int:
        """Of one image: two products of each head's width per hidden score, two operations per multiply-add."""
        return 2 * 2 * len(self.q_bias) * self.hidden_scores

    @property
    def attention_multiply_adds(self) -> int:
        """Of one image, as MVAR (arXiv 2505.12742, table 1) counts: x to q, k and v, and two products per seen score."""
        width = len(self.q_bias)
        return 3 * self.pyramid.num_tokens * width**2 + 2 * width * sum(map(self._seen_scores, self.pyramid.scales))

    def _seen_scores(self, k: int) -> int:
        """Pairs of a query of scale k and a key that it sees."""
        length = self.pyramid.lengths[k]
        if k in self.windowed_scales:
            return math.prod(self.tilings[size].scores[1] for size in self.pyramid.shapes[k])
        seen = self.pyramid.tokens(self.seen_scales(k))
        return length * (seen.stop - seen.start)

    def seen_scales(self, k: int) -> range:
        """The scales that queries of scale k see, windows aside."""
        return range(max(k + 1 - self.attended_scales, 0), k + 1)

    @torch.no_grad()
    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        """The output starts smaller in deeper transformers; all else is as the linear layers and this module start."""
        self.proj.weight.div_(math.sqrt(2 * depth))

    def init_state(self, batch: int) -> AttentionState:
        like = {"device": self.q_bias.device, "dtype": self.q_bias.dtype}
        empty = torch.zeros(batch, self.heads, 0, self.q_bias.shape[0] // self.heads, **like)
        return AttentionState(empty, empty)

    def forward(self, x: Tensor, scales: range, state: AttentionState | None = None) -> tuple[Tensor, AttentionState | None]:
        """x (B, L_of_scales, C); state: of the scales before `scales`, None at the first. Returns y like x, next state."""
        q, k, v = self._project(x)  # (B, H, L_of_scales, D) each
        if self.history:
            if state is None:
                state = AttentionState(k, v)
            else:
                state = AttentionState(self._written(state.keys, k, scales), self._written(state.values, v, scales))
            k, v = (part[:, :, : self.pyramid.offsets[scales.stop]] for part in state)

        first_query = self.pyramid.offsets[scales.start]
        first_key = 0 if self.history else first_query
        scale = self._softmax_scale(q)
        outputs = []
        for together in self._calls(scales):
            queries = self.pyramid.tokens(together)
            keys = slice(self.pyramid.offsets[self.seen_scales(together.start).start], queries.stop)
            rows = slice(queries.start - first_query, queries.stop - first_query)
            columns = slice(keys.start - first_key, keys.stop - first_key)
            parts = q[:, :, rows], k[:, :, columns], v[:, :, columns]
            if together.start in self.windowed_scales:
                shape = self.pyramid.shapes[together.start]
                tilings = tuple(self.tilings[size] for size in shape)
                visible = tuple(getattr(self, f"visible_{size}") for size in shape)
                outputs.append(windowed_attention(*parts, tilings, visible, scale))
            else:
                mask = self.leading_mask[queries, keys] if len(together) > 1 else None
                y = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)  # (B, H, L_together, D)
                outputs.append(y.transpose(1, 2).flatten(2))
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state  # (B, L_of_scales, C)

    def weights(self, x: Tensor, scales: range) -> Iterator[tuple[int, int, Tensor]]:
        """For people who want to see them: scale, head and attention weights (B, h_k * w_k, keys), one after another.

        x (B, L_of_scales, C), from the first scale on; keys: the tokens of its `seen_scales`.
        """
        q, k, _ = self._project(x)  # (B, H, L_of_scales, D) each
        scale = self._softmax_scale(q)
        for number in scales:
            queries = self.pyramid.tokens(range(number, number + 1))
            keys = self.pyramid.tokens(self.seen_scales(number))
            hidden = None
            if number in self.windowed_scales:
                hidden = ~window_mask(*self.pyramid.shapes[number], self.window).to(x.device)
            for head in range(self.heads):
                scores = scale * q[:, head, queries].float() @ k[:, head, keys].float().transpose(1, 2)
                yield number, head, (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(dim=-1)

    def _softmax_scale(self, q: Tensor) -> float:
        """Beside that which normalised queries (B, H, L, D) have already."""
        return 1.0 if self.normalize else 0.25 / math.sqrt(q.shape[-1])

    def _written(self, past: Tensor, new: Tensor, scales: range) -> Tensor:
        """past (B, H, L, D) with new (B, H, L_of_scales, D) in place of these scales, in place where it is long enough."""
        first, end = self.pyramid.offsets[scales.start], self.pyramid.offsets[scales.stop]
        if past.shape[2] < end:  # in the type of the first keys, which is narrower than the parameters' under autocast
            longer = new.new_empty(*new.shape[:2], self.pyramid.num_tokens, new.shape[3])
            longer[:, :, :first] = past[:, :, :first]
            past = longer
        past[:, :, first:end] = new
        return past

    def _project(self, x: Tensor) -> list[Tensor]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(x, bias)  # (B, L, 3C)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        if self.normalize:  # in float32, since the scale may reach 100
            wide = torch.promote_types(v.dtype, torch.float32)
            scale = self.log_scale.to(wide).clamp(max=MAX_LOG_SCALE).exp()
            q, k = q.to(wide), k.to(wide)
            q = (q * (scale / _length(q))).to(v.dtype)
            k = (k / _length(k)).to(v.dtype)
        return [q, k, v]

    def _calls(self, scales: range) -> list[range]:
        """Consecutive scales that are attended in one call."""
        leading = range(scales.start, min(scales.stop, self.num_leading))
        rest = range(max(scales.start, self.num_leading), scales.stop)
        return ([leading] if leading else []) + [range(k, k + 1) for k in rest]
