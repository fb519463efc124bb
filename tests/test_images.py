import numpy as np
import pytest
import torch
from commands import CLASSES, export_some, make_images, some_of_fashion_mnist

from utils.data import batches
from utils.data.batches import TrainOrder, in_order, train_batches, val_batches, worker_count
from utils.data.fashion_mnist import FASHION_MNIST_CLASSES, export_fashion_mnist
from utils.data.images import Images, read_folders


def test_labels_are_the_sorted_class_folders(tmp_path):
    train, val = read_folders(make_images(tmp_path / "images"))
    assert train.class_names == list(CLASSES)
    assert (len(train.paths), len(val.paths)) == (24, 9)
    assert all(train.class_names[label] in path for path, label in zip(train.paths, train.labels, strict=True))


def test_validation_may_lack_a_class_and_keeps_the_labels_of_training(tmp_path):
    root = make_images(tmp_path / "images")
    (root / "val" / "cat").rename(tmp_path / "gone")
    _, val = read_folders(root)
    assert sorted(set(val.labels)) == [1, 2]


def test_images_are_cut_to_size_and_scaled_to_minus_one_to_one(tmp_path):
    train, _ = read_folders(make_images(tmp_path / "images"))
    image, label = Images(train, 16, augment=True)[(0, 0)]
    assert image.shape == (3, 16, 16)
    assert label == 0
    assert -1 <= image.min() < image.max() <= 1


def test_a_crop_depends_on_seed_and_position_alone(tmp_path):
    train, _ = read_folders(make_images(tmp_path / "images"))
    images = Images(train, 16, augment=True, flip=True, seed=3)
    first = images[(5, 0)][0]
    torch.rand(3)
    assert torch.equal(images[(5, 0)][0], first)
    assert not all(torch.equal(images[(position, 0)][0], first) for position in range(6, 12))


def test_every_epoch_is_a_permutation_of_its_own():
    order = TrainOrder(size=12, batch=4, seed=0)
    epochs = [np.concatenate([order.indices(order.positions(step, 0)) for step in range(s, s + 3)]) for s in (0, 3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize(("world", "micro_batches"), [(2, 1), (1, 2), (3, 2)])
def test_ranks_and_micro_batches_share_out_the_same_global_batch(world, micro_batches):
    whole = TrainOrder(size=17, batch=12, seed=1)
    parts = [TrainOrder(17, 12, 1, rank, world, micro_batches) for rank in range(world)]
    for step in range(3):
        expected = whole.indices(whole.positions(step, 0))
        found = [part.indices(part.positions(step, m)) for part in parts for m in range(micro_batches)]
        assert sorted(np.concatenate(found)) == sorted(expected)


def test_every_epoch_takes_the_next_view_of_all_images():
    order = TrainOrder(size=6, batch=3, seed=0, views=2)
    epochs = [np.concatenate([order.indices(order.positions(step, 0)) for step in range(s, s + 2)]) for s in (0, 2, 4)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11], [0, 2, 4, 6, 8, 10]]


def test_loading_images_leaves_the_random_numbers_of_training_alone(images, monkeypatch):
    """torch.manual_seed seeds every GPU as well; the crops once did, in the middle of a training step."""
    train, _ = read_folders(images)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds all devices"))
    before = torch.get_rng_state()
    list(train_batches(Images(train, 16, augment=True), TrainOrder(24, 4, seed=0), 0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_export_does_not_touch_a_directory_of_others(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        export_fashion_mnist(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_batches_can_start_at_any_step(tmp_path):
    train, _ = read_folders(make_images(tmp_path / "images"))
    images, order = Images(train, 16, augment=True), TrainOrder(len(train.paths), 5, seed=0)
    whole = list(train_batches(images, order, 0, 8))
    rest = list(train_batches(images, order, 6, 8))
    assert all(torch.equal(a, b) for one, two in zip(whole[6:], rest, strict=True) for a, b in zip(one, two, strict=True))


def test_workers_load_the_same_batches(tmp_path):
    train, _ = read_folders(make_images(tmp_path / "images"))
    images, order = Images(train, 16, augment=True), TrainOrder(len(train.paths), 4, seed=0)
    alone, helped = (list(train_batches(images, order, 0, 4, workers)) for workers in (0, 2))
    assert all(torch.equal(one[0], two[0]) for one, two in zip(alone, helped, strict=True))


def test_as_many_workers_as_the_ranks_of_a_machine_leave_cores(monkeypatch):
    monkeypatch.setattr(batches.os, "sched_getaffinity", lambda process: range(24), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count("auto") == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert worker_count("auto") == 16
    assert worker_count(0) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker_count("auto") == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(tmp_path, workers):
    root = make_images(tmp_path / "images")
    (root / "train" / "cat" / "0.png").write_bytes(b"no picture")
    train, _ = read_folders(root)
    with pytest.raises(ValueError, match=r"cat/0\.png: not a readable image") as error:
        list(val_batches(Images(train, 16), 8, workers=workers))
    assert "\n" not in str(error.value)


def test_validation_sees_each_image_once_over_all_ranks():
    seen = [n for rank in range(3) for batch in in_order(10, 2, rank, 3) for n in batch]
    assert sorted(seen) == list(range(10))


def test_embedded_images_are_split_by_a_fixed_rule(tmp_path):
    export_some(tmp_path / "images")
    train, val = read_folders(tmp_path / "images")
    assert (len(train.paths), len(val.paths)) == (900, 100)
    assert train.class_names == sorted(FASHION_MNIST_CLASSES)
    image, label = Images(val, 32, resize=1.0)[(0, 0)]
    assert image.shape == (3, 32, 32)
    assert val.class_names[label] in val.paths[0]
    originals, labels = some_of_fashion_mnist()
    number = int(val.paths[0].rsplit("/", 1)[1].removesuffix(".png"))
    assert number % 10 == 9
    np.testing.assert_array_equal(((image[0, 2:30, 2:30] + 1) * 127.5).round().numpy(), originals[number])
    assert FASHION_MNIST_CLASSES[labels[number]] == val.class_names[label]
