"""Weights of the blocks in the order in which a CPU's bfloat16 products read them, put into it once instead of at every call.

oneDNN, which computes bfloat16 products on CPUs, takes weights in blocks of its own. Where a call gives it rows, it orders
them anew each time, which at the sizes of sampling is a tenth of the product. What is here does so once, when weights are
cast for sampling, and has the tanh-GELU of the feed-forward computed before a product is written. But for that one, whose
input is no longer rounded in between, results are the same to the bit.

torch.compile uses the same operators; outside of it they have no public name, so where this PyTorch has them not, nothing is
packed.
"""

import torch
from torch import Tensor, nn

from models.layers import FeedForward
from models.transformer import ScaleTransformer


def can_pack() -> bool:
    """Whether this processor and this PyTorch compute bfloat16 products with packed weights."""
    operators = torch.ops.mkldnn
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(operators, n) for n in names)
        and operators._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Module):
    """What a linear layer in bfloat16 computes: (..., width) -> (..., outputs); with gelu, tanh-GELU of it."""

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())  # (outputs, width)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.activation = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias: (outputs,), instead of the layer's own."""
        bias = self.bias if bias is None else bias
        return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.packed, bias, *self.activation)


class PackedFeedForward(FeedForward):
    """What a FeedForward in bfloat16 computes."""

    def __init__(self, ffn: FeedForward):
        nn.Module.__init__(self)  # the layers are there already
        self.fc1, self.fc2 = PackedLinear(ffn.fc1, gelu=True), PackedLinear(ffn.fc2)

    def hidden(self, x: Tensor) -> Tensor:
        return self.fc1(x)


def pack_(transformer: ScaleTransformer) -> None:
    """Pack the weights of a transformer whose blocks are bfloat16 on a CPU: it samples from then on, and no more.

    Its parameters give way to the packed ones, so that it can neither be trained nor saved nor copied.
    """
    for block in transformer.blocks:
        block.ffn = PackedFeedForward(block.ffn)
        for mixer in block.mixers:
            for name, child in mixer.named_children():
                if isinstance(child, nn.Linear):
                    setattr(mixer, name, PackedLinear(child))
