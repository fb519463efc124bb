"""Which codes of a codebook are in use.

Legend: K scales, V codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.pyramid import Pyramid

USED_SHARE = 0.001  # a code counts as used where its share of all indices exceeds this over the number of codes, as in VAR


@dataclass(frozen=True)
class CodeUsage:
    """Which codes stand in the indices of one scale, or of all.

    used: codes in use, as training counts them, and share: that over all codes. perplexity: as many codes, each as frequent as
    the others, would have the same entropy; 1 to V.
    """

    used: int
    share: float
    perplexity: float

    @classmethod
    def of(cls, counts: Tensor) -> "CodeUsage":
        """counts (V,), of every code."""
        shares = counts.double() / counts.sum()
        used = int((shares > USED_SHARE / len(counts)).sum())
        return cls(used, used / len(counts), torch.special.entr(shares).sum().exp().item())


class CodeCounts:
    """How often every code stands in the token maps of each scale; counts of several steps and ranks add up."""

    def __init__(self, pyramid: Pyramid, num_codes: int, device: torch.device | str = "cpu"):
        self.pyramid = pyramid
        self.counts = torch.zeros(pyramid.num_scales, num_codes, dtype=torch.float64, device=device)  # (K, V)

    def add(self, indices: Sequence[Tensor]) -> None:
        """K token maps (B, h_k * w_k), on the device of the counts."""
        for counts, tokens in zip(self.counts, indices, strict=True):
            tokens = tokens.flatten()
            counts.index_add_(0, tokens, torch.ones_like(tokens, dtype=counts.dtype))  # bincount would wait for a GPU

    def over(self, total: Callable[[Tensor], Tensor]) -> "CodeCounts":
        """A copy with what total makes of the counts (K, V), such as their sum over ranks."""
        counts = CodeCounts(self.pyramid, self.counts.shape[1], self.counts.device)
        counts.counts += total(self.counts)
        return counts

    def by_scale(self) -> list[CodeUsage]:
        """K usages; of a scale without tokens perplexity is not a number."""
        return [CodeUsage.of(counts) for counts in self.counts.cpu()]

    def of_all(self) -> CodeUsage:
        """Usage over all scales together."""
        return CodeUsage.of(self.counts.sum(0).cpu())

    def figures(self, prefix: str = "") -> dict[str, dict[str, float]]:
        """Codes used and perplexity by scale, as a log has them; scales without tokens are left out."""
        seen = (self.counts.sum(1) > 0).tolist()
        usages = {
            "x".join(map(str, shape)): usage
            for shape, usage, any_token in zip(self.pyramid.shapes, self.by_scale(), seen, strict=True)
            if any_token
        }
        return {
            f"{prefix}codes_used": {name: usage.used for name, usage in usages.items()},
            f"{prefix}perplexity": {name: usage.perplexity for name, usage in usages.items()},
        }
