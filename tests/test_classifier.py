import numpy as np
import torch

from utils.metrics.classifier import train_classifier
from utils.metrics.measure import measure_batches


def shapes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright bar across, upright or in a corner, in a random place and colour."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 80, (count, 16, 16, 3), dtype=np.uint8), rng.integers(0, 3, count)
    for image, label in zip(images, labels, strict=True):
        place = rng.integers(2, 12)
        area = [np.s_[place : place + 2], np.s_[:, place : place + 2], np.s_[:4, :4]][label]
        image[area] += rng.integers(60, 170, 3, dtype=np.uint8)
    return images, labels


def test_it_learns_what_it_is_shown_and_is_the_same_again():
    images, labels = shapes(600, 0)
    classifier, again = (train_classifier(images, labels, 3, seed=1) for _ in range(2))
    assert classifier.fingerprint == again.fingerprint
    assert classifier.accuracy(*shapes(200, 1)) > 0.95
    assert classifier.accuracy(shapes(200, 1)[0], np.zeros(200)) < 0.5
    measured = measure_batches(classifier, [images[:50], images[50:90]], "images")
    assert measured.features.pooled.shape == (90, classifier.dim)
    assert measured.features.logits.shape == (90, 3)
    assert torch.equal(measured.features.logits.argmax(1), torch.from_numpy(labels[:90]))


def test_training_it_draws_nothing_from_the_global_generator():
    images, labels = shapes(64, 0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_classifier(images, labels, 3)
    assert torch.equal(before, torch.get_rng_state())
