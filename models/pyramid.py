"""The shape of a token pyramid: which scales there are, how large each is and where its tokens lie in the sequence.

A pyramid is the list of token-map sizes from coarse to fine (VAR, arXiv 2404.02905, section 3.2). Its maps, each flattened
row by row, stand behind one another in one sequence of `num_tokens` tokens. This file holds that arithmetic and nothing
else: no module, no weights.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# Published pyramids by image size (VAR: 256 and 512 px with /16 tokenizer; 1024 px in the same series), then our own for small
# images with a /8 tokenizer.
STANDARD_SIDES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    32: (1, 2, 3, 4),
    64: (1, 2, 3, 5, 8),
}


@dataclass(frozen=True)
class Pyramid:
    """Sizes of the token maps, coarse to fine.

    sides: one entry per scale, an int for a square map or (height, width). Both may only grow from scale to scale.
    Raises ValueError for an empty, non-positive or shrinking list.
    """

    sides: tuple[int | tuple[int, int], ...]

    def __post_init__(self):
        sides = tuple(tuple(side) if isinstance(side, (tuple, list)) else side for side in self.sides)
        object.__setattr__(self, "sides", sides)
        if not sides:
            raise ValueError("a pyramid needs at least one scale, for example 1_2_3_4")
        if any(size < 1 for shape in self.shapes for size in shape):
            raise ValueError(f"pyramid {self}: every side must be at least 1")
        for (height, width), (next_height, next_width) in zip(self.shapes, self.shapes[1:], strict=False):
            if next_height < height or next_width < width:
                raise ValueError(f"pyramid {self}: sides go from coarse to fine and must not shrink")

    @classmethod
    def parse(cls, text: str) -> "Pyramid":
        """Read an image size with a standard pyramid, such as '256', or a list of sides, such as '1_2_3_4'."""
        parts = text.replace("-", "_").split("_")
        if not all(part.isdigit() for part in parts):
            raise ValueError(f"pyramid {text!r}: give 256, 512, 1024 or sides joined by _, as in 1_2_3_4")
        if len(parts) == 1:
            if int(text) not in STANDARD_SIDES:
                raise ValueError(f"pyramid {text!r}: a single number is an image size, one of {sorted(STANDARD_SIDES)}")
            return cls(STANDARD_SIDES[int(text)])
        return cls(tuple(int(part) for part in parts))

    @classmethod
    def standard(cls, num_scales: int) -> "Pyramid":
        """The standard pyramid with that many scales (10 scales: the 256 px one)."""
        for sides in STANDARD_SIDES.values():
            if len(sides) == num_scales:
                return cls(sides)
        raise ValueError(f"no standard pyramid has {num_scales} scales: name the sides, such as sides=(1, 2, 3, 4)")

    def __str__(self) -> str:
        return "_".join(str(side) if isinstance(side, int) else f"{side[0]}x{side[1]}" for side in self.sides)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every scale."""
        return tuple((side, side) if isinstance(side, int) else side for side in self.sides)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every scale."""
        return tuple(height * width for height, width in self.shapes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """K + 1 positions: scale k covers the tokens offsets[k] to offsets[k + 1]."""
        return (0, *accumulate(self.lengths))

    @property
    def num_scales(self) -> int:
        return len(self.sides)

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    @property
    def num_inputs(self) -> int:
        """Tokens of all scales but the first, which has no inputs: it starts from the class."""
        return self.num_tokens - self.lengths[0]

    @property
    def scales(self) -> range:
        """All scales, as mixers take them."""
        return range(self.num_scales)

    def tokens(self, scales: range) -> slice:
        """The stretch of the sequence that consecutive scales cover."""
        return slice(self.offsets[scales.start], self.offsets[scales.stop])

    def inputs(self, scales: range) -> slice:
        """The stretch of the sequence of inputs, which lacks the first scale, that consecutive scales cover."""
        tokens, start = self.tokens(scales), self.lengths[0]
        return slice(max(tokens.start - start, 0), tokens.stop - start)

    def scales_from_side(self, side: int) -> tuple[int, ...]:
        """The scales of which a side is at least this long."""
        return tuple(k for k in self.scales if max(self.shapes[k]) >= side)

    def split(self, x: Tensor, scales: range | None = None) -> list[Tensor]:
        """(B, L_of_scales, ...) -> one (B, h_k * w_k, ...) per scale; all scales unless told."""
        scales = self.scales if scales is None else scales
        return list(x.split([self.lengths[k] for k in scales], dim=1))

    def scale_ids(self) -> Tensor:
        """(L,) the scale of every token."""
        return torch.tensor([k for k in self.scales for _ in range(self.lengths[k])])
