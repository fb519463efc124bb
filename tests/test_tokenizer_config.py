import math
from dataclasses import fields

import pytest

from models.discriminator import DiscriminatorConfig
from models.tokenizer import TOKENIZER_PRESETS
from utils import cli
from utils.runs.tokenizer_config import RECIPES, TokenizerTraining, recipe


def parsed(*words: str) -> TokenizerTraining:
    return cli.parse(TokenizerTraining, "", ["--data_path=x", "--out=y", *words], defaults=recipe)


def test_a_preset_brings_its_recipe_and_flags_that_are_given_count():
    large, small = parsed("--preset=f16-256"), parsed("--preset=f8-32")
    assert (large.gan, large.gan_adaptive, large.perceptual, large.ema, large.clip) == (0.4, True, 1.0, 0.9999, 10.0)
    assert (small.gan, small.gan_adaptive, small.perceptual, small.ema, small.clip) == (0.01, False, 0.0, 0.0, 1.0)
    assert parsed("--preset=f16-256", "--gan=0.3", "--diffaug=0").gan == 0.3
    assert large.discriminator() == DiscriminatorConfig(64, 3, True)
    assert (large.lr, small.lr) == (3e-4, 2e-3)
    assert (large.adam_beta1, large.adam_beta2) == (small.adam_beta1, small.adam_beta2) == (0.5, 0.9)
    alone = parsed("--preset=f8-32", "--gan=0")
    assert (alone.adam_beta1, alone.adam_beta2) == (0.9, 0.99)
    assert parsed("--preset=f8-32", "--gan=0", "--adam_beta1=0.8").adam_beta1 == 0.8
    assert set(RECIPES) == set(TOKENIZER_PRESETS)


@pytest.mark.parametrize("preset", TOKENIZER_PRESETS)
def test_every_preset_can_be_refined_as_it_comes(preset):
    config = parsed(f"--preset={preset}", "--refine=run")
    assert config.restart_every == 0
    assert config.gan > 0
    with pytest.raises(SystemExit):
        parsed(f"--preset={preset}", "--refine=run", "--restart_every=20")


def test_a_pyramid_and_the_lookup_can_be_others_than_the_presets():
    config = parsed("--preset=f8-32", "--pn=1_2_4", "--cosine")
    assert (config.sizes().sides, config.sizes().normalize_lookup) == ((1, 2, 4), True)
    assert parsed("--preset=f8-32").sizes() == TOKENIZER_PRESETS["f8-32"]


@pytest.mark.parametrize("preset", TOKENIZER_PRESETS)
def test_without_a_discriminator_only_what_is_given_of_it_is_refused(preset, capsys):
    given = ["--gan_width=8", "--gan_lr=0.5", "--gan_norm=1", "--gan_layers=4", "--gan_from=0.6", "--gan_ramp=0.6"]
    given += ["--gan_adaptive=1", "--diffaug=1", "--lecam=0.1"]
    given = [flag for flag in given if f8(preset) or flag not in ("--gan_norm=1", "--gan_adaptive=1", "--diffaug=1")]
    for words in ([], ["--refine=run"]):
        assert parsed(f"--preset={preset}", "--gan=0", *words).gan == 0
        for flag in given:
            with pytest.raises(SystemExit):
                parsed(f"--preset={preset}", "--gan=0", *words, flag)
            assert f"{flag.split('=')[0]}=" in capsys.readouterr().err


def f8(preset: str) -> bool:
    """Whether the recipe is that of small presets, which says nothing of the discriminator."""
    return "gan" not in RECIPES[preset]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--gan_most=2", "--gan_most=2.0: is of --gan_adaptive: give that, or leave it out"),
        ("--gan_sha256=0", "--gan_sha256=0: is read with --gan_features=dino alone"),
        ("--lpips_weights=x", "--lpips_weights=x: is read with --lpips alone"),
        ("--lpips_sha256=0", "--lpips_sha256=0: is read with --lpips alone"),
        ("--perceptual_logits=1", "--perceptual_logits=1.0: is of --perceptual: give that, or leave it out"),
        ("--max_bad=0.5", "--max_bad=0.5: is of --skip_bad: give that, or leave it out"),
        ("--lr=nan", "'nan' is not finite"),
        ("--adam_beta2=1", "--adam_beta2=1.0: give a share from 0 to below 1"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(flag, message, capsys):
    with pytest.raises(SystemExit):
        parsed("--preset=f8-32", flag)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [field.name for field in fields(TokenizerTraining) if field.type is float])
def test_every_number_ends(name):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"--{name}={value}: is not finite: give a number that ends"):
            TokenizerTraining("x", "y", **{name: value})
