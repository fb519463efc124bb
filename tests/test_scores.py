import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics

from utils.metrics.distances import frechet_distance, inception_score, kernel_distance, moments, precision_recall
from utils.metrics.features import Features, extract, load_extractor
from utils.metrics.image_sets import Gaussian, Statistics
from utils.metrics.measure import Measured, measure_batches
from utils.metrics.scores import in_halves, notes_on_judge


class AsTheRefereeReads(Dataset):
    """Images (N, H, W, 3) uint8, one (3, H, W) tensor each."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.images[i]).permute(2, 0, 1)


def waves(count: int, seed: int, frequency: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    directions, phases = frequency * rng.normal(size=(count, 3, 2)), rng.uniform(0, 6, (count, 3))
    values = np.einsum("ncd,dhw->nhwc", directions, np.stack([y, x])) + phases[:, None, None]
    return (127 + 100 * np.sin(values)).astype(np.uint8)


@pytest.fixture
def weights(inception_weights, tmp_path):
    """Random ones of Inception, such that images are of different classes.

    With all weights random the largest part of the features is the same for all images.
    """
    extractor = load_extractor("inception", inception_weights)
    common = extract(extractor, waves(4, seed=0, frequency=0.4), "waves").pooled.mean(0)
    tensors = torch.load(inception_weights, weights_only=True)
    fc = tensors["fc.weight"]
    tensors["fc.weight"] = 100 * (fc - torch.outer(fc @ common, common) / common.square().sum())
    torch.save(tensors, tmp_path / "classes.pth")
    return tmp_path / "classes.pth"


def test_scores_are_those_of_torch_fidelity(weights):
    """Pictures to scores on both sides, with the same network."""
    samples, reference = waves(14, seed=1, frequency=0.4), waves(13, seed=2, frequency=0.3)
    referee = calculate_metrics(
        input1=AsTheRefereeReads(samples),
        input2=AsTheRefereeReads(reference),
        isc=True,
        fid=True,
        kid=True,
        kid_subsets=10,
        kid_subset_size=9,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        feature_layer_prc="2048",
        isc_splits=2,
        samples_shuffle=False,
        batch_size=8,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no processes that read ahead
        verbose=False,
    )
    extractor = load_extractor("inception", weights)
    made, real = (measure_batches(extractor, np.split(images, [7]), "images") for images in (samples, reference))
    # Features differ in the sixth digit or so: batches lie in memory in another order, so sums are rounded otherwise.
    distance = frechet_distance(*made.statistics.pooled, *real.statistics.pooled)
    assert distance == pytest.approx(referee["frechet_inception_distance"], rel=1e-5)
    kernel = kernel_distance(made.features.pooled, real.features.pooled, 9, num_subsets=10)
    assert kernel == pytest.approx(
        (referee["kernel_inception_distance_mean"], referee["kernel_inception_distance_std"]), rel=1e-3
    )  # float32 there
    score = inception_score(made.features.logits.softmax(1), split_size=7)
    assert score > 1.5
    assert score == pytest.approx(referee["inception_score_mean"], rel=1e-5)
    shares = precision_recall(real.features.pooled, made.features.pooled, dtype=torch.float32)
    assert shares == pytest.approx((referee["precision"], referee["recall"]))
    assert 0 < shares[0] < 1
    assert 0 < shares[1] < 1


def test_halves_of_the_reference_have_no_image_in_common():
    pooled, logits = (torch.from_numpy(np.random.default_rng(0).normal(size=(41, width))) for width in (3, 5))
    whole = Measured(Statistics("real", 41, 8, 8, Gaussian(*moments(pooled))), Features(pooled, logits))
    one, other = in_halves(whole)
    assert [half.statistics.count for half in (one, other)] == [20, 21]
    rows = {tuple(row.tolist()) for half in (one, other) for row in half.features.pooled}
    assert rows == {tuple(row.tolist()) for row in pooled}
    for half in (one, other):
        np.testing.assert_allclose(half.statistics.pooled.covariance, np.cov(half.features.pooled, rowvar=False))
        belongs = (pooled == half.features.pooled[0]).all(1)
        assert torch.equal(logits[belongs], half.features.logits[:1])


def test_scores_by_the_network_that_has_chosen_the_samples_say_so():
    class Network:
        name, fingerprint = "efflite0", "ab12"

    assert notes_on_judge({}, Network) == []
    assert notes_on_judge({"judge_sha256": "cd34", "best_of": 4}, Network) == []
    (note,) = notes_on_judge({"judge_sha256": "ab12", "best_of": 4}, Network)
    assert note.startswith("efflite0 has chosen these samples, the best of 4: ")
