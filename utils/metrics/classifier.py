"""A second opinion beside FD-EffLite0: features of a small classifier, trained on the very images that are at hand.

No loss has seen it, and it has seen nothing but the training images, so that a distance of its features, and how often it
recognises what was decoded or drawn, tell whether a better FD-EffLite0 is more than an agreement with one network. Its figures
are comparable where data, seed, PyTorch and its number of threads are the same. Legend: N images, H x W pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.storage import weights_hash
from utils.metrics.features import Features

SIDE = 32  # pixels that it works at
WIDTHS = (16, 32, 64)
BATCH = 64
LEARNING_RATE = 2e-3
MIN_STEPS, EPOCHS = 300, 4


class SmallClassifier:
    """Extractor (utils/metrics/features.py) with pooled (N, 128) and logits (N, classes); ready after `train_classifier`.

    Its layers see images of any size, made as large as SIDE.
    """

    name = "classifier"
    distance_name = "FD-classifier"
    kernel_name = "KD-classifier"
    score_name = "IS-classifier"
    published = ""  # there is no file of it
    dim = 128
    spatial_dim = 0

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.device, self.num_classes = torch.device(device), num_classes
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        features = WIDTHS[-1] * (SIDE // 2 ** len(WIDTHS)) ** 2
        layers += [nn.Flatten(), nn.Linear(features, self.dim), nn.ReLU()]
        self.network = nn.Sequential(*layers).to(self.device)
        self.classifier = nn.Linear(self.dim, num_classes).to(self.device)

    @property
    def fingerprint(self) -> str:
        return weights_hash(nn.ModuleList([self.network, self.classifier]))

    def __call__(self, images: Tensor) -> Features:
        """images (N, H, W, 3) uint8 of any size, on its device."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        pooled = self.network(
            x if x.shape[2:] == (SIDE, SIDE) else F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        )
        return Features(pooled, self.classifier(pooled))

    @torch.inference_mode()
    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of images (N, H, W, 3) uint8 that it takes for what labels (N,) say, 0 to 1."""
        found = [
            self(torch.from_numpy(part).to(self.device)).logits.argmax(1).cpu()
            for part in np.array_split(images, -(-len(images) // BATCH))
        ]
        return float((torch.cat(found).numpy() == labels).mean())


def train_classifier(
    images: np.ndarray, labels: np.ndarray, num_classes: int, seed: int = 0, device: torch.device | str = "cpu"
) -> SmallClassifier:
    """Fitted to images (N, H, W, 3) uint8 and labels (N,): a few epochs of AdamW on cross-entropy, the rate going down to 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SmallClassifier(num_classes, device)
    parameters = [*classifier.network.parameters(), *classifier.classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.05)
    steps = max(MIN_STEPS, EPOCHS * len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    draws = np.random.default_rng(seed)
    order = np.concatenate([draws.permutation(len(images)) for _ in range(-(-steps * BATCH // len(images)))])
    for rows in order[: steps * BATCH].reshape(steps, BATCH):
        logits = classifier(torch.from_numpy(images[rows]).to(device)).logits
        loss = F.cross_entropy(logits, torch.from_numpy(labels[rows]).long().to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return classifier
