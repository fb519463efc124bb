"""Look at a folder of training images before a run does: what is in it, and what would end the run.

Every file of train/<class>/* and val/<class>/*, or of another layout that training takes, is read as training reads it. Prints
a table; --json stores all of it. The exit code is 1 where training would stop.
"""

import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from utils import cli
from utils.cli import argument, flag
from utils.data.hub_sets import is_hub_set
from utils.data.layouts import VAL_SHARE_HELP, check_root, check_share
from utils.data.survey import Split, duplicates, list_folder, look_at, most_common, reasons_to_stop
from utils.files import check_file, replace_text

SHOWN = 10  # of what there may be many


@dataclass(frozen=True)
class CheckConfig:
    """Arguments of scripts/check_data.py."""

    folder: str = argument("directory with train/<class>/* and val/<class>/*")
    val_share: float = flag(0.0, VAL_SHARE_HELP)
    workers: int = flag(os.cpu_count() or 1, "processes that read images")
    json: str = flag("", "also write everything to this file")
    overwrite: bool = flag(False, "replace what is at --json")

    def __post_init__(self):
        check_share(self.val_share)
        if self.workers < 1:
            raise ValueError(f"--workers={self.workers}: give at least 1")


def table(root: Path, splits: dict[str, Split], same: list[list[str]], stops: list[str]) -> str:
    """What people should know, in lines."""
    lines = [f"{'':<24}" + "".join(f"{name:>14}" for name in splits)]

    def row(title: str, values: list[object]) -> None:
        lines.append(f"{title:<24}" + "".join(f"{value:>14,}" for value in values))

    row("classes", [len(split.classes) for split in splits.values()])
    row("images", [len(split.pictures) for split in splits.values()])
    row("fewest in a class", [min(map(len, split.classes.values()), default=0) for split in splits.values()])
    row("most in a class", [max(map(len, split.classes.values()), default=0) for split in splits.values()])
    row("cannot be read", [sum(bool(picture.error) for picture in split.pictures) for split in splits.values()])
    row("with transparency", [sum(picture.is_transparent for picture in split.pictures) for split in splits.values()])
    row("turned by EXIF data", [sum(picture.is_turned for picture in split.pictures) for split in splits.values()])
    row("of several frames", [sum(picture.has_several for picture in split.pictures) for split in splits.values()])
    sides = [[min(picture.size) for picture in split.pictures if not picture.error] for split in splits.values()]
    row("smallest side, px", [min(of_split, default=0) for of_split in sides])
    row("files of other kinds", [len(split.strangers) + len(split.beside) + len(split.loose) for split in splits.values()])
    row("hidden or of systems", [len(split.passed_over) for split in splits.values()])
    for name, split in splits.items():
        lines.append(f"{name}, layout: {split.layout}")
        whole = [picture for picture in split.pictures if not picture.error]
        sizes = Counter(f"{width}x{height}" for width, height in (picture.size for picture in whole))
        lines.append(f"{name}, sizes: {most_common(sizes) or 'none'}")
        lines.append(f"{name}, modes: {most_common(Counter(picture.mode for picture in whole)) or 'none'}")
        labels = ", ".join(f"{label} = {title!r}" for label, title in list(enumerate(split.classes))[:SHOWN])
        lines.append(f"{name}, labels: {labels}{', ...' if len(split.classes) > SHOWN else ''}")
    if same:
        lines.append(
            f"{sum(map(len, same)):,} files in {len(same):,} groups have the same bytes, such as {' and '.join(same[0][:3])}"
        )
    for words, depth in (("several classes", 1), ("train/ as well as val/", 0)):
        shared = [paths for paths in same if len({Path(path).relative_to(root).parts[depth] for path in paths}) > 1]
        if shared:
            lines.append(f"{len(shared):,} of these groups are in {words}, such as {' and '.join(shared[0][:3])}")
    if stops:
        lines.append(f"training would stop: {len(stops):,} reasons")
        lines += [f"  {reason}" for reason in stops[:SHOWN]]
        lines += [f"  and {len(stops) - SHOWN:,} more"] if len(stops) > SHOWN else []
    else:
        lines.append("training would take all of it")
    return "\n".join(lines)


def main() -> None:
    config = cli.parse(CheckConfig, __doc__)
    if is_hub_set(config.folder):
        raise ValueError(f"{config.folder}: only folders are looked at here: train with --skip_bad, which names bad pictures")
    root, out = Path(config.folder), Path(config.json)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory: give one with train/<class>/* and val/<class>/*")
    if config.json:
        check_file(out, "--json", config.overwrite)
    start = time.monotonic()
    if config.val_share:
        check_root(root, config.val_share)
    splits, places = list_folder(root, config.val_share)
    bar = tqdm(look_at(places, config.workers), total=len(places), unit="image", mininterval=0.2 if sys.stderr.isatty() else 20)
    for place, picture in bar:
        splits[place.split].classes[place.label].append(picture)
    same, stops = duplicates(splits), reasons_to_stop(splits)
    print(table(root, splits, same, stops))
    if config.json:
        seconds = time.monotonic() - start
        found = {
            name: asdict(split) | {"classes": {label: [p._asdict() for p in part] for label, part in split.classes.items()}}
            for name, split in splits.items()
        }
        speed = {"images": len(places), "seconds": round(seconds, 2), "workers": config.workers}
        replace_text(out, json.dumps({"splits": found, "duplicates": same, "reasons_to_stop": stops, **speed}, indent=1) + "\n")
    sys.exit(1 if stops else 0)


if __name__ == "__main__":
    cli.run(main)
