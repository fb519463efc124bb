"""How much alike two images are, pair by pair: PSNR, SSIM and LPIPS.

All take images (N, H, W, 3) uint8 and others of the same shape, on one device, and return (N,) float64 on it. PSNR and SSIM
by torchmetrics, LPIPS by the package lpips where it is installed.
"""

import http.client
import math
import warnings

import torch
from torch import Tensor, nn

WINDOW = 11  # of SSIM, in pixels: no image may be smaller


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over the three channels, in dB, 0 and up.

    Equal images, for which it is infinite, count as if a single value differed by 1: that is the most that can be otherwise.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # here, as it takes seconds

    _check(images, others)
    ratios = peak_signal_noise_ratio(images.double(), others.double(), data_range=255.0, reduction="none", dim=(1, 2, 3))
    return ratios.clamp(max=10 * math.log10(255**2 * images[0].numel()))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), -1 to 1: Gaussian window of 11x11 with deviation 1.5, K1 = 0.01, K2 = 0.03.

    The mean over all windows that lie within the image, and over red, green and blue, where the paper has grey images.
    ValueError for images smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(images, others)
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(f"images of {images.shape[2]}x{images.shape[1]} pixels: SSIM needs at least {WINDOW}x{WINDOW}")
    # torchmetrics would take the mean over windows that stick out of the image as well, filled by reflection
    pairs = (part.permute(0, 3, 1, 2).double() for part in (images, others))  # its differences of squares lose many digits
    _, windows = structural_similarity_index_measure(*pairs, reduction="none", data_range=255.0, return_full_image=True)
    margin = WINDOW // 2
    return windows[:, :, margin:-margin, margin:-margin].mean((1, 2, 3))


class LPIPS(nn.Module):
    """Distance of the features of AlexNet (Zhang et al. 2018, arXiv 1801.03924), version 0.1, 0 and up."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        _check(images, others)
        pairs = (part.permute(0, 3, 1, 2).float() / 127.5 - 1 for part in (images, others))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.network(*pairs).flatten().double()


def load_lpips() -> tuple[LPIPS | None, str]:
    """LPIPS on the CPU and "", or None and what it lacks: it stands beside other measures, which do without it."""
    try:
        import lpips
    except ImportError:
        return None, "needs the package lpips"
    try:
        with warnings.catch_warnings(action="ignore"):  # it calls torchvision as that was years ago
            return LPIPS(lpips.LPIPS(net="alex", verbose=False)), ""
    except (OSError, RuntimeError, http.client.HTTPException):  # no connection, an incomplete download
        return None, "needs weights of AlexNet"


def _check(images: Tensor, others: Tensor) -> None:
    if (
        images.shape != others.shape
        or images.ndim != 4
        or images.shape[3] != 3
        or {images.dtype, others.dtype} != {torch.uint8}
    ):
        kinds = " and ".join(f"{part.dtype} {tuple(part.shape)}" for part in (images, others))
        raise ValueError(f"images are {kinds}: give twice the same shape (N, H, W, 3) in uint8")
