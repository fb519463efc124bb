"""Train the tokenizer many times, each time otherwise, and measure all alike: which loss and which means are worth it.

    python scripts/checks/ablate_tokenizer.py --out out/ablation --json results/tokenizer_ablation.json

Every run is scripts/train_tokenizer.py with the flags of its row, for as many steps and with one thread, so that figures but
for images per second do not depend on what else the machine does. The JSON grows by a run at a time, and a second call goes on
where the first was stopped; --rows and --seeds choose a part. With --transformer_steps an M-VAR is trained on the tokens of the
rows in SAMPLED, because a tokenizer's own distance predicts that of samples badly.
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from models.tokenizer import TOKENIZER_PRESETS
from utils import cli, evidence
from utils.checkpoint import load_tokenizer
from utils.cli import flag
from utils.data.fashion_mnist import export_fashion_mnist
from utils.evidence import over_seeds
from utils.metrics.judges import Judges, decoded
from utils.metrics.similarity import psnr, ssim
from utils.processes import run
from utils.runs.log import read_metrics
from utils.runs.tokenizer_config import TokenizerTraining

SHIPPED = "as shipped"
ROWS: dict[str, list[str]] = {
    SHIPPED: [],
    "no discriminator": ["--gan=0"],
    "no discriminator, betas 0.5 and 0.9": ["--gan=0", "--adam_beta1=0.5", "--adam_beta2=0.9"],
    "no absolute error": ["--l1=0"],
    "no squared error": ["--l2=0", "--l1=1"],
    "adversarial weight adaptive and late": ["--gan=0.5", "--gan_adaptive", "--gan_from=0.3"],
    "DiffAugment": ["--diffaug"],
    "LeCAM": ["--lecam=0.001"],
    "EfficientNet discriminator (biased)": ["--gan_features=efflite0", "--gan=0.003"],
    "perceptual": ["--perceptual=0.25"],
    "perceptual with logits": ["--perceptual=0.25", "--perceptual_logits=0.01"],
    "no restarts": ["--restart_every=0"],
    "cosine lookup": ["--cosine"],
    "cosine lookup and perturbation": ["--cosine", "--perturbation=0.1"],
    "cosine lookup and matching": ["--cosine", "--matching=0.1"],
    "scale dropout": ["--scale_dropout=0.1"],
    "matching": ["--matching=0.1"],
    "perturbation": ["--perturbation=0.1"],
    "averaged weights": ["--ema=0.998"],
}
REFINED = "second stage"  # half the steps without a discriminator, then the decoder alone with one, as the demo does it
SAMPLED = (SHIPPED, "no discriminator", "perturbation", "scale dropout", REFINED)
DECODED = 1000  # training images that are decoded and compared with the held-out ones


@dataclass(frozen=True)
class Ablation:
    """Flags of scripts/checks/ablate_tokenizer.py."""

    json: str = flag("results/tokenizer_ablation.json", "what was measured, a list of runs; grows")
    out: str = flag("out/ablation", "directory of the runs")
    data_path: str = flag("", "directory with train/ and val/; empty: the embedded images")
    preset: str = flag("f8-32", "sizes of the tokenizer")
    steps: int = flag(1000, "steps of each run")
    bs: int = flag(16, "images per step")
    fp16: int = flag(0, "precision of all training: 0, 1 or 2, as in train.py")
    seeds: int = flag(3, "runs of each row, with seeds 0, 1, ...")
    rows: str = flag("", "names of rows, separated by commas; empty: all")
    score: str = flag("", "directory of a run: it is measured alike, with a row of its own, and nothing is trained")
    transformer_steps: int = flag(0, "steps of an M-VAR on the tokens of some rows, 0: none")


def main() -> None:
    config = cli.parse(Ablation, __doc__)
    names = [*ROWS, REFINED]
    chosen = [name.strip() for name in config.rows.split(",")] if config.rows else names
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(f"--rows={unknown[0]}: no such row: give some of {', '.join(names)}")
    out, stored = Path(config.out), evidence.GrowingRuns(Path(config.json), COLUMNS)
    images = Path(config.data_path or out / "images")
    if not config.data_path and not images.exists():
        export_fashion_mnist(images)
    judges = None
    if config.score:
        judges = Judges(images, TOKENIZER_PRESETS[config.preset].image_shape[0], DECODED)
        figures = {
            "row": Path(config.score).name,
            "settings": settings_of(Path(config.score)),
            **of_run(judges, Path(config.score)),
        }
        stored.add(figures, data=config.data_path or "embedded images", real=of_real(judges))
        return
    for seed in range(config.seeds):
        for name in chosen:
            if stored.has(row=name, seed=seed, steps=config.steps):
                continue
            if judges is None:
                judges = Judges(images, TOKENIZER_PRESETS[config.preset].image_shape[0], DECODED)
                real = of_real(judges)
            directory = out / f"{name.replace(' ', '_')}_{seed}"
            train(config, name, seed, images, directory)
            figures = of_run(judges, directory)
            if config.transformer_steps and name in SAMPLED:
                figures |= of_samples(judges, *sample(config, seed, images, directory))
            figures = {"row": name, "seed": seed, "steps": config.steps, **figures}
            stored.add(figures, data=config.data_path or "embedded images", real=real)


def train(config: Ablation, name: str, seed: int, images: Path, directory: Path) -> None:
    common = ["--data_path", images, f"--preset={config.preset}", "--resize=1", f"--bs={config.bs}", f"--seed={seed}"]
    common += ["--log_every=50", f"--save_every={config.steps}", f"--fp16={config.fp16}"]
    command = ["scripts/train_tokenizer.py", *common]
    if name != REFINED:
        run(*command, "--out", directory, f"--max_steps={config.steps}", *ROWS[name])
        return
    first = directory.with_name(f"{directory.name}_first")
    steps = config.steps // 2
    run(*command, "--out", first, f"--max_steps={steps}", "--gan=0", "--lr=1.5e-3")
    second = ("--gan=0.017", "--lr=1.5e-3")
    run(*command, "--out", directory, f"--max_steps={config.steps - steps}", "--refine", first, *second)


def sample(config: Ablation, seed: int, images: Path, directory: Path) -> tuple[Path, Path]:
    """A dump of samples of an M-VAR trained on the tokens, and the run of it."""
    tokens, transformer, samples = (directory / name for name in ("tokens", "transformer", "samples.npz"))
    words = ("--vae", directory, "--data_path", images, "--out", tokens, "--resize=1", "--center_crop")
    if not (tokens / "manifest.json").exists():
        run("scripts/cache_tokens.py", *words)
    shape = ("--depth=6", "--width=192", "--heads=3", "--bs=32", "--tblr=8e-3", "--alng=1e-2", "--wpe=0.01", "--ema=0.99")
    steps = config.transformer_steps
    budget = (f"--max_steps={steps}", f"--ep={steps}", f"--val_every={steps}", f"--save_every={steps}", f"--seed={seed}")
    budget += (f"--fp16={config.fp16}",)
    run("train.py", "--token_cache", tokens, "--local_out_dir_path", transformer, *shape, *budget)
    drawn = ("--cfg=1.5", "--top_k=0", "--top_p=0.96", "--seed=1", "--format=npz", f"--num={DECODED}", "--batch=100")
    run("sample.py", "--ckpt", transformer, "--overwrite", *drawn, "--out", samples)
    return samples, transformer


def of_run(judges: Judges, directory: Path) -> dict[str, float | list[float]]:
    """What its tokenizer is worth, after how many steps, and how fast they were."""
    return {"trained_steps": read_metrics(directory)[-1]["step"], **of_tokenizer(judges, directory), **cost(directory)}


def settings_of(directory: Path) -> dict:
    """The flags of a run, but for paths and defaults."""
    defaults = {field.name: field.default for field in fields(TokenizerTraining)}
    flags = json.loads((directory / "config.json").read_text())["training"]
    return {name: value for name, value in flags.items() if value != defaults[name] and "/" not in str(value)}


def cost(directory: Path) -> dict[str, float]:
    """Images per second, the median over the log without its start.

    No memory: what the log has of it begins, for a process that another one starts, at what that one has.
    """
    lines = [entry for entry in read_metrics(directory) if "images_per_second" in entry]
    speeds = [entry["images_per_second"] for entry in lines[len(lines) // 4 :]]
    return {"images_per_second": float(np.median(speeds))}


def of_tokenizer(judges: Judges, directory: Path) -> dict[str, float | list[float]]:
    tokenizer = load_tokenizer(directory)
    train, _ = decoded(tokenizer, judges.train[judges.chosen])
    held_out, counts = decoded(tokenizer, judges.val)
    pair = torch.from_numpy(judges.val), torch.from_numpy(held_out)
    usage = counts.by_scale()
    return {
        "psnr": float(psnr(*pair).mean()),
        "ssim": float(ssim(*pair).mean()),
        **judges.scores(train, judges.train_labels[judges.chosen]),
        "edges": edges(held_out) / edges(judges.val),
        "codes_used": [scale.used for scale in usage],
        "perplexity": [scale.perplexity for scale in usage],
        "codes_used_in_all": counts.of_all().used,
    }


def of_samples(judges: Judges, samples: Path, transformer: Path) -> dict[str, float]:
    scores = {f"samples_{name}": value for name, value in judges.scores_of(samples).items()}
    return {"val_loss": read_metrics(transformer)[-1]["val_loss"], **scores}


def of_real(judges: Judges) -> dict[str, float]:
    """The same of training images as they are, and of the classifier on held-out ones."""
    distances = judges.distances(judges.train[judges.chosen])
    recognised = judges.classifier.accuracy(judges.val, judges.val_labels)
    return {"fd": distances["efflite0"], "fd_classifier": distances["classifier"], "recognised": recognised}


def edges(images: np.ndarray) -> float:
    """Mean square of the differences between neighbouring pixels."""
    values = images.astype(np.float64)
    return sum(float(np.square(np.diff(values, axis=axis)).mean()) for axis in (1, 2))


def mean_codes(runs: list[dict]) -> str:
    return f"{np.mean([run['codes_used_in_all'] for run in runs]):.0f}"


def mean_perplexities(runs: list[dict]) -> str:
    return ", ".join(f"{value:.0f}" for value in np.mean([run["perplexity"] for run in runs], axis=0))


COLUMNS: evidence.Columns = {
    "PSNR": over_seeds("psnr", ".2f"),
    "SSIM": over_seeds("ssim", ".3f"),
    "FD-EffLite0": over_seeds("fd", ".1f"),
    "FD-classifier": over_seeds("fd_classifier", ".2f"),
    "recognised": over_seeds("recognised", ".3f"),
    "edges": over_seeds("edges", ".2f"),
    "samples' FD-EffLite0": over_seeds("samples_fd", ".1f"),
    "images/s": over_seeds("images_per_second", ".0f"),
    "codes": mean_codes,
    "perplexity by scale": mean_perplexities,
}


if __name__ == "__main__":
    cli.run(main)
