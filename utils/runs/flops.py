"""What a training step costs in floating-point operations, and what a GPU could do at most: together, how well it is used."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.transformer import ScaleTransformer, TransformerConfig

# Dense float16/bfloat16 with float32 sums, operations per second, from the makers' data sheets. A name needs all the words of
# a row; the first row that fits counts.
PEAKS = (
    ("V100 PCIE", 112e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A10", 125e12),
    ("A40", 150e12),
    ("A6000", 155e12),
    ("3090", 71e12),
    ("4090", 165e12),
    ("5090", 210e12),
    ("L4", 121e12),
    ("L40", 181e12),
    ("L40S", 362e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("GB200", 2500e12),
)
OTHER_CHIPS = {"MIG", "LAPTOP", "D"}  # parts of a GPU, or smaller ones, under the name of the large one


def training_flops(config: TransformerConfig) -> float:
    """Floating-point operations of one training step on one image, a multiply-add being two.

    Three times the matrix products of a forward pass over the whole pyramid; products computed twice to save memory count
    once. Through a window attention counts the scores that are seen, not the hidden ones computed with them. Nothing is
    computed and no memory taken, but it takes a second or two.
    """
    # Fake tensors have shapes and no values; the meta device would do, but knows no autocast.
    with FakeTensorMode(), torch.no_grad():
        transformer = ScaleTransformer(config)
        labels = torch.zeros(1, dtype=torch.long)
        inputs = torch.zeros(1, config.pyramid.num_inputs, config.code_dim)
        # attention as plain products: not every version of the counter knows every fused kernel
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            transformer(labels, inputs)
    hidden = sum(mixer.hidden_flops for block in transformer.blocks for mixer in block.mixers)
    return 3.0 * (counter.get_total_flops() - hidden)


def peak_flops(device_name: str) -> float | None:
    """Peak of a GPU by the name that the driver gives it, such as "NVIDIA H100 80GB HBM3"; None where it is not known."""
    words = set(device_name.upper().replace("-", " ").split())
    if words & OTHER_CHIPS:
        return None
    return next((peak for name, peak in PEAKS if words.issuperset(name.split())), None)
