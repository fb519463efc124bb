"""What each step of training the transformer does: learning rate, weight decay, trained scales (the released recipes).

Schedules are functions of `progress`, the passed share of the run from 0 to 1, so that they serve a number of steps and a
number of minutes alike. Shares of warm-up are in the same unit.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.pyramid import Pyramid
from models.transformer import TransformerConfig
from utils.runs.config import TrainConfig

DRAWN_EVERY = 10  # steps; one of them for each of the large scales, the others for the scales before them


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    num_scales: so many first scales are trained, the last of them with the weight newest_weight. groups: consecutive scales
    that are computed together, one group after another.
    """

    learning_rate: float
    weight_decay: float
    num_scales: int
    newest_weight: float
    groups: list[range]

    def token_weights(self, pyramid: Pyramid, device: torch.device) -> Tensor:
        """(L,) of the losses of all tokens."""
        weights = torch.ones(pyramid.num_tokens, device=device)
        weights[pyramid.tokens(range(self.num_scales - 1, self.num_scales))] = self.newest_weight
        return weights


def step_plan(config: TrainConfig, model: TransformerConfig, progress: float, step: int) -> StepPlan:
    """What the step after `step` steps does, at this passed share of the run."""
    factor = learning_rate_factor(config.schedule, progress, config.warmup_share, config.wp0, config.wpe)
    scales = model.pyramid.num_scales
    fade_in = (config.pgwp or config.ep / 300) / config.ep
    num_scales, newest_weight = progressive_stage(progress, scales, config.pg, config.pg0, config.warmup_share, fade_in)
    return StepPlan(
        config.peak_learning_rate * factor,
        weight_decay(progress, config.twd, config.twde or config.twd),
        num_scales,
        newest_weight,
        scale_groups(config.scale_groups, num_scales, model.windowed_scales(config.family), step),
    )


def learning_rate_factor(schedule: str, progress: float, warmup: float, start: float, end: float) -> float:
    """Factor on the peak learning rate: linear from `start` to 1 over the share `warmup`, then down to `end`.

    lin0, lin, lin00: constant for 5 %, 15 %, 0 % of the rest, then linear. linX with a number X in (0, 1), used by progressive
    training: a slower slope up to the share X. cos: half a cosine. exp: constant for 15 %, then exponential.
    """
    if progress < warmup:
        return start + (1 - start) * progress / warmup
    passed = min((progress - warmup) / max(1 - warmup, 1e-9), 1.0)
    if schedule == "cos":
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * passed))
    if schedule == "exp":
        hold = 0.15
        return 1.0 if passed < hold else end ** ((passed - hold) / (1 - hold))
    if schedule in ("lin0", "lin00", "lin"):
        hold = {"lin0": 0.05, "lin00": 0.0, "lin": 0.15}[schedule]
        return 1.0 if passed < hold else end + (1 - end) * (1 - passed) / (1 - hold)
    bend = float(schedule.removeprefix("lin"))
    height = (1 + end + (1 - end) * (1 - bend)) / 2  # at the bend: halfway between 1 and the straight line
    if passed < bend:
        return 1 + (height - 1) * passed / bend
    return end + (height - end) * (1 - passed) / (1 - bend)


def weight_decay(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end` over the whole run."""
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def progressive_stage(
    progress: float, num_scales: int, until: float, first: int, warmup: float, stage_warmup: float
) -> tuple[int, float]:
    """Progressive training: how many scales are trained now, and the weight of the newest of them.

    From first + 1 scales (after the share `warmup`) their number grows evenly until all are trained at the share `until`; each
    new scale but the last comes in with a weight growing from 0.01 to 1 over the share `stage_warmup`. until = 0: always all.
    """
    new = num_scales - 1 - first  # scales that still have to come
    if until == 0 or new <= 0:
        return num_scales, 1.0
    passed = min(max((progress - warmup) / max(until - warmup, 1e-9), 0.0), 1.0)
    stage = round(passed * new) if progress < until else new
    if stage in (0, new):  # as released, neither the first stage nor the last scale is faded in
        return first + 1 + stage, 1.0
    began = warmup + (stage - 0.5) / new * (until - warmup)
    weight = (progress - began) / max(stage_warmup, 1e-9)
    return first + 1 + stage, min(max(weight, 0.01), 1.0)


def scale_groups(mode: str, num_scales: int, large_scales: tuple[int, ...], step: int) -> list[range]:
    """Which scales one step trains, and which of them together in one forward and backward pass.

    large_scales: those that get a pass of their own unless mode is "together"; the scales before them form one group. "each":
    every group in turn, so their gradients add up to that of one pass. "drawn": one group per step, a large scale in one of ten
    steps each and the others in the rest (Markov MVAR's released schedule, 8:1:1). The group of the first scale comes last.
    """
    if mode == "together":
        return [range(num_scales)]
    alone = [k for k in large_scales if 2 <= k < num_scales]  # the first two scales together use every parameter
    groups = [range(k, k + 1) for k in reversed(alone)] + [range(alone[0] if alone else num_scales)]
    if mode == "each":
        return groups
    return [groups[min(DRAWN_EVERY - 1 - step % DRAWN_EVERY, len(groups) - 1)]]
