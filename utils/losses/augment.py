"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): what a discriminator sees is changed at random, real and made images alike.

So it cannot learn the training images by heart, and gradients pass through to the decoder. Legend: B images, H x W pixels.
"""

import torch
from torch import Tensor

SHIFT = 1 / 8  # of a side, at most, as published
CUT = 1 / 2  # side of the square that is cut out, over that of the image


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] with other colours, moved, and with a square of zeros; every image otherwise.

    generator: of all draws, on the CPU. Differentiable; values may leave [-1, 1].
    """
    return cut_out(translate(recolour(images, generator), generator), generator)


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness -0.5 to 0.5 is added, saturation goes to 0 to 2 times, contrast to 0.5 to 1.5 times what it is."""
    brightness, saturation, contrast = _uniform(images, 3, generator).view(3, -1, 1, 1, 1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (0.5 + contrast) * (images - mean)


def translate(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to an eighth of the sides; what comes in is 0."""
    rows, columns = (_moved(images, length, generator) for length in images.shape[2:])  # (B, H), (B, W)
    batch = torch.arange(len(images), device=images.device)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, 3)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_out(images: Tensor, generator: torch.Generator) -> Tensor:
    """A square around any place, half as wide as the image, is 0."""
    inside = []
    for length in images.shape[2:]:
        size = round(length * CUT)
        centres = (_uniform(images, 1, generator)[0] * (length + 1 - size % 2)).floor()  # (B,)
        places = torch.arange(length, device=images.device)
        inside.append((places >= centres[:, None] - size // 2) & (places < centres[:, None] - size // 2 + size))
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (B, 1, H, W)
    return images.masked_fill(mask, 0)


def _uniform(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, B) from 0 to 1."""
    return torch.rand(count, len(images), generator=generator).to(images.device, images.dtype)


def _moved(images: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Which line of the padded image comes to each of `length` places, (B, length); lines 0 and length + 1 are padding."""
    most = round(length * SHIFT)
    shifts = torch.randint(-most, most + 1, (len(images), 1), generator=generator).to(images.device)
    return (torch.arange(1, length + 1, device=images.device) + shifts).clamp(0, length + 1)
