"""Scores of each class, of features whose classes lie apart, and where the classes of images come from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.metrics.by_class import Labels, named_alike, read_labels, score_by_class
from utils.metrics.distances import density_coverage, kernel_distance
from utils.metrics.features import Features
from utils.metrics.image_sets import open_images


class Network:
    kernel_name = "KD"
    device = "cpu"


def save_pictures(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name)
    return folder


def around(centre: float, count: int, seed: int) -> np.ndarray:
    return centre + np.random.default_rng(seed).normal(size=(count, 3))


def features(*parts: np.ndarray) -> Features:
    pooled = torch.from_numpy(np.concatenate(parts))
    return Features(pooled, pooled)


def test_scores_of_each_class():
    """Three of eight cats look like dogs; of birds there are too few for most scores, and of fish there is no real one."""
    cats, lost, dogs, birds, fish = (around(*values) for values in ((0, 5, 0), (9, 3, 1), (9, 10, 2), (50, 1, 3), (90, 2, 4)))
    names = np.repeat(["cat", "dog", "bird", "fish"], [8, 10, 1, 2])
    real_cats, real_dogs, real_birds = around(0, 12, 5), around(9, 11, 6), around(50, 2, 7)
    real_names = np.repeat(["cat", "dog", "bird", "wolf"], [12, 11, 2, 2])
    made, real = features(cats, lost, dogs, birds, fish), features(real_cats, real_dogs, real_birds, around(-40, 2, 8))
    found = score_by_class(made, real, names, real_names, Network())
    assert list(found.classes) == ["bird", "cat", "dog", "fish"]  # not wolf, of which nothing was made
    cat = found.classes["cat"]
    made_cats = np.concatenate([cats, lost])
    assert (cat["images"], cat["reference images"], cat["recognised"], cat["real recognised"]) == (8, 12, 5 / 8, 1)
    assert cat["KD"] == pytest.approx(kernel_distance(made_cats, real_cats)[0])
    assert (cat["density"], cat["coverage"]) == density_coverage(real_cats, made_cats)
    assert found.classes["dog"]["recognised"] == 1
    assert found.classes["bird"] == {
        "images": 1,
        "reference images": 2,
        "KD": None,
        "density": None,
        "coverage": None,
        "recognised": 1.0,
        "real recognised": 1.0,
    }
    assert (found.classes["fish"]["recognised"], found.classes["fish"]["real recognised"]) == (0, None)
    assert found.recognised == pytest.approx((5 + 10 + 1) / 21)
    assert found.real_recognised == 1


def test_labels_of_archives(tmp_path):
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([3, 0, 3, 1])
    for name, arrays, expected in (
        ("ours", {"labels": labels}, labels.tolist()),
        ("guided", {"arr_1": labels}, labels.tolist()),
        ("both", {"arr_1": labels[::-1], "labels": labels}, labels.tolist()),
        ("others", {"arr_1": labels / 2, "labels": labels[:3]}, None),
    ):
        np.savez(tmp_path / f"{name}.npz", arr_0=images, **arrays)
        found = read_labels(open_images(tmp_path / f"{name}.npz"))
        assert (found and found.numbers.tolist()) == expected, name
    assert found is None


def test_labels_of_folders(tmp_path):
    classes = save_pictures(tmp_path / "classes", "cat/1.png", "ant/old/2_class0007.png", "cat/0.png")
    found = read_labels(open_images(classes))
    assert (found.names, found.numbers.tolist()) == (["ant", "cat"], [0, 1, 1])
    dump = save_pictures(tmp_path / "dump", "000000_class0012.png", "000001_class0003.png")
    assert read_labels(open_images(dump)) == (pytest.approx([12, 3]), None)
    assert read_labels(open_images(save_pictures(tmp_path / "some", "000000_class0012.png", "a.png"))) is None
    assert read_labels(open_images(save_pictures(tmp_path / "mixed", "cat/0.png", "a.png"))) is None


def test_numbers_are_those_of_class_folders_in_order():
    numbers, folders = Labels(np.array([2, 0]), None), Labels(np.array([0, 1, 2]), ["ant", "bee", "cat"])
    assert [names.tolist() for names in named_alike(numbers, folders, "a")] == [["cat", "ant"], ["ant", "bee", "cat"]]
    assert [names.tolist() for names in named_alike(folders, numbers, "a")] == [["ant", "bee", "cat"], ["cat", "ant"]]
    assert [names.tolist() for names in named_alike(numbers, numbers, "a")] == [["2", "0"], ["2", "0"]]
    some = Labels(np.array([0]), ["cat"])  # by name, not by its number
    assert [names.tolist() for names in named_alike(some, folders, "a")] == [["cat"], ["ant", "bee", "cat"]]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (Labels(np.array([0, 3]), None), "a.npz: label 3 beside 3 class folders: give a reference with all classes"),
        (Labels(np.array([0, -1]), None), "a.npz: label -1 beside 3 class folders"),
        (Labels(np.array([0]), ["Ant"]), "a.npz: no class of it, such as 'Ant', is in the reference"),
    ],
)
def test_classes_that_are_not_those_of_the_reference(samples, message):
    with pytest.raises(ValueError, match=message) as error:
        named_alike(samples, Labels(np.array([0, 1, 2]), ["ant", "bee", "cat"]), "a.npz")
    assert "\n" not in str(error.value)
