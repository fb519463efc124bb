import pytest
import torch
from small_models import seeded

from utils.losses.adversarial import balanced_weight, discriminator_loss, generator_loss, lecam, ramp


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


def test_the_balanced_weight_is_the_ratio_of_gradients_within_bounds():
    last = torch.randn(4, 4, generator=seeded()).requires_grad_()
    reconstruction, adversarial = 3 * last.sum(), last.sum()
    assert balanced_weight(reconstruction, adversarial, last, 0.0, 100.0) == pytest.approx(3.0, rel=1e-4)
    assert balanced_weight(reconstruction, adversarial, last, 0.0, 2.0) == 2
    assert balanced_weight(reconstruction, 0 * adversarial, last, 0.25, 2.0) == 0.25  # it has nothing to say
    assert balanced_weight(reconstruction, torch.inf * adversarial, last, 0.25, 2.0) == 0.25


def test_lecam_leaves_usual_judgements_alone():
    zero = torch.zeros(())
    assert lecam(torch.tensor([0.0]), torch.tensor([0.0]), zero, zero) == 0
    assert lecam(torch.tensor([2.0]), torch.tensor([-1.0]), zero, zero) == 5
