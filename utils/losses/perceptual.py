"""Perceptual losses: how far apart two images are in the features of a network that has learned to recognise what they show.

`PerceptualLoss` works without a download: SqueezeNet 1.1 (Iandola et al. 2016, arXiv 1602.07360), trained on ImageNet, lies in
data/squeezenet, and its features are compared as LPIPS compares them (Zhang et al. 2018, arXiv 1801.03924, section 3), but for
LPIPS's heads, which are fitted to people's judgements: a distance without LPIPS's heads is not LPIPS and is not called so.
`lpips_loss` is LPIPS, for those who have the weights of its network. Legend: B images, H x W pixels, C channels.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.storage import fill_, read_tensors
from utils import files

SQUEEZENET = Path(__file__).resolve().parents[2] / "data" / "squeezenet" / "squeezenet1_1.safetensors"
SQUEEZENET_SHA256 = "a96a7775fb9080cef3f6cf2c8ca0dfbb23be5133baf2c163511cf125ee56ce39"
MEAN = (122.679, 116.669, 104.006)  # of red, green and blue, 0 to 255, as it was trained
# Each part ends at a depth that is compared: conv1, fire3, fire5, fire7, fire9, in torchvision's numbering of layers.
PARTS = (range(2), range(2, 5), range(5, 8), range(8, 11), range(11, 13))
SIDE = 63  # in pixels: smaller images are enlarged; at this side the maps are 31, 15, 7, 3 and 3, and all windows are full


class PerceptualLoss(nn.Module):
    """Distance of the directions of features at five depths, () from 0; equal images have 0, and nothing in common is 2.

    logits: weight of a further term, the mean squared difference of what the network takes the images for: MaskBit found it the
    better one (Weber et al. 2024, arXiv 2409.16211), with a ResNet-50. Of blurred images it is in the tens
    here: a weight of about 0.01 makes both terms alike.
    Nothing here is trained or has another mode. ValueError where the file of weights is not the one that is expected.
    """

    def __init__(self, logits: float = 0.0, weights: Path = SQUEEZENET):
        super().__init__()
        if logits < 0:
            raise ValueError(f"weight of the logits is {logits}: give 0 for none, or more")
        network = squeezenet(weights)
        self.parts = nn.ModuleList(nn.Sequential(*(network.features[i] for i in part)) for part in PARTS)
        self.classifier = network.classifier[1:] if logits else None  # without its dropout
        self.logits = logits
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: (B, 3, H, W) in [-1, 1], of any size; differentiable in the images only. float32.

        Convolutions run in the precision of the caller's autocast, what is compared is compared in float32.
        """
        check(images, targets)
        ours = self.features(images)
        with torch.no_grad():
            theirs = self.features(targets)
        loss = torch.stack([direction_distance(*pair) for pair in zip(ours, theirs, strict=True)]).mean()
        if self.classifier is not None:
            found, wanted = (self.classifier(maps[-1]).float() for maps in (ours, theirs))  # (B, 1000, 1, 1)
            loss = loss + self.logits * F.mse_loss(found, wanted)
        return loss

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> maps (B, C, h, w) with C = 64, 128, 256, 384, 512, after ReLU."""
        x = enlarge((images.float() + 1) * 127.5 - self.mean)
        x = x.contiguous(memory_format=torch.channels_last)  # on a CPU pooling and lengths take half as long so
        maps = []
        for part in self.parts:
            x = part(x)
            maps.append(x)
        return maps


def direction_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over images and places of the squared distance of features (B, C, h, w) of length 1, () from 0 to 2."""
    return (F.normalize(ours.float(), dim=1) - F.normalize(theirs.float(), dim=1)).square().sum(1).mean()


def enlarge(images: Tensor) -> Tensor:
    """Bilinearly, corners on corners, until no side is below SIDE; larger ones are left alone.

    Even sides get their last line twice: conv1 has windows of three pixels at every second one and no padding, and would not
    see that line.
    """
    height, width = images.shape[2:]
    factor = SIDE / min(height, width)
    if factor > 1:
        height, width = round(height * factor), round(width * factor)
        images = F.interpolate(images, (height, width), mode="bilinear", align_corners=True)
    return F.pad(images, (0, 1 - width % 2, 0, 1 - height % 2), mode="replicate")


def squeezenet(weights: Path = SQUEEZENET) -> nn.Module:
    """torchvision's network in eval mode with the weights of data/squeezenet; it takes red, green, blue, 0 to 255, less MEAN.

    The package pads as Keras does, but of 224 pixels both see the same windows. Consumes no randomness.
    """
    from torchvision.models import squeezenet1_1  # here, as it takes seconds

    check_file(weights, SQUEEZENET_SHA256)
    with torch.device("meta"):
        network = squeezenet1_1()
    return fill_(network.to_empty(device="cpu"), read_tensors(weights), weights)


# --- LPIPS --------------------------------------------------------------------------------------------------------------

BACKBONES = {"vgg": ("VGG16", 16), "alex": ("AlexNet", 31)}  # name at torchmetrics -> network, smallest side in pixels


class LPIPSLoss(nn.Module):
    """LPIPS, version 0.1, mean over the images, () from 0. network: of two batches (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1)."""

    def __init__(self, network: nn.Module, smallest: int):
        super().__init__()
        self.network, self.smallest = network, smallest

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: (B, 3, H, W) in [-1, 1]; differentiable in the images only. float32 throughout, as it was fitted."""
        check(images, targets, self.smallest)
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.float(), targets.detach().float()).mean()


def lpips_loss(path: Path, sha256: str, net: str = "vgg") -> LPIPSLoss:
    """LPIPS of VGG16, as most tokenizers train with it, or of AlexNet; the heads come with torchmetrics.

    path: torchvision's weights of that network, .pth or .safetensors. sha256: of that file, in hexadecimal digits. LPIPS of
    AlexNet is a score as well (utils/metrics/similarity.py): who trains with it has lost that score. ValueError for another
    network, another hash or a file of something else, FileNotFoundError for none.
    """
    # no public name builds it without a download
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    if net not in BACKBONES:
        raise ValueError(f"LPIPS of {net}: give {' or '.join(BACKBONES)}")
    name, smallest = BACKBONES[net]
    check_file(path, sha256)
    tensors = read_tensors(path)
    with torch.random.fork_rng(devices=[]):  # its first values, which are replaced, are drawn
        network = _NoTrainLpips(net=net, pnet_rand=True)
    # slice1.0.weight is features.0.weight
    names = {ours: f"features.{ours.partition('.')[2]}" for ours in network.net.state_dict()}
    found = {ours: tensors[theirs] for ours, theirs in names.items() if isinstance(tensors.get(theirs), Tensor)}
    fill_(network.net, found, path, f"no {name} of torchvision")
    return LPIPSLoss(network.requires_grad_(False), smallest)  # of torchmetrics 1.1 the heads would be trained


# --- checks -------------------------------------------------------------------------------------------------------------


def check_file(path: Path, sha256: str) -> None:
    """FileNotFoundError where there is none, ValueError where it is another one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    found = files.sha256(path)
    if found != sha256.lower():
        raise ValueError(f"{path}: SHA-256 is {found}, not {sha256}: it is another file, or damaged")


def check(images: Tensor, targets: Tensor, smallest: int = 1) -> None:
    """ValueError for other shapes, and for images that are smaller than a network can take."""
    if images.shape != targets.shape or images.ndim != 4 or images.shape[1] != 3:
        shapes = f"{tuple(images.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"images are {shapes}: give twice the same shape (B, 3, H, W)")
    if min(images.shape[2:]) < smallest:
        raise ValueError(f"images of {images.shape[3]}x{images.shape[2]} pixels: LPIPS needs {smallest}x{smallest} and up")
