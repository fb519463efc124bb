"""What sample.py is told of editing: the picture, and the part of it that is drawn anew, as a mask or a box."""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from models.editing import Kept, covered
from models.tokenizer import VQVAE
from utils.data.pictures import read_picture

BLACK = (0, 0, 0)
SOFT = 1 / 32  # of the side of an image: how far pasted pixels and drawn ones are mixed


class Edited(NamedTuple):
    """A picture and what is kept of it."""

    original: Tensor  # (1, 3, H, W) in [0, 1]
    decoded: Tensor  # the same, as the tokenizer reconstructs it
    redrawn: Tensor  # (H, W) bool
    kept: Kept

    @classmethod
    @torch.no_grad()
    def load(cls, tokenizer: VQVAE, image: str, mask: str, box: str, outside: bool, keep_scales: int) -> "Edited":
        """Of the centre of a picture, brought to the size of the tokenizer's images.

        mask: a picture of the same size, white where it is drawn anew; box: that as "left,top,right,bottom", in pixels of
        the picture; neither: everywhere. outside: everywhere but there. ValueError, in one line, for what does not fit, and
        where nothing would be kept; what of a mask is cut off with the sides, or keeps pixels but no token, is told on stderr.
        """
        height, width = shape = tokenizer.config.image_shape
        given = {"edit": image, "mask": mask, "box": box}
        words = " ".join([*(f"--{name}={value}" for name, value in given.items() if value), *["--outside"] * outside])
        picture = read_picture(image)
        area = chosen_area(picture.size, shape, image, mask, box)
        if mask and lies_beyond(area, shape):
            part = in_words(centre_of(area.size, shape))
            print(f"{mask}: what it marks outside of {part}, the centre of {image}, is cut off with the sides", file=sys.stderr)
        pixels = fitted(picture, tokenizer)
        try:
            redrawn = marked(area, tokenizer, outside)
            kept = Kept.of(tokenizer, pixels * 2 - 1, redrawn, keep_scales)
        except ValueError as error:
            raise ValueError(f"{words}, brought to {width}x{height} px: {error}") from error
        if not kept.keeps_any:
            if redrawn.all():
                raise ValueError(f"{words}: nothing of it would be kept: give less of it, or --keep_scales")
            print(f"{words}: every token is drawn anew: nothing but pixels can be kept, by --paste", file=sys.stderr)
        decoded = (tokenizer.decode_features(kept.sums[-1]) + 1) / 2
        return cls(pixels, decoded, redrawn, kept)

    def pasted(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] with the original's pixels where nothing was drawn; the edge outside of it is soft."""
        radius = max(round(SOFT * min(images.shape[2:])), 1)
        drawn = self.redrawn[None, None].float()
        size = 2 * radius + 1
        wider = F.max_pool2d(drawn, size, stride=1, padding=radius)
        soft = F.avg_pool2d(F.pad(wider, [radius] * 4, mode="replicate"), size, stride=1)  # (1, 1, H, W)
        return torch.lerp(self.original, images, torch.maximum(drawn, soft))


def fitted(picture: Image.Image, tokenizer: VQVAE) -> Tensor:
    """The centre of an RGB picture at the size of the tokenizer's images, (1, 3, H, W) in [0, 1], on its device."""
    height, width = tokenizer.config.image_shape
    pixels = np.array(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].to(tokenizer.quantizer.codebook.weight.device) / 255


def marked(area: Image.Image, tokenizer: VQVAE, outside: bool = False) -> Tensor:
    """What a grey picture marks, white on black, or all but that, as `fitted` brings its picture to (H, W), bool.

    A pixel is set where it covers any such pixel of the picture, so that no stroke is too thin. ValueError where all that is
    marked lies outside of the centre.
    """
    shape = tokenizer.config.image_shape
    left, top, right, bottom = centre = centre_of(area.size, shape)
    white = torch.from_numpy(white_of(area))
    inside = white[top:bottom, left:right]
    if white.any() and not inside.any():
        raise ValueError(f"the mask is empty within {in_words(centre)}, the centre that the picture is cut to: mark there")
    return covered(~inside if outside else inside, shape).to(tokenizer.quantizer.codebook.weight.device)


def white_of(area: Image.Image) -> np.ndarray:
    """Where a grey picture is nearer to white than to black, (H, W) bool."""
    return np.array(area) > 127


def centre_of(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what `fitted` takes of a picture of a size (width, height), outwards to whole pixels.

    shape: (H, W) of the tokenizer's images.
    """
    width, height = size
    left = max(width * shape[0] - height * shape[1], 0) // (2 * shape[0])
    top = max(height * shape[1] - width * shape[0], 0) // (2 * shape[1])
    return left, top, width - left, height - top


def in_words(box: tuple[int, int, int, int]) -> str:
    return ",".join(map(str, box))


def lies_beyond(area: Image.Image, shape: tuple[int, int]) -> bool:
    """Whether a mask marks anything outside of the centre."""
    white = white_of(area)
    left, top, right, bottom = centre_of(area.size, shape)
    return bool(white.sum() > white[top:bottom, left:right].sum())


def chosen_area(size: tuple[int, int], shape: tuple[int, int], image: str, mask: str, box: str) -> Image.Image:
    """Grey, of the picture's size (width, height): white where it is drawn anew; shape: (H, W) of the tokenizer's images."""
    if mask:
        area = read_picture(mask, BLACK).convert("L")  # as painting programs export it, white on nothing
        if area.size != size:
            raise ValueError(
                f"{mask}: is of {area.size[0]}x{area.size[1]} px, {image} of {size[0]}x{size[1]}: give a mask of its size"
            )
        return area
    if not box:
        return Image.new("L", size, 255)
    left, top, right, bottom = parse_box(box)
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise ValueError(f"--box={box}: does not lie in {image}, which is of {size[0]}x{size[1]} px")
    centre = centre_of(size, shape)
    if left < centre[0] or top < centre[1] or right > centre[2] or bottom > centre[3]:
        raise ValueError(
            f"--box={box}: does not lie in {in_words(centre)}, the centre that {image} ({size[0]}x{size[1]} px) is cut to: "
            "give a box in there, or cut the picture yourself"
        )
    area = Image.new("L", size, 0)
    area.paste(255, (left, top, right, bottom))
    return area


def parse_box(text: str) -> tuple[int, int, int, int]:
    """'8,8,24,24' -> left, top, right, bottom. ValueError for anything else."""
    words = text.split(",")
    if len(words) != 4 or not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--box={text}: give left, top, right and bottom in pixels, such as 8,8,24,24")
    return tuple(int(word) for word in words)


def check_editing(edit: str, mask: str, box: str, outside: bool, keep_scales: int, paste: bool) -> None:
    """ValueError where these flags say nothing together."""
    if not edit:
        if mask or box or outside or keep_scales or paste:
            raise ValueError("--mask, --box, --outside, --keep_scales and --paste are of a picture: give it as --edit")
        return
    if mask and box:
        raise ValueError(f"--mask={mask} --box={box}: give one of both")
    if not mask and not box and (outside or paste or not keep_scales):
        raise ValueError(f"--edit={edit}: nothing of it would be kept: give --mask, --box or --keep_scales")
    if box:
        parse_box(box)


def check_pictures(edit: str, mask: str) -> None:
    """FileNotFoundError for one that is not there."""
    for path in (edit, mask):
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such picture")
