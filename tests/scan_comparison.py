"""How far the kernels of a scan backend are from the plain PyTorch that is their reference, forward and backward."""

import torch
from golden_weights import relative_error
from small_models import seeded
from torch import Tensor

from models.scan_backends import choose_scan_
from models.ssm import StateSpace


def scan_errors(
    backend: str,
    lengths: list[int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    inner: int = 128,
    state_dim: int = 64,
    head_dim: int = 64,
    batch: int = 2,
) -> dict[str, float]:
    """Relative errors of output, state and all gradients of what lies between Mamba's projections.

    lengths: of consecutive pieces, each of which goes on from the state of the one before. The backend gets inputs of `dtype`,
    the reference the same numbers in float32; parameters are float32. Stand-ins on a CPU pass for a GPU's kernels.
    """
    block = StateSpace(inner, state_dim, 4, head_dim).to(device)
    block.init_weights(seeded())
    with torch.no_grad():
        generator = seeded(1)
        for parameter in (block.conv1d.weight, block.conv1d.bias, block.D, block.norm.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.5)
    total = sum(lengths)
    zxBC = torch.randn(batch, total, inner + block.conv_dim, generator=generator).to(device, dtype)
    dt = torch.randn(batch, total, block.heads, generator=generator).to(device, dtype)
    weight = torch.randn(batch, total, inner, generator=generator).to(device)  # of the functional that gradients are taken of

    choose_scan_(block, "torch", torch.device(device))
    expected = _results(block, zxBC.float(), dt.float(), weight, lengths)
    choose_scan_(block, backend, torch.device("cuda"))
    found = _results(block, zxBC, dt, weight, lengths)
    assert found.keys() == expected.keys()
    assert found["ssm"].dtype == torch.float32
    return {name: relative_error(found[name].float(), expected[name]) for name in expected}


def _results(block: StateSpace, zxBC: Tensor, dt: Tensor, weight: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    inputs = {"zxBC": zxBC.clone().requires_grad_(), "dt": dt.clone().requires_grad_()}
    conv = ssm = None
    outputs = []
    pieces = zip(inputs["zxBC"].split(lengths, dim=1), inputs["dt"].split(lengths, dim=1), strict=True)
    for piece, steps in pieces:
        y, conv, ssm = block(piece, steps, conv, ssm)
        assert y.shape[1] == piece.shape[1]
        outputs.append(y)
    y = torch.cat(outputs, dim=1)  # (batch, L, inner)
    value = (y * weight).sum() + ssm.square().sum() + conv.float().square().sum()
    names, leaves = zip(*{**inputs, **dict(block.named_parameters())}.items(), strict=True)
    gradients = torch.autograd.grad(value, leaves)
    found = {"y": y, "conv": conv, "ssm": ssm} | {
        f"gradient of {name}": grad for name, grad in zip(names, gradients, strict=True)
    }
    return {name: tensor.detach() for name, tensor in found.items()}
