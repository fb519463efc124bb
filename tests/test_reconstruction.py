import numpy as np
import pytest
import torch
from commands import TINY_TOKENIZER
from PIL import Image

from models.precision import tokenizer_in
from models.tokenizer import VQVAE
from utils.metrics.features import load_extractor
from utils.metrics.image_sets import FittedImages, open_images
from utils.metrics.measure import measure_batches
from utils.metrics.reconstruction import measure_reconstruction, reconstruct
from utils.metrics.similarity import psnr, ssim


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("efflite0")


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VQVAE(TINY_TOKENIZER).eval().requires_grad_(False)


def some_images(count: int = 7, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def archive(tmp_path, images: np.ndarray) -> FittedImages:
    np.savez(tmp_path / "real.npz", arr_0=images)
    return FittedImages(open_images(tmp_path / "real.npz"), 16, 16)


def test_images_go_through_the_tokens(tokenizer):
    images = some_images()
    decoded, indices = reconstruct(tokenizer, images)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = tokenizer.encode(pixels)
    assert all(torch.equal(found, tokens) for found, tokens in zip(indices, expected, strict=True))
    exact = (tokenizer.decode(expected).permute(0, 2, 3, 1) + 1) * 127.5
    assert (decoded.shape, decoded.dtype) == (images.shape, np.uint8)
    assert np.abs(decoded - exact.numpy()).max() <= 0.5 + 1e-4
    assert len(np.unique(decoded)) > 10


def test_quality_is_that_of_all_pairs(tmp_path, tokenizer, extractor):
    images = some_images()
    decoded, indices = reconstruct(tokenizer, images)
    found = measure_reconstruction(tokenizer, archive(tmp_path, images), extractor, batch=3)
    pair = torch.from_numpy(images), torch.from_numpy(decoded)
    assert found.psnr == pytest.approx(psnr(*pair).mean().item(), abs=1e-3)
    assert found.ssim == pytest.approx(ssim(*pair).mean().item(), abs=1e-4)
    assert found.lpips is None
    for statistics, side in ((found.originals, images), (found.reconstructions, decoded)):
        expected = measure_batches(extractor, [side], "images").statistics
        assert (statistics.count, statistics.height, statistics.width) == (7, 16, 16)
        np.testing.assert_allclose(statistics.pooled.covariance, expected.pooled.covariance, atol=1e-4)
    assert [usage.used for usage in found.scales] == [len(tokens.unique()) for tokens in indices]
    assert found.all_scales.used == len(torch.cat(indices, dim=1).unique())
    assert np.array_equal(found.pairs[0], images)
    assert found.pairs[1].shape == images.shape


def test_some_rows_alone_are_measured(tmp_path, tokenizer, extractor):
    images = some_images()
    found = measure_reconstruction(tokenizer, archive(tmp_path, images), extractor, rows=[1, 2, 6])
    assert found.originals.count == 3
    assert np.array_equal(found.pairs[0], images[[1, 2, 6]])


def test_a_network_for_lpips_is_asked(tmp_path, tokenizer, extractor):
    found = measure_reconstruction(
        tokenizer, archive(tmp_path, some_images()), extractor, lambda a, b: torch.arange(len(a)).double(), batch=4
    )
    assert found.lpips == pytest.approx((0 + 1 + 2 + 3 + 0 + 1 + 2) / 7)


def test_a_damaged_tokenizer_is_named(extractor, tmp_path):
    torch.manual_seed(0)
    broken = VQVAE(TINY_TOKENIZER)
    broken.decoder.conv_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="reconstructions are not finite: the weights of the tokenizer are damaged"):
        measure_reconstruction(broken, archive(tmp_path, some_images()), extractor)


@pytest.mark.parametrize(
    ("half", "message"),
    [("encoder", "features of images are not finite, so they have no tokens"), ("decoder", "reconstructions are not finite")],
)
def test_what_overflows_in_float16_alone_names_the_precision(half, message):
    torch.manual_seed(0)
    exact = VQVAE(TINY_TOKENIZER)
    bias = exact.get_parameter(f"{half}.conv_in.bias").data
    bias.fill_(1e5)  # float16 ends at 65504
    mend = "float16 may be too narrow for this tokenizer: give --precision=float32"
    with pytest.raises(ValueError, match=f"{message}: {mend}"):
        reconstruct(tokenizer_in(exact, "float16", "float16"), some_images(2))
    reconstruct(exact, some_images(2))
    bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=f"{message}: the weights of the tokenizer are damaged, give others"):
        reconstruct(exact, some_images(2))


def test_a_folder_of_pictures_of_several_sizes(tmp_path, tokenizer, extractor):
    for i, size in enumerate([(20, 40), (16, 16), (64, 30)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    found = measure_reconstruction(tokenizer, FittedImages(open_images(tmp_path), 16, 16), extractor)
    assert found.pairs[0].shape == (3, 16, 16, 3)
    assert np.array_equal(found.pairs[0][1], np.asarray(Image.open(tmp_path / "1.png")))
