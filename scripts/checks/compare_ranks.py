"""Train on the embedded images from cached tokens by one rank and by two, with the same batches, and compare the curves.

Both compute the same sums in another order, so their losses differ by the rounding of float32. Drop-path is off: it is the one
thing that each rank draws for itself.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import cli, evidence
from utils.cli import flag
from utils.data.fashion_mnist import export_fashion_mnist
from utils.processes import run
from utils.runs.log import read_metrics

# Nats per token: ten units in the last place of a float32 loss of 8. Training amplifies such differences where it is unstable;
# more than this would mean other batches, dropouts or gradients.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class CompareConfig:
    """Flags of scripts/checks/compare_ranks.py."""

    out: str = flag("out/ranks", "directory for images, tokens and runs; what an earlier comparison left there is removed")
    steps: int = flag(300, "steps of each run")
    json: str = flag("", "file for the figures, empty: none")


def largest_difference(one: Path, two: Path, name: str) -> float:
    curves = [[entry[name] for entry in read_metrics(path) if name in entry] for path in (one, two)]
    return max(abs(a - b) for a, b in zip(*curves, strict=True))


def main() -> None:
    config = cli.parse(CompareConfig, __doc__)
    out = Path(config.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    images, tokenizer, tokens = (out / name for name in ("images", "tokenizer", "tokens"))
    export_fashion_mnist(images)
    training = ("--preset=f8-32", "--resize=1", "--bs=16", "--max_steps=150")
    run("scripts/train_tokenizer.py", "--data_path", images, "--out", tokenizer, *training)
    caching = ("--resize=1", "--views=2")
    run("scripts/cache_tokens.py", "--vae", tokenizer, "--data_path", images, "--out", tokens, *caching, ranks=2)
    flags = ["--depth=4", "--width=192", "--heads=3", "--bs=64", "--tblr=4e-3", "--alng=1e-2", "--drop_path=0", "--seed=0"]
    flags += ["--log_every=1", "--val_every=50", f"--max_steps={config.steps}", "--token_cache", tokens]
    runs = {ranks: out / f"{ranks}_rank{'s' if ranks > 1 else ''}" for ranks in (1, 2)}
    for ranks, directory in runs.items():
        run("train.py", *flags, "--local_out_dir_path", directory, ranks=ranks)
    run("scripts/plot_run.py", *runs.values(), "--x=step", "--out", out / "curves.png")
    differences = {name: largest_difference(*runs.values(), name) for name in ("loss", "val_loss")}
    figures = {
        "settings": asdict(config),
        "first_losses": {str(n): read_metrics(path)[0]["loss"] for n, path in runs.items()},
        "last_val_losses": {str(n): read_metrics(path)[-1]["val_loss"] for n, path in runs.items()},
        "largest_differences": differences,
        "tolerance": TOLERANCE,
    }
    print(json.dumps(figures, indent=1))
    if config.json:
        evidence.store(Path(config.json), figures)
    if max(differences.values()) > TOLERANCE:
        raise ValueError(
            f"the curves differ by {max(differences.values()):.2g}, more than {TOLERANCE}: compare {out / 'curves.png'}"
        )


if __name__ == "__main__":
    cli.run(main)
