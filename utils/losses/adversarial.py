"""Adversarial losses: hinge (Lim & Ye 2017, arXiv 1705.02894), what keeps both sides in balance, and how the term comes in.

Judgements are those of a discriminator on patches, any shape; real ones are to be above 1, made ones below -1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LECAM_DECAY = 0.999


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


def adaptive_weight(pixels: Tensor, adversarial: Tensor, least: float, most: float) -> Tensor:
    """How often the adversarial gradient goes into that of the other losses (VQGAN, arXiv 2012.09841, equation 7), ().

    pixels, adversarial: sums of squares of the two gradients of the decoded images, (). least, most: bounds, as the weight
    grows without one where the discriminator has nothing to say, and vanishes where it is sure of everything.
    """
    # Differs from VQGAN: gradients in the images, not in the decoder's last weights, which would take two more passes back.
    return (pixels.sqrt() / adversarial.sqrt().clamp_min(1e-12)).clamp(least, most).detach()


def lecam_loss(real: Tensor, made: Tensor, anchors: Tensor) -> Tensor:
    """LeCAM's regularisation (Tseng et al. 2021, arXiv 2104.03310, section 3.1), () from 0: judgements stay near averages.

    anchors: (2,), running means of judgements of real and of made images: real ones are held near what made ones got, and the
    other way round, beyond which nothing is lost.
    """
    return F.relu(real - anchors[1]).square().mean() + F.relu(anchors[0] - made).square().mean()


@torch.no_grad()
def move_anchors_(anchors: Tensor, real: Tensor, made: Tensor) -> None:
    """Towards the mean judgements of this step, (2,)."""
    anchors.lerp_(torch.stack([real.mean(), made.mean()]), 1 - LECAM_DECAY)
