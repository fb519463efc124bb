"""What is optimised how (the released recipes)."""

import torch
from torch import nn

NO_DECAY = ("position_embed", "start_embed", "scale_embed", "modulation.offset", "log_scale")


def parameter_groups(model: nn.Module) -> list[dict]:
    """Weight decay for everything but 1-D parameters, biases and the embeddings of NO_DECAY; the class embedding has it.

    What needs no gradient is in neither group.
    """
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        keep = parameter.ndim == 1 or name.endswith("bias") or any(part in name for part in NO_DECAY)
        (exempt if keep else decayed).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": exempt, "decays": False, "weight_decay": 0.0}]


def build_adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95), fused, as it is on GPUs and CPUs; learning rate and decay are set at every step."""
    return torch.optim.AdamW(parameter_groups(model), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def set_rates_(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
