import pytest
import torch

from utils.losses.adversarial import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    move_anchors_,
    ramp,
)


def test_the_hinge_asks_for_no_more_than_one():
    assert discriminator_loss(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -9.0])) == 0
    assert discriminator_loss(torch.zeros(3), torch.zeros(3)) == 1
    assert discriminator_loss(torch.tensor([0.0]), torch.tensor([1.0])) == 1.5


def test_what_looks_real_costs_the_generator_less():
    assert generator_loss(torch.tensor([2.0])) < generator_loss(torch.tensor([-2.0]))


@pytest.mark.parametrize(
    ("progress", "start", "length", "value"),
    [(0.0, 0.1, 0.2, 0.0), (0.2, 0.1, 0.2, 0.5), (0.9, 0.1, 0.2, 1.0), (0.1, 0.1, 0.0, 1.0), (0.0, 0.0, 0.0, 1.0)],
)
def test_the_adversarial_loss_comes_in_slowly(progress, start, length, value):
    assert ramp(progress, start, length) == pytest.approx(value)


def test_the_adaptive_weight_evens_the_gradients_within_its_bounds():
    squares = torch.tensor(4.0), torch.tensor(16.0)  # gradients of lengths 2 and 4
    assert adaptive_weight(*squares, 0.0, 10.0) == 0.5
    assert adaptive_weight(*squares, 0.6, 10.0) == pytest.approx(0.6)
    assert adaptive_weight(*squares, 0.0, 0.1) == pytest.approx(0.1)
    assert adaptive_weight(torch.tensor(1.0), torch.tensor(0.0), 0.0, 3.0) == 3.0  # nothing to say: not infinite


def test_lecam_holds_judgements_near_what_the_other_side_got():
    anchors = torch.tensor([0.5, -0.5])
    assert lecam_loss(torch.tensor([-0.5, -3.0]), torch.tensor([0.5, 3.0]), anchors) == 0
    assert lecam_loss(torch.tensor([1.5]), torch.tensor([-1.5]), anchors) == 2 * 2.0**2
    move_anchors_(anchors, torch.tensor([1.5, 2.5]), torch.tensor([-2.5]))
    assert anchors.tolist() == pytest.approx([0.5 + 0.0015, -0.5 - 0.002])
