"""What the measurements of scripts/benchmark.py are told on the command line, and the numbers that several of them take."""

from dataclasses import dataclass, fields

import torch

from models.families import FAMILIES
from models.pyramid import Pyramid
from models.scan_backends import SCAN_BACKENDS
from models.tokenizer import TOKENIZER_PRESETS
from utils.cli import argument, check_idle, flag

PIXELS, NUM_CLASSES = 256, 1000
IMAGENET_IMAGES = 1_281_167
BATCHES_PER_REPEAT = 20  # of the command `tokens`
# What all commands take where a flag is not given, and what some take in its place.
COMMON = {"family": "mvar,var,markov", "depth": "12", "batch": 1, "pn": "256", "rows": 1 << 17}
DEFAULTS: dict[str, dict] = {
    "tokens": {"batch": 768},
    "listing": {"rows": IMAGENET_IMAGES},
    "memory": {"depth": "12,16,20,24,30,32"},
    "sampling": {"batch": 4},
    "peer": {"depth": "12,16"},
    "profile": {"family": "mvar,var"},
    "tokenizer": {"batch": 16},
    "training": {"batch": 16},
    "check_data": {"rows": 2000},
    "scan": {"depth": "12,16,24", "batch": 8, "pn": "256,512"},
    "table": {
        "family": ",".join(("var", *(family for family in FAMILIES if family != "var"))),
        "depth": "16,20,24",
        "batch": 32,
    },
}
# What each command reads, beside --json and --overwrite.
FLAGS: dict[str, tuple[str, ...]] = {
    "tokens": ("batch", "rows", "repeats"),
    "listing": ("rows", "workers"),
    "memory": ("family", "depth", "real"),
    "sampling": ("family", "depth", "pn", "precision", "batch", "repeats"),
    "peer": ("depth", "batches", "threads", "checkout", "repeats"),
    "profile": ("family", "depth", "precision", "batch", "repeats"),
    "tokenizer": ("precision", "batch", "presets", "repeats"),
    "training": ("family", "depth", "pn", "tfast", "precision", "scan_backend", "batch", "repeats"),
    "scan": ("depth", "pn", "batch", "repeats"),
    "attention": ("sides", "heads", "batch", "repeats"),
    "length": ("batch", "repeats"),
    "table": ("family", "depth", "pn", "precision", "batch", "repeats"),
    "check_data": ("rows", "processes", "repeats"),
}


def readers(name: str) -> str:
    """The commands that read a flag, for its help."""
    return ", ".join(command for command, names in FLAGS.items() if name in names)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Arguments of scripts/benchmark.py, which knows the commands."""

    command: str = argument("what is measured")
    family: str | None = flag(None, f"{readers('family')}: kinds of transformer, of {', '.join(FAMILIES)}")
    depth: str | None = flag(None, f"{readers('depth')}: depths, comma-separated")
    pn: str | None = flag(None, f"{readers('pn')}: pyramids, as in train.py, comma-separated", "--pixels")
    tfast: str = flag("0,3", "training: modes of compilation, as in train.py, comma-separated")
    precision: str = flag(
        "",
        f"{readers('precision')}; empty: bfloat16 on GPUs, else float32",
        choices=("", "float32", "float16", "bfloat16"),
    )
    scan_backend: str = flag("auto", "training: as in train.py", choices=SCAN_BACKENDS)
    real: bool = flag(False, "memory: compute on this machine, which takes the memory and the time, instead of imitating a GPU")
    sides: str = flag("13,16,18,24,32,48,64", "attention: sides of maps, comma-separated")
    heads: str = flag("4,12", "attention: numbers of heads, comma-separated")
    batch: int | None = flag(None, f"{readers('batch')}: images per batch")
    batches: str = flag("1,4", "peer: images per batch, comma-separated")
    threads: str = flag("1,2", "peer: numbers of threads, comma-separated")
    presets: str = flag("f8-32", "tokenizer: presets, comma-separated")
    checkout: str = flag("", "peer: directory of a checkout of FoundationVision/VAR")
    rows: int | None = flag(
        None, "images that are made for it; tokens: in the cache, listing: in the folder, check_data: JPEG files"
    )
    workers: int = flag(10, "listing: processes that the names are shared with")
    processes: str = flag("1,2", "check_data: numbers of processes, comma-separated")
    repeats: int = flag(7, f"{readers('repeats')}: the median of so many measurements, tokens: of {BATCHES_PER_REPEAT} batches")
    json: str = flag("", "file to store the figures in, with command, machine, versions and commit")
    overwrite: bool = flag(False, "replace what is at --json")

    def __post_init__(self):
        read = {*FLAGS.get(self.command, ()), "command", "json", "overwrite"}
        others = [field.name for field in fields(BenchmarkConfig) if field.name not in read]
        check_idle(self, others, f"{self.command} does not read it: leave it out")
        for name, value in (COMMON | DEFAULTS.get(self.command, {})).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        unknown = sorted(set(self.families) - set(FAMILIES))
        if unknown:
            raise ValueError(f"--family={self.family}: no {', '.join(unknown)}: give some of {','.join(FAMILIES)}")
        if not all(depth.isdigit() and int(depth) > 0 for depth in self.depth.split(",")):
            raise ValueError(f"--depth={self.depth}: give numbers of blocks such as 12,16")
        for name in ("sides", "heads", "batches", "threads", "processes"):
            if not all(number.isdigit() and int(number) > 0 for number in getattr(self, name).split(",")):
                raise ValueError(f"--{name}={getattr(self, name)}: give numbers such as {getattr(BenchmarkConfig, name)}")
        if unknown := sorted(set(self.presets.split(",")) - set(TOKENIZER_PRESETS)):
            raise ValueError(f"--presets={self.presets}: no {', '.join(unknown)}: give some of {','.join(TOKENIZER_PRESETS)}")
        for name in ("batch", "rows", "repeats", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: give at least 1")
        if not set(self.tfast.split(",")) <= set("0123"):
            raise ValueError(f"--tfast={self.tfast}: give some of 0,1,2,3")
        if self.command in ("training", "table") and len(self.pyramids) > 1:
            raise ValueError(f"--pn={self.pn}: {self.command} takes one pyramid")

    @property
    def families(self) -> list[str]:
        return self.family.split(",")

    @property
    def depths(self) -> list[int]:
        return self.numbers("depth")

    def precision_on(self, device: torch.device) -> str:
        """That of --precision, or what suits the device."""
        return self.precision or ("bfloat16" if device.type == "cuda" else "float32")

    def numbers(self, name: str) -> list[int]:
        return [int(number) for number in getattr(self, name).split(",")]

    @property
    def pyramids(self) -> list[Pyramid]:
        return [Pyramid.parse(text) for text in self.pn.split(",")]
