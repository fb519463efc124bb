"""Adversarial losses: hinge (Lim & Ye 2017, arXiv 1705.02894), and how the generator's share comes in.

Judgements are those of a discriminator on patches, any shape; real ones are to be above 1, made ones below -1.
"""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Hinge loss, () from 0; 1 where the discriminator says 0 to everything."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def generator_loss(made: Tensor) -> Tensor:
    """(): low where what was made looks real."""
    return -made.mean()


def ramp(progress: float, start: float, length: float) -> float:
    """0 before `start`, then linearly to 1 over `length`, both as shares of the run; a length of 0 is a step."""
    if progress < start:
        return 0.0
    return min((progress - start) / length, 1.0) if length > 0 else 1.0
