"""Two networks that no loss has seen, and what both say of images beside the held-out ones of a folder.

EfficientNet-Lite0, trained on ImageNet, and a small classifier trained on the folder's own training images: a figure that only
one of them finds better is an agreement with that network. Legend: N images, H x W pixels.
"""

from pathlib import Path

import numpy as np
import torch

from models.tokenizer import VQVAE
from utils.data.batches import val_batches
from utils.data.images import ImageFiles, Images, read_folders
from utils.metrics.classifier import train_classifier
from utils.metrics.codes import CodeCounts
from utils.metrics.distances import frechet_distance, inception_score, precision_recall
from utils.metrics.features import Extractor, load_extractor
from utils.metrics.measure import Measured, batch_size, measure_batches
from utils.metrics.reconstruction import reconstruct
from utils.plots import to_uint8

DECODED_AT_ONCE = 50


class Judges:
    """Of a folder of images with train/ and val/, at the size of a tokenizer.

    train, val: images (N, H, W, 3) uint8; train_labels, val_labels: (N,). networks: by name. chosen: rows of as many training
    images as are to be compared, spread evenly. The classifier is trained when this is built, which takes seconds.
    """

    def __init__(self, root: str | Path, pixels: int, count: int, device: torch.device | str = "cpu"):
        train, val = read_folders(root)
        self.train, self.train_labels = pixels_of(train, pixels)
        self.val, self.val_labels = pixels_of(val, pixels)
        self.chosen = np.linspace(0, len(self.train) - 1, min(count, len(self.train))).astype(int)
        self.classifier = train_classifier(self.train, self.train_labels, len(train.class_names), device=device)
        self.networks: dict[str, Extractor] = {
            "efflite0": load_extractor("efflite0", device=device),
            "classifier": self.classifier,
        }
        self.references = {name: measured(network, self.val) for name, network in self.networks.items()}

    def distances(self, images: np.ndarray) -> dict[str, float]:
        """Fréchet distance of images (N, H, W, 3) uint8 from the held-out ones, by network."""
        return {name: self._distance(name, measured(network, images)) for name, network in self.networks.items()}

    def scores(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Of images (N, H, W, 3) uint8: both distances, and how many the classifier takes for what they are labelled (N,); by
        EfficientNet-Lite0 their Inception score, and precision and recall beside the held-out images."""
        ours = {name: measured(network, images) for name, network in self.networks.items()}
        features = ours["efflite0"].features
        precision, recall = precision_recall(self.references["efflite0"].features.pooled, features.pooled)
        return {
            "fd": self._distance("efflite0", ours["efflite0"]),
            "fd_classifier": self._distance("classifier", ours["classifier"]),
            "recognised": self.classifier.accuracy(images, labels),
            "inception_score": inception_score(features.logits.softmax(1)),
            "precision": precision,
            "recall": recall,
        }

    def scores_of(self, samples: str | Path) -> dict[str, float]:
        """The same of an .npz that sample.py wrote."""
        with np.load(samples, allow_pickle=False) as archive:
            return self.scores(archive["arr_0"], archive["labels"])

    def _distance(self, name: str, ours: Measured) -> float:
        return frechet_distance(*ours.statistics.pooled, *self.references[name].statistics.pooled)


def pixels_of(files: ImageFiles, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """All images (N, H, W, 3) uint8, cut out of the middle, and labels (N,)."""
    batches = val_batches(Images(files, pixels, resize=1.0), DECODED_AT_ONCE)
    return np.concatenate([to_uint8((batch + 1) / 2) for batch, _ in batches]), files.labels


def measured(network: Extractor, images: np.ndarray) -> Measured:
    """Of images (N, H, W, 3) uint8."""
    size = batch_size(network)
    batches = (images[first : first + size] for first in range(0, len(images), size))
    return measure_batches(network, batches, "images")


def decoded(tokenizer: VQVAE, images: np.ndarray) -> tuple[np.ndarray, CodeCounts]:
    """What a tokenizer leaves of images (N, H, W, 3) uint8, and the codes between."""
    counts, parts = CodeCounts(tokenizer.pyramid, tokenizer.config.num_codes), []
    for first in range(0, len(images), DECODED_AT_ONCE):
        part, indices = reconstruct(tokenizer, images[first : first + DECODED_AT_ONCE])
        counts.add(indices)
        parts.append(part)
    return np.concatenate(parts), counts
