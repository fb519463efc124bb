"""The runs that a plan asks for: what each is told, where it lies, and what it has left to be read.

A run lies in a directory whose name ends in a hash of all that decides it, so that the same run in two comparisons, or in two
plans, is trained once.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import NamedTuple

from models.pyramid import Pyramid
from models.storage import read_description
from models.tokenizer import VQVAE, TokenizerConfig
from models.transformer import TransformerConfig
from utils.files import sha256
from utils.runs.checkpoints import latest_checkpoint
from utils.runs.config import TrainConfig
from utils.runs.flops import training_flops
from utils.runs.log import read_metrics
from utils.studies.plan import OF_TRAINING, Comparison, Flags, Plan, partial_steps
from utils.studies.tables import Run

operations = functools.cache(training_flops)  # a second or two for each model, of which many runs have the same
VALIDATIONS = 5  # of a run, for its curve
STEPS_BETWEEN = 100  # validations of a run whose steps are not known
UNDECISIVE = ("workers", "log_every", "peak_tflops", "scan_backend")  # flags that change nothing of what comes out
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
    so that nothing may run beside it. reference: a key of what evaluate.py scores against; empty: two judges do.
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
    reference: str = ""

    @property
    def samples(self) -> Path:
        return self.directory / f"samples-{key_of(self.drawing)}.npz"

    @property
    def scores(self) -> Path:
        beside = f"-{self.reference}" if self.reference else ""
        return self.samples.with_name(f"{self.samples.stem}{beside}.json")

    def log(self, command: str) -> Path:
        """What one of its commands prints."""
        return self.directory.with_name(f"{self.directory.name}-{command}.log")


def check_rows(plan: Plan, tokenizer: TokenizerConfig, num_classes: int) -> None:
    """ValueError where the flags of a row fit no transformer for such a tokenizer."""
    for comparison in plan.comparisons:
        for row in comparison.rows:
            flags = plan.flags_of(comparison, row)
            try:
                config = TrainConfig(**flags)
                if config.pn and Pyramid.parse(config.pn) != tokenizer.pyramid:
                    raise ValueError(f"pn = {config.pn!r}: the tokenizer has pyramid {tokenizer.pyramid}: leave it out")
                operations(config.transformer_config(tokenizer, num_classes))  # which builds it from shapes
            except ValueError as error:
                raise ValueError(f"comparison {comparison.name!r}, row {row!r}: {error}") from error


def starts_of(plan: Plan) -> set[str]:
    """What rows give as --init_from."""
    flags = [plan.flags_of(comparison, row) for comparison in plan.comparisons for row in comparison.rows]
    return {of_row["init_from"] for of_row in flags if of_row.get("init_from")}


def planned(plan: Plan, tokens: Tokens, out: Path, starts: Mapping[str, str] = MappingProxyType({})) -> list[PlannedRun]:
    """All runs of all rows, a seed of every row before the next seed; starts: a hash of the weights of each of `starts_of`."""
    drawing = ["--format=npz", f"--num={plan.samples}", *words_of(plan.sampling)]
    reference = Path(plan.reference) if plan.reference else None
    scored_by = "" if reference is None else key_of(plan.reference, sha256(reference) if reference.is_file() else "")
    runs = []
    for seed in range(plan.seeds):
        for comparison in plan.comparisons:
            for row in comparison.rows:
                flags = plan.flags_of(comparison, row)
                model = TrainConfig(**flags).transformer_config(tokens.tokenizer.config, tokens.num_classes)
                budget = budget_words(comparison, flags, model)
                words = (*words_of(flags), *budget, f"--seed={seed}", "--keep=1", "--val_samples=0")
                name = f"{flags.get('family', TrainConfig.family)}-d{model.depth}-w{model.width}-seed{seed}"
                begun = [starts[flags["init_from"]]] if flags.get("init_from") else []
                decides = [decisive(flags), budget, tokens.key, *begun]
                directory = out / "runs" / f"{name}-{key_of(*decides)}"
                alone = comparison.budget[0] == "minutes"
                how = (*drawing, f"--seed={seed}")
                runs.append(PlannedRun(comparison.name, row, seed, flags, words, how, directory, model, alone, scored_by))
    return runs


def decisive(flags: Flags) -> Flags:
    """What decides a run: flags that differ from their defaults, without those that change nothing of what comes out."""
    return {name: value for name, value in flags.items() if name not in UNDECISIVE and value != getattr(TrainConfig, name)}


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
    """Of a run that has been trained and scored. Seconds are those of its steps, at their median speed: pauses do not count.

    ValueError, with the mend, where something of it has been lost, or it was trained with other defaults than today's.
    """
    try:
        _check_trained_so(run)
        return _figures_of(run)
    except (ValueError, OSError, LookupError, TypeError) as error:
        raise ValueError(f"{run.directory}: {error}: remove it, and it is made again") from error


def _check_trained_so(run: PlannedRun) -> None:
    """Code of another day may have other defaults."""
    checkpoint = latest_checkpoint(run.directory)
    if checkpoint is None:
        raise ValueError("has no whole checkpoint")
    trained, wanted = read_description(checkpoint).training, asdict(TrainConfig(**run.flags))
    for name in sorted((trained.keys() & wanted.keys()) - {*OF_TRAINING, *UNDECISIVE}):
        if trained[name] != wanted[name]:
            raise ValueError(f"was trained with --{name}={trained[name]}, not {wanted[name]}")


def _figures_of(run: PlannedRun) -> Run:
    entries = read_metrics(run.directory)
    steps = entries[-1]["step"]
    batch = run.flags.get("bs", TrainConfig.bs)
    curve = [(entry["step"], entry["val_loss"]) for entry in entries if entry.get("val_loss") is not None]
    speed = median(entry["images_per_second"] for entry in entries if entry.get("images_per_second"))
    return {
        **told_of(run),
        "steps": steps,
        "training_flops": None if partial_steps(run.flags) else operations(run.model) * batch * steps,
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
