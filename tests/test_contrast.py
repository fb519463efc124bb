import math

import pytest
import torch

from utils.losses.contrast import condition_contrast


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_the_loss_is_that_of_the_paper_on_two_images():
    own, other = torch.tensor([3.0, -1.0]), torch.tensor([2.0, -4.0])
    loss = condition_contrast(own, other, torch.tensor([False, False]), beta=0.5, weight=1.0)
    expected = -(log_sigmoid(1.5) + log_sigmoid(-0.5)) / 2 - (log_sigmoid(-1.0) + log_sigmoid(2.0)) / 2
    assert loss.item() == pytest.approx(expected)


def test_an_image_under_its_own_label_or_none_counts_as_a_positive_with_weight_one():
    own, other = torch.tensor([3.0, -1.0]), torch.tensor([3.0, -4.0])
    loss = condition_contrast(own, other, torch.tensor([True, False]), beta=0.5, weight=10.0)
    expected = -(log_sigmoid(1.5) + log_sigmoid(-0.5)) / 2 - (log_sigmoid(1.5) + 10 * log_sigmoid(2.0)) / 2
    assert loss.item() == pytest.approx(expected / 10)


def test_at_the_start_it_pulls_own_labels_up_and_others_down():
    own, other = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    condition_contrast(own, other, torch.tensor([False, False, False, True]), beta=0.02, weight=50.0).backward()
    torch.testing.assert_close(own.grad, torch.full((4,), -0.02 / 2 / 4 / 50))
    torch.testing.assert_close(other.grad, torch.tensor([0.02 / 2 / 4] * 3 + [-0.02 / 2 / 4 / 50]))
