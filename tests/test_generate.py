import pytest
import torch
from golden_weights import IMAGES, LOGITS, TRANSFORMERS, assert_near, every, facts, tensors, tokenizer, transformer
from small_models import CODE_DIM, NUM_CLASSES, NUM_CODES, SIDES, VARIANTS, seeded, small_tokenizer, small_transformer

from models.drawing import draw_labels, guide
from models.generate import GUIDANCE_SCHEDULES, Refiner, SamplingConfig, generate, sample

STRIDE = facts("tokenizer")["image_stride"]
SMOOTH = ("mvar_tiny", "var_tiny", "var_tiny_saln")
SAMPLED = {"guidance_scale": 3.0, "top_k": 20, "top_p": 0.9}
GREEDY = {"top_k": 1, "top_p": 0.0}
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


def rows_by_scale(model, monkeypatch) -> list[int]:
    """Fills with the rows that the transformer computes at every scale."""
    rows, hidden = [], model.hidden

    def counted(inputs, scales, conditioning, states=None):
        rows.append(len(inputs))
        return hidden(inputs, scales, conditioning, states)

    monkeypatch.setattr(model, "hidden", counted)
    return rows


@pytest.mark.parametrize(
    ("family", "scales", "expected"),
    [
        ("mvar", None, [4] * 6),
        ("var", (1, 3), [4, 4, 4, 2, 2, 2]),
        ("mvar", (3, 4), [4, 4, 4, 4, 2, 2]),  # the first two make the state that the others start from
        ("markov", (3, 4), [2, 2, 4, 4, 2, 2]),  # which has none
    ],
)
def test_rows_of_no_class_are_computed_only_where_guidance_needs_them(monkeypatch, family, scales, expected):
    model, vae = small_transformer(family).requires_grad_(False), small_tokenizer()
    rows = rows_by_scale(model, monkeypatch)
    generate(model, vae, LABELS, guidance_scales=scales)
    assert rows == expected


@pytest.mark.parametrize("family", ["var", "mvar", "markov", "markov-mamba"])
def test_guidance_on_some_scales_is_guidance_whose_strength_is_zero_on_the_others(monkeypatch, family):
    model, vae = small_transformer(family).requires_grad_(False), small_tokenizer()
    some = generate(model, vae, LABELS, guidance_scale=3.0, guidance_scales=(3, 4), **GREEDY)
    shares = iter([0, 0, 2 / 5, 3 / 5, 0, 0])
    monkeypatch.setitem(GUIDANCE_SCHEDULES, "linear", lambda progress: next(shares))
    whole = generate(model, vae, LABELS, guidance_scale=3.0, **GREEDY)
    assert torch.equal(joined(some.indices), joined(whole.indices))
    assert_near(some.images, whole.images, 1e-5)


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("how", [{}, {"guidance_scale": 0.0}, {"guidance_scales": (2, 3)}, {"guidance_scales": (5, 6)}])
def test_a_transformer_that_refines_its_own_draft_makes_what_it_makes_alone(family, how):
    model, vae = small_transformer(**VARIANTS[family]).requires_grad_(False), small_tokenizer()
    config = SamplingConfig(**{"guidance_scale": 3.0, "top_k": 1, "top_p": 0.0} | how)
    alone = sample(model, vae, LABELS, config)
    for drafted in (1, 4):
        together = sample(model, vae, LABELS, config, refiner=Refiner(model, drafted))
        assert torch.equal(joined(together.indices), joined(alone.indices))


@pytest.mark.parametrize(("draft", "refine"), [("mvar", "var"), ("var", "mvar"), ("markov", "mvar"), ("mvar", "markov")])
def test_another_transformer_goes_on_where_the_first_one_ends(draft, refine):
    first, second = (small_transformer(family).requires_grad_(False) for family in (draft, refine))
    vae, config = small_tokenizer(), SamplingConfig(0.0, 1, 0.0)
    together = sample(first, vae, LABELS, config, refiner=Refiner(second, 3))
    assert all(
        torch.equal(*pair) for pair in zip(together.indices[:3], sample(first, vae, LABELS, config).indices, strict=False)
    )
    # every further scale is the likeliest to the second one, given all before it
    logits = second(LABELS, vae.teacher_inputs(together.indices))
    for k in (3, 4, 5):
        scale = second.pyramid.tokens(range(k, k + 1))
        chosen = logits[:, scale].gather(-1, together.indices[k][..., None])[..., 0]
        assert_near(chosen, logits[:, scale].amax(dim=-1), 1e-4)


@pytest.mark.parametrize(
    ("changes", "drafted", "named"),
    [
        ({}, 6, "6 drafted scales: the pyramid has 6: give 1 to 5"),
        ({}, 0, "0 drafted scales"),
        ({"sides": (1, 2, 3)}, 2, "pyramid"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(small, changes, drafted, named):
    with pytest.raises(ValueError, match=named):
        sample(*small, LABELS, SamplingConfig(), refiner=Refiner(small_transformer(**changes), drafted))


def test_guidance_grows_by_its_schedule():
    how = {name: SamplingConfig(2.0, guidance_schedule=name) for name in GUIDANCE_SCHEDULES}
    assert [how["linear"].strength(p) for p in (0, 0.5, 1)] == [0, 1, 2]
    assert [how["constant"].strength(p) for p in (0, 0.5, 1)] == [2, 2, 2]
    assert [how["cosine"].strength(p) for p in (0, 0.5, 1)] == pytest.approx([0, 1, 2])
    assert how["cosine"].strength(0.25) == pytest.approx(2 * (1 - 0.5**0.5) / 2)


def test_a_low_temperature_draws_the_likeliest_and_one_changes_nothing(small):
    cold = generate(*small, LABELS, temperature=(1e-4, 1e-4), generator=seeded())
    greedy = generate(*small, LABELS, **GREEDY)
    assert torch.equal(joined(cold.indices), joined(greedy.indices))
    usual, one = (generate(*small, LABELS, generator=seeded(), **how) for how in ({}, {"temperature": (1.0, 1.0)}))
    assert torch.equal(usual.images, one.images)
    # warm at the first scale, cold at the last: there it is the likeliest given what is before it
    mixed = generate(*small, LABELS, guidance_scale=0.0, temperature=(1.0, 1e-4), generator=seeded())
    logits = small[0](LABELS, small[1].teacher_inputs(mixed.indices))
    assert torch.equal(mixed.indices[-1], logits[:, -(SIDES[-1] ** 2) :].argmax(dim=-1))
    assert not torch.equal(mixed.indices[2], greedy.indices[2])


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"guidance_schedule": "up"}, "give one of linear, constant, cosine"),
        ({"guidance_scales": (3, 2)}, "guidance_scales"),
        ({"guidance_scales": (0, 2)}, "guidance_scales"),
        ({"guidance_scales": (2, 7)}, "the pyramid has 6 scales"),
        ({"temperature": (1.0, 0.0)}, "temperature"),
        ({"temperature": (float("nan"), 1.0)}, "temperature"),
        ({"min_p": 1.5}, "min_p=1.5"),
    ],
)
def test_absurd_ways_of_drawing_are_refused(small, how, named):
    with pytest.raises(ValueError, match=named):
        generate(*small, LABELS, **how)


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
