"""The runs that a plan asks for: what each is told, where it lies, and what it has left to be read.

A run lies in a directory whose name ends in a hash of all that decides it, so that the same run in two comparisons, or in two
plans, is trained once.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from models.tokenizer import VQVAE, TokenizerConfig
from models.transformer import TransformerConfig
from utils.runs.config import TrainConfig
from utils.runs.flops import training_flops
from utils.runs.log import read_metrics
from utils.studies.plan import Comparison, Flags, Plan
from utils.studies.tables import Run

operations = functools.cache(training_flops)  # a second or two for each model, of which many runs have the same
VALIDATIONS = 5  # of a run, for its curve
STEPS_BETWEEN = 100  # validations of a run whose steps are not known
ENDLESS = 10_000_000  # steps, where minutes are the budget


def key_of(*parts: object) -> str:
    """Of plain values: another one for anything else."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


class Tokens(NamedTuple):
    """What transformers of a study are trained on: a token cache and its tokenizer, from `source`; key: of both."""

    cache: Path
    source: str
    tokenizer: VQVAE
    num_classes: int
    key: str


@dataclass(frozen=True)
class PlannedRun:
    """One run of a row.

    words: of train.py, without where it writes; drawing: of sample.py, without what it reads and writes. alone: minutes count,
    so that nothing may run beside it.
    """

    comparison: str
    row: str
    seed: int
    flags: Flags
    words: tuple[str, ...]
    drawing: tuple[str, ...]
    directory: Path
    model: TransformerConfig
    alone: bool

    @property
    def samples(self) -> Path:
        return self.directory / f"samples-{key_of(self.drawing)}.npz"

    @property
    def scores(self) -> Path:
        return self.samples.with_suffix(".json")

    def log(self, command: str) -> Path:
        """What one of its commands prints."""
        return self.directory.with_name(f"{self.directory.name}-{command}.log")


def check_rows(plan: Plan, tokenizer: TokenizerConfig, num_classes: int) -> None:
    """ValueError where the flags of a row fit no transformer for such a tokenizer."""
    for comparison in plan.comparisons:
        for row in comparison.rows:
            flags = plan.flags_of(comparison, row)
            try:
                operations(TrainConfig(**flags).transformer_config(tokenizer, num_classes))  # which builds it from shapes
            except ValueError as error:
                raise ValueError(f"comparison {comparison.name!r}, row {row!r}: {error}") from error


def planned(plan: Plan, tokens: Tokens, out: Path) -> list[PlannedRun]:
    """All runs of all rows, a seed of every row before the next seed."""
    drawing = ["--format=npz", f"--num={plan.samples}", *words_of(plan.sampling)]
    runs = []
    for seed in range(plan.seeds):
        for comparison in plan.comparisons:
            for row in comparison.rows:
                flags = plan.flags_of(comparison, row)
                model = TrainConfig(**flags).transformer_config(tokens.tokenizer.config, tokens.num_classes)
                budget = budget_words(comparison, flags, model)
                words = (*words_of(flags), *budget, f"--seed={seed}", "--keep=1", "--val_samples=0")
                name = f"{flags.get('family', TrainConfig.family)}-d{model.depth}-w{model.width}-seed{seed}"
                directory = out / "runs" / f"{name}-{key_of(decisive(flags), budget, tokens.key)}"
                alone = comparison.budget[0] == "minutes"
                how = (*drawing, f"--seed={seed}")
                runs.append(PlannedRun(comparison.name, row, seed, flags, words, how, directory, model, alone))
    return runs


def decisive(flags: Flags) -> Flags:
    """What decides a run: flags that differ from their defaults, without those that change nothing of what comes out."""
    return {
        name: value
        for name, value in flags.items()
        if name not in ("workers", "log_every") and value != getattr(TrainConfig, name)
    }


def words_of(flags: Flags) -> list[str]:
    """{"depth": 6, "alng_all": True} -> --depth=6 --alng_all=1"""
    return [f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in flags.items()]


def budget_words(comparison: Comparison, flags: Flags, model: TransformerConfig) -> list[str]:
    """How long a row is trained."""
    kind, amount = comparison.budget
    if kind == "minutes":
        return [
            f"--max_minutes={amount}",
            f"--max_steps={ENDLESS}",
            f"--val_every={STEPS_BETWEEN}",
            f"--save_every={STEPS_BETWEEN}",
        ]
    steps = int(amount)
    if kind == "teraflops":
        batch = flags.get("bs", TrainConfig.bs)
        steps = max(round(amount * 1e12 / (operations(model) * batch)), 1)
    every = max(steps // VALIDATIONS, 1)
    return [f"--max_steps={steps}", f"--val_every={every}", f"--save_every={every}"]


def figures_of(run: PlannedRun) -> Run:
    """Of a run that has been trained and scored. Seconds are those of its steps, at their median speed: pauses do not count."""
    entries = read_metrics(run.directory)
    steps = entries[-1]["step"]
    batch = run.flags.get("bs", TrainConfig.bs)
    curve = [(entry["step"], entry["val_loss"]) for entry in entries if entry.get("val_loss") is not None]
    speed = median(entry["images_per_second"] for entry in entries if entry.get("images_per_second"))
    return {
        **told_of(run),
        "steps": steps,
        "training_flops": operations(run.model) * batch * steps,
        "val_loss": curve[-1][1],
        **json.loads(run.scores.read_text()),
        "images_per_second": speed,
        "memory_gb": max(entry.get("memory_gb", 0.0) for entry in entries),
        "seconds": steps * batch / speed,
        "curve": curve,
    }


def told_of(run: PlannedRun) -> Run:
    """What is known of a run before it is there."""
    command = " ".join(["train.py", *run.words])
    return {"comparison": run.comparison, "row": run.row, "seed": run.seed, "flags": run.flags, "command": command}
