"""Multi-scale residual quantizer (VAR, arXiv 2404.02905, algorithms 1 and 2).

A feature map is written as a sum over scales: at scale k the residual is averaged down to (h_k, w_k), every vector is replaced
by its nearest code, and the result, enlarged to full size and passed through a convolution phi, is taken off the residual.
`add_scale` is that step from codes to sum; encoding, decoding, teacher inputs and generation all go through it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pyramid import Pyramid

PHI_STRENGTH = 0.5  # phi(x) = (1 - 0.5) * x + 0.5 * conv(x), in every released tokenizer


def phi_index(num_phi: int, num_scales: int) -> tuple[int, ...]:
    """Which phi serves which scale, for num_phi shared ones (0: one phi per scale).

    Scales and phis are both placed on [0, 1] and each scale takes the nearest phi. The ticks of the phis are computed with
    NumPy because ties (scales 2 and 7 of 10 with 4 phis) are decided by the rounding of exactly this arithmetic; plain Python
    decides scale 7 the other way and corrupts pictures from the released weights without any error.
    """
    positions = [k / max(num_scales - 1, 1) for k in range(num_scales)]
    if num_phi == 0:
        return tuple(range(num_scales))
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return tuple(int(np.argmin(np.abs(ticks - position))) for position in positions)


class ScaleStep(NamedTuple):
    """One scale on the way down."""

    residual: Tensor  # (B * h_k * w_k, C), vectors that looked for a code
    indices: Tensor  # (B, h_k * w_k)
    f_hat: Tensor  # (B, C, H, W), sum of the scales up to this one


class Quantized(NamedTuple):
    """What training needs of one quantization."""

    features: Tensor  # (B, C, H, W), straight-through: value of the sum of codes, gradient of the input
    indices: list[Tensor]  # K x (B, h_k * w_k)
    loss: Tensor  # scalar, codebook + commitment loss averaged over the scales


class MultiScaleQuantizer(nn.Module):
    """Features (B, C, H, W) <-> K index maps, flattened row by row.

    num_codes, code_dim: size of the codebook, V and C.
    num_phi: number of phi convolutions shared over the scales; 0 gives every scale its own.
    normalize_lookup: nearest code by cosine instead of Euclidean distance (the vectors used stay as they are).
    commitment: weight of the commitment term in the loss.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        num_codes: int,
        code_dim: int,
        num_phi: int = 4,
        normalize_lookup: bool = False,
        commitment: float = 0.25,
    ):
        super().__init__()
        self.pyramid = pyramid
        self.normalize_lookup = normalize_lookup
        self.commitment = commitment
        self.codebook = nn.Embedding(num_codes, code_dim)
        self.phi = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in range(num_phi or pyramid.num_scales))
        self.phi_index = phi_index(num_phi, pyramid.num_scales)

    def initial(self, batch: int) -> Tensor:
        """The empty sum (B, C, H, W) that the first `add_scale` starts from."""
        return self.codebook.weight.new_zeros(batch, self.codebook.embedding_dim, *self.pyramid.shapes[-1])

    def add_scale(self, f_hat: Tensor, k: int, vectors: Tensor) -> Tensor:
        """f_hat (B, C, H, W) plus scale k given as code vectors (B, h_k * w_k, C)."""
        maps = vectors.transpose(1, 2).unflatten(2, self.pyramid.shapes[k])  # (B, C, h_k, w_k)
        return f_hat + self._phi(k, self._enlarge(maps, f_hat.shape[2:]))

    def next_input(self, f_hat: Tensor, k: int) -> Tensor:
        """What the transformer sees at scale k + 1: f_hat averaged down to it, (B, h_{k+1} * w_{k+1}, C)."""
        return self._reduce(f_hat, k + 1).flatten(2).transpose(1, 2)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Indices (N,) of the codes nearest to vectors (N, C), in float32 whatever autocast says."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors, codes = vectors.float(), self.codebook.weight.float()
            if self.normalize_lookup:
                return (F.normalize(vectors, dim=1) @ F.normalize(codes, dim=1).T).argmax(dim=1)
            # |v - c|^2 without |v|^2, which is the same for every code
            return torch.addmm(codes.square().sum(dim=1), vectors, codes.T, alpha=-2).argmin(dim=1)

    @torch.no_grad()
    def encode(self, features: Tensor) -> list[Tensor]:
        """Algorithm 1: features (B, C, H, W) -> K index tensors (B, h_k * w_k)."""
        return [step.indices for step in self._descend(features)]

    @torch.no_grad()
    def partial_sums(self, indices: list[Tensor]) -> Iterator[Tensor]:
        """Algorithm 2: yields f_hat (B, C, H, W) after each given scale; `indices` may be the first few scales only."""
        f_hat = self.initial(indices[0].shape[0])
        for k, scale_indices in enumerate(indices):
            f_hat = self.add_scale(f_hat, k, self.codebook(scale_indices))
            yield f_hat

    @torch.no_grad()
    def teacher_inputs(self, indices: list[Tensor]) -> Tensor:
        """Inputs of scales 2..K, (B, L - h_1 * w_1, C) float32: for each scale the sum of all coarser ones, averaged down."""
        batch, codebook = indices[0].shape[0], self.codebook.weight
        inputs = [codebook.new_zeros(batch, 0, codebook.shape[1], dtype=torch.float32)]
        for k, f_hat in enumerate(self.partial_sums(indices[:-1]) if len(indices) > 1 else ()):
            inputs.append(self.next_input(f_hat, k).float())
        return torch.cat(inputs, dim=1)

    def forward(self, features: Tensor) -> Quantized:
        """Quantize with gradients: straight-through once at the end, losses on the cumulative sum at every scale."""
        indices, losses = [], []
        for step in self._descend(features):
            indices.append(step.indices)
            codebook_loss = F.mse_loss(step.f_hat, features.detach())
            commitment_loss = F.mse_loss(step.f_hat.detach(), features)
            losses.append(codebook_loss + self.commitment * commitment_loss)
        straight_through = features + (step.f_hat - features).detach()
        return Quantized(straight_through, indices, torch.stack(losses).mean())

    @torch.no_grad()
    def restart_codes_(self, unused: Tensor, features: Tensor, generator: torch.Generator | None = None) -> None:
        """Move the codes marked in unused (V,) bool onto residuals of features (B, C, H, W), drawn evenly over the scales."""
        steps = list(self._descend(features))
        scales = torch.randint(len(steps), (int(unused.sum()),), generator=generator).tolist()
        rows = [torch.randint(len(steps[k].residual), (), generator=generator) for k in scales]
        if rows:
            chosen = [steps[k].residual[row] for k, row in zip(scales, rows, strict=True)]
            self.codebook.weight[unused] = torch.stack(chosen)

    def _descend(self, features: Tensor) -> Iterator[ScaleStep]:
        """Scale after scale, coarse to fine."""
        batch = features.shape[0]
        f_hat = self.initial(batch)
        for k in self.pyramid.scales:
            maps = self._reduce(features.detach() - f_hat.detach(), k)  # (B, C, h_k, w_k)
            residual = maps.permute(0, 2, 3, 1).flatten(0, 2)  # (B * h_k * w_k, C)
            indices = self.nearest(residual).view(batch, -1)
            f_hat = self.add_scale(f_hat, k, self.codebook(indices))
            yield ScaleStep(residual, indices, f_hat)

    def _phi(self, k: int, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the sum over scales stays in the codebook's precision
            return torch.lerp(x, self.phi[self.phi_index[k]](x), PHI_STRENGTH)

    def _reduce(self, x: Tensor, k: int) -> Tensor:
        """Average (B, C, H, W) down to scale k."""
        shape = self.pyramid.shapes[k]
        return x if x.shape[2:] == shape else F.interpolate(x, size=shape, mode="area")

    def _enlarge(self, maps: Tensor, shape: tuple[int, int]) -> Tensor:
        """Bicubic interpolation of (B, C, h, w) to `shape`; nothing to do where it has that size."""
        return maps if maps.shape[2:] == shape else F.interpolate(maps, size=shape, mode="bicubic")
