"""What the page computes, without the page: models that are there, samples scale by scale, reconstructions, edits."""

import functools
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from models.drawing import exponential_noise, image_seed
from models.editing import Kept
from models.generate import SamplingConfig, check_fit, sample_steps
from models.storage import CONFIG
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import plots
from utils.checkpoint import load_description, load_pair
from utils.class_names import shown_names
from utils.data.pictures import read_picture
from utils.metrics.similarity import psnr
from utils.sampling.editing import fitted

MOST_IMAGES = 16
MOST_SEED = (1 << 63) - 1


class Models(NamedTuple):
    """A transformer and its tokenizer, on the device where they compute."""

    transformer: ScaleTransformer
    tokenizer: VQVAE
    names: list[str]  # by label


@dataclass(frozen=True)
class Wish:
    """What somebody asks for: the settings of a picture, which its command line has too."""

    checkpoint: str
    label: int
    guidance: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    temperature: float = 1.0
    smooth: bool = False
    seed: int = 0
    count: int = 4

    def __post_init__(self):
        if not 1 <= self.count <= MOST_IMAGES:
            raise ValueError(f"{self.count} images: give 1 to {MOST_IMAGES}")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed {self.seed}: give a whole number of 0 or more")
        self.how()

    def how(self) -> SamplingConfig:
        """ValueError for numbers that are none of sampling's."""
        temperature = (self.temperature, self.temperature)
        return SamplingConfig(self.guidance, self.top_k, self.top_p, self.smooth, temperature=temperature)

    def command(self) -> str:
        """What draws the same on a command line."""
        words = ["python", "sample.py", "--ckpt", self.checkpoint, "--out", "samples.png", f"--classes=label:{self.label}"]
        words += [f"--num={self.count}", f"--seed={self.seed}", f"--cfg={self.guidance:g}", f"--top_k={self.top_k}"]
        words += [f"--top_p={self.top_p:g}", f"--temperature={self.temperature:g}", f"--smooth={int(self.smooth)}"]
        return shlex.join([*words, "--precision=float32"])


class Progress(NamedTuple):
    """A picture as far as it is drawn: after some of its scales."""

    pictures: np.ndarray  # (N, H, W, 3) uint8
    scale: str  # such as "4x4"
    seconds: list[float]  # of each scale so far


def checkpoints_below(folder: Path) -> list[str]:
    """Runs and exported folders with a transformer, newest first, as paths."""
    configs = [path for path in folder.glob(f"**/{CONFIG}") if "checkpoints" not in path.parts]
    newest_first = sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True)
    return [str(path.parent) for path in newest_first if is_transformer(path.parent)]


def is_transformer(folder: Path) -> bool:
    try:
        description = load_description(folder)
    except (OSError, ValueError):  # no checkpoint, or one of other code
        return False
    return description is not None and description.kind == "transformer"


@functools.lru_cache(maxsize=2)
def load(checkpoint: str) -> Models:
    """ValueError and FileNotFoundError where a checkpoint or its tokenizer cannot be had."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    *models, class_names = load_pair(checkpoint)
    transformer, tokenizer = (model.requires_grad_(False).to(device) for model in models)
    check_fit(transformer, tokenizer)
    return Models(transformer, tokenizer, shown_names(class_names, transformer.config.num_classes))


def drawn(models: Models, wish: Wish, kept: Kept | None = None) -> Iterator[Progress]:
    """The pictures of a wish, after each scale: the images that sample.py draws, but for rounding."""
    transformer, tokenizer, _ = models
    device = transformer.head.weight.device
    generators = [torch.Generator(device).manual_seed(image_seed(wish.seed, n)) for n in range(wish.count)]
    noise = functools.partial(exponential_noise, generator=generators)
    labels = torch.full((wish.count,), wish.label, device=device)
    seconds: list[float] = []
    start = time.perf_counter()
    for step, (height, width) in zip(
        sample_steps(transformer, tokenizer, labels, wish.how(), noise, kept=kept), transformer.pyramid.shapes, strict=True
    ):
        if not step.finite:
            raise ValueError("the transformer gives no numbers with these settings: lower the guidance")
        seconds.append(time.perf_counter() - start)
        images = (tokenizer.decode_features(step.f_hat) + 1) / 2
        yield Progress(plots.to_uint8(images), f"{height}x{width}", seconds)
        start = time.perf_counter()


def warm_up(checkpoint: str) -> None:
    """Draw once, so that nobody waits for what only the first time takes."""
    for _ in drawn(load(checkpoint), Wish(checkpoint, label=0, count=1)):
        pass


class Reconstruction(NamedTuple):
    """A picture through the tokenizer."""

    original: np.ndarray  # (H, W, 3) uint8, its centre at the tokenizer's size
    after_scales: np.ndarray  # (K, H, W, 3) uint8, the last one is the reconstruction
    psnr: float  # dB


def reconstructed(models: Models, path: str) -> Reconstruction:
    """ValueError, in one line, for a file that is no picture."""
    tokenizer = models.tokenizer
    pixels = fitted(read_picture(path), tokenizer)
    indices = tokenizer.encode(pixels * 2 - 1)
    steps = [plots.to_uint8((part + 1) / 2)[0] for part in tokenizer.decode_progressive(indices)]
    original = plots.to_uint8(pixels)[0]
    ratio = psnr(torch.from_numpy(original[None]), torch.from_numpy(steps[-1][None])).item()
    return Reconstruction(original, np.stack(steps), ratio)


def kept_of(models: Models, picture: Image.Image, mask: Image.Image) -> Kept:
    """Of a picture, all but where a mask of its size, grey, is above half. ValueError where nothing is marked."""
    tokenizer = models.tokenizer
    redrawn = fitted(mask.convert("RGB"), tokenizer, Image.Resampling.NEAREST)[0, 0] > 0.5
    return Kept.of(tokenizer, fitted(picture.convert("RGB"), tokenizer) * 2 - 1, redrawn)
