import pytest
import torch

from utils.losses.adversarial import discriminator_loss, generator_loss, ramp


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
