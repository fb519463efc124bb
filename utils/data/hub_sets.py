"""Images from data sets as the Hugging Face hub has them: parquet files, webdataset tars, and what `save_to_disk` wrote.

The package `datasets` reads them: it keeps a copy as Arrow tables in its cache, maps these into memory, and gives any row by
its number; nothing is streamed. Pictures come as the bytes that are stored, for the one reader of pictures (pictures.py).
Nothing in a data set is executed: one with scripts, or of files that can hold more than data, is refused, and a picture that is
but a path to somewhere else is not opened.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from huggingface_hub import HfApi, errors
from PIL import Image

from models.hub import HUB_ERRORS, LOG_IN, HubName
from models.storage import first_line
from utils.data.layouts import is_held_out
from utils.data.pictures import read_picture

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf:"
DATA_PATH_HELP = (
    "directory with train/<class>/* and val/<class>/*, or a data set of parquet files or webdataset tars: "
    "hf:DIRECTORY or hf:OWNER/NAME[@REVISION] on the hub"
)
IMAGE_COLUMN_HELP = "hf: column of the pictures; empty: the only one of images"
LABEL_COLUMN_HELP = "hf: column of the labels; empty: the only one of classes, or integers called label, labels, class or cls"
HELD_OUT = ("validation", "val", "test")  # names of the split to validate on, the first that there is
LABELS = ("label", "labels", "class", "cls")
SAVED = ("dataset_dict.json", "state.json")  # written by save_to_disk, of several splits and of one
INSTALL = "pip install --upgrade datasets"
LONGEST_REASON = 300  # letters
LARGEST = np.iinfo(np.int64).max  # label
PATIENCE = 10.0  # seconds for the hub's first answer


class Columns(NamedTuple):
    """Names of columns; empty: to be found by their types and names."""

    image: str = ""
    label: str = ""


FOUND_BY_TYPE = Columns()


class SetName(NamedTuple):
    """hf:DIRECTORY[:SPLIT] or hf:OWNER/NAME[@REVISION][:SPLIT]."""

    place: str
    revision: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, source: str) -> "SetName":
        """FileNotFoundError where it is neither a directory nor can be a name on the hub."""
        text = source.removeprefix(PREFIX)
        before, _, after = text.rpartition(":")
        for directory, split in ((text, None), (before, after)):
            if directory and Path(directory).expanduser().is_dir():
                # as a whole path, which cannot be taken for a name
                return cls(os.path.abspath(Path(directory).expanduser()), None, split)
        name = HubName.parse(text)
        if name is None:
            raise FileNotFoundError(f"{source}: no such directory, and no OWNER/NAME as the hub has them: check the spelling")
        return cls(*name)

    @property
    def is_here(self) -> bool:
        return os.path.isabs(self.place)


@dataclass(frozen=True)
class HubImages:
    """Pictures of a split, or some of them, in the order of its rows: `Pictures` (images.py).

    rows: (N,) int64, their numbers in the split, by which messages call them; labels: (N,) int64.
    """

    root: str
    layout: str
    dataset: "Dataset"  # of this column alone, not decoded
    column: str
    rows: np.ndarray
    labels: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self._called(index, self._value(index))

    def picture(self, index: int, background: tuple[int, int, int]) -> Image.Image:
        value = self._value(index)
        name, contents = self._called(index, value), value.get("bytes")
        if contents is None:
            raise ValueError(f"{name}: not a readable image (the data set holds no bytes of it): repair or remove it")
        return read_picture(name, background, contents)

    def listing(self) -> Iterator[str]:
        """The name of every picture and how many bytes it has, without reading these."""
        import pyarrow.compute as compute

        entries: list[str] = []
        for table in self.dataset.with_format("arrow").iter(1000):
            pictures = table.column(self.column)
            names, contents = (compute.struct_field(pictures, part) for part in ("path", "bytes"))
            lengths = compute.binary_length(contents)
            entries += [f"{name} {length}" for name, length in zip(names.to_pylist(), lengths.to_pylist(), strict=True)]
        return (entries[row] for row in self.rows)

    def take(self, rows: np.ndarray) -> "HubImages":
        return replace(self, rows=self.rows[rows], labels=self.labels[rows])

    def _value(self, index: int) -> dict[str, Any]:
        return self.dataset[int(self.rows[index])][self.column] or {}

    def _called(self, index: int, value: dict[str, Any]) -> str:
        inside = f" ({value['path']})" if value.get("path") else ""
        return f"{self.root}, {self.layout}, row {self.rows[index]}{inside}"


def is_hub_set(source: str | Path) -> bool:
    return str(source).startswith(PREFIX)


def check_hub_set(source: str) -> SetName:
    """A cheap look before anything is loaded.

    ValueError where the package is missing or the directory has scripts, FileNotFoundError where there is no such directory.
    """
    _library()
    name = SetName.parse(source)
    script = next(iter(sorted(Path(name.place).rglob("*.py"))), None) if name.is_here else None
    if script is not None:
        raise ValueError(f"{script}: scripts of data sets are not run: give parquet files or tars alone, or remove it")
    return name


def read_hub_set(source: str, val_share: float = 0.0, columns: Columns = FOUND_BY_TYPE) -> tuple[HubImages, HubImages]:
    """The splits train and validation (else val, else test) of a data set; val_share: held out of train where it has but that.

    Classes are those that the label column names, else its integers 0, 1, ... as words. FileNotFoundError where there is no
    such data set, ValueError where it lacks a split, a column, a picture or a label, or cannot be read.
    """
    name = check_hub_set(source)
    if name.split:
        raise ValueError(f"{source}: training takes two splits, train and validation: leave :{name.split} out")
    splits = _load(source, name)
    held_out = next((split for split in HELD_OUT if split in splits), None)
    if held_out and val_share:
        raise ValueError(f"{source}: --val_share={val_share:g}, but it has the split {held_out}: leave the flag out")
    if "train" not in splits or not (held_out or val_share):
        raise ValueError(
            f"{source}: has the splits {', '.join(splits)}, but train is needed, and validation, val or test: name the files "
            "so, as in train-0.parquet and validation-0.parquet, or give --val_share=0.02 to hold out some of train"
        )
    train = _labelled(source, "train", splits["train"], columns)
    if held_out is None:
        return _held_out(train, val_share)
    return train, _labelled(source, held_out, splits[held_out], columns, train.class_names)


def read_hub_images(source: str, image_column: str = "") -> HubImages:
    """The pictures of one split, the one that the source names or the only one, as if of one class. Errors as above."""
    name = check_hub_set(source)
    splits = _load(source, name)
    split = name.split or next(iter(splits))
    if split not in splits or (not name.split and len(splits) > 1):
        example = next((split for split in HELD_OUT if split in splits), next(iter(splits)))
        wanted = f"no split {name.split}, but" if name.split else "the splits"
        raise ValueError(f"{source}: has {wanted} {', '.join(splits)}: name one of them, as in {PREFIX}...:{example}")
    return _pictures(source.removesuffix(f":{split}"), split, splits[split], image_column)


def _held_out(pictures: HubImages, share: float) -> tuple[HubImages, HubImages]:
    """Two parts, by a rule that depends on the numbers of rows alone. ValueError where one of them lacks what it needs."""
    chosen = np.array([is_held_out(str(row), share) for row in pictures.rows])
    layout = f"{pictures.layout}, {share:.3g} of it by a hash of row numbers"
    train, val = pictures.take(np.flatnonzero(~chosen)), pictures.take(np.flatnonzero(chosen))
    emptied = np.setdiff1d(pictures.labels, train.labels)
    if len(emptied):
        label = pictures.class_names[emptied[0]]
        raise ValueError(
            f"{pictures.root}: no images of class {label!r} left to train on, at this --val_share: give a smaller one"
        )
    if not len(val):
        raise ValueError(f"{pictures.root}: --val_share={share:g} holds out none of its images: give a larger share")
    return train, replace(val, layout=layout)


# --- with the package ---------------------------------------------------------------------------------------------------


def _library():
    """The package. ValueError where it cannot be had, or is so old that it runs scripts of data sets."""
    try:
        import datasets
    except ImportError as error:
        is_there = not isinstance(error, ModuleNotFoundError)  # but does not fit what else is installed
        why = f"cannot be imported ({first_line(error)})" if is_there else "is not installed"
        raise ValueError(f"{PREFIX} needs the package datasets, which {why}: {INSTALL}") from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ValueError(f"datasets {datasets.__version__} is installed, which runs scripts of data sets: {INSTALL}")
    return datasets


def _load(source: str, name: SetName) -> "dict[str, Dataset]":
    """All splits, mapped into memory; what has to be downloaded and converted for that is, once."""
    datasets = _library()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if name.is_here and any((Path(name.place) / file).exists() for file in SAVED):
            loaded = datasets.load_from_disk(name.place)
        else:
            loaded = _prepared(name)
    except Exception as error:  # the package passes on whatever a format, a disk, or the hub raises
        raise _complaint(source, name, error) from error
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _prepared(name: SetName) -> "dict[str, Dataset]":
    """Of parquet files or tars."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    distance = "" if name.is_here else _out_of_reach(name)
    if distance:
        return _prepared_before(name, distance)
    builder = datasets.load_dataset_builder(name.place, revision=name.revision)
    if not isinstance(builder, (Parquet, WebDataset)):
        raise ValueError("its files are neither parquet files nor webdataset tars")
    builder.download_and_prepare()
    return builder.as_dataset()


def _prepared_before(name: SetName, distance: str) -> "dict[str, Dataset]":
    """The newest copy in the package's cache of one on the hub, which is at a distance; it is not known of which revision."""
    from datasets.packaged_modules.cache.cache import Cache

    if name.revision:
        raise ConnectionError(f"{distance}, and copies do not say of which revision they are")
    try:
        builder = Cache(dataset_name=name.place.partition("/")[2], repo_id=name.place, version="auto", hash="auto")
    except ValueError as error:
        raise ConnectionError(f"{distance}, and there is no copy from before") from error
    print(f"{PREFIX}{name.place}: {distance}: taking the copy from before", file=sys.stderr)
    builder.download_and_prepare()
    return builder.as_dataset()


def _out_of_reach(name: SetName) -> str:
    """Why the hub cannot be asked for a data set, or empty: the package itself would try for minutes.

    HfHubHTTPError where the hub answers that there is none, or none for this user.
    """
    try:
        HfApi().dataset_info(name.place, revision=name.revision, timeout=PATIENCE)
    except HUB_ERRORS as error:
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if status is not None and status < 500:
            raise
        return f"the hub is out of reach ({first_line(error)})"
    return ""


def _complaint(source: str, name: SetName, error: Exception) -> Exception:
    """What the package raised, in one line with the mend."""
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    reason = " ".join(str(cause).split())[:LONGEST_REASON] or type(cause).__name__
    if name.is_here:
        return ValueError(f"{source}: not a data set that can be read ({reason}): mend it, or give another directory")
    refused = isinstance(error, (errors.HfHubHTTPError, FileNotFoundError))
    mend = f"check the spelling and your access, or {LOG_IN}" if refused else "check the network, or give a directory"
    return FileNotFoundError(f"{source}: no such directory, and not to be had from the hub ({reason}): {mend}")


def _pictures(source: str, split: str, dataset: "Dataset", wanted: str) -> HubImages:
    """Of a split, all labelled 0. ValueError where there are none, or it is not clear in which column."""
    from datasets import Image, Value

    title = f"{source}, split {split}"
    if not len(dataset):
        raise ValueError(f"{title}: has no rows: give one that has")
    features = dataset.features
    stored = ({"bytes": Value("binary"), "path": Value("string")}, Value("binary"), Image(), Image(decode=False))
    found = [wanted] if wanted else [column for column, feature in features.items() if isinstance(feature, Image)]
    if len(found) != 1 or found[0] not in features or features[found[0]] not in stored:
        raise ValueError(f"{title}: {_choice('pictures', '--image_column', found, features)}")
    (column,) = found
    raw = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    rows = np.arange(len(dataset))
    return HubImages(source, f"split {split}", raw, column, rows, np.zeros_like(rows), [""])


def _labelled(source: str, split: str, dataset: "Dataset", columns: Columns, expected: list[str] | None = None) -> HubImages:
    """A split with its labels. expected: names of the classes, None: not known yet. ValueError where labels do not fit them."""
    pictures = _pictures(source, split, dataset, columns.image)
    title = f"{source}, split {split}"
    names, labels = _labels(title, dataset, columns.label)
    if names is None and expected is None:
        if labels.max() >= len(labels):
            raise ValueError(
                f"{title}: label {labels.max()} in {len(labels)} rows: classes are numbered from 0 on: "
                "number them anew, or give another --label_column"
            )
        names = [str(label) for label in range(labels.max() + 1)]
    if None not in (names, expected) and names != expected:
        raise ValueError(f"{title}: names its classes otherwise than the split train: give both the same names")
    names = names or expected
    wrong = np.flatnonzero(labels >= len(names))
    if len(wrong):
        raise ValueError(
            f"{pictures.name(wrong[0])}: label {labels[wrong[0]]} of {len(names)} classes: mend it, or remove the row"
        )
    return replace(pictures, labels=labels, class_names=names)


def _labels(title: str, dataset: "Dataset", wanted: str) -> tuple[list[str] | None, np.ndarray]:
    """Names of the classes, where the column has them, and the label of every row, (N,) int64, 0 or more."""
    from datasets import ClassLabel, Value

    features = dataset.features
    integers = [column for column, kind in features.items() if isinstance(kind, Value) and "int" in kind.dtype]
    named = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    found = [wanted] if wanted else named or [column for column in LABELS if column in integers]
    if len(found) != 1 or found[0] not in (*named, *integers):
        raise ValueError(f"{title}: {_choice('labels', '--label_column', found, features)}")
    (column,) = found
    labels = dataset.select_columns([column])[:][column]
    wrong = next((row for row, label in enumerate(labels) if label is None or not 0 <= label <= LARGEST), None)
    if wrong is not None:
        raise ValueError(f"{title}, row {wrong}: has the label {labels[wrong]}: mend it, or give a split or set with labels")
    return features[column].names if column in named else None, np.array(labels, np.int64)


def _choice(what: str, flag: str, found: list[str], features: dict) -> str:
    """Why it is not clear which column, and what there is."""
    there = ", ".join(f"{column} ({getattr(kind, 'dtype', type(kind).__name__)})" for column, kind in features.items())
    if len(found) > 1:
        return f"has several columns of {what} among {there}: choose one by {flag}={found[0]}"
    if found:
        return f"{flag}={found[0]}: no such column of {what} among {there}: give another"
    return f"has no column that is surely of {what} among {there}: name it by {flag}"
