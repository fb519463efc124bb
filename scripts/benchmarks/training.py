"""The `training` command of scripts/benchmark.py: steps of the real trainer on random tokens."""

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from dist import Ranks
from models.pyramid import Pyramid
from models.tokenizer import VQVAE, TokenizerConfig
from models.transformer import ScaleTransformer
from scripts.benchmarks.config import IMAGENET_IMAGES, NUM_CLASSES, BenchmarkConfig
from scripts.benchmarks.formats import Columns, gigabytes, milliseconds, optional
from scripts.benchmarks.timing import free, wait
from train import NextScalePrediction, run_config
from trainer import Trainer
from utils.data.batches import TrainOrder
from utils.runs.config import TrainConfig

COMPILED = {0: "no", 1: "reduce-overhead", 2: "max-autotune", 3: "default"}  # by --tfast
PARTS = ("teacher_inputs", "forward", "backward", "optimizer")


COLUMNS: Columns = {
    "compiled": ("compiled", str),
    "scan_backend": ("scan", str),
    "step_seconds": ("step", milliseconds),
    "step_spread": ("spread", "{:.0%}".format),
    "mfu": ("of the peak", optional("{:.1%}".format, "not known")),
    "peak_bytes": ("memory", optional(gigabytes, "not measured")),
    "host_waits": ("waits", optional(str, "not measured")),
    **{f"{part}_seconds": (part.replace("_", " "), milliseconds) for part in PARTS},
}


def training(config: BenchmarkConfig) -> list[dict]:
    """Training steps

    Steps of `train.py` from cached tokens (random ones), by the trainer itself, on one device: data transfer, class dropout,
    teacher inputs, forward and backward pass, clipping, AdamW, averaged weights and the sums for the log.

    - *Step*: median of the repeats; the spread is the largest less the smallest over the median. *Of the peak*: the model's
      operations (three times the forward pass, what is computed twice counted once) over what the GPU could do at most.
    - *Compiled*: mode of torch.compile, `--tfast` of train.py.
    - *Waits*: operations of one step in which the host waits for the GPU, as PyTorch reports them.
    - *Teacher inputs*, *forward* (with the loss), *backward* (with the sums for the log), *optimizer* (with clipping and
      averaging): the parts of a step, measured in steps of their own in which the host waits after each, so together they take
      longer than a step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    modes = [int(mode) for mode in config.tfast.split(",")]
    for depth, family, tfast in tqdm(list(itertools.product(config.depths, config.families, modes)), disable=None):
        with tempfile.TemporaryDirectory() as run:
            rows.append(training_row(config, device, run, depth, family, tfast))
        torch.compiler.reset()
        free(device)
    return rows


def training_row(config: BenchmarkConfig, device: torch.device, run: str, depth: int, family: str, tfast: int) -> dict:
    precision = config.precision_on(device)
    flags = {"family": family, "depth": depth, "bs": config.batch, "tfast": tfast, "scan_backend": config.scan_backend}
    fp16 = {"float32": 0, "float16": 1, "bfloat16": 2}[precision]
    trainer = build_trainer(TrainConfig(fp16=fp16, seed=0, local_out_dir_path=run, **flags), config.pyramids[0], device)
    batches = trainer.task.data.train_batches()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):  # kernels are compiled and tuned
        trainer.train_step(batches)
    seconds = []
    for _ in range(config.repeats):
        wait(device)
        start = time.perf_counter()
        trainer.train_step(batches)
        wait(device)
        seconds.append(time.perf_counter() - start)
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    images_per_second = config.batch / median(seconds)
    waits = host_waits(trainer, batches) if device.type == "cuda" else None
    parts = split_steps(trainer, batches, config.repeats)
    trainer.check_step()
    return {
        "model": f"d{depth}",
        "family": family,
        "batch": config.batch,
        "precision": precision,
        "compiled": COMPILED[tfast],
        "scan_backend": trainer.task.scan_choice.backend,
        "images_per_second": images_per_second,
        "step_seconds": median(seconds),
        "step_spread": (max(seconds) - min(seconds)) / median(seconds),
        "mfu": trainer.task.mfu_of_image and trainer.task.mfu_of_image * images_per_second,
        "peak_bytes": peak_bytes,
        "host_waits": waits,
        **{f"{part}_seconds": parts[part] for part in PARTS},
    }


class RandomTokens:
    """Data for the trainer: the same batch of random tokens again and again, in a cache's format."""

    class_names = [str(number) for number in range(NUM_CLASSES)]
    size, val_size, views = IMAGENET_IMAGES, 0, 1
    mend = ""

    def __init__(self, batch: int, pyramid: Pyramid, num_codes: int):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(num_codes, (batch, pyramid.num_tokens), generator=generator).to(torch.uint16)
        self.labels = torch.randint(NUM_CLASSES, (batch,), generator=generator)

    def train_batches(self, *order: TrainOrder | int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.tokens, self.labels

    def val_batches(self, batch: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


def build_trainer(config: TrainConfig, pyramid: Pyramid, device: torch.device) -> Trainer:
    """The trainer of train.py on random tokens; of the tokenizer only the quantizer matters, so its convolutions are small."""
    tokenizer = VQVAE(TokenizerConfig(sides=pyramid.sides, channels=32, multipliers=(1,), num_blocks=1))
    tokenizer.init_weights()
    transformer = ScaleTransformer(config.transformer_config(tokenizer.config, NUM_CLASSES))
    transformer.init_weights(config.alng, config.aln, config.hd)
    data, ranks = RandomTokens(config.bs, pyramid, tokenizer.config.num_codes), Ranks(0, 1, device)
    task = NextScalePrediction(config, transformer, tokenizer, data, ranks)
    return Trainer(task, run_config(config, data.size), ranks)


def host_waits(trainer: Trainer, batches: Iterator) -> int:
    """How often the host waits for the GPU in one step, as far as PyTorch sees it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def split_steps(trainer: Trainer, batches: Iterator, repeats: int) -> dict[str, float]:
    """Median seconds of the parts of a step, with the device waited for at each border between them."""
    borders: dict[str, tuple[float, float]] = {}  # of the latest step: start and end of what is one method
    task, device = trainer.task, trainer.ranks.device

    def watched(name: str, method: Callable) -> Callable:
        def call(*arguments):
            wait(device)
            start = time.perf_counter()
            result = method(*arguments)
            wait(device)
            borders[name] = start, time.perf_counter()
            return result

        return call

    usual = task.teacher_inputs, task._token_losses, trainer._advance
    task.teacher_inputs = watched("teacher_inputs", task.teacher_inputs)
    task._token_losses = watched("forward", task._token_losses)
    trainer._advance = watched("optimizer", trainer._advance)
    steps = []
    for _ in range(repeats):
        trainer.train_step(batches)
        borders["backward"] = borders["forward"][1], borders["optimizer"][0]
        steps.append({name: end - start for name, (start, end) in borders.items()})
    task.teacher_inputs, task._token_losses, trainer._advance = usual
    return {name: median(step[name] for step in steps) for name in PARTS}
