"""Kill a training run at random moments, again and again, and compare its end with that of a run that nobody killed.

A small M-VAR trains on the embedded images, saving after every step, once in peace and once in trouble: SIGKILL, SIGTERM and
SIGINT to one process, SIGKILL to one of two ranks or to all of them with torchrun, the model replicated or sharded, at moments
drawn at random, some of them in the middle of writing a checkpoint. A signal to stop may cost no step, a kill the one or two
that were not saved yet. In the end weights, averaged weights, optimizer state and figures must be the same, bit for bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

from models.tokenizer import TOKENIZER_PRESETS, VQVAE
from utils import cli, evidence, processes
from utils.checkpoint import Description, save_model
from utils.cli import flag
from utils.data.fashion_mnist import export_fashion_mnist
from utils.files import written_aside
from utils.runs.checkpoints import checkpoints, latest_checkpoint, step_of
from utils.runs.log import read_entries, read_repeatable_metrics
from utils.runs.saving import read_numbers

LONGEST_WAIT = 4.0  # seconds of training before a kill
KEEP = 2


@dataclass(frozen=True)
class SoakConfig:
    """Flags of scripts/checks/soak.py."""

    out: str = flag("out/soak", "directory for the runs; what an earlier soak left there is removed")
    kills: int = flag(50, "kills in all: half of them to one process, a quarter each to two ranks, replicated and sharded")
    steps: int = flag(500, "steps of each run")
    seed: int = flag(0, "of the moments and signals")
    json: str = flag("", "file for the figures, empty: none")

    def __post_init__(self):
        if self.kills < 4 or self.steps < 1:
            raise ValueError(f"--kills={self.kills}, --steps={self.steps}: give at least 4 kills and 1 step")


def prepare(out: Path) -> list[str]:
    """Tokens of some embedded images by a tokenizer with random weights; returns the flags of the training run."""
    export_fashion_mnist(out / "images")
    for folder in (out / "images").glob("*/*"):
        for file in sorted(folder.iterdir())[20:]:
            file.unlink()
    torch.manual_seed(0)
    tokenizer = VQVAE(TOKENIZER_PRESETS["f8-32"])
    tokenizer.init_weights()
    with written_aside(out / "tokenizer") as directory:
        save_model(directory, tokenizer, Description("tokenizer"))
    processes.run("scripts/cache_tokens.py", "--vae", out / "tokenizer", "--data_path", out / "images", "--out", out / "tokens")
    flags = "--depth=3 --width=192 --heads=3 --bs=4 --ac=2 --drop_path=0.3 --ema=0.99 --seed=1 --tblr=4e-3 --log_every=1"
    return [*flags.split(), "--save_every=1", "--val_every=100", f"--keep={KEEP}", "--token_cache", str(out / "tokens")]


def train(flags: list[str], run: Path, ranks: int, output: Path) -> subprocess.Popen:
    return processes.begin("train.py", *flags, "--local_out_dir_path", run, ranks=ranks, output=output)


def wait_until_it_trains(process: subprocess.Popen, output: Path) -> None:
    while process.poll() is None and "parameters, pyramid" not in output.read_text():
        time.sleep(0.01)


def trouble(flags: list[str], run: Path, ranks: int, kills: int, most_lost: int, draw: random.Random) -> dict[str, int]:
    """Start the run and kill it, `kills` times; ValueError where a kill costs more than `most_lost` steps."""
    counts = {"kills": 0, "while_saving": 0, "steps_lost": 0}
    saved = 0
    output = run.with_suffix(".output")
    while counts["kills"] < kills:
        process = train(flags, run, ranks, output)
        wait_until_it_trains(process, output)
        time.sleep(draw.uniform(0, LONGEST_WAIT))
        if process.poll() is not None:
            if process.returncode != 0:
                raise ValueError(f"the run ended with code {process.returncode} by itself: see {output}")
            raise ValueError(f"the run ended before {kills} kills: give more than --steps")
        victims = [process.pid]
        number = signal.SIGKILL
        if ranks == 1:
            number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        else:
            workers = processes.children(process.pid)
            victims = [draw.choice(workers)] if draw.random() < 0.5 else [process.pid, *workers]
        counts["while_saving"] += any((run / "checkpoints").glob(".step_*.writing"))
        for victim in victims:
            os.kill(victim, number)
        process.wait(120)
        reached = len(logged_steps(run))
        counts["kills"] += 1
        name = f"{signal.Signals(number).name} to {'one of two ranks' if len(victims) < ranks else 'all'}"
        counts[name] = counts.get(name, 0) + 1
        newest = latest_checkpoint(run)
        step = 0 if newest is None else step_of(newest)
        lost = max(reached - step, 0)
        allowed = most_lost if number == signal.SIGKILL else 0
        if step < saved or lost > allowed or len(checkpoints(run)) > KEEP + 1:
            raise ValueError(f"{name}: step {step} is saved, was {saved}, reached {reached}; checkpoints {checkpoints(run)}")
        if number != signal.SIGKILL and process.returncode != 128 + number:
            raise ValueError(f"{name}: exit code {process.returncode}")
        counts["steps_lost"] += lost
        saved = step
        print(f"{ranks} rank(s), kill {counts['kills']}/{kills} by {name}: saved up to step {saved}", flush=True)
    return counts


def logged_steps(run: Path) -> list[int]:
    """The steps whose figures stand in the log: one a step."""
    return [entry["step"] for entry in read_entries(run / "metrics.jsonl") if "grad_norm" in entry]


def finish(flags: list[str], run: Path, ranks: int) -> None:
    output = run.with_suffix(".output")
    if train(flags, run, ranks, output).wait() != 0:
        raise ValueError(f"the run could not be finished: see {output}")


def same(run: Path, other: Path) -> bool:
    """Whether all saved tensors and all logged figures are the same."""
    ends = [checkpoints(path)[-1] for path in (run, other)]
    # tensors, not files: shards hold theirs in the order in which they were written
    tensors = [
        {(file.name, name): tensor for file in sorted(end.rglob("*.safetensors")) for name, tensor in load_file(file).items()}
        for end in ends
    ]
    same_tensors = tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    numbers = [read_numbers(end) | {"seconds": 0.0} for end in ends]
    logs = [read_repeatable_metrics(path) for path in (run, other)]
    return same_tensors and numbers[0] == numbers[1] and logs[0] == logs[1]


def main() -> None:
    config = cli.parse(SoakConfig, __doc__)
    out = Path(config.out)
    begun = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    flags = [*prepare(out), f"--max_steps={config.steps}"]
    draw = random.Random(config.seed)
    results = {}
    quarter = config.kills // 4
    for name, ranks, parallel, kills, most_lost in (
        ("one_rank", 1, "ddp", config.kills - 2 * quarter, 1),
        ("two_ranks", 2, "ddp", quarter, 1),
        ("two_sharded_ranks", 2, "fsdp", quarter, 2),  # the one before is being written while a step is computed
    ):
        peaceful, troubled = out / f"{name}_in_peace", out / f"{name}_in_trouble"
        words = [*flags, f"--parallel={parallel}"]
        finish(words, peaceful, ranks)
        counts = trouble(words, troubled, ranks, kills, most_lost, draw)
        finish(words, troubled, ranks)
        results[name] = counts | {"same_end": same(peaceful, troubled)}
    figures = {
        "settings": asdict(config),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "results": results,
    }
    print(json.dumps(figures, indent=1))
    if config.json:
        evidence.store(Path(config.json), figures)
    if not all(result["same_end"] for result in results.values()):
        raise ValueError(f"a killed run did not end as the one in peace: compare the runs in {out}")


if __name__ == "__main__":
    cli.run(main)
