import io
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from commands import make_images, run_in_process, script
from PIL import ExifTags, Image, features

from utils.data.images import read_folders
from utils.data.pictures import read_picture


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


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunk(png: bytes, name: bytes, body: bytes) -> bytes:
    """A PNG with one chunk more, behind its header."""
    header = 8 + 25
    return png[:header] + png_chunk(name, body) + png[header:]


def rows_of(output: str) -> dict[str, list[str]]:
    return {line[:24].strip(): line[24:].split() for line in output.splitlines()}


# In train/cat/: what is in the file, and why a training would stop at it.
UNREADABLE = {
    "truncated.png": (lambda png: png[:60], "not a readable image"),
    "truncated.jpg": (lambda png: jpeg()[:-40], "not a readable image ("),
    "nothing.png": (lambda png: b"", "not a readable image: it is empty: fetch it again"),
    "page.jpg": (lambda png: b"<!DOCTYPE html><html></html>", "not a readable image: it is a web page"),
    "noise.jpg": (lambda png: bytes(range(256)), "not a readable image (cannot identify image file"),
    "pointer.png": (
        lambda png: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "not a readable image: it is a pointer of Git LFS and not the file itself: fetch that with `git lfs pull`",
    ),
    "text.png": (
        lambda png: with_chunk(png, b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 21))),
        "not a readable image (Decompressed",
    ),
    "huge.png": (
        lambda png: png[:8] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1 << 15, 1 << 15, 8, 0, 0, 0, 0)) + png[33:],
        "not a readable image (Image size (1073741824 pixels) exceeds limit",
    ),
    "float.tiff": (lambda png: encoded("TIFF", np.zeros((8, 8), np.float32)), "(pixels of mode F have no known range"),
}


def encoded(form: str, pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def jpeg(**options) -> bytes:
    return encoded("JPEG", np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8), **options)


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_found_as_training_finds_it(check, tmp_path, name):
    root = make_images(tmp_path / "images")
    path = root / "train" / "cat" / name
    content, reason = UNREADABLE[name]
    path.write_bytes(content((root / "train" / "cat" / "0.png").read_bytes()))
    code, output, _ = check(root)
    assert code == 1
    assert "training would stop: 1 reasons" in output
    assert f"  {path}: " in output
    assert reason in output
    assert rows_of(output)["cannot be read"] == ["1", "0"]
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_picture(path)


def place_kinds(cat: Path) -> dict[str, str]:
    """Files of every kind that people have and that training takes; name -> the mode that Pillow has of it."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (8, 12, 3), np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.save(cat / "turned.jpg", exif=exif)
    picture.convert("CMYK").save(cat / "print.jpg")
    picture.quantize(8).save(cat / "palette.png", transparency=0)
    Image.fromarray(rng.integers(0, 255, (8, 12, 4), np.uint8)).save(cat / "alpha.png")
    Image.fromarray(pixels[..., 0]).save(cat / "grey.png")
    Image.fromarray(rng.integers(0, 65535, (8, 12), np.uint16)).save(cat / "deep.png")
    picture.save(cat / "in truth a png.jpg", "PNG")
    Image.fromarray(pixels[:1, :2]).save(cat / "tiny.png")
    more = Image.fromarray(rng.integers(0, 255, (8, 12, 3), np.uint8))
    picture.save(cat / "pages.tiff", save_all=True, append_images=[more])
    picture.save(cat / "moving.png", save_all=True, append_images=[more])
    names = {"turned.jpg": "RGB", "print.jpg": "CMYK", "palette.png": "P", "alpha.png": "RGBA", "grey.png": "L"}
    return names | {"in truth a png.jpg": "RGB", "tiny.png": "RGB", "pages.tiff": "RGB", "moving.png": "RGB"}


def test_every_kind_of_picture_that_training_takes_is_described(check, tmp_path):
    root = make_images(tmp_path / "images")
    modes = place_kinds(root / "train" / "cat")
    code, output, errors = check(root, "--json", tmp_path / "found.json")
    assert code == 0, output + errors
    found = json.loads((tmp_path / "found.json").read_text())
    pictures = {Path(picture["path"]).name: picture for picture in found["splits"]["train"]["classes"]["cat"]}
    assert {name: pictures[name]["mode"] for name in modes} == modes
    assert pictures["deep.png"]["mode"].startswith("I")  # by the version of Pillow
    assert pictures["turned.jpg"]["size"] == [8, 12]
    rows = rows_of(output)
    assert rows["with transparency"] == ["2", "0"]
    assert rows["turned by EXIF data"] == ["1", "0"]
    assert rows["of several frames"] == ["2", "0"]
    assert rows["smallest side, px"] == ["1", "20"]
    assert {name for name, picture in pictures.items() if picture["has_several"]} == {"pages.tiff", "moving.png"}
    assert any(line.startswith("train, modes: 29 of RGB, ") for line in output.splitlines())
    read_folders(root)


def test_a_moving_webp_is_taken_by_its_first_frame(check, tmp_path):
    if not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    root = make_images(tmp_path / "images")
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255)]
    frames[0].save(root / "val" / "fox" / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    code, output, _ = check(root)
    assert code == 0
    assert rows_of(output)["of several frames"] == ["0", "1"]
    assert np.asarray(read_picture(root / "val" / "fox" / "a.webp")).max() == 0


def test_everything_wrong_with_a_folder_is_found_at_once(check, tmp_path):
    """One of each, by name."""
    root = make_images(tmp_path / "images")
    train, cat, dog = root / "train", root / "train" / "cat", root / "train" / "dog"
    (cat / "notes.txt").write_text("not a picture")
    Image.new("P", (8, 8)).save(cat / "moving.gif")
    (cat / "copy.png").write_bytes((cat / "0.png").read_bytes())
    (dog / "also a cat.png").write_bytes((cat / "0.png").read_bytes())
    (root / "val" / "cat" / "seen in training.png").write_bytes((cat / "1.png").read_bytes())
    Image.new("RGB", (8, 8)).save(train / "loose.png")
    (train / "README.md").write_text("beside the classes nobody minds")
    (cat / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (train / "bird").symlink_to(tmp_path / "nowhere")
    for hidden in (cat / ".ipynb_checkpoints", train / "@eaDir", dog / ".thumbnails"):
        hidden.mkdir()
        (hidden / "0.png").write_bytes(b"no picture")
    (train / "empty").mkdir()
    (root / "val" / "ant").mkdir()  # before all others: labels by its own order would all be one too high
    Image.new("RGB", (8, 8)).save(root / "val" / "ant" / "0.png")
    code, output, _ = check(root, "--json", tmp_path / "found.json")
    assert code == 1
    found = json.loads((tmp_path / "found.json").read_text())
    stops = found["reasons_to_stop"]
    expected = [
        "train/bird lies beside the class folders",
        "train/loose.png lies beside the class folders",
        "train/cat/moving.gif is no image file",
        "train/cat/notes.txt is no image file",
        "train/empty holds no images",
        f"{cat / 'gone.png'}: not a readable image ([Errno 2] No such file or directory): repair or remove it",
        "class 'ant' is in val/ but not in train/",
    ]
    assert stops == expected
    assert all(f"  {reason}" in output for reason in stops)
    rows = rows_of(output)
    assert rows["cannot be read"] == ["1", "0"]
    assert rows["files of other kinds"] == ["5", "0"]
    assert rows["hidden or of systems"] == ["3", "0"]
    same = [{path.split("/")[-1] for path in group} for group in found["duplicates"]]
    assert {"0.png", "copy.png", "also a cat.png"} in same
    assert {"1.png", "seen in training.png"} in same
    assert f"1 of these groups are in several classes, such as {cat / '0.png'}" in output
    assert f"1 of these groups are in train/ as well as val/, such as {cat / '1.png'}" in output
    with pytest.raises(ValueError, match=f"^{re.escape(str(train))}/"):
        read_folders(root)


def test_what_may_not_be_read_is_found(check, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    root = make_images(tmp_path / "images")
    (root / "train" / "cat" / "0.png").chmod(0)
    code, output, _ = check(root)
    assert code == 1
    assert "0.png: not a readable image ([Errno 13] Permission denied" in output


def test_what_is_not_there_gets_one_line(check, tmp_path):
    code, _, errors = check(tmp_path / "none")
    assert code == 1
    assert f"{tmp_path / 'none'}: no such directory: give one with train/<class>/* and val/<class>/*" in errors
    (tmp_path / "train").mkdir()
    code, output, _ = check(tmp_path)
    assert code == 1
    assert "val/ is not there" in output
    assert "train/ has no class folders" in output
