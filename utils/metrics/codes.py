"""Which codes of a codebook are in use."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
