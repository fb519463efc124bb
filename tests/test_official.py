import pytest
import torch
from golden_weights import facts, tokenizer_weights, transformer_weights

from models.pyramid import STANDARD_SIDES, Pyramid
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils.official import describe, tokenizer_from_official, transformer_from_official

RELEASED = facts("released")["models"]


def released_tensors(name: str) -> dict[str, torch.Tensor]:
    """All names and shapes of a released model, without memory except for the scale numbers."""
    tensors = {}
    for key, shape in RELEASED[name]["tensors"].items():
        for block in range(RELEASED[name]["depth"] if key.startswith("blocks.0.") else 1):
            tensors[key.replace("blocks.0.", f"blocks.{block}.")] = torch.empty(shape, device="meta")
    if "lvl_1L" in tensors:
        sides = STANDARD_SIDES[512 if name.endswith("512") else 256]
        tensors["lvl_1L"] = Pyramid(sides).scale_ids()[None]
        assert tensors["lvl_1L"].shape == tuple(RELEASED[name]["tensors"]["lvl_1L"])
    return tensors


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", [None, "markov"])
@pytest.mark.parametrize("name", [name for name in RELEASED if "VAR-" in name])
def test_every_released_name_is_one_of_ours(name, family):
    if family == "markov" and "M-VAR" in name:
        family = "markov-mamba"
    config, weights = transformer_from_official(released_tensors(name), family, name)
    with torch.device("meta"):
        model = ScaleTransformer(config)
    assert shapes(weights) == shapes(model.state_dict())
    assert sum(tensor.numel() for tensor in weights.values()) == facts("released")["parameters"][name]


def test_every_released_tokenizer_name_is_one_of_ours():
    config, weights = tokenizer_from_official(released_tensors("VQVAE"), None, "VQVAE")
    with torch.device("meta"):
        model = VQVAE(config)
    assert config == type(config)()  # our defaults are the released tokenizer
    assert shapes(weights) == shapes(model.state_dict())
    assert sum(t.numel() for t in weights.values()) == facts("released")["parameters"]["VQVAE-ch160v4096z32_256"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("M-VAR-d16", {"blocks": ("mvar",) * 16, "width": 1024, "heads": 16, "normalize_attention": True}),
        ("M-VAR-d16-nol2", {"blocks": ("mvar",) * 16, "width": 1024, "heads": 16, "normalize_attention": False}),
        ("VAR-d16", {"blocks": ("var",) * 16, "num_classes": 1000, "num_codes": 4096, "code_dim": 32, "ffn_ratio": 4}),
        ("VAR-d36-s_512", {"blocks": ("var",) * 36, "sides": STANDARD_SIDES[512], "shared_modulation": True}),
    ],
)
def test_configuration_is_read_off_the_tensors(name, expected):
    config, _ = transformer_from_official(released_tensors(name), None, name)
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "family", "kind"),
    [("mvar_tiny", None, "mvar"), ("mvar_tiny", "markov-mamba", "markov-mamba"), ("var_tiny", "markov", "markov")],
)
def test_family_tells_equal_tensors_apart(name, family, kind):
    config, _ = transformer_from_official(transformer_weights(name), family, name)
    assert config.blocks == (kind, kind)
    assert (config.num_classes, config.num_codes, config.code_dim, config.heads) == (10, 64, 8, 2)


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("mvar_tiny", "var", "family 'var' does not fit, the file has a Mamba part: give mvar or markov-mamba"),
        ("mvar_tiny", "markov", "give mvar or markov-mamba"),
        ("var_tiny", "mvar", "the file has no Mamba part: give var or markov"),
        ("var_tiny", "markov-mamba", "give var or markov"),
    ],
)
def test_family_that_contradicts_the_tensors(name, family, message):
    with pytest.raises(ValueError, match=message):
        transformer_from_official(transformer_weights(name), family, name)


@pytest.mark.parametrize("nest", [("trainer", "var_wo_ddp"), ("trainer", "mvar_wo_ddp"), ("var_wo_ddp",), ("mvar_wo_ddp",)])
def test_weights_inside_a_training_checkpoint(nest):
    contents = weights = transformer_weights("mvar_tiny")
    for key in reversed(nest):
        contents = {key: contents, "epoch": 3}
    config, found = transformer_from_official(contents, None, "nested")
    flat_config, flat = transformer_from_official(weights, None, "flat")
    assert config == flat_config
    assert all(torch.equal(found[name], flat[name]) for name in flat)


def test_tokenizer_inside_a_training_checkpoint():
    weights = tokenizer_weights("1234_qsr4")
    config, _ = tokenizer_from_official({"trainer": {"vae_local": weights}}, (1, 2, 3, 4), "nested")
    assert (config.channels, config.num_codes, config.code_dim, config.num_blocks) == (32, 64, 8, 2)
    assert config.multipliers == (1, 1, 2, 2, 4)


@pytest.mark.parametrize(("variant", "num_phi"), [("12358_qsr0", 0), ("12358_qsr1", 1), ("12358_qsr3", 3), ("12358_qsr4", 4)])
def test_number_of_phi_is_read_off_the_tensors(variant, num_phi):
    config, _ = tokenizer_from_official(tokenizer_weights(variant), None, variant)
    assert config.num_phi == num_phi
    assert config.sides == (1, 2, 3, 5, 8)  # the standard pyramid of five scales


def test_pyramid_without_a_hit_counter_must_be_named():
    weights = tokenizer_weights("1234_qsr4")
    del weights["quantize.ema_vocab_hit_SV"]
    with pytest.raises(ValueError, match="name the sides"):
        tokenizer_from_official(weights, None, "file")
    config, _ = tokenizer_from_official(weights, (1, 2, 4), "file")
    assert config.sides == (1, 2, 4)


def test_pyramid_is_read_off_the_scale_numbers():
    weights = transformer_weights("var_tiny")
    weights["lvl_1L"] = Pyramid((1, 2, 5)).scale_ids()[None]
    weights["lvl_embed.weight"] = weights["lvl_embed.weight"][:3]
    config, _ = transformer_from_official(weights, None, "file")
    assert config.sides == (1, 2, 5)


def test_pyramid_without_scale_numbers_is_the_standard_one():
    weights = transformer_weights("var_tiny")
    del weights["lvl_1L"]
    assert transformer_from_official(weights, None, "file")[0].sides == (1, 2, 3, 4)
    weights["pos_1LC"] = weights["pos_1LC"][:, :29]
    with pytest.raises(ValueError, match="29 tokens in 4 scales"):
        transformer_from_official(weights, None, "file")


def test_heads_without_a_learned_scale_are_64_wide():
    assert transformer_from_official(transformer_weights("var_tiny_nol2"), None, "file")[0].heads == 2


def test_decoder_levels_are_turned_round():
    """The released decoder numbers its levels from fine to coarse: attention stands on its last one, on our first."""
    weights = tokenizer_weights("1234_qsr4")
    _, ours = tokenizer_from_official(weights, (1, 2, 3, 4), "file")
    assert torch.equal(ours["decoder.levels.0.attentions.2.qkv.weight"], weights["decoder.up.4.attn.2.qkv.weight"])
    assert torch.equal(ours["decoder.levels.4.blocks.0.conv1.weight"], weights["decoder.up.0.block.0.conv1.weight"])
    assert torch.equal(ours["encoder.levels.4.blocks.0.conv1.weight"], weights["encoder.down.4.block.0.conv1.weight"])


@pytest.mark.parametrize("name", ["blocks.0.attn.k_bias", "optimizer", "blocks.0.attn.zero_k_bias.more"])
def test_unknown_name_is_an_error(name):
    weights = transformer_weights("var_tiny") | {name: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"unexpected {name}; the file seems to be a released VAR or MVAR transformer"):
        transformer_from_official(weights, None, "file")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["blocks.0.mamba.D", "pos_1LC"], "M-VAR"),
        (["pos_1LC"], "released VAR or MVAR"),
        (["quantize.embedding.weight"], "released VQVAE"),
        (["position_embed"], "transformer of this project"),
        (["quantizer.codebook.weight"], "tokenizer of this project"),
        (["conv1.weight"], "none of the released"),
    ],
)
def test_description_of_a_file(names, words):
    assert words in describe(names)
