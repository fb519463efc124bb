import io
import math
import resource
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.images import ImageFiles, Images, Names
from utils.metrics.image_sets import (
    FittedImages,
    Gaussian,
    Statistics,
    open_images,
    open_reference,
    read_statistics,
    write_statistics,
)


def random_images(count: int = 5, height: int = 6, width: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def save_pictures(folder: Path, images: np.ndarray, names: list[str]) -> Path:
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# --- archives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_are_read_in_their_order(tmp_path, save):
    images = random_images()
    save(tmp_path / "a.npz", labels=np.arange(5), arr_0=images)
    found = open_images(tmp_path / "a.npz")
    assert (found.count, found.height, found.width) == (5, 6, 4)
    batches = list(found.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert np.array_equal(np.concatenate(batches), images)
    assert batches[0].dtype == np.uint8


def test_without_arr_0_the_only_images_are_taken(tmp_path):
    images = random_images()
    np.savez(tmp_path / "a.npz", labels=np.arange(5), grey=images[..., 0], samples=images)
    assert np.array_equal(np.concatenate(list(open_images(tmp_path / "a.npz").batches(8))), images)


def test_of_several_arrays_of_images_one_is_named(tmp_path):
    images = random_images()
    np.savez(tmp_path / "a.npz", real=images[:2], samples=images)
    with pytest.raises(ValueError, match=r"a.npz: has several arrays of images, real .*, samples .*: give --array=real"):
        open_images(tmp_path / "a.npz")
    assert np.array_equal(np.concatenate(list(open_images(tmp_path / "a.npz", array_name="samples").batches(8))), images)
    with pytest.raises(ValueError, match="images are uint8 .* in others"):
        open_images(tmp_path / "a.npz", array_name="others")
    reference = open_reference(tmp_path / "a.npz", "inception", array_name="real")
    assert reference.images.count == 2


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_large_archives_are_not_held_in_memory(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", arr_0=images)
    tracemalloc.start()
    try:
        count = sum(len(batch) for batch in open_images(tmp_path / "a.npz").batches(16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 2000
    assert peak < images.nbytes / 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((5, 8, 8, 3), np.float32)}, r"bad.npz: has arr_0 float32 \(5, 8, 8, 3\): images are uint8"),
        ({"arr_0": np.zeros((5, 8, 8), np.uint8)}, r"has arr_0 uint8 \(5, 8, 8\)"),
        ({"arr_0": np.zeros((5, 8, 8, 1), np.uint8)}, r"has arr_0 uint8 \(5, 8, 8, 1\)"),
        ({"arr_0": np.zeros((5, 3, 8, 8), np.uint8)}, r"has arr_0 uint8 \(5, 3, 8, 8\)"),
        ({"arr_0": np.zeros((5, 8, 8, 3), np.uint8).T.copy().T}, r"has arr_0 uint8 \(5, 8, 8, 3\) in columns"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, r"arr_0 uint8 \(0, 8, 8, 3\) holds no images"),
        ({"a": np.zeros(1), "b": np.zeros(2)}, r"has a float64 \(1,\), b float64 \(2,\): images are uint8"),
        ({}, "has no arrays"),
    ],
)
def test_other_arrays_get_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        open_images(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


def test_pickled_objects_are_refused_and_not_executed(tmp_path):
    np.savez(tmp_path / "trap.npz", labels=np.array([Trap(tmp_path / "executed")], object), arr_0=random_images())
    with pytest.raises(ValueError, match="trap.npz: not a readable .npz .labels holds pickled objects, which are not loaded"):
        open_images(tmp_path / "trap.npz")
    assert not (tmp_path / "executed").exists()


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_the_array(path: Path) -> None:
    """A whole archive whose array is shorter than its header says."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", data[:-10])


def change_a_pixel(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[300] ^= 255
    path.write_bytes(data)


def break_the_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': 'wrong'")


def other_version(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x07\x00")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_in_half, "not a zip file"),
        (cut_the_array, "arr_0 uint8 .5, 6, 4, 3. needs 488 bytes, there are 478"),
        (change_a_pixel, "CRC"),
        (break_the_header, "header"),
        (other_version, "version"),
        (lambda path: path.write_text("image,label\n"), "not a zip file"),
        (lambda path: path.write_bytes(b""), "not a zip file"),
    ],
)
def test_damaged_archives_get_one_line(tmp_path, damage, reason):
    path = tmp_path / "bad.npz"
    np.savez(path, arr_0=random_images())
    damage(path)
    with pytest.raises(ValueError, match=f"bad.npz: not a readable .npz .*{reason}.*: make or copy it again") as caught:
        list(open_images(path).batches(2))
    assert "\n" not in str(caught.value)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.npz: no such file or folder"):
        open_images(tmp_path / "none.npz")


# --- folders ------------------------------------------------------------------------------------------------------------


def test_folders_are_read_in_the_order_of_their_paths(tmp_path):
    images = random_images(4)
    names = ["b/0.png", "a/1.PNG", "c.png", "a/0.png"]
    folder = save_pictures(tmp_path / "set", images, names)
    (folder / "labels.json").write_text("{}")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_text("not read")
    found = open_images(folder)
    assert (found.count, found.height, found.width) == (4, 6, 4)
    assert np.array_equal(np.concatenate(list(found.batches(3))), images[[3, 1, 0, 2]])


def test_grey_and_jpeg_pictures_become_rgb(tmp_path):
    flat = np.full((8, 8, 3), 100, np.uint8)
    folder = save_pictures(tmp_path, np.stack([flat]), ["a.jpg"])
    Image.fromarray(flat[..., 0]).save(folder / "b.png")
    assert np.array_equal(np.concatenate(list(open_images(folder).batches(2))), np.stack([flat, flat]))


def test_pictures_of_several_sizes_are_refused(tmp_path):
    folder = save_pictures(tmp_path, random_images(1), ["a.png"])
    save_pictures(folder, random_images(1, height=7), ["b.png"])
    with pytest.raises(ValueError, match="b.png: 4x7 pixels, others 4x6: bring all to one size"):
        list(open_images(folder).batches(2))


def test_damaged_pictures_are_named(tmp_path):
    folder = save_pictures(tmp_path, random_images(2, height=64, width=64), ["a.png", "b.png"])
    cut_in_half(folder / "b.png")
    with pytest.raises(ValueError, match="b.png: not a readable image .*: repair or remove it") as caught:
        list(open_images(folder).batches(2))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="no pictures .*in this folder"):
        open_images(tmp_path)


# --- statistics ---------------------------------------------------------------------------------------------------------


def some_statistics(dim: int = 3, spatial_dim: int = 0) -> Statistics:
    spatial = Gaussian(np.arange(spatial_dim) / 7, 2 * np.eye(spatial_dim)) if spatial_dim else None
    return Statistics("real", 10, 6, 4, Gaussian(np.arange(dim) / 3, np.eye(dim)), spatial)


def assert_equal(found: Gaussian, expected: Gaussian) -> None:
    assert np.array_equal(found.mean, expected.mean)
    assert np.array_equal(found.covariance, expected.covariance)


@pytest.mark.parametrize("spatial_dim", [0, 2])
def test_statistics_come_back_as_they_were(tmp_path, spatial_dim):
    path = tmp_path / "new" / "s.npz"
    written = some_statistics(3, spatial_dim)
    write_statistics(path, written, "small", "abc")
    assert open_reference(path, "small") == (None, path)
    found = read_statistics(path, "small", "abc", 3, spatial_dim)
    assert (found.count, found.height, found.width) == (10, 6, 4)
    assert_equal(found.pooled, written.pooled)
    if spatial_dim:
        assert_equal(found.spatial, written.spatial)
    else:
        assert found.spatial is None
    assert [file.name for file in path.parent.iterdir()] == ["s.npz"]


def test_statistics_that_find_no_room_leave_nothing(tmp_path):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))
    try:
        with pytest.raises(OSError, match="s.npz: could not be written .File too large.: make room there"):
            write_statistics(tmp_path / "s.npz", some_statistics(), "small", "abc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other", "abc", 3), "s.npz: statistics of small, not of other"),
        (("small", "def", 3), "s.npz: statistics made with other weights of small"),
        (("small", "abc", 4), r"s.npz: mean \(3,\) and covariance \(3, 3\) instead of 4 features"),
    ],
)
def test_statistics_of_another_network_are_refused(tmp_path, arguments, message):
    write_statistics(tmp_path / "s.npz", some_statistics(), "small", "abc")
    with pytest.raises(ValueError, match=message):
        read_statistics(tmp_path / "s.npz", *arguments, 0)


def test_damaged_statistics_are_refused(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), extractor="small")
    with pytest.raises(ValueError, match="s.npz: not a readable .npz .statistics without fingerprint"):
        read_statistics(path, "small", "abc", 3, 0)
    broken = some_statistics()
    broken.pooled.mean[1] = np.nan
    write_statistics(path, broken, "small", "abc")
    with pytest.raises(ValueError, match="s.npz: has NaN or infinity"):
        read_statistics(path, "small", "abc", 3, 0)


def test_statistics_of_other_evaluators_are_those_of_inception(tmp_path):
    path, spatial = tmp_path / "virtual.npz", {"mu_s": np.ones(2), "sigma_s": np.eye(2)}
    np.savez(path, arr_0=random_images(), mu=np.zeros(3), sigma=np.eye(3), **spatial)
    for_inception, for_others = open_reference(path, "inception"), open_reference(path, "efflite0")
    assert (for_inception.images.count, for_inception.statistics) == (5, path)
    assert (for_others.images.count, for_others.statistics) == (5, None)
    found = read_statistics(path, "inception", "abc", 3, 2)
    assert (found.count, found.height, found.width) == (None, None, None)
    assert_equal(found.spatial, Gaussian(np.ones(2), np.eye(2)))
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(
        ValueError, match="virtual.npz: statistics that do not say who made them.*give images.*--any_statistics"
    ):
        open_reference(path, "inception")
    assert open_reference(path, "inception", any_statistics=True) == (None, path)
    assert read_statistics(path, "inception", "abc", 3, 2).spatial is None
    with pytest.raises(ValueError, match="virtual.npz: has mu"):
        open_reference(path, "efflite0")


def test_a_reference_may_be_images(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=random_images())
    assert open_reference(tmp_path / "a.npz", "inception").images.count == 5
    folder = save_pictures(tmp_path / "set", random_images(2), ["a.png", "b.png"])
    assert open_reference(folder, "inception").images.count == 2


# --- parts and sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("rows", [range(2, 5), [0, 3, 4, 8], range(8, 9), range(0)])
def test_some_images_of_an_archive(tmp_path, save, rows):
    images = random_images(9)
    save(tmp_path / "a.npz", arr_0=images)
    batches = list(open_images(tmp_path / "a.npz").batches(2, rows))
    assert [len(batch) for batch in batches] == [len(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    assert np.array_equal(np.concatenate([images[:0], *batches]), images[list(rows)])


def test_some_images_of_a_folder_are_read_alone(tmp_path):
    images = random_images(4)
    folder = save_pictures(tmp_path / "set", images, ["0.png", "1.png", "2.png", "3.png"])
    found = open_images(folder)
    cut_in_half(folder / "2.png")
    assert np.array_equal(np.concatenate(list(found.batches(8, [0, 1, 3]))), images[[0, 1, 3]])


def test_images_are_resized_and_cut_as_for_training(tmp_path):
    images = random_images(3, height=40, width=30)
    names = ["train/a/0.png", "train/a/1.png", "train/a/2.png"]
    folder = save_pictures(tmp_path / "set", images, names)
    files = ImageFiles(str(folder), Names.of(names), np.zeros(3, np.int64), ["a"])
    dataset = Images(files, pixels=16, resize=1)
    expected = [((dataset[i, i][0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for i in range(3)]
    np.savez(tmp_path / "a.npz", arr_0=images)
    for source in (folder, tmp_path / "a.npz"):
        fitted = FittedImages(open_images(source), 16, 16)
        assert (fitted.source, fitted.count) == (str(source), 3)
        assert np.array_equal(np.concatenate(list(fitted.batches(2))), np.stack(expected))
        assert np.array_equal(np.concatenate(list(fitted.batches(2, [2]))), expected[2:])


def test_images_of_the_right_size_stay_as_they_are(tmp_path):
    images = random_images(3, height=6, width=4)
    np.savez(tmp_path / "a.npz", arr_0=images)
    assert np.array_equal(np.concatenate(list(FittedImages(open_images(tmp_path / "a.npz"), 6, 4).batches(2))), images)


def test_only_squares_are_cut_out(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=random_images(3, height=6, width=4))
    folder = save_pictures(tmp_path / "set", random_images(2, height=8), ["0.png", "1.png"])
    for source, name, size in ((tmp_path / "a.npz", "a.npz", "4x6"), (folder, "set/0.png", "4x8")):
        with pytest.raises(ValueError, match=f"{name}: {size} pixels; 8x4 are needed, and only squares are cut out: resize"):
            list(FittedImages(open_images(source), 4, 8).batches(2))


# --- what must not be read ----------------------------------------------------------------------------------------------


def archive_that_claims(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> Path:
    """An archive with an array whose header, and the archive's own directory, promise more than there is."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + b"\0" * 100)
        info = archive.infolist()[0]
        info.file_size = len(header.getvalue()) + math.prod(shape) * np.dtype(dtype).itemsize
    return path


@pytest.mark.parametrize("shape", [(10**9, 1000, 1000, 3), (3, 10**6, 10**6, 3)])
def test_huge_shapes_are_not_allocated(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "plain.npz", "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        archive.writestr("arr_0.npy", header.getvalue() + b"\0" * 100)
    lying = archive_that_claims(tmp_path / "lying.npz", "arr_0", "|u1", shape)
    tracemalloc.start()
    try:
        for path in (tmp_path / "plain.npz", lying):
            with pytest.raises(ValueError, match=f"{path.name}: not a readable .npz"):
                next(open_images(path).batches(2))
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_huge_statistics_are_not_allocated(tmp_path):
    path = tmp_path / "s.npz"
    for name, shape in (("mu", (10**12,)), ("sigma", (10**6, 10**6))):
        archive_that_claims(path, name, "<f8", shape)
        with zipfile.ZipFile(path, "a") as archive:
            for other in {"mu", "sigma"} - {name}:
                data = io.BytesIO()
                np.save(data, np.zeros(3) if other == "mu" else np.eye(3))
                archive.writestr(f"{other}.npy", data.getvalue())
        with pytest.raises(ValueError, match=r"s.npz: mean .* and covariance .* instead of 3 features"):
            read_statistics(path, "inception", "abc", 3, 0)
