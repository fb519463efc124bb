"""Draw what the documentation shows: a block of every kind, and how data flow in training and in generation.

What is in a block is asked of its mixers, and what sizes there are of the pyramid, so that neither picture says anything else
than the code does. --out gets block.png and flow.png.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from models.attention import Attention
from models.families import FAMILIES, Mixer, part_name
from models.pyramid import Pyramid
from models.ssm import Mamba2
from models.tokenizer import TokenizerConfig
from models.transformer import Block, TransformerConfig, family_config
from utils import cli, plots
from utils.cli import flag
from utils.files import check_folder

SCANNED = {"across": "over all tokens so far", "within": "over its own scale", "reversed": "over all, scales reversed"}
PIXELS = "256"
DEPTH, NUM_CLASSES = 16, 1000  # of the transformers that are built to be looked at; no size in the pictures depends on it
INK, GREY = "#222222", "#6b6b6b"
COLOURS = {"attention": "#cfe1f5", "mamba": "#d5ecd0", "feed-forward": "#ece6dc", "norm": "#ffffff", "state": "#fbe7bf"}
OTHER = "#e6d9ee"  # of mixers that are not known here
TOKENIZER, MODEL, DRAWN = "#e6dcf0", "#cfe1f5", "#fbe7bf"
DOTS_PER_INCH = 120
NUM_COLOURS = 64


@dataclass(frozen=True)
class DrawConfig:
    """Flags of scripts/draw_models.py."""

    out: str = flag("docs", "directory for block.png and flow.png; those that are there are replaced")


# --- what is drawn ------------------------------------------------------------------------------------------------------


class SubLayer(NamedTuple):
    """One modulated part of a block: what it is called, what it does, and what goes from scale to scale, empty: nothing."""

    part: str
    says: tuple[str, ...]
    state: tuple[str, ...]


def sub_layers(config: TransformerConfig) -> list[SubLayer]:
    """Those of a block of this transformer, in their order, the feed-forward last."""
    with torch.device("meta"):  # shapes alone
        block = Block(config, 0)
        found = [SubLayer(part_name(mixer), in_words(mixer), state_of(mixer)) for mixer in block.mixers]
    hidden, width = block.ffn.fc1.weight.shape
    found.append(SubLayer("feed-forward", ("feed-forward", f"C, {hidden / width:g} C, C; GELU"), ()))
    assert len(found) == block.num_sublayers
    return found


def in_words(mixer: Mixer) -> tuple[str, ...]:
    """A title and what it sees, in lines."""
    if isinstance(mixer, Mamba2):
        return ("Mamba-2", SCANNED[mixer.scan])
    if not isinstance(mixer, Attention):
        return (part_name(mixer),)
    count = len(mixer.seen_scales(mixer.pyramid.scales[-1]))
    seen = {1: "its own scale", mixer.pyramid.num_scales: "all scales so far"}.get(count, f"the last {count} scales")
    windowed = [f"{height}x{width}" for height, width in (mixer.pyramid.shapes[k] for k in mixer.windowed_scales)]
    windows = (f"{mixer.window}x{mixer.window} windows on {', '.join(windowed)}",) if windowed else ()
    return ("attention", seen, *windows)


def state_of(mixer: Mixer) -> tuple[str, ...]:
    """Names of the tensors that a mixer hands from scale to scale."""
    return type(mixer.init_state(1))._fields if mixer.carries_state else ()


def kinds(pyramid: Pyramid) -> dict[str, list[SubLayer]]:
    """What a block of every kind consists of."""
    return {family: sub_layers(family_config(family, DEPTH, pyramid.sides, NUM_CLASSES)) for family in FAMILIES}


# --- the pencil ---------------------------------------------------------------------------------------------------------


class Sheet:
    """A page in inches, from its lower left corner, with what the pictures consist of."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure  # here, as it takes half a second

        self.figure = Figure(figsize=(width, height))
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, width), ylim=(0, height))
        self.axis.set_axis_off()

    def box(self, x: float, y: float, width: float, height: float, colour: str, lines: tuple[str, ...] = (), size: float = 9):
        """Centred at (x, y); the first of several lines is bold."""
        from matplotlib.patches import FancyBboxPatch

        corner = x - width / 2 + 0.04, y - height / 2 + 0.04
        style = "round,pad=0.04,rounding_size=0.06"
        patch = FancyBboxPatch(
            corner, width - 0.08, height - 0.08, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=0.9
        )
        self.axis.add_patch(patch)
        step = size * 1.35 / 72
        for number, line in enumerate(lines):
            bold = len(lines) > 1 and number == 0
            self.text(x, y + (len(lines) - 1) / 2 * step - number * step, line, size, weight="bold" if bold else "normal")

    def text(self, x: float, y: float, text: str, size: float = 9, **options: Any) -> None:
        options = {"ha": "center", "va": "center", "color": INK} | options
        self.axis.text(x, y, text, fontsize=size, **options)

    def line(self, *points: tuple[float, float], arrow: bool = False, **options: Any) -> None:
        """Through these points, at the end an arrow where there is to be one."""
        options = {"color": INK, "linewidth": 1.1, "solid_capstyle": "round"} | options
        self.axis.plot(*zip(*points, strict=True), **options)
        if arrow:
            look = {
                "arrowstyle": "-|>",
                "color": options["color"],
                "linewidth": options["linewidth"],
                "shrinkA": 0,
                "shrinkB": 0,
            }
            self.axis.annotate("", points[-1], points[-2], arrowprops=look | {"mutation_scale": 9})

    def arrow(self, *points: tuple[float, float], **options: Any) -> None:
        self.line(*points, arrow=True, **options)

    def sign(self, x: float, y: float, sign: str) -> None:
        """A small circle with a sign in it."""
        from matplotlib.patches import Circle

        self.axis.add_patch(Circle((x, y), 0.1, facecolor="white", edgecolor=INK, linewidth=0.9, zorder=3))
        self.text(x, y - 0.005, sign, 10, zorder=4)

    def grid(self, x: float, y: float, side: float, shape: tuple[int, int], colour: str) -> None:
        """A token map, centred at (x, y)."""
        from matplotlib.patches import Rectangle

        height, width = shape
        corner = x - side / 2, y - side / 2
        self.axis.add_patch(Rectangle(corner, side, side, facecolor=colour, edgecolor=INK, linewidth=0.7))
        for lines, count in (("rows", height), ("columns", width)):
            for number in range(1, count):
                at = side * number / count
                ends = ((0, at), (side, at)) if lines == "rows" else ((at, 0), (at, side))
                self.line(*((corner[0] + a, corner[1] + b) for a, b in ends), linewidth=0.35)

    def save(self, path: Path) -> None:
        """With a palette, as there are few colours: a third of the size, and no version of matplotlib in the file."""
        drawn = io.BytesIO()
        self.figure.savefig(drawn, dpi=DOTS_PER_INCH, format="png")
        plots.save(Image.open(drawn).convert("RGB").quantize(NUM_COLOURS), path, optimize=True)


# --- the pictures -------------------------------------------------------------------------------------------------------

COLUMN, ROW, TOP = 2.5, 1.93, 1.15  # inches: of a kind, of a sub-layer, and of what stands above the first
MARGIN = 0.06


def draw_block(path: Path, blocks: dict[str, list[SubLayer]]) -> None:
    """The kinds side by side; what comes first stands at the top, all feed-forwards in the last row."""
    rows = max(map(len, blocks.values()))
    height = TOP + ROW * rows + 1.0
    sheet = Sheet(MARGIN + COLUMN * len(blocks), height)
    for column, (family, found) in enumerate(blocks.items()):
        left = MARGIN + COLUMN * column
        middle = left + COLUMN / 2 - MARGIN / 2
        sheet.text(middle, height - 0.22, FAMILIES[family].title, 12, weight="bold")
        sheet.text(middle, height - 0.46, f"--family={family}", 9, color=GREY, family="DejaVu Sans Mono")
        stem = left + 0.22
        end = height - TOP - ROW * rows - 0.12
        sheet.text(stem, height - 0.72, "x", 10, style="italic")
        sheet.text(stem + 0.12, height - 0.72, "(B, L, C)", 8, color=GREY, ha="left")
        sheet.arrow((stem, height - 0.84), (stem, end))
        sheet.text(stem, end - 0.12, "x", 10, style="italic")
        for number, part in enumerate(found):
            row = rows - 1 if number == len(found) - 1 else number
            draw_sub_layer(sheet, stem, left + 1.42, height - TOP + 0.12 - ROW * row, part, number + 1)
        count = len(found)
        sheet.text(middle + 0.12, end - 0.12, f"modulation (B, 3, {count}, 1, C)", 8, color=GREY)
    note = (
        "norm: layer norm without parameters of its own. scale, shift and gamma of each sub-layer, (B, 1, C) each, are\n"
        "projected from the embedding of the class, once for all scales. state: what a scale hands to the next one."
    )
    sheet.text(COLUMN * len(blocks) / 2, 0.27, note, 8.5, linespacing=1.5)
    sheet.save(path)


def draw_sub_layer(sheet: Sheet, stem: float, middle: float, top: float, part: SubLayer, number: int) -> None:
    """From the stem through norm and modulation, the part itself and its gamma, back to the stem."""
    width = 1.98
    index = "₀₁₂₃₄₅₆₇₈₉"[number]
    sheet.arrow((stem, top - 0.2), (middle - width / 2, top - 0.2))
    sheet.box(middle, top - 0.2, width, 0.3, COLOURS["norm"], (f"norm · (1 + scale{index}) + shift{index}",), 8.5)
    sheet.arrow((middle, top - 0.35), (middle, top - 0.52))
    tall = 0.64
    sheet.box(middle, top - 0.52 - tall / 2, width, tall, COLOURS.get(part.part, OTHER), part.says, 8.5)
    bottom = top - 0.52 - tall
    if part.part != "feed-forward":
        words = f"state: {', '.join(part.state)}" if part.state else "no state"
        colour = COLOURS["state"] if part.state else "white"
        sheet.box(middle, bottom - 0.12, width, 0.24, colour, (words,), 8)
        bottom -= 0.24
    back = top - ROW + 0.14
    sheet.arrow((middle, bottom), (middle, back), (stem + 0.1, back))
    sheet.text(middle - 0.55, back + 0.11, f"· gamma{index}", 8.5)
    sheet.sign(stem, back, "+")


# where the columns of flow.png stand, and its rows, in inches
IMAGE, ENCODER, QUANTIZER, INPUTS, TRANSFORMER, LOGITS, LAST = 0.75, 2.05, 3.4, 4.95, 6.75, 8.35, 9.75
MAPS = 4.25, 10.35  # left and right end of the pyramid
WIDTH = 1.16  # of a box


def draw_flow(path: Path, tokenizer: TokenizerConfig) -> None:
    """Above, training: all scales at once; below, generation: one after another."""
    pyramid, dim, codes = tokenizer.pyramid, tokenizer.code_dim, tokenizer.num_codes
    height, width = tokenizer.image_shape
    rows, columns = pyramid.shapes[-1]
    sheet = Sheet(10.6, 7.5)
    sheet.text(0.16, 7.25, "Training: all scales at once", 12, weight="bold", ha="left")

    # from an image to its tokens
    first, second = 6.35, 4.75
    sheet.box(IMAGE, first, WIDTH, 0.62, "white", ("image", f"3x{height}x{width}"))
    sheet.box(ENCODER, first, WIDTH, 0.62, TOKENIZER, ("encoder", f"to {dim}x{rows}x{columns}"))
    sheet.box(QUANTIZER, first, WIDTH, 0.62, TOKENIZER, ("quantizer", "of residuals"))
    for left, right in ((IMAGE, ENCODER), (ENCODER, QUANTIZER)):
        sheet.arrow((left + WIDTH / 2, first), (right - WIDTH / 2, first))
    sheet.arrow((QUANTIZER + WIDTH / 2, first), (MAPS[0] - 0.02, first))
    draw_maps(sheet, first, pyramid)
    told = f"{pyramid.num_scales} maps, {pyramid.num_tokens} tokens, each the number of one of {codes} codes"
    sheet.text(sum(MAPS) / 2, 7.02, told, 9, color=GREY)

    # from tokens to the loss
    fed = ("teacher inputs", "sum of the codes of all", "coarser scales, averaged", "down to each scale")
    sheet.box(INPUTS, second, 1.72, 0.86, TOKENIZER, fed, 8.5)
    sheet.box(TRANSFORMER, second, WIDTH, 0.86, MODEL, ("transformer", "all scales", "in one pass"))
    sheet.box(LOGITS, second, WIDTH, 0.62, "white", ("logits", f"{pyramid.num_tokens}x{codes}"))
    sheet.box(LAST, second, WIDTH, 0.62, DRAWN, ("cross-entropy", "over all tokens"), 8.5)
    sheet.arrow((INPUTS, 5.78), (INPUTS, second + 0.43))
    sheet.text(INPUTS + 0.1, 5.48, "all maps but the last", 8.5, ha="left", color=GREY)
    sheet.text(
        (INPUTS + 0.86 + TRANSFORMER - WIDTH / 2) / 2 - 0.02, second - 0.55, f"{pyramid.num_inputs}x{dim}", 8.5, color=GREY
    )
    sheet.arrow((LAST, 5.78), (LAST, second + 0.31))
    sheet.text(LAST - 0.1, 5.48, "targets", 8.5, ha="right", color=GREY)
    join(sheet, second)
    sheet.arrow((TRANSFORMER, 4.05), (TRANSFORMER, second - 0.43))
    sheet.text(TRANSFORMER, 3.94, "class", 9)
    words = (
        "The tokenizer is trained first and\n"
        "then left as it is, so that tokens may\n"
        "be encoded once (cache_tokens.py).\n"
        "The first scale has no inputs: it\n"
        "starts from the class."
    )
    sheet.text(0.16, second, words, 8.5, ha="left", linespacing=1.45, color=GREY)

    # generation
    sheet.line((0.16, 3.66), (10.44, 3.66), color="#cccccc", linewidth=0.8)
    sheet.text(0.16, 3.4, "Generation: scale by scale", 12, weight="bold", ha="left")
    third, fourth = 2.5, 0.8
    sheet.box(INPUTS, third, 1.72, 0.62, TOKENIZER, ("next input", "averaged to scale k + 1"), 8.5)
    sheet.box(TRANSFORMER, third, WIDTH, 0.86, MODEL, ("transformer", "one scale", "in each pass"))
    sheet.box(LOGITS, third, WIDTH, 0.62, "white", ("logits", "of scale k"))
    sheet.box(LAST, third, WIDTH, 0.86, DRAWN, ("draw", "guidance,", "top-k, top-p"))
    join(sheet, third)
    sheet.arrow((TRANSFORMER - 0.3, 3.2), (TRANSFORMER - 0.3, third + 0.43))
    sheet.text(TRANSFORMER - 0.3, 3.31, "class, and no class", 9)
    loop = (
        (TRANSFORMER + 0.22, third + 0.43),
        (TRANSFORMER + 0.22, 3.14),
        (TRANSFORMER + 0.9, 3.14),
        (TRANSFORMER + 0.9, third + 0.2),
    )
    sheet.arrow(*loop, (TRANSFORMER + WIDTH / 2, third + 0.2))
    sheet.text(TRANSFORMER + 0.98, 3.2, "state of the scales so far", 8.5, ha="left", color=GREY)

    sheet.box(LAST, fourth, WIDTH, 0.62, "white", ("tokens", "map of scale k"), 8.5)
    sheet.arrow((LAST, third - 0.43), (LAST, fourth + 0.31))
    enlarged = 7.55
    sheet.box(enlarged, fourth, 1.76, 0.62, TOKENIZER, ("codes of the map", "enlarged, then phi"), 8.5)
    sheet.arrow((LAST - WIDTH / 2, fourth), (enlarged + 0.88, fourth))
    sheet.sign(INPUTS, fourth, "+")
    sheet.arrow((enlarged - 0.88, fourth), (INPUTS + 0.1, fourth))
    sheet.text((INPUTS + enlarged - 0.78) / 2, fourth - 0.2, f"{dim}x{rows}x{columns}", 8.5, color=GREY)
    sheet.arrow((INPUTS, fourth + 0.1), (INPUTS, third - 0.31))
    sheet.text(INPUTS + 0.1, 1.62, "sum of the scales so far", 8.5, ha="left", color=GREY)
    sheet.box(QUANTIZER - 0.45, fourth, WIDTH, 0.62, TOKENIZER, ("decoder", f"from {dim}x{rows}x{columns}"), 8.5)
    sheet.arrow((INPUTS - 0.1, fourth), (QUANTIZER - 0.45 + WIDTH / 2, fourth))
    sheet.text((INPUTS + QUANTIZER) / 2 - 0.02, fourth + 0.34, "after the\nlast scale", 8.5, color=GREY, linespacing=1.2)
    sheet.box(IMAGE, fourth, WIDTH, 0.62, "white", ("image", f"3x{height}x{width}"))
    sheet.arrow((QUANTIZER - 0.45 - WIDTH / 2, fourth), (IMAGE + WIDTH / 2, fourth))
    words = (
        "The same computation as in training,\n"
        "cut into scales: every token is\n"
        "computed once, and what earlier scales\n"
        "have left is in the state."
    )
    sheet.text(0.16, third - 0.1, words, 8.5, ha="left", linespacing=1.45, color=GREY)
    sheet.save(path)


def draw_maps(sheet: Sheet, y: float, pyramid: Pyramid) -> None:
    """The token maps between the ends of MAPS, their sides as they are but for the small ones, which could not be seen."""
    longest = max(pyramid.shapes[-1])
    gap = 0.12
    shares = [0.3 + max(shape) / longest for shape in pyramid.shapes]
    unit = min((MAPS[1] - MAPS[0] - gap * (len(shares) - 1) - 0.1) / sum(shares), 0.9 / max(shares))
    x = MAPS[0] + 0.1
    for share, shape in zip(shares, pyramid.shapes, strict=True):
        side = unit * share
        sheet.grid(x + side / 2, y + 0.08, side, shape, "#f6f1fa")
        sheet.text(x + side / 2, y - 0.5, f"{shape[0]}x{shape[1]}", 7.5, color=GREY)
        x += side + gap


def join(sheet: Sheet, y: float) -> None:
    """Arrows from the inputs over transformer and logits to what is last."""
    ends = ((INPUTS + 0.86, TRANSFORMER), (TRANSFORMER + WIDTH / 2, LOGITS), (LOGITS + WIDTH / 2, LAST))
    for left, right in ends:
        sheet.arrow((left, y), (right - WIDTH / 2, y))


def main() -> None:
    config = cli.parse(DrawConfig, __doc__)
    check_folder(config.out, "--out")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pyramid = Pyramid.parse(PIXELS)
    draw_block(out / "block.png", kinds(pyramid))
    draw_flow(out / "flow.png", TokenizerConfig(pyramid.sides))
    print(f"wrote {out / 'block.png'} and {out / 'flow.png'}")


if __name__ == "__main__":
    cli.run(main)
