"""The photographs that the repository carries: 10,000 of Fashion-MNIST, written out as folders of images."""

import gzip
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

FASHION_MNIST = Path(__file__).resolve().parents[2] / "data" / "fashion-mnist"
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
