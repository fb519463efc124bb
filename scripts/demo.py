"""The main job from end to end on the embedded images: tokenizer, M-VAR, samples, and figures that say how good they are.

Runs the commands that anybody would run, each as its own process, bounded by time: under 10 minutes on two CPU cores.
Everything it makes lies in out/demo/; a second run resumes where the first was stopped.
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image

from models.precision import is_worth_it
from utils import cli, plots
from utils.checkpoint import load_tokenizer
from utils.cli import flag
from utils.data.fashion_mnist import FASHION_MNIST_CLASSES, export_fashion_mnist
from utils.data.images import Images, read_folders
from utils.data.token_cache import TokenCache
from utils.files import check_folder
from utils.metrics.judges import Judges, decoded
from utils.processes import shell_words
from utils.runs.log import read_metrics

NUM_SAMPLES = 1000
RECONSTRUCTIONS = 16
NEEDED_DIVERSITY = 0.6


@dataclass(frozen=True)
class DemoConfig:
    """Flags of scripts/demo.py."""

    out: str = flag("out/demo", "directory of everything made")
    tokenizer_minutes: float = flag(3.0, "training time of the tokenizer, all of it")
    transformer_minutes: float = flag(4.3, "training time of the transformer, and beside it of the tokenizer's decoder alone")

    def __post_init__(self):
        for name in ("tokenizer_minutes", "transformer_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give more than 0")


def precision() -> int:
    """--fp16 for this machine: bfloat16 on a GPU or a CPU that multiplies matrices much faster in it, else float32."""
    return 2 if torch.cuda.is_available() or is_worth_it(torch.nn.Linear(1024, 1024), torch.ones(1024, 1024)) else 0


def run(title: str, *command: str | Path) -> None:
    """Run a command of this repository; its output is shown, its failure ends the demo."""
    words = [str(word) for word in command]
    print(f"\n--- {title}\n    python {' '.join(words)}", flush=True)
    status = subprocess.run(shell_words(*words), check=False).returncode
    if status:
        raise ValueError(f"{words[0]} ended with exit code {status}: see its message above")


def run_together(title: str, commands: dict[str, tuple[str | Path, ...]]) -> None:
    """Run commands side by side, each with its share of the threads; lines of their output begin with the command's name.

    Where one fails the others are stopped, and the demo ends.
    """
    print(f"\n--- {title}", flush=True)
    threads = max(torch.get_num_threads() // len(commands), 1)
    processes, readers = {}, []
    for name, command in commands.items():
        words = [str(word) for word in command]
        print(f"    python {' '.join(words)}", flush=True)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(shell_words(*words), env=os.environ | {"OMP_NUM_THREADS": str(threads)}, **options)
        processes[name] = process
        readers.append(threading.Thread(target=show, args=(name, process.stdout)))
        readers[-1].start()
    try:
        while not (failed := [name for name, process in processes.items() if process.poll()]):
            if all(process.poll() is not None for process in processes.values()):
                break
            time.sleep(0.2)
    finally:
        for process in processes.values():
            process.terminate()  # nothing where it has ended
            process.wait()
        for reader in readers:
            reader.join()
    if failed:
        status = processes[failed[0]].returncode
        raise ValueError(f"{commands[failed[0]][0]} ended with exit code {status}: see its message above")


def show(name: str, lines: Iterable[str]) -> None:
    """Print lines as they come, each behind a name."""
    for line in lines:
        print(f"{name} | {line.rstrip()}", flush=True)


def unigram_entropy(train: TokenCache, val: TokenCache) -> float:
    """Cross-entropy, in nats per token, of held-out tokens under the frequency of each code in training: no context at all."""
    tokens, _ = train.gather(np.arange(len(train)))
    frequency = np.bincount(tokens.numpy().ravel(), minlength=train.manifest.num_codes) + 1.0
    held_out, _ = val.gather(np.arange(len(val)))
    return float(-np.log(frequency / frequency.sum())[held_out.numpy()].mean())


def load_pixels(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """split -> grey images (N, 32 * 32) in [0, 1] and labels."""
    splits = {}
    for split, files in zip(("train", "val"), read_folders(root), strict=True):
        pixels = [np.asarray(Image.open(path).convert("L"), np.float32).ravel() / 255 for path in files.paths]
        splits[split] = np.stack(pixels), np.array(files.labels)
    return splits


def diversity(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Mean Euclidean distance between two images of one class, over all pairs, averaged over the classes."""
    values = []
    for label in np.unique(labels):
        x = torch.from_numpy(pixels[labels == label])
        values.append(torch.pdist(x).mean().item())
    return float(np.mean(values))


def judge_samples(images: Path, samples: Path) -> dict[str, float]:
    """What a classifier fitted on real images says of the samples, and how different they are, beside real held-out images."""
    from sklearn.linear_model import LogisticRegression  # here, as it takes seconds

    real = load_pixels(images)
    with np.load(samples, allow_pickle=False) as archive:
        made, asked = archive["arr_0"], archive["labels"]
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L"), np.float32).ravel() / 255 for image in made])
    classifier = LogisticRegression(max_iter=1000, C=0.1).fit(*real["train"])
    return {
        "recognised_samples": float(classifier.score(grey, asked)),
        "recognised_real": float(classifier.score(*real["val"])),
        "diversity_samples": diversity(grey, asked),
        "diversity_real": diversity(*real["val"]),
    }


def distances(images: Path, tokenizer_run: Path, samples: Path) -> dict[str, float]:
    """From the held-out images: of the samples, of training images as the tokenizer decodes them, and of these as they are.

    By FD-EffLite0, and by a second network that neither a loss nor that score has seen, which also says how often it recognises
    the class of a decoded image.
    """
    tokenizer = load_tokenizer(tokenizer_run)
    judges = Judges(images, tokenizer.config.image_shape[0], NUM_SAMPLES, "cuda" if torch.cuda.is_available() else "cpu")
    with np.load(samples, allow_pickle=False) as archive:
        made = archive["arr_0"]
    real = judges.train[judges.chosen]
    reconstructions, _ = decoded(tokenizer, real)
    figures = {}
    for name, pixels in (("samples", made), ("reconstructions", reconstructions), ("real", real)):
        of_set = judges.distances(pixels)
        figures |= {f"fd_{name}": of_set["efflite0"], f"second_{name}": of_set["classifier"]}
    recognised = judges.classifier.accuracy(reconstructions, judges.train_labels[judges.chosen])
    return figures | {"recognised_reconstructions": recognised}


def draw_reconstructions(images: Path, tokenizer_run: Path, out: Path) -> None:
    """Held-out images above what the tokenizer makes of them."""
    _, val = read_folders(images)
    tokenizer = load_tokenizer(tokenizer_run)
    chosen = np.linspace(0, len(val.paths) - 1, RECONSTRUCTIONS).astype(int)
    dataset = Images(val, tokenizer.config.image_shape[0], resize=1.0)
    originals = torch.stack([dataset[(i, i)][0] for i in chosen.tolist()])
    decoded = tokenizer.decode(tokenizer.encode(originals))
    rows = [plots.to_uint8((batch + 1) / 2) for batch in (originals, decoded)]
    plots.save(plots.grid(rows, ["held out", "decoded"]), out)


def draw_curves(tokenizer_runs: tuple[Path, Path], transformer_run: Path, entropy: float, out: Path) -> None:
    """tokenizer_runs: of all of it, and then of its decoder."""

    def line(run: Path, name: str, first: int = 0) -> list[tuple[int, float]]:
        return [(first + entry["step"], entry[name]) for entry in read_metrics(run) if name in entry]

    start = read_metrics(tokenizer_runs[0])[-1]["step"]
    quality = {
        title: line(tokenizer_runs[0], name) + line(tokenizer_runs[1], name, start)
        for title, name in (("training batch", "psnr"), ("held out", "val_psnr"))
    }
    losses = {"training batch": line(transformer_run, "loss"), "held out": line(transformer_run, "val_loss")}
    panels = [
        {"title": "tokenizer", "x": "step", "y": "PSNR (dB)", "lines": quality},
        {
            "title": "M-VAR",
            "x": "step",
            "y": "cross-entropy (nats per token)",
            "lines": losses,
            "levels": {"code frequencies alone": entropy},
        },
    ]
    plots.curves(out, panels)


def report(metrics: dict[str, float], out: Path) -> str:
    relative = metrics["diversity_samples"] / metrics["diversity_real"]
    return f"""
Done in {metrics["minutes"]:.1f} minutes. In {out}/:
  reconstructions.png  held-out images above what the tokenizer makes of them, {metrics["val_psnr"]:.2f} dB
  samples.png          generated images, a row per class
  scales.png           images building up from 1x1 to 4x4 token maps
  curves.png           training curves
  metrics.json         all figures; tokenizer/, refined/ and transformer/ hold the checkpoints

What the figures mean:
  validation loss      {metrics["val_loss"]:.3f} nats per token; the frequencies of the codes alone give {metrics["unigram_entropy"]:.3f}
  class recognised     in {metrics["recognised_samples"]:.1%} of {NUM_SAMPLES} samples, in {metrics["recognised_real"]:.1%} of real held-out images,
                       by a classifier fitted on real training images (logistic regression on pixels)
  variety in a class   {metrics["diversity_samples"]:.2f} between samples, {metrics["diversity_real"]:.2f} between real images (mean pixel distance):
                       {relative:.0%}; under {NEEDED_DIVERSITY:.0%} would mean that the model repeats itself
  FD-EffLite0          {metrics["fd_samples"]:.1f} of {NUM_SAMPLES} samples, {metrics["fd_reconstructions"]:.1f} of as many decoded images, {metrics["fd_real"]:.1f} of as many real ones:
                       Fréchet distance, in features of a network trained on ImageNet, from the held-out images
  second opinion       {metrics["second_samples"]:.2f}, {metrics["second_reconstructions"]:.2f} and {metrics["second_real"]:.2f}: the same in features of a small classifier of these classes, which
                       recognises {metrics["recognised_reconstructions"]:.1%} of the decoded images
"""  # noqa: E501


def main() -> None:
    config = cli.parse(DemoConfig, __doc__)
    start = time.monotonic()
    out = Path(config.out)
    check_folder(out, "--out")
    names = ("images", "tokenizer", "tokens", "refined", "transformer")
    images, tokenizer, tokens, refined, transformer = (out / name for name in names)
    fp16 = precision()
    print(f"writing the embedded images ({len(FASHION_MNIST_CLASSES)} classes) to {images}")
    export_fashion_mnist(images)

    train_tokenizer = ("scripts/train_tokenizer.py", "--data_path", images, "--preset=f8-32", "--resize=1", "--bs=16")
    # validated at the end alone, as validations take their time from training
    train_tokenizer += ("--lr=1.5e-3", "--log_every=50", "--save_every=1000", "--val_every=1000000", f"--fp16={fp16}")
    run(
        "1/4 training the tokenizer: images <-> 1+4+9+16 tokens",
        *(*train_tokenizer, "--out", tokenizer, "--gan=0", f"--max_minutes={config.tokenizer_minutes}"),
    )
    if not (tokens / "manifest.json").exists():
        run(
            "2/4 encoding the images once",
            *("scripts/cache_tokens.py", "--vae", tokenizer, "--data_path", images, "--out", tokens),
            *("--resize=1", "--center_crop"),
        )
    minutes = f"--max_minutes={config.transformer_minutes}"
    train = ("train.py", "--token_cache", tokens, "--local_out_dir_path", transformer, minutes)
    train += ("--depth=6", "--width=192", "--heads=3", "--bs=32", "--tblr=8e-3", "--alng=1e-2", "--wpe=0.01")
    train += ("--ema=0.99", "--val_every=300", "--save_every=300", f"--fp16={fp16}", "--seed=0")
    # tokens stay what they are while the decoder learns, so both can be trained at the same time
    refine = (*train_tokenizer, "--out", refined, "--refine", tokenizer, minutes)
    refine += ("--lr_end=0.01", "--gan=0.017")
    run_together("3/4 training M-VAR on the tokens, and the tokenizer's decoder", {"M-VAR": train, "decoder": refine})
    sampling = ("sample.py", "--ckpt", transformer, "--vae", refined, "--overwrite", "--seed=1")
    sampling += ("--cfg=1.5", "--top_k=0", "--top_p=0.96")
    samples = out / "samples.npz"
    wanted = {
        "samples": ("--format=npz", f"--num={NUM_SAMPLES}", "--batch=100", "--out", samples),
        "grid": ("--format=grid", "--out", out / "samples.png"),
        "scales": ("--format=scales", "--out", out / "scales.png"),
    }
    run_together("4/4 sampling", {name: (*sampling, *words) for name, words in wanted.items()})

    draw_reconstructions(images, refined, out / "reconstructions.png")
    entropy = unigram_entropy(TokenCache(tokens, "train"), TokenCache(tokens, "val"))
    draw_curves((tokenizer, refined), transformer, entropy, out / "curves.png")
    last = {name: value for run_ in (refined, transformer) for name, value in read_metrics(run_)[-1].items()}
    metrics = {name: last[name] for name in ("val_loss", "val_loss_last", "val_accuracy", "val_accuracy_last", "val_psnr")}
    metrics |= {"unigram_entropy": entropy, **judge_samples(images, samples), **distances(images, refined, samples)}
    figures = out / "metrics.json"
    earlier = json.loads(figures.read_text())["minutes"] if figures.exists() else 0.0
    metrics["minutes"] = max((time.monotonic() - start) / 60, earlier)  # a second run finds everything done
    metrics["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "precision": "bfloat16" if fp16 else "float32",
    }
    figures.write_text(json.dumps(metrics, indent=1) + "\n")
    print(report(metrics, out))


if __name__ == "__main__":
    cli.run(main)
