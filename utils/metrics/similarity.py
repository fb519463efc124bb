"""How much alike two images are, pair by pair: PSNR, SSIM and LPIPS.

All take images (N, H, W, 3) uint8 and others of the same shape, on one device, and return (N,) float64 on it, by torchmetrics.
Only `psnr_of_error` is for those who have an error already.
"""

import http.client
import math

import torch
from torch import Tensor, nn

# in pixels, no side of an image may be smaller:
WINDOW = 11  # of SSIM
LPIPS_SIDE = 31  # of less AlexNet leaves nothing
SSIM_PIXELS = 2**16  # at a time, of one channel, or else one image: 0.3 GB


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over the three channels, in dB, 0 and up.

    Equal images, for which it is infinite, count as if a single value differed by 1: that is the most that can be otherwise.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # here, as it takes seconds

    _check(images, others)
    ratios = peak_signal_noise_ratio(images.double(), others.double(), data_range=255.0, reduction="none", dim=(1, 2, 3))
    return ratios.clamp(max=10 * math.log10(255**2 * images[0].numel()))


def psnr_of_error(squared_error: Tensor, peak: float) -> Tensor:
    """The same of mean squared errors of any shape, on values that range over `peak`: 2 for [-1, 1]; infinite for 0.

    torchmetrics, which asks for images, rounds logarithms to float32: `psnr` is a few millionths of a dB away.
    """
    return -10 * torch.log10(squared_error / peak**2)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), -1 to 1: Gaussian window of 11x11 with deviation 1.5, K1 = 0.01, K2 = 0.03.

    The mean over all windows that lie within the image, and over red, green and blue, where the paper has grey images.
    ValueError for images smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(images, others, WINDOW, "SSIM")
    # Every channel as an image (3N, 1, H, W), which torch convolves in half of the time, and a few at a time, as it copies
    # every window of them: 121 numbers for each pixel of five maps.
    channels = (part.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(1) for part in (images, others))
    count = max(SSIM_PIXELS // (images.shape[1] * images.shape[2]), 1)
    margin, means = WINDOW // 2, []
    for pair in zip(*(part.split(count) for part in channels), strict=True):
        pair = [part.double() for part in pair]  # differences of squares lose many digits
        # torchmetrics would take the mean over windows that stick out of the image as well, filled by reflection
        _, windows = structural_similarity_index_measure(*pair, reduction="none", data_range=255.0, return_full_image=True)
        means.append(windows[..., margin:-margin, margin:-margin].mean((1, 2, 3)))
    return torch.cat(means).view(-1, 3).mean(1)


class LPIPS:
    """Distance of the features of AlexNet (Zhang et al. 2018, arXiv 1801.03924), version 0.1, 0 and up.

    network: of two batches of images (N, 3, H, W) in [-1, 1], on a device of the caller's choice. ValueError for images smaller
    than LPIPS_SIDE.
    """

    def __init__(self, network: nn.Module):
        self.network = network

    @torch.inference_mode()
    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        _check(images, others, LPIPS_SIDE, "LPIPS")
        pairs = (part.permute(0, 3, 1, 2).float() / 127.5 - 1 for part in (images, others))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.network(*pairs).flatten().double()


def load_lpips(device: torch.device | str = "cpu") -> tuple[LPIPS | None, str]:
    """LPIPS on the device and "", or None and what it lacks: it stands beside other measures, which do without it."""
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    try:
        # downloads torchvision's weights of AlexNet where they are not there yet; the rest comes with torchmetrics
        network = LearnedPerceptualImagePatchSimilarity(net_type="alex").net
    except (OSError, RuntimeError, http.client.HTTPException):  # no connection, an incomplete download
        return None, "needs weights of AlexNet"
    return LPIPS(network.to(device)), ""


def _check(images: Tensor, others: Tensor, smallest: int = 1, measure: str = "") -> None:
    """ValueError for other shapes or types, and for images whose sides the measure finds too small."""
    if (
        images.shape != others.shape
        or images.ndim != 4
        or images.shape[3] != 3
        or {images.dtype, others.dtype} != {torch.uint8}
    ):
        kinds = " and ".join(f"{part.dtype} {tuple(part.shape)}" for part in (images, others))
        raise ValueError(f"images are {kinds}: give twice the same shape (N, H, W, 3) in uint8")
    if min(images.shape[1:3]) < smallest:
        size = f"{images.shape[2]}x{images.shape[1]}"
        raise ValueError(f"images of {size} pixels: {measure} needs at least {smallest}x{smallest}")
