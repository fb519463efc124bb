"""Images from data sets as the Hugging Face hub has them: parquet files, webdataset tars, and what `save_to_disk` wrote.

The package `datasets` reads them: it keeps a copy as Arrow tables in its cache, maps these into memory, and gives any row by
its number; nothing is streamed. Pictures come as the bytes that are stored, for the one reader of pictures (pictures.py).
Nothing in a data set is executed: one with scripts, or of files that can hold more than data, is refused, and a picture that is
but a path to somewhere else is not opened.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import HfApi, errors

from models.hub import HUB_ERRORS, LOG_IN, HubName
from models.storage import first_line
from utils.data.images import ImageFiles

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


class Row(NamedTuple):
    """One picture of a split; as str what messages call it."""

    rows: "Rows"
    index: int

    def read(self) -> bytes:
        """ValueError where the data set has no bytes for it."""
        value = self._value()
        if not value or value["bytes"] is None:
            raise ValueError("the data set holds no bytes of it")
        return value["bytes"]

    def __str__(self) -> str:
        name = (self._value() or {}).get("path")
        return f"{self.rows.title}, row {self.index}{f' ({name})' if name else ''}"

    def _value(self) -> dict[str, Any] | None:
        return self.rows.dataset[self.index][self.rows.column]


@dataclass(frozen=True)
class Rows(Sequence):
    """The pictures of a split in the order of its rows; title: what messages call the split."""

    title: str
    dataset: "Dataset"  # of this column alone, not decoded
    column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.title}: has no row {index}")
        return Row(self, int(index))

    def listing(self) -> Iterator[str]:
        """The name of every picture and how many bytes it has, without reading these."""
        import pyarrow.compute as compute

        for table in self.dataset.with_format("arrow").iter(1000):
            pictures = table.column(self.column)
            names, contents = (compute.struct_field(pictures, part) for part in ("path", "bytes"))
            for name, length in zip(names.to_pylist(), compute.binary_length(contents).to_pylist(), strict=True):
                yield f"{name} {length}"


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


def read_hub_set(source: str, columns: Columns = FOUND_BY_TYPE) -> tuple[ImageFiles, ImageFiles]:
    """The splits train and validation (else val, else test) of a data set.

    Classes are those that the label column names, else its integers 0, 1, ... as words. FileNotFoundError where there is no
    such data set, ValueError where it lacks a split, a column, a picture or a label, or cannot be read.
    """
    name = check_hub_set(source)
    if name.split:
        raise ValueError(f"{source}: training takes two splits, train and validation: leave :{name.split} out")
    splits = _load(source, name)
    held_out = next((split for split in HELD_OUT if split in splits), None)
    if "train" not in splits or held_out is None:
        raise ValueError(
            f"{source}: has the splits {', '.join(splits)}, but train is needed, and validation, val or test: "
            "name the files so, as in train-0.parquet and validation-0.parquet"
        )
    train, val = (_rows(source, split, splits[split], columns.image) for split in ("train", held_out))
    train_names, train_labels = _labels(train.title, splits["train"], columns.label)
    val_names, val_labels = _labels(val.title, splits[held_out], columns.label)
    if train_names is not None and val_names not in (None, train_names):
        raise ValueError(f"{val.title}: names its classes otherwise than the split train: give both the same names")
    if train_names is None and max(train_labels) >= len(train_labels):
        raise ValueError(
            f"{train.title}: label {max(train_labels)} in {len(train_labels)} rows: classes are numbered from 0 on: "
            "number them anew, or give another --label_column"
        )
    names = [str(label) for label in range(max(train_labels) + 1)] if train_names is None else train_names
    for rows, labels in ((train, train_labels), (val, val_labels)):
        wrong = next((row for row, label in enumerate(labels) if label >= len(names)), None)
        if wrong is not None:
            raise ValueError(f"{rows[wrong]}: label {labels[wrong]} of {len(names)} classes: mend it, or remove the row")
    return ImageFiles(train, train_labels, names), ImageFiles(val, val_labels, names)


def read_hub_images(source: str, image_column: str = "") -> Rows:
    """The pictures of one split, the one that the source names or the only one. Errors as above."""
    name = check_hub_set(source)
    splits = _load(source, name)
    split = name.split or next(iter(splits))
    if split not in splits or (not name.split and len(splits) > 1):
        example = next((split for split in HELD_OUT if split in splits), next(iter(splits)))
        wanted = f"no split {name.split}, but" if name.split else "the splits"
        raise ValueError(f"{source}: has {wanted} {', '.join(splits)}: name one of them, as in {PREFIX}...:{example}")
    return _rows(source, split, splits[split], image_column)


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


def _rows(source: str, split: str, dataset: "Dataset", wanted: str) -> Rows:
    """The pictures of a split. ValueError where there are none, or it is not clear in which column."""
    from datasets import Image, Value

    title = f"{source.removesuffix(f':{split}')}, split {split}"
    if not len(dataset):
        raise ValueError(f"{title}: has no rows: give one that has")
    features = dataset.features
    stored = ({"bytes": Value("binary"), "path": Value("string")}, Value("binary"), Image(), Image(decode=False))
    found = [wanted] if wanted else [column for column, feature in features.items() if isinstance(feature, Image)]
    if len(found) != 1 or found[0] not in features or features[found[0]] not in stored:
        raise ValueError(f"{title}: {_choice('pictures', '--image_column', found, features)}")
    (column,) = found
    return Rows(title, dataset.select_columns([column]).cast_column(column, Image(decode=False)), column)


def _labels(title: str, dataset: "Dataset", wanted: str) -> tuple[list[str] | None, list[int]]:
    """Names of the classes, where the column has them, and the label of every row, 0 or more."""
    from datasets import ClassLabel, Value

    features = dataset.features
    integers = [column for column, kind in features.items() if isinstance(kind, Value) and "int" in kind.dtype]
    named = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    found = [wanted] if wanted else named or [column for column in LABELS if column in integers]
    if len(found) != 1 or found[0] not in (*named, *integers):
        raise ValueError(f"{title}: {_choice('labels', '--label_column', found, features)}")
    (column,) = found
    labels = dataset.select_columns([column])[:][column]
    wrong = next((row for row, label in enumerate(labels) if label is None or label < 0), None)
    if wrong is not None:
        raise ValueError(f"{title}, row {wrong}: has the label {labels[wrong]}: mend it, or give a split or set with labels")
    return features[column].names if column in named else None, labels


def _choice(what: str, flag: str, found: list[str], features: dict) -> str:
    """Why it is not clear which column, and what there is."""
    there = ", ".join(f"{column} ({getattr(kind, 'dtype', type(kind).__name__)})" for column, kind in features.items())
    if len(found) > 1:
        return f"has several columns of {what} among {there}: choose one by {flag}={found[0]}"
    if found:
        return f"{flag}={found[0]}: no such column of {what} among {there}: give another"
    return f"has no column that is surely of {what} among {there}: name it by {flag}"
