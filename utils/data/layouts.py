"""How folders of training images are laid out, told by what lies in them.

    train/<class>/*  val/<class>/*               as torchvision's ImageFolder has it
    train/<class>/*  val/*  and a file           ImageNet's validation images as they come, the file says of which class each is
    train/<class>/images/*  val/images/*  likewise   Tiny ImageNet
    train/<class>/*, or <class>/*  and no val/   a share of every class is held out, by a rule that depends on file names alone

Only names are looked at here. What is wrong with them is said by who needs them: `utils.data.images` and `utils.data.survey`.
"""

import contextlib
import csv
import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils.data.pictures import EXTENSIONS, Found, find_pictures, is_of_a_system, uncounted

VAL_SHARE_HELP = "where there is no val/: hold out this share of each class, by a hash of file names; 0: val/ must be there"
SHOWN_FROM = 100_000  # pictures that are listed without a word
TABLE, TRUTH, META = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
LINES = ("val_annotations.txt", "val_labels.txt", "val.txt")
DEVKIT = "ILSVRC2012_devkit_t12/data"
UP_TO_TABLE = 3  # folders: Kaggle has it beside ILSVRC/, and train/ and val/ in ILSVRC/Data/CLS-LOC/


class Listing(NamedTuple):
    """What there is of a split, by name alone; all names are below the root, with / between their parts."""

    folder: str  # below the root, empty for the root itself
    layout: str  # in words
    classes: dict[str, Found]  # in the order of their names, which is that of the labels
    loose: list[str]  # beside the class folders: pictures, and links to nothing, which may have been class folders
    strangers: list[str]  # other files there
    passed_over: list[str]  # hidden, or of systems, there


def check_share(val_share: float) -> None:
    """ValueError unless some images can be held out and some are left."""
    if not 0 <= val_share < 1:
        raise ValueError(f"--val_share={val_share}: give a share from 0 to below 1")


def check_root(root: str | Path, val_share: float = 0.0) -> None:
    """FileNotFoundError or ValueError where folders are missing or too many: a cheap look before anything slow is done."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory; --data_path names one with train/<class>/* and val/<class>/*")
    has_val = (root / "val").is_dir()
    if val_share and has_val:
        raise ValueError(f"--val_share={val_share:g}: {root / 'val'} is there already: leave the flag out, or remove that")
    if not (root / "train").is_dir() and not val_share:
        raise FileNotFoundError(f"{root / 'train'}: no such directory; images belong into train/<class>/* there")
    if not has_val and not val_share:
        raise FileNotFoundError(
            f"{root / 'val'}: no such directory; images belong into val/<class>/* there, "
            "or give --val_share=0.02 to hold out some of train/"
        )


def list_splits(root: str | Path, val_share: float = 0.0) -> dict[str, Listing]:
    """The splits, train and val, that there are. val_share: above 0, hold out this share, for val/ is not there.

    A bar shows how many pictures were found where they are many. ValueError where nothing says of which classes the pictures
    in val/ are, and for folders that are linked into themselves.
    """
    root = Path(root)
    with counted() as seen:
        if val_share:
            below = "train" if (root / "train").is_dir() else ""
            return hold_out(list_classes(root, below, seen), val_share)
        splits = {}
        if (root / "train").is_dir():
            splits["train"] = list_classes(root, "train", seen)
        if (root / "val").is_dir():
            splits["val"] = list_val(root, seen)
        return splits


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], object]]:
    """What is to be called for every picture; from so many on that one would wonder, they are counted in a bar."""
    count, bar = 0, None

    def seen() -> None:
        nonlocal count, bar
        count += 1
        if bar is not None:
            bar.update()
        elif count >= SHOWN_FROM:
            interval = 0.2 if sys.stderr.isatty() else 20
            bar = tqdm(initial=count, unit="image", desc="listing", mininterval=interval)

    try:
        yield seen
    finally:
        if bar is not None:
            bar.close()


def list_classes(root: Path, below: str, seen: Callable[[], object] = uncounted) -> Listing:
    """A folder of class folders, that of the name `below` in the root or the root itself."""
    prefix = f"{below}/" if below else ""
    listing = Listing(below, f"{prefix}<class>/*", {}, [], [], [])
    for entry in sorted(os.scandir(root / below), key=lambda entry: entry.name):
        name = prefix + entry.name
        if is_of_a_system(entry.name):
            listing.passed_over.append(name)
        elif entry.is_dir():
            listing.classes[entry.name] = without_boxes(find_pictures(entry.path, f"{name}/", seen), name)
        elif entry.name.lower().endswith(EXTENSIONS) or not os.path.exists(entry.path):
            listing.loose.append(name)
        else:
            listing.strangers.append(name)
    return listing


def without_boxes(found: Found, folder: str) -> Found:
    """A class of Tiny ImageNet has a file of boxes beside its folder of images, which is passed over."""
    boxes = f"{folder}/{folder.rpartition('/')[2]}_boxes.txt"
    if boxes not in found.strangers or not any(picture.startswith(f"{folder}/images/") for picture in found.pictures):
        return found
    strangers = [stranger for stranger in found.strangers if stranger != boxes]
    return Found(found.pictures, strangers, sorted([*found.passed_over, boxes]))


# --- held out by a rule -------------------------------------------------------------------------------------------------


def is_held_out(name: str, share: float) -> bool:
    """Whether a picture, by its path below the class folders' folder, is one of those; whatever else lies there."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def hold_out(listing: Listing, share: float) -> dict[str, Listing]:
    """Two splits of one folder of class folders; what is not a picture stays with the first."""
    train, val = {}, {}
    for label, found in listing.classes.items():
        parts: dict[bool, list[str]] = {False: [], True: []}
        for name in found.pictures:
            parts[is_held_out(name.removeprefix(listing.folder).removeprefix("/"), share)].append(name)
        train[label] = found._replace(pictures=parts[False])
        if parts[True]:
            val[label] = Found(parts[True], [], [])
    rest = f"{listing.layout}, {share:.3g} of it by a hash of file names"
    return {"train": listing._replace(classes=train), "val": Listing(listing.folder, rest, val, [], [], [])}


# --- classes by a file --------------------------------------------------------------------------------------------------


def list_val(root: Path, seen: Callable[[], object]) -> Listing:
    """val/: class folders, or pictures without them and a file that says of which class each is."""
    with os.scandir(root / "val") as entries:
        kept = [entry for entry in entries if not is_of_a_system(entry.name)]
    folders = [entry.name for entry in kept if entry.is_dir()]
    has_loose = any(entry.name.lower().endswith(EXTENSIONS) for entry in kept if entry.is_file())
    labels = label_file(root)
    is_flat = (has_loose and not folders) or (folders == ["images"] and labels is not None)
    if not is_flat:
        return list_classes(root, "val", seen)
    found = find_pictures(root / "val", "val/", seen)
    if labels is None:
        raise ValueError(
            f"{root / 'val'}: its {len(found.pictures):,} pictures lie in no class folders, and nothing says their classes: "
            f"put {TABLE}, {LINES[0]} (a picture and its class in each line) or {TRUTH} with {META} there, or sort them"
        )
    strangers = [name for name in found.strangers if root / name != labels]
    where = "val/images/*" if folders else "val/*"
    return Listing("val", f"{where} with classes by {labels.name}", by_class(root, found.pictures, labels), [], strangers, [])


def label_file(root: Path) -> Path | None:
    """Where it is said of which classes the pictures in val/ are, as ImageNet's copies have it; None if nowhere."""
    above = [Path(os.path.realpath(root), *[".."] * steps) for steps in range(1, UP_TO_TABLE + 1)]
    candidates = [folder / name for name in (*LINES, TABLE, TRUTH) for folder in (root / "val", root)]
    candidates += [folder / TABLE for folder in above]
    candidates += [root / DEVKIT / TRUTH]
    return next((path for path in candidates if path.is_file()), None)


def by_class(root: Path, pictures: list[str], labels: Path) -> dict[str, Found]:
    """Pictures by the class that a file says.

    A picture is looked up by its name, then by that without the ending. ValueError for pictures of which the file says nothing
    or several things, for two pictures that one of its names may mean, and for damaged files.
    """
    if labels.name == TRUTH:
        ordered = sorted(stem(name.rpartition("/")[2]) for name in pictures)
        said = list(zip(ordered, read_truth(labels, len(pictures)), strict=True))
    else:
        said = read_table(labels) if labels.name == TABLE else read_lines(labels)
    bare = [name.rpartition("/")[2] for name in pictures]
    whole, shortened = set(bare), defaultdict(dict)  # names of pictures; name that is said -> classes, in their order
    for name, label in said:
        shortened[name if name in whole else stem(name)][label] = None
    meant: dict[str, str] = {}  # name that is said -> picture
    classes: dict[str, list[str]] = defaultdict(list)
    for name, short in zip(pictures, bare, strict=True):
        key = short if short in shortened else stem(short)
        several = list(shortened.get(key, ()))
        if not several:
            raise ValueError(f"{root / name}: {labels} does not say of which class it is: add it there, or remove it")
        if len(several) > 1:
            both = f"{several[0]!r} and {several[1]!r}"
            raise ValueError(f"{root / name}: {labels} says that it is of the classes {both}: leave one of them there")
        if meant.setdefault(key, name) != name:
            raise ValueError(
                f"{root / name}: {labels} has {key!r} for it and {root / meant[key]}: give names with their endings there, "
                "or rename one of the two"
            )
        classes[several[0]].append(name)
    return {label: Found(sorted(classes[label]), [], []) for label in sorted(classes)}


def stem(name: str) -> str:
    """val_0.JPEG -> val_0; some files name pictures so, others with the ending."""
    return name.rpartition(".")[0] if name.lower().endswith(EXTENSIONS) else name


def read_table(path: Path) -> list[tuple[str, str]]:
    """Kaggle's: ImageId and PredictionString, of which the first word is the class."""
    with open(path, newline="", errors="surrogateescape") as file:
        rows = csv.reader(file)
        if next(rows, None) != ["ImageId", "PredictionString"]:
            raise ValueError(f"{path}: its first line is not ImageId,PredictionString: give Kaggle's file")
        return [(row[0].rpartition("/")[2], first_word(row[1:2], path, rows.line_num)) for row in rows if row]


def read_lines(path: Path) -> list[tuple[str, str]]:
    """A picture's name and its class in each line; what follows is left alone."""
    lines = enumerate(path.read_text(errors="surrogateescape").splitlines(), start=1)
    split = ((number, words) for number, line in lines if (words := line.split()))
    return [(words[0].rpartition("/")[2], first_word(words[1:2], path, number)) for number, words in split]


def first_word(words: list[str], path: Path, line: int) -> str:
    if not words or not words[0].split():
        raise ValueError(f"{path}: line {line} names a picture and no class: give both")
    return words[0].split()[0]


def read_truth(path: Path, count: int) -> list[str]:
    """ImageNet's development kit: a number for each picture in the order of names, and what it means in meta.mat beside it."""
    meta = path.with_name(META)
    if not meta.is_file():
        raise ValueError(
            f"{path}: holds numbers, and {META} of the development kit, which says their classes, is not beside it: "
            f"put it there, or give {TABLE} or {LINES[0]} (a picture and its class in each line) instead"
        )
    numbers, classes = path.read_text(errors="surrogateescape").split(), read_meta(meta)
    if len(numbers) != count:
        raise ValueError(f"{path}: has {len(numbers):,} lines, val/ has {count:,} pictures: give all of both")
    unknown = next((number for number in numbers if number not in classes), None)
    if unknown is not None:
        raise ValueError(f"{path}: {unknown} is no class of {meta}: give the files of one development kit")
    return [classes[number] for number in numbers]


def read_meta(path: Path) -> dict[str, str]:
    """{"1": "n02119789"}; no object in the file is made."""
    from scipy.io import loadmat  # which takes long to import, and is needed here alone

    try:
        synsets = loadmat(path, squeeze_me=True, variable_names=["synsets"])["synsets"]
        return {str(int(number)): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except Exception as error:  # whatever its reader raises: the name of the file is what helps
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: not the {META} of ImageNet's development kit ({reason}): copy it again") from error
