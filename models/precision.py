"""The precision that images are sampled in, of the transformer and of the tokenizer's decoder.

float32 is the reference, of which all golden values are. In half precision, bfloat16 or float16, the large weights are cast
once and autocast does the rest. What must be exact stays in float32: the head and its norm, softmax scales, Mamba's
convolution, steps, decays and state (what mixers name in `float32_parts`, by which sharded training goes too), what is done
to logits, and the sum over scales. tf32: weights and activations of float32, whose products a GPU computes from factors of
ten bits.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.packing import can_pack, pack_
from models.storage import FILE_TYPES, HALF_TYPES
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer

TYPES = {"float32": torch.float32, "tf32": torch.float32, **HALF_TYPES}
PRECISIONS = tuple(TYPES)
WORTH = 0.8  # of the time in float32: half precision is chosen where it takes less
LITTLE = 0.002  # seconds: of a small model nothing is to be gained, and what is measured of it may change from call to call
MEASURED_SECONDS = 0.25  # at most about twice as long, of each type and model
MEASURED_TOKENS = 512  # of the transformer
MEASURED_SIDE = 4  # of the features that the decoder gets


@dataclass(frozen=True)
class Precision:
    """transformer, decoder: each one of PRECISIONS. ValueError for another name."""

    transformer: str = "float32"
    decoder: str = "float32"

    def __post_init__(self):
        for name in (self.transformer, self.decoder):
            if name not in TYPES:
                raise ValueError(f"precision {name!r}: give one of {', '.join(PRECISIONS)}")
        if "tf32" in (self.transformer, self.decoder) and self.transformer != self.decoder:
            raise ValueError(f"precision {self}: tf32 is a setting of the whole process: give it for both, or for neither")

    @classmethod
    def parse(cls, text: str) -> "Precision":
        """'bfloat16' -> of both; 'bfloat16,float32' -> of the transformer, of the decoder. ValueError for other words."""
        names = [name.strip() for name in text.split(",")]
        if len(names) > 2:
            raise ValueError(f"precision {text!r}: give one, or two with a comma: of the transformer and of the decoder")
        return cls(names[0], names[-1])

    def __str__(self) -> str:
        return self.transformer if self.transformer == self.decoder else f"{self.transformer},{self.decoder}"

    def in_words(self) -> str:
        return f"precision: transformer {self.transformer}, decoder {self.decoder}"

    def apply_(self, transformer: ScaleTransformer, tokenizer: VQVAE) -> None:
        """Cast both models' weights to it, for sampling and nothing else; where a CPU computes in bfloat16 they are packed.

        On a GPU also says, for the whole process, what float32 products are computed from.

        ValueError for tf32 without a GPU.
        """
        device = transformer.head.weight.device.type
        check_device(f"models are on {device}", self.transformer)
        if device == "cuda":
            allow_tf32(self.transformer == "tf32")
        transformer.cast_(TYPES[self.transformer])
        tokenizer.cast_decoder_(TYPES[self.decoder])
        if device == "cpu" and self.transformer == "bfloat16" and can_pack():
            pack_(transformer)


def check_device(place: str, *names: str) -> None:
    """ValueError for tf32 without a GPU; place: such as "models are on cpu"."""
    if "tf32" in names and not place.endswith("cuda"):
        raise ValueError(f"precision tf32: is of NVIDIA's GPUs, the {place}: give float32 or bfloat16")


def allow_tf32(allowed: bool) -> None:
    """Whether products and convolutions of float32 may be computed in TF32, in the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def fastest(transformer: ScaleTransformer, tokenizer: VQVAE) -> Precision:
    """The half precision of the device where it has one that is worth it, else float32; models in float32.

    On a GPU bfloat16, float16 where the chip has none. On a CPU what about a second of measurement says, of transformer and
    decoder on their own: some compute in bfloat16 three times as fast, others a tenth as fast.
    """
    if transformer.head.weight.device.type == "cuda":
        half = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return Precision(half, half)
    feed_forward, decoder = transformer.blocks[0].ffn, nn.Sequential(tokenizer.after_quantizer, tokenizer.decoder)
    tokens = torch.zeros(2, MEASURED_TOKENS // 2, transformer.config.width)
    features = torch.zeros(1, tokenizer.config.code_dim, MEASURED_SIDE, MEASURED_SIDE)
    names = ("bfloat16" if is_worth_it(part, x) else "float32" for part, x in ((feed_forward, tokens), (decoder, features)))
    return Precision(*names)


def is_worth_it(module: nn.Module, x: Tensor) -> bool:
    """Whether a module computes much faster in bfloat16 than in float32."""
    half = copy.deepcopy(module).to(torch.bfloat16)
    narrow = x.to(torch.bfloat16)
    with torch.no_grad():
        seconds = shortest(lambda: module(x))
        return seconds > LITTLE and shortest(lambda: half(narrow)) < WORTH * seconds


def shortest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls."""
    call()  # chooses kernels
    times: list[float] = []
    while len(times) < 2 or sum(times) < MEASURED_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# --- files --------------------------------------------------------------------------------------------------------------


def cast_for_file_(model: VQVAE | ScaleTransformer, precision: str) -> None:
    """Cast the weights that a file in this precision, one of FILE_TYPES, holds in it. ValueError where float16 is too narrow.

    They are those that sampling casts: of a transformer what is in its blocks but for `float32_parts`, of a tokenizer what
    turns features into pixels. All else stays in float32, for two reasons. Sampled in its own precision, a file gives the
    images of the float32 one to the bit. And what makes tokens (TOKEN_PARTS) is not touched: a rounded encoder or codebook
    makes other tokens, so that no transformer would fit any more, and the hash that pairs the two says so.
    """
    # Measured (results/round_weights.json): bfloat16 all over changes 2 % of the tokens of the finest scale; `float32_parts`,
    # few as they are, rounded alone move the logits more than all that is rounded here.
    if isinstance(model, VQVAE):
        model.cast_decoder_(FILE_TYPES[precision])
    else:
        model.cast_(FILE_TYPES[precision])
    for name, parameter in model.named_parameters():
        if precision == "float16" and not parameter.isfinite().all():
            raise ValueError(f"{name} holds values beyond the range of float16: give bfloat16")


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def tokenizer_in(tokenizer: VQVAE, encoder: str = "float32", decoder: str = "float32") -> VQVAE:
    """A tokenizer whose encoder and decoder compute in two of PRECISIONS: a copy, but for float32 and tf32.

    On a GPU TF32 is for the convolutions of the whole process, and off unless the encoder is to have it. ValueError for tf32
    without a GPU.
    """
    device = tokenizer.quantizer.codebook.weight.device.type
    check_device(f"tokenizer is on {device}", encoder, decoder)
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = encoder == "tf32"
    if TYPES[encoder] == TYPES[decoder] == torch.float32:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.cast_encoder_(TYPES[encoder])
    tokenizer.cast_decoder_(TYPES[decoder])
    return tokenizer


def changed_tokens(exact: VQVAE, other: VQVAE, images: Tensor) -> list[float]:
    """The share, 0 to 1, of the tokens of images (B, 3, H, W) in [-1, 1] that differ from those of float32, by scale.

    ValueError where features do not fit into the other's precision.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = exact.encode(images)
    indices, finite = other.encode_checked(images)
    if not finite:
        name = str(other.before_quantizer.weight.dtype).removeprefix("torch.")
        raise ValueError(f"features of the tokenizer are not finite in {name}, which is too narrow for it: give float32")
    pairs = zip(expected, indices, strict=True)
    return [(ours != theirs).float().mean().item() for ours, theirs in pairs]


def told_of_tokens(name: str, exact: VQVAE, other: VQVAE, images: Tensor) -> str:
    """One line about what a precision does to the tokens of some images; ValueError as `changed_tokens`."""
    by_scale = changed_tokens(exact, other, images)
    lengths = exact.pyramid.lengths
    whole = sum(share * length for share, length in zip(by_scale, lengths, strict=True)) / sum(lengths)
    shares = ", ".join(f"{share:.1%}" for share in by_scale)
    return f"tokens in {name}: {whole:.2%} of those of {len(images)} images differ from float32's (by scale {shares})"
