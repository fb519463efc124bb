"""A patch discriminator: which parts of an image look real (PatchGAN, Isola et al. 2017, arXiv 1611.07004, section 3.2).

It judges every patch on its own, so it has a number per place instead of one per image, and learns from few images. VAR's
tokenizer training is not public; its relatives use discriminators of this kind or ones on frozen features (VQGAN, arXiv
2012.09841, section 3.1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky ReLUs
STD = 0.02  # of the initial weights where activations are normalised, as in PatchGAN


@dataclass(frozen=True)
class DiscriminatorConfig:
    """width: channels of the first layer; strided: layers that halve the resolution; normalize: group norm between layers."""

    width: int = 64
    strided: int = 2
    normalize: bool = False

    def __post_init__(self):
        if self.width < 1 or self.strided < 1:
            raise ValueError(f"discriminator of width {self.width} with {self.strided} strided layers: give at least 1 each")

    def check_side(self, pixels: int) -> None:
        """ValueError where images of this side are halved until nothing is left to judge."""
        if pixels < 2**self.strided:
            most = pixels.bit_length() - 1
            raise ValueError(
                f"discriminator with {self.strided} strided layers: {pixels} px can be halved {most} times: give less"
            )


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> (B, 1, h, w) judgements of overlapping patches: high where they look real."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        widths = [3, *(config.width * 2 ** min(i, 3) for i in range(config.strided + 1))]
        strides = [2] * config.strided + [1]
        self.layers = nn.ModuleList()
        for i, (inputs, outputs, stride) in enumerate(zip(widths, widths[1:], strides, strict=False)):
            convolution = nn.Conv2d(inputs, outputs, 4 if stride == 2 else 3, stride, padding=1)
            norm = nn.GroupNorm(min(32, outputs), outputs) if config.normalize and i > 0 else nn.Identity()
            self.layers.append(nn.Sequential(convolution, norm, nn.LeakyReLU(SLOPE)))
        self.judge = nn.Conv2d(widths[-1], 1, 3, padding=1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Small normal weights where group norm follows; else ones that keep the variance through the leaky ReLUs.

        The three colours start with the same weights, so grey images are judged as by any others, and what tells colours apart
        is learned where there are some. Else a decoder of grey images is driven to tints, another one in every run, which
        networks that score images notice (docs/tokenizer.md).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if self.config.normalize:
                    module.weight.normal_(0, STD, generator=generator)
                else:
                    nn.init.kaiming_normal_(module.weight, a=SLOPE, generator=generator)
                module.bias.zero_()
        colours = self.layers[0][0].weight  # (width, 3, k, k)
        colours.copy_(colours.mean(dim=1, keepdim=True).expand_as(colours))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer in self.layers:
            x = layer(x)
        return self.judge(x)


class FeatureDiscriminator(nn.Module):
    """Maps of frozen features at several depths -> judgements of all their places (StyleGAN-T, arXiv 2301.09515, section 3.2).

    channels: of the maps. Only the heads are trained, so that it learns little by heart; what the features were trained on, it
    knows. The network that makes them is its caller's.
    """

    def __init__(self, channels: tuple[int, ...], width: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(count, width, 1),
                nn.GroupNorm(min(8, width), width),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(width, width, 3, padding=1),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(width, 1, 1),
            )
            for count in channels
        )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Weights that keep the variance through the leaky ReLUs."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, generator=generator)
                module.bias.zero_()

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps: (B, C, h, w) each -> (B, places of all of them)."""
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)], dim=1)
