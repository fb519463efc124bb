"""Propose pyramids for images of a side in pixels, with what each costs and why one would take it.

Sides grow as those of the published pyramids do (VAR, arXiv 2404.02905, section 3.2): by a constant factor, and by one where
that factor would give less. Arithmetic alone; which pyramid gives the better images only training tells. The released tokenizer
takes any of them as --pn, one trained here has the pyramid of its preset (models/tokenizer.py).
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.pyramid import STANDARD_SIDES, Pyramid
from models.tokenizer import TOKENIZER_PRESETS
from utils import cli
from utils.cli import argument, flag

MOST_SCALES = 64
MOST_PROPOSALS, FEWEST_PROPOSALS = 5, 3
COARSE_FROM = 256  # pixels from which the published tokenizers, /16, are the custom; ours for smaller images are /8
USUAL_GROWTH = 1.8  # of areas, as in the published pyramid for 256 px
GROWTHS = (4.0, 2.5, USUAL_GROWTH, 1.5)
TITLES = ("sides", "scales", "tokens", "tokens x", "growth", "free", "last", "VAR x", "M-VAR x", "why")

LEGEND = """tokens x: tokens over those of {reference} ({why})
growth: largest ratio of areas of neighbouring scales; free: the same where a side grows by more than 1, as small ones cannot
last: share of the tokens in the last scale; VAR x, M-VAR x: their attention over VAR's with {reference}"""
ADVICE = """How to choose:
More scales: each adds less to those before it, so its tokens, drawn at once, have less to agree on (free growth falls).
The price: more tokens, so more memory and time; more attention, above all VAR's, which looks back; more steps per sample.
Begin with the first. To save tokens, take fewer scales, but free growth near 2.25, the published maximum, or larger tokens."""


@dataclass(frozen=True)
class ChooseConfig:
    """Arguments of scripts/choose_pyramid.py."""

    side: str = argument("side of the square images in pixels, such as 256")
    tokens: int = flag(0, "the most tokens of all scales together, 0: any number")
    downsampling: int = flag(0, "pixels per token along a side, 0: 16 from 256 px on and 8 below")
    scales: int = flag(0, "propose this number of scales, 0: several")

    def __post_init__(self):
        for name in ("tokens", "scales"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give a number above 0, or 0 to leave it open")
        if self.downsampling < 0 or self.downsampling & (self.downsampling - 1):
            raise ValueError(f"--downsampling={self.downsampling}: a tokenizer halves: give a power of 2, such as 8 or 16")


@dataclass(frozen=True)
class Proposal:
    """A pyramid of square maps, why it is proposed, and the figures to compare it by."""

    pyramid: Pyramid
    why: str

    @property
    def growth(self) -> float:
        """Largest ratio of areas of neighbouring scales."""
        return largest_growth(self.pyramid.sides)

    @property
    def free_growth(self) -> float:
        """The same over the steps of more than 1, the least that a side can grow by; 1 where there is no such step."""
        return largest_growth(self.pyramid.sides, least_step=2)

    @property
    def last_share(self) -> float:
        """Share of the tokens in the last scale."""
        return self.pyramid.lengths[-1] / self.pyramid.num_tokens

    @property
    def var_attention(self) -> int:
        """Pairs of tokens that VAR's attention compares: of each scale with all up to it."""
        return sum(length * end for length, end in zip(self.pyramid.lengths, self.pyramid.offsets[1:], strict=True))

    @property
    def mvar_attention(self) -> int:
        """Pairs of tokens that M-VAR's attention compares: of each scale with itself."""
        return sum(length**2 for length in self.pyramid.lengths)


@dataclass(frozen=True)
class Choice:
    """What is proposed, the one to begin with first, and what it is all measured against."""

    proposals: tuple[Proposal, ...]
    reference: Proposal


def largest_growth(sides: tuple[int, ...], least_step: int = 1) -> float:
    """Largest ratio of areas of neighbouring scales whose sides differ by at least that; 1 where there are none."""
    pairs = zip(sides, sides[1:], strict=False)
    return max((after**2 / before**2 for before, after in pairs if after - before >= least_step), default=1.0)


def smooth_sides(num_scales: int, side: int) -> tuple[int, ...]:
    """Strictly increasing sides from 1 to side, 2 <= num_scales <= side: each grows by what would, kept up, end at side."""
    sides = [1]
    for missing in range(num_scales - 1, 0, -1):
        factor = (side / sides[-1]) ** (1 / missing)
        sides.append(max(round(sides[-1] * factor), sides[-1] + 1))
    return tuple(sides)


def tokens_per_side(config: ChooseConfig) -> tuple[int, int]:
    """(side of the finest map in tokens, pixels per token). ValueError, with the nearest that fits, for sizes without one."""
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", config.side, flags=re.ASCII)
    if not match:
        raise ValueError(f"side {config.side!r}: give the side of square images in pixels, such as 256")
    width, height = int(match[1]), int(match[2] or match[1])
    pixels = math.sqrt(width * height)  # of the square of as many pixels
    downsampling = config.downsampling or (16 if pixels >= COARSE_FROM else 8)
    nearest = max(math.floor(pixels / downsampling + 0.5), 2) * downsampling
    if width != height:
        raise ValueError(f"side {config.side}: images have to be square: the nearest that fits is {nearest} px")
    if width % downsampling:
        raise ValueError(
            f"side {width}: no multiple of the downsampling, {downsampling}: the nearest that fits is {nearest} px"
        )
    if width != nearest:
        raise ValueError(f"side {width}: a pyramid needs 2 tokens of {downsampling} px: the nearest that fits is {nearest} px")
    return width // downsampling, downsampling


def known_proposals(side: int, downsampling: int) -> list[Proposal]:
    """The published pyramids and those of our presets that end in that side, first those made for the very same images."""
    published = {sides: pixels for pixels, sides in STANDARD_SIDES.items() if pixels >= COARSE_FROM}
    known = [(sides, pixels, 16, f"as published for {pixels} px") for sides, pixels in published.items()]
    for name, preset in TOKENIZER_PRESETS.items():
        if preset.sides not in published:
            known.append((preset.sides, preset.image_shape[0], preset.downsampling, f"as in our preset {name}"))
    proposals = []
    for sides, pixels, factor, why in known:
        if sides[-1] == side and (pixels, factor) == (side * downsampling, downsampling):
            proposals.insert(0, Proposal(Pyramid(sides), why))
        elif sides[-1] == side:
            proposals.append(Proposal(Pyramid(sides), f"{why}, /{factor}, with the same last side"))
    return proposals


def choose(side: int, downsampling: int, tokens: int = 0, scales: int = 0) -> Choice:
    """Up to 5 pyramids whose finest map has side x side tokens, side >= 2; fewer than 3 only where there are no more.

    tokens: the most of all scales together, 0: any number; scales: their wanted number, 0: several. What is known for this side
    comes first, then what was asked for, then the others by their number of scales. ValueError where nothing fits.
    """
    smooth = {num: Pyramid(smooth_sides(num, side)) for num in range(2, min(side, MOST_SCALES) + 1)}
    fitting = {num: pyramid for num, pyramid in smooth.items() if not tokens or pyramid.num_tokens <= tokens}
    if not fitting:
        least = smooth[2]
        raise ValueError(f"--tokens={tokens}: two scales, {least}, take {least.num_tokens}: allow those or make tokens larger")
    if scales and scales not in smooth:
        raise ValueError(f"--scales={scales}: {side}x{side} tokens are reached in 2 to {max(smooth)} scales")
    if scales and scales not in fitting:
        needed = f"{smooth[scales]} takes {smooth[scales].num_tokens} tokens"
        raise ValueError(f"--scales={scales}: {needed}: allow those or ask for at most {max(fitting)} scales")

    known = known_proposals(side, downsampling)
    usual = fewest_scales(smooth, USUAL_GROWTH)
    usual_proposal = Proposal(smooth[usual], f"free growth of at most {USUAL_GROWTH:g}, as published for 256 px")
    first = [proposal for proposal in known if not tokens or proposal.pyramid.num_tokens <= tokens]
    if not known and not scales and usual in fitting:
        first.append(usual_proposal)

    if scales:
        wanted = [(scales, f"{scales} scales, as asked for"), (scales - 1, "one scale less"), (scales + 1, "one scale more")]
    else:
        wanted = [(max(fitting), f"the most scales that fit {tokens} tokens")] if tokens else []
        for growth in GROWTHS:
            wanted.append((fewest_scales(smooth, growth), f"fewest scales with free growth of at most {growth:g}"))
    filling = sorted(fitting, key=lambda num: abs(num - (scales or min(usual, max(fitting)))))  # the nearest first
    taken = {proposal.pyramid for proposal in first}
    others: dict[int, str] = {}
    for most, candidates in (
        (MOST_PROPOSALS, wanted),
        (FEWEST_PROPOSALS, [(num, f"{num} scales, to compare") for num in filling]),
    ):
        for num, why in candidates:
            if num in fitting and smooth[num] not in taken and len(first) + len(others) < most:
                others.setdefault(num, why)
    asked = scales or (max(fitting) if tokens else 0)
    order = sorted(others, key=lambda num: (num != asked, num))
    return Choice((*first, *(Proposal(smooth[num], others[num]) for num in order)), (known or [usual_proposal])[0])


def fewest_scales(pyramids: dict[int, Pyramid], growth: float) -> int:
    """The smallest number of scales whose areas grow by at most that, except where a side grows by no more than 1."""
    enough = (num for num, pyramid in pyramids.items() if largest_growth(pyramid.sides, least_step=2) <= growth)
    return next(enough, max(pyramids))


def row(proposal: Proposal, reference: Proposal) -> tuple[str, ...]:
    """A line of the table, as TITLES."""
    pyramid = proposal.pyramid
    return (
        str(pyramid),
        str(pyramid.num_scales),
        str(pyramid.num_tokens),
        f"{pyramid.num_tokens / reference.pyramid.num_tokens:.2f}",
        f"{proposal.growth:.2f}",
        f"{proposal.free_growth:.2f}" if proposal.free_growth > 1 else "-",
        f"{proposal.last_share:.0%}",
        f"{proposal.var_attention / reference.var_attention:.2f}",
        f"{proposal.mvar_attention / reference.var_attention:.2f}",
        proposal.why,
    )


def main() -> None:
    config = cli.parse(ChooseConfig, __doc__)
    side, downsampling = tokens_per_side(config)
    choice = choose(side, downsampling, config.tokens, config.scales)
    rows = [TITLES, *(row(proposal, choice.reference) for proposal in choice.proposals)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"{side * downsampling} px, {downsampling} px per token: pyramids that end in {side}x{side} tokens")
    for first, *middle, why in rows:
        cells = [text.rjust(width) for text, width in zip(middle, widths[1:-1], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells, why]))
    print(f"\n{LEGEND.format(reference=choice.reference.pyramid, why=choice.reference.why)}\n\n{ADVICE}")


if __name__ == "__main__":
    cli.run(main)
