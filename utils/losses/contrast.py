"""Condition contrastive alignment (Chen et al. 2024, arXiv 2410.09347): after one epoch samples need no guidance.

A transformer that starts from a trained one learns to find images likelier under their own class, and less likely under
another one, than its start does, which stays as the reference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def condition_contrast(own: Tensor, other: Tensor, is_positive: Tensor, beta: float, weight: float) -> Tensor:
    """The loss of a batch, (), in float32 (equation 9, and the released code for images without a class).

    own, other (B,): log-likelihood of each image, over that of the reference, under its own label and under another one.
    is_positive (B,) bool: where the other label is the image's own too, or both are "no class", so that the image counts as
    one more positive. beta: how far the model may go from the reference. weight: of the negatives; the sum is divided by it
    where it is above 1.
    """
    sign = torch.where(is_positive, 1.0, -1.0)
    share = torch.where(is_positive, 1.0, weight)
    loss = -F.logsigmoid(beta * own.float()).mean() - (share * F.logsigmoid(beta * sign * other.float())).mean()
    return loss / max(weight, 1.0)
