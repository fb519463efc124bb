"""Multi-scale residual quantizer (VAR, arXiv 2404.02905, algorithms 1 and 2).

A feature map is written as a sum over scales: at scale k the residual is averaged down to (h_k, w_k), every vector is replaced
by its nearest code, and the result, enlarged to full size and passed through a convolution phi, is taken off the residual.
`add_scale` is that step from codes to sum; encoding, decoding, teacher inputs and generation all go through it.

`QuantizerTraining` holds what training may do besides, against codes that nobody uses and for decoders that forgive wrong ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class QuantizerTraining:
    """Means for training the quantizer. Every one is off by default, and then no random number is drawn.

    scale_dropout: share of the images, 0 to 1, of which only the first few scales are used, `dropout_from` to K of them, all
        numbers equally likely: the sum stops there (XQ-GAN, arXiv 2412.01762: 0.1 from scale 3 on).
    perturbation: share of the positions, 0 to 1, where the decoder gets one of the `neighbours` codes nearest to the right one
        in its stead (latent perturbation, RobustTok, arXiv 2503.08354). Indices, residuals and the loss are those of the right
        codes.
    matching: weight, within the loss, of `gaussian_distance` between the vectors that look for a code and the codebook, all
        scales in one. Only the codebook is moved by it, also codes that no vector chooses (arXiv 2506.15078).

    Images and positions are drawn one by one, so that the shares hold on average for batches of any size.
    """

    # Differs from XQ-GAN and RobustTok: they take the first images of every batch. RobustTok's neighbours are those of the
    # vector, the right code among them, and it can also spare a share of the images.
    # Differs from arXiv 2506.15078: the squared distance, whose gradient ends smoothly at 0, and for the codebook alone.
    scale_dropout: float = 0.0
    dropout_from: int = 3
    perturbation: float = 0.0
    neighbours: int = 10
    matching: float = 0.0

    def __post_init__(self):
        for name in ("scale_dropout", "perturbation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a share from 0 to 1")
        for name in ("dropout_from", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")
        if not self.matching >= 0:
            raise ValueError(f"matching={self.matching}: give 0 or more")

    def draw_depths(self, batch: int, num_scales: int, generator: torch.Generator | None = None) -> Tensor:
        """How many scales of each image are used, (B,) int64 on the CPU. ValueError for fewer scales than dropout_from."""
        if self.dropout_from > num_scales:
            raise ValueError(f"dropout_from={self.dropout_from}: there are {num_scales} scales, give one of them")
        stops = torch.rand(batch, generator=generator) < self.scale_dropout
        depths = torch.randint(self.dropout_from, num_scales + 1, (batch,), generator=generator)
        return depths.where(stops, num_scales)


PLAIN = QuantizerTraining()


def dropout_weights(depths: Tensor, num_scales: int) -> Tensor:
    """What the error of each image counts at each scale, (K, B) float32, from the scales used of each (B,).

    At a scale all images that use it count the same, all scales that any image uses count the same, and the sum is K.
    """
    used = (torch.arange(num_scales)[:, None] < depths).float()  # (K, B)
    return used / used.sum(dim=1, keepdim=True).clamp_min(1) * (num_scales / depths.max())


def swap_codes(indices: Tensor, neighbours: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Indices (...) with about a share of them replaced by one of their neighbours (V, n), all of these equally likely."""
    swapped = (torch.rand(indices.shape, generator=generator) < share).to(indices.device)
    choice = torch.randint(neighbours.shape[1], indices.shape, generator=generator).to(indices.device)
    return neighbours[indices, choice].where(swapped, indices)


def gaussian_distance(vectors: Tensor, codes: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between normal distributions with the moments of vectors (N, C) and of codes (V, C).

    |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2), a float64 scalar, 0 or more but for rounding; vectors are constants.
    """
    mean, covariance = _moments(vectors.detach())
    code_mean, code_covariance = _moments(codes)
    values, directions = torch.linalg.eigh(covariance)
    root = directions * values.clamp_min(0).sqrt()  # root @ root.T = covariance
    # eigenvalues alone, whose gradient exists also where some are equal
    values = torch.linalg.eigvalsh(root.T @ code_covariance @ root)
    spread = values > 1e-14 * values.detach().max()  # elsewhere the root is 0 but for rounding, and its slope infinite
    overlap = (values.where(spread, 1).sqrt() * spread).sum()
    return (mean - code_mean).square().sum() + covariance.trace() + code_covariance.trace() - 2 * overlap


def _moments(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of (N, C), in float64, which no autocast touches."""
    vectors = vectors.double()
    mean = vectors.mean(dim=0)
    centred = vectors - mean
    return mean, centred.T @ centred / len(vectors)


def _error(maps: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Mean squared error of maps (B, C, H, W); weights (B,) of the images, None: all the same."""
    if weights is None:
        return F.mse_loss(maps, targets)
    return ((maps - targets).square().mean(dim=(1, 2, 3)) * weights).sum()


class ScaleStep(NamedTuple):
    """One scale on the way down."""

    residual: Tensor  # (B * h_k * w_k, C), vectors that looked for a code
    indices: Tensor  # (B, h_k * w_k)
    f_hat: Tensor  # (B, C, H, W), sum of the scales up to this one


class Quantized(NamedTuple):
    """What training needs of one quantization."""

    features: Tensor  # (B, C, H, W), straight-through: value of the sum of codes, gradient of the input
    indices: list[Tensor]  # K x (B, h_k * w_k), nearest codes at all scales, used or not
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
        return self._distances(vectors).argmin(dim=1)

    @torch.no_grad()
    def neighbours(self, count: int) -> Tensor:
        """The codes nearest to each code, itself left out, (V, count), nearest first. ValueError for too small a codebook."""
        codes = self.codebook.weight
        if count >= len(codes):
            raise ValueError(f"neighbours={count}: a codebook of {len(codes)} codes has {len(codes) - 1}, give fewer")
        return self._distances(codes).fill_diagonal_(torch.inf).topk(count, dim=1, largest=False).indices

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
        f_hat = self.initial(batch)
        for k, scale_indices in enumerate(indices[:-1]):  # not by partial_sums: some versions compile no generators
            f_hat = self.add_scale(f_hat, k, self.codebook(scale_indices))
            inputs.append(self.next_input(f_hat, k).float())
        return torch.cat(inputs, dim=1)

    def forward(
        self, features: Tensor, training: QuantizerTraining = PLAIN, generator: torch.Generator | None = None
    ) -> Quantized:
        """Quantize with gradients: straight-through once at the end, losses on the cumulative sum at every scale.

        features (B, C, H, W). training: means that are used, none by default. generator: of what they draw, on the CPU, one
        of its own for every rank; None: PyTorch's global one. Drawn in this order: depths, then swaps from scale to scale.
        """
        num_scales = self.pyramid.num_scales
        depths = weights = neighbours = None
        if training.scale_dropout:
            depths = training.draw_depths(len(features), num_scales, generator)
            weights = dropout_weights(depths, num_scales).to(features.device)
            depths = depths.to(features.device).view(-1, 1, 1, 1)
        if training.perturbation:
            neighbours = self.neighbours(training.neighbours)
        indices, losses, residuals = [], [], []
        perturbed = carried = self.initial(len(features))  # carried: what the decoder gets
        for k, step in enumerate(self._descend(features)):
            indices.append(step.indices)
            residuals.append(step.residual)
            scale_weights = None if weights is None else weights[k]
            codebook_loss = _error(step.f_hat, features.detach(), scale_weights)
            commitment_loss = _error(step.f_hat.detach(), features, scale_weights)
            losses.append(codebook_loss + self.commitment * commitment_loss)
            reached = step.f_hat.detach()
            if neighbours is not None:
                with torch.no_grad():
                    swapped = swap_codes(step.indices, neighbours, training.perturbation, generator)
                    reached = perturbed = self.add_scale(perturbed, k, self.codebook(swapped))
            carried = reached if depths is None else reached.where(k < depths, carried)
        loss = torch.stack(losses).mean()
        if training.matching:
            distance = gaussian_distance(torch.cat(residuals), self.codebook.weight)
            loss = loss + training.matching * distance.to(loss.dtype)
        return Quantized(features + (carried - features).detach(), indices, loss)

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

    def _distances(self, vectors: Tensor) -> Tensor:
        """Of vectors (N, C) from every code, (N, V) float32, smaller is nearer; only good for comparing codes."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors, codes = vectors.float(), self.codebook.weight.float()
            if self.normalize_lookup:
                return -F.normalize(vectors, dim=1) @ F.normalize(codes, dim=1).T
            # |v - c|^2 without |v|^2, which is the same for every code
            return torch.addmm(codes.square().sum(dim=1), vectors, codes.T, alpha=-2)

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
