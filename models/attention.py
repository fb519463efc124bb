"""Attention over the token pyramid, with a history of earlier scales (VAR) or inside each scale only (M-VAR, Markov).

Inside a scale attention is bidirectional. `history=True` also sees all earlier scales (VAR, arXiv 2404.02905, section 3.1),
`history=False` sees the token's own scale (M-VAR, arXiv 2411.10433, section 3.2; Markov MVAR, arXiv 2505.12742, section 3.2).
On chosen scales a k x k window limits what is seen to the neighbourhood of the token (Markov MVAR, section 3.3).

Scales are attended in groups: the first, small ones together in one masked call, each later scale in one dense call. So the
same code serves training (all scales) and generation (one scale), and no mask over the whole sequence exists.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pyramid import Pyramid

LEADING_TOKENS = 160  # the first scales that fit in here share one masked call: 155 tokens of the 256 px pyramid
MAX_LOG_SCALE = math.log(100)  # cap of the learned logit scale of normalised attention


class AttentionState(NamedTuple):
    """Keys and values of all scales so far, (B, heads, L, head_dim); without history it stays empty.

    L is 0 at first, then the length of the whole pyramid: later scales are written behind the earlier ones, in place. So all
    that continues from a state shares its memory: to follow two ways from one state, clone its tensors.
    """

    keys: Tensor
    values: Tensor


def window_mask(height: int, width: int, window: int) -> Tensor:
    """(h * w, h * w) bool: which keys each query sees through a window x window neighbourhood.

    At a border the window is moved inside the map, so every query sees exactly window * window keys (neighbourhood attention,
    NATTEN); along a side shorter than the window it sees the whole side.
    """

    def near(size: int) -> Tensor:  # (size, size): the window along one axis
        positions = torch.arange(size)
        first = (positions - window // 2).clamp(0, max(size - window, 0))
        return (positions >= first[:, None]) & (positions < first[:, None] + window)

    rows, columns = near(height), near(width)
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(height * width, height * width)


def _length(vectors: Tensor) -> Tensor:
    """(..., D) -> (..., 1), what F.normalize divides by."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=1e-12)


class Attention(nn.Module):
    """Multi-head attention: x (B, L_of_scales, C), scales -> (B, L_of_scales, C), state.

    history: whether earlier scales are seen.
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
    ):
        super().__init__()
        assert not (history and windowed_scales), "a window limits attention inside a scale"
        self.pyramid = pyramid
        self.heads = heads
        self.history = history
        self.normalize = normalize
        self.qkv = nn.Linear(width, 3 * width, bias=False)
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
        leading_mask = ids[:, None] >= ids if history else ids[:, None] == ids
        self.register_buffer("leading_mask", leading_mask, persistent=False)
        for k in windowed_scales:
            height, width = pyramid.shapes[k]
            self.register_buffer(f"window_mask_{k}", window_mask(height, width, window), persistent=False)

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
        outputs = []
        for group in self._groups(scales):
            queries = self.pyramid.tokens(group)
            keys = slice(0 if self.history else queries.start, queries.stop)
            rows = slice(queries.start - first_query, queries.stop - first_query)
            columns = slice(keys.start - first_key, keys.stop - first_key)
            y = F.scaled_dot_product_attention(
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                attn_mask=self._mask(group, queries, keys),
                scale=1.0 if self.normalize else 0.25 / math.sqrt(q.shape[-1]),
            )
            outputs.append(y.transpose(1, 2).flatten(2))  # (B, L_of_group, C)
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state  # (B, L_of_scales, C)

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
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, L, 3C)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        if self.normalize:  # in float32, since the scale may reach 100
            wide = torch.promote_types(v.dtype, torch.float32)
            scale = self.log_scale.to(wide).clamp(max=MAX_LOG_SCALE).exp()
            q, k = q.to(wide), k.to(wide)
            q = (q * (scale / _length(q))).to(v.dtype)
            k = (k / _length(k)).to(v.dtype)
        return [q, k, v]

    def _groups(self, scales: range) -> list[range]:
        """Consecutive scales that are attended in one call."""
        leading = range(scales.start, min(scales.stop, self.num_leading))
        rest = range(max(scales.start, self.num_leading), scales.stop)
        return ([leading] if leading else []) + [range(k, k + 1) for k in rest]

    def _mask(self, group: range, queries: slice, keys: slice) -> Tensor | None:
        """The mask of one group, or None where every key is visible."""
        if group.start in self.windowed_scales:
            return getattr(self, f"window_mask_{group.start}")
        return self.leading_mask[queries, keys] if len(group) > 1 else None
