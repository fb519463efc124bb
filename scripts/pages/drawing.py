"""What the page computes, without the page: models that are there, samples scale by scale, reconstructions, edits."""

import functools
import shlex
import sys
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
from models.storage import AVERAGED, CONFIG, read_description
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import plots
from utils.checkpoint import find_beside, is_ours, load_description, load_pair, locate
from utils.class_names import shown_names
from utils.data.pictures import read_picture
from utils.data.token_cache import is_of
from utils.metrics.similarity import psnr
from utils.sampling.editing import fitted, marked

MOST_IMAGES = 16
MOST_SEED = (1 << 63) - 1
NO_CLASS = -1  # as a label, of every transformer


class Models(NamedTuple):
    """A transformer and its tokenizer, on the device where they compute."""

    transformer: ScaleTransformer
    tokenizer: VQVAE
    names: list[str]  # by label


@dataclass(frozen=True)
class Wish:
    """What somebody asks for: the settings of a picture, which its command line has too."""

    checkpoint: str
    label: int  # or NO_CLASS
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
        label = "none" if self.label == NO_CLASS else self.label
        words = ["python", "sample.py", f"--ckpt={self.checkpoint}", "--out=samples.png", f"--classes=label:{label}"]
        words += [f"--num={self.count}", f"--seed={self.seed}", f"--cfg={self.guidance!r}", f"--top_k={self.top_k}"]
        words += [f"--top_p={self.top_p!r}", f"--temperature={self.temperature!r}", f"--smooth={int(self.smooth)}"]
        return shlex.join([*words, "--precision=float32"])

    def label_of(self, transformer: ScaleTransformer) -> int:
        """As the transformer counts, for which no class comes after all others. ValueError for a label that it has not."""
        num_classes = transformer.config.num_classes
        if self.label == NO_CLASS:
            return num_classes
        if not 0 <= self.label < num_classes:
            raise ValueError(f"label {self.label}: {self.checkpoint} has 0 to {num_classes - 1}: choose one of its classes")
        return self.label


class Progress(NamedTuple):
    """A picture as far as it is drawn: after some of its scales."""

    pictures: np.ndarray  # (N, H, W, 3) uint8
    scale: str  # such as "4x4"
    seconds: list[float]  # of each scale so far


def checkpoints_below(folder: Path) -> list[str]:
    """Runs and exported folders with a transformer, newest first, as paths."""
    configs = [path for path in folder.glob(f"**/{CONFIG}") if "checkpoints" not in path.relative_to(folder).parts]
    newest_first = sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True)
    return [str(path.parent) for path in newest_first if is_transformer(path.parent)]


def is_transformer(folder: Path) -> bool:
    try:
        description = load_description(folder)
    except (OSError, ValueError):  # no checkpoint, or one of other code
        return False
    return description is not None and description.kind == "transformer"


def usable(checkpoints: list[str]) -> list[str]:
    """Those that can be had, with their tokenizers; of the others is told on stderr why they are left out.

    The first one has drawn once, so that nobody waits for what only the first time takes; all that is looked at of those after
    it is whether their files are there, as loading every model would take long.
    """
    found: list[str] = []
    for checkpoint in checkpoints:
        try:
            files_of(checkpoint) if found else warm_up(checkpoint)
        except (ValueError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            found.append(checkpoint)
    return found


class Written(NamedTuple):
    """A file of a model, as it is now."""

    path: str
    nanoseconds: int  # when it was written


def files_of(checkpoint: str) -> tuple[Written, ...]:
    """All that a transformer and its tokenizer are read from. ValueError and FileNotFoundError where these cannot be had."""
    path = found_at(checkpoint, "transformer")
    named = read_description(path.parent).tokenizer if is_ours(path) else None
    if not named:
        raise ValueError(f"{checkpoint}: does not name its tokenizer: give a run, or a folder exported from one")
    try:
        tokenizer = found_at(find_beside(named, checkpoint), "tokenizer")
    except FileNotFoundError as error:
        message = f"{checkpoint} names its tokenizer {named}, which cannot be had: put it there ({error})"
        raise FileNotFoundError(message) from error
    beside = [model.with_name(name) for model in (path, tokenizer) for name in (CONFIG, AVERAGED)]
    files = [path, tokenizer, *(file for file in beside if file.exists())]
    return tuple(Written(str(file), file.stat().st_mtime_ns) for file in files)


def found_at(source: str, wanted: str) -> Path:
    """The weights that are meant now; the hub is asked once."""
    return locate(source, wanted) if Path(source).exists() else downloaded(source, wanted)


@functools.cache
def downloaded(source: str, wanted: str) -> Path:
    return locate(source, wanted)


def load(checkpoint: str) -> Models:
    """What is there now, of a run that goes on too: its newest checkpoint.

    ValueError and FileNotFoundError where a checkpoint or its tokenizer cannot be had.
    """
    return load_files(checkpoint, files_of(checkpoint))


@functools.lru_cache(maxsize=2)
def load_files(checkpoint: str, files: tuple[Written, ...]) -> Models:
    """files: those of the checkpoint, so that others are loaded and not taken from the cache."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    *models, class_names = load_pair(checkpoint, any_tokenizer=True)
    transformer, tokenizer = (model.requires_grad_(False).to(device) for model in models)
    said = transformer.description
    if said.tokenizer_hash and not is_of(said.tokenizer_hash, tokenizer):
        raise ValueError(f"{checkpoint}: was trained on tokens of another tokenizer than {said.tokenizer}: put that one back")
    check_fit(transformer, tokenizer)
    return Models(transformer, tokenizer, shown_names(class_names, transformer.config.num_classes))


def drawn(models: Models, wish: Wish, kept: Kept | None = None) -> Iterator[Progress]:
    """The pictures of a wish, after each scale: the images that sample.py draws, but for rounding."""
    transformer, tokenizer, _ = models
    device = transformer.head.weight.device
    generators = [torch.Generator(device).manual_seed(image_seed(wish.seed, n)) for n in range(wish.count)]
    noise = functools.partial(exponential_noise, generator=generators)
    labels = torch.full((wish.count,), wish.label_of(transformer), device=device)
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
    """Of a picture, all but where a mask of its size, grey, is above half.

    ValueError where that is nowhere in the centre, or everywhere.
    """
    tokenizer = models.tokenizer
    kept = Kept.of(tokenizer, fitted(picture.convert("RGB"), tokenizer) * 2 - 1, marked(mask, tokenizer))
    if not kept.keeps_any:
        raise ValueError("nothing of the picture would be kept: paint over less of it")
    return kept
