"""The `memory` command of scripts/benchmark.py: what a training step holds, also of a GPU that is not there."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from models.pyramid import STANDARD_SIDES
from models.ssm import StateSpace
from models.transformer import ScaleTransformer, TransformerConfig, family_config, recompute_blocks_
from scripts.benchmarks.config import NUM_CLASSES, PIXELS, BenchmarkConfig
from scripts.benchmarks.formats import Columns, gigabytes

TRAINING_BYTES = 4 + 4 + 8 + 4  # per parameter, float32: weight, gradient, two moments of AdamW, average

COLUMNS: Columns = {
    "parameters": ("parameters", lambda count: f"{count / 1e6:.1f} M"),
    "state_bytes": ("state", gigabytes),
    "activation_bytes": ("activations per image", gigabytes),
    "recomputed_bytes": ("recomputed", gigabytes),
    "computed_again_bytes": ("computed again", gigabytes),
    "inside_mamba_bytes": ("inside Mamba", gigabytes),
}


def memory(config: BenchmarkConfig) -> list[dict]:
    """Memory of training

    What a GPU holds under DDP, for images of 256 px (680 tokens); 1 GB is 10^9 bytes.

    - *State*: weights, gradients, the two moments of AdamW and averaged weights (`--ema`), 4 + 4 + 8 + 4 bytes per parameter;
      `--parallel=fsdp` divides it by the number of GPUs. While a step runs, autocast's half-precision copies of the weights
      come on top, 2 bytes per parameter.
    - *Activations*: what a forward pass with its loss keeps for the backward pass, per image, in bfloat16 or float16: every
      storage that autograd saves, once, in a batch of two less that in a batch of one. Measured on tensors with shapes and no
      values, which follow a GPU's rules of autocast and save what its fused attention saves; with `--real` on real ones, by the
      rules of this machine.
    - *Recomputed*: the same with `--recompute`, where a block keeps its input alone.
    - *Computed again*: what one block keeps while the backward pass is in it, on top of *recomputed*. Of this, the inside of
      Mamba, between its projections, comes on top of *activations* too, since it is always computed again.

    So a GPU needs the state, then for every image of a micro-batch *activations* and *inside Mamba*, or with `--recompute`
    *recomputed* and *computed again*, and a few GB for gradients on their way, other passing tensors and fragments.
    """
    device = torch.device("cuda" if torch.cuda.is_available() or not config.real else "cpu")
    rows = []
    for depth, family in tqdm(list(itertools.product(config.depths, config.families)), disable=None):
        model = family_config(family, depth, STANDARD_SIDES[PIXELS], NUM_CLASSES)
        parameters = num_parameters(model)
        with contextlib.nullcontext() if config.real else fake_device(device):
            activations, recomputed = (kept_per_image(training_pass, model, device, again) for again in (False, True))
            inside_mamba = kept_per_image(mamba_pass, model, device)
        rows.append(
            {
                "model": f"d{depth}",
                "family": family,
                "parameters": parameters,
                "state_bytes": TRAINING_BYTES * parameters,
                "activation_bytes": activations,
                "recomputed_bytes": recomputed,
                "computed_again_bytes": (activations - recomputed) // depth + inside_mamba,
                "inside_mamba_bytes": inside_mamba,
            }
        )
    return rows


def num_parameters(config: TransformerConfig) -> int:
    with FakeTensorMode():
        return sum(parameter.numel() for parameter in ScaleTransformer(config).parameters())


def kept_per_image(make_pass: Callable[..., Callable[[], Tensor]], *arguments: Any) -> int:
    """Bytes that every further image of a batch makes a forward pass keep for its backward pass.

    make_pass(batch, *arguments) -> a function that computes it. Weights and their half-precision copies are the same in every
    batch, so they cancel.
    """
    return kept_bytes(make_pass(2, *arguments)) - kept_bytes(make_pass(1, *arguments))


def kept_bytes(compute: Callable[[], Tensor]) -> int:
    """Bytes of all distinct storages that autograd saves in a computation."""
    kept = {}  # the storages themselves: a freed one could give its id to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def training_pass(batch: int, config: TransformerConfig, device: torch.device, recompute: bool) -> Callable[[], Tensor]:
    """Logits under bfloat16 autocast and their loss, as in the trainer."""
    num_tokens = config.pyramid.num_tokens
    with device:
        transformer = ScaleTransformer(config).train()
        labels = torch.zeros(batch, dtype=torch.long)
        inputs = torch.zeros(batch, num_tokens - config.pyramid.lengths[0], config.code_dim)
        targets = torch.zeros(batch, num_tokens, dtype=torch.long)
    if recompute:
        recompute_blocks_(transformer)

    def compute() -> Tensor:
        with bfloat16_autocast(device.type):
            logits = transformer(labels, inputs)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return losses.sum(dim=1).mean() / num_tokens

    return compute


def mamba_pass(batch: int, config: TransformerConfig, device: torch.device) -> Callable[[], Tensor]:
    """What Mamba does between its projections in one block, in bfloat16; a constant where no block has any."""
    with device:
        insides = [module for module in ScaleTransformer(config).modules() if isinstance(module, StateSpace)]
        if not insides:
            return lambda: torch.zeros((), requires_grad=True)
        inside, num_tokens = insides[0], config.pyramid.num_tokens
        half = {"dtype": torch.bfloat16, "requires_grad": True}
        inputs = torch.zeros(batch, num_tokens, inside.inner + inside.conv_dim, **half)
        steps = torch.zeros(batch, num_tokens, inside.heads, **half)
    return lambda: inside(inputs, steps, inside.init_state(batch).conv, None)[0]


@contextlib.contextmanager
def bfloat16_autocast(device_type: str) -> Iterator[None]:
    """torch.autocast, but for CUDA on a machine without a GPU too, where torch.autocast would switch itself off."""
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, False)


@contextlib.contextmanager
def fake_device(device: torch.device) -> Iterator[None]:
    """Tensors made here have shapes and no values: models of any size cost no memory, on GPUs that need not be there."""
    with FakeTensorMode(), FusedAttention() if device.type == "cuda" else contextlib.nullcontext():
        yield


class FusedAttention(TorchFunctionMode):
    """Attention by the memory-efficient kernel, as a GPU would choose: for fake tensors PyTorch falls back to the plain one.

    Flash attention saves the same tensors: queries, keys, values, output and one number per query.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        queries, keys, values = args
        bias = kwargs["attn_mask"]
        if bias is not None:
            bias = queries.new_zeros(bias.shape).expand(*queries.shape[:2], *bias.shape[-2:])
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(queries, keys, values, bias, compute_log_sumexp=True, scale=kwargs["scale"])[0]
