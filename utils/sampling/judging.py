"""The best of several candidates by a classifier, which is the rejection sampling that VAR publishes figures of (arXiv
2404.02905, table 1).

A classifier that has chosen images must not score them afterwards: its own features then say more of the choice than of the
images. Legend: B images, H x W pixels.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.drawing import Generators
from models.generate import SampledScales, decode_sampled
from models.storage import fill_, read_tensors
from models.tokenizer import VQVAE
from utils.files import sha256
from utils.metrics.features import EfficientNetLite0, load_extractor
from utils.plots import to_bytes

SIDE = 224  # pixels that torchvision's classifiers look at
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red, green and blue, 0 to 1

Sampler = Callable[[Tensor, Generators], SampledScales]  # labels (B,) and generators -> what was drawn


class Judge:
    """How likely a classifier finds it that an image is of its class.

    source: "efflite0", which knows ImageNet's classes, or a file of weights that torchvision can read, whose name begins with
    that of the network, such as resnet50-11ad3fa6.pth. FileNotFoundError for no file; ValueError for another number of classes
    than num_classes, or for weights of something else.
    """

    def __init__(self, source: str, num_classes: int, device: torch.device):
        self.name = source
        if source == EfficientNetLite0.name:
            extractor = load_extractor(source, device=device)
            known, self.fingerprint = extractor.num_classes, extractor.fingerprint
            self.logits = lambda images: extractor(to_bytes(images)).logits
        else:
            path = Path(source)
            if not path.is_file():
                mend = f"give {EfficientNetLite0.name}, or weights of a torchvision classifier"
                raise FileNotFoundError(f"--judge={source}: no such file: {mend}")
            network, known = torchvision_network(path, read_tensors(path))
            network.to(device).requires_grad_(False)
            self.fingerprint = sha256(path)
            self.logits = lambda images: network(prepared(images.float()))
        if known != num_classes:
            raise ValueError(f"--judge={source}: knows {known} classes, the transformer {num_classes}: give one of the same")

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1], labels (B,) -> (B,) probabilities in float32."""
        with torch.autocast(images.device.type, enabled=False):
            return self.logits(images).softmax(dim=-1).gather(1, labels[:, None])[:, 0]


def prepared(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, SIDE, SIDE), as torchvision's classifiers see images."""
    larger = min(images.shape[2:]) > SIDE
    x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=larger)
    mean, deviation = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (x - mean) / deviation


def torchvision_network(path: Path, tensors: dict) -> tuple[nn.Module, int]:
    """The classifier that a file's name begins with, with the weights of the file, and how many classes it knows."""
    from torchvision import models  # here, as it takes a second

    name = path.name.split("-")[0].split(".")[0]
    if name not in models.list_models(module=models):
        known = "resnet50, efficientnet_v2_s, convnext_tiny"
        raise ValueError(f"{path}: its name has to begin with that of a torchvision classifier, such as {known}: rename it")
    with torch.device("meta"):
        layers = models.get_model(name).named_modules()
    head = [layer for layer, module in layers if isinstance(module, nn.Linear)][-1]
    bias = tensors.get(f"{head}.bias")
    if not isinstance(bias, Tensor):
        raise ValueError(f"{path}: has no {head}.bias: it is no {name}")
    num_classes = len(bias)
    return fill_(models.get_model(name, num_classes=num_classes), tensors, path, f"no {name}"), num_classes


class BestOf:
    """A sampler that draws every image several times, one after another from the same random numbers, and keeps the likeliest.

    The first candidate is what would be made without it. kept_first, before, after: of all images counted so far, how many
    stayed the first one, and sums of the probabilities of the first and of the kept ones.
    """

    def __init__(self, count: int, draw: Sampler, tokenizer: VQVAE, judge: Judge):
        self.count, self.draw, self.tokenizer, self.judge = count, draw, tokenizer, judge
        self.images, self.kept_first, self.before, self.after = 0, 0.0, 0.0, 0.0
        self.last: tuple[Tensor, Tensor] | None = None  # (B,) each: probabilities of the first and of the kept candidates

    def __call__(self, labels: Tensor, generators: Generators) -> SampledScales:
        best = self.draw(labels, generators)
        first = likelihood = self.judge(decode_sampled(self.tokenizer, best), labels)
        for _ in range(self.count - 1):
            candidate = self.draw(labels, generators)
            of_candidate = self.judge(decode_sampled(self.tokenizer, candidate), labels)
            is_better = of_candidate > likelihood
            best = chosen(is_better, candidate, best)
            likelihood = torch.where(is_better, of_candidate, likelihood)
        self.last = first, likelihood
        return best

    def count_in(self, images: int) -> None:
        """Of what was drawn last so many are images that were asked for; the others fill up the cohort."""
        first, likelihood = (of_all[:images] for of_all in self.last)
        self.images += images
        self.kept_first += (likelihood == first).sum().item()
        self.before += first.sum().item()
        self.after += likelihood.sum().item()

    def told(self) -> str:
        """One line about what the choice did."""
        return (
            f"best of {self.count} by {self.judge.name}: {self.kept_first / self.images:.0%} of images are the first "
            f"candidate, {1 / self.count:.0%} of all candidates are kept; mean probability of the class "
            f"{self.before / self.images:.3f} -> {self.after / self.images:.3f}. The same network must not score these images"
        )


def chosen(which: Tensor, ours: SampledScales, theirs: SampledScales) -> SampledScales:
    """Image by image, ours where `which` (B,) is true, else theirs."""

    def rows(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(which.view(-1, *[1] * (a.ndim - 1)), a, b)

    indices, sums = ([rows(*pair) for pair in zip(*parts, strict=True)] for parts in zip(ours[:2], theirs[:2], strict=True))
    return SampledScales(indices, sums, ours.finite & theirs.finite)
