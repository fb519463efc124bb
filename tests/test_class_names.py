"""Names of classes: of folders, and of ImageNet where a checkpoint has synsets or none."""

import pytest

from utils.class_names import parse_classes, shown_names

FOLDERS = ["Ankle boot", "Bag", "Dress"]
SYNSETS = ["n02099601", "n02123045", "n99999999"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("golden retriever,tabby", [207, 281]),
        ("Golden Retriever, tabby cat", [207, 281]),
        ("207,n02123045", [207, 281]),
        ("none", [1000]),
    ],
)
def test_imagenet_by_name_where_a_checkpoint_has_no_names(text, labels):
    assert parse_classes(text, [], 1000) == labels


def test_synsets_are_called_as_in_imagenet():
    assert shown_names(SYNSETS, 3) == ["golden retriever", "tabby", "n99999999"]
    assert parse_classes("tabby,n02099601,2", SYNSETS, 3) == [1, 0, 2]


def test_two_classes_of_one_name_are_told_apart():
    names = shown_names([], 1000)
    assert len(set(names)) == 1000
    assert [name for name in names if name.startswith("crane")] == ["crane (134)", "crane (517)"]
    with pytest.raises(ValueError, match="'crane' are the classes 134, 517: give the label of one"):
        parse_classes("crane", [], 1000)


def test_folders_and_numbers():
    assert shown_names(FOLDERS, 3) == FOLDERS
    assert parse_classes("bag,2,Ankle boot", FOLDERS, 3) == [1, 2, 0]
    assert shown_names([], 3) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("text", "names", "count", "message"),
    [
        ("golden retreiver", [], 1000, "no class 'golden retreiver': is it 'golden retriever'"),
        ("Ankle boots", FOLDERS, 3, "no class 'Ankle boots': is it 'Ankle boot'?"),
        ("zebra", FOLDERS, 3, "no class 'zebra': give numbers from 0 to 2, or names such as 'Ankle boot'"),
        ("7", [], 3, "no class '7': give numbers from 0 to 2"),
    ],
)
def test_an_unknown_class_is_told_with_what_is_near(text, names, count, message):
    with pytest.raises(ValueError, match=message):
        parse_classes(text, names, count)
