"""Condition contrastive alignment as a task: two labels for every image, and a frozen reference."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dist import gradient_exchange
from models.scan_backends import choose_scan_
from models.storage import weights_hash
from models.transformer import ScaleTransformer
from utils.losses.contrast import condition_contrast
from utils.runs.config import TrainConfig
from utils.runs.saving import read_numbers
from utils.runs.state import TrainState
from utils.runs.tally import Tally
from utils.runs.task import StepResult
from utils.tasks.next_scale import NextScalePrediction


class Contrast(NamedTuple):
    """What a step of the alignment leaves."""

    tally: Tally  # under the images' own labels
    sums: Tensor  # (3,) over images: likelihood over the reference's under their own label, under others', number of images


class ConditionAlignment(NextScalePrediction):
    """Condition contrastive alignment, see utils/losses/contrast.py; the reference is the transformer as the run began."""

    schedule = (*NextScalePrediction.schedule, "cca_beta", "cca_weight")

    def __init__(self, config: TrainConfig, transformer: ScaleTransformer, *arguments, **options):
        reference = copy.deepcopy(transformer)
        super().__init__(config, transformer, *arguments, **options)
        self.reference = reference.to(self.ranks.device).eval().requires_grad_(False)
        choose_scan_(self.reference, config.scan_backend, self.ranks.device)
        self.reference_hash = weights_hash(self.reference)

    def step(self, state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], progress: float) -> StepResult:
        """Take `ac` micro-batches, each image under its own label and that of the next one."""
        config = self.config
        plan = self._begin(state, progress)
        tally, sums, total = self._new_tally(), torch.zeros(3, device=self.ranks.device), 0.0
        for micro_batch in range(config.ac):
            batch, labels = next(batches)
            own = self._to_device(self._drop_classes(labels, state.step, micro_batch))
            is_dropped = own == self.transformer.unconditional
            other = torch.where(is_dropped, own, self._to_device(self._next_labels(labels)))
            targets, inputs = self._targets_and_inputs(batch, plan.num_scales)
            both = targets.repeat(2, 1), inputs.repeat(2, 1, 1), torch.cat([own, other]), self.pyramid.scales
            with gradient_exchange(self.spread, now=micro_batch == config.ac - 1):
                losses, predictions = self._token_losses(self.spread, *both, 0.0)  # (2B, L)
                with torch.no_grad():
                    known, _ = self._token_losses(self.reference, *both, 0.0)
                gains = (known - losses).sum(dim=1).chunk(2)  # (B,) twice: of log-likelihood
                loss = condition_contrast(*gains, own == other, config.cca_beta, config.cca_weight) / config.ac
                state.scaler.scale(loss).backward()
            count = len(labels)
            tally.add(self.pyramid.scales, losses[:count], predictions[:count], targets, own)
            sums += torch.stack([*(gain.detach().sum() for gain in gains), gains[0].new_tensor(count)])
            total = total + loss.detach()
        rates = {"learning_rate": plan.learning_rate, "weight_decay": plan.weight_decay}
        return StepResult(total, Contrast(tally, sums), rates)

    def _next_labels(self, labels: Tensor) -> Tensor:
        """The label of the next image among those of all ranks, (B,)."""
        every = self.ranks.gather(labels).flatten()
        first = self.ranks.rank * len(labels)
        return every.roll(-1)[first : first + len(labels)]

    def figures(self, result: StepResult) -> dict[str, float | dict[str, float]]:
        own, other, count = self.ranks.sum(result.outcome.sums).tolist()
        gains = {"likelihood_gain": own / count, "likelihood_gain_of_others": other / count}
        return super().figures(result._replace(outcome=result.outcome.tally)) | gains

    def explain(self, result: StepResult) -> str:
        return super().explain(result._replace(outcome=result.outcome.tally))

    def utilisation(self, result: StepResult, images_per_second: float) -> float | None:
        """An image goes through the transformer twice, and through the reference, forward alone, as often."""
        return self.mfu_of_image and images_per_second * self.mfu_of_image * 2 * (1 + 1 / 3)

    def circumstances(self) -> dict:
        return super().circumstances() | {"reference": self.reference_hash}

    def check_resumable(self, checkpoint: Path) -> None:
        super().check_resumable(checkpoint)
        theirs = read_numbers(checkpoint).get("reference")
        if theirs != self.reference_hash:
            raise ValueError(
                f"{checkpoint}: was begun from other weights than those of --init_from={self.config.init_from}: give those and "
                "the run's --seed, or another --local_out_dir_path"
            )
