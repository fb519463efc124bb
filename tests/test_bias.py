"""What numbers of images do to scores: estimates beside what is known of normal distributions."""

import numpy as np
import pytest
import torch

from utils.metrics.bias import coverage_of_the_same, find_biases
from utils.metrics.distances import density_coverage, frechet_distance, inception_score, moments
from utils.metrics.features import Features
from utils.metrics.image_sets import Gaussian, Statistics
from utils.metrics.measure import Measured


class Network:
    """As much of an extractor as is asked for here."""

    distance_name, kernel_name, score_name = "FD", "KD", "IS"
    dim, spatial_dim = 4, 3


def measured(count: int, seed: int, dim: int = 4, offset: float = 0.0, spatial: bool = False) -> Measured:
    """Features of a normal distribution, and five classes with little certainty."""
    rng = np.random.default_rng(seed)
    pooled, logits = offset + rng.normal(size=(count, dim)), 2 * rng.normal(size=(count, 5))
    corners = 2 * rng.normal(size=(count, 3)) if spatial else None
    gaussians = [Gaussian(*moments(part)) for part in (pooled, corners) if part is not None]
    features = Features(*(None if part is None else torch.from_numpy(part) for part in (pooled, logits, corners)))
    return Measured(Statistics("images", count, 8, 8, *gaussians), features)


def test_a_distance_of_few_images_is_as_much_too_large_as_is_said():
    """Of one distribution it is 0, and all that is found is too much; a mean of forty draws."""
    said, found, said_of_spatial = [], [], []
    for seed in range(40):
        pair = measured(120, 2 * seed, spatial=True), measured(80, 2 * seed + 1, spatial=True)
        biases = find_biases({"samples": pair}, Network(), split=5000)
        said.append(biases["FD"].by["samples"])
        said_of_spatial.append(biases["sFD"].by["samples"])
        found.append(frechet_distance(*pair[0].statistics.pooled, *pair[1].statistics.pooled))
    assert np.mean(said) == pytest.approx(np.mean(found), rel=0.3)
    assert 2 < np.mean(said_of_spatial) / np.mean(said) < 5  # four times the variance, three quarters of the width


def test_a_set_that_is_large_enough_is_not_halved():
    """10,000 images and statistics that do not say how many they are of count as many."""
    many, few = measured(10_000, 0), measured(100, 1)
    order = np.random.default_rng(0).permutation(100)[:50]
    half = moments(few.features.pooled[order])
    whole = frechet_distance(*few.statistics.pooled, *many.statistics.pooled)
    expected = frechet_distance(*half, *many.statistics.pooled) - whole
    unknown = Measured(Statistics("file", None, None, None, many.statistics.pooled), None)
    for reference in (many, unknown):
        biases = find_biases({"a": (few, reference)}, Network(), split=5000)
        assert biases["FD"].by == {"a": pytest.approx(expected)}
    assert list(biases) == ["FD", "IS"]  # nothing but these is known of statistics


def test_with_no_more_images_than_features_it_is_at_least_so_much():
    pair = measured(40, 0, dim=40), measured(90, 1, dim=40)
    wide = Network()
    wide.dim = 40
    for extractor, word in ((wide, "at least"), (Network(), "about")):
        bias = find_biases({"samples": pair}, extractor, split=5000)["FD"]
        assert f"too large with fewer than 10,000 images: compare it with that of as many, by {word} " in bias.in_words("FD")
        assert bias.at_least == (word == "at least")


def test_nothing_is_said_of_large_sets():
    """50,000 samples beside 10,000 images, in splits of 5,000, as the field has them."""
    assert find_biases({"samples": (measured(50_000, 0), measured(10_000, 1))}, Network(), split=5000) == {}


def test_how_much_is_unknown_where_a_small_set_is_known_by_statistics_alone():
    reference = Measured(measured(100, 1).statistics, None)
    bias = find_biases({"samples": (measured(10_000, 0), reference)}, Network(), split=5000)["FD"]
    assert bias.by == {"samples": None}
    assert bias.in_words("FD") == "FD: too large with fewer than 10,000 images: compare it with that of as many"


def test_an_inception_score_of_few_images_is_too_small():
    few, many = (inception_score(measured(count, 3).features.logits.softmax(1), count) for count in (60, 60_000))
    biases = find_biases({"a": (measured(60, 3), measured(70, 4)), "b": (measured(60, 5), measured(70, 4))}, Network(), 5000)
    assert few < many
    said = biases["IS"].by
    assert list(said) == ["a", "b"]
    assert max(said.values()) < 0
    assert biases["IS"].in_words("IS") == (
        "IS: too small with fewer than 5,000 images in a split, "
        f"by about {-said['a']:.3g} (a), {-said['b']:.3g} (b)"
    )  # fmt: skip


def test_shares_depend_on_the_numbers():
    biases = find_biases({"samples": (measured(60, 0), measured(70, 1))}, Network(), split=50)
    assert list(biases) == ["FD", "IS", "precision", "recall", "density", "coverage"]
    assert biases["recall"].by == {"samples": None}
    assert biases["coverage"].by == {"samples": pytest.approx(coverage_of_the_same(70, 60) - 1)}


@pytest.mark.parametrize(("references", "samples"), [(40, 20), (30, 90)])
def test_coverage_of_a_distribution_by_itself(references, samples):
    """A mean of 60 draws; any distribution has the same."""
    found = [
        density_coverage(measured(references, 2 * seed).features.pooled, measured(samples, 2 * seed + 1).features.pooled)
        for seed in range(60)
    ]
    density, coverage = np.mean(found, axis=0)
    assert coverage_of_the_same(references, samples) == pytest.approx(coverage, abs=0.02)
    assert density == pytest.approx(1, abs=0.05)
