import pytest
import torch
import torch.nn.functional as F
from golden_weights import GRADIENTS, LOGITS, TRANSFORMERS, assert_near, facts, relative_error, tensors, transformer
from small_models import CODE_DIM, NUM_CLASSES, SIDES, VARIANTS, random_indices, seeded, small_tokenizer, small_transformer

from models.parts import parts_of
from models.pyramid import STANDARD_SIDES, Pyramid
from models.transformer import (
    FAMILIES,
    PRESETS,
    ScaleTransformer,
    TransformerConfig,
    build_transformer,
    recompute_blocks_,
)
from utils import official

PYRAMID = Pyramid(SIDES)
LABELS = torch.tensor([1, NUM_CLASSES])
INPUTS = PYRAMID.num_tokens - PYRAMID.lengths[0]
ALTERED = {  # what is not published, to see what the published way is worth
    "two scales attended": {"family": "var", "attended_scales": 2},
    "scan within scales": {"family": "mvar", "scan": "within"},
    "scan reversed": {"family": "mvar", "scan": "reversed"},
}
VARIANTS = VARIANTS | ALTERED
# scales behind its own that the inputs of a scale reach; of two blocks that see one earlier scale each, two
FURTHER = {"markov": 0, "two scales attended": 2, "scan within scales": 0}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(variant) -> ScaleTransformer:
    return small_transformer(**VARIANTS[variant]).double().requires_grad_(False)


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(2, INPUTS, CODE_DIM, generator=seeded(), dtype=torch.float64)


def scale_by_scale(model: ScaleTransformer, inputs: torch.Tensor, cuts) -> torch.Tensor:
    """Logits (B, L, V) from several calls of advance, with the state handed on."""
    conditioning, states, logits = model.condition(LABELS), model.init_state(2), []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        tokens = model.pyramid.tokens(range(start, stop))
        first = model.pyramid.lengths[0]
        piece = inputs[:, max(tokens.start - first, 0) : tokens.stop - first]
        part, states = model.advance(piece, range(start, stop), conditioning, states)
        logits.append(part)
    return torch.cat(logits, dim=1)


def changed_scales(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    """Scales in which logits differ at all."""
    return [k for k, (x, y) in enumerate(zip(PYRAMID.split(a), PYRAMID.split(b), strict=True)) if not torch.equal(x, y)]


# --- golden values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRANSFORMERS, "markov_tiny"])
def test_golden_logits_and_loss(name):
    golden = tensors(name)
    with torch.no_grad():
        logits = transformer(name)(golden["labels"], golden["inputs"])
    assert_near(logits[..., :: facts(name).get("logit_stride", 1)], golden["logits"], LOGITS)
    loss = F.cross_entropy(logits.flatten(0, 1), golden["codes"].flatten())
    assert loss.item() == pytest.approx(facts(name)["loss"], abs=1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_golden_gradients(name):
    golden, model = tensors(name), transformer(name)
    logits = model(golden["labels"], golden["inputs"])
    loss = F.cross_entropy(logits.flatten(0, 1), golden["codes"].flatten())
    ours = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))

    def under_our_names(values: dict) -> dict:
        return official.translate(values, official.TRANSFORMER_NAMES, official.TRANSFORMER_DROPPED, name)

    norms = under_our_names(facts(name)["gradient_norms"])
    assert norms.keys() == ours.keys()
    for parameter, norm in norms.items():
        assert ours[parameter].norm().item() == pytest.approx(norm, rel=GRADIENTS), parameter

    prefix, stride = "gradient.", facts(name)["gradient_stride"]
    stored = {key.removeprefix(prefix): tensor for key, tensor in golden.items() if key.startswith(prefix)}
    for parameter, gradient in under_our_names(stored).items():
        kept = ours[parameter].flatten()
        kept = kept if kept.numel() == gradient.numel() else kept[::stride]
        assert relative_error(kept, gradient.flatten()) < GRADIENTS, parameter


RELEASED = {
    "mvar": [f"M-VAR-d{depth}" for depth in (12, 16, 20, 24, 30, 32)],
    "var": [f"VAR-d{depth}" for depth in (12, 16, 20, 24, 30, 36)] + ["VAR-d36-s_512"],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in RELEASED.items() for name in names])
def test_presets_have_the_released_numbers_of_parameters(family, name):
    preset = PRESETS[name.split("VAR-")[1].removesuffix("_512")]
    families = ("var", "markov") if family == "var" else ("mvar", "markov-mamba")  # two each have the same tensors
    with torch.device("meta"):
        models = [build_transformer(family, **preset) for family in families]
    counts = {sum(parameter.numel() for parameter in model.parameters()) for model in models}
    assert counts == {facts("released")["parameters"][name]}


# --- one computation ----------------------------------------------------------------------------------------------------


def test_every_family_is_among_the_variants():
    assert {VARIANTS[name]["family"] for name in VARIANTS} == set(FAMILIES)
    assert small_transformer(**VARIANTS["global blocks"]).config.blocks == ("var", "mvar", "mvar")


@pytest.mark.parametrize("cuts", [range(7), (0, 2, 5, 6), (0, 4, 6)])
def test_scale_by_scale_equals_one_pass(model, inputs, cuts):
    assert_near(scale_by_scale(model, inputs, cuts), model(LABELS, inputs), 1e-9)


def test_no_state_means_the_initial_state(model, inputs):
    conditioning = model.condition(LABELS)
    first, _ = model.advance(inputs[:, :0], range(1), conditioning)
    again, _ = model.advance(inputs[:, :0], range(1), conditioning, model.init_state(2))
    assert_near(first, again, 1e-12)


def test_first_scales_alone(model, inputs):
    whole = model(LABELS, inputs)
    for k in (1, 3, 5):
        length = PYRAMID.offsets[k]
        assert_near(model(LABELS, inputs[:, : length - 1]), whole[:, :length], 1e-9)


@pytest.mark.parametrize("k", range(5))
def test_codes_of_a_scale_are_seen_by_later_scales_only(model, k):
    tokenizer, indices = small_tokenizer(), random_indices(PYRAMID)
    other = list(indices)
    other[k] = (indices[k] + 1) % 24
    before, after = (model(LABELS, tokenizer.teacher_inputs(codes).double()) for codes in (indices, other))
    changed = changed_scales(before, after)
    assert min(changed) == k + 1


@pytest.mark.parametrize("k", range(1, 6))
def test_inputs_of_a_scale_reach_just_the_scales_they_may(variant, model, inputs, k):
    other = inputs.clone()
    other[:, PYRAMID.offsets[k] - 1 : PYRAMID.offsets[k + 1] - 1] += 1
    changed = changed_scales(model(LABELS, inputs), model(LABELS, other))
    assert changed == list(range(k, min(k + FURTHER.get(variant, 6) + 1, 6)))


def test_class_reaches_every_scale(model, inputs):
    assert changed_scales(model(LABELS, inputs), model(LABELS.flip(0), inputs)) == list(PYRAMID.scales)


def test_images_of_a_batch_do_not_meet(model, inputs):
    alone = model(LABELS[:1], inputs[:1])
    assert_near(model(LABELS, inputs)[:1], alone, 1e-9)


def test_training_mode_changes_nothing_without_drop_path(model, inputs):
    evaluated = model(LABELS, inputs)
    trained = model.train()(LABELS, inputs)
    model.eval()
    assert torch.equal(evaluated, trained)


def test_rectangular_pyramid_with_several_start_tokens(variant):
    sides = ((1, 2), (2, 3), (4, 5))
    model = small_transformer(**VARIANTS[variant], sides=sides, window_from=4).double().requires_grad_(False)
    inputs = torch.randn(2, 26, CODE_DIM, generator=seeded(), dtype=torch.float64)
    logits = model(LABELS, inputs)
    assert logits.shape == (2, 28, 24)
    assert_near(scale_by_scale(model, inputs, range(4)), logits, 1e-9)


def test_logits_are_float32_under_autocast(variant):
    model = small_transformer(**VARIANTS[variant])
    inputs = torch.randn(2, INPUTS, CODE_DIM, generator=seeded())
    with torch.no_grad():
        exact = model(LABELS, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            whole, pieces = model(LABELS, inputs), scale_by_scale(model, inputs, range(7))
    assert whole.dtype == pieces.dtype == torch.float32
    assert relative_error(whole, exact) < 0.1
    assert relative_error(pieces, exact) < 0.1


def test_every_parameter_gets_a_gradient(variant):
    model = small_transformer(**VARIANTS[variant])
    inputs = torch.randn(2, INPUTS, CODE_DIM, generator=seeded())
    model(LABELS, inputs).logsumexp(dim=-1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- drop-path, initialisation, configuration ---------------------------------------------------------------------------


def test_drop_path_grows_linearly_with_the_block():
    model = small_transformer(depth=3, drop_path=0.4).train()
    labels = torch.zeros(2000, dtype=torch.long)
    gates = [modulation.gamma.detach() for modulation in model.condition(labels).blocks]
    dropped = [(gamma == 0).all(dim=-1).float().mean().item() for gamma in gates]
    assert dropped == pytest.approx([0, 0.2, 0.4], abs=0.02)


def test_drop_path_acts_while_training_only():
    model = small_transformer(drop_path=0.9)
    inputs = torch.randn(2, INPUTS, CODE_DIM, generator=seeded())
    with torch.no_grad():
        evaluated = model(LABELS, inputs)
        assert torch.equal(model(LABELS, inputs), evaluated)
        torch.manual_seed(0)
        assert not torch.allclose(model.train()(LABELS, inputs), evaluated)


def test_init_weights_follows_its_table():
    model = build_transformer("mvar", depth=2, num_classes=50)
    width = model.config.width
    std = (1 / (3 * width)) ** 0.5

    def close(tensor: torch.Tensor, expected: float) -> None:
        assert tensor.std().item() == pytest.approx(expected, rel=0.15)

    for tensor in (model.code_embed.weight, model.position_embed, model.class_embed.weight, model.scale_embed.weight):
        close(tensor, std)
    close(model.head.weight, std * 0.02)
    close(model.head_modulation[-1].weight, std * 0.5)
    for block in model.blocks:
        attention, mamba = block.mixers
        close(attention.qkv.weight, std)
        close(mamba.in_proj.weight, std)
        close(mamba.ssm.conv1d.weight, 0.02)
        close(attention.proj.weight, std / 2)  # sqrt(2 * depth)
        close(block.ffn.fc2.weight, std / 2)
        rows = block.modulation[-1].weight.split(width)
        for row in rows[:2]:
            close(row, std * 1e-5)
        for row in rows[2:]:
            close(row, std * 0.5)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith((".bias", "q_bias", "v_bias")))


@pytest.mark.parametrize(("family", "ffn_gamma", "expected"), [("mvar", None, 0.5), ("mvar", 1e-3, 1e-3), ("var", None, 1e-3)])
def test_the_gate_of_the_feed_forward_starts_as_released_or_as_told(family, ffn_gamma, expected):
    """The released M-VAR scales two of three gammas; the third, the feed-forward's, is what this is about."""
    model = build_transformer(family, depth=2, num_classes=50)
    model.init_weights(gamma=1e-3, ffn_gamma=ffn_gamma)
    width, sublayers = model.config.width, model.blocks[0].num_sublayers
    gammas = model.blocks[1].modulation[-1].weight[: sublayers * width].split(width)
    assert gammas[-1].std().item() == pytest.approx((1 / (3 * width)) ** 0.5 * expected, rel=0.15)


@pytest.mark.parametrize("variant", ["mvar", "var", "markov", "mvar, shared modulation"])
def test_recomputed_blocks_give_the_same_gradients(variant):
    """With drop-path: what was dropped in the forward pass must be dropped when it is computed again."""
    model = small_transformer(**VARIANTS[variant], drop_path=0.5).train()
    inputs = torch.randn(2, INPUTS, CODE_DIM, generator=seeded())

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return torch.autograd.grad(model(LABELS, inputs).square().mean(), list(model.parameters()))

    kept = gradients()
    recompute_blocks_(model)
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients(), strict=True))


def test_independent_scales_are_computed_without_the_others():
    model = small_transformer("markov")
    inputs = torch.randn(2, INPUTS, CODE_DIM, generator=seeded())
    with torch.no_grad():
        whole = model(LABELS, inputs)
        for first, last in ((0, 2), (1, 3), (4, 5), (5, 6)):
            tokens = model.pyramid.tokens(range(first, last))
            start = model.pyramid.lengths[0]
            own = inputs[:, max(tokens.start - start, 0) : tokens.stop - start]
            torch.testing.assert_close(model(LABELS, own, first_scale=first), whole[:, tokens], atol=1e-5, rtol=1e-5)


def test_one_attended_scale_is_the_own_one(inputs):
    """As markov's attention has it where there are no windows."""
    model, inside = small_transformer("var", attended_scales=1), small_transformer("markov", window_from=100)
    inside.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_near(model(LABELS, inputs.float()), inside(LABELS, inputs.float()), 1e-5)
    counts = [m.blocks[0].mixers[0].attention_multiply_adds for m in (model, inside)]
    assert counts[0] == counts[1]
    assert model.scales_are_independent  # nothing is carried that is not looked at


def test_a_scan_within_scales_leaves_them_independent():
    assert small_transformer("mvar", scan="within").scales_are_independent


def test_a_reversed_scan_reads_every_scale_backwards():
    model, mirrored = (small_transformer("mvar", scan=scan).blocks[0].mixers[1] for scan in ("reversed", "across"))
    x = torch.randn(2, PYRAMID.num_tokens, 64, generator=seeded())
    turned = torch.cat([part.flip(1) for part in PYRAMID.split(x)], dim=1)
    with torch.no_grad():
        y, _ = model(x, PYRAMID.scales)
        other, _ = mirrored(turned, PYRAMID.scales)
    assert torch.equal(y, torch.cat([part.flip(1) for part in PYRAMID.split(other)], dim=1))


@pytest.mark.parametrize("family", ["var", "mvar", "markov-mamba"])
def test_scales_that_depend_on_earlier_ones_are_not_computed_alone(family):
    with pytest.raises(ValueError, match="first_scale=5: only where all blocks are of kind markov"):
        small_transformer(family)(LABELS, torch.zeros(2, SIDES[-1] ** 2, CODE_DIM), first_scale=5)


def test_init_weights_is_given_by_the_generator():
    models = [build_transformer("mvar", depth=1, num_classes=3, sides=(1, 2)) for _ in range(2)]
    for model in models:
        model.init_weights(generator=seeded(5))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("kind", "window_from", "sides"),
    [
        ("markov", None, [24, 32]),
        ("markov", 9, [9, 13, 18, 24, 32]),
        ("markov-mamba", None, [13, 18, 24, 32]),
        ("markov-mamba", 24, [24, 32]),
        ("mvar", 9, []),
        ("var", None, []),
    ],
)
def test_windows_stand_where_the_kind_and_window_from_say(kind, window_from, sides):
    config = TransformerConfig(STANDARD_SIDES[512], (kind,), width=64, heads=1, window_from=window_from)
    assert [config.sides[k] for k in config.windowed_scales(kind)] == sides


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"blocks": ("mamba",)}, "block kinds .*mamba"),
        ({"blocks": ()}, "block kinds"),
        ({"heads": 3}, "width 64 is no multiple of heads 3"),
        ({"window": 6}, "window=6"),
        ({"window": -1}, "window=-1"),
        ({"attended_scales": -1}, "attended_scales=-1"),
        ({"scan": "sideways"}, "scan='sideways': give one of across, within, reversed"),
        ({"blocks": ("var", "mvar"), "shared_modulation": True}, "shared_modulation"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"drop_path": -0.1}, "drop_path=-0.1"),
        ({"sides": (3, 2)}, "must not shrink"),
    ],
)
def test_impossible_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**({"sides": (1, 2), "blocks": ("var",), "width": 64, "heads": 2} | config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "gpt"}, "family 'gpt'"),
        ({"global_blocks": 3, "depth": 2}, "global_blocks=3"),
        ({"global_blocks": -1, "depth": 2}, "global_blocks=-1"),
        ({"pixels": 100}, "pixels=100"),
    ],
)
def test_impossible_transformers(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_transformer(**arguments)


def test_unknown_field_is_no_silent_default():
    with pytest.raises(TypeError, match="widht"):
        build_transformer("var", depth=1, widht=64)


def test_inputs_that_end_inside_a_scale_are_named(model, inputs):
    with pytest.raises(ValueError, match=f"give {INPUTS} for all"):
        model(LABELS, inputs[:, :-1])


def test_every_parameter_is_of_one_part(variant):
    model = small_transformer(**VARIANTS[variant])
    found = [id(parameter) for part in parts_of(model).values() for parameter in part]
    assert sorted(found) == sorted(map(id, model.parameters()))
