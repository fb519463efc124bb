"""A mixer that the project does not have, for tests/test_new_mixer.py: run as a program it is train.py with that mixer."""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from models.families import FAMILIES, Family, MixerConfig


class MeanState(NamedTuple):
    total: Tensor  # (B, C), sum over all tokens so far


class RunningMean(nn.Module):
    """Every token of a scale gets the mean over all tokens up to the end of that scale."""

    carries_state, hidden_flops, attention_multiply_adds = True, 0, 0
    float32_parts = ()

    def __init__(self, config: MixerConfig):
        super().__init__()
        self.pyramid, self.width = config.pyramid, config.width
        self.proj = nn.Linear(self.width, self.width)

    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        self.proj.weight.data.div_(depth**0.5)

    def init_state(self, batch: int) -> MeanState:
        return MeanState(torch.zeros(batch, self.width, device=self.proj.weight.device, dtype=self.proj.weight.dtype))

    def forward(self, x: Tensor, scales: range, state: MeanState | None = None) -> tuple[Tensor, MeanState]:
        (total,), means = state or self.init_state(len(x)), []
        for k, part in zip(scales, self.pyramid.split(x, scales), strict=True):  # (B, l, C)
            total = total + part.sum(dim=1)
            means.append((total / self.pyramid.offsets[k + 1]).unsqueeze(1).expand_as(part))
        return self.proj(torch.cat(means, dim=1).to(x.dtype)), MeanState(total)


FAMILY = "running-mean"
KIND = Family("Running mean", "the mean of all scales so far, of no paper", (RunningMean,))

if __name__ == "__main__":
    FAMILIES[FAMILY] = KIND
    import train
    from utils import cli

    cli.run(train.main)
