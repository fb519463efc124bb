"""Mixers of one kind, watched while whole pyramids pass through a transformer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.transformer import ScaleTransformer


class Watch(ABC):
    """What is counted of the mixers of one class, block by block; `blocks` has the numbers of the blocks that have one."""

    def __init__(self, transformer: ScaleTransformer, kind: type[nn.Module]):
        self.pyramid = transformer.pyramid
        found = [(i, mixer) for i, block in enumerate(transformer.blocks) for mixer in block.mixers if isinstance(mixer, kind)]
        self.blocks = [i for i, _ in found]
        self.mixers = [mixer for _, mixer in found]
        self.images = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every pass of whole pyramids is counted."""
        hooks = [
            mixer.register_forward_pre_hook(lambda _, arguments, number=number: self._see(number, *arguments[:2]))
            for number, mixer in enumerate(self.mixers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _see(self, number: int, x: Tensor, scales: range) -> None:
        self.images += len(x) if number == 0 else 0
        self.add(number, x, scales)

    @abstractmethod
    def add(self, number: int, x: Tensor, scales: range) -> None:
        """Count what mixer `number` of those watched does with x (B, L, C) of these scales."""

    def check_seen(self) -> None:
        """ValueError before there were images."""
        if self.mixers and not self.images:
            raise ValueError("no image has been seen yet")
