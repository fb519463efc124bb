"""Data sets of parquet files, of webdataset tars and as `save_to_disk` writes them: the same images as in class folders."""

import io
import json
import pickle
import shutil
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from commands import CLASSES, SMALL, ImageFlags, assert_same_training, make_images, run_in_process, script
from hub_server import Hub
from huggingface_hub import constants
from PIL import Image

import train
from dist import Ranks
from models.storage import read_description
from utils.data.batches import val_batches
from utils.data.hub_sets import Columns, read_hub_images, read_hub_set
from utils.data.images import Images, listing_hash, read_folders
from utils.data.pictures import read_picture
from utils.data.token_cache import read_manifest
from utils.metrics.image_sets import open_images
from utils.runs.checkpoints import checkpoints
from utils.runs.listing import images_of

WHITE = (255, 255, 255)
SPLITS = {"train": "train", "val": "validation"}  # of a folder, and on the hub
FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
KINDS = ("parquet", "tar", "saved")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The package keeps its copies here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twelve images, nine to train on: as class folders, and in the same order in data sets of every kind."""
    root = tmp_path_factory.mktemp("sets")
    make_images(root / "folder", train=3, val=1)
    splits = {}
    for split, name in SPLITS.items():
        paths = [path for label in CLASSES for path in sorted((root / "folder" / split / label).iterdir())]
        labels = [CLASSES.index(path.parent.name) for path in paths]
        splits[name] = table(paths, labels)
        write_parquet(root / "parquet", {name: splits[name]})
        write_tar(root / "tar" / f"{name}-00.tar", paths, labels)
    datasets.DatasetDict(splits).save_to_disk(root / "saved")
    return root


def table(paths: list[Path], labels: list, features: dict = FEATURES) -> datasets.Dataset:
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=datasets.Features(features))


def write_parquet(directory: Path, splits: dict[str, datasets.Dataset]) -> str:
    (directory / "data").mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(directory / "data" / f"{name}-00000-of-00001.parquet")
    return f"hf:{directory}"


def write_tar(path: Path, paths: list[Path], labels: list[int]) -> None:
    """As webdataset lays it out: members of the same name but for their endings make a row."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for picture, label in zip(paths, labels, strict=True):
            for ending, contents in (("png", picture.read_bytes()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{picture.parent.name}/{picture.stem}.{ending}")
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))


@pytest.fixture
def command(monkeypatch, capsys):
    """Any command in this process: exit code, stdout and stderr."""
    return lambda main, *words: run_in_process(main, words, monkeypatch, capsys)


# --- the same images as in folders --------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_folder(root, tokenizer, command, tmp_path):
    """To the byte, with two crops of each image; only parquet and save_to_disk know the names of classes."""
    encode, caches = script("cache_tokens").main, {}
    for kind in ("folder", *KINDS):
        source = root / "folder" if kind == "folder" else f"hf:{root / kind}"
        words = ["--vae", tokenizer, "--data_path", source, "--out", tmp_path / kind, "--views=2", "--hflip"]
        code, _, errors = command(encode, *words)
        assert code == 0, errors
        caches[kind] = {path.name: path.read_bytes() for path in (tmp_path / kind).glob("*.npy")}
    assert len(caches["folder"]) == 6
    assert all(caches[kind] == caches["folder"] for kind in KINDS)
    names = {kind: read_manifest(tmp_path / kind).class_names for kind in caches}
    assert names == {"folder": list(CLASSES), "parquet": list(CLASSES), "saved": list(CLASSES), "tar": ["0", "1", "2"]}


def test_scores_are_those_of_the_folder(root, command, tmp_path):
    for split, name in SPLITS.items():
        images = [open_images(root / "folder" / split), *(open_images(f"hf:{root / kind}:{name}") for kind in KINDS)]
        batches = [next(images.batches(9)) for images in images]
        assert all(np.array_equal(batch, batches[0]) for batch in batches)
    evaluate, scores = script("evaluate").main, {}
    for kind in ("folder", "parquet"):
        samples, reference = (
            (root / "folder" / split if kind == "folder" else f"hf:{root / kind}:{name}") for split, name in SPLITS.items()
        )
        words = [samples, reference, "--real", samples, "--k=1", "--extractor=efflite0", "--json", tmp_path / "scores.json"]
        code, _, errors = command(evaluate, *words, "--overwrite")
        assert code == 0, errors
        scores[kind] = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["folder"]["real"]["images"] == 9
    assert scores["parquet"] == scores["folder"]


def test_training_is_that_of_the_folder(root, tokenizer, command, tmp_path):
    """With a process that loads; the checkpoint has the names of the classes."""
    for kind in ("folder", "parquet"):
        source = root / "folder" if kind == "folder" else f"hf:{root / kind}"
        words = [*SMALL, "--workers=1", "--vae", tokenizer, "--data_path", source, "--local_out_dir_path", tmp_path / kind]
        code, _, errors = command(train.main, *words)
        assert code == 0, errors
    assert_same_training(tmp_path / "folder", tmp_path / "parquet")
    assert read_description(checkpoints(tmp_path / "parquet")[-1]).class_names == list(CLASSES)


def test_a_tokenizer_trains_on_rows(root, command, tmp_path):
    words = ["--preset=f8-32", "--bs=3", "--max_steps=1", "--gan=0", "--data_path", f"hf:{root / 'tar'}", "--out", tmp_path]
    code, output, errors = command(script("train_tokenizer").main, *words, "--label_column=cls", "--image_column=png")
    assert code == 0, errors
    assert "9 images" in output


def test_a_process_of_its_own_reads_the_same_rows(root):
    """Tables are handed to it as names of files, not as what is in them."""
    files, _ = read_hub_set(f"hf:{root / 'parquet'}")
    other = pickle.loads(pickle.dumps(files))
    pixels = [[np.asarray(pictures.picture(row, WHITE)) for row in range(9)] for pictures in (files, other)]
    assert np.array_equal(*pixels)
    assert (root / "folder" / "train" / "cat" / "0.png").read_bytes() not in pickle.dumps(files)
    folder, _ = read_folders(root / "folder")
    pairs = [next(val_batches(Images(images, 16), 9, workers=1)) for images in (files, folder)]
    assert all(ours.equal(theirs) for ours, theirs in zip(*pairs, strict=True))


# --- pictures -----------------------------------------------------------------------------------------------------------


def test_pictures_are_read_as_from_files(tmp_path):
    """EXIF data, 16 bits and transparency: the reader is the same; a table of bytes alone has its column named."""
    values = np.arange(48, dtype=np.uint8).reshape(4, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(values).save(tmp_path / "0.png", exif=exif)
    Image.fromarray(values.astype(np.uint16) * 1000).save(tmp_path / "1.png")
    Image.fromarray(np.stack([values] * 4, axis=2)).save(tmp_path / "2.png")
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    (tmp_path / "table").mkdir()
    contents = {"data": [path.read_bytes() for path in paths], "n": [0, 1, 2]}
    datasets.Dataset.from_dict(contents).to_parquet(tmp_path / "table" / "train.parquet")
    rows = read_hub_images(f"hf:{tmp_path / 'table'}", "data")
    assert len(rows) == 3
    for row, path in enumerate(paths):
        assert np.array_equal(np.asarray(rows.picture(row, (255, 0, 0))), np.asarray(read_picture(path, (255, 0, 0))))
    assert rows.picture(0, WHITE).size == (4, 12)


def test_a_broken_picture_is_named(root, tmp_path):
    """By split, row and name, in training and in scores; of a path without bytes the file is not opened."""
    paths = sorted((root / "folder" / "train" / "cat").iterdir())
    images = [{"bytes": paths[0].read_bytes(), "path": "a.png"}, {"bytes": b"none", "path": "deep/b.png"}]
    images += [{"bytes": None, "path": str(paths[0])}, None]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0] * 4}, features=datasets.Features(FEATURES))
    source = write_parquet(tmp_path / "set", {"train": rows, "validation": rows})
    files, _ = read_hub_set(source)
    images = Images(files, 16)
    told = [str(images[(0, row)]) for row in (1, 2, 3)]
    assert told == [
        f"{source}, split train, row 1 (deep/b.png): not a readable image (cannot identify image file): repair or remove it",
        f"{source}, split train, row 2 ({paths[0]}): not a readable image (the data set holds no bytes of it): "
        "repair or remove it",
        f"{source}, split train, row 3: not a readable image (the data set holds no bytes of it): repair or remove it",
    ]
    with pytest.raises(ValueError, match=r"split train, row 1 \(deep/b.png\): not a readable image"):
        list(open_images(f"{source}:train").batches(2))


def test_bad_rows_are_left_out_and_keep_their_numbers(root, tmp_path):
    """--skip_bad, as for folders: what is left out is noted by the rows of the data set, and rows after it keep their names."""
    splits = dict(datasets.load_from_disk(root / "saved"))
    images = splits["train"].cast_column("image", datasets.Image(decode=False))["image"][:]
    images[4] = {"bytes": b"none", "path": "bad.png"}
    features = datasets.Features(FEATURES | {"label": datasets.ClassLabel(names=[*CLASSES, "owl"])})  # of which there is none
    splits = {
        "train": datasets.Dataset.from_dict({"image": images, "label": splits["train"]["label"][:]}, features=features),
        "validation": splits["validation"].cast(features),
    }
    source = write_parquet(tmp_path / "set", splits)
    flags = ImageFlags(source)
    ours, val, told = images_of(flags, Ranks(0, 1, torch.device("cpu")), tmp_path / "skipped.json")
    assert (len(ours), len(val), ours.labels.tolist()) == (8, 3, [0, 0, 0, 1, 1, 2, 2, 2])
    assert [ours.name(row).partition("row ")[2] for row in (3, 4)] == ["3 (0.png)", "5 (2.png)"]
    assert told[0] == f"{source}: 9 images of 4 classes (split train), 3 held out (split validation)"
    assert told[2].startswith(f"left out: {source}, split train, row 4 (bad.png): not a readable image")
    assert list(json.loads((tmp_path / "skipped.json").read_text())["train"]) == ["4"]
    whole, _ = read_hub_set(source)
    listed = list(whole.listing())
    assert list(ours.listing()) == listed[:4] + listed[5:]
    assert np.array_equal(np.asarray(ours.picture(4, WHITE)), np.asarray(whole.picture(5, WHITE)))


def test_a_share_of_the_rows_is_held_out(root, tmp_path):
    """Where train is the only split: each row is in one of the parts, and the same ones wherever the set lies."""
    source = without_val(root, tmp_path / "set")
    whole, _ = read_hub_set(f"hf:{root / 'parquet'}")
    parts = read_hub_set(source, val_share=0.3)
    assert sorted(np.concatenate([part.rows for part in parts])) == list(range(9))
    assert all(part.labels.tolist() == whole.labels[part.rows].tolist() for part in parts)
    held_out = [int.from_bytes(sha256(str(row).encode()).digest()[:8], "big") < 0.3 * 2**64 for row in range(9)]
    assert parts[1].rows.tolist() == np.flatnonzero(held_out).tolist()
    with pytest.raises(ValueError, match="--val_share=0.001 holds out none of its images: give a larger share"):
        read_hub_set(source, val_share=0.001)
    with pytest.raises(ValueError, match="no images of class 'cat' left to train on, at this --val_share: give a smaller one"):
        read_hub_set(source, val_share=0.99)
    with pytest.raises(ValueError, match="--val_share=0.3, but it has the split validation: leave the flag out"):
        read_hub_set(f"hf:{root / 'parquet'}", val_share=0.3)


def test_only_folders_are_checked(command):
    code, _, errors = command(script("check_data").main, "hf:me/set")
    assert code == 1
    assert errors == (
        "command: error: hf:me/set: only folders are looked at here: train with --skip_bad, which names bad pictures\n"
    )


# --- which data sets ----------------------------------------------------------------------------------------------------


def test_what_a_cache_is_of_does_not_depend_on_the_place(root, tokenizer, command, tmp_path):
    """Moved, it is resumed; with other pictures of the same number it is refused."""
    sources = [f"hf:{root / 'parquet'}", f"hf:{shutil.copytree(root / 'parquet', tmp_path / 'moved')}"]
    hashes = {listing_hash(*read_hub_set(source)) for source in sources}
    assert len(hashes) == 1
    words = ["--vae", tokenizer, "--out", tmp_path / "cache"]
    assert command(script("cache_tokens").main, *words, "--data_path", sources[0])[0] == 0
    begun = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    (tmp_path / "cache" / "manifest.json").unlink()
    (tmp_path / "cache" / "val_00000_tokens.npy").unlink()
    del begun["hashes"]
    (tmp_path / "cache" / "plan.json").write_text(json.dumps(begun))
    splits = datasets.load_from_disk(root / "saved")
    other = write_parquet(
        tmp_path / "other", {"train": splits["train"].select([0, *range(8)]), "validation": splits["validation"]}
    )
    code, _, errors = command(script("cache_tokens").main, *words, "--data_path", other)
    assert code == 1
    assert "an unfinished cache with hash of file names" in errors
    assert command(script("cache_tokens").main, *words, "--data_path", sources[1])[0] == 0


def labelled(labels: list, features: dict = FEATURES):
    """A way to write a data set with these labels of six rows."""

    def write(root: Path, directory: Path) -> str:
        paths = sorted((root / "folder" / "train").rglob("*.png"))[:6]
        rows = table(paths, labels, features)
        return write_parquet(directory, {"train": rows, "validation": rows})

    return write


def with_file(name: str, contents: bytes = b"raise SystemExit('run')"):
    """A data set beside which, or in place of a file of which, this file lies."""

    def write(root: Path, directory: Path) -> str:
        shutil.copytree(root / "parquet", directory)
        (directory / name).write_bytes(contents)
        return f"hf:{directory}"

    return write


def of_pickles(root: Path, directory: Path) -> str:
    for split in SPLITS:
        (directory / split).mkdir(parents=True)
        (directory / split / "data.pkl").write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit(\"run\")'\ntR.")
    return f"hf:{directory}"


def without_val(root: Path, directory: Path) -> str:
    return write_parquet(directory, {"train": datasets.load_from_disk(str(root / "saved"))["train"]})


INTEGERS = FEATURES | {"label": datasets.Value("int64")}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (with_file("set.py"), "set/set.py: scripts of data sets are not run"),
        (with_file("data/train-00000-of-00001.parquet"), "set: not a data set that can be read ("),
        (of_pickles, "set: not a data set that can be read ("),
        (lambda root, directory: f"hf:{root / 'folder'}", "folder: not a data set that can be read (its files are neither "),
        (lambda root, directory: f"hf:{root / 'parquet'}:train", "takes two splits, train and validation: leave :train out"),
        (lambda root, directory: f"hf:{root / 'missing'}", "missing: no such directory, and no OWNER/NAME"),
        (without_val, "has the splits train, but train is needed, and validation, val or test"),
        (labelled([0, 1, 2, -1, 0, 0], INTEGERS), "split train, row 3: has the label -1"),
        (labelled([0, 1, None, 1, 0, 0]), "split train, row 2: has the label None"),
        (labelled([0, 1, 2, 7, 0, 0], INTEGERS), "label 7 in 6 rows: classes are numbered from 0 on"),
        (labelled(list("abcabc"), FEATURES | {"label": datasets.Value("string")}), "no column that is surely of labels among"),
    ],
    ids=["script", "damaged", "pickles", "folder", "split", "missing", "no val", "negative", "none", "large", "words"],
)  # fmt: skip
def test_what_is_no_data_set_for_training_is_told_in_one_line(write, message, root, command, tmp_path):
    source = write(root, tmp_path / "set")
    code, _, errors = command(script("cache_tokens").main, "--vae=none", "--data_path", source, "--out", tmp_path / "out")
    lines = [line for line in errors.splitlines() if line.startswith("command: error: ")]
    assert code == 1
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_columns_are_found_or_named(root, tmp_path):
    splits = datasets.load_from_disk(root / "saved")
    splits = splits.map(lambda row: {"crop": row["image"], "coarse": 0}, features=datasets.Features(
        FEATURES | {"crop": datasets.Image(), "coarse": datasets.ClassLabel(names=["animal"])}
    ))  # fmt: skip
    source = write_parquet(tmp_path / "set", splits)
    with pytest.raises(ValueError, match="has several columns of pictures among image .*: choose one by --image_column=image"):
        read_hub_set(source)
    with pytest.raises(ValueError, match="has several columns of labels among .*: choose one by --label_column=label"):
        read_hub_set(source, columns=Columns("crop"))
    with pytest.raises(ValueError, match="--label_column=image: no such column of labels"):
        read_hub_set(source, columns=Columns("crop", "image"))
    train_files, _ = read_hub_set(source, columns=Columns("crop", "coarse"))
    assert (train_files.class_names, train_files.labels.tolist()) == (["animal"], [0] * 9)
    with pytest.raises(ValueError, match="has the splits train, validation: name one of them"):
        read_hub_images(source)


def test_without_the_package_it_is_told_what_to_install(root, command, monkeypatch, tmp_path):
    words = [f"hf:{root / 'parquet'}:train", root / "folder" / "val"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, errors = command(script("evaluate").main, *words)
    assert code == 1
    assert errors == "command: error: hf: needs the package datasets, which is not installed: pip install --upgrade datasets\n"
    # there, but not with what is installed beside it
    monkeypatch.delitem(sys.modules, "datasets")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "datasets.py").write_text("raise ImportError('pyarrow requires NumPy 2.0')")
    code, _, errors = command(script("evaluate").main, *words)
    assert "which cannot be imported (pyarrow requires NumPy 2.0): pip install --upgrade datasets" in errors


def test_a_folder_has_no_columns(root, command, tmp_path):
    code, _, errors = command(train.main, *SMALL, "--data_path", root / "folder", "--image_column=image")
    assert code == 1
    assert "a folder has no columns: leave --image_column and --label_column out" in errors


# --- names on the hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.stop()


def test_a_name_that_the_hub_does_not_know_is_told(hub):
    with pytest.raises(
        FileNotFoundError, match="hf:me/none: no such directory, and not to be had from the hub .*check the spelling"
    ):
        read_hub_set("hf:me/none")


def test_without_the_hub_the_copy_from_before_is_taken(hub, root, tmp_path, capsys):
    """Asked once, not again and again; which revision a copy is of is not known."""
    hub.broken = True
    with pytest.raises(FileNotFoundError, match="hub is out of reach .*there is no copy from before.*check the network"):
        read_hub_set("hf:me/known")
    assert len(hub.requests) == 1
    # as the package leaves it
    builder = datasets.load_dataset_builder(str(root / "parquet"))
    builder.download_and_prepare()
    place = Path(builder.cache_dir)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    target = cache / "me___known" / Path(*place.relative_to(cache).parts[1:])
    shutil.copytree(place, target)
    for path in target.glob("parquet-*"):
        path.rename(target / path.name.replace("parquet-", "known-", 1))
    files, _ = read_hub_set("hf:me/known")
    assert list(files.listing()) == list(read_hub_set(f"hf:{root / 'parquet'}")[0].listing())
    assert "me/known: the hub is out of reach" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="copies do not say of which revision they are"):
        read_hub_set("hf:me/known@v1")
