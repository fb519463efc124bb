"""What is trained, as the loop (trainer.py) sees it: what a task is asked for, and what it and the loop share."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.storage import Description
from utils.data.sources import Data
from utils.runs.state import Part, TrainState
from utils.signals import StopRequest

PRECISION_NAMES = {0: "float32", 1: "float16", 2: "bfloat16"}  # by --fp16
AUTOCAST_DTYPES = {1: torch.float16, 2: torch.bfloat16}  # by --fp16
ALL_RANKS = 1 << 31  # in the place of a rank, for random numbers that all ranks draw alike


@dataclass(frozen=True)
class RunConfig:
    """What the loop is told of a run, whatever is trained.

    directory: of the run. seed, batch (images per step, over all ranks), micro_batches (per step and rank), workers: of its
    data. total_steps: its length, but for max_minutes, 0: no limit; schedule_steps: after so many steps its schedules have run
    through. val_every, save_every, log_every: in steps; keep: checkpoints. ema: decay of the averaged weights, 0: none. fp16: 0
    float32, 1 float16 with loss scaling, which ends the run after max_bad_steps in a row that are not finite, 2 bfloat16.
    sharded: parts of the models lie on all ranks (FSDP). rate_flag: the flag to be lowered where training diverges. best: the
    figure of validations by which a checkpoint is kept beside the newest, "" for none.
    """

    directory: Path
    seed: int
    batch: int
    micro_batches: int
    total_steps: int
    schedule_steps: int
    max_minutes: float
    val_every: int
    save_every: int
    log_every: int
    keep: int
    ema: float
    fp16: int
    max_bad_steps: int
    sharded: bool
    rate_flag: str
    best: str = ""


class StepResult(NamedTuple):
    """What a step of a task leaves; nothing in it is synchronised between ranks yet, and no value has been looked at."""

    loss: Tensor  # () not finite where any loss of the step is not
    outcome: Any  # the task's own: what `figures` and `explain` read
    rates: dict[str, float]  # learning rate and the like, for the log


class Evaluation(NamedTuple):
    """What a validation found out."""

    figures: dict[str, float | dict[str, float]]  # for the log, names begin with val_
    by_class: tuple[list[float], list[float]] | None = None  # loss and accuracy
    pictures: dict[str, Image.Image] | None = None  # on the main rank


class Task:
    """What is trained: override `step`, `figures` and `evaluate`, and inherit the loop.

    flags: the command's configuration, a dataclass, kept with the run. parts: the models with their optimizers, one of them
    called MODEL (utils/runs/state.py), which has a `config`. title, details: what the log calls it. drawn_by_rank: what each
    rank draws for itself. schedule: flags that decide what a step of the run does. higher_is_better: figures of its validations
    of which that is true. may_start_anew: sections of a checkpoint that it need not have, such as a part that is new.
    """

    flags: Any
    parts: dict[str, Part]
    data: Data
    title: str
    details: str
    drawn_by_rank: str
    schedule: tuple[str, ...]
    higher_is_better: tuple[str, ...] = ()
    may_start_anew: tuple[str, ...] = ()

    def step(self, state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], progress: float) -> StepResult:
        """Take the micro-batches of a step and leave gradients in the parts; progress: the passed share of the run, 0 to 1."""
        raise NotImplementedError

    def figures(self, result: StepResult) -> dict[str, float | dict[str, float]]:
        """Figures of a step for the log, over all ranks, which call it together."""
        raise NotImplementedError

    def remarks(self, step: int, figures: dict[str, float | dict[str, float]]) -> list[str]:
        """Lines for the log about the figures of a step, which has just been logged."""
        return []

    def evaluate(self, state: TrainState, stop: StopRequest | None = None) -> Evaluation | None:
        """On held-out images, all ranks together; None where a stop was requested meanwhile."""
        raise NotImplementedError

    def explain(self, result: StepResult) -> str:
        """Where a step that is not finite went wrong; all ranks call it together."""
        return "loss or gradient is not finite"

    def utilisation(self, result: StepResult, images_per_second: float) -> float | None:
        """The share of what the devices can do at most, 0 to 1; None where it is not known."""
        return None

    def description(self) -> Description:
        """What stands in config.json beside the model's own configuration."""
        raise NotImplementedError

    def circumstances(self) -> dict:
        """What else the meaning of a checkpoint depends on, see `Trainer.circumstances`."""
        return {}

    def check_resumable(self, checkpoint: Path) -> None:
        """ValueError where a checkpoint is of another model or of other data."""

    def notes(self) -> list[str]:
        """Lines for the log when training begins; all ranks call it together."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """Further tensors that advance, "SECTION.NAME"."""
        return {}

    def numbers(self) -> dict:
        """Further numbers that advance, for JSON; all ranks call it together."""
        return {}

    def set_numbers(self, numbers: dict) -> None:
        """Those of a checkpoint, which may lack them."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """What the random numbers of one step start from, on one rank or on ALL_RANKS."""
    # Differs from VAR: generators are seeded at every step, not once, so that a resumed run draws the same numbers.
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint32)[0])


def autocast(device: torch.device, fp16: int) -> torch.autocast:
    """The precision of a forward pass, by --fp16."""
    dtype = AUTOCAST_DTYPES.get(fp16)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
