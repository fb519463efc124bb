import json

import numpy as np
import pytest
from commands import make_images, run_in_process, script
from PIL import Image


@pytest.fixture
def check(monkeypatch, capsys):
    main = script("check_data").main
    return lambda *words: run_in_process(main, [*words, "--workers=1"], monkeypatch, capsys)


def test_a_good_folder_is_described(check, tmp_path):
    root = make_images(tmp_path / "images")
    code, output, _ = check(root)
    assert code == 0
    rows = {line[:24].strip(): line[24:].split() for line in output.splitlines()}
    assert rows["classes"] == ["3", "3"]
    assert rows["images"] == ["24", "9"]
    assert rows["cannot be read"] == ["0", "0"]
    assert "training would take all of it" in output


def test_every_kind_of_fault_is_found(check, tmp_path):
    """One of each, by name."""
    root = make_images(tmp_path / "images")
    cat, dog = root / "train" / "cat", sorted(path for path in (root / "train").iterdir())[1]
    pixels = np.zeros((8, 8, 3), np.uint8)
    (cat / "broken.png").write_bytes((cat / "0.png").read_bytes()[:60])
    (cat / "float.tiff").parent.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(cat / "float.tiff")
    (cat / "notes.txt").write_text("not a picture")
    (cat / "copy.png").write_bytes((cat / "0.png").read_bytes())
    (dog / "also a cat.png").write_bytes((cat / "0.png").read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(cat / "turned.jpg", exif=exif)
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(cat / "clear.png")
    Image.fromarray(pixels[..., 0]).save(cat / "grey.png")
    Image.fromarray(pixels).save(root / "train" / "loose.png")
    (cat / ".ipynb_checkpoints").mkdir()
    (root / "train" / "@eaDir").mkdir()
    (root / "train" / "empty").mkdir()
    (root / "val" / "wolf").mkdir()
    Image.fromarray(pixels).save(root / "val" / "wolf" / "0.png")
    code, output, _ = check(root, "--json", tmp_path / "found.json")
    assert code == 1
    found = json.loads((tmp_path / "found.json").read_text())
    stops = "\n".join(found["reasons_to_stop"])
    for reason in (
        "cat/broken.png: not a readable image",
        "cat/float.tiff: not a readable image (pixels of mode F have no known range",
        "train/cat/notes.txt is no image file",
        "train/loose.png lies beside the class folders",
        "train/empty holds no images",
        "class 'wolf' is in val/ but not in train/",
    ):
        assert reason in stops
        assert reason in output
    assert len(found["reasons_to_stop"]) == 6
    rows = {line[:24].strip(): line[24:].split() for line in output.splitlines()}
    assert rows["cannot be read"] == ["2", "0"]
    assert rows["with transparency"] == ["1", "0"]
    assert rows["turned by EXIF data"] == ["1", "0"]
    assert rows["files of other kinds"] == ["2", "0"]
    assert rows["hidden or of systems"] == ["2", "0"]
    same = {frozenset(path.split("/")[-1] for path in group) for group in found["duplicates"]}
    assert {"0.png", "copy.png", "also a cat.png"} in same
    assert "of these groups are in several classes" in output
    assert "of 8x8" in output
    assert any("L" in line for line in output.splitlines() if line.startswith("train, modes"))


def test_what_is_not_there_gets_one_line(check, tmp_path):
    code, _, errors = check(tmp_path / "none")
    assert code == 1
    assert f"{tmp_path / 'none'}: no such directory: give one with train/<class>/* and val/<class>/*" in errors
    (tmp_path / "train").mkdir()
    code, output, _ = check(tmp_path)
    assert code == 1
    assert "val/ is not there" in output
    assert "train/ has no class folders" in output
