"""Pictures as people have them, with the right values by hand: one listing and one reader for training and for scores."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.data.images import Images, read_folders
from utils.data.pictures import EXTENSIONS, background_colour, find_pictures, opaque, read_picture
from utils.metrics.image_sets import open_images

RED, GREEN = (200, 20, 10), (10, 220, 30)


def gradient() -> np.ndarray:
    """(8, 12, 3) uint8 that no turn leaves as it is."""
    rows, columns = np.mgrid[:8, :12]
    return np.stack([20 * rows, 20 * columns, 5 * rows + 3 * columns], axis=2).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A data set with a class of each split, and one picture in it."""
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(gradient()).save(tmp_path / split / "cat" / "0.png")
    return tmp_path


# --- which files --------------------------------------------------------------------------------------------------------


def test_training_and_scores_see_the_same_files(folder, tmp_path_factory):
    """Every ending, capitals, folders in folders and behind links; nothing hidden, and nothing that systems made."""
    cat = folder / "train" / "cat"
    for name in ("1.JPEG", "2.bmp", "3.webp", "4.tiff", "5.ppm", "deep/6.png"):
        (cat / name).parent.mkdir(exist_ok=True)
        Image.fromarray(gradient()).save(cat / name)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.fromarray(gradient()).save(elsewhere / "7.png")
    (cat / "linked").symlink_to(elsewhere)
    for name in (".ipynb_checkpoints/0.png", "@eaDir/0.png", "deep/.thumbs/0.png", ".DS_Store", "Thumbs.db"):
        (cat / name).parent.mkdir(exist_ok=True)
        (cat / name).write_bytes((cat / "0.png").read_bytes())
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    Image.fromarray(gradient()).save(folder / "train" / ".ipynb_checkpoints" / "0-checkpoint.png")
    train, _ = read_folders(folder)
    scored = open_images(folder / "train")
    assert [os.path.relpath(path, folder / "train") for path in train.paths] == [
        os.path.relpath(path, folder / "train") for path in scored.files.paths
    ]
    names = ["0.png", "1.JPEG", "2.bmp", "3.webp", "4.tiff", "5.ppm", "deep/6.png", "linked/7.png"]
    assert find_pictures(cat).pictures == names
    assert train.class_names == ["cat"]


def test_pictures_are_what_torchvision_takes_for_some():
    assert EXTENSIONS == IMG_EXTENSIONS


def test_other_files_are_an_error_or_counted(folder):
    (folder / "train" / "cat" / "labels.csv").write_text("0")
    with pytest.raises(ValueError, match=r"cat/labels.csv: not an image file"):
        read_folders(folder)
    assert (open_images(folder / "train").strangers, open_images(folder / "val").strangers) == (1, 0)


def test_a_picture_beside_the_classes_is_an_error(folder):
    Image.fromarray(gradient()).save(folder / "train" / "loose.png")
    with pytest.raises(ValueError, match=r"train/loose.png: lies beside the class folders: move it into one, or remove it"):
        read_folders(folder)


def test_a_folder_linked_into_itself_is_an_error(folder):
    (folder / "train" / "cat" / "again").symlink_to(folder / "train")
    with pytest.raises(
        ValueError, match=r"cat/again/cat: is a link to a folder around it|again: is a link to a folder around it"
    ):
        read_folders(folder)


# --- which pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_as_its_exif_data_say(folder, orientation):
    """Turned by the camera's rules (EXIF 2.3, tag 0x0112), back to what it shows, in training and in scores."""
    upright = gradient()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split in ("train", "val"):
        Image.fromarray(np.ascontiguousarray(stored)).save(folder / split / "cat" / "0.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(folder / "train" / "cat" / "0.png")), upright)
    assert np.array_equal(next(open_images(folder / "train").batches(1))[0], upright)
    pixels, _ = Images(read_folders(folder)[1], 8, resize=1.0)[(0, 0)]
    expected = torch.from_numpy(upright[:, 2:10].copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    values = np.array([[0, 128, 257, 20000], [32768, 40000, 65278, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(read_picture(tmp_path / f"a.{ending}")), np.stack([expected] * 3, axis=2))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_known_range_are_refused_by_all(folder, dtype):
    path = folder / "train" / "cat" / "0.tiff"
    Image.fromarray(np.full((8, 12), 1, dtype)).save(path)
    (folder / "train" / "cat" / "0.png").unlink()
    message = r"cat/0.tiff: not a readable image .pixels of mode [FI] have no known range, 8 or 16 bits per channel are needed"
    with pytest.raises(ValueError, match=message):
        read_picture(path)
    with pytest.raises(ValueError, match=message):
        open_images(folder / "train")
    assert "0.tiff" in str(Images(read_folders(folder)[0], 8)[(0, 0)])  # a value: it is raised outside of the worker


def half_transparent(mode: str) -> Image.Image:
    """Left: red, whole. Middle: green, not to be seen. Right: red at 40 %."""
    pixels = np.array([[(*RED, 255), (*GREEN, 0), (*RED, 102)]], np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(("background", "ground"), [("white", (255, 255, 255)), ("#0000ff", (0, 0, 255))])
def test_transparency_shows_the_background(tmp_path, background, ground):
    half_transparent("RGBA").save(tmp_path / "a.png")
    pixels = np.asarray(read_picture(tmp_path / "a.png", background_colour(background)))[0].astype(int)
    assert tuple(pixels[0]) == RED
    assert tuple(pixels[1]) == ground
    mixed = np.array(RED) * 0.4 + np.array(ground) * 0.6
    assert np.abs(pixels[2] - mixed).max() <= 1


@pytest.mark.parametrize("kind", ["LA", "palette", "colour key", "grey key", "sixteen bits with a key", "webp"])
def test_every_kind_of_transparency_is_seen(tmp_path, kind):
    """The second of two pixels is transparent, whatever its colour."""
    path = tmp_path / ("a.webp" if kind == "webp" else "a.png")
    if kind == "LA":
        Image.fromarray(np.array([[[100, 255], [30, 0]]], np.uint8)).save(path)
    elif kind == "palette":
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette([100, 100, 100, 30, 30, 30])
        image.save(path, transparency=bytes([255, 0]))
    elif kind == "colour key":
        Image.fromarray(np.array([[[100, 100, 100], [30, 30, 30]]], np.uint8)).save(path, transparency=(30, 30, 30))
    elif kind == "grey key":
        Image.fromarray(np.array([[100, 30]], np.uint8)).save(path, transparency=30)
    elif kind == "sixteen bits with a key":
        Image.fromarray(np.array([[100 * 257, 30 * 257]], np.uint16)).save(path)
        whole, key = path.read_bytes(), b"tRNS" + struct.pack(">H", 30 * 257)  # which older Pillow reads but does not write
        chunk = struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key))
        path.write_bytes(whole[:33] + chunk + whole[33:])  # behind signature and header
    else:
        Image.fromarray(np.array([[[100, 100, 100, 255], [30, 30, 30, 0]]], np.uint8)).save(path, lossless=True, exact=True)
    assert np.asarray(read_picture(path)).tolist() == [[[100, 100, 100], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(gradient()).convert(mode)
    image.save(tmp_path / "a.tiff")
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.tiff")), np.asarray(image.convert("RGB")))


def test_a_mode_that_not_every_pillow_reads_from_a_file_becomes_rgb():
    image = Image.fromarray(gradient()).convert("YCbCr")
    assert np.array_equal(np.asarray(opaque(image, None, (255, 255, 255))), np.asarray(image.convert("RGB")))


def test_a_name_that_is_no_colour_is_refused():
    with pytest.raises(ValueError, match="--background=nothing: no colour: give a name such as white, or #rrggbb"):
        background_colour("nothing")


# --- what a decoder may raise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError("truncated"), SyntaxError("broken"), MemoryError(), KeyError("tag"), RuntimeError("a\nb")]
)
def test_whatever_is_raised_names_the_file_in_one_line(folder, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=r"0.png: not a readable image \(.+\): repair or remove it") as raised:
        read_picture(folder / "train" / "cat" / "0.png")
    assert "\n" not in str(raised.value)


def test_an_image_over_pillows_limit_names_the_file(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"0.png: not a readable image \(Image size .* exceeds limit"):
        read_picture(folder / "train" / "cat" / "0.png")
