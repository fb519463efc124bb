import math

import pytest
import torch

from models.pyramid import Pyramid
from utils.runs.tally import Tally

PYRAMID = Pyramid((1, 2, (2, 3)))  # 1 + 4 + 6 tokens


def make_tally() -> Tally:
    return Tally(PYRAMID, num_codes=10, num_classes=3, device=torch.device("cpu"))


def test_means_by_scale_and_over_all_tokens():
    tally = make_tally()
    losses = torch.arange(22.0).view(2, 11)
    targets = torch.zeros(2, 11, dtype=torch.long)
    predictions = targets.clone()
    predictions[:, 1:3] = 7  # two of four tokens of the second scale wrong
    tally.add(PYRAMID.scales, losses, predictions, targets, torch.tensor([0, 2]))
    metrics = tally.metrics("val_")
    assert metrics["val_loss"] == pytest.approx(losses.mean().item())
    assert metrics["val_loss_by_scale"] == pytest.approx({"1x1": 5.5, "2x2": 8.0, "2x3": 13.0})
    assert metrics["val_loss_last"] == pytest.approx(13.0)
    assert metrics["val_accuracy"] == pytest.approx(18 / 22)
    assert metrics["val_accuracy_by_scale"] == pytest.approx({"1x1": 1.0, "2x2": 0.5, "2x3": 1.0})
    assert metrics["val_codes_used"] == pytest.approx(0.2)


def test_scales_that_were_not_computed_are_left_out():
    tally = make_tally()
    zeros = torch.zeros(3, 4, dtype=torch.long)
    tally.add(range(1, 2), torch.full((3, 4), 2.0), zeros, zeros, torch.tensor([0, 1, 2]))
    metrics = tally.metrics()
    assert metrics["loss"] == metrics["loss_last"] == 2.0
    assert metrics["loss_by_scale"] == {"2x2": 2.0}


def test_parts_add_up_to_the_whole():
    """Batches of one rank, groups of scales, and ranks."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(4, 11, generator=generator)
    targets, predictions = (torch.randint(10, (4, 11), generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 1, 3])
    whole, parts = make_tally(), [make_tally(), make_tally()]
    whole.add(PYRAMID.scales, losses, predictions, targets, labels)
    for rank, rows in enumerate((slice(0, 1), slice(1, 4))):
        for scales in (range(0, 2), range(2, 3)):
            tokens = PYRAMID.tokens(scales)
            values = (values[rows, tokens] for values in (losses, predictions, targets))
            parts[rank].add(scales, *values, labels[rows])
    torch.testing.assert_close(parts[0].sums + parts[1].sums, whole.sums)


def test_classes_without_images_have_no_figure_and_no_class_is_none():
    tally = make_tally()
    targets = torch.zeros(3, 11, dtype=torch.long)
    losses = torch.tensor([1.0, 3.0, 100.0]).view(3, 1).expand(3, 11)
    tally.add(PYRAMID.scales, losses, targets, targets, torch.tensor([1, 1, 3]))  # 3: trained without its class
    by_class, accuracies = tally.by_class()
    assert math.isnan(by_class[0])
    assert by_class[1] == pytest.approx(2.0)
    assert math.isnan(by_class[2])
    assert len(by_class) == len(accuracies) == 3
    assert accuracies[1] == 1.0


def test_rare_codes_do_not_count_as_used():
    """As VAR counts: more than a thousandth of an even share."""
    tally = make_tally()
    predictions = torch.zeros(2000, 11, dtype=torch.long)
    predictions[0, 0] = 4
    tally.add(PYRAMID.scales, torch.zeros(2000, 11), predictions, predictions, torch.zeros(2000, dtype=torch.long))
    assert tally.metrics()["codes_used"] == pytest.approx(0.1)
