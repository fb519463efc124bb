"""GPU kernels for Mamba-2, from packages that need not be there: how they are called, and which of them is used.

    torch      models/ssm.py, anywhere; the reference, and the default on a CPU
    mamba_ssm  the Triton kernels of the package mamba-ssm; with causal-conv1d beside it, convolution, scan and gated norm of a
               whole pyramid are one function
    fla        Triton kernels of flash-linear-attention (package fla-core), which needs no compiler to install: a scan and a
               convolution

Every adapter computes what its counterpart in models/ssm.py does, in that one's layouts and with float32 states. `choose_scan_`
is called once, when a command has built its model.
"""

import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ssm import MAX_CHUNK, NORM_EPS, StateSpace, behind_tail, chunked_scan, conv_silu

SCAN_BACKENDS = ("auto", "torch", "mamba_ssm", "fla")
PREFERRED = ("mamba_ssm", "fla")  # by auto, on a GPU
MODULES = {
    "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined",),
    "fla": ("fla.ops.simple_gla", "fla.modules.causal_conv1d"),
}
NO_STEP = -100.0  # what softplus makes 0 of, whatever a trained bias adds


class ScanChoice(NamedTuple):
    """Which backend a model computes its scans with, and why."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"Mamba's scan is computed by {self.backend}: {self.reason}"


# --- mamba_ssm ----------------------------------------------------------------------------------------------------------


def mamba_ssm_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`models.ssm.chunked_scan` by mamba_ssm's mamba_chunk_scan_combined.

    Padded to whole chunks: the kernels gave NaN gradients in half precision at other lengths (680 tokens are 10.6 chunks).
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    length = x.shape[1]
    padding = -length % MAX_CHUNK
    if padding:  # dt = 0 neither decays nor writes the state
        x, dt = F.pad(x, (0, 0, 0, 0, 0, padding)), F.pad(dt, (0, 0, 0, padding))
        B, C = F.pad(B, (0, 0, 0, padding)), F.pad(C, (0, 0, 0, padding))
    B, C = B.unsqueeze(2), C.unsqueeze(2)  # (batch, L, 1 group, N)
    y, state = mamba_chunk_scan_combined(x, dt, A, B, C, MAX_CHUNK, initial_states=state, return_final_states=True)
    return y[:, :length], state


def mamba_ssm_whole(ssm: StateSpace, zxBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All of `StateSpace.forward` from the first token on, by mamba_ssm's mamba_split_conv1d_scan_combined.

    zxBC (batch, L, inner + conv_dim), dt (batch, L, H) -> y (batch, L, inner), the next conv tail and SSM state. It keeps its
    inputs and the scan's output for the backward pass and computes the convolution again. It cannot go on from a conv tail.
    Padded to whole chunks as in `mamba_ssm_scan`.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    length = zxBC.shape[1]
    padding = -length % MAX_CHUNK
    zxBCdt = torch.cat(
        [F.pad(zxBC, (0, 0, 0, padding)), F.pad(dt.to(zxBC.dtype), (0, 0, 0, padding), value=NO_STEP)], dim=-1
    )  # (batch, whole chunks, 2 * inner + 2 * N + H)
    y, state = mamba_split_conv1d_scan_combined(
        zxBCdt,
        ssm.conv1d.weight.squeeze(1),  # (conv_dim, d_conv)
        ssm.conv1d.bias,
        ssm.dt_bias,
        -ssm.A_log.exp(),
        ssm.D,
        MAX_CHUNK,
        return_final_states=True,
        rmsnorm_weight=ssm.norm.weight,
        rmsnorm_eps=NORM_EPS,
        headdim=ssm.head_dim,
        norm_before_gate=False,
    )
    return y[:, :length], last_inputs(zxBC[..., ssm.inner :], ssm.d_conv - 1), state


# --- fla ----------------------------------------------------------------------------------------------------------------


def fla_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`models.ssm.chunked_scan` by flash-linear-attention's chunk_simple_gla.

    That is linear attention with a scalar decay per head and token: C are the queries, B the keys, dt * x the values. It knows
    no groups, so B and C are copied for every head. It masks what is missing of the last chunk.
    """
    from fla.ops.simple_gla import chunk_simple_gla

    heads = x.shape[2]
    queries, keys = (part.unsqueeze(2).expand(-1, -1, heads, -1) for part in (C, B))  # (batch, L, H, N)
    values = (x * dt.unsqueeze(-1)).to(x.dtype)  # (batch, L, H, P)
    if state is not None:
        state = state.transpose(-1, -2).contiguous()  # (batch, H, N, P)
    y, state = chunk_simple_gla(queries, keys, values, dt * A, scale=1.0, initial_state=state, output_final_state=True)
    return y, state.transpose(-1, -2)  # (batch, H, P, N)


def fla_conv_silu(x: Tensor, tail: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`models.ssm.conv_silu` by flash-linear-attention's causal_conv1d."""
    from fla.modules.causal_conv1d import causal_conv1d

    length, count = x.shape[1], weight.shape[-1] - 1
    if tail is not None:  # goes through it as if it were tokens, and is cut off: an initial state has a layout of its own
        x = behind_tail(x, tail, count)
    y, _ = causal_conv1d(x, weight.squeeze(1), bias, activation="silu")
    return y[:, -length:], last_inputs(x, count)


def last_inputs(x: Tensor, count: int) -> Tensor:
    """A copy of the last `count` of x (B, L, D), zeros in front where there are fewer."""
    last = x[:, -count:]
    return F.pad(last, (0, 0, count - last.shape[1], 0))


# --- choosing -----------------------------------------------------------------------------------------------------------


def choose_scan_(model: nn.Module, backend: str, device: torch.device) -> ScanChoice:
    """Set how all Mamba-2 mixers of a model compute on the device that it is for; returns the choice, to be logged once.

    backend: one of SCAN_BACKENDS; auto takes the first of PREFERRED that is there, else torch. ValueError where the package of
    a named one, or a GPU, is missing.
    """
    choice = _choice(backend, device)
    kernels = _kernels(choice.backend)
    for module in model.modules():
        if isinstance(module, StateSpace):
            module.scan, module.conv, module.whole = kernels
    return choice


def _choice(backend: str, device: torch.device) -> ScanChoice:
    if backend == "torch":
        return ScanChoice("torch", "as told")
    if backend != "auto":
        missing = _missing(backend, device)
        if missing:
            raise ValueError(f"scan backend {backend}: {missing}: take --scan_backend=torch, which needs nothing, or auto")
        return ScanChoice(backend, f"as told{_remark(backend)}")
    if device.type != "cuda":
        return ScanChoice("torch", "the model is not on a CUDA GPU")
    reasons = {name: _missing(name, device) for name in PREFERRED}
    for name in PREFERRED:
        if not reasons[name]:
            return ScanChoice(name, f"the first of {', '.join(PREFERRED)} that is installed{_remark(name)}")
    return ScanChoice("torch", "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def _missing(backend: str, device: torch.device) -> str:
    """Why a backend cannot be used, empty where it can."""
    if device.type != "cuda":
        return "its kernels need a CUDA GPU, and the model is not on one"
    reason = _import_error(*MODULES[backend])
    return f"{reason}, see requirements-cuda.txt" if reason else ""


def _import_error(*names: str) -> str:
    """What went wrong with the first of these modules that cannot be imported, empty where all can."""
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        return str(error)
    return ""


def _remark(backend: str) -> str:
    without = backend == "mamba_ssm" and _import_error("causal_conv1d")
    return f", without causal-conv1d ({without}), so in three steps" if without else ""


def _kernels(backend: str) -> tuple[Callable, Callable, Callable | None]:
    """Scan, convolution, and all at once, as a StateSpace calls them."""
    if backend == "torch":
        return chunked_scan, conv_silu, None
    # Triton rounds the factors of float32 products to ten bits unless told; here float32 is float32. Products of half-precision
    # factors stay as they are.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    outside = torch.compiler.disable  # of torch.compile: these kernels are compiled already
    if backend == "fla":
        return outside(fla_scan), outside(fla_conv_silu), None
    whole = None if _import_error("causal_conv1d") else outside(mamba_ssm_whole)
    return outside(mamba_ssm_scan), conv_silu, whole
