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
