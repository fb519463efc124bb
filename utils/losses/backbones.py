"""Frozen networks whose features a discriminator can look at instead of pixels (models/discriminator.py).

DINO (Caron et al. 2021, arXiv 2104.14294) is what VAR's relatives use; its weights are a file of the user's. EfficientNet-Lite0
needs none, but a tokenizer trained with it is biased in everything that is measured in its features, FD-EffLite0 above all.
Nothing here is trained or has another mode. Legend: B images, H x W pixels, C channels.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.storage import fill_, read_tensors
from utils.losses.perceptual import check_file

SIDE = 224  # pixels that both were trained with
DINO_LAYERS = (2, 5, 8, 11)  # of 12
DINO_WIDTH = 384
EFFLITE0_CHANNELS = (24, 40, 112, 320)  # of the stages after which it is looked at
EFFLITE0_STAGES = (1, 2, 4, 6)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red, green and blue, 0 to 1


def resized(images: Tensor) -> Tensor:
    """(B, 3, H, W) of any size -> (B, 3, SIDE, SIDE), smoothed where they become smaller."""
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=min(images.shape[2:]) > SIDE)


class DinoMaps(nn.Module):
    """ViT-S/16 of DINO: images (B, 3, H, W) in [-1, 1] -> four maps (B, 384, 14, 14), differentiable.

    weights: the published dino_deitsmall16_pretrain.pth or another file of these tensors; sha256: of that file. ValueError for
    another hash or other tensors, FileNotFoundError for no file.
    """

    channels = (DINO_WIDTH,) * len(DINO_LAYERS)

    def __init__(self, weights: Path, sha256: str):
        super().__init__()
        from timm import create_model  # here, as it takes a second

        check_file(weights, sha256)
        network = create_model("vit_small_patch16_224", num_classes=0)
        self.network = fill_(network, read_tensors(weights), weights, "no ViT-S/16 of DINO").requires_grad_(False)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = ((resized(images) + 1) / 2 - self.mean) / self.deviation
        return list(self.network.get_intermediate_layers(x, DINO_LAYERS, reshape=True))


class EfficientNetMaps(nn.Module):
    """timm's EfficientNet-Lite0: images (B, 3, H, W) in [-1, 1] -> maps (B, C, h, w) of four depths, differentiable."""

    channels = EFFLITE0_CHANNELS

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.network.bn1(self.network.conv_stem((resized(images) * 127.5 + 0.5) / 128))
        maps = []
        for number, stage in enumerate(self.network.blocks):
            x = stage(x)
            if number in EFFLITE0_STAGES:
                maps.append(x)
        return maps
