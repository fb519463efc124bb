"""Pictures of images and of runs: labelled grids, scales building up, training curves."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 2  # pixels between images
FEW_POINTS = 40  # a line of fewer points shows them
SMALLEST = 64  # images are enlarged to at least this many pixels


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8, rounded to nearest."""
    return to_bytes(images).cpu().numpy()


def to_bytes(images: Tensor) -> Tensor:
    """The same where the images are: a contiguous tensor (N, H, W, 3)."""
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous()


def check_picture(path: str | Path) -> None:
    """ValueError for a name whose ending is of no format that Pillow writes."""
    Image.init()
    ending = Path(path).suffix.lower()
    if Image.registered_extensions().get(ending) not in Image.SAVE:
        raise ValueError(f"{path}: is to be a picture: give a name that ends in .png")


def save(picture: Image.Image, path: str | Path, **how: Any) -> None:
    """A picture in the format that its name says, in one step; how: what Pillow takes for it."""
    check_picture(path)
    with replace_file(Path(path)) as aside:
        picture.save(aside, Image.registered_extensions()[Path(path).suffix.lower()], **how)


def save_figure(figure: "Figure", path: str | Path, dpi: int) -> None:
    """The same for what matplotlib has drawn."""
    with replace_file(Path(path)) as aside:
        figure.savefig(aside, dpi=dpi, format=Path(path).suffix[1:].lower() or None)


def plain(text: str) -> str:
    """For matplotlib, which takes what stands between dollars for a formula."""
    return text.replace("$", r"\$")


@functools.cache
def font_file() -> str:
    """DejaVu Sans, which comes with matplotlib; Pillow's own font has few letters beyond English."""
    from matplotlib import font_manager  # here, as it takes half a second

    return font_manager.findfont("DejaVu Sans")


def drawable(names: list[str]) -> list[str]:
    """Names as they can be drawn: the number of one that has a letter which the font lacks."""
    from matplotlib.ft2font import FT2Font

    letters = FT2Font(font_file()).get_charmap()  # by code point
    return [name if all(ord(letter) in letters for letter in name) else str(number) for number, name in enumerate(names)]


def grid(rows: list[np.ndarray], labels: list[str], heads: list[str] | None = None) -> Image.Image:
    """Rows of uint8 images (N, H, W, 3), each with a label at its left, and heads over the columns."""
    height, width = rows[0].shape[1:3]
    zoom = -(-SMALLEST // min(height, width))
    height, width = height * zoom, width * zoom
    font = ImageFont.truetype(font_file(), size=14)
    margin = max([0] + [round(font.getlength(label)) + 12 for label in labels])
    top = 22 if heads else 0
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (margin + columns * (width + GAP), top + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads or []):
        draw.text((margin + column * (width + GAP) + width / 2, 4), head, fill="black", font=font, anchor="ma")
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + number * (height + GAP)
        draw.text((margin - 8, y + height / 2), label, fill="black", font=font, anchor="rm")
        for column, image in enumerate(row):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + column * (width + GAP), y))
    return canvas


def curves(path: Path, panels: list[dict], columns: int | None = None) -> None:
    """Draw panels side by side, or in rows of `columns`.

    A panel has title, x, y (axis labels) and lines, name -> list of (x, y); an x may be a word. It may have levels, name -> y,
    faint, lines in pale behind those of their name, dashed, grey lines to compare with, and log, for a logarithmic y axis. A
    name has one colour in all panels.
    """
    from matplotlib.figure import Figure  # not pyplot: no display is needed, nothing to be closed

    names = dict.fromkeys(name for panel in panels for name in (*panel["lines"], *panel.get("faint", {})))
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for name, points in panel.get("faint", {}).items():
            label = None if name in panel["lines"] else plain(name)
            axis.plot(*zip(*points, strict=True), label=label, color=colours[name], linewidth=1, alpha=0.35)
        for name, points in panel["lines"].items():
            marker = "." if len(points) < FEW_POINTS else None  # a single point is no line
            axis.plot(*zip(*points, strict=True), label=plain(name), color=colours[name], linewidth=1.5, marker=marker)
        for name, points in panel.get("dashed", {}).items():
            axis.plot(*zip(*points, strict=True), label=plain(name), color="grey", linestyle="--", linewidth=1, marker=".")
        for name, level in panel.get("levels", {}).items():
            axis.axhline(level, label=plain(name), linestyle="--", linewidth=1, color="grey")
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"], yscale="log" if panel.get("log") else "linear")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    save_figure(figure, path, dpi=110)
