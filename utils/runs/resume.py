"""What a run takes up again: the checkpoint that all ranks agree on, whether it fits, and the seed."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from dist import Ranks
from models.storage import read_config, read_description, read_json
from models.transformer import ScaleTransformer
from utils.runs.checkpoints import checkpoint_path, choose_intact, latest_checkpoint, step_of
from utils.runs.config import TrainConfig
from utils.runs.state import TrainState


def agreed_checkpoint(run: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint of a run, the same on all ranks, and on the main rank what is to be told about others."""
    step, notes = -1, []
    if ranks.is_main:
        checkpoint, notes = choose_intact(run)
        step = -1 if checkpoint is None else step_of(checkpoint)
    step = int(ranks.from_main(step))
    return (None if step < 0 else checkpoint_path(run, step)), notes


def check_same_parts(checkpoint: Path, config: TrainConfig) -> None:
    """ValueError where a run trains other parts than before: what it has trained so far would be lost, or scaled anew."""
    before, now = _trained_parts(read_description(checkpoint).training), _trained_parts(asdict(config))
    for name, value in before.items():
        if now[name] != value:
            raise ValueError(
                f"{checkpoint}: the run has --{name}={value}, not {now[name] or 'none'}: resume with that, "
                "or another --local_out_dir_path"
            )


def _trained_parts(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that say what is trained, in one form; of a run of earlier code those that it did not have are off."""
    rank = flags.get("lora", 0)
    names = {name: sorted(map(str.strip, flags.get(name, "").split(","))) for name in ("train_only", "lora_parts")}
    parts = {name: ",".join(several) for name, several in names.items()}
    return {"lora": rank, "lora_alpha": float(flags.get("lora_alpha", 0.0) or rank), **parts}


def check_same_transformer(checkpoint: Path, transformer: ScaleTransformer) -> None:
    """ValueError unless the checkpoint holds a transformer of this shape."""
    saved = read_config(checkpoint, ScaleTransformer)
    for field in fields(saved):
        ours, theirs = getattr(transformer.config, field.name), getattr(saved, field.name)
        if ours != theirs and field.name != "drop_path":
            raise ValueError(
                f"{checkpoint}: a run with {field.name} {_short(theirs)} is there, this command asks for {_short(ours)}: "
                f"use its flags to resume, or another --local_out_dir_path"
            )


def _short(value: object) -> str:
    """A readable form of a field: ('mvar', 'mvar') -> 2 x mvar."""
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return " + ".join(f"{value.count(kind)} x {kind}" for kind in dict.fromkeys(value))
    return str(value)


def take_up_best_(state: TrainState, name: str, run: Path, ranks: Ranks) -> list[str]:
    """Go on with the best checkpoint so far, or begin anew where that is by another figure than `name`, or gone.

    Returns what is to be told.
    """
    if not name or state.best is None:
        return []
    if state.best_figure not in ("", name):  # earlier code did not note it
        reason = f"the run so far kept the best checkpoint by {state.best_figure}"
    elif ranks.largest(int(not checkpoint_path(run, state.best_step).is_dir())):
        reason = f"the best checkpoint so far, step_{state.best_step}, is gone"
    else:
        state.best_figure = name
        return []
    state.best, state.best_step, state.best_figure = None, 0, name
    return [f"{reason}: from the next validation on it is the best by {name} from there on"]


def chosen_seed(seed: int | None, run: Path, ranks: Ranks) -> int:
    """The seed that is given, that of the run being resumed, or a fresh one, the same on all ranks.

    ValueError where the run does not say its own.
    """
    if seed is not None:
        return seed
    seed = int(np.random.SeedSequence().entropy % 2**31)
    saved = run / "config.json"
    if ranks.is_main and saved.exists() and latest_checkpoint(run):
        try:
            seed = int(read_json(saved)["training"]["seed"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{saved}: does not say the seed of the run in {run}: restore the file, or give --seed") from error
    return int(ranks.from_main(seed))


def changes(before: dict, now: dict, drawn: str) -> list[str]:
    """What is to be told about a run that goes on under other circumstances; both as the trainer's `circumstances`.

    drawn: what each rank draws for itself.
    Of what earlier code did not note nothing is told.
    """
    before = now | before
    notes = []
    for name, title in (("seed", "seed"), ("batch", "batch size"), ("images", "number of images")):
        if before[name] != now[name]:
            notes.append(f"the run so far had {title} {before[name]}, now {now[name]}: from here on other batches")
    if before["ranks"] != now["ranks"]:
        same = "" if notes else "same batches, "
        notes.append(f"the run so far had {before['ranks']} rank(s), now {now['ranks']}: {same}other draws of {drawn}")
    changed = [
        f"--{name}={before['schedule'][name]} (now {value})"
        for name, value in now["schedule"].items()
        if before["schedule"].get(name, value) != value
    ]
    if changed:
        notes.append(f"the run so far had {', '.join(changed)}: from here on its schedule is that of the new flags")
    return notes
