import copy
import http.client
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
import torchvision
from scipy.ndimage import correlate1d

from utils.metrics import similarity
from utils.metrics.similarity import LPIPS, load_lpips, psnr, psnr_of_error, ssim


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def noisy(images: torch.Tensor, spread: float) -> torch.Tensor:
    noise = spread * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + noise).round().clamp(0, 255).byte()


# --- PSNR ---------------------------------------------------------------------------------------------------------------


def test_psnr_in_closed_form():
    images = torch.full((3, 4, 5, 3), 100, dtype=torch.uint8)
    others = images.clone()
    others[0] += 5
    others[1, 0, 0, 0] -= 60  # of 60 values
    others[2] = 200
    expected = [20 * math.log10(255 / 5), 20 * math.log10(255) - 10 * math.log10(60), 20 * math.log10(255 / 100)]
    torch.testing.assert_close(psnr(images, others), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(psnr(others, images), psnr(images, others))


def test_equal_images_count_as_if_one_value_differed_by_one():
    images = random_images(2, 6, 7)
    others = images.clone()
    others[1, 3, 3, 2] ^= 1
    equal, nearly = psnr(images, others).tolist()
    assert equal == pytest.approx(nearly)
    assert equal == pytest.approx(20 * math.log10(255) + 10 * math.log10(6 * 7 * 3))


def test_psnr_of_an_error_is_that_of_the_images():
    images, others = random_images(4, 9, 8), noisy(random_images(4, 9, 8), 5)
    errors = (images.double() - others.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(psnr_of_error(errors, peak=255), psnr(images, others), rtol=0, atol=5e-6)
    torch.testing.assert_close(psnr_of_error(errors / 127.5**2, peak=2), psnr_of_error(errors, peak=255))
    assert psnr_of_error(torch.tensor(0.04), peak=2).item() == pytest.approx(20)


# --- SSIM ---------------------------------------------------------------------------------------------------------------


def plain_ssim(image: np.ndarray, other: np.ndarray) -> float:
    """The formula of the paper in float64, for one channel."""
    kernel = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def smooth(values: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(values, kernel, axis=0), kernel, axis=1)[5:-5, 5:-5]

    x, y = image.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.mean(
        (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    )


def scenes() -> dict[str, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(20), torch.arange(31), indexing="ij")
    return {
        "noise": random_images(2, 20, 31),
        "waves": (127 + 100 * torch.sin(x / 3 + y / 5)).byte()[None, ..., None].expand(2, -1, -1, 3).contiguous(),
        "bright": torch.full((2, 20, 31, 3), 250, dtype=torch.uint8),  # where rounding would be worst
        "black": torch.zeros((2, 20, 31, 3), dtype=torch.uint8),
    }


@pytest.mark.parametrize("scene", scenes())
@pytest.mark.parametrize("spread", [1, 10, 60])
def test_ssim_by_the_formula_of_the_paper(scene, spread):
    images = scenes()[scene]
    others = noisy(images, spread)
    expected = [
        np.mean([plain_ssim(image[..., c].numpy(), other[..., c].numpy()) for c in range(3)])
        for image, other in zip(images, others, strict=True)
    ]
    torch.testing.assert_close(ssim(images, others), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_ssim_of_equal_and_of_flat_images():
    images = random_images(2, 16, 11)
    torch.testing.assert_close(ssim(images, images), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
    flat, other = (torch.full((1, 16, 16, 3), value, dtype=torch.uint8) for value in (100, 150))
    c1 = (0.01 * 255) ** 2
    assert ssim(flat, other).item() == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-9)


def test_ssim_is_of_each_image_by_itself():
    images, others = random_images(3, 12, 12), random_images(3, 12, 12, seed=1)
    apart = torch.cat([ssim(images[i : i + 1], others[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(ssim(images, others), apart)


def test_ssim_takes_a_few_images_at_a_time(monkeypatch):
    """torch copies every window of what it convolves: of a thousand small images at once these are 15 GB."""
    seen, whole = [], torchmetrics.functional.image.structural_similarity_index_measure
    images, others = random_images(7, 16, 12), random_images(7, 16, 12, seed=1)
    expected = ssim(images, others)

    def watched(one, other, **options):
        seen.append(one.numel())
        return whole(one, other, **options)

    monkeypatch.setattr(torchmetrics.functional.image, "structural_similarity_index_measure", watched)
    for pixels, most in ((5 * 16 * 12, 5 * 16 * 12), (1, 16 * 12)):
        seen.clear()
        monkeypatch.setattr(similarity, "SSIM_PIXELS", pixels)
        torch.testing.assert_close(ssim(images, others), expected)
        assert max(seen) == most
        assert sum(seen) == 7 * 3 * 16 * 12


# --- LPIPS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alexnet():
    """With random weights, of which something is left behind all its layers."""
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None)
    for layer in network.features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    return network.eval()


def plain_lpips(alexnet: torch.nn.Module, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The paper's equation 1 in float64, (N,): what lies behind each of the five ReLUs, of unit length at every pixel."""
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    heads = torch.load(folder / "alex.pth", map_location="cpu", weights_only=True)
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    pair = [((part.permute(0, 3, 1, 2) / 127.5 - 1 - shift) / scale).double() for part in (images, others)]
    total, number = 0, 0
    for layer in copy.deepcopy(alexnet.features[:12]).double():  # all but the last pooling
        pair = [layer(x) for x in pair]
        if isinstance(layer, torch.nn.ReLU):
            one, other = (x / x.norm(dim=1, keepdim=True) for x in pair)
            weights = heads[f"lin{number}.model.1.weight"].double()  # (1, C, 1, 1)
            total = total + (weights * (one - other).square()).sum(1).mean((1, 2))
            number += 1
    assert number == 5
    return total.detach()


def test_lpips_by_the_formula_of_the_paper(alexnet, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: asked.append(weights) or alexnet)
    network, lacking = load_lpips()
    assert isinstance(network, LPIPS)
    assert lacking == ""
    assert asked == [torchvision.models.AlexNet_Weights.IMAGENET1K_V1]
    images = random_images(3, 40, 64)
    others = torch.cat([noisy(images[:2], 30), images[2:]])
    found = network(images, others)
    assert found.dtype == torch.float64
    expected = plain_lpips(alexnet, images, others)
    assert expected[:2].min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(network(others, images), found)
    torch.testing.assert_close(network(images[:1], others[:1]), found[:1], rtol=1e-4, atol=0)
    assert network(random_images(1, 31, 31), random_images(1, 31, 31, seed=1)) > 0
    with pytest.raises(ValueError, match="images of 30x64 pixels: LPIPS needs at least 31x31"):
        network(random_images(1, 64, 30), random_images(1, 64, 30))


@pytest.mark.parametrize(
    "failure", [OSError("no route to host"), RuntimeError("invalid hash value"), http.client.IncompleteRead(b"")]
)
def test_lpips_without_weights_says_so(monkeypatch, tmp_path, failure):
    """As torchvision downloads them."""
    asked = []

    def download(url: str, *_, **__) -> None:
        asked.append(url)
        raise failure

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert load_lpips() == (None, "needs weights of AlexNet")
    assert "alexnet" in asked[0]


# --- input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "others", "message"),
    [
        (random_images(2, 12, 12), random_images(2, 12, 13), r"\(2, 12, 12, 3\) and torch.uint8 \(2, 12, 13, 3\)"),
        (random_images(2, 12, 12).float(), random_images(2, 12, 12).float(), "images are torch.float32"),
        (random_images(12, 12), random_images(12, 12), r"give twice the same shape \(N, H, W, 3\) in uint8"),
        (random_images(1, 2, 12, 12).transpose(1, 4), random_images(1, 2, 12, 12).transpose(1, 4), "give twice the same"),
    ],
)
@pytest.mark.parametrize("measure", [psnr, ssim])
def test_other_images_get_one_line(measure, images, others, message):
    with pytest.raises(ValueError, match=message):
        measure(images, others)


def test_images_smaller_than_the_window_have_no_ssim():
    with pytest.raises(ValueError, match="images of 10x30 pixels: SSIM needs at least 11x11"):
        ssim(random_images(2, 30, 10), random_images(2, 30, 10))
