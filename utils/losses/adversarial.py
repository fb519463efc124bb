"""Adversarial losses: hinge (Lim & Ye 2017, arXiv 1705.02894), how the generator's share comes in, and what steadies it.

Judgements are those of a discriminator on patches, any shape; real ones are to be above 1, made ones below -1.
"""

import torch
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


def balanced_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor, low: float, high: float) -> Tensor:
    """Ratio of the gradients of both losses at the last layer's weight (VQGAN, arXiv 2012.09841, equation 7), in [low, high].

    Not differentiated through. Where the adversarial gradient vanishes, or either is not finite, it is `low`.
    """
    ours, theirs = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial))
    ratio = (ours / (theirs + 1e-6)).detach()
    usable = ratio.isfinite() & (theirs > 0)
    return torch.where(usable, ratio, torch.full_like(ratio, low)).clamp(low, high)


def lecam(real: Tensor, made: Tensor, usual_real: Tensor, usual_made: Tensor) -> Tensor:
    """Keeps judgements near the usual ones of the other side (LeCAM, Tseng et al. 2021, arXiv 2104.03310, equation 5), ().

    usual_real, usual_made: running means of the judgements, ().
    """
    return F.relu(real - usual_made).square().mean() + F.relu(usual_real - made).square().mean()
