import pytest
import torch
from golden_weights import transformer_weights
from small_models import CODE_DIM, seeded, small_transformer

from models.inheritance import inherit_, relative_places, resize, table
from models.pyramid import STANDARD_SIDES, Pyramid
from models.transformer import ScaleTransformer, TransformerConfig, build_transformer
from utils import official

LABELS = torch.tensor([0, 3, 5])


def logits(model: ScaleTransformer) -> torch.Tensor:
    inputs = torch.randn(len(LABELS), model.pyramid.num_inputs, model.config.code_dim, generator=seeded())
    with torch.no_grad():
        return model.eval()(LABELS, inputs)


def started(source: ScaleTransformer, gamma: float = 0.0, **changes) -> ScaleTransformer:
    """A new transformer of the same shape but for the changes, its new mixers with a gamma, from the weights of another."""
    target = ScaleTransformer(TransformerConfig(**{**vars(source.config), **changes}))
    target.init_weights(gamma=gamma, generator=seeded(7))
    inherit_(target, source)
    return target


def hows(rows) -> dict[str, list[str]]:
    found = {}
    for row in rows:
        found.setdefault(row.part, []).append(row.how)
    return found


# --- kinds of block -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["var_tiny", "var_tiny_saln", "var_tiny_nol2"])
def test_a_released_var_starts_as_markov_and_as_mvar_with_exactly_the_logits_of_its_weights_read_so(name):
    weights = transformer_weights(name)
    config, tensors = official.transformer_from_official(weights, "var", name)
    var = ScaleTransformer(config)
    var.load_state_dict(tensors)
    config, tensors = official.transformer_from_official(weights, "markov", name)
    markov = ScaleTransformer(config)
    markov.load_state_dict(tensors)
    depth = config.depth
    assert torch.equal(logits(started(var, blocks=("markov",) * depth)), logits(markov))

    # attention inside the scale without windows is M-VAR's: read as Markov whose windows begin beyond the largest scale
    no_windows = ScaleTransformer(TransformerConfig(**{**vars(config), "window_from": 99}))
    no_windows.load_state_dict(tensors)
    mvar = started(var, blocks=("mvar",) * depth)
    assert torch.equal(logits(mvar), logits(no_windows))
    assert not torch.equal(logits(mvar), logits(var))
    # the same with the small gamma that training starts with: near, and its gradient reaches Mamba
    assert not torch.equal(logits(started(var, gamma=1e-5, blocks=("mvar",) * depth)), logits(no_windows))


def test_blocks_that_attend_over_all_scales_keep_what_the_released_ones_compute():
    var = small_transformer("var", depth=3)
    mixed = started(var, blocks=("var", "mvar", "mvar"))
    assert torch.equal(logits(mixed), logits(started(var, blocks=("var", "markov", "markov"), window_from=99)))


def test_markov_starts_as_markov_mamba_and_mvar_as_var_without_its_scan():
    markov = small_transformer("markov")
    assert torch.equal(logits(started(markov, blocks=("markov-mamba",) * 2)), logits(markov))

    mvar = small_transformer("mvar")
    var = ScaleTransformer(TransformerConfig(**{**vars(mvar.config), "blocks": ("var", "var")}))
    var.init_weights()
    rows = inherit_(var, mvar)
    assert hows(rows)["mamba2"] == ["left out"]
    assert hows(rows)["modulation"] == ["taken"]
    for block, other in zip(var.blocks, mvar.blocks, strict=True):
        assert torch.equal(block.ffn.fc1.weight, other.ffn.fc1.weight)
        ours = block.modulation[-1].weight.unflatten(0, (3, 2, 64))
        theirs = other.modulation[-1].weight.unflatten(0, (3, 3, 64))
        assert torch.equal(ours, theirs[:, [0, 2]])  # attention and feed-forward, of each of gamma, scale and shift


def test_the_same_kind_is_taken_whole():
    mvar = small_transformer("mvar")
    assert torch.equal(logits(started(mvar)), logits(mvar))
    rows = inherit_(ScaleTransformer(mvar.config), mvar)
    assert all(row.how.startswith("taken") for row in rows)
    assert sum(row.count for row in rows) == sum(parameter.numel() for parameter in mvar.parameters())


def test_the_table_counts_every_number_of_the_new_model_once():
    var = small_transformer("var")
    target = ScaleTransformer(TransformerConfig(**{**vars(var.config), "blocks": ("mvar", "mvar"), "num_classes": 9}))
    target.init_weights()
    rows = inherit_(target, var)
    counted = sum(row.count for row in rows if row.how != "left out")
    assert counted == sum(parameter.numel() for parameter in target.parameters())
    assert hows(rows)["mamba2"] == ["new"]
    assert hows(rows)["modulation"] == ["taken", "new, of new mixers"]
    assert len(table(rows)) == len(rows)


# --- classes ------------------------------------------------------------------------------------------------------------


def with_classes(source: ScaleTransformer, names, source_names) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The class embedding of a model started for classes of these names, that of the source, and what was told."""
    target = ScaleTransformer(TransformerConfig(**{**vars(source.config), "num_classes": len(names) if names else 5}))
    target.init_weights()
    rows = inherit_(target, source, names, source_names)
    return target.class_embed.weight.detach(), source.class_embed.weight.detach(), hows(rows)


def test_classes_are_taken_by_name_and_new_ones_start_at_the_mean():
    var = small_transformer("var")
    names, theirs = ["cat", "boat", "dog"], ["ant", "bee", "cat", "dog", "eel"]
    ours, old, told = with_classes(var, names, theirs)
    assert torch.equal(ours[0], old[2])
    assert torch.equal(ours[2], old[3])
    torch.testing.assert_close(ours[1], old[:5].mean(dim=0))
    assert torch.equal(ours[3], old[5])  # "no class"
    assert told["class embedding"] == ["adapted: 2 of 3 classes by name, the others at the mean"]


def test_classes_in_another_order_are_still_found():
    ours, old, _ = with_classes(small_transformer("var"), list("edcba"), list("abcde"))
    assert torch.equal(ours[:5], old[:5].flip(0))


def test_classes_without_names_are_taken_one_by_one_where_their_number_is_the_same():
    ours, old, told = with_classes(small_transformer("var"), list("abcde"), [])
    assert torch.equal(ours, old)
    assert "names are not known" in told["class embedding"][0]
    ours, old, _ = with_classes(small_transformer("var"), list("abc"), [])
    torch.testing.assert_close(ours[:3], old[:5].mean(dim=0).expand(3, -1))
    assert torch.equal(ours[3], old[5])


# --- pyramids -----------------------------------------------------------------------------------------------------------


def test_scales_inherit_from_those_at_the_same_relative_position():
    small, large = (Pyramid(STANDARD_SIDES[pixels]) for pixels in (256, 512))
    assert relative_places(large, small) == list(range(10))
    assert relative_places(Pyramid((1, 2, 4)), Pyramid((1, 2, 3, 4, 5))) == [0, 2, 4]
    assert relative_places(Pyramid((1, 2, 3, 4, 5)), Pyramid((1, 2, 4))) == [0, 0.5, 1, 1.5, 2]
    assert relative_places(Pyramid((4,)), Pyramid((1, 2, 4))) == [0]


def test_positions_are_resized_scale_by_scale_and_scale_embeddings_interpolated():
    source = small_transformer("var", sides=(1, 2, 4))
    target = started(source, sides=(1, 2, 3, 4, 8))
    old, new = (model.pyramid.split(model.position_embed) for model in (source, target))
    for k, j in enumerate((0, 0, 1, 1, 2)):  # ties go to the coarser one
        expected = resize(old[j], source.pyramid.shapes[j], target.pyramid.shapes[k])
        torch.testing.assert_close(new[k], expected)
    levels, theirs = target.scale_embed.weight, source.scale_embed.weight
    torch.testing.assert_close(levels[1], (theirs[0] + theirs[1]) / 2)
    torch.testing.assert_close(levels[4], theirs[2])


def test_resizing_keeps_rows_and_columns_apart():
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    ramps = torch.stack([rows, columns, torch.ones(6, 6)], dim=-1).view(1, 36, 3)
    wide = resize(ramps, (6, 6), (12, 9)).view(12, 9, 3)
    torch.testing.assert_close(wide[:, :, 2], torch.ones(12, 9))
    torch.testing.assert_close(wide[:, :, 0], wide[:, :1, 0].expand(12, 9))  # a ramp along the rows is one
    torch.testing.assert_close(wide[:, :, 1], wide[:1, :, 1].expand(12, 9))
    torch.testing.assert_close(wide[3:9, 0, 0], (torch.arange(3.0, 9) - 0.5) / 2, atol=0.05, rtol=0)


@pytest.mark.parametrize("family", ["var", "mvar", "markov"])
def test_from_256_to_512_the_shared_first_scales_compute_the_same(family):
    config = {"width": 64, "heads": 1, "num_codes": 16, "code_dim": CODE_DIM, "num_classes": 6}
    source = build_transformer(family, depth=1, pixels=256, **config)
    target = build_transformer(family, depth=1, pixels=512, **config)
    inherit_(target, source)
    shared = range(4)  # sides 1, 2, 3 and 4 stand at the same places of both
    inputs = torch.randn(len(LABELS), source.pyramid.offsets[4] - 1, CODE_DIM, generator=seeded())
    with torch.no_grad():
        ours, theirs = (model.eval().advance(inputs, shared, model.condition(LABELS))[0] for model in (target, source))
    assert torch.equal(ours, theirs)


# --- what does not fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"blocks": ("var",) * 3}, "depth 2, not 3 (give --depth=2)"),
        ({"width": 128}, "width 64, not 128 (give --width=64)"),
        ({"heads": 4}, "heads 2, not 4 (give --heads=2)"),
        ({"normalize_attention": False}, "--anorm=True"),
        ({"shared_modulation": True}, "--saln=False"),
        ({"num_codes": 48}, "num codes 24, not 48"),
    ],
)
def test_another_shape_is_refused_with_what_fits(changes, named):
    source = small_transformer("var")
    target = ScaleTransformer(TransformerConfig(**{**vars(source.config), **changes}))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match="^model.pth: cannot be started from") as caught:
        inherit_(target, source, name="model.pth")
    assert named in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
