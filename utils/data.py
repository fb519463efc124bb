"""Images from ImageNet-style folders, in an order that is a function of (seed, step) alone.

A dataset is a directory with train/<class>/* and val/<class>/*; class names sorted give the labels 0, 1, ... The repository
carries one itself, 10,000 photographs of Fashion-MNIST, which `export_fashion_mnist` writes out as such folders.
"""

import functools
import gzip
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2 as transforms

from utils.signals import ignore_requests

FASHION_MNIST = Path(__file__).resolve().parents[1] / "data" / "fashion-mnist"
FASHION_MNIST_CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
VALIDATION_EVERY = 10  # of the embedded images, in file order: 9,000 to train on, 1,000 held out


@dataclass(frozen=True)
class ImageFiles:
    """Files of one split and their labels; class_names[label] is the folder they lie in."""

    paths: list[str]
    labels: list[int]
    class_names: list[str]


def read_folders(root: str | Path) -> tuple[ImageFiles, ImageFiles]:
    """The splits train/ and val/ under `root`.

    FileNotFoundError where a folder is missing, ValueError where one is empty, holds a file that is no image (by its name;
    hidden files are passed over), or val/ has a class that train/ lacks.
    """
    check_root(root)
    train, val = (_read_split(Path(root), split) for split in ("train", "val"))
    unknown = sorted(set(val.class_names) - set(train.class_names))
    if unknown:
        raise ValueError(f"{root}: class {unknown[0]!r} is in val/ but not in train/: remove it, or add its images to train/")
    labels = [train.class_names.index(val.class_names[label]) for label in val.labels]
    return train, ImageFiles(val.paths, labels, train.class_names)


def check_root(root: str | Path) -> None:
    """FileNotFoundError unless root/train and root/val are there: a cheap look before anything slow is loaded."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such directory; --data_path names one with train/<class>/* and val/<class>/*")
    for split in ("train", "val"):
        if not (Path(root) / split).is_dir():
            raise FileNotFoundError(f"{Path(root) / split}: no such directory; images belong into {split}/<class>/* there")


def _read_split(root: Path, split: str) -> ImageFiles:
    if not any(entry.is_dir() for entry in os.scandir(root / split)):
        raise ValueError(f"{root / split}: no class folders in it; images belong into {split}/<class>/*")
    files = ImageFolder(str(root / split), is_valid_file=_is_image, allow_empty=True)
    empty = sorted(set(range(len(files.classes))) - set(files.targets))
    if empty:
        raise ValueError(f"{root / split / files.classes[empty[0]]}: no images in it: add some or remove the folder")
    return ImageFiles([path for path, _ in files.samples], files.targets, files.classes)


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    if name.startswith("."):
        return False
    if not name.lower().endswith(IMG_EXTENSIONS):
        raise ValueError(f"{path}: not an image file ({', '.join(IMG_EXTENSIONS)}): remove it from the folder")
    return True


def check_resize(factor: float) -> None:
    """ValueError unless resized images are large enough to be cut to their final size."""
    if factor < 1:
        raise ValueError(f"--resize={factor}: images must not become smaller than their final size: give 1 or more")


class Images(Dataset):
    """Images (3, pixels, pixels) in [-1, 1] with their labels.

    Shorter side resized to resize * pixels (Lanczos), then a random crop (`augment`) or the centre. Items are asked for by
    (position, index): the position in the run seeds the crop, so a resumed run sees the same crops.
    """

    def __init__(
        self, files: ImageFiles, pixels: int, resize: float = 1.125, augment: bool = False, flip: bool = False, seed: int = 0
    ):
        self.files = files
        self.seed = seed
        self.random = augment or flip
        crop = transforms.RandomCrop if augment else transforms.CenterCrop
        self.transform = transforms.Compose(
            [
                transforms.Resize(round(resize * pixels), interpolation=transforms.InterpolationMode.LANCZOS),
                crop((pixels, pixels)),
                *([transforms.RandomHorizontalFlip()] if flip else []),
                transforms.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int] | ValueError:
        position, index = item
        try:
            with Image.open(self.files.paths[index]) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            # handed over as a value: raised inside a worker it would arrive wrapped in the worker's traceback
            return ValueError(f"{self.files.paths[index]}: not a readable image ({error}): repair or remove it")
        if not self.random:
            pixels = self.transform(image)
        else:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would seed the GPUs too, under the feet of the training step
                seed = int(np.random.SeedSequence((self.seed, position)).generate_state(1, np.uint64)[0] >> 1)
                torch.default_generator.manual_seed(seed)
                pixels = self.transform(image)
        return pixels.float() / 127.5 - 1, self.files.labels[index]


def _collate(items: list) -> tuple[Tensor, Tensor] | ValueError:
    for item in items:
        if isinstance(item, ValueError):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of all samples in one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(size)


@dataclass(frozen=True)
class TrainOrder:
    """Which samples each step, micro-batch and rank gets: an endless row of permutations, one per epoch, cut into batches.

    size: images in the dataset. batch: of all ranks together. Every rank takes batch / (world * micro_batches) at a time.
    views: encodings stored of every image, one behind another; each epoch takes the next one of all images.
    Independent of the number of ranks: step s always trains on positions s * batch .. (s + 1) * batch of the row.
    """

    # Differs from VAR: no batch is cut short or filled up at the end of an epoch, so steps and epochs need not divide.

    size: int
    batch: int
    seed: int
    rank: int = 0
    world: int = 1
    micro_batches: int = 1
    views: int = 1

    def positions(self, step: int, micro_batch: int) -> np.ndarray:
        share = self.batch // (self.world * self.micro_batches)
        return step * self.batch + (micro_batch * self.world + self.rank) * share + np.arange(share)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The image at each position, or the row of its encoding where there are several views."""
        epochs, offsets = np.divmod(positions, self.size)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            images = permutation(self.seed, int(epoch), self.size)[offsets[chosen]]
            indices[chosen] = images * self.views + epoch % self.views
        return indices

    def micro_batches_from(self, step: int, last_step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, indices) of every micro-batch of this rank, from `step` up to `last_step`."""
        for current in range(step, last_step):
            for micro_batch in range(self.micro_batches):
                positions = self.positions(current, micro_batch)
                yield positions, self.indices(positions)


class _Batches(torch.utils.data.Sampler):
    """Lists of (position, index) for the loader, made as they are needed."""

    def __init__(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]):
        self.batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for positions, indices in self.batches:
            yield list(zip(positions.tolist(), indices.tolist(), strict=True))


def _leave_signals_to_the_trainer(worker: int) -> None:
    ignore_requests()


def batches_at(
    images: Images, batches: Iterable[tuple[np.ndarray, np.ndarray]], workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images (B, 3, h, w), labels (B,)) for each (positions, indices); ValueError names a file that cannot be read."""
    loader = DataLoader(
        images,
        batch_sampler=_Batches(batches),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or opening a loader would draw from the generator that seeds the training step
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def train_batches(
    images: Images, order: TrainOrder, first_step: int, last_step: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every micro-batch of this rank."""
    return batches_at(images, order.micro_batches_from(first_step, last_step), workers)


def val_batches(images: Images, batch: int, rank: int = 0, world: int = 1, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of a split, each image once."""
    return batches_at(images, ((mine, mine) for mine in in_order(len(images), batch, rank, world)), workers)


def in_order(size: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[np.ndarray]:
    """Sample numbers rank, rank + world, ... in batches."""
    mine = np.arange(rank, size, world)
    for start in range(0, len(mine), batch):
        yield mine[start : start + batch]


def read_fashion_mnist() -> tuple[np.ndarray, np.ndarray]:
    """The embedded photographs: images (10000, 28, 28) uint8, labels (10000,) uint8."""
    with gzip.open(FASHION_MNIST / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION_MNIST / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


def export_fashion_mnist(root: Path) -> None:
    """Write the embedded photographs as train/<class>/*.png (9,000) and val/<class>/*.png (1,000), 32x32 RGB.

    28x28 is padded with the black background to 32x32. Image i is held out where i % 10 == 9. A complete earlier export stays.
    """
    done = root / ".complete"
    if done.exists():
        return
    if root.exists() and not {path.name for path in root.iterdir()} <= {"train", "val"}:
        raise ValueError(f"{root}: holds other files: give another directory")
    shutil.rmtree(root, ignore_errors=True)  # an unfinished export
    images, labels = read_fashion_mnist()
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = "val" if i % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"
        folder = root / split / FASHION_MNIST_CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").save(folder / f"{i:05d}.png")
    done.touch()
