"""Small models with random weights, none of which is zero or near it, for tests that need no golden numbers."""

import torch
from torch import Tensor

from models.pyramid import Pyramid
from models.tokenizer import VQVAE, TokenizerConfig
from models.transformer import ScaleTransformer, build_transformer

# More tokens than one masked call of attention takes: the last scale is attended on its own. Windows of 3 on 8 and 9.
SIDES = (1, 2, 3, 5, 8, 9)
NUM_CODES, CODE_DIM, NUM_CLASSES = 24, 8, 5

VARIANTS = {
    "var": {"family": "var"},
    "mvar": {"family": "mvar"},
    "markov": {"family": "markov"},
    "markov-mamba": {"family": "markov-mamba"},
    "global blocks": {"family": "mvar", "depth": 3, "global_blocks": 1},
    "var, shared modulation": {"family": "var", "shared_modulation": True},
    "mvar, shared modulation": {"family": "mvar", "shared_modulation": True},  # 9 chunks
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomise_(model: torch.nn.Module, seed: int = 0) -> None:
    """Normal weights, so large that every part of the model shows in its output."""
    generator = seeded(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.2, generator=generator)
        if name.endswith("dt_bias"):
            parameter.sub_(4)  # small steps: Mamba's state remembers the first scale to the last


def small_transformer(family: str = "mvar", depth: int = 2, **config) -> ScaleTransformer:
    defaults = {"sides": SIDES, "width": 64, "heads": 2, "num_codes": NUM_CODES, "code_dim": CODE_DIM}
    defaults |= {"window": 3, "window_from": 8, "drop_path": 0.0}
    model = build_transformer(family, depth, num_classes=NUM_CLASSES, **(defaults | config))
    randomise_(model)
    return model.eval()


def small_tokenizer(sides: tuple = SIDES, **config) -> VQVAE:
    defaults = {"channels": 32, "multipliers": (1, 1), "num_blocks": 1, "num_codes": NUM_CODES, "code_dim": CODE_DIM}
    model = VQVAE(TokenizerConfig(sides=sides, **(defaults | config)))
    randomise_(model, seed=1)
    return model.eval()


def assert_same_model(ours: torch.nn.Module, other: torch.nn.Module) -> None:
    assert ours.config == other.config
    assert not ours.training
    for (name, a), b in zip(ours.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def random_indices(pyramid: Pyramid, batch: int = 2, seed: int = 2) -> list[Tensor]:
    return pyramid.split(torch.randint(NUM_CODES, (batch, pyramid.num_tokens), generator=seeded(seed)))
