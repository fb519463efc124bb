import numpy as np
import pytest
import torch

from dist import Ranks
from utils.metrics.distances import moments
from utils.metrics.features import extract, load_extractor
from utils.metrics.image_sets import open_images
from utils.metrics.measure import Measurement, measure, measure_batches, share


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("efflite0")


def random_images(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("count", "batch", "world"), [(100, 8, 1), (100, 8, 3), (5, 8, 2), (17, 4, 8), (16, 8, 2), (0, 4, 2)])
def test_shares_are_the_batches_of_one_rank(count, batch, world):
    def batches(ranks: Ranks) -> list[range]:
        rows = range(count)[share(count, batch, ranks)]
        return [rows[start : start + batch] for start in range(0, len(rows), batch)]

    device = torch.device("cpu")
    shares = [batches(Ranks(rank, world, device)) for rank in range(world)]
    assert sum(shares, []) == batches(Ranks(0, 1, device))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_statistics_and_features_are_those_of_all_images(tmp_path, extractor):
    images = random_images(7)
    np.savez(tmp_path / "a.npz", arr_0=images)
    found = measure(extractor, open_images(tmp_path / "a.npz"), batch=3)
    with torch.inference_mode():
        pooled, logits, _ = extract(extractor, images, "images")
    torch.testing.assert_close(found.features.pooled, pooled, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.features.logits, logits, atol=1e-4, rtol=0)
    assert found.features.spatial is None
    statistics = found.statistics
    assert (statistics.count, statistics.height, statistics.width, statistics.spatial) == (7, 8, 8, None)
    for part, expected in zip(statistics.pooled, moments(found.features.pooled), strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-12)
    in_batches = measure_batches(extractor, np.split(images, [3, 6]), "images", keep_features=False)
    assert in_batches.features is None
    assert np.array_equal(in_batches.statistics.pooled.covariance, statistics.pooled.covariance)


def test_images_of_several_sizes_are_refused(extractor):
    with pytest.raises(ValueError, match="pictures: images of 9x8 pixels after 8x8"):
        measure_batches(extractor, [random_images(2), random_images(2, width=9)], "pictures")


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_have_no_statistics(extractor, count):
    with pytest.raises(ValueError, match=f"pictures: {count} images have no covariance: give at least 2"):
        measure_batches(extractor, [random_images(1)] * count, "pictures")


def test_images_whose_features_are_not_finite_are_numbered(extractor, monkeypatch):
    whole = type(extractor).__call__

    def broken(self, images: torch.Tensor):
        features = whole(self, images)
        return features._replace(pooled=features.pooled.where(images[:, 0, 0, :1] != 255, torch.nan))

    monkeypatch.setattr(type(extractor), "__call__", broken)
    images = np.minimum(random_images(6), 254)
    images[4, 0, 0] = 255
    measurement = Measurement(extractor, "pictures", first=100)
    measurement.add(images[:3])
    with pytest.raises(ValueError, match="pictures: features of images 103 to 105 are not finite"):
        measurement.add(images[3:])
