import pytest
import torch
from golden_weights import IMAGES, LOGITS, TRANSFORMERS, assert_near, every, facts, tensors, tokenizer, transformer
from small_models import CODE_DIM, NUM_CLASSES, NUM_CODES, SIDES, VARIANTS, seeded, small_tokenizer, small_transformer

from models.generate import _largest, draw_labels, filter_logits, generate, guide, gumbel_weights, sample_indices

STRIDE = facts("tokenizer")["image_stride"]
SMOOTH = ("mvar_tiny", "var_tiny", "var_tiny_saln")
SAMPLED = {"guidance_scale": 3.0, "top_k": 20, "top_p": 0.9}
GREEDY = {"top_k": 1, "top_p": 0.0}
SAMPLING = tensors("sampling")
FILTERS = [tuple(case) for case in facts("sampling")["filters"]]
LABELS = torch.tensor([1, 4])


@pytest.fixture(params=TRANSFORMERS)
def case(request):
    return transformer(request.param), tokenizer(facts(request.param)["tokenizer"]), tensors(request.param)


@pytest.fixture(scope="module")
def small():
    return small_transformer().requires_grad_(False), small_tokenizer()


def joined(indices: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(indices, dim=1)


# --- golden values ------------------------------------------------------------------------------------------------------


def test_golden_greedy(case):
    model, vae, golden = case
    generation = generate(model, vae, golden["generate.labels"], guidance_scale=1.5, **GREEDY)
    assert torch.equal(joined(generation.indices), golden["greedy.indices"])
    assert_near(every(STRIDE, generation.images), golden["greedy.images"], IMAGES)


def test_golden_greedy_with_strong_guidance(case):
    model, vae, golden = case
    generation = generate(model, vae, golden["generate.labels"], guidance_scale=4.0, **GREEDY)
    assert torch.equal(joined(generation.indices), golden["greedy_4.indices"])


@pytest.mark.parametrize(("label", "name"), [(5, "one_label"), (10, "no_class")])
def test_golden_single_label(case, label, name):
    model, vae, golden = case
    generation = generate(model, vae, torch.tensor([label, label]), guidance_scale=1.5, **GREEDY)
    assert torch.equal(joined(generation.indices), golden[f"{name}.indices"])


def test_golden_sampling(case):
    model, vae, golden = case
    generation = generate(model, vae, golden["generate.labels"], **SAMPLED, generator=seeded(123))
    assert torch.equal(joined(generation.indices), golden["sampled.indices"])


def test_golden_sampling_with_labels_drawn_first(case):
    model, vae, golden = case
    generator = seeded(7)
    labels = draw_labels(10, 4, generator)
    generation = generate(model, vae, labels, **SAMPLED, generator=generator)
    assert torch.equal(joined(generation.indices), golden["sampled_labels.indices"])


@pytest.mark.parametrize("name", SMOOTH)
def test_golden_smooth(name):
    golden, vae = tensors(name), tokenizer(facts(name)["tokenizer"])
    generation = generate(transformer(name), vae, golden["generate.labels"], **SAMPLED, smooth=True, generator=seeded(123))
    assert torch.equal(joined(generation.indices), golden["smooth.indices"])
    assert_near(every(STRIDE, generation.images), golden["smooth.images"], IMAGES)


@pytest.mark.parametrize("name", SMOOTH)
def test_golden_smooth_with_one_candidate(name):
    golden, vae = tensors(name), tokenizer(facts(name)["tokenizer"])
    generation = generate(transformer(name), vae, golden["generate.labels"], guidance_scale=3.0, smooth=True, **GREEDY)
    expected = vae.decode_features(golden["smooth_topk1.sum"])
    assert_near(generation.images, (expected + 1) / 2, IMAGES)


def test_golden_markov():
    golden, vae = tensors("markov_tiny"), tokenizer("markov")
    generation = generate(transformer("markov_tiny"), vae, golden["generate.labels"], guidance_scale=2.0, **GREEDY)
    assert torch.equal(joined(generation.indices), golden["greedy.indices"])
    assert_near(every(facts("markov_tiny")["image_stride"], generation.images), golden["greedy.images"], IMAGES)


@pytest.mark.parametrize("name", ["mvar_tiny", "var_tiny"])
def test_golden_logits_before_and_after_guidance(name):
    model, golden = transformer(name), tensors(name)
    indices = model.pyramid.split(golden["greedy.indices"])
    inputs = tokenizer(facts(name)["tokenizer"]).teacher_inputs(indices)
    labels = golden["generate.labels"]
    with torch.no_grad():
        raw = model(torch.cat([labels, torch.full_like(labels, model.unconditional)]), inputs.repeat(2, 1, 1))
    assert_near(raw, golden["greedy.raw_logits"], LOGITS)
    guided = [guide(part, 1.5 * k / 3) for k, part in enumerate(model.pyramid.split(raw))]
    assert_near(torch.cat(guided, dim=1), golden["greedy.guided_logits"], LOGITS)


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_golden_filters(top_k, top_p):
    golden = {kind: SAMPLING[f"k{top_k}_p{top_p:g}.{kind}"] for kind in ("keep", "probabilities", "samples")}
    logits = filter_logits(SAMPLING["logits"], top_k, top_p)
    assert torch.equal(logits.isfinite(), golden["keep"])
    probabilities = logits.softmax(dim=-1)[..., :: facts("sampling")["probability_stride"]]
    assert_near(probabilities, golden["probabilities"], 1e-6)
    assert torch.equal(sample_indices(logits, seeded(11)), golden["samples"])


@pytest.mark.parametrize("temperature", facts("sampling")["temperatures"])
def test_golden_gumbel_weights(temperature):
    logits = filter_logits(SAMPLING["logits"], 10, 0.96) * 1.5
    weights = gumbel_weights(logits, temperature, seeded(13))
    assert_near(weights, SAMPLING[f"gumbel.{temperature:g}"], 1e-3)
    assert_near(weights.sum(dim=-1), torch.ones(3, 7), 1e-5)


# --- filters ------------------------------------------------------------------------------------------------------------


def test_ties_with_the_last_kept_logit_stay():
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [True, True, True, True, False]


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert filter_logits(torch.arange(5.0), top_k=9).isfinite().all()


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert filter_logits(logits, top_p=0.4).isfinite().sum() == 1
    assert filter_logits(logits, top_p=0.6).isfinite().sum() == 2
    assert filter_logits(logits, top_p=0.9).isfinite().sum() == 3
    assert filter_logits(logits, top_p=1e-9).isfinite().tolist() == [True, False, False, False]


def test_filters_leave_their_argument_alone():
    logits = torch.arange(5.0)
    filter_logits(logits, top_k=2, top_p=0.5)
    assert torch.equal(logits, torch.arange(5.0))


def filtered_by_sorting(logits: torch.Tensor, top_k: int, top_p: float, stable: bool) -> torch.Tensor:
    """The released filter: the whole vocabulary is sorted."""
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[..., -1:], -torch.inf)
    ascending, order = logits.sort(dim=-1, stable=stable)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


@pytest.mark.parametrize("num_values", [0, 1, 9, 60])
@pytest.mark.parametrize("top_k", [0, 1, 7, 64, 100, 700, 2000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.96, 1.0])
def test_sorting_the_largest_is_sorting_all(top_k, top_p, num_values):
    """With and without ties, also more of them with the k-th largest than are sorted. On GPUs, where sorting is stable, nothing
    may depend on values; the mask that they use is compared too."""
    logits = 3 * torch.randn(2, 5, 1024, generator=seeded(top_k))
    if num_values:
        logits = (logits / 20 * num_values).round() / num_values * 20
    assert torch.equal(filter_logits(logits, top_k, top_p), filtered_by_sorting(logits, top_k, top_p, stable=False))
    keep, _ = _largest(logits, top_k, top_p)
    assert torch.equal(keep, filtered_by_sorting(logits, top_k, top_p, stable=True).isfinite())


@pytest.mark.parametrize("num_codes", [7, 24, 4096])
def test_indices_are_those_of_multinomial(num_codes):
    """So are the random numbers that it takes, from one generator or from one for each image."""
    logits = filter_logits(torch.randn(3, 5, num_codes, generator=seeded()), top_k=num_codes // 2)
    probabilities = logits.softmax(dim=-1)
    ours, theirs = seeded(4), seeded(4)
    expected = torch.multinomial(probabilities.flatten(0, 1), 1, replacement=True, generator=theirs).view(3, 5)
    assert torch.equal(sample_indices(logits, ours), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())
    each = [torch.multinomial(part, 1, True, generator=seeded(n))[:, 0] for n, part in enumerate(probabilities)]
    assert torch.equal(sample_indices(logits, [seeded(n) for n in range(3)]), torch.stack(each))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_filter_and_draw_as_before():
    logits = torch.randn(3, 5, 4096, generator=seeded()).cuda()
    filtered = filter_logits(logits, 900, 0.96)
    assert torch.equal(filtered, filtered_by_sorting(logits, 900, 0.96, stable=False))
    generators = [torch.Generator("cuda").manual_seed(1) for _ in range(2)]
    expected = torch.multinomial(filtered.softmax(dim=-1).flatten(0, 1), 1, replacement=True, generator=generators[0])
    assert torch.equal(sample_indices(filtered, generators[1]), expected.view(3, 5))


def test_guidance_of_no_strength_is_the_conditional_half():
    logits = torch.randn(4, 3, 5, generator=seeded())
    assert torch.equal(guide(logits, 0.0), logits[:2])
    assert_near(guide(logits, 2.0), 3 * logits[:2] - 2 * logits[2:], 1e-6)


def test_drawn_labels_are_classes_and_never_no_class():
    labels = draw_labels(3, 1000, seeded())
    assert sorted(labels.unique().tolist()) == [0, 1, 2]
    assert torch.equal(labels, draw_labels(3, 1000, seeded()))


# --- the loop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_are_the_argmax_of_one_pass_over_them(name):
    """Generation is teacher forcing on its own tokens; without guidance only the conditional rows matter."""
    model, vae = small_transformer(**VARIANTS[name]).requires_grad_(False), small_tokenizer()
    generation = generate(model, vae, LABELS, guidance_scale=0.0, **GREEDY)
    logits = model(LABELS, vae.teacher_inputs(generation.indices))
    chosen = logits.gather(-1, joined(generation.indices)[..., None])[..., 0]
    assert_near(chosen, logits.amax(dim=-1), 1e-4)
    assert_near(generation.images, (vae.decode(generation.indices) + 1) / 2, 1e-4)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("guidance_scale", "rows"), [(0.0, 2), (1.5, 4)])
def test_each_mixer_is_called_once_per_scale(name, guidance_scale, rows):
    model, vae = small_transformer(**VARIANTS[name]), small_tokenizer()
    calls = {mixer: [] for block in model.blocks for mixer in block.mixers}
    for mixer in calls:
        mixer.register_forward_hook(lambda mixer, inputs, _: calls[mixer].append(tuple(inputs[0].shape[:2])))
    generate(model, vae, LABELS, guidance_scale=guidance_scale)
    expected = [(rows, length) for length in model.pyramid.lengths]
    assert all(shapes == expected for shapes in calls.values())


def test_guidance_changes_the_picture_but_not_the_first_token(small):
    plain, guided = (generate(*small, LABELS, guidance_scale=strength, **GREEDY) for strength in (0.0, 6.0))
    assert torch.equal(plain.indices[0], guided.indices[0])
    assert not torch.equal(joined(plain.indices), joined(guided.indices))


@pytest.mark.parametrize("smooth", [False, True])
def test_each_image_may_have_random_numbers_of_its_own(small, smooth):
    together = generate(*small, LABELS, smooth=smooth, generator=[seeded(n) for n in range(len(LABELS))])
    for n in range(len(LABELS)):
        alone = generate(*small, LABELS[n : n + 1], smooth=smooth, generator=[seeded(n)])
        torch.testing.assert_close(alone.images[0], together.images[n], atol=1e-4, rtol=0)


def test_result_is_given_by_the_generator(small):
    a, b, c = (generate(*small, LABELS, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(a.images, b.images)
    assert not torch.equal(joined(a.indices), joined(c.indices))


def test_global_random_state_is_left_alone(small):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(*small, LABELS, smooth=True, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes_and_range(small):
    generation = generate(*small, LABELS, generator=seeded())
    assert generation.images.shape == (2, 3, 18, 18)
    assert 0 <= generation.images.min() < generation.images.max() <= 1
    assert [scale.shape for scale in generation.indices] == [(2, side * side) for side in SIDES]
    assert not generation.images.requires_grad


@pytest.mark.parametrize("sides", [(2,), ((1, 2), (2, 3), (4, 5))])
@pytest.mark.parametrize("family", ["var", "mvar", "markov"])
def test_unusual_pyramids(family, sides):
    model, vae = small_transformer(family, sides=sides), small_tokenizer(sides)
    generation = generate(model, vae, LABELS, **GREEDY)
    assert torch.equal(generation.images, (vae.decode(generation.indices) + 1) / 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sides": (1, 2)}, "pyramid is 1_2_3_5_8_9, the tokenizer's 1_2:"),
        ({"num_codes": NUM_CODES + 1}, f"number of codes is {NUM_CODES}, the tokenizer's {NUM_CODES + 1}"),
        ({"code_dim": 2 * CODE_DIM}, f"code width is {CODE_DIM}, the tokenizer's {2 * CODE_DIM}"),
    ],
)
def test_tokenizer_that_does_not_fit(small, config, message):
    with pytest.raises(ValueError, match=message):
        generate(small[0], small_tokenizer(**config), LABELS)


@pytest.mark.parametrize("arguments", [{"guidance_scale": -1.0}, {"top_k": -1}, {"top_p": -0.1}, {"top_p": 1.1}])
def test_impossible_arguments(small, arguments):
    with pytest.raises(ValueError, match="=".join(map(str, *arguments.items()))):
        generate(*small, LABELS, **arguments)


def test_weights_that_give_no_numbers_are_reported():
    model = small_transformer().requires_grad_(False)
    model.head.bias[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, small_tokenizer(), LABELS)


def test_label_of_no_class_is_allowed(small):
    generation = generate(*small, torch.tensor([NUM_CLASSES]), **GREEDY)
    unguided = generate(*small, torch.tensor([NUM_CLASSES]), guidance_scale=0.0, **GREEDY)
    assert torch.equal(joined(generation.indices), joined(unguided.indices))
