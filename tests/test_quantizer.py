import pytest
import torch
import torch.nn.functional as F
from golden_weights import facts
from small_models import random_indices, randomise_, seeded

from models.pyramid import STANDARD_SIDES, Pyramid
from models.quantizer import MultiScaleQuantizer, phi_index

PYRAMID = Pyramid((1, 2, 4))


def make_quantizer(**config) -> MultiScaleQuantizer:
    quantizer = MultiScaleQuantizer(PYRAMID, num_codes=24, code_dim=8, **config)
    randomise_(quantizer)
    return quantizer


@pytest.fixture
def quantizer() -> MultiScaleQuantizer:
    return make_quantizer()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 8, 4, 4, generator=seeded(1))


@pytest.mark.parametrize("case", facts("released")["phi_index"])
def test_which_phi_serves_which_scale(case):
    pyramid, num_phi = case.split("_qsr")
    sides = {**{str(pixels): sides for pixels, sides in STANDARD_SIDES.items()}, "1234": "1234", "12358": "12358"}[pyramid]
    assert phi_index(int(num_phi), len(sides)) == tuple(facts("released")["phi_index"][case])


def test_one_scale_takes_the_first_phi():
    assert phi_index(4, 1) == (0,)


def test_nearest_code_is_the_one_of_least_distance(quantizer):
    vectors = torch.randn(50, 8, generator=seeded(3))
    distances = torch.cdist(vectors.double(), quantizer.codebook.weight.double())
    assert torch.equal(quantizer.nearest(vectors), distances.argmin(dim=1))


def test_normalized_lookup_ignores_lengths():
    quantizer = make_quantizer(normalize_lookup=True)
    vectors = torch.randn(50, 8, generator=seeded(3))
    cosines = F.cosine_similarity(vectors[:, None], quantizer.codebook.weight[None], dim=-1)
    assert torch.equal(quantizer.nearest(vectors), cosines.argmax(dim=1))
    assert torch.equal(quantizer.nearest(vectors), quantizer.nearest(vectors * 7))


def test_lookup_is_float32_under_autocast(quantizer):
    with torch.no_grad():  # codes closer to one another than bfloat16 can tell
        quantizer.codebook.weight.copy_(1 + 1e-3 * torch.randn(24, 8, generator=seeded(4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer.nearest(quantizer.codebook.weight).tolist() == list(range(24))


def test_forward_and_encode_choose_the_same_codes(quantizer, features):
    quantized = quantizer(features)
    assert all(torch.equal(a, b) for a, b in zip(quantized.indices, quantizer.encode(features), strict=True))
    *_, last = quantizer.partial_sums(quantized.indices)
    torch.testing.assert_close(quantized.features, last)


def test_gradient_passes_straight_through(quantizer, features):
    features.requires_grad_()
    weights = torch.randn(features.shape, generator=seeded(5))
    (quantizer(features).features * weights).sum().backward()
    torch.testing.assert_close(features.grad, weights)
    assert quantizer.codebook.weight.grad is None


def test_loss_weighs_the_commitment_of_features_less(features):
    """Both halves have the same value, which is thus (1 + commitment) times either; only one of them moves the features."""
    losses, gradients = [], []
    for commitment in (0.25, 0.5):
        inputs = features.clone().requires_grad_()
        loss = make_quantizer(commitment=commitment)(inputs).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, inputs)[0])
    assert losses[1] / losses[0] == pytest.approx(1.5 / 1.25)
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_loss_moves_codebook_and_phi(quantizer, features):
    quantizer(features).loss.backward()
    assert quantizer.codebook.weight.grad.abs().sum() > 0
    assert all(quantizer.phi[i].weight.grad.abs().sum() > 0 for i in quantizer.phi_index)


def test_teacher_inputs_are_what_generation_feeds_back(quantizer):
    indices = random_indices(PYRAMID)
    f_hat, expected = quantizer.initial(2), []
    for k in range(PYRAMID.num_scales - 1):
        f_hat = quantizer.add_scale(f_hat, k, quantizer.codebook(indices[k]))
        expected.append(quantizer.next_input(f_hat, k))
    torch.testing.assert_close(quantizer.teacher_inputs(indices), torch.cat(expected, dim=1))


def test_partial_sums_of_the_first_scales_only(quantizer):
    indices = random_indices(PYRAMID)
    whole = list(quantizer.partial_sums(indices))
    assert all(torch.equal(a, b) for a, b in zip(quantizer.partial_sums(indices[:2]), whole[:2], strict=True))


def test_add_scale_leaves_its_argument_alone(quantizer):
    f_hat = torch.ones(2, 8, 4, 4)
    quantizer.add_scale(f_hat, 2, torch.ones(2, 16, 8))
    assert torch.equal(f_hat, torch.ones(2, 8, 4, 4))


def test_restart_moves_the_unused_codes_onto_residuals(quantizer, features):
    before = quantizer.codebook.weight.detach().clone()
    residuals = torch.cat([step.residual for step in quantizer._descend(features)]).detach()
    unused = torch.zeros(24, dtype=torch.bool)
    unused[[3, 7, 20]] = True
    quantizer.restart_codes_(unused, features, seeded(6))
    after = quantizer.codebook.weight.detach()
    assert torch.equal(after[~unused], before[~unused])
    assert all((residuals == code).all(dim=1).any() for code in after[unused])


def test_restart_without_unused_codes_changes_nothing(quantizer, features):
    before = quantizer.codebook.weight.detach().clone()
    quantizer.restart_codes_(torch.zeros(24, dtype=torch.bool), features, seeded(6))
    assert torch.equal(quantizer.codebook.weight, before)
