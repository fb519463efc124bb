"""Sample from the same weights in many ways and score all alike: which of them is worth its time.

    python scripts/checks/compare_drawing.py --ckpt out/demo/transformer --vae out/demo/refined --data_path out/demo/images

Every row is sample.py with the flags of its name, three seeds each. A row whose mean is inside the spread of another is not
better than it. The judge of best-of rows is a MobileNet, trained here on the training images unless one is given; the scores
are by EfficientNet-Lite0 and by another classifier, which know nothing of it. The JSON grows by a run at a time, and a
second call goes on where the first was stopped.
"""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from models.storage import write_tensors
from utils import cli, evidence
from utils.checkpoint import load_tokenizer, load_transformer
from utils.cli import flag, required
from utils.evidence import over_seeds
from utils.metrics.judges import Judges
from utils.processes import run
from utils.sampling.judging import prepared

JUDGE_EPOCHS, JUDGE_BATCH = 2, 64
RECOGNISED = 0.6  # of held-out images by a judge, at least
PUBLISHED = "as published"
ROWS: dict[str, list[str]] = {
    PUBLISHED: [],
    "no guidance": ["--cfg=0"],
    "guidance 1": ["--cfg=1"],
    "guidance 2.5": ["--cfg=2.5"],
    "constant guidance, half as strong": ["--cfg=0.75", "--cfg_schedule=constant"],
    "cosine guidance": ["--cfg_schedule=cosine"],
    "guidance from the second scale on": ["--cfg_scales=2-{last}"],
    "no guidance at the last scale": ["--cfg_scales=1-{last_but_one}"],
    "temperature 0.9": ["--temperature=0.9"],
    "temperature 1 to 0.8": ["--temperature=1,0.8"],
    "temperature 1.1 to 0.9": ["--temperature=1.1,0.9"],
    "min-p 0.02 alone": ["--min_p=0.02", "--top_p=0"],
    "min-p 0.05": ["--min_p=0.05"],
    "best of 4": ["--best_of=4", "--judge={judge}"],
    "best of 4, no guidance": ["--best_of=4", "--judge={judge}", "--cfg=0"],
}
SECOND = "coarse scales by the first, the rest by the second"
SECOND_ALONE = "the second alone"
ALIGNED = "aligned, no guidance"


@dataclass(frozen=True)
class Comparison:
    """Flags of scripts/checks/compare_drawing.py."""

    ckpt: str = required("transformer")
    vae: str = required("its tokenizer")
    data_path: str = required("directory with the train/ and val/ that they were trained on")
    second: str = flag("", "a second transformer of the same tokenizer, for two rows more")
    drafted: int = flag(2, "--second: so many scales are drawn by the first")
    aligned: str = flag("", "the first after --objective=cca, for a row without guidance")
    judge: str = flag("", "weights of a torchvision classifier of these classes; empty: one is trained")
    top_p: float = flag(0.96, "of all rows that do not say otherwise")
    top_k: int = flag(0, "likewise, 0: all codes")
    num: int = flag(1000, "samples of each row and seed, evenly over the classes")
    seeds: int = flag(3, "0, 1, ...")
    out: str = flag("out/drawing", "directory of the samples")
    json: str = flag("results/drawing.json", "what was measured, a list of runs; grows")


def main() -> None:
    config = cli.parse(Comparison, __doc__)
    transformer, tokenizer = load_transformer(config.ckpt), load_tokenizer(config.vae)
    stored, judges = evidence.GrowingRuns(Path(config.json), COLUMNS), None
    judge = Path(config.judge or Path(config.out) / "mobilenet_v3_small.safetensors")
    for seed in range(config.seeds):
        for name, flags in rows_of(config, transformer.pyramid.num_scales, judge).items():
            if stored.has(row=name, seed=seed):
                continue
            if judges is None:
                judges = Judges(config.data_path, tokenizer.config.image_shape[0], config.num)
            if str(judge) in " ".join(flags) and not judge.exists():
                train_judge(judges, transformer.config.num_classes, judge)
            samples = Path(config.out) / f"{name.replace(' ', '_').replace(',', '')}_{seed}.npz"
            before = processor_seconds()
            draw(config, name, flags, seed, samples)
            seconds = processor_seconds() - before
            stored.add({"row": name, "seed": seed, **judges.scores_of(samples), "processor_seconds": seconds}, flags=ROWS)


def rows_of(config: Comparison, num_scales: int, judge: Path) -> dict[str, list[str]]:
    """Rows that can be made of what is given, with their flags."""
    known = {"last": num_scales, "last_but_one": num_scales - 1, "judge": judge}
    rows = {name: [text.format(**known) for text in flags] for name, flags in ROWS.items()}
    if config.second:
        rows[SECOND] = [f"--refine_ckpt={config.second}", f"--draft_scales={config.drafted}"]
        rows[SECOND_ALONE] = []
    if config.aligned:
        rows[ALIGNED] = ["--cfg=0"]
    return rows


def draw(config: Comparison, name: str, flags: list[str], seed: int, samples: Path) -> None:
    ckpt = {SECOND_ALONE: config.second, ALIGNED: config.aligned}.get(name, config.ckpt)
    words = ("--ckpt", ckpt, "--vae", config.vae, "--out", samples, "--overwrite", "--format=npz", f"--num={config.num}")
    words += (f"--top_k={config.top_k}", f"--top_p={config.top_p}", f"--seed={seed}", "--precision=float32", "--batch=64")
    run("sample.py", *words, *flags)


def processor_seconds() -> float:
    """Of all commands so far that have ended: unlike time by the clock, that of other programs does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train_judge(judges: Judges, num_classes: int, path: Path) -> None:
    """A MobileNet on the training images, seen as utils/sampling/judging.py shows them to it.

    ValueError where it does not recognise the held-out ones: its choice would be none.
    """
    from torchvision.models import mobilenet_v3_small  # here, as it takes a second

    torch.manual_seed(0)
    network = mobilenet_v3_small(num_classes=num_classes)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # 0.01, its own, is for many more steps: evaluated it would know nothing
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    pixels, targets = torch.from_numpy(judges.train), torch.from_numpy(judges.train_labels)
    for epoch in range(JUDGE_EPOCHS):
        for rows in torch.randperm(len(pixels)).split(JUDGE_BATCH):
            loss = F.cross_entropy(network(prepared(pixels[rows].permute(0, 3, 1, 2) / 255)), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"judge: epoch {epoch + 1} of {JUDGE_EPOCHS}, loss {loss.item():.3f}", flush=True)
    network.eval()
    with torch.no_grad():
        held_out = torch.from_numpy(judges.val).split(JUDGE_BATCH)
        found = torch.cat([network(prepared(images.permute(0, 3, 1, 2) / 255)).argmax(1) for images in held_out])
    accuracy = (found == torch.from_numpy(judges.val_labels)).float().mean().item()
    print(f"judge: recognises {accuracy:.1%} of held-out images", flush=True)
    if accuracy < RECOGNISED:
        raise ValueError(f"the judge recognises {accuracy:.1%} of held-out images: give a better one, --judge")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, network.state_dict())


COLUMNS: evidence.Columns = {
    "FD-EffLite0": over_seeds("fd", ".1f"),
    "FD-classifier": over_seeds("fd_classifier", ".2f"),
    "IS-EffLite0": over_seeds("inception_score", ".2f"),
    "precision": over_seeds("precision", ".3f"),
    "recall": over_seeds("recall", ".3f"),
    "recognised": over_seeds("recognised", ".3f"),
    "processor seconds, start included": over_seeds("processor_seconds", ".0f"),
}


if __name__ == "__main__":
    cli.run(main)
