"""The `tokenizer` command of scripts/benchmark.py: training steps of both stages, with and without a discriminator."""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dist import Ranks
from models.storage import Description
from models.tokenizer import TOKENIZER_PRESETS, VQVAE
from scripts.benchmarks.config import BenchmarkConfig
from scripts.benchmarks.formats import Columns, gigabytes, milliseconds, optional
from scripts.benchmarks.timing import memory, wait
from scripts.train_tokenizer import ImageReconstruction, run_config
from trainer import Trainer
from utils import cli
from utils.allocator import keep_memory
from utils.checkpoint import save_model
from utils.data.batches import TrainOrder
from utils.files import written_aside
from utils.runs.tokenizer_config import TokenizerTraining, recipe

IMAGES = 16  # in the folder that is made
STAGES = {"all": False, "decoder alone (--refine)": True}

COLUMNS: Columns = {
    "stage": ("trained", str),
    "discriminator": ("discriminator", str),
    "step_seconds": ("step", milliseconds),
    "step_spread": ("spread", "{:.0%}".format),
    "peak_bytes": ("memory", optional(gigabytes, "not measured")),
}


def tokenizer(config: BenchmarkConfig) -> list[dict]:
    """Training steps of the tokenizer

    Steps of `scripts/train_tokenizer.py` by the trainer itself, on one device, with the recipe of each preset: all of the
    tokenizer, or its decoder alone, with and without the discriminator. *Step*: median of the repeats, the spread is the
    largest less the smallest over the median. *Memory*: weights, gradients, optimizer, averaged weights, networks of losses and
    what a step needs besides, all that a run takes beyond Python and its libraries. Every line has a process of its own, as on
    a CPU what one run leaves behind would hide what the next one takes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for preset in config.presets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            source, images = prepare(preset, Path(folder))
            for stage in tqdm(STAGES, disable=None):
                for critic in (False, True):
                    words = ["--data_path", str(images), "--out", folder, f"--preset={preset}", f"--bs={config.batch}"]
                    words += [f"--refine={source}"] if STAGES[stage] else []
                    words += ["--gan_from=0", "--gan_ramp=0"] if critic else ["--gan=0"]
                    fp16 = {"float32": 0, "float16": 1, "bfloat16": 2}[config.precision_on(device)]
                    flags = cli.parse(TokenizerTraining, "", [*words, f"--fp16={fp16}"], defaults=recipe)
                    figures = alone(flags, config.repeats, device)
                    kept = {"model": preset, "batch": config.batch, "precision": config.precision_on(device), "stage": stage}
                    rows.append(kept | {"discriminator": "yes" if critic else "no"} | figures)
    return rows


def prepare(preset: str, folder: Path) -> tuple[Path, Path]:
    """A new tokenizer, to be refined, and a folder of images of noise."""
    model = VQVAE(TOKENIZER_PRESETS[preset])
    model.init_weights()
    with written_aside(folder / "tokenizer") as aside:
        save_model(aside, model, Description("tokenizer"))
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / "images" / split / "noise").mkdir(parents=True)
        for n in range(IMAGES):
            pixels = noise.integers(0, 256, (*model.config.image_shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / "noise" / f"{n}.png")
    return folder / "tokenizer", folder / "images"


def alone(flags: TokenizerTraining, repeats: int, device: torch.device) -> dict:
    """`steps` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=keep_memory) as process:
        return process.submit(steps, flags, repeats, device).result()


def steps(flags: TokenizerTraining, repeats: int, device: torch.device) -> dict:
    before = memory(device, begin=True)
    trainer = Trainer(ImageReconstruction(flags, Ranks(0, 1, device)), run_config(flags), Ranks(0, 1, device))
    order = TrainOrder(IMAGES, flags.bs, flags.seed)
    batches = trainer.task.data.train_batches(order, 0, repeats + 2)
    for _ in range(2):  # kernels are chosen, and codes moved onto data
        trainer.train_step(batches)
    seconds = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        trainer.train_step(batches)
        wait(device)
        seconds.append(time.perf_counter() - start)
    trainer.check_step()
    after = memory(device, begin=False)
    return {
        "images_per_second": flags.bs / median(seconds),
        "step_seconds": median(seconds),
        "step_spread": (max(seconds) - min(seconds)) / median(seconds),
        "peak_bytes": None if before is None or after is None else after - before,
    }
