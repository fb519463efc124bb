"""Names of the released checkpoints (VAR, M-VAR, MVAR/Markov and their VQVAE) and what can be read off their tensors.

Each table maps a released name to ours. Released buffers that our modules build themselves are dropped, by name and on purpose:
`attn_bias_for_masking` for instance stands in every released file with the same shape but, from another family, the wrong
values. Any other name is an error.
"""

import math
import re
from collections.abc import Iterable

from torch import Tensor

from models.families import FAMILIES
from models.pyramid import STANDARD_SIDES, Pyramid
from models.storage import first_few
from models.tokenizer import TokenizerConfig
from models.transformer import TransformerConfig

StateDict = dict[str, Tensor]

TRANSFORMER_NAMES = [
    (r"pos_start", "start_embed"),
    (r"pos_1LC", "position_embed"),
    (r"word_embed\.(weight|bias)", r"code_embed.\1"),
    (r"class_emb\.weight", "class_embed.weight"),
    (r"lvl_embed\.weight", "scale_embed.weight"),
    (r"shared_ada_lin\.1\.(weight|bias)", r"shared_modulation.1.\1"),
    (r"blocks\.(\d+)\.ada_gss", r"blocks.\1.modulation.offset"),
    (r"blocks\.(\d+)\.ada_lin\.1\.(weight|bias)", r"blocks.\1.modulation.1.\2"),
    (r"blocks\.(\d+)\.attn\.scale_mul_1H11", r"blocks.\1.mixers.0.log_scale"),
    (r"blocks\.(\d+)\.attn\.mat_qkv\.weight", r"blocks.\1.mixers.0.qkv.weight"),
    (r"blocks\.(\d+)\.attn\.(q_bias|v_bias|proj\.weight|proj\.bias)", r"blocks.\1.mixers.0.\2"),
    (r"blocks\.(\d+)\.mamba\.(in_proj|out_proj)\.weight", r"blocks.\1.mixers.1.\2.weight"),
    (r"blocks\.(\d+)\.mamba\.(A_log|D|dt_bias|conv1d\.weight|conv1d\.bias|norm\.weight)", r"blocks.\1.mixers.1.ssm.\2"),
    (r"blocks\.(\d+)\.ffn\.(fc1|fc2)\.(weight|bias)", r"blocks.\1.ffn.\2.\3"),
    (r"head_nm\.ada_lin\.1\.(weight|bias)", r"head_modulation.1.\1"),
    (r"head\.(weight|bias)", r"head.\1"),
]
TRANSFORMER_DROPPED = [
    r"lvl_1L",
    r"attn_bias_for_masking",
    r"blocks\.\d+\.attn\.(zero_k_bias|patch_nums)",
]

BLOCK_PARTS = r"(norm1|conv1|norm2|conv2)\.(weight|bias)"
ATTENTION_PARTS = r"(norm|qkv)\.(weight|bias)"
TOKENIZER_NAMES = [
    (r"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.(weight|bias)", r"\1.\2.\3"),
    (rf"encoder\.down\.(\d+)\.block\.(\d+)\.{BLOCK_PARTS}", r"encoder.levels.\1.blocks.\2.\3.\4"),
    (r"encoder\.down\.(\d+)\.block\.(\d+)\.nin_shortcut\.(.+)", r"encoder.levels.\1.blocks.\2.shortcut.\3"),
    (rf"encoder\.down\.(\d+)\.attn\.(\d+)\.{ATTENTION_PARTS}", r"encoder.levels.\1.attentions.\2.\3.\4"),
    (r"encoder\.down\.(\d+)\.attn\.(\d+)\.proj_out\.(.+)", r"encoder.levels.\1.attentions.\2.proj.\3"),
    (r"encoder\.down\.(\d+)\.downsample\.(.+)", r"encoder.levels.\1.resample.\2"),
    # the released decoder counts its levels from fine to coarse; `_reversed_level` turns the number round
    (rf"decoder\.up\.(\d+)\.block\.(\d+)\.{BLOCK_PARTS}", r"decoder.levels.\1.blocks.\2.\3.\4"),
    (r"decoder\.up\.(\d+)\.block\.(\d+)\.nin_shortcut\.(.+)", r"decoder.levels.\1.blocks.\2.shortcut.\3"),
    (rf"decoder\.up\.(\d+)\.attn\.(\d+)\.{ATTENTION_PARTS}", r"decoder.levels.\1.attentions.\2.\3.\4"),
    (r"decoder\.up\.(\d+)\.attn\.(\d+)\.proj_out\.(.+)", r"decoder.levels.\1.attentions.\2.proj.\3"),
    (r"decoder\.up\.(\d+)\.upsample\.(.+)", r"decoder.levels.\1.resample.\2"),
    (rf"(encoder|decoder)\.mid\.block_1\.{BLOCK_PARTS}", r"\1.middle.0.\2.\3"),
    (rf"(encoder|decoder)\.mid\.attn_1\.{ATTENTION_PARTS}", r"\1.middle.1.\2.\3"),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.(.+)", r"\1.middle.1.proj.\2"),
    (rf"(encoder|decoder)\.mid\.block_2\.{BLOCK_PARTS}", r"\1.middle.2.\2.\3"),
    (r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
    (r"quantize\.quant_resi\.qresi_ls\.(\d+)\.(.+)", r"quantizer.phi.\1.\2"),  # n shared
    (r"quantize\.quant_resi\.qresi\.(.+)", r"quantizer.phi.0.\1"),  # one shared
    (r"quantize\.quant_resi\.(\d+)\.(.+)", r"quantizer.phi.\1.\2"),  # one per scale
    (r"quant_conv\.(.+)", r"before_quantizer.\1"),
    (r"post_quant_conv\.(.+)", r"after_quantizer.\1"),
]
TOKENIZER_DROPPED = [r"quantize\.ema_vocab_hit_SV"]

# where training checkpoints keep the weights
TRANSFORMER_NESTS = ("trainer.var_wo_ddp", "trainer.mvar_wo_ddp", "var_wo_ddp", "mvar_wo_ddp")
TOKENIZER_NESTS = ("trainer.vae_local", "vae_local")
RELEASED = {name for path in (*TRANSFORMER_NESTS, *TOKENIZER_NESTS) for name in path.split(".")}  # names in those
# what others have around a state dict, averaged weights first
NESTS = (
    "ema",
    "model_ema",
    "params_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params",
    "net",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "var.", "vae.", "transformer.")


def unnest(contents: dict, paths: tuple[str, ...]) -> dict:
    """The state dict inside a training checkpoint, or the contents themselves where they are one."""
    for path in paths:
        inner = contents
        for part in path.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            return inner
    return contents


def unwrap(contents: dict) -> tuple[dict, list[str]]:
    """What people's files have around a state dict taken off, and what that was.

    Dictionaries around it, such as {"model": ...} or {"state_dict": ...}, and beginnings that all names share, of wrappers such
    as `module.`. Training checkpoints of the released code stay as they are: `unnest` knows what of them is wanted.
    """
    layers: list[str] = []
    while True:
        nest = next((name for name in NESTS if isinstance(contents.get(name), dict)), None)
        if nest is None or RELEASED & contents.keys():
            break
        contents = contents[nest]
        layers.append(repr(nest))
    while prefix := next((prefix for prefix in PREFIXES if _all_begin(contents, prefix)), None):
        contents = {name.removeprefix(prefix): value for name, value in contents.items()}
        layers.append(f"names that begin with {prefix}")
    return contents, layers


def _all_begin(names: Iterable[str], prefix: str) -> bool:
    names = list(names)
    return bool(names) and all(isinstance(name, str) and name.startswith(prefix) for name in names)


def holds_transformer(contents: dict) -> bool:
    """Whether it is a released transformer, or a training checkpoint with one in it."""
    return "pos_1LC" in unnest(contents, TRANSFORMER_NESTS)


def holds_tokenizer(contents: dict) -> bool:
    """Whether it is a released tokenizer, or a training checkpoint with one in it."""
    return "quantize.embedding.weight" in unnest(contents, TOKENIZER_NESTS)


def describe(names: list) -> str:
    """What a file with these tensors seems to be, for error messages."""
    names = [name for name in names if isinstance(name, str)]
    if any(".mamba." in name for name in names):
        return "a released M-VAR transformer"
    if "pos_1LC" in names:
        return "a released VAR or MVAR transformer"
    if any(name.startswith("quantize.") for name in names):
        return "a released VQVAE tokenizer"
    if "position_embed" in names:
        return "weights of a transformer of this project: load them with their config.json beside them"
    if any(name.startswith("quantizer.") for name in names):
        return "weights of a tokenizer of this project: load them with their config.json beside them"
    return "none of the released models"


def translate(tensors: StateDict, names: list[tuple[str, str]], dropped: list[str], source: str) -> StateDict:
    """Released names -> ours. ValueError lists names that no table knows."""
    translated, unknown = {}, []
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in dropped):
            continue
        matches = [(pattern, ours) for pattern, ours in names if re.fullmatch(pattern, name)]
        if not matches:
            unknown.append(name)
            continue
        pattern, ours = matches[0]
        translated[re.sub(pattern, ours, name)] = tensor
    if unknown:
        raise ValueError(f"{source}: unexpected {first_few(unknown)}; the file seems to be {describe(list(tensors))}")
    return translated


def require(tensors: StateDict, names: tuple[str, ...], source: str, wanted: str) -> None:
    """ValueError where these are not all there, or where anything else than tensors with names is."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(
            f"{source}: not {wanted}: {first_few(missing)} missing, first keys are {first_few(list(tensors))}; "
            f"the file seems to be {describe(list(tensors))}"
        )
    others = [name for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise ValueError(f"{source}: {first_few(others)} is no tensor with a name: save the state dict alone")


def count(tensors: StateDict, pattern: str) -> int:
    """How many numbers stand at the group of the pattern: count(t, r'blocks\\.(\\d+)\\.') is the depth."""
    numbers = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    return max(numbers) + 1 if numbers else 0


def transformer_from_official(tensors: StateDict, family: str | None, source: str) -> tuple[TransformerConfig, StateDict]:
    """Configuration and weights, under our names, of a released VAR, M-VAR or Markov transformer.

    Depth, width, heads, classes, codes and pyramid are read off the tensors, never off the file's name. family: needed to
    tell Markov weights ("markov") from VAR's, whose tensors are the same; ValueError where it contradicts the tensors.
    """
    tensors = unnest(tensors, TRANSFORMER_NESTS)
    needed = ("pos_1LC", "class_emb.weight", "lvl_embed.weight", "word_embed.weight", "head.weight")
    needed += ("blocks.0.ffn.fc1.weight",)
    require(tensors, needed, source, "a released transformer")
    has_mamba = any(".mamba." in name for name in tensors)
    family = family or ("mvar" if has_mamba else "var")
    if FAMILIES[family].traits.has_mamba != has_mamba:
        fitting = [name for name, kind in FAMILIES.items() if kind.traits.has_mamba == has_mamba]
        raise ValueError(
            f"{source}: family {family!r} does not fit, the file has {'a' if has_mamba else 'no'} Mamba part: "
            f"give {' or '.join(fitting)}"
        )
    depth = count(tensors, r"blocks\.(\d+)\.")
    width = tensors["pos_1LC"].shape[2]
    log_scale = tensors.get("blocks.0.attn.scale_mul_1H11")
    shared = "shared_ada_lin.1.weight" in tensors
    config = TransformerConfig(
        sides=_sides(tensors, source),
        blocks=(family,) * depth,
        width=width,
        heads=width // 64 if log_scale is None else log_scale.shape[1],
        num_classes=tensors["class_emb.weight"].shape[0] - 1,
        num_codes=tensors["head.weight"].shape[0],
        code_dim=tensors["word_embed.weight"].shape[1],
        ffn_ratio=tensors["blocks.0.ffn.fc1.weight"].shape[0] / width,
        normalize_attention=log_scale is not None,
        shared_modulation=shared,
    )
    weights = translate(tensors, TRANSFORMER_NAMES, TRANSFORMER_DROPPED, source)
    if shared:
        offsets = {name: tensor.flatten() for name, tensor in weights.items() if name.endswith("modulation.offset")}
        weights |= offsets  # (1, 1, 6, C) -> (6C,)
    return config, weights


def _sides(tensors: StateDict, source: str) -> tuple[int, ...]:
    """Sides of the pyramid: from the scale number of every token, or else the standard pyramid of that length."""
    num_tokens, num_scales = tensors["pos_1LC"].shape[1], tensors["lvl_embed.weight"].shape[0]
    if "lvl_1L" in tensors:
        lengths = tensors["lvl_1L"].flatten().long().bincount(minlength=num_scales).tolist()
        sides = tuple(math.isqrt(length) for length in lengths)
        if [side * side for side in sides] == lengths:
            return sides
    for sides in STANDARD_SIDES.values():
        if (Pyramid(sides).num_tokens, len(sides)) == (num_tokens, num_scales):
            return sides
    raise ValueError(f"{source}: {num_tokens} tokens in {num_scales} scales are no standard pyramid of square maps")


def tokenizer_from_official(tensors: StateDict, sides: tuple | None, source: str) -> tuple[TokenizerConfig, StateDict]:
    """Configuration and weights, under our names, of a released VQVAE.

    sides: of the pyramid; None takes the standard one with as many scales as the file's hit counter has rows.
    """
    tensors = unnest(tensors, TOKENIZER_NESTS)
    require(tensors, ("quantize.embedding.weight", "encoder.conv_in.weight"), source, "a released VQVAE")
    if sides is None:
        hits = tensors.get("quantize.ema_vocab_hit_SV")
        if hits is None:
            raise ValueError(f"{source}: the number of scales is not in the file: name the sides, such as (1, 2, 3, 4)")
        sides = Pyramid.standard(hits.shape[0]).sides
    channels = tensors["encoder.conv_in.weight"].shape[0]
    num_levels = count(tensors, r"encoder\.down\.(\d+)\.")
    convolutions = tuple(f"encoder.down.{i}.block.0.conv2.weight" for i in range(num_levels))
    require(tensors, convolutions, source, "a released VQVAE")
    widths = [tensors[name].shape[0] for name in convolutions]
    num_codes, code_dim = tensors["quantize.embedding.weight"].shape
    one_per_scale = any(re.match(r"quantize\.quant_resi\.\d", name) for name in tensors)
    config = TokenizerConfig(
        sides=sides,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        num_blocks=count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        num_codes=num_codes,
        code_dim=code_dim,
        num_phi=0 if one_per_scale else count(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.") or 1,
    )
    weights = translate(tensors, TOKENIZER_NAMES, TOKENIZER_DROPPED, source)
    return config, {_reversed_level(name, num_levels): tensor for name, tensor in weights.items()}


def _reversed_level(name: str, num_levels: int) -> str:
    return re.sub(r"(?<=^decoder\.levels\.)\d+", lambda match: str(num_levels - 1 - int(match[0])), name)


def tokenizer_to_official(config: TokenizerConfig, weights: StateDict) -> StateDict:
    """The released state dict of a tokenizer of ours, with the counter of code use that the released code keeps, at zero.

    What its tensors do not say, the released VQVAE is told when it is built: v_patch_nums, and using_znorm for cosine lookup.
    """
    num_levels = len(config.multipliers)
    names = [pair for pair in TOKENIZER_NAMES if _holds_phi(pair[0]) in (None, min(config.num_phi, 2))]
    backwards = [_inverted(*pair) for pair in names]
    released = {}
    for name, tensor in weights.items():
        name = _reversed_level(name, num_levels)
        pattern, theirs = next(pair for pair in backwards if re.fullmatch(pair[0], name))
        released[re.sub(pattern, theirs, name)] = tensor
    hits = weights["quantizer.codebook.weight"].new_zeros(len(config.sides), config.num_codes)
    return released | {"quantize.ema_vocab_hit_SV": hits}


def _holds_phi(pattern: str) -> int | None:
    """Of which num_phi a released name tells: 0 one per scale, 1 shared by all, 2 for more; None for other names."""
    kinds = {r"quantize\.quant_resi\.(": 0, r"quantize\.quant_resi\.qresi\.": 1, r"quantize\.quant_resi\.qresi_ls\.": 2}
    return next((kind for start, kind in kinds.items() if pattern.startswith(start)), None)


def _inverted(pattern: str, ours: str) -> tuple[str, str]:
    """A row of a table of names the other way round: groups stay groups, and what was matched word for word is written so."""
    groups = iter(range(1, 10))
    theirs = re.sub(r"\([^()]*\)", lambda _: f"\\{next(groups)}", pattern).replace("\\.", ".")
    found = re.findall(r"\([^()]*\)", pattern)
    return re.sub(r"\\(\d)", lambda match: found[int(match[1]) - 1], ours.replace(".", "\\.")), theirs
