"""Small data sets and ways to run the commands, for the tests of train.py, sample.py and the scripts."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.tokenizer import VQVAE, TokenizerConfig
from utils.checkpoint import Description, save_model
from utils.files import written_aside

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("cat", "dog", "fox")
TINY_TOKENIZER = TokenizerConfig(
    sides=(1, 2, 3, 4), channels=32, multipliers=(1, 1, 1), num_blocks=1, num_codes=32, code_dim=8
)  # 16 px
# the released d12 command, small enough for a test
D12 = ["--depth=12", "--bs=768", "--ep=200", "--fp16=1", "--alng=1e-3", "--wpe=0.1"]
SMALL = ["--depth=2", "--width=64", "--heads=1", "--bs=8", "--ep=1", "--fp16=0", "--max_steps=4", "--seed=1", "--log_every=1"]


def make_images(root: Path, train: int = 8, val: int = 3, pixels: int = 20) -> Path:
    """root/train/<class>/*.png and root/val/<class>/*.png with a brightness of its own for each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 80, (pixels, pixels, 3), dtype=np.uint8) + np.uint8(80 * number)
                Image.fromarray(image).save(folder / f"{i}.png")
    return root


def make_tokenizer(directory: Path, config: TokenizerConfig = TINY_TOKENIZER) -> Path:
    """A tokenizer of random weights in our format."""
    torch.manual_seed(0)
    with written_aside(directory) as aside:
        save_model(aside, VQVAE(config), Description("tokenizer"))
    return directory


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


def shell_words(*words, ranks: int = 1) -> list[str]:
    """`python words...`, or the same under torchrun."""
    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*python, *map(str, words)]


def environment(**variables) -> dict[str, str]:
    """One thread per process: small models are many times slower with threads that wait for one another."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


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
