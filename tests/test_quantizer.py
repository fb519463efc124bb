import pytest
import torch
import torch.nn.functional as F
from golden_weights import facts
from small_models import random_indices, randomise_, seeded

from models.pyramid import STANDARD_SIDES, Pyramid
from models.quantizer import (
    PLAIN,
    MultiScaleQuantizer,
    Quantized,
    QuantizerTraining,
    dropout_weights,
    gaussian_distance,
    phi_index,
    swap_codes,
)

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


# --- gradients against formulas -----------------------------------------------------------------------------------------


def test_gradients_of_one_scale_are_those_of_the_formulas():
    """With phi's convolution at 0 the sum is half a code: everything can be written down."""
    quantizer = MultiScaleQuantizer(Pyramid((2,)), num_codes=3, code_dim=2, num_phi=1).double()
    randomise_(quantizer)
    with torch.no_grad():
        quantizer.phi[0].weight.zero_()
        quantizer.phi[0].bias.zero_()
    features = torch.randn(2, 2, 2, 2, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    outer = torch.randn(features.shape, generator=seeded(2), dtype=torch.float64)
    quantized = quantizer(features)
    ((quantized.features * outer).sum() + quantized.loss).backward()

    codes, vectors = quantizer.codebook.weight.detach(), features.detach().permute(0, 2, 3, 1).flatten(0, 2)
    indices = torch.cdist(vectors, codes).argmin(dim=1)
    errors = codes[indices] / 2 - vectors  # (8, C)
    torch.testing.assert_close(quantized.loss, 1.25 * errors.square().mean())
    of_features = -0.25 * 2 * errors.view(2, 2, 2, 2).permute(0, 3, 1, 2) / errors.numel()
    torch.testing.assert_close(features.grad, outer + of_features)
    of_codes = torch.zeros_like(codes).index_add_(0, indices, errors / errors.numel())  # 2 * errors * 1/2
    torch.testing.assert_close(quantizer.codebook.weight.grad, of_codes)
    torch.testing.assert_close(quantizer.phi[0].bias.grad, errors.sum(0) / errors.numel())


@pytest.mark.parametrize("normalize_lookup", [False, True])
@pytest.mark.parametrize("training", [PLAIN, QuantizerTraining(scale_dropout=0.7, dropout_from=1)])
def test_gradients_of_several_scales_are_finite_differences(features, training, normalize_lookup):
    """For chosen codes the codebook term is quadratic in codes and in phi, so that central differences are exact."""
    quantizer = make_quantizer(normalize_lookup=normalize_lookup).double()
    features = features.double().requires_grad_()
    outer = torch.randn(features.shape, generator=seeded(2), dtype=torch.float64)
    quantized = quantizer(features, training, seeded(7))
    ((quantized.features * outer).sum() + quantized.loss).backward()
    depths = training.draw_depths(2, 3, seeded(7)) if training.scale_dropout else torch.tensor([3, 3])
    assert training is PLAIN or depths.min() < 3
    weights = dropout_weights(depths, 3).double()

    def errors() -> torch.Tensor:  # (K, B)
        sums = torch.stack(list(quantizer.partial_sums(quantized.indices)))
        return (sums - features.detach()).square().mean(dim=(2, 3, 4))

    torch.testing.assert_close(quantized.loss, 1.25 * (errors() * weights).sum() / 3)
    sums = torch.stack(list(quantizer.partial_sums(quantized.indices)))
    of_features = 0.25 * 2 * ((features.detach() - sums) * weights[..., None, None, None]).sum(0) / 3 / features[0].numel()
    torch.testing.assert_close(features.grad, outer + of_features)
    for parameter in quantizer.parameters():
        if parameter.grad is None:  # a phi that serves no scale
            continue
        direction = torch.randn(parameter.shape, generator=seeded(8), dtype=torch.float64)
        values = []
        for side in (0.1, -0.1):
            with torch.no_grad():
                parameter += side * direction
                values.append((errors() * weights).sum() / 3)
                parameter -= side * direction
        torch.testing.assert_close((parameter.grad * direction).sum(), (values[0] - values[1]) / 0.2)


def test_training_by_cosine_brings_codes_to_the_vectors():
    """Codes are chosen by direction and used as they are: descent must still lower the error, lengths included."""
    quantizer = make_quantizer(normalize_lookup=True)
    features = torch.randn(4, 8, 4, 4, generator=seeded(1))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        quantized = quantizer(features)
        quantized.loss.backward()
        optimizer.step()
        losses.append(quantized.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    *_, last = quantizer.partial_sums(quantizer.encode(features))
    torch.testing.assert_close(quantizer(features).features, last)


# --- means for training -------------------------------------------------------------------------------------------------


def plain_forward(quantizer: MultiScaleQuantizer, features: torch.Tensor) -> Quantized:
    """Quantization without any of the means, written out."""
    f_hat, indices, losses = quantizer.initial(len(features)), [], []
    for k in PYRAMID.scales:
        rest = F.interpolate(features.detach() - f_hat.detach(), size=PYRAMID.shapes[k], mode="area") if k < 2 else None
        rest = features.detach() - f_hat.detach() if rest is None else rest
        vectors, codes = rest.permute(0, 2, 3, 1).flatten(0, 2), quantizer.codebook.weight
        if quantizer.normalize_lookup:
            chosen = (F.normalize(vectors, dim=1) @ F.normalize(codes, dim=1).T).argmax(dim=1)
        else:
            chosen = torch.addmm(codes.square().sum(dim=1), vectors, codes.T, alpha=-2).argmin(dim=1)
        indices.append(chosen.view(len(features), -1))
        f_hat = quantizer.add_scale(f_hat, k, quantizer.codebook(indices[-1]))
        losses.append(F.mse_loss(f_hat, features.detach()) + 0.25 * F.mse_loss(f_hat.detach(), features))
    return Quantized(features + (f_hat - features).detach(), indices, torch.stack(losses).mean())


def outcome(quantizer: MultiScaleQuantizer, features: torch.Tensor, forward) -> list[torch.Tensor]:
    """All numbers of a forward and backward pass."""
    features = features.clone().requires_grad_()
    quantizer.zero_grad()
    quantized = forward(features)
    (quantized.loss + quantized.features.square().sum()).backward()
    gradients = [p.grad.clone() for p in quantizer.parameters() if p.grad is not None]
    return [quantized.features.detach(), *quantized.indices, quantized.loss.detach(), features.grad, *gradients]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


ALL = QuantizerTraining(scale_dropout=0.5, dropout_from=1, perturbation=0.3, neighbours=2, matching=0.1)


@pytest.mark.parametrize("normalize_lookup", [False, True])
def test_without_any_mean_nothing_changes_and_nothing_is_drawn(features, normalize_lookup):
    quantizer = make_quantizer(normalize_lookup=normalize_lookup)
    expected = outcome(quantizer, features, lambda x: plain_forward(quantizer, x))
    generator = seeded(9)
    states = generator.get_state(), torch.get_rng_state()
    assert same(outcome(quantizer, features, quantizer), expected)
    assert same(outcome(quantizer, features, lambda x: quantizer(x, QuantizerTraining(), generator)), expected)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_the_same_seed_draws_the_same(quantizer):
    features = torch.randn(6, 8, 4, 4, generator=seeded(1))
    first, second, other = (outcome(quantizer, features, lambda x, s=s: quantizer(x, ALL, seeded(s))) for s in (3, 3, 4))
    assert same(first, second)
    assert not torch.equal(first[0], other[0])


def test_evaluation_takes_the_means_as_well(quantizer, features):
    """They depend on what is asked, not on the mode of the module."""
    train, evaluated = (quantizer.train(mode)(features, ALL, seeded(3)).features for mode in (True, False))
    assert torch.equal(train, evaluated)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale_dropout": 1.1},
        {"perturbation": -0.1},
        {"perturbation": float("nan")},
        {"dropout_from": 0},
        {"neighbours": 0},
        {"matching": -1.0},
        {"matching": float("nan")},
    ],
)
def test_wrong_means_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QuantizerTraining(**wrong)


def test_means_that_do_not_fit_the_quantizer_are_named(quantizer, features):
    with pytest.raises(ValueError, match="dropout_from=4: there are 3 scales"):
        quantizer(features, QuantizerTraining(scale_dropout=0.1, dropout_from=4))
    with pytest.raises(ValueError, match="neighbours=24: a codebook of 24 codes has 23"):
        quantizer(features, QuantizerTraining(perturbation=0.1, neighbours=24))


def test_dropout_stops_the_sums_at_the_drawn_scale(quantizer):
    features = torch.randn(8, 8, 4, 4, generator=seeded(1))
    training = QuantizerTraining(scale_dropout=1.0, dropout_from=1)
    quantized = quantizer(features, training, seeded(3))
    depths = training.draw_depths(8, 3, seeded(3))
    assert set(depths.tolist()) == {1, 2, 3}
    sums = list(quantizer.partial_sums(quantizer.encode(features)))
    expected = torch.stack([sums[depth - 1][b] for b, depth in enumerate(depths.tolist())])
    torch.testing.assert_close(quantized.features, expected)
    assert same(quantized.indices, quantizer.encode(features))
    # the loss too: at every scale of the images that use it
    errors = torch.stack([(f_hat - features).square().mean(dim=(1, 2, 3)) for f_hat in sums])
    means = [errors[k, depths > k].mean() for k in range(3)]
    torch.testing.assert_close(quantized.loss, 1.25 * torch.stack(means).mean())


def test_scales_that_no_image_uses_have_gradients_of_zero(features):
    """Not None: DDP waits for the gradient of every parameter."""
    quantizer = make_quantizer(num_phi=0)
    quantized = quantizer(features, QuantizerTraining(scale_dropout=1.0, dropout_from=1), seeded(3))
    depths = QuantizerTraining(scale_dropout=1.0, dropout_from=1).draw_depths(2, 3, seeded(3))
    assert depths.max() < 3
    quantized.loss.backward()
    sums = list(quantizer.partial_sums(quantized.indices))
    used = [((sums[k] - features)[depths > k]).square().mean() for k in range(depths.max())]
    torch.testing.assert_close(quantized.loss, 1.25 * torch.stack(used).mean())
    assert quantizer.phi[2].weight.grad.count_nonzero() == 0
    assert quantizer.phi[0].weight.grad.count_nonzero() > 0


def test_dropout_takes_its_share_of_images_and_starts_where_told():
    depths = QuantizerTraining(scale_dropout=0.1, dropout_from=3).draw_depths(20_000, 10, seeded(1))
    assert depths.min() == 3
    counts = depths.bincount(minlength=11)
    assert counts[3:10].sum() / 20_000 == pytest.approx(0.1 * 7 / 8, abs=0.01)  # 10 of 10 scales is drawn as well
    assert counts[3:10].min() > 0.7 * counts[3:10].max()


def test_neighbours_are_the_nearest_other_codes(quantizer):
    distances = torch.cdist(quantizer.codebook.weight.double(), quantizer.codebook.weight.double())
    assert torch.equal(quantizer.neighbours(4), distances.argsort(dim=1)[:, 1:5])
    cosine = make_quantizer(normalize_lookup=True)
    codes = F.normalize(cosine.codebook.weight.double(), dim=1)
    assert torch.equal(cosine.neighbours(4), (codes @ codes.T).argsort(dim=1, descending=True)[:, 1:5])


def test_swaps_take_their_share_and_reach_all_neighbours(quantizer):
    neighbours = quantizer.neighbours(3)
    indices = torch.randint(24, (50, 400), generator=seeded(1))
    swapped = swap_codes(indices, neighbours, 0.15, seeded(2))
    moved = swapped != indices
    assert moved.float().mean().item() == pytest.approx(0.15, abs=0.01)
    places = (neighbours[indices[moved]] == swapped[moved, None]).long()
    assert (places.sum(1) == 1).all()  # each swapped code is one of the neighbours
    torch.testing.assert_close(places.double().mean(0), torch.full((3,), 1 / 3).double(), atol=0.03, rtol=0)
    assert torch.equal(swap_codes(indices, neighbours, 1.0, seeded(2)) != indices, torch.ones(50, 400, dtype=torch.bool))


def test_perturbed_codes_are_what_the_decoder_gets(quantizer, features):
    training = QuantizerTraining(perturbation=0.4, neighbours=2)
    inputs = features.clone().requires_grad_()
    quantized, plain = quantizer(inputs, training, seeded(3)), quantizer(features)
    generator, neighbours = seeded(3), quantizer.neighbours(2)
    swapped = [swap_codes(indices, neighbours, 0.4, generator) for indices in plain.indices]
    *_, expected = quantizer.partial_sums(swapped)
    assert not all(torch.equal(a, b) for a, b in zip(swapped, plain.indices, strict=True))
    torch.testing.assert_close(quantized.features, expected)
    assert same(quantized.indices, plain.indices)
    assert torch.equal(quantized.loss, plain.loss)
    quantized.features.sum().backward()
    assert torch.equal(inputs.grad, torch.ones_like(inputs))
    assert quantizer.codebook.weight.grad is None


def test_perturbed_sums_stop_as_well(quantizer):
    features = torch.randn(8, 8, 4, 4, generator=seeded(1))
    quantized = quantizer(features, ALL, seeded(3))
    generator, neighbours = seeded(3), quantizer.neighbours(ALL.neighbours)
    depths = ALL.draw_depths(8, 3, generator).tolist()
    sums = list(
        quantizer.partial_sums(
            [swap_codes(indices, neighbours, ALL.perturbation, generator) for indices in quantizer.encode(features)]
        )
    )
    torch.testing.assert_close(quantized.features, torch.stack([sums[depth - 1][b] for b, depth in enumerate(depths)]))


def test_distance_of_gaussians_in_closed_form():
    """One dimension: difference of means and of deviations; a turn of the axes changes nothing."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [7.0]])  # means 1 and 4, deviations 1 and 3
    assert gaussian_distance(a, b).item() == pytest.approx(9 + 4)
    x, y = torch.randn(60, 4, generator=seeded(1)), 2 * torch.randn(30, 4, generator=seeded(2)) + 1
    turn = torch.linalg.qr(torch.randn(4, 4, generator=seeded(3), dtype=torch.float64)).Q
    turned = gaussian_distance(x.double() @ turn, y.double() @ turn)
    torch.testing.assert_close(gaussian_distance(x, y), turned)
    torch.testing.assert_close(gaussian_distance(x, y), gaussian_distance(y, x))


def test_distance_of_gaussians_has_the_right_gradient():
    x = torch.randn(20, 3, generator=seeded(1), dtype=torch.float64)
    y = torch.randn(9, 3, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda codes: gaussian_distance(x, codes), (y,))
    gaussian_distance(x.requires_grad_(), y).backward()
    assert x.grad is None


@pytest.mark.parametrize("spread", [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3)])
def test_distance_of_equal_distributions_is_zero_and_pulls_at_nothing(spread):
    """Also where all directions are alike and where some have no spread at all."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3) * spread
    codes = corners.flip(0).repeat(2, 1).requires_grad_()
    distance = gaussian_distance(corners, codes)
    distance.backward()
    assert distance.item() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(codes.grad, torch.zeros_like(codes), atol=1e-6, rtol=0)


def test_matching_moves_the_codebook_and_nothing_else(quantizer, features):
    training = QuantizerTraining(matching=0.5)
    names = ["features", *dict(quantizer.named_parameters())]
    gradients = []
    for means in (PLAIN, training):
        quantizer.zero_grad()
        inputs = features.clone().requires_grad_()
        quantizer(inputs, means).loss.backward()
        gradients.append([inputs.grad, *(p.grad for p in quantizer.parameters())])
    moved = [n for n, a, b in zip(names, *gradients, strict=True) if a is not None and not torch.equal(a, b)]
    assert moved == ["codebook.weight"]
    residuals = torch.cat([step.residual for step in quantizer._descend(features)])
    distance = gaussian_distance(residuals, quantizer.codebook.weight)
    added = quantizer(features, training).loss - quantizer(features).loss
    torch.testing.assert_close(added, 0.5 * distance.float(), atol=1e-5, rtol=1e-4)
    difference = gradients[1][1] - gradients[0][1]
    torch.testing.assert_close(difference, torch.autograd.grad(0.5 * distance, quantizer.codebook.weight)[0])
    assert (difference.abs().sum(dim=1) > 0).all()  # every code, chosen or not


def test_matching_brings_dead_codes_to_the_vectors():
    """All codes far away but one: without it the others never move, with it they come into use."""
    used = []
    for training in (PLAIN, QuantizerTraining(matching=1.0)):
        quantizer = make_quantizer()
        features = torch.randn(8, 8, 4, 4, generator=seeded(1))
        with torch.no_grad():
            quantizer.codebook.weight[1:] += 20
        optimizer = torch.optim.Adam([quantizer.codebook.weight], lr=0.2)
        for _ in range(150):
            optimizer.zero_grad()
            quantizer(features, training).loss.backward()
            optimizer.step()
        used.append(len(torch.cat(quantizer.encode(features), dim=1).unique()))
    assert used[0] == 1
    assert used[1] >= 12


def test_means_under_autocast(quantizer, features):
    """Distances, sums and the distance of the distributions stay as exact as without."""
    plain = quantizer(features, ALL, seeded(3))
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(features, ALL, seeded(3))
    torch.testing.assert_close(cast.features, plain.features)
    torch.testing.assert_close(cast.loss, plain.loss)
