"""Sums over predicted tokens, and what a log says of them: loss, accuracy and codes used, by scale and by class."""

import torch
from torch import Tensor

from models.pyramid import Pyramid
from utils.metrics.codes import USED_SHARE


class Tally:
    """Collects cross-entropies and predictions; sums of several ranks add up."""

    def __init__(self, pyramid: Pyramid, num_codes: int, num_classes: int, device: torch.device):
        self.pyramid, self.num_codes, self.num_classes = pyramid, num_codes, num_classes
        parts = {"losses": pyramid.num_tokens, "correct": pyramid.num_tokens, "tokens": pyramid.num_tokens}
        parts |= {"class_losses": num_classes + 1, "class_correct": num_classes + 1, "class_tokens": num_classes + 1}
        parts |= {"predicted": num_codes}
        self.sums = torch.zeros(sum(parts.values()), dtype=torch.float64, device=device)  # all in one, for one reduction
        self.parts = dict(zip(parts, self.sums.split(list(parts.values())), strict=True))

    def add(self, scales: range, losses: Tensor, predictions: Tensor, targets: Tensor, labels: Tensor) -> None:
        """losses, predictions, targets (B, L_of_scales); labels (B,) in 0 .. num_classes."""
        tokens, parts = self.pyramid.tokens(scales), self.parts
        losses, correct = losses.detach().double(), (predictions == targets).double()
        parts["losses"][tokens] += losses.sum(0)
        parts["correct"][tokens] += correct.sum(0)
        parts["tokens"][tokens] += len(labels)
        parts["class_losses"].index_add_(0, labels, losses.sum(1))
        parts["class_correct"].index_add_(0, labels, correct.sum(1))
        parts["class_tokens"].index_add_(0, labels, torch.full_like(losses[:, 0], losses.shape[1]))
        predictions = predictions.flatten()
        parts["predicted"].index_add_(0, predictions, torch.ones_like(predictions, dtype=torch.float64))  # bincount would wait

    def metrics(self, prefix: str = "") -> dict[str, float | dict[str, float]]:
        """Means over everything that was added; "last" is the finest scale among it."""
        counts = self._by_scale("tokens")
        losses, accuracies = (self._by_scale(name) for name in ("losses", "correct"))
        seen = [k for k in self.pyramid.scales if counts[k] > 0]
        names = {k: "x".join(map(str, self.pyramid.shapes[k])) for k in seen}
        predicted = self.parts["predicted"]
        used = (predicted > USED_SHARE / self.num_codes * predicted.sum()).double().mean()
        return {
            f"{prefix}loss": (losses.sum() / counts.sum()).item(),
            f"{prefix}loss_last": (losses[seen[-1]] / counts[seen[-1]]).item(),
            f"{prefix}accuracy": (accuracies.sum() / counts.sum()).item(),
            f"{prefix}accuracy_last": (accuracies[seen[-1]] / counts[seen[-1]]).item(),
            f"{prefix}codes_used": used.item(),
            f"{prefix}loss_by_scale": {name: (losses[k] / counts[k]).item() for k, name in names.items()},
            f"{prefix}accuracy_by_scale": {name: (accuracies[k] / counts[k]).item() for k, name in names.items()},
        }

    def by_class(self) -> tuple[list[float], list[float]]:
        """Loss and accuracy of every class, not a number where it had no image."""
        tokens = self.parts["class_tokens"][: self.num_classes]
        losses, correct = (self.parts[name][: self.num_classes] / tokens for name in ("class_losses", "class_correct"))
        return losses.tolist(), correct.tolist()

    def _by_scale(self, name: str) -> Tensor:
        """(K,) sums on the CPU."""
        return torch.stack([part.sum() for part in self.parts[name].cpu().split(self.pyramid.lengths)])
