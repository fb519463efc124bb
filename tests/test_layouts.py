"""Folders as people have them: which files are of which split and class, told by what lies there."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from commands import make_images, run_in_process, script
from scipy.io import savemat

from utils.data.images import Names, listing_hash, read_folders
from utils.data.layouts import SHOWN_FROM, counted

DOG, CAT = "n02084071", "n02121620"


def add(root: Path, *names: str) -> None:
    """Empty files: a listing looks at names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.fixture
def flat(tmp_path):
    """ImageNet as it comes: four validation pictures without folders."""
    add(tmp_path, f"train/{CAT}/0.JPEG", f"train/{DOG}/0.JPEG", f"train/{DOG}/1.JPEG")
    add(tmp_path, *(f"val/ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3, 4)))
    return tmp_path


def held_out(root: Path) -> dict[str, str]:
    """Name below the root -> name of its class."""
    _, val = read_folders(root)
    return {name: val.class_names[label] for name, label in zip(val.names, val.labels, strict=True)}


OF_FLAT = {f"val/ILSVRC2012_val_0000000{number}.JPEG": wnid for number, wnid in ((1, DOG), (2, CAT), (3, DOG), (4, DOG))}


@pytest.mark.parametrize("place", ["val", ".", "../../.."])
def test_kaggles_table_says_the_classes(flat, place, tmp_path):
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    root.parent.mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).parent.mkdir(exist_ok=True)
        (flat / split).rename(root / split)
    rows = [f"{Path(name).stem},{wnid} 85 1 499 272 {wnid} 1 2 3 4" for name, wnid in reversed(OF_FLAT.items())]
    (root / place / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows, ""]))
    assert held_out(root) == OF_FLAT
    assert read_folders(root)[1].layout == "val/* with classes by LOC_val_solution.csv"


@pytest.mark.parametrize("ending", ["", ".JPEG"])
def test_a_text_file_says_the_classes(flat, ending):
    lines = [f"{Path(name).stem}{ending} {wnid}\n" for name, wnid in OF_FLAT.items()]
    (flat / "val" / "val_labels.txt").write_text("".join(lines))
    assert held_out(flat) == OF_FLAT


def test_the_development_kit_says_the_classes(flat):
    """Numbers in the order of the kit, which is not that of names."""
    kit = flat / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n1\n1\n")
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(1, DOG, "dog, domestic dog"), (2, CAT, "cat"), (1001, "n00001740", "entity")], dtype=kind)
    savemat(kit / "meta.mat", {"synsets": synsets})
    assert held_out(flat) == OF_FLAT


def test_tiny_imagenet_is_taken_as_it_comes(tmp_path):
    for wnid in (CAT, DOG):
        add(
            tmp_path,
            f"train/{wnid}/images/{wnid}_0.JPEG",
            f"train/{wnid}/images/{wnid}_1.JPEG",
            f"train/{wnid}/{wnid}_boxes.txt",
        )
    add(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG", "wnids.txt", "words.txt")
    (tmp_path / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\t{DOG}\t0\t32\t44\t62\nval_1.JPEG\t{CAT}\t1\t2\t3\t4\n")
    train, _ = read_folders(tmp_path)
    assert list(train.names) == [f"train/{wnid}/images/{wnid}_{n}.JPEG" for wnid in (DOG, CAT) for n in (0, 1)]
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert held_out(tmp_path) == {"val/images/val_0.JPEG": DOG, "val/images/val_1.JPEG": CAT}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (None, "", r"val: its 4 pictures lie in no class folders, and nothing says their classes: put LOC_val_solution.csv"),
        ("val_labels.txt", f"ILSVRC2012_val_00000001 {DOG}", r"00000002.JPEG: .*val_labels.txt does not say of which class"),
        ("val_labels.txt", f"a {DOG}\nb", r"val_labels.txt: line 2 names a picture and no class: give both"),
        (
            "val.txt",
            "\n".join(f"ILSVRC2012_val_0000000{n} 65" for n in (1, 2, 3, 4)),
            r"class '65' is in val/ but not in train/",
        ),
        ("LOC_val_solution.csv", "a,b\n", r"LOC_val_solution.csv: its first line is not ImageId,PredictionString"),
        ("ILSVRC2012_validation_ground_truth.txt", "1\n", r"holds numbers, and meta.mat .* is not beside it: put it there"),
        ("meta.mat", "x", r"meta.mat: not the meta.mat of ImageNet's development kit"),
    ],
)
def test_what_cannot_be_mapped_is_refused(flat, file, text, message):
    if file is not None:
        (flat / "val" / file).write_text(text)
    if file == "meta.mat":
        (flat / "val" / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    with pytest.raises(ValueError, match=message) as error:
        read_folders(flat)
    assert "\n" not in str(error.value)


ONE_STEM = ("val/a.jpg", "val/a.png")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([f"a.png {DOG}", f"a.jpg {CAT}"], {"val/a.png": DOG, "val/a.jpg": CAT}),
        ([f"a.png {DOG}", f"a.jpg {CAT}", f"a.png {DOG}"], {"val/a.png": DOG, "val/a.jpg": CAT}),  # twice the same
        ([f"a.png {DOG}", f"a {CAT}"], {"val/a.png": DOG, "val/a.jpg": CAT}),
        ([f"a.png {DOG}", f"a.jpg {CAT}", f"a.png {CAT}"], f"val/a.png: .*val.txt says .* classes '{DOG}' and '{CAT}'"),
        ([f"a {DOG}"], r"val/a.png: .*val.txt has 'a' for it and .*val/a.jpg: give names with their endings"),
        ([f"a.png {DOG}"], "val/a.jpg: .*val.txt does not say of which class"),
        ([f"a.png {DOG}", f"a.bmp {DOG}", f"a.webp {CAT}"], f"val/a.jpg: .*says .* classes '{DOG}' and '{CAT}'"),
    ],
)
def test_a_name_with_its_ending_means_that_picture_and_none_is_given_two_classes(tmp_path, lines, expected):
    add(tmp_path, f"train/{CAT}/0.JPEG", f"train/{DOG}/0.JPEG", *ONE_STEM)
    (tmp_path / "val.txt").write_text("\n".join(lines))
    if isinstance(expected, dict):
        assert held_out(tmp_path) == expected
        return
    with pytest.raises(ValueError, match=expected) as error:
        held_out(tmp_path)
    assert "\n" not in str(error.value)


# --- a share held out ---------------------------------------------------------------------------------------------------


def share_of(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


@pytest.mark.parametrize("below", ["train/", ""])
def test_a_share_of_each_class_is_held_out_by_a_hash(tmp_path, below):
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(100)]
    add(tmp_path, *(below + name for name in names))
    train, val = read_folders(tmp_path, val_share=0.2)
    chosen = [below + name for name in sorted(names) if share_of(name) < 0.2]
    assert list(val.names) == chosen
    assert sorted([*train.names, *val.names]) == sorted(below + name for name in names)
    assert 10 <= len(chosen) <= 70
    assert [val.class_names[label] for label in val.labels] == [name.removeprefix(below)[:3] for name in chosen]


def test_more_files_move_none_of_the_others(tmp_path):
    add(tmp_path, *(f"train/{label}/{number}.png" for label in ("cat", "dog") for number in range(0, 100, 2)))
    before = [set(files.names) for files in read_folders(tmp_path, 0.1)]
    add(tmp_path, *(f"train/{label}/{number}.png" for label in ("cat", "ant") for number in range(1, 100, 2)))
    after = [set(files.names) for files in read_folders(tmp_path, 0.1)]
    assert before[0] < after[0]
    assert before[1] < after[1]


def test_shares_that_leave_nothing_are_refused(tmp_path):
    add(tmp_path, "train/cat/0.png")
    share = share_of("cat/0.png")
    with pytest.raises(ValueError, match="--val_share holds out none of its images: give a larger share"):
        read_folders(tmp_path, share - 1e-6)
    with pytest.raises(ValueError, match="train/cat: no images left to train on, at this --val_share"):
        read_folders(tmp_path, share + 1e-6)
    add(tmp_path, "val/cat/0.png")
    with pytest.raises(ValueError, match=r"--val_share=0.1: .*/val is there already: leave the flag out"):
        read_folders(tmp_path, 0.1)


# --- arrays -------------------------------------------------------------------------------------------------------------


def test_names_are_kept_as_they_are():
    texts = ["", "a/b.png", "änne.png", "\udcff.png", "z" * 300]
    names = Names.of(texts)
    assert list(names) == texts
    assert (len(names), names[-1], names[1]) == (5, texts[-1], "a/b.png")
    with pytest.raises(IndexError):
        names[5]


def test_what_is_taken_keeps_names_and_labels(images):
    train, _ = read_folders(images)
    some = train.take(np.array([9, 0]))
    assert list(some.names) == ["train/dog/1.png", "train/cat/0.png"]
    assert some.labels.tolist() == [1, 0]
    assert some.class_names == train.class_names


def test_the_hash_of_a_listing_is_that_of_earlier_caches(tmp_path):
    """An encoding that was begun by earlier code goes on."""
    add(tmp_path, "train/cat/0.png", "train/dog/a/1.png", "val/dog/2.png")
    text = "train/cat/0.png\n0\ntrain/dog/a/1.png\n1\nval/dog/2.png\n1\n"
    assert listing_hash(*read_folders(tmp_path)) == hashlib.sha256(text.encode()).hexdigest()


def test_many_pictures_are_counted_in_a_bar_and_few_are_not(capsys):
    for count, shown in ((SHOWN_FROM - 1, False), (SHOWN_FROM + 5, True)):
        with counted() as seen:
            for _ in range(count):
                seen()
        assert (f"{count}image" in capsys.readouterr().err) == shown


# --- looked at beforehand -----------------------------------------------------------------------------------------------


def test_check_data_takes_what_training_takes(tmp_path, monkeypatch, capsys):
    root = make_images(tmp_path / "images", train=30)
    (root / "val").rename(tmp_path / "elsewhere")
    main = script("check_data").main
    code, output, _ = run_in_process(main, [root, "--workers=1", "--val_share=0.2"], monkeypatch, capsys)
    assert code == 0
    train, val = read_folders(root, 0.2)
    rows = {line[:24].strip(): line[24:].split() for line in output.splitlines()}
    assert rows["images"] == [str(len(train)), str(len(val))]
    assert "val, layout: train/<class>/*, 0.2 of it by a hash of file names" in output
    code, output, _ = run_in_process(main, [root, "--workers=1"], monkeypatch, capsys)
    assert code == 1
    assert "val/ is not there" in output
