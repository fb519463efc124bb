"""Convolutional encoder and decoder of the tokenizer (VQGAN's, as in VAR, arXiv 2404.02905, section 3.2 and appendix).

Every level has residual blocks; between levels the resolution halves (encoder) or doubles (decoder); the lowest resolution
and the middle also have single-head self-attention over the pixels of the map.
"""

import torch.nn.functional as F
from torch import Tensor, nn

LARGE_MAP = 32 * 32  # pixels, of all images together


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """(B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.shortcut(x))


class PixelAttention(nn.Module):
    """Single-head self-attention over all positions of a map, with a residual: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h*w, 3C)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # (B, 1, h*w, C) each
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (B, h*w, C)
        return x + self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halve height and width: (B, C, h, w) -> (B, C, h/2, w/2). Padded at the right and bottom only, as in VQGAN."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: (B, C, h, w) -> (B, C, 2h, 2w).

    Every pixel is repeated, then convolved; so two of the three taps along a side often meet the same pixel. On a CPU they are
    added first, which leaves a transposed convolution with 16 products per pixel of x instead of 36; on a small map adding them
    takes longer than it saves.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[0] * x.shape[2] * x.shape[3] >= LARGE_MAP:
            taps = self.conv.weight.transpose(0, 1).flip(2, 3)  # (C, C, 3, 3)
            taps = F.pad(taps, (0, 1)) + F.pad(taps, (1, 0))  # (C, C, 3, 4)
            taps = F.pad(taps, (0, 0, 0, 1)) + F.pad(taps, (0, 0, 1, 0))  # (C, C, 4, 4)
            return F.conv_transpose2d(x, taps, self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where asked, then a change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, resample: nn.Module):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1]) for i in range(num_blocks))
        self.attentions = nn.ModuleList(PixelAttention(out_channels) if attention else nn.Identity() for _ in range(num_blocks))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels), PixelAttention(channels), ResidualBlock(channels, channels))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, code_dim, H/f, W/f) with f = 2 ** (levels - 1).

    channels: width of the first level, a multiple of 32 (group norm); multipliers: width of each level over `channels`.
    """

    def __init__(self, channels: int, multipliers: tuple[int, ...], num_blocks: int, code_dim: int):
        super().__init__()
        widths = [channels] + [channels * multiplier for multiplier in multipliers]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[i],
                widths[i + 1],
                num_blocks,
                attention=i == last,
                resample=nn.Identity() if i == last else Downsample(widths[i + 1]),
            )
            for i in range(len(multipliers))
        )
        self.middle = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], code_dim, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x)), inplace=True))


class Decoder(nn.Module):
    """Features (B, code_dim, h, w) -> images (B, 3, f*h, f*w), not clamped. Levels stand from coarse to fine."""

    def __init__(self, channels: int, multipliers: tuple[int, ...], num_blocks: int, code_dim: int):
        super().__init__()
        widths = [channels * multiplier for multiplier in reversed(multipliers)]  # coarse to fine
        widths = [widths[0], *widths]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(code_dim, widths[0], 3, padding=1)
        self.middle = middle(widths[0])
        self.levels = nn.ModuleList(
            Level(
                widths[i],
                widths[i + 1],
                num_blocks + 1,
                attention=i == 0,
                resample=nn.Identity() if i == last else Upsample(widths[i + 1]),
            )
            for i in range(len(multipliers))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.middle(self.conv_in(features))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))
