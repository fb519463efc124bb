"""Everything that advances during training, and all of it as named tensors and numbers for a checkpoint."""

import contextlib
import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

MODEL = "model"  # the part that a run is for: averaged, described, published
AVERAGED = "ema"


@dataclass(frozen=True)
class Part:
    """A model that is trained, by an optimizer of its own.

    grad_clip: largest norm of its gradient. saved: names of the parameters that checkpoints hold, None: all.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    grad_clip: float = math.inf
    saved: Set[str] | None = None

    def saved_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in named(self.model).items() if self.saved is None or name in self.saved}

    def advance(self, scaler: torch.amp.GradScaler) -> Tensor:
        """Apply the gradients that backward passes have left; returns their norm before clipping, (), on the device.

        With loss scaling the device itself skips a step whose gradients are not finite; `scaler.update` is the caller's. A part
        that no backward pass has reached, since its time has not come, stays as it is.
        """
        if all(parameter.grad is None for parameter in self.model.parameters()):
            return next(self.model.parameters()).new_zeros(())
        scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        from torch.distributed.tensor import DTensor  # here, as it takes a second

        return norm.full_tensor() if isinstance(norm, DTensor) else norm


@dataclass
class TrainState:
    """The state of a run after `step` steps; exactly this is saved, with what the task adds.

    parts: the models that are trained, by name, the one called MODEL among them. seconds: training time so far.
    skipped_steps, skipped_in_a_row: steps whose gradient was not finite under float16. validation_due: the validation at this
    step has not been done. ema: averaged weights of MODEL by name, of what is trained, none where not wanted. best, best_step,
    best_figure: the best value of the figure that decides which checkpoint is kept, None before there is one, where it was
    reached, and the name of the figure.
    """

    parts: dict[str, Part]
    scaler: torch.amp.GradScaler
    ema: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    validation_due: bool = False
    best: float | None = None
    best_step: int = 0
    best_figure: str = ""

    @property
    def model(self) -> nn.Module:
        return self.parts[MODEL].model

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies; writing to them restores all.

        "model.NAME", "ema.NAME" and "optimizer.NAME.KEY"; of another part "PART.NAME" and "PART_optimizer.NAME.KEY". What
        stands before the first dot is a section: a file of a checkpoint.
        """
        sections = {name: part.saved_tensors() for name, part in self.parts.items()} | {AVERAGED: self.ema}
        for name, part in self.parts.items():
            sections[optimizer_section(name)] = optimizer_tensors(part.model, part.optimizer)
        return flattened(sections)

    def start_anew_(self, sections: set[str]) -> None:
        """What a checkpoint did not have: averaged weights start from the weights, optimizers from nothing, models stay."""
        if AVERAGED in sections:
            weights = named(self.model)
            for name, averaged in self.ema.items():
                averaged.copy_(weights[name])
        for name, part in self.parts.items():
            if optimizer_section(name) in sections:
                part.optimizer.state.clear()

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the averaged weights, where there are any, towards the weights; the decay is ramped up over the first steps."""
        current = named(self.model)
        if self.ema:
            decay = min(decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.values()), [current[name] for name in self.ema], 1 - decay)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model computes with its averaged weights: they change places one by one, in the same memory."""
        self._change_places()
        try:
            yield
        finally:
            self._change_places()

    @torch.no_grad()
    def _change_places(self) -> None:
        current = named(self.model)
        for name, averaged in self.ema.items():
            kept = current[name].clone()
            current[name].copy_(averaged)
            averaged.copy_(kept)

    def numbers(self) -> dict:
        """The rest, as train_state.json holds it."""
        counts = {name: getattr(self, name) for name in COUNTS}
        return counts | {"scaler": self.scaler.state_dict()}

    def set_numbers(self, values: dict) -> None:
        """Values of `numbers`; those that earlier code did not write stay as they are."""
        for name in COUNTS:
            setattr(self, name, values.get(name, getattr(self, name)))
        if values.get("scaler") and self.scaler.is_enabled():  # empty where the run so far had another precision
            self.scaler.load_state_dict(values["scaler"])


COUNTS = ("step", "seconds", "skipped_steps", "skipped_in_a_row", "validation_due", "best", "best_step", "best_figure")


def optimizer_section(part: str) -> str:
    return "optimizer" if part == MODEL else f"{part}_optimizer"


def flattened(sections: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """{"model": {"head.weight": t}} -> {"model.head.weight": t}"""
    return {f"{section}.{name}": tensor for section, tensors in sections.items() for name, tensor in tensors.items()}


def sectioned(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"model.head.weight": t} -> {"model": {"head.weight": t}}"""
    sections: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        section, _, inside = name.partition(".")
        sections.setdefault(section, {})[inside] = tensor
    return sections


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Those that are not left as they are."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What any optimizer keeps of each parameter, "NAME.exp_avg" and so on; made, at zero, where there was no step yet.

    torch.distributed has functions for it that give the same names but not the same bits: they leave out parameters that never
    had a gradient, and where there was no step they take one, which from then on counts.
    """
    settings = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter not in settings:  # not trained
            continue
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = _first_state(optimizer, settings[parameter], parameter)
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    return tensors


def _first_state(optimizer: torch.optim.Optimizer, settings: dict, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer will keep of a parameter, at zero: moments and counts start so. A step of a copy shows what it is."""
    copy = torch.zeros_like(parameter, requires_grad=True)
    copy.grad = torch.zeros_like(copy)
    trial = type(optimizer)([{**settings, "params": [copy]}])
    trial.step()
    return {key: value.zero_() if isinstance(value, Tensor) else value for key, value in trial.state[copy].items()}
