"""Everything that advances during training, and all of it as named tensors and numbers for a checkpoint."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.transformer import ScaleTransformer


@dataclass
class TrainState:
    """The state of a run after `step` steps; exactly this is saved.

    seconds: training time so far. skipped_steps, skipped_in_a_row: steps whose gradient was not finite under float16.
    validation_due: the validation at this step has not been done. ema: averaged weights by name, none where not wanted.
    """

    transformer: ScaleTransformer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    validation_due: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies: "model.NAME", "ema.NAME", "optimizer.NAME.KEY"; writing to them restores all."""
        moments = optimizer_tensors(self.transformer, self.optimizer)
        return flattened({"model": named(self.transformer), "ema": self.ema, "optimizer": moments})

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the averaged weights, where there are any, towards the weights; the decay is ramped up over the first steps."""
        current = named(self.transformer)
        if self.ema:
            decay = min(decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.values()), [current[name] for name in self.ema], 1 - decay)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the transformer computes with its averaged weights: they change places one by one, in the same memory."""
        self._change_places()
        try:
            yield
        finally:
            self._change_places()

    @torch.no_grad()
    def _change_places(self) -> None:
        current = named(self.transformer)
        for name, averaged in self.ema.items():
            kept = current[name].clone()
            current[name].copy_(averaged)
            averaged.copy_(kept)

    def numbers(self) -> dict:
        """The rest, as train_state.json holds it."""
        counts = {name: getattr(self, name) for name in COUNTS}
        return counts | {"scaler": self.scaler.state_dict()}

    def set_numbers(self, values: dict) -> None:
        for name in COUNTS:
            setattr(self, name, values[name])
        if values["scaler"] and self.scaler.is_enabled():  # empty where the run so far had another precision
            self.scaler.load_state_dict(values["scaler"])


COUNTS = ("step", "seconds", "skipped_steps", "skipped_in_a_row", "validation_due")


def flattened(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """{"model": {"head.weight": t}} -> {"model.head.weight": t}"""
    return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts by parameter, "NAME.exp_avg" and so on; made, at zero, where there was no step yet."""
    tensors = {}
    on_device = optimizer.param_groups[0]["fused"]
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:  # as AdamW itself starts them
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors
