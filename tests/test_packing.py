"""Weights packed for the bfloat16 products of a CPU."""

import copy

import pytest
import torch
from small_models import seeded, small_tokenizer, small_transformer
from torch import nn

from models.generate import generate
from models.layers import FeedForward, LinearOfOtherBias
from models.packing import PackedFeedForward, PackedLinear, can_pack, pack_
from models.precision import Precision

pytestmark = pytest.mark.skipif(not can_pack(), reason="this processor computes no bfloat16 products with packed weights")


@pytest.mark.parametrize("rows", [1, 3, 64, 700])
def test_a_packed_layer_gives_the_very_bits(rows):
    linear = LinearOfOtherBias(48, 80).to(torch.bfloat16).requires_grad_(False)
    packed = PackedLinear(linear)
    x, other = torch.randn(2, rows, 48, dtype=torch.bfloat16), torch.randn(80, dtype=torch.bfloat16)
    assert torch.equal(packed(x), linear(x))
    assert torch.equal(packed(x, other), linear(x, other))
    without = nn.Linear(48, 80, bias=False).to(torch.bfloat16).requires_grad_(False)
    assert torch.equal(PackedLinear(without)(x), without(x))


def test_a_packed_feed_forward_is_the_same_but_for_one_rounding():
    ffn = FeedForward(48, 4.0).to(torch.bfloat16).requires_grad_(False)
    exact, x = copy.deepcopy(ffn).float(), torch.randn(2, 1100, 48).to(torch.bfloat16)  # in two pieces
    errors = [(part(x).float() - exact(x.float())).square().mean().sqrt() for part in (PackedFeedForward(ffn), ffn)]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("family", ["mvar", "var", "markov-mamba"])
def test_sampling_takes_packed_weights(family):
    transformer, tokenizer = small_transformer(family).requires_grad_(False), small_tokenizer().requires_grad_(False)
    plain = copy.deepcopy(transformer)
    plain.cast_(torch.bfloat16)
    Precision("bfloat16", "float32").apply_(transformer, tokenizer)
    left = {name.rsplit(".", 1)[0] for name, module in transformer.blocks.named_modules() if type(module) is nn.Linear}
    assert all("modulation" in name for name in left)
    labels = torch.tensor([1, 4])
    made, expected = (generate(m, tokenizer, labels, top_k=1, generator=seeded(3)) for m in (transformer, plain))
    same = torch.cat(made.indices, dim=1) == torch.cat(expected.indices, dim=1)
    assert same[:, : 1 + 4].float().mean() > 0.8  # later scales see what earlier ones chose


def test_float32_is_not_packed():
    transformer = small_transformer()
    Precision("float32", "bfloat16").apply_(transformer, small_tokenizer())
    assert not any(isinstance(module, PackedLinear) for module in transformer.modules())
    pack_(transformer)
    assert any(isinstance(module, PackedLinear) for module in transformer.modules())
