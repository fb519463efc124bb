"""The multi-scale VQVAE: images <-> token pyramid (VAR, arXiv 2404.02905, section 3.2).

Perceptual and adversarial losses are deliberately absent; the module only encodes, quantizes and decodes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.autoencoder import Decoder, Encoder, PixelAttention, ResidualBlock
from models.hub import HubModel
from models.model_card import Facts, parameter_count, weight_types
from models.pyramid import STANDARD_SIDES, Pyramid
from models.quantizer import PLAIN, MultiScaleQuantizer, QuantizerTraining
from models.storage import Description

DECODED_PIXELS = {"cpu": 4 * 256 * 256, "cuda": 16 * 256 * 256}  # at a time: about 1 GB in float32, 2.5 GB in half precision

USAGE = """```python
from models import VQVAE

tokenizer = VQVAE.from_pretrained("{source}")
indices = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> the token maps
images = tokenizer.decode(indices)
```"""


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that decides the shapes of a tokenizer. The defaults are the released one (vae_ch160v4096z32).

    sides: token-map sizes, coarse to fine; the last one times 2 ** (levels - 1) is the image size in pixels.
    channels: width of the first convolution level, a multiple of 32; multipliers: width of each level over it.
    num_blocks: residual blocks per level of the encoder (the decoder has one more).
    num_codes, code_dim: codebook size V and vector width.
    num_phi: phi convolutions shared over the scales; 0 gives each scale its own.
    normalize_lookup: choose codes by cosine instead of distance.
    """

    sides: tuple[int | tuple[int, int], ...] = STANDARD_SIDES[256]
    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    num_codes: int = 4096
    code_dim: int = 32
    num_phi: int = 4
    normalize_lookup: bool = False

    def __post_init__(self):
        object.__setattr__(self, "sides", Pyramid(self.sides).sides)
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if self.channels % 32:
            raise ValueError(f"channels={self.channels}: group norm needs a multiple of 32")
        if not self.multipliers:
            raise ValueError("multipliers=(): give at least one level, such as (1, 2, 4)")
        if self.num_phi < 0:
            raise ValueError(f"num_phi={self.num_phi}: give 0 (one per scale) or the number of shared ones")

    @property
    def pyramid(self) -> Pyramid:
        return Pyramid(self.sides)

    @property
    def downsampling(self) -> int:
        """Pixels per token of the finest map, along each side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.pyramid.shapes[-1]
        return height * self.downsampling, width * self.downsampling


TOKEN_PARTS = ("encoder", "before_quantizer", "quantizer")  # what decides which tokens an image has; the rest only draws

TOKENIZER_PRESETS = {
    "f16-256": TokenizerConfig(),
    "f16-512": TokenizerConfig(sides=STANDARD_SIDES[512]),
    "f8-64": TokenizerConfig(
        sides=STANDARD_SIDES[64], channels=64, multipliers=(1, 2, 2, 4), num_blocks=1, num_codes=1024, code_dim=16
    ),
    "f8-32": TokenizerConfig(
        sides=STANDARD_SIDES[32], channels=32, multipliers=(1, 1, 2, 2), num_blocks=1, num_codes=512, code_dim=16
    ),
    "f4-32": TokenizerConfig(
        sides=(1, 2, 3, 4, 6, 8), channels=32, multipliers=(1, 2, 2), num_blocks=1, num_codes=1024, code_dim=16
    ),
}


class Reconstruction(NamedTuple):
    """What training needs of one pass."""

    images: Tensor  # (B, 3, H, W), not clamped
    indices: list[Tensor]  # K x (B, h_k * w_k)
    vq_loss: Tensor  # scalar


class VQVAE(nn.Module, HubModel):
    """Images (B, 3, H, W) in [-1, 1] <-> K LongTensors (B, h_k * w_k) of code indices."""

    config_class = TokenizerConfig
    description = Description("tokenizer")

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.pyramid = config.pyramid
        convolutions = (config.channels, config.multipliers, config.num_blocks, config.code_dim)
        self.encoder = Encoder(*convolutions)
        self.decoder = Decoder(*convolutions)
        self.quantizer = MultiScaleQuantizer(
            self.pyramid, config.num_codes, config.code_dim, config.num_phi, config.normalize_lookup
        )
        self.before_quantizer = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)
        self.after_quantizer = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise for training from nothing.

        Differs from VAR: its builders leave convolutions as the memory was and load weights.

        Convolutions keep the variance of their input; the last one of every residual block and attention starts at 0, so that
        the network starts as a plain pyramid of convolutions and learns several times faster. Decoded images start grey: three
        colours that begin apart take long to agree, and networks that score images notice tints that nobody sees. Codes are
        normal with deviation 1 / sqrt(C); training moves them onto data before the first step.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
                module.bias.zero_()
        for module in self.modules():
            if isinstance(module, (ResidualBlock, PixelAttention)):
                last = module.conv2 if isinstance(module, ResidualBlock) else module.proj
                last.weight.zero_()
        colours = self.decoder.conv_out.weight  # (3, C, 3, 3)
        colours.copy_(colours.mean(dim=0, keepdim=True).mul(3**0.5).expand_as(colours))
        self.quantizer.codebook.weight.normal_(std=self.config.code_dim**-0.5, generator=generator)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> continuous features (B, code_dim, h_K, w_K). ValueError for another image size."""
        if tuple(images.shape[2:]) != self.config.image_shape:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} px do not fit the pyramid {self.pyramid} of this "
                f"/{self.config.downsampling} tokenizer: give {self.config.image_shape[0]}x{self.config.image_shape[1]} px"
            )
        dtype = self.before_quantizer.weight.dtype
        if dtype == torch.float32:
            return self.before_quantizer(self.encoder(images))
        with torch.autocast(images.device.type, enabled=False):
            return self.before_quantizer(self.encoder(images.to(dtype))).to(images.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> K LongTensors (B, h_k * w_k)."""
        return self.quantizer.encode(self.features(images))

    @torch.no_grad()
    def encode_checked(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """As `encode`, and whether all features were finite, () bool on the device: where one is NaN, tokens are code 0."""
        features = self.features(images)
        return self.quantizer.encode(features), features.isfinite().all()

    @torch.no_grad()
    def decode_features(self, f_hat: Tensor) -> Tensor:
        """Features (B, code_dim, h, w) -> images (B, 3, f*h, f*w) clamped to [-1, 1], in the type of the features.

        Computed in the type of the decoder's weights, a few images at a time, so that memory does not grow with the batch.
        """
        dtype = self.after_quantizer.weight.dtype
        pixels = f_hat.shape[2] * f_hat.shape[3] * self.config.downsampling**2
        images = []
        with torch.autocast(f_hat.device.type, enabled=False):
            for x in f_hat.split(max(DECODED_PIXELS[f_hat.device.type] // pixels, 1)):
                x = x.to(dtype, memory_format=torch.channels_last)  # and so every map of the decoder, where it is faster
                images.append(self.decoder(self.after_quantizer(x)).to(f_hat.dtype).clamp(-1, 1))
        return torch.cat(images).contiguous()

    def cast_decoder_(self, dtype: torch.dtype) -> None:
        """Cast what turns features into pixels; what makes tokens, and the sum of codes, stay as they are."""
        _cast_(dtype, self.after_quantizer, self.decoder)

    def cast_encoder_(self, dtype: torch.dtype) -> None:
        """Cast what turns pixels into features; codes are looked up in float32."""
        _cast_(dtype, self.encoder, self.before_quantizer)

    def decode(self, indices: list[Tensor]) -> Tensor:
        """K index tensors (B, h_k * w_k) -> images (B, 3, H, W) in [-1, 1]."""
        *_, f_hat = self.quantizer.partial_sums(indices)
        return self.decode_features(f_hat)

    def decode_progressive(self, indices: list[Tensor]) -> list[Tensor]:
        """K images (B, 3, H, W) in [-1, 1], the k-th from the first k scales."""
        return [self.decode_features(f_hat) for f_hat in self.quantizer.partial_sums(indices)]

    def teacher_inputs(self, indices: list[Tensor]) -> Tensor:
        """Transformer inputs of scales 2..K for teacher forcing: (B, L - h_1 * w_1, code_dim), float32."""
        return self.quantizer.teacher_inputs(indices)

    def forward(
        self, images: Tensor, training: QuantizerTraining = PLAIN, generator: torch.Generator | None = None
    ) -> Reconstruction:
        """Images (B, 3, H, W) in [-1, 1] -> reconstruction with gradients and the VQ loss, for training.

        training, generator: what is done in the quantizer besides, and of what it draws (on the CPU).
        """
        quantized = self.quantizer(self.features(images), training, generator)
        images = self.decoder(self.after_quantizer(quantized.features))
        return Reconstruction(images, quantized.indices, quantized.loss)

    def facts(self, source: str = "DIRECTORY") -> Facts:
        """What its card on the hub says; source: where it is loaded from."""
        config = self.config
        height, width = config.image_shape
        rows = {
            "resolution": f"{height}x{width} px, {config.downsampling} px per token of the finest map",
            "pyramid": f"{config.pyramid}, {config.pyramid.num_tokens} tokens",
            "codes": f"{config.num_codes} of {config.code_dim} numbers",
            "channels": f"{config.channels} times {', '.join(map(str, config.multipliers))}",
            "parameters": parameter_count(self),
            "precision of the file": weight_types(self),
        }
        title = f"Multi-scale VQVAE tokenizer, {height}x{width} px"
        summary = "Images to and from a pyramid of tokens, from coarse to fine ([VAR](https://arxiv.org/abs/2404.02905))."
        return Facts(title, summary, rows, USAGE.format(source=source))


def _cast_(dtype: torch.dtype, *modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
