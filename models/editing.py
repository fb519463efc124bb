"""Images of which a part is kept while the rest is drawn: in-painting, out-painting, another class in a place, variations.

At every scale the tokens of kept places are those of the image, and the sum of codes is set to the image's there, so that what
the transformer sees of a kept place is what it would see of the whole image, at this scale and at all that follow. Kept places
come out as the tokenizer reconstructs them, whatever is drawn beside them. (VAR's released demo keeps tokens alone: what coarse
tokens, drawn anew, add to kept places then stays in the image.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.tokenizer import VQVAE


class Kept(NamedTuple):
    """What is kept of images (B, ...), or of one image for a whole batch (1, ...)."""

    indices: list[Tensor]  # K LongTensors (B, h_k * w_k), the images' tokens
    sums: list[Tensor]  # K times (B, code_dim, h_K, w_K), their features after each scale
    tokens: list[Tensor]  # K times (h_k * w_k,) bool: these tokens are kept
    places: list[Tensor]  # K times (h_K, w_K) bool: here the sum after scale k is kept

    @property
    def keeps_any(self) -> bool:
        """Whether any token is kept at all."""
        return bool(torch.cat(self.tokens).any())

    @classmethod
    def of(cls, tokenizer: VQVAE, images: Tensor, redrawn: Tensor | None = None, keep_scales: int = 0) -> "Kept":
        """Of images (B, 3, H, W) in [-1, 1]: all places but those where `redrawn` (H, W) bool is set, None: everywhere.

        A token is drawn anew where it covers any such pixel. keep_scales: the first so many scales are kept everywhere.
        ValueError for a mask of another size, and where nothing would be drawn anew.
        """
        pyramid = tokenizer.pyramid
        shape = tokenizer.config.image_shape
        redrawn = torch.ones(shape, dtype=torch.bool, device=images.device) if redrawn is None else redrawn
        if tuple(redrawn.shape) != tuple(shape):
            raise ValueError(f"a mask of {redrawn.shape[0]}x{redrawn.shape[1]}: the images have {shape[0]}x{shape[1]}")
        if not redrawn.any():
            raise ValueError("the mask is empty: nothing would be drawn anew")
        if not 0 <= keep_scales < pyramid.num_scales:
            raise ValueError(
                f"{keep_scales} kept scales: the pyramid has {pyramid.num_scales}: give 0 to {pyramid.num_scales - 1}"
            )
        indices = tokenizer.encode(images)
        sums = list(tokenizer.quantizer.partial_sums(indices))
        free = [covered(redrawn, shape) for shape in pyramid.shapes]  # K times (h_k, w_k), had nothing else been kept
        tokens = [~part.flatten() | (k < keep_scales) for k, part in enumerate(free)]
        places = [~free[-1] | (k < keep_scales) for k in pyramid.scales]
        return cls(indices, sums, tokens, places)


def covered(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """(H, W) bool -> (h, w) bool: the cells of another map that cover any pixel that is set."""
    return F.adaptive_max_pool2d(mask[None, None].float(), shape)[0, 0] > 0
