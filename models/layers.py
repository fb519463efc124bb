"""Small parts of a transformer block: adaptive layer norm, feed-forward, drop-path.

Adaptive layer norm follows DiT and VAR (arXiv 2404.02905, section 3.2): every sub-layer f computes
x + gamma * f(norm(x) * (1 + scale) + shift), where gamma, scale and shift depend on the class of the image only.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
MAX_PIECE = 1024  # tokens: the hidden layer of a longer piece leaves a CPU's caches, and the system gives its memory anew


class Modulation(NamedTuple):
    """Gate, scale and shift of S sub-layers, each (B, S, 1, C)."""

    gamma: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def from_flat(cls, flat: Tensor, num_sublayers: int) -> "Modulation":
        """(B, 3 * S * C) in the released order, all gammas, then all scales, then all shifts -> three times (B, S, 1, C)."""
        return cls(*flat.unflatten(-1, (3, num_sublayers, 1, -1)).unbind(1))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without affine, then x * (1 + scale) + shift; x (B, L, C), scale and shift (B, 1, C)."""
    # Autocast would have GPUs write and keep a float32 copy; the norm's statistics are float32 in the kernel without it.
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def modulation_projection(width: int, num_chunks: int) -> nn.Sequential:
    """Class embedding (B, C) -> (B, num_chunks * C)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, num_chunks * width))


class ModulationOffset(nn.Module):
    """What a block adds to the modulation that all blocks share (VAR's `saln`): (B, num_chunks * C) -> the same."""

    def __init__(self, width: int, num_chunks: int):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(num_chunks * width))

    def forward(self, shared: Tensor) -> Tensor:
        return shared + self.offset.to(shared.dtype)


class LinearOfOtherBias(nn.Linear):
    """A linear layer whose bias the caller may give, since its parameters are elsewhere."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias if bias is None else bias)


class FeedForward(nn.Module):
    """(B, L, C) -> (B, L, C) through a hidden layer of ratio * C with tanh-GELU; long sequences piece by piece."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(width, round(width * ratio))
        self.fc2 = nn.Linear(round(width * ratio), width)

    def hidden(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc1(x), approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        size = MAX_PIECE if x.device.type == "cpu" else x.shape[1]
        pieces = [self.fc2(self.hidden(part)) for part in x.split(size, dim=1)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def drop_paths(modulation: Modulation, rate: float) -> Modulation:
    """Drop-path: the gate of each sub-layer is 0 for whole images with probability `rate`, else scaled by 1 / (1 - rate).

    Done to the gates, before the block, so that no block draws random numbers or differs from another by its rate: compiled,
    all blocks are one graph.
    """
    gamma = modulation.gamma  # (B, S, 1, C)
    keep = gamma.new_empty(*gamma.shape[:2], 1, 1).bernoulli_(1 - rate)
    return modulation._replace(gamma=gamma * (keep / (1 - rate)))
