"""The `peer` command of scripts/benchmark.py: ours beside an unmodified checkout of FoundationVision/VAR."""

import copy
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.generate import SamplingConfig, decode_sampled, sample
from models.precision import Precision, fastest
from models.pyramid import Pyramid
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from scripts.benchmarks.config import BenchmarkConfig
from scripts.benchmarks.formats import Columns, gigabytes, optional
from scripts.benchmarks.sampling import SEED, random_models
from scripts.benchmarks.timing import timed
from utils.checkpoint import read_tensors, released_transformer
from utils.official import tokenizer_to_official

HOW = SamplingConfig()
PYRAMID = Pyramid.parse("256")
EQUAL = 1e-3  # of images in [0, 1], in float32: more is another model, less is rounding

COLUMNS: Columns = {
    "threads": ("threads", str),
    "way": ("way", str),
    "seconds": ("seconds per image", "{:.2f}".format),
    "spread": ("spread", "{:.0%}".format),
    "peak_bytes": ("memory", optional(gigabytes)),
    "same_precision": ("times as fast as VAR released, same precision", optional("{:.2f}".format)),
    "as_readme": ("as VAR released, as its README runs it", "{:.2f}".format),
    "difference": ("largest difference of images", optional("{:.1e}".format)),
}


def peer(config: BenchmarkConfig) -> list[dict]:
    """The released VAR itself

    256 px images with guidance 1.5, top-k 900, top-p 0.96, decoder included, by an unmodified checkout of FoundationVision/VAR
    in a process of its own and by ours. VAR has the same random weights, seed, precision and threads on both sides; the
    released one in half precision is under autocast, as its notebook for sampling has it. Ours in half precision has its
    weights cast once and its head, scan and sampling in float32. M-VAR has other weights and no released counterpart that
    runs without a GPU: it stands beside VAR.

    Medians of repeats in which all ways take turns; the spread is the largest less the smallest over the median. *Memory* is
    the most that a call needs beyond what was there before. *Difference*: of VAR's images in [0, 1] from those of the released
    one in float32; where one token is another the images part.
    """
    if not (Path(config.checkout) / "models" / "var.py").exists():
        raise ValueError(f"--checkout={config.checkout}: no checkout of FoundationVision/VAR is there: give its directory")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for depth in config.depths:
        with tempfile.TemporaryDirectory() as folder:
            ways = start(config, depth, Path(folder), device)
            for threads, batch in tqdm(
                list(itertools.product(config.numbers("threads"), config.numbers("batches"))), disable=None
            ):
                for row in compare(ways, batch, threads, config.repeats, Path(folder)):
                    rows.append({"model": f"d{depth}", "batch": batch, "threads": threads} | row)
            ways[0].stop()
    return rows


@dataclass
class Released:
    """The process of the checkout."""

    process: subprocess.Popen
    title: str = "VAR, released"
    precisions: tuple[str, ...] = ("float32", "bfloat16")

    def ask(self, request: dict) -> dict:
        """Its answer; with an empty request the first thing that it says. ValueError where it has ended."""
        if request:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the checkout's process ended with exit code {self.process.wait()}: see its message above")
        return json.loads(line)

    def run(self, precision: str, batch: int, threads: int, images: Path | None) -> tuple[float, int | None]:
        how = {"cfg": HOW.guidance_scale, "top_k": HOW.top_k, "top_p": HOW.top_p, "seed": SEED}
        request = {"precision": precision, "labels": labels_of(batch), "threads": threads, "images": str(images or ""), **how}
        reply = self.ask(request)
        return reply["seconds"], reply["peak_bytes"]

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Ours:
    """A transformer of ours in every precision that it is measured in."""

    title: str
    models: dict[str, tuple[ScaleTransformer, VQVAE]] = field(default_factory=dict)

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(self.models)

    def run(self, precision: str, batch: int, threads: int, images: Path | None) -> tuple[float, int | None]:
        torch.set_num_threads(threads)
        transformer, tokenizer = self.models[precision]
        labels = torch.tensor(labels_of(batch), device=transformer.head.weight.device)

        def draw() -> Tensor:
            generator = torch.Generator(labels.device).manual_seed(SEED)
            return decode_sampled(tokenizer, sample(transformer, tokenizer, labels, HOW, generator))

        seconds, peak, made = timed(draw, labels.device)
        if images is not None:
            np.save(images, made.cpu().numpy())
        return seconds, peak


Way = Released | Ours


def labels_of(batch: int) -> list[int]:
    return [n * 97 % 1000 for n in range(batch)]


def start(config: BenchmarkConfig, depth: int, folder: Path, device: torch.device) -> tuple[Released, Ours, Ours]:
    """The released VAR, ours with its weights, and our M-VAR."""
    mvar, tokenizer = random_models("mvar", depth, PYRAMID, device)
    torch.save(tokenizer_to_official(tokenizer.config, tokenizer.state_dict()), folder / "vae.pth")
    script = Path(__file__).with_name("peer_released.py")
    words = [sys.executable, str(script), config.checkout, str(folder), str(depth)]
    released = Released(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    released.ask({})
    var = released_transformer(read_tensors(folder / "var.pth"), "var", folder / "var.pth").eval().requires_grad_(False)
    torch.set_num_threads(max(config.numbers("threads")))
    return released, in_precisions("VAR, ours", var.to(device), tokenizer), in_precisions("M-VAR, ours", mvar, tokenizer)


def in_precisions(title: str, transformer: ScaleTransformer, tokenizer: VQVAE) -> Ours:
    """In float32, in bfloat16, and in what sample.py would choose where that is neither."""
    ours = Ours(title)
    for precision in dict.fromkeys(map(str, (Precision(), Precision("bfloat16", "bfloat16"), fastest(transformer, tokenizer)))):
        models = copy.deepcopy(transformer), copy.deepcopy(tokenizer)
        Precision.parse(precision).apply_(*models)
        ours.models[precision] = models
    return ours


def compare(ways: tuple[Way, ...], batch: int, threads: int, repeats: int, folder: Path) -> list[dict]:
    """A row for every way and precision. ValueError where ours in float32 makes other images than the released VAR."""
    calls: dict[tuple[int, str], Callable] = {(i, name): way.run for i, way in enumerate(ways) for name in way.precisions}
    images = {}
    for (i, precision), call in calls.items():  # warms up, too
        call(precision, batch, threads, folder / "images.npy")
        images[i, precision] = np.load(folder / "images.npy", allow_pickle=False)
    differences = {key: float(np.abs(made - images[0, "float32"]).max()) for key, made in images.items() if key[0] < 2}
    if not differences[1, "float32"] <= EQUAL:
        raise ValueError(f"images of ours and of the checkout differ by {differences[1, 'float32']:.1e}: one of them is wrong")
    runs: dict[tuple[int, str], list[tuple[float, int | None]]] = {key: [] for key in calls}
    for _ in range(repeats):
        for (i, precision), call in calls.items():
            runs[i, precision].append(call(precision, batch, threads, None))
    seconds = {key: [second for second, _ in own] for key, own in runs.items()}
    medians = {key: median(times) for key, times in seconds.items()}
    return [
        {
            "way": ways[i].title,
            "precision": precision,
            "seconds": medians[i, precision] / batch,
            "spread": (max(seconds[i, precision]) - min(seconds[i, precision])) / medians[i, precision],
            "peak_bytes": max((peak for _, peak in runs[i, precision] if peak is not None), default=None),
            "same_precision": medians[0, precision] / medians[i, precision] if (0, precision) in medians else None,
            "as_readme": medians[0, "bfloat16"] / medians[i, precision],
            "difference": differences.get((i, precision)),
        }
        for i, precision in calls
    ]
