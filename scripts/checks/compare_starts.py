"""Train the same transformers from nothing and from weights that exist, for as many steps, and score their samples.

    python scripts/checks/compare_starts.py --vae out/demo/refined --data_path out/demo/images

For each seed a VAR is trained first, from which the rows start: M-VAR and Markov from it and from nothing, half of the classes
from a VAR of the other half, parts of it alone, and the alignment that makes guidance needless. A row whose mean is inside the
spread of another is not better than it. The JSON grows by a run at a time, and a second call goes on where the first was
stopped.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import cli, evidence
from utils.checkpoint import load_tokenizer
from utils.cli import flag, required
from utils.data.images import read_folders
from utils.evidence import over_seeds
from utils.metrics.judges import Judges
from utils.processes import run
from utils.runs.log import read_metrics

ALL, FIRST, OTHERS = "all", "first half", "other half"  # of the classes
SMALL = ("--depth=6", "--width=192", "--heads=3", "--bs=32", "--alng=1e-2", "--wpe=0.01", "--ema=0.99")


@dataclass(frozen=True)
class Row:
    """What is trained: flags beside the common ones; start: the row whose run it starts from; sampling: flags of sample.py."""

    flags: tuple[str, ...]
    start: str = ""
    classes: str = ALL
    is_start: bool = False  # trained for --start_steps
    sampling: tuple[str, ...] = field(default=("--cfg=1.5",))


VAR, HALF = "VAR", "VAR of the other classes"
ROWS = {
    VAR: Row(("--family=var",), is_start=True),
    "VAR, no guidance": Row(("--family=var",), is_start=True, sampling=("--cfg=0",)),
    "VAR aligned, no guidance": Row(
        ("--family=var", "--objective=cca", "--tblr=2e-5", "--drop_path=0", "--cca_weight=50"), VAR, sampling=("--cfg=0",)
    ),
    "VAR, as many steps more": Row(("--family=var",), VAR),
    "M-VAR from VAR": Row(("--family=mvar",), VAR),
    "M-VAR from nothing": Row(("--family=mvar",)),
    "M-VAR from VAR, its scan, modulation and head alone": Row(("--family=mvar", "--train_only=mamba,modulation,head"), VAR),
    "Markov from VAR, 8:1:1": Row(("--family=markov", "--scale_groups=drawn"), VAR),
    "Markov from VAR, all scales": Row(("--family=markov",), VAR),
    "Markov from nothing": Row(("--family=markov",)),
    HALF: Row(("--family=var",), classes=FIRST, is_start=True),
    "new classes from VAR of the others": Row(("--family=var",), HALF, classes=OTHERS),
    "new classes from VAR of the others, adapters and embeddings alone": Row(
        ("--family=var", "--lora=16", "--train_only=embeddings"), HALF, classes=OTHERS
    ),
    "new classes from nothing": Row(("--family=var",), classes=OTHERS),
}


@dataclass(frozen=True)
class Comparison:
    """Flags of scripts/checks/compare_starts.py."""

    vae: str = required("tokenizer")
    data_path: str = required("directory with the train/ and val/ that it was trained on")
    start_steps: int = flag(600, "steps of what is started from")
    steps: int = flag(300, "steps of each row")
    tblr: float = flag(8e-3, "peak learning rate per 256 images, where a row does not say otherwise")
    fp16: int = flag(0, "precision of training: 0, 1 or 2, as in train.py")
    num: int = flag(1000, "samples of each row and seed, evenly over the classes")
    seeds: int = flag(3, "0, 1, ...")
    rows: str = flag("", "names of rows, separated by semicolons; empty: all")
    out: str = flag("out/starts", "directory of the runs")
    json: str = flag("results/starts.json", "what was measured, a list of runs; grows")


def main() -> None:
    config = cli.parse(Comparison, __doc__)
    chosen = [name.strip() for name in config.rows.split(";")] if config.rows else list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        raise ValueError(f"--rows={unknown[0]}: no such row: give some of {'; '.join(ROWS)}")
    pixels, stored = load_tokenizer(config.vae).config.image_shape[0], evidence.GrowingRuns(Path(config.json), COLUMNS)
    judges: dict[str, Judges] = {}
    for seed in range(config.seeds):
        for name in chosen:
            if stored.has(row=name, seed=seed):
                continue
            classes = ROWS[name].classes
            if classes not in judges:
                judges[classes] = Judges(folder_of(config, classes), pixels, config.num)
            directory = trained(config, name, seed)
            scores = judges[classes].scores_of(sampled(config, name, seed, directory))
            stored.add({"row": name, "seed": seed, **scores, "val_loss": read_metrics(directory)[-1]["val_loss"]})


def folder_of(config: Comparison, classes: str) -> Path:
    """The images of some classes, as links to the folders that there are."""
    if classes == ALL:
        return Path(config.data_path)
    names = read_folders(config.data_path)[0].class_names
    half = len(names) // 2
    folder = Path(config.out) / "images" / classes.replace(" ", "_")
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name in names[:half] if classes == FIRST else names[half:]:
            link = folder / split / name
            if not link.exists():
                link.symlink_to((Path(config.data_path) / split / name).resolve())
    return folder


def tokens_of(config: Comparison, classes: str) -> Path:
    """A cache of their tokens."""
    cache = Path(config.out) / "tokens" / classes.replace(" ", "_")
    if not (cache / "manifest.json").exists():
        words = ("--vae", config.vae, "--data_path", folder_of(config, classes), "--out", cache, "--resize=1", "--center_crop")
        run("scripts/cache_tokens.py", *words)
    return cache


def trained(config: Comparison, name: str, seed: int) -> Path:
    """The run of a row, trained where it is not there yet, after the one that it starts from."""
    row = ROWS[name]
    if name != VAR and row.flags == ROWS[VAR].flags and row.is_start and row.classes == ALL:
        return trained(config, VAR, seed)  # the same weights, drawn from otherwise
    directory = Path(config.out) / f"{file_name(name)}_{seed}"
    steps = config.start_steps if row.is_start else config.steps
    if (directory / "checkpoints" / f"step_{steps}").exists():
        return directory
    words = ("--token_cache", tokens_of(config, row.classes), "--local_out_dir_path", directory, f"--tblr={config.tblr}")
    words += (f"--max_steps={steps}", f"--ep={steps}", f"--val_every={steps}", f"--save_every={steps}", f"--seed={seed}")
    start = ("--init_from", trained(config, row.start, seed)) if row.start else ()
    run("train.py", *SMALL, *words, f"--fp16={config.fp16}", *row.flags, *start)
    return directory


def file_name(row: str) -> str:
    return row.replace(" ", "_").replace(",", "").replace(":", "")


def sampled(config: Comparison, name: str, seed: int, directory: Path) -> Path:
    samples = Path(config.out) / "samples" / f"{file_name(name)}_{seed}.npz"
    words = ("--ckpt", directory, "--vae", config.vae, "--out", samples, "--overwrite", "--format=npz", f"--num={config.num}")
    run("sample.py", *words, "--top_k=0", "--top_p=0.96", f"--seed={seed}", "--batch=64", *ROWS[name].sampling)
    return samples


COLUMNS: evidence.Columns = {
    "FD-EffLite0": over_seeds("fd", ".1f"),
    "FD-classifier": over_seeds("fd_classifier", ".2f"),
    "recognised": over_seeds("recognised", ".3f"),
    "held-out loss": over_seeds("val_loss", ".3f"),
}


if __name__ == "__main__":
    cli.run(main)
