"""The golden numbers under tests/golden and the models they belong to; see the README there."""

import functools
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.pyramid import Pyramid
from models.tokenizer import VQVAE, TokenizerConfig
from models.transformer import ScaleTransformer
from utils import official

GOLDEN = Path(__file__).parent / "golden"
TOKENIZERS = ("1234_qsr4", "1234_znorm", "12358_qsr0", "12358_qsr1", "12358_qsr3", "12358_qsr4")
TRANSFORMERS = ("mvar_tiny", "mvar_tiny_nol2", "var_tiny", "var_tiny_saln", "var_tiny_nol2")
LOGITS, IMAGES, GRADIENTS = 1e-4, 1e-3, 1e-3


@functools.cache
def facts(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@functools.cache
def tensors(name: str) -> dict[str, Tensor]:
    loaded = load_file(GOLDEN / f"{name}.safetensors")
    return {key: tensor.long() if tensor.dtype == torch.int16 else tensor for key, tensor in loaded.items()}


def hashed_uniform(tag: str, count: int) -> np.ndarray:
    """`count` float64 in [0, 1): splitmix64 of a counter that starts at the first 8 bytes of the tag's SHA-256."""
    start = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "little")
    step = 0x9E3779B97F4A7C15
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(step) + np.uint64(start)  # wraps around, as it should
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) * 2.0**-53


def hashed_weights(ranges: dict[str, list], tag: str) -> dict[str, Tensor]:
    """Released name -> tensor; buffers, which have no range, are zero."""
    weights = {}
    for name, (shape, *limits) in ranges.items():
        if limits:
            low, high = limits
            values = low + (high - low) * hashed_uniform(f"{tag}:{name}", math.prod(shape))
            weights[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
        else:
            weights[name] = torch.zeros(shape)
    return weights


def tokenizer_weights(variant: str, tag: str | None = None) -> dict[str, Tensor]:
    """The released state dict of a golden tokenizer."""
    golden = facts("tokenizer")
    return hashed_weights(golden["weights"] | golden["variants"][variant]["weights"], tag or golden["tag"])


def transformer_weights(name: str) -> dict[str, Tensor]:
    """The released state dict of a golden transformer."""
    weights = hashed_weights(facts(name)["weights"], facts(name)["tag"])
    sides = Pyramid.standard(weights["lvl_embed.weight"].shape[0])
    weights["lvl_1L"] = sides.scale_ids()[None]
    return weights


@functools.cache
def tokenizer(variant: str) -> VQVAE:
    if variant == "markov":  # the weights of 1234_qsr4 under another tag
        weights, sides = tokenizer_weights("1234_qsr4", facts("markov_tiny")["tokenizer_tag"]), Pyramid.standard(10).sides
    else:
        weights, sides = tokenizer_weights(variant), tuple(facts("tokenizer")["variants"][variant]["sides"])
    config, weights = official.tokenizer_from_official(weights, sides, variant)
    normalize = variant.endswith("znorm")  # the released file does not tell
    return with_config(config, weights, normalize_lookup=normalize)


def with_config(config: TokenizerConfig, weights: dict[str, Tensor], **changes) -> VQVAE:
    """The same weights with another pyramid or lookup."""
    model = VQVAE(TokenizerConfig(**{**vars(config), **changes}))
    model.load_state_dict(weights)
    return model.eval()


@functools.cache
def transformer(name: str) -> ScaleTransformer:
    config, weights = official.transformer_from_official(transformer_weights(name), facts(name).get("family"), name)
    model = ScaleTransformer(config)
    model.load_state_dict(weights)
    return model.eval()


def every(stride: int, images: Tensor) -> Tensor:
    """The pixels that the golden files kept."""
    return images[..., ::stride, ::stride]


def assert_near(ours: Tensor, golden: Tensor, tolerance: float) -> None:
    """No element is further off than the tolerance."""
    torch.testing.assert_close(ours, golden, atol=tolerance, rtol=0)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference."""
    return ((ours - reference).norm() / reference.norm()).item()
