"""Mamba-2 over the flattened token pyramid, in plain PyTorch (Mamba-2: arXiv 2405.21060; in M-VAR: arXiv 2411.10433, section
3.3).

The recurrence over tokens t, for every head with its scalar decay a_t = exp(dt_t * A),

    h_t = a_t * h_{t-1} + dt_t * x_t B_t^T,      y_t = h_t C_t + D * x_t,

is computed in chunks of at most 64 tokens: matrix products inside a chunk, and the state h (head_dim x state_dim per head)
handed from chunk to chunk (arXiv 2405.21060, section 6). Convolution and state run straight across the borders of scales; other
ways (SCANS) are there to see what this one is worth. The state goes in and comes out, so generation scale by scale is the same
computation cut into pieces.

Parameters are named and shaped as in mamba_ssm's Mamba2 with ngroups = 1; those between the projections stand under `ssm`.
What is here is plain PyTorch, the default and the reference; models/scan_backends.py replaces parts of it by GPU kernels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_CHUNK = 64
# Tokens of all images together that a CPU computes at once: what more of them need leaves its caches, and the system may give
# its memory anew at every call, which was two thirds of the time of 32 images of 256 tokens.
MAX_PIECE = 1024
NORM_EPS = 1e-5
DT_RANGE = (1e-3, 1e-1)  # initial step sizes, log-uniform (Mamba-2's own initialisation)
DT_FLOOR = 1e-4
# what it passes over: all scales in raster order (M-VAR), each scale anew, or all scales, each from its last token to its first
SCANS = ("across", "within", "reversed")
CONV_STD = 0.02  # of the initial convolution, as released with M-VAR
A_RANGE = (1.0, 16.0)  # initial decay rates, uniform


class MambaState(NamedTuple):
    """What the next token needs of all earlier ones; its size does not depend on how many there were."""

    conv: Tensor  # (B, d_conv - 1, conv_dim), the last inputs of the convolution
    ssm: Tensor  # (B, heads, head_dim, state_dim), at least float32


def chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, max_chunk: int = MAX_CHUNK
) -> tuple[Tensor, Tensor]:
    """The recurrence above without D, in matrix form.

    x (batch, L, H, P); dt (batch, L, H) > 0; A (H,) < 0; B, C (batch, L, N); state (batch, H, P, N), None at the first token.
    Returns y (batch, L, H, P) in x's dtype and the state after the last token. Steps, decays, C B^T and states are computed in
    float32 at least. Decays are exponentials of differences of cumulative sums, never quotients of exponentials, so they
    cannot overflow; and the difference is cut at 0 before the exponential, so the unused half cannot either. The sums of
    dt * A over a chunk should stay under some thousands (trained models: under a hundred), or differences lose digits.
    """
    length = x.shape[1]
    num_chunks = math.ceil(length / max_chunk)
    chunk = math.ceil(length / num_chunks)
    padding = num_chunks * chunk - length
    if padding:  # dt = 0 neither decays nor writes the state
        x, dt = F.pad(x, (0, 0, 0, 0, 0, padding)), F.pad(dt, (0, 0, 0, padding))
        B, C = F.pad(B, (0, 0, 0, padding)), F.pad(C, (0, 0, 0, padding))

    # (batch, n, Q, ...): tokens stay in front of heads wherever B and C serve all heads, so that these are not copied for each
    wide = torch.promote_types(x.dtype, torch.float32)
    dt, B, C = (part.to(wide).unflatten(1, (num_chunks, chunk)) for part in (dt, B, C))  # (batch, n, Q, H), N, N
    xdt = x.to(wide).unflatten(1, (num_chunks, chunk)) * dt.unsqueeze(-1)  # (batch, n, Q, H, P)
    decay = (dt * A.to(wide)).cumsum(2)  # (batch, n, Q, H), log decay from the chunk's start

    # inside the chunks: y_i = sum over j <= i of (C_i . B_j) exp(decay_i - decay_j) dt_j x_j
    by_head = decay.transpose(2, 3)  # (batch, n, H, Q)
    between = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).clamp(max=0).exp()  # (batch, n, H, Q, Q)
    weights = (C @ B.transpose(-1, -2)).tril().unsqueeze(2) * between  # (batch, n, H, Q, Q), 0 where j > i
    y = weights.to(x.dtype) @ xdt.to(x.dtype).transpose(2, 3)  # (batch, n, H, Q, P)
    y = y.transpose(2, 3).to(wide)  # (batch, n, Q, H, P)

    # across chunks: what each chunk adds to the state, and what it takes from the state before it
    kept = decay.exp().unsqueeze(-1)  # (batch, n, Q, H, 1), of the state before the chunk
    to_end = (decay[:, :, -1:] - decay).exp().unsqueeze(-1)  # (batch, n, Q, H, 1)
    added = (xdt * to_end).flatten(3).transpose(-1, -2) @ B  # (batch, n, H * P, N)
    added = added.unflatten(2, x.shape[2:])  # (batch, n, H, P, N)
    pieces = []
    for n in range(num_chunks):
        if state is None:
            pieces.append(y[:, n])
            state = added[:, n]
            continue
        state = state.to(wide)
        from_state = (C[:, n] @ state.flatten(1, 2).transpose(-1, -2)).unflatten(2, x.shape[2:])  # (batch, Q, H, P)
        pieces.append(torch.addcmul(y[:, n], kept[:, n], from_state))
        state = torch.addcmul(added[:, n], kept[:, n, -1:].transpose(1, 2), state)

    y = pieces[0] if num_chunks == 1 else torch.cat(pieces, dim=1)
    return y[:, :length].to(x.dtype), state  # (batch, L, H, P)


class _CausalConv(torch.autograd.Function):
    """y_t = bias + sum_i weight_i * x_{t+i} over the taps i: x (B, L + taps - 1, D), weight (D, taps), bias (D,) -> (B, L, D).

    Written as shifted products in place: no change of layout, and no copies of the input for the backward pass. On a CPU the
    forward pass is the library's convolution of a channels-last map of height 1, which is four times as fast.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.device.type == "cpu":
            maps = x.transpose(1, 2).unsqueeze(2)  # (B, D, 1, L + taps - 1)
            y = F.conv2d(maps, weight.to(x.dtype)[:, None, None], bias.to(x.dtype), groups=weight.shape[0])
            return y.squeeze(2).transpose(1, 2)  # (B, L, D)
        length = x.shape[1] - weight.shape[1] + 1
        first, *others = weight.to(x.dtype).unbind(1)
        y = torch.addcmul(bias.to(x.dtype), x[:, :length], first)
        for i, tap in enumerate(others, start=1):
            y.addcmul_(x[:, i : i + length], tap)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        length = grad.shape[1]
        grad_x = torch.zeros_like(x)
        grad_weight = []
        wide = grad.to(weight.dtype)  # sums over all tokens, in the precision of the parameters
        for i, tap in enumerate(weight.to(x.dtype).unbind(1)):
            grad_x[:, i : i + length].addcmul_(grad, tap)
            grad_weight.append((wide * x[:, i : i + length]).sum((0, 1)))
        return grad_x, torch.stack(grad_weight, dim=1), wide.sum((0, 1))


def causal_conv(x: Tensor, tail: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution along the tokens: x (B, L, D), the d_conv - 1 inputs before it as tail (B, d_conv - 1, D).

    tail: None at the first token. weight (D, 1, d_conv), bias (D,). Returns y (B, L, D) and the new tail.
    """
    padded = behind_tail(x, tail, weight.shape[-1] - 1)
    # the tail is a copy: a view would keep all of x in memory for as long as the state lives
    return _CausalConv.apply(padded, weight.squeeze(1), bias), padded[:, x.shape[1] :].clone()


def behind_tail(x: Tensor, tail: Tensor | None, count: int) -> Tensor:
    """x (B, L, D) with the `count` inputs before it in front, zeros where there were none: (B, count + L, D) in x's dtype."""
    return F.pad(x, (0, 0, count, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], dim=1)


def conv_silu(x: Tensor, tail: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU of `causal_conv`, and the new tail."""
    y, tail = causal_conv(x, tail, weight, bias)
    return F.silu(y), tail


class GatedRMSNorm(nn.Module):
    """RMS norm of y * silu(z) over the last dimension, with a weight; statistics in float32 at least."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = y.to(wide) * F.silu(z.to(wide))
        return (F.rms_norm(gated, gated.shape[-1:], self.weight.to(wide), NORM_EPS)).to(y.dtype)


def _turned(x: Tensor, lengths: list[int]) -> Tensor:
    """x (B, L, D) with the tokens of every scale in the opposite order; twice is x again."""
    return torch.cat([part.flip(1) for part in x.split(lengths, dim=1)], dim=1)


class StateSpace(nn.Module):
    """What Mamba-2 does between its projections: convolution, scan and gated norm, with everything in float32 that they learn.

    A module of its own so that its few, sensitive parameters stay in float32 where a sharded model keeps the large ones in half
    precision, and so that the backward pass can recompute it.
    """

    def __init__(self, inner: int, state_dim: int, d_conv: int, head_dim: int):
        super().__init__()
        self.inner, self.state_dim, self.head_dim, self.heads = inner, state_dim, head_dim, inner // head_dim
        self.d_conv, self.conv_dim = d_conv, inner + 2 * state_dim  # x, B and C pass through the convolution
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim)  # parameters for causal_conv
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(inner)
        # how it is computed, see models/scan_backends.py; whole: all of it at once where nothing came before
        self.scan: Callable[..., tuple[Tensor, Tensor]] = chunked_scan
        self.conv: Callable[..., tuple[Tensor, Tensor]] = conv_silu
        self.whole: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Mamba-2's own initialisation of the step sizes, the decays, D and the norm; the convolution is the caller's."""
        low, high = map(math.log, DT_RANGE)
        steps = torch.empty_like(self.dt_bias).uniform_(low, high, generator=generator).exp_().clamp_(min=DT_FLOOR)
        with torch.no_grad():
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
            self.A_log.uniform_(*A_RANGE, generator=generator).log_()
            self.D.fill_(1)
            self.norm.weight.fill_(1)

    def init_state(self, batch: int) -> MambaState:
        options = {"device": self.D.device}
        wide = torch.promote_types(self.D.dtype, torch.float32)
        return MambaState(
            torch.zeros(batch, self.d_conv - 1, self.conv_dim, dtype=self.D.dtype, **options),
            torch.zeros(batch, self.heads, self.head_dim, self.state_dim, dtype=wide, **options),
        )

    def forward(self, zxBC: Tensor, dt: Tensor, conv: Tensor | None, ssm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, inner + conv_dim), (B, L, H), state, None at the first token -> (B, L, inner), state.

        On a CPU a few images at a time, and long sequences piece by piece.
        """
        if self.whole is not None and ssm is None:
            with torch.autocast(zxBC.device.type, enabled=False):
                return self.whole(self, zxBC, dt)
        batch, length = dt.shape[:2]
        if zxBC.device.type != "cpu" or batch * length <= MAX_PIECE:
            return self._advance(zxBC, dt, conv, ssm)
        images = max(1, MAX_PIECE // length)
        parts = ([None] * batch if part is None else part.split(images) for part in (zxBC, dt, conv, ssm))
        y, conv, ssm = zip(*(self._in_pieces(*own) for own in zip(*parts, strict=False)), strict=True)
        return torch.cat(y), torch.cat(conv), torch.cat(ssm)

    def _in_pieces(self, zxBC: Tensor, dt: Tensor, conv: Tensor | None, ssm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        pieces = []
        for part, steps in zip(zxBC.split(MAX_PIECE, dim=1), dt.split(MAX_PIECE, dim=1), strict=True):
            y, conv, ssm = self._advance(part, steps, conv, ssm)
            pieces.append(y)
        return torch.cat(pieces, dim=1), conv, ssm

    def steps(self, dt: Tensor) -> Tensor:
        """What the projection gives, (B, L, H) -> step sizes above 0, in float32 at least."""
        return F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias)

    def _advance(self, zxBC: Tensor, dt: Tensor, conv: Tensor | None, ssm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(zxBC.device.type, enabled=False):
            z, xBC = zxBC.split([self.inner, self.conv_dim], dim=-1)
            xBC, conv = self.conv(xBC, conv, self.conv1d.weight, self.conv1d.bias)
            x, B, C = xBC.split([self.inner, self.state_dim, self.state_dim], dim=-1)
            x = x.unflatten(-1, (self.heads, self.head_dim))  # (B, L, H, P)
            dt = self.steps(dt)
            y, ssm = self.scan(x, dt, -self.A_log.exp(), B, C, ssm)
            y = torch.addcmul(y, x, self.D.to(x.dtype).view(-1, 1))
            return self.norm(y.flatten(2), z), conv, ssm


class Mamba2(nn.Module):
    """Mamba-2 mixer: x (B, L_of_scales, C), scales -> (B, L_of_scales, C), state.

    scan: one of SCANS, what the recurrence passes over; lengths: tokens of every scale, which all but "across" ask for.
    """

    hidden_flops = 0
    attention_multiply_adds = 0

    def __init__(
        self,
        width: int,
        lengths: tuple[int, ...] = (),
        scan: str = "across",
        state_dim: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
    ):
        super().__init__()
        inner = expand * width
        if inner % head_dim:
            raise ValueError(f"width {width} times {expand} is no multiple of the Mamba head size {head_dim}")
        self.lengths, self.scan = lengths, scan
        self.carries_state = scan != "within"
        self.ssm = StateSpace(inner, state_dim, d_conv, head_dim)
        self.in_proj = nn.Linear(width, inner + self.ssm.conv_dim + self.ssm.heads, bias=False)  # z, xBC, dt
        self.out_proj = nn.Linear(inner, width, bias=False)

    @property
    def float32_parts(self) -> list[nn.Module | nn.Parameter]:
        return [self.ssm]

    @torch.no_grad()
    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        """As the released M-VAR: Mamba-2's own start and a small convolution; the output is not divided by the depth."""
        self.ssm.init_weights(generator)
        nn.init.trunc_normal_(self.ssm.conv1d.weight, std=CONV_STD, generator=generator)
        self.ssm.conv1d.bias.zero_()

    def init_state(self, batch: int) -> MambaState:
        """Of no size where nothing is carried from scale to scale."""
        state = self.ssm.init_state(batch)
        return state if self.carries_state else MambaState(*(part[:, :0] for part in state))

    def forward(self, x: Tensor, scales: range, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """x (B, L_of_scales, C); state: after the tokens before x, None at the first."""
        zxBC, dt = self._project(x)
        if self.scan == "across":  # whatever the scales are
            y, state = self.between_projections(zxBC, dt, state)
            return self.out_proj(y), state
        lengths = [self.lengths[k] for k in scales]
        if self.scan == "within":
            parts = zip(zxBC.split(lengths, dim=1), dt.split(lengths, dim=1), strict=True)
            y = torch.cat([self.between_projections(*part, None)[0] for part in parts], dim=1)
        else:
            y, state = self.between_projections(_turned(zxBC, lengths), _turned(dt, lengths), state)
            y = _turned(y, lengths)
        return self.out_proj(y), state

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, L, C) -> (B, L, inner + conv_dim), (B, L, H)."""
        # One parameter as two products: its height (7868 at depth 30) is no multiple of 8, that of the large part is.
        if type(self.in_proj) is nn.Linear:
            weight = self.in_proj.weight
            return F.linear(x, weight[: -self.ssm.heads]), F.linear(x, weight[-self.ssm.heads :])
        sizes = [self.ssm.inner + self.ssm.conv_dim, self.ssm.heads]
        return self.in_proj(x).split(sizes, dim=-1)  # of a packed layer or of one with an adapter

    def log_decays(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (B, L, H): the logarithm, at most 0, of what every token leaves of the state before it."""
        _, dt = self._project(x)
        return self.ssm.steps(dt) * -self.ssm.A_log.exp()

    def between_projections(self, zxBC: Tensor, dt: Tensor, state: MambaState | None) -> tuple[Tensor, MambaState]:
        """(B, L, inner + conv_dim), (B, L, H) -> (B, L, inner), state. For the backward pass it keeps no more than these."""
        if state is None and self.ssm.whole is not None:  # keeps as little by itself
            y, conv, ssm = self.ssm(zxBC, dt, None, None)
        else:  # the rest, over half of the block, is recomputed
            options = {"use_reentrant": False, "preserve_rng_state": False}
            y, conv, ssm = checkpoint(self.ssm, zxBC, dt, *(state or (None, None)), **options)
        return y, MambaState(conv, ssm)
