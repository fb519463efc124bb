"""Dump the same images by one rank, and by two of which one is killed on the way, and compare the files byte for byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from utils import cli, evidence
from utils.cli import flag, required
from utils.files import sha256
from utils.processes import begin, children, run

KILLED_AT = 0.4  # of the images


@dataclass(frozen=True)
class CompareConfig:
    """Flags of scripts/checks/compare_dumps.py."""

    ckpt: str = required("transformer, such as out/demo/transformer")
    out: str = flag("out/dumps", "directory for the dumps; what an earlier comparison left there is removed")
    num: int = flag(2000, "images of each dump")
    json: str = flag("", "file for the figures, empty: none")


def kill_a_rank(process: subprocess.Popen, parts: Path, groups: int) -> int:
    """SIGKILL to one of the processes of torchrun once so many groups are there; returns how many groups were."""
    while process.poll() is None:
        there = len(list(parts.glob("[0-9]*.npy")))
        if there >= groups:
            os.kill(children(process.pid)[-1], signal.SIGKILL)
            process.wait()
            return there
        time.sleep(0.05)
    raise ValueError(f"sample.py was done before it could be killed: give more than {groups} groups of images")


def main() -> None:
    config = cli.parse(CompareConfig, __doc__)
    out = Path(config.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    one, two = out / "one_rank.npz", out / "two_ranks.npz"
    sampling = ("sample.py", "--ckpt", config.ckpt, "--format=npz", "--num_images", config.num, "--seed=1")
    run(*sampling, "--batch=50", "--out", one)
    in_two = (*sampling, "--batch=32", "--out", two)
    process = begin(*in_two, ranks=2)
    groups = kill_a_rank(process, out / f".{two.name}.parts", int(KILLED_AT * config.num / 16))
    run(*in_two, ranks=2)

    with np.load(one, allow_pickle=False) as archive:
        distinct = len({image.tobytes() for image in archive["arr_0"]})
    hashes = {path.stem: sha256(path) for path in (one, two)}
    figures = {
        "settings": asdict(config),
        "killed": f"one of two ranks, SIGKILL, when {groups} groups of 16 images were there; exit code {process.returncode}",
        "sha256": hashes,
        "identical": one.read_bytes() == two.read_bytes(),
        "distinct_images": distinct,
    }
    print(json.dumps(figures, indent=1))
    if config.json:
        evidence.store(Path(config.json), figures)
    if not figures["identical"] or distinct < config.num:
        raise ValueError(f"{one} and {two}: not the same, or {config.num - distinct} images repeat: see the figures above")


if __name__ == "__main__":
    cli.run(main)
