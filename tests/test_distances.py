import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from utils.metrics.distances import (
    Moments,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    nearest,
    precision_recall,
    usual_subset,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, np.ndarray], dict[str, float]]:
    with np.load(GOLDEN / "metrics.npz") as arrays:
        return dict(arrays), json.loads((GOLDEN / "metrics.json").read_text())


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def random_covariance(dim: int, seed: int) -> np.ndarray:
    factor = normal(dim, 2 * dim, seed=seed)
    return factor @ factor.T / dim


# --- golden values ------------------------------------------------------------------------------------------------------


def test_golden_distances(golden):
    arrays, facts = golden
    fid = frechet_distance(*moments(arrays["ref"]), *moments(arrays["samples"]))
    sfid = frechet_distance(*moments(arrays["ref_spatial"]), *moments(arrays["samples_spatial"]))
    assert fid == pytest.approx(facts["fid"], rel=1e-5)
    assert sfid == pytest.approx(facts["sfid"], rel=1e-5)


def test_golden_inception_score(golden):
    """700 images in splits of 200: the 100 that remain count as much as the others."""
    arrays, facts = golden
    probabilities = torch.from_numpy(arrays["samples"] @ arrays["logit_weight"]).softmax(1)
    assert inception_score(probabilities, facts["is_split"]) == pytest.approx(facts["inception_score"], rel=1e-5)
    whole_splits = inception_score(probabilities[:600], facts["is_split"])
    assert whole_splits != pytest.approx(facts["inception_score"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_golden_precision_and_recall(golden, dtype):
    arrays, facts = golden
    precision, recall = precision_recall(arrays["ref"], arrays["samples"], facts["k"], dtype=dtype)
    assert precision == pytest.approx(facts["precision"], abs=0.005)
    assert recall == pytest.approx(facts["recall"], abs=0.005)


# --- moments ------------------------------------------------------------------------------------------------------------


def assert_moments(result: tuple[np.ndarray, np.ndarray], features: np.ndarray) -> None:
    np.testing.assert_allclose(result[0], features.mean(0), rtol=1e-10)
    covariance = np.cov(features, rowvar=False)
    np.testing.assert_allclose(result[1], covariance, rtol=1e-10, atol=1e-10 * np.abs(covariance).max())


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_moments_are_numpys(kind):
    features = normal(5000, 7) @ normal(7, 7, seed=1) + 3  # more rows than are taken at once
    mean, covariance = moments(kind(features))
    assert mean.dtype == covariance.dtype == np.float64
    assert_moments((mean, covariance), features)


def test_moments_of_half_precision_features_are_computed_in_double():
    features = normal(300, 5).astype(np.float16)
    assert_moments(moments(features), features.astype(np.float64))


def test_batches_give_the_moments_of_the_whole():
    features = normal(500, 6) + np.arange(6)
    streamed = Moments(6)
    for batch in np.split(features, [1, 1, 30, 200]):  # one row, none, and more
        streamed.add(batch)
    result = streamed.result()
    streamed.add(features[:9])
    assert_moments(result, features)  # what comes later does not change a result


def test_large_means_cost_no_digits():
    """Sums of x x^T less count times mean mean^T, even in float64, would give a covariance of nothing but rounding."""
    features = normal(600, 4) + 1e8
    centred = features - 1e8  # exact
    streamed = Moments(4)
    for batch in np.split(features, 8):
        streamed.add(batch)
    np.testing.assert_allclose(streamed.result()[1], np.cov(centred, rowvar=False), rtol=0, atol=1e-7)
    np.testing.assert_allclose(moments(features)[1], np.cov(centred, rowvar=False), rtol=0, atol=1e-7)


def test_ranks_together_have_the_moments_of_the_whole():
    """One of three has no images."""
    features = normal(90, 5) * np.arange(1, 6) + 1000
    barrier, given, results = threading.Barrier(3, timeout=30), {}, {}

    def rank(number: int, part: np.ndarray) -> None:
        def add_up(values: torch.Tensor) -> torch.Tensor:
            given[number] = values
            barrier.wait()
            total = sum(given[other] for other in range(3))
            barrier.wait()
            return total

        own = Moments(5)
        own.add(part)
        results[number] = own.over_ranks(add_up).result()

    parts = (features[:20], features[:0], features[20:])
    threads = [threading.Thread(target=rank, args=arguments) for arguments in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert_moments(results[number], features)


def test_a_lone_rank_keeps_its_moments():
    features = normal(40, 3)
    own = Moments(3)
    own.add(features)
    assert_moments(own.over_ranks(lambda values: values).result(), features)


# --- Fréchet distance ---------------------------------------------------------------------------------------------------


def test_distance_of_gaussians_with_the_same_axes():
    variances_a, variances_b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.0])
    axes = np.linalg.qr(normal(3, 3))[0]
    covs = [axes * variances @ axes.T for variances in (variances_a, variances_b)]
    distance = frechet_distance(np.zeros(3), covs[0], np.array([0.0, 3.0, 4.0]), covs[1])
    assert distance == pytest.approx(25 + (1 - 2) ** 2 + 0 + 3**2, rel=1e-7)


def test_distance_of_gaussians_with_different_axes():
    """In two dimensions tr (AB)^1/2 = (tr AB + 2 (det AB)^1/2)^1/2."""
    a, b = random_covariance(2, 1), random_covariance(2, 2)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    distance = frechet_distance(np.zeros(2), a, np.ones(2), b)
    assert distance == pytest.approx(2 + np.trace(a) + np.trace(b) - 2 * root, rel=1e-10)


def test_distance_with_scipys_matrix_root():
    a, b = random_covariance(30, 1), random_covariance(30, 2)
    root = scipy.linalg.sqrtm(a @ b).real
    mean = normal(30)
    distance = frechet_distance(mean, a, torch.zeros(30), torch.from_numpy(b))
    assert distance == pytest.approx(mean @ mean + np.trace(a + b - 2 * root), rel=1e-9)


def test_distance_of_sampled_gaussians():
    """N(0, 1) and N(1, 4) in each of three dimensions: 3 (1 + 1)."""
    a, b = normal(40000, 3, seed=1), 1 + 2 * normal(40000, 3, seed=2)
    assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(6, rel=0.03)


@pytest.mark.parametrize("rows", [500, 30])
def test_a_set_is_at_no_distance_from_itself(rows):
    """With 30 rows the covariance is singular: rounding of eigenvalues that should be 0 must not add up."""
    mean, cov = moments(normal(rows, 60))
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-4)


def test_no_distance_is_negative():
    for seed in range(20):
        mean, cov = moments(normal(500, 10, seed=seed))
        assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-9


def test_distance_is_symmetric_and_unchanged_by_rotation():
    a, b = normal(200, 40, seed=1), 0.5 + normal(200, 40, seed=2) @ normal(40, 40, seed=3) / 6
    rotation = np.linalg.qr(normal(40, 40, seed=4))[0]
    distance = frechet_distance(*moments(a), *moments(b))
    assert distance > 1
    assert frechet_distance(*moments(b), *moments(a)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(*moments(a @ rotation), *moments(b @ rotation)) == pytest.approx(distance, rel=1e-9)


# --- Inception score ----------------------------------------------------------------------------------------------------


def test_score_is_the_number_of_classes_that_are_told_apart():
    certain = np.eye(10)[np.arange(1000) % 10]  # exact zeros
    assert inception_score(certain) == pytest.approx(10)
    assert inception_score(np.full((1000, 10), 0.1)) == pytest.approx(1)


def test_images_sorted_by_class_score_low():
    certain = np.eye(10)[np.arange(1000) // 100]
    assert inception_score(certain, split_size=1000) == pytest.approx(10)
    assert inception_score(certain, split_size=200) == pytest.approx(2)


def test_what_remains_is_a_split_of_the_same_weight():
    certain = np.eye(4)[[0, 1, 2, 3, 0]]
    assert inception_score(certain, split_size=4) == pytest.approx((4 + 1) / 2)


# --- precision and recall -----------------------------------------------------------------------------------------------


def plain_precision_recall(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None] - b, axis=2)

    def share_inside(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = np.sort(distances(manifold, manifold), axis=1)[:, k]
        return (distances(points, manifold) <= radii).any(1).mean()

    return share_inside(samples, reference), share_inside(reference, samples)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_shares_by_definition(k):
    reference, samples = normal(150, 6, seed=1), 0.8 * normal(220, 6, seed=2) + 0.5
    expected = plain_precision_recall(reference, samples, k)
    assert 0.2 < expected[1] < expected[0] < 1
    assert precision_recall(reference, samples, k, dtype=torch.float32) == pytest.approx(expected)
    assert precision_recall(reference, samples, k) == pytest.approx(expected, abs=0.02)


def test_precision_comes_first_and_belongs_to_the_samples():
    """Few good pictures: precise, but they miss most of the reference. Libraries have returned these two in the wrong order."""
    reference, samples = normal(400, 4, seed=1), 0.05 * normal(100, 4, seed=2)
    precision, recall = precision_recall(reference, samples)
    assert precision == 1
    assert recall < 0.1
    assert precision_recall(samples, reference) == pytest.approx((recall, precision), abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_set_covers_itself_and_nothing_far_away(dtype):
    features = normal(100, 30)
    assert precision_recall(features, features, dtype=dtype) == (1, 1)
    assert precision_recall(features, features + 20, dtype=dtype) == (0, 0)


def test_the_edge_of_a_ball_belongs_to_it():
    """Copies make balls without an extent."""
    assert precision_recall(np.ones((6, 2)), np.ones((5, 2))) == (1, 1)
    assert precision_recall(np.ones((6, 2)), np.zeros((5, 2))) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_blocks_change_nothing(golden, dtype):
    reference, samples = golden[0]["ref"], golden[0]["samples"]
    whole = precision_recall(reference, samples, dtype=dtype, block_size=10000)
    for size in (7, 64, 500):
        shares = precision_recall(reference, samples, dtype=dtype, block_size=size)
        assert shares == pytest.approx(whole, abs=0.0021)  # one row: sums may be rounded in another order


def test_distances_are_never_all_in_memory_at_once(monkeypatch):
    sizes = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append(len(a)) or matmul(a, b))
    precision_recall(normal(100, 3), normal(90, 3), block_size=16)
    assert max(sizes) == 16


def test_shares_are_unchanged_by_rotation():
    a, b = normal(200, 12, seed=1), normal(200, 12, seed=2) * 0.9
    rotation = np.linalg.qr(normal(12, 12, seed=4))[0]
    shares = precision_recall(a, b, dtype=torch.float32)
    assert precision_recall(a @ rotation, b @ rotation, dtype=torch.float32) == pytest.approx(shares, abs=0.005)


def test_half_precision_loses_what_is_small_beside_the_norm():
    """It is the default for the evaluator's sake: in squared norms of 40,000 distances are multiples of 16 or 32."""
    reference, samples = 100 + 0.1 * normal(80, 4, seed=1), 101 + 0.1 * normal(80, 4, seed=2)
    assert precision_recall(reference, samples, dtype=torch.float32) == (0, 0)
    assert max(precision_recall(reference / 2, samples / 2)) > 0


def test_features_too_large_for_half_precision_get_single_precision(golden):
    reference, samples = (1000 * golden[0][name] for name in ("ref", "samples"))
    assert precision_recall(reference, samples) == precision_recall(reference, samples, dtype=torch.float32)


# --- kernel distance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subset", "num_subsets"), [(30, 7), (60, 3)])
def test_kernel_distance_is_torch_fidelitys(subset, num_subsets):
    a, b = normal(60, 8, seed=1), 0.9 * normal(75, 8, seed=2) + 0.1
    referee = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=num_subsets, kid_subset_size=subset, verbose=False
    )
    mean, deviation = kernel_distance(a, b, subset, num_subsets=num_subsets)
    assert mean == pytest.approx(referee["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(referee["kernel_inception_distance_std"], rel=1e-9)
    assert deviation > 0


def test_kernel_distance_by_definition():
    """Of all rows there is one subset, and nothing is known of its spread."""
    a, b = normal(9, 3, seed=1), 1 + normal(9, 3, seed=2)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 3 + 1) ** 3

    within = sum(kernel(x[i], x[j]) for x in (a, b) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b, subset=9) == (pytest.approx(within - 2 * between, rel=1e-9), None)


def test_kernel_distance_is_right_on_average_for_few_rows_where_frechet_distance_is_not():
    """Fifty pairs of sets of 20 rows, all of one distribution: around 0, which is their distance."""
    pairs = [(normal(20, 5, seed=2 * i), normal(20, 5, seed=2 * i + 1)) for i in range(50)]
    kernel = np.array([kernel_distance(a, b, subset=20)[0] for a, b in pairs])
    frechet = np.array([frechet_distance(*moments(a), *moments(b)) for a, b in pairs])
    assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(50)
    assert frechet.mean() > 10 * frechet.std() / np.sqrt(50)


@pytest.mark.parametrize(("counts", "subset"), [((2000, 1001), 1000), ((1000, 5000), 500), ((41, 60), 20), ((3, 2), 2)])
def test_subsets_are_of_1000_rows_or_half_of_a_small_set(counts, subset):
    assert usual_subset(*counts) == subset


# --- density and coverage -----------------------------------------------------------------------------------------------


def plain_density_coverage(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    radii = [sorted(np.linalg.norm(x - y) for y in reference)[k] for x in reference]
    inside = np.array([[np.linalg.norm(x - y) < radius for y in samples] for x, radius in zip(reference, radii, strict=True)])
    return inside.sum() / (k * len(samples)), inside.any(1).mean()


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_by_definition(k):
    reference, samples = normal(50, 6, seed=1), 0.8 * normal(40, 6, seed=2) + 0.2
    expected = plain_density_coverage(reference, samples, k)
    assert 0.1 < expected[1] < 1 < 2 * expected[0]
    assert density_coverage(reference, samples, k) == pytest.approx(expected)
    for block_size in (7, 1):
        assert density_coverage(reference, samples, k, block_size=block_size) == pytest.approx(expected)


def test_an_outlier_of_the_reference_does_not_make_samples_dense():
    """Precision takes all of them for real as one wide ball holds them; density counts the balls."""
    reference = np.concatenate([normal(99, 2, seed=1), [[60.0, 0.0]]])
    samples = np.array([30.0, 0.0]) + normal(50, 2, seed=2)
    assert precision_recall(reference, samples, 5, dtype=torch.float32)[0] == 1
    assert density_coverage(reference, samples) == pytest.approx((1 / 5, 1 / 100))


def test_distances_are_in_double_a_part_of_both_sets_at_a_time(monkeypatch):
    """Rows far from 0 lose nothing; 5,000 rows are more than are taken at once."""
    reference, samples = normal(30, 3, seed=1), normal(5000, 3, seed=2)
    sizes = []
    addmm = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, *rest, **named: sizes.append(self.shape) or addmm(self, *rest, **named)
    )
    usual, far = (density_coverage(reference + offset, samples + offset, block_size=8) for offset in (0, 1e5))
    assert usual == pytest.approx(far)
    rows, others = zip(*sizes, strict=True)
    assert (max(rows), max(others)) == (8, 4096)


def test_nearest_rows():
    rows, others = normal(20, 4, seed=1), normal(30, 4, seed=2)
    distances = np.linalg.norm(rows[:, None] - others, axis=2)
    assert nearest(rows, others, block_size=7).tolist() == distances.argmin(1).tolist()
    among = np.linalg.norm(rows[:, None] - rows, axis=2) + np.diag(np.full(20, np.inf))
    assert nearest(rows, None, block_size=7).tolist() == among.argmin(1).tolist()


# --- input --------------------------------------------------------------------------------------------------------------


def test_inputs_are_left_alone_and_may_be_read_only():
    features = normal(50, 4).astype(np.float32)
    features.flags.writeable = False
    before = features.copy()
    mean, cov = moments(features[::-1])
    precision_recall(features, features, dtype=torch.float32)
    for array in (mean, cov):
        array.flags.writeable = False
    frechet_distance(mean, cov, mean, cov)
    np.testing.assert_array_equal(features, before)


def with_nan(*shape: int) -> np.ndarray:
    features = normal(*shape)
    features[-1, -1] = np.nan
    return features


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(normal(1, 4)), "1 rows .* at least 2"),
        (lambda: moments(normal(5)), r"shape \(5,\)"),
        (lambda: moments(np.ones((4, 4), np.uint8)), "uint8"),
        (lambda: moments(with_nan(9, 4)), "NaN"),
        (lambda: moments(np.full((9, 4), -np.inf)), "infinity"),
        (lambda: Moments(3).add(normal(9, 4)), "width 4 after 3"),
        (lambda: Moments(3).result(), "0 rows"),
        (lambda: Moments(3).over_ranks(lambda values: values).result(), "0 rows"),
        (lambda: frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2)), "3 and of 2"),
        (lambda: frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(2)), r"second .*\(3,\) and \(2, 2\)"),
        (lambda: frechet_distance(np.eye(3), np.eye(3), np.zeros(3), np.eye(3)), r"first .*\(3, 3\) and \(3, 3\)"),
        (lambda: frechet_distance(np.zeros(3), with_nan(3, 3), np.zeros(3), np.eye(3)), "first .* NaN"),
        (lambda: inception_score(normal(9, 4)), "softmax"),
        (lambda: inception_score(np.full((9, 4), 0.5)), "softmax"),
        (lambda: inception_score(np.ones((0, 4))), "0 images"),
        (lambda: inception_score(np.ones((4, 1)), split_size=0), "splits of 0"),
        (lambda: inception_score(with_nan(9, 4)), "NaN"),
        (lambda: precision_recall(normal(3, 4), normal(9, 4)), "reference: 3 rows, but k=3 neighbours need 4"),
        (lambda: precision_recall(normal(9, 4), normal(5, 4), k=5), "samples: 5 rows, but k=5 neighbours need 6"),
        (lambda: precision_recall(normal(9, 4), normal(9, 3)), "4 in the reference and 3 in the samples"),
        (lambda: precision_recall(normal(9, 4), with_nan(9, 4)), "samples have NaN"),
        (lambda: precision_recall(normal(9, 4, 1), normal(9, 4)), r"reference of shape \(9, 4, 1\)"),
        (lambda: precision_recall(normal(9, 4), normal(9, 4), k=0), "k=0"),
        (lambda: precision_recall(normal(9, 4), normal(9, 4), dtype=torch.int8), "torch.int8"),
        (lambda: kernel_distance(normal(9, 4), normal(8, 4), subset=9), "100 subsets of 9 rows, from 9 and 8"),
        (lambda: kernel_distance(normal(1, 4), normal(8, 4)), "100 subsets of 2 rows, from 1 and 8"),
        (lambda: kernel_distance(normal(9, 4), normal(9, 3)), "4 in the first and 3 in the second"),
        (lambda: kernel_distance(normal(9, 4), with_nan(9, 4)), "second features have NaN"),
        (lambda: density_coverage(normal(5, 4), normal(9, 4)), "reference: 5 rows, but k=5 neighbours need 6"),
        (lambda: density_coverage(normal(9, 4), normal(0, 4)), "k=5, block_size=512, 0 samples"),
        (lambda: density_coverage(with_nan(9, 4), normal(9, 4)), "reference have NaN"),
        (lambda: nearest(normal(1, 4), None), "1 rows to be nearest"),
    ],
)
def test_bad_input_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
