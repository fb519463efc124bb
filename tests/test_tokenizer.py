import copy

import pytest
import torch
import torch.nn.functional as F
from golden_weights import IMAGES, TOKENIZERS, assert_near, every, facts, tensors, tokenizer, with_config
from small_models import seeded, small_tokenizer

from models import autoencoder
from models import tokenizer as tokenizer_module
from models.quantizer import QuantizerTraining
from models.tokenizer import TOKENIZER_PRESETS, VQVAE, TokenizerConfig

STRIDE = facts("tokenizer")["image_stride"]
FEATURES = 1e-5


@pytest.fixture(params=TOKENIZERS)
def case(request):
    """The tokenizer, what is golden for its pyramid and what for itself."""
    pyramid, name = request.param.split("_")
    shared = tensors(f"tokenizer_{pyramid}")
    own = {key.removeprefix(f"{name}."): value for key, value in shared.items() if key.startswith(f"{name}.")}
    return tokenizer(request.param), shared, own | facts("tokenizer")["variants"][request.param]


@pytest.fixture(scope="module")
def small():
    return tokenizer("1234_qsr4"), tensors("tokenizer_1234")


def test_golden_encoding(case):
    model, shared, own = case
    assert_near(model.features(shared["images"]).detach(), shared["features"], FEATURES)
    indices = model.encode(shared["images"])
    assert torch.equal(torch.cat(indices, dim=1), own["indices"])
    assert model.quantizer.phi_index == tuple(own["phi_index"])


def test_golden_sums_inputs_and_pictures(case):
    model, _, own = case
    indices = model.pyramid.split(own["indices"])
    assert_near(torch.stack(list(model.quantizer.partial_sums(indices))), own["sums"], FEATURES)
    assert_near(model.teacher_inputs(indices), own["inputs"], FEATURES)
    assert_near(every(STRIDE, model.decode(indices)), own["reconstruction"], IMAGES)


def test_golden_random_indices(case):
    model, shared, own = case
    indices = model.pyramid.split(shared["random.indices"])
    assert_near(model.teacher_inputs(indices), own["random.inputs"], FEATURES)
    assert_near(list(model.quantizer.partial_sums(indices))[-1], own["random.sum"], FEATURES)
    assert_near(every(STRIDE, model.decode(indices)), own["random.images"], IMAGES)


def test_golden_loss(case):
    model, shared, own = case
    quantized = model.quantizer(shared["features"])
    assert quantized.loss.item() == pytest.approx(own["loss"], rel=1e-5)
    assert_near(quantized.features.detach(), own["sums"][-1], FEATURES)


@pytest.mark.parametrize("variant", ["1234_qsr4", "12358_qsr4"])
def test_golden_pictures_after_every_scale(variant):
    model, golden = tokenizer(variant), tensors(f"tokenizer_{variant[:-5]}")
    indices = model.pyramid.split(golden["random.indices"])
    for k, images in enumerate(model.decode_progressive(indices)):
        assert_near(every(STRIDE, images), golden[f"qsr4.random.progressive.{k}"], IMAGES)


@pytest.mark.parametrize("sides", [(1, 2, 4), ((2, 1), (3, 2), (4, 4))])
def test_golden_other_pyramid_on_the_same_weights(small, sides):
    model, golden = small
    other = with_config(model.config, model.state_dict(), sides=sides)
    indices = other.encode(golden["images"])
    assert torch.equal(torch.cat(indices, dim=1), golden[f"qsr4.{other.pyramid}.indices"])
    assert_near(every(STRIDE, other.decode(indices)), golden[f"qsr4.{other.pyramid}.reconstruction"], IMAGES)


def test_decode_is_the_last_picture_on_the_way(small):
    model, golden = small
    indices = model.pyramid.split(golden["random.indices"])
    torch.testing.assert_close(model.decode(indices), model.decode_progressive(indices)[-1])


def test_training_reaches_every_weight():
    model = small_tokenizer((1, 2, 4), num_phi=0).train()
    images = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1
    reconstruction = model(images)
    assert reconstruction.images.shape == images.shape
    ((reconstruction.images - images).square().mean() + reconstruction.vq_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_rectangular_images():
    model = small_tokenizer((1, (2, 3), (3, 5)))
    images = torch.rand(2, 3, 6, 10, generator=seeded()) * 2 - 1
    indices = model.encode(images)
    assert [scale.shape for scale in indices] == [(2, 1), (2, 6), (2, 15)]
    assert model.decode(indices).shape == images.shape


def test_decoded_images_stay_within_their_range():
    pictures = small_tokenizer().decode_features(100 * torch.randn(1, 8, 9, 9, generator=seeded()))
    assert (pictures.min(), pictures.max()) == (-1, 1)


def test_images_are_decoded_a_few_at_a_time(small, monkeypatch):
    model, golden = small
    f_hat = torch.randn(5, 8, 4, 4, generator=seeded())
    calls = []
    with monkeypatch.context() as patch:
        patch.setitem(tokenizer_module.DECODED_PIXELS, "cpu", 2 * 64 * 64)
        handle = model.decoder.register_forward_hook(lambda module, inputs, _: calls.append(len(inputs[0])))
        pictures = model.decode_features(f_hat)
        handle.remove()
    assert calls == [2, 2, 1]
    assert pictures.is_contiguous()
    torch.testing.assert_close(pictures, model.decode_features(f_hat), atol=1e-5, rtol=0)
    plain = model.decoder(model.after_quantizer(f_hat)).clamp(-1, 1)
    torch.testing.assert_close(pictures, plain, atol=1e-5, rtol=0)


def test_half_precision_decoding_is_near(small):
    """In the type of the features, at 40 dB and more, and with the same tokens as before."""
    model = copy.deepcopy(small[0])
    images = torch.rand(2, 3, *model.config.image_shape, generator=seeded()) * 2 - 1
    f_hat = torch.randn(3, 8, 4, 4, generator=seeded())
    full, tokens = model.decode_features(f_hat), model.encode(images)
    model.cast_decoder_(torch.bfloat16)
    half = model.decode_features(f_hat)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half - full).square().mean() < 4 * 1e-4  # of a range of 2
    assert all(torch.equal(*pair) for pair in zip(model.encode(images), tokens, strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 32, 17), (1, 3, 40, 40), (1, 3, 4, 5)])
def test_pixels_are_repeated_and_convolved(shape):
    """Also where the taps that meet the same pixel are added first: values and gradients."""
    module = autoencoder.Upsample(3).double()
    x = torch.randn(shape, generator=seeded(), dtype=torch.float64, requires_grad=True)
    expected = module.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    actual = module(x)
    torch.testing.assert_close(actual, expected)
    leaves = [x, *module.parameters()]
    weights = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, weights), torch.autograd.grad(expected, leaves, weights))


def test_image_of_the_wrong_size_is_named(small):
    with pytest.raises(ValueError, match=r"32x64 px .* give 64x64 px"):
        small[0].encode(torch.zeros(1, 3, 32, 64))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"channels": 48}, "channels=48"),
        ({"multipliers": ()}, "multipliers"),
        ({"num_phi": -1}, "num_phi=-1"),
        ({"sides": (2, 1)}, "must not shrink"),
    ],
)
def test_impossible_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**config)


@pytest.mark.parametrize(("name", "pixels"), [("f16-256", 256), ("f16-512", 512), ("f8-64", 64), ("f8-32", 32), ("f4-32", 32)])
def test_presets_take_images_of_their_name(name, pixels):
    assert TOKENIZER_PRESETS[name].image_shape == (pixels, pixels)


def test_preset_f4_32_encodes_and_decodes():
    model = VQVAE(TOKENIZER_PRESETS["f4-32"])
    model.init_weights(seeded())
    images = torch.rand(2, 3, 32, 32, generator=seeded()) * 2 - 1
    indices = model.encode(images)
    assert [scale.shape for scale in indices] == [(2, side**2) for side in (1, 2, 3, 4, 6, 8)]
    assert 0 <= min(scale.min() for scale in indices) <= max(scale.max() for scale in indices) < 1024
    decoded = model.decode(indices)
    assert decoded.shape == images.shape
    assert decoded[0].ne(decoded[1]).any()


def test_training_forward_hands_the_means_on():
    model = small_tokenizer()
    images = torch.rand(2, 3, *model.config.image_shape, generator=seeded(1)) * 2 - 1
    training = QuantizerTraining(scale_dropout=1.0, dropout_from=1, matching=0.1)
    result = model(images, training, seeded(2))
    quantized = model.quantizer(model.features(images), training, seeded(2))
    assert torch.equal(result.images, model.decoder(model.after_quantizer(quantized.features)))
    assert torch.equal(result.vq_loss, quantized.loss)
    plain = model(images)
    assert not torch.equal(plain.images, result.images)
    assert torch.equal(plain.images, model(images, QuantizerTraining()).images)


def test_training_starts_from_grey_images_of_some_contrast():
    model = VQVAE(TokenizerConfig(sides=(1, 2, 4), channels=32, multipliers=(1, 1), num_blocks=1, num_codes=16, code_dim=4))
    model.init_weights(torch.Generator().manual_seed(0))
    decoded = model.decode_features(torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(decoded[:, 0], decoded[:, 1])
    assert torch.equal(decoded[:, 0], decoded[:, 2])
    assert decoded.std() > 0.1
