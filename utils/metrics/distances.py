"""Distances and scores between sets of image features: Fréchet and kernel distance, Inception score, precision and recall,
density and coverage.

Arithmetic alone, pictures become features elsewhere; the results are those of the OpenAI evaluator (guided-diffusion) on the
same features, those that it lacks are torch-fidelity's and prdc's. Legend: N rows (images), D features. Arrays may be NumPy's
or tensors, of any floating-point type.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

ROWS = 4096  # of features that are in float64 at once
SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 2020  # of the kernel distance, as torch-fidelity draws them
DENSITY_K = 5  # neighbours, as Naeem et al. have it


class Moments:
    """Mean and covariance of features that come in batches, in float64.

    Rows are centred before they are squared, so that means which are large beside the spread cost no digits.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of outer products about the mean

    def add(self, features: ArrayLike | Tensor) -> None:
        """features (N, dim), N from 0. ValueError for another shape or width, NaN or infinity."""
        features = _checked(features, "features")
        if features.shape[1] != len(self.mean):
            raise ValueError(f"features of width {features.shape[1]} after {len(self.mean)}: take all from the same extractor")
        for rows in features.split(ROWS) if len(features) else ():
            rows = rows.to(self.mean, copy=True)
            mean = rows.mean(0)
            rows -= mean
            self._move_mean(len(rows), mean)
            self.scatter.addmm_(rows.T, rows)

    def over_ranks(self, add_up: Callable[[Tensor], Tensor]) -> "Moments":
        """Of all ranks' features, on every rank. add_up: sums a tensor over the ranks (`Ranks.sum`), called twice."""
        whole = Moments(len(self.mean), self.mean.device)
        totals = add_up(torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]))
        whole.count = int(totals[-1])
        whole.mean = totals[:-1] / totals[-1]
        apart = self.mean - whole.mean
        whole.scatter = add_up(self.scatter.addr(apart, apart, alpha=self.count))
        return whole

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (dim,) and unbiased covariance (dim, dim). ValueError with fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"{self.count} rows of features have no covariance: give at least 2 images")
        covariance = (self.scatter + self.scatter.T) / (2 * (self.count - 1))
        return self.mean.cpu().numpy().copy(), covariance.cpu().numpy()

    def _move_mean(self, count: int, mean: Tensor) -> None:
        """To where `count` more rows with this mean put it; the scatter about it follows (Chan et al. 1979)."""
        total = self.count + count
        apart = mean - self.mean
        self.scatter.addr_(apart, apart, alpha=self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total


def moments(features: ArrayLike | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) -> mean (D,) and unbiased covariance (D, D) in float64, computed on the device of the features.

    ValueError for fewer than two rows, another shape, NaN or infinity. `Moments` takes batches and several ranks' features.
    """
    features = _checked(features, "features")
    whole = Moments(features.shape[1], features.device)
    whole.add(features)
    return whole.result()


def frechet_distance(mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike) -> float:
    """Squared Fréchet distance of two Gaussians, 0 and up; of Inception features: FID (Heusel et al. 2017, arXiv 1706.08500).

    means (D,); covariances (D, D), symmetric, positive semidefinite and possibly singular (fewer images than features).
    |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2. Eigenvalues and distances below 0 come from rounding alone and
    count as 0. ValueError for sizes that do not match, NaN or infinity.
    """
    mean_a, cov_a, mean_b, cov_b = (_tensor(values).double().cpu() for values in (mean_a, cov_a, mean_b, cov_b))
    for name, mean, cov in (("first", mean_a, cov_a), ("second", mean_b, cov_b)):
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
            raise ValueError(f"the {name} mean and covariance have shapes {shapes}: give (D,) and (D, D)")
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise ValueError(f"the {name} mean or covariance has NaN or infinity: compute it again from finite features")
    if len(mean_a) != len(mean_b):
        raise ValueError(f"moments of {len(mean_a)} and of {len(mean_b)} features: take both from the same extractor")
    eigenvalues, eigenvectors = torch.linalg.eigh(cov_a)
    root = eigenvectors * eigenvalues.clamp(min=0).sqrt()  # A^1/2 but for a rotation, which leaves the next eigenvalues alone
    products = torch.linalg.eigvalsh(root.T @ cov_b @ root)
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * products.clamp(min=0).sqrt().sum()
    return max(distance.item(), 0.0)


def inception_score(probabilities: ArrayLike | Tensor, split_size: int = 5000) -> float:
    """exp of the mean KL divergence of each image's classes from those of all (Salimans et al. 2016, arXiv 1606.03498).

    probabilities (N, classes) -> from 1, all images alike, to the number of classes. The mean over splits of `split_size`
    images in the order given, which must be shuffled: few classes in a split score low. What remains is a split of its own with
    the same weight, as in the OpenAI evaluator. ValueError for no rows, other shapes, rows that do not sum to 1.
    """
    probabilities = _checked(probabilities, "probabilities")
    if split_size < 1 or len(probabilities) == 0:
        raise ValueError(f"{len(probabilities)} images in splits of {split_size}: give at least 1 of each")
    scores = []
    for split in probabilities.split(split_size):
        split = split.double()
        if split.min() < 0 or (split.sum(1) - 1).abs().max() > 0.01:
            raise ValueError("probabilities below 0, or rows that do not sum to 1: apply softmax to logits first")
        entropy = torch.special.entr  # -p log p, and 0 for p = 0
        scores.append((entropy(split.mean(0)).sum() - entropy(split).sum(1).mean()).exp())
    return torch.stack(scores).mean().item()


def precision_recall(
    reference: ArrayLike | Tensor,
    samples: ArrayLike | Tensor,
    k: int = 3,
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    block_size: int = 512,
) -> tuple[float, float]:
    """Precision and recall, 0 to 1: the share of the samples that lie in the reference manifold, and the share of the reference
    that lies in the manifold of the samples (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    reference (N, D), samples (M, D). A manifold is a ball around each row, as wide as to its k-th nearest other row.
    dtype: what squared distances are rounded to, float16, as in the OpenAI evaluator, or float32. float16 resolves about 1/2000
    of the largest squared norm; where its range might not do, all are computed in float32. device: where they are computed, for
    `block_size` rows at a time. ValueError for fewer than k + 1 rows, k < 1, other shapes or types, NaN or infinity.
    """
    if k < 1 or block_size < 1 or dtype not in (torch.float16, torch.float32):
        raise ValueError(
            f"k={k}, block_size={block_size}, {dtype}: give k and block_size from 1, torch.float16 or torch.float32"
        )
    reference, samples = _checked(reference, "reference"), _checked(samples, "samples")
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) < k + 1:
            raise ValueError(f"{name}: {len(features)} rows, but k={k} neighbours need {k + 1}: give more images")
    _check_widths(reference, samples, "the reference", "the samples")
    largest = max(torch.linalg.vector_norm(features.float(), dim=1).max().item() for features in (reference, samples))
    if (2 * largest) ** 2 > torch.finfo(dtype).max:  # bounds every intermediate result
        dtype = torch.float32  # Differs from the evaluator: it decides anew for every 10,000 x 10,000 distances.
    reference, samples = (_Points.of(features, dtype, device) for features in (reference, samples))
    reference_radii, sample_radii = (_radii(points, k, block_size) for points in (reference, samples))
    sample_inside = torch.zeros(len(sample_radii), dtype=torch.bool, device=device)
    reference_inside = []
    for start in range(0, len(reference_radii), block_size):
        rows = slice(start, start + block_size)
        distances = _squared_distances(reference, rows, samples)
        sample_inside |= (distances <= reference_radii[rows, None]).any(0)
        reference_inside.append((distances <= sample_radii).any(1))
    return sample_inside.double().mean().item(), torch.cat(reference_inside).double().mean().item()


def usual_subset(count_a: int, count_b: int) -> int:
    """Rows in a subset of `kernel_distance` that is not told: 1000, or half of the smaller set where that has no more."""
    fewest = min(count_a, count_b)
    return SUBSET_SIZE if fewest > SUBSET_SIZE else max(fewest // 2, 2)


def kernel_distance(
    a: ArrayLike | Tensor,
    b: ArrayLike | Tensor,
    subset: int = 0,
    *,
    num_subsets: int = SUBSETS,
    device: torch.device | str = "cpu",
) -> tuple[float, float | None]:
    """Squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, of Inception features: KID (Binkowski et al. 2018,
    arXiv 1801.01401). Mean and standard deviation over subsets that are drawn from each set, as torch-fidelity draws them.

    a (N, D), b (M, D). subset: rows in each, 0: `usual_subset`. The mean is unbiased for any numbers of rows, so for sets that
    are alike it lies around 0, also below. The deviation is None where subsets are all that there is. In float64, on `device`.
    ValueError for fewer rows than a subset or than 2, other shapes or types, NaN or infinity.
    """
    a, b = _checked(a, "first features"), _checked(b, "second features")
    _check_widths(a, b, "the first", "the second")
    subset = subset or usual_subset(len(a), len(b))
    if not 2 <= subset <= min(len(a), len(b)) or num_subsets < 1:
        raise ValueError(
            f"{num_subsets} subsets of {subset} rows, from {len(a)} and {len(b)}: give from 1 subset, of 2 rows to all of a set"
        )
    draws = np.random.RandomState(SUBSET_SEED)  # the generator of torch-fidelity
    whole = subset == len(a) == len(b)
    values = []
    for _ in range(1 if whole else num_subsets):
        x, y = (rows[draws.choice(len(rows), subset, replace=False)].to(device, torch.float64) for rows in (a, b))
        same = sum(kernel.sum() - kernel.trace() for kernel in (_cubic_kernel(x, x), _cubic_kernel(y, y)))
        values.append(same / (subset * (subset - 1)) - 2 * _cubic_kernel(x, y).mean())
    means = torch.stack(values)
    return means.mean().item(), None if whole else means.std(correction=0).item()


def density_coverage(
    reference: ArrayLike | Tensor,
    samples: ArrayLike | Tensor,
    k: int = DENSITY_K,
    *,
    device: torch.device | str = "cpu",
    block_size: int = 512,
) -> tuple[float, float]:
    """Density, 0 and up, and coverage, 0 to 1 (Naeem et al. 2020, arXiv 2002.09797, equations 4 and 5), as prdc has them.

    reference (N, D), samples (M, D). Each row of the reference has a ball as wide as to its k-th nearest other row. Density: in
    how many of these a sample lies, divided by k, which is 1 on average for samples like the reference. Coverage: the share of
    the balls that have a sample in them. What lies on the edge is outside. In float64, on `device`, `block_size` rows of the
    reference at a time. ValueError for fewer than k + 1 rows of the reference, k < 1, other shapes or types, NaN or infinity.
    """
    reference, samples = (_checked(rows, name).to(device) for rows, name in ((reference, "reference"), (samples, "samples")))
    _check_widths(reference, samples, "the reference", "the samples")
    if k < 1 or block_size < 1 or len(samples) == 0:
        raise ValueError(f"k={k}, block_size={block_size}, {len(samples)} samples: give at least 1 each")
    if len(reference) < k + 1:
        raise ValueError(f"reference: {len(reference)} rows, but k={k} neighbours need {k + 1}: give more images")
    pairs = covered = 0
    for rows in reference.split(block_size):
        radii = _exact_squares(rows, reference).topk(k + 1, largest=False).values.amax(1)  # itself among them
        inside = _exact_squares(rows, samples) < radii[:, None]
        pairs += inside.sum().item()
        covered += inside.any(1).sum().item()
    return pairs / (k * len(samples)), covered / len(reference)


def nearest(
    rows: ArrayLike | Tensor, others: ArrayLike | Tensor | None, *, device: torch.device | str = "cpu", block_size: int = 512
) -> Tensor:
    """The number (N,), on the CPU, of the row of `others` (M, D) that is nearest to each of `rows` (N, D).

    others: None for the rows themselves, where the nearest is another one. ValueError for too few rows, other shapes or types,
    NaN or infinity.
    """
    among_themselves = others is None
    rows = _checked(rows, "features").to(device)
    others = rows if others is None else _checked(others, "others").to(device)
    _check_widths(rows, others, "the first", "the second")
    if len(others) < 1 + among_themselves:
        raise ValueError(f"{len(others)} rows to be nearest: give more images")
    found = []
    for start in range(0, len(rows), block_size):
        distances = _exact_squares(rows[start : start + block_size], others)
        if among_themselves:
            distances.diagonal(start).fill_(torch.inf)
        found.append(distances.argmin(1).cpu())
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)"""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _exact_squares(rows: Tensor, others: Tensor) -> Tensor:
    """Squared distances (n, M) of rows (n, D) from others (M, D) in float64, of which a part is copied at a time."""
    rows = rows.double()
    parts = []
    for part in others.split(ROWS):
        part = part.double()
        squares = rows.square().sum(1)[:, None] + part.square().sum(1)
        parts.append(squares.addmm_(rows, part.T, alpha=-2).clamp_(min=0))
    return torch.cat(parts, 1)


def _check_widths(a: Tensor, b: Tensor, of_a: str, of_b: str) -> None:
    if a.shape[1] != b.shape[1]:
        widths = f"{a.shape[1]} in {of_a} and {b.shape[1]} in {of_b}"
        raise ValueError(f"features of width {widths}: take both from the same extractor")


class _Points(NamedTuple):
    """Features (N, D) and their squared norms (N,), rounded to the type that distances are to have."""

    features: Tensor  # in float32 whatever they are rounded to, as processors multiply halves slowly if at all
    norms: Tensor

    @classmethod
    def of(cls, features: Tensor, dtype: torch.dtype, device: torch.device | str) -> "_Points":
        features = features.to(device=device, dtype=dtype).float()
        return cls(features, features.square().sum(1).to(dtype))


def _squared_distances(a: _Points, rows: slice, b: _Points) -> Tensor:
    """(rows of a, N of b), rounded after every step."""
    products = (a.features[rows] @ b.features.T).to(a.norms.dtype)
    return torch.sub(a.norms[rows, None], products, alpha=2).add_(b.norms).clamp_(min=0)


def _radii(points: _Points, k: int, block_size: int) -> Tensor:
    """(N,) squared distance of each row to its k-th neighbour: k + 1 are nearest, with itself among them."""
    blocks = (slice(start, start + block_size) for start in range(0, len(points.norms), block_size))
    return torch.cat([_squared_distances(points, rows, points).topk(k + 1, largest=False).values.amax(1) for rows in blocks])


def _tensor(values: ArrayLike | Tensor) -> Tensor:
    """Without a copy where it can be."""
    return values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))


def _checked(values: ArrayLike | Tensor, name: str) -> Tensor:
    """(N, D), floating-point and finite, or ValueError."""
    values = _tensor(values)
    if values.ndim != 2 or values.shape[1] == 0 or not values.is_floating_point():
        raise ValueError(f"{name} of shape {tuple(values.shape)} and type {values.dtype}: give (N, D) floating-point numbers")
    if not values.sum(dtype=torch.float64).isfinite():
        raise ValueError(f"{name} have NaN or infinity: leave out those images, or mend what computed them")
    return values
