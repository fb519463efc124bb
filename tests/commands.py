"""Small data sets and ways to run the commands, for the tests of train.py, sample.py and the scripts."""

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from models.tokenizer import VQVAE, TokenizerConfig
from utils.checkpoint import Description, save_model
from utils.data import fashion_mnist
from utils.data.fashion_mnist import read_fashion_mnist
from utils.files import written_aside
from utils.processes import environment, shell_words
from utils.runs.checkpoints import checkpoints
from utils.runs.log import read_repeatable_metrics
from utils.runs.saving import read_numbers

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("cat", "dog", "fox")
TINY_TOKENIZER = TokenizerConfig(
    sides=(1, 2, 3, 4), channels=32, multipliers=(1, 1, 1), num_blocks=1, num_codes=32, code_dim=8
)  # 16 px
# the released d12 command, small enough for a test
D12 = ["--depth=12", "--bs=768", "--ep=200", "--fp16=1", "--alng=1e-3", "--wpe=0.1"]
SMALL = ["--depth=2", "--width=64", "--heads=1", "--bs=8", "--ep=1", "--fp16=0", "--max_steps=4", "--seed=1", "--log_every=1"]


def make_images(root: Path, train: int = 8, val: int = 3, pixels: int = 20, names: Sequence[str] = CLASSES) -> Path:
    """root/train/<class>/*.png and root/val/<class>/*.png with a brightness of its own for each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 80, (pixels, pixels, 3), dtype=np.uint8) + np.uint8(80 * number)
                Image.fromarray(image).save(folder / f"{i}.png")
    return root


def export_some(root: Path) -> None:
    """A tenth of the embedded images, 900 and 100, as `export_fashion_mnist` writes all: tests have no time for more."""
    with patch.object(fashion_mnist, "read_fashion_mnist", some_of_fashion_mnist):
        fashion_mnist.export_fashion_mnist(root)


def some_of_fashion_mnist() -> tuple[np.ndarray, np.ndarray]:
    """The first ten of every hundred."""
    images, labels = read_fashion_mnist()
    some = np.arange(len(images)) // 10 % 10 == 0
    return images[some], labels[some]


def make_tokenizer(directory: Path, config: TokenizerConfig = TINY_TOKENIZER) -> Path:
    """A tokenizer of random weights in our format."""
    torch.manual_seed(0)
    with written_aside(directory) as aside:
        save_model(aside, VQVAE(config), Description("tokenizer"))
    return directory


@dataclass(frozen=True)
class ImageFlags:
    """What utils.runs.listing is told."""

    data_path: str | Path
    image_column: str = ""
    label_column: str = ""
    skip_bad: bool = True
    max_bad: float = 0.2
    val_share: float = 0.0
    background: str = "white"
    workers: int = 0


def script(name: str):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_in_process(main, arguments: list, monkeypatch, capsys) -> tuple[int, str, str]:
    """Call a command as if from the shell: exit code, stdout and stderr."""
    from utils import cli

    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    code = 0
    try:
        cli.run(main)
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_in_shell(*words, ranks: int = 1, timeout: float = 300, **variables) -> subprocess.CompletedProcess:
    """Run a command from the root of the repository and wait for it."""
    return subprocess.run(
        shell_words(*words, ranks=ranks),
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class SavedBytes:
    """Bytes that autograd holds for the backward pass: now and at most."""

    def __init__(self):
        self.now = self.peak = 0
        self.holders: dict[int, int] = {}  # of each storage, how often it is held

    def hold(self, storage: torch.UntypedStorage, by: int) -> None:
        key = storage.data_ptr()
        before = self.holders.get(key, 0)
        self.holders[key] = before + by
        if before == 0 or before + by == 0:
            self.now += by * storage.nbytes()
            self.peak = max(self.peak, self.now)


@contextlib.contextmanager
def live_saved_bytes() -> Iterator[SavedBytes]:
    """Watch what autograd keeps inside, each storage counted once, until it lets go of it."""
    watch = SavedBytes()

    class Held:
        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor
            watch.hold(tensor.untyped_storage(), 1)

        def __del__(self):
            watch.hold(self.tensor.untyped_storage(), -1)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield watch


def assert_same_training(run: Path, other: Path) -> None:
    """Both runs ended in the same state, bit for bit, and logged the same figures on the way."""
    ours, theirs = checkpoints(run)[-1], checkpoints(other)[-1]
    assert ours.name == theirs.name
    names = [{file.name for file in path.glob("*.safetensors")} for path in (ours, theirs)]
    assert names[0] == names[1]
    for name in names[0]:
        tensors = [load_file(path / name) for path in (ours, theirs)]
        assert tensors[0].keys() == tensors[1].keys()
        differing = [key for key in tensors[0] if not torch.equal(tensors[0][key], tensors[1][key])]
        assert not differing, (name, differing)
    numbers = [{k: v for k, v in read_numbers(path).items() if k != "seconds"} for path in (ours, theirs)]
    assert numbers[0] == numbers[1]
    assert read_repeatable_metrics(run) == read_repeatable_metrics(other)


def assert_refused(code: int, errors: str, message: str) -> None:
    assert code != 0
    assert message in errors
    assert len([line for line in errors.splitlines() if "error" in line]) == 1
    assert "Traceback" not in errors
