import contextlib
import copy
import functools

import pytest
import torch
from small_models import SIDES, VARIANTS, random_indices, seeded, small_tokenizer, small_transformer
from torch._subclasses.fake_tensor import FakeTensorMode

from models import precision
from models.captured import CapturedSampler
from models.drawing import exponential_noise
from models.families import FAMILIES
from models.generate import SamplingConfig, decode_sampled, generate, sample_scales
from models.precision import Precision, changed_tokens, fastest, tokenizer_in, told_of_tokens
from models.pyramid import Pyramid

HALVES = ["bfloat16", "float16"]
# Of logits, over their standard deviation, from those of float32: what two blocks of the small models lose.
LOST = {"bfloat16": 0.05, "float16": 0.01}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def cast(name: str, half: str):
    """The small models in float32, and cast."""
    transformer, tokenizer = small_transformer(**VARIANTS[name]).requires_grad_(False), small_tokenizer().requires_grad_(False)
    narrow = copy.deepcopy(transformer), copy.deepcopy(tokenizer)
    Precision(half, half).apply_(*narrow)
    return (transformer, tokenizer), narrow


def test_words():
    assert str(Precision.parse("bfloat16")) == "bfloat16"
    assert Precision.parse("bfloat16, float32") == Precision("bfloat16", "float32")
    assert str(Precision("bfloat16", "float32")) == "bfloat16,float32"
    assert Precision.parse(str(Precision("float16", "float32"))) == Precision("float16", "float32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "precision 'half': give one of float32, tf32, bfloat16, float16"),
        ("", "precision '': give one of"),
        ("float32,float32,float32", "give one, or two with a comma"),
        ("tf32,bfloat16", "tf32 is a setting of the whole process"),
    ],
)
def test_other_words_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Precision.parse(text)


def test_tf32_needs_a_gpu():
    models = small_transformer(), small_tokenizer()
    with pytest.raises(
        ValueError, match="precision tf32: is of NVIDIA's GPUs, the models are on cpu: give float32 or bfloat16"
    ):
        Precision("tf32", "tf32").apply_(*models)
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.float32}


def test_what_must_be_exact_stays_float32(variant):
    _, (transformer, tokenizer) = cast(variant, "bfloat16")
    exact = {name for name, parameter in transformer.named_parameters() if parameter.dtype == torch.float32}
    assert {name.split(".")[0] for name in exact} >= {"head", "head_modulation", "class_embed", "position_embed"}
    in_blocks = {name.split(".", 2)[2] for name in exact if name.startswith("blocks")}
    scan = {f"mixers.1.ssm.{name}" for name in ("A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "norm.weight")}
    has_scan = any(".ssm." in name for name, _ in transformer.named_parameters())
    assert in_blocks == {"mixers.0.log_scale"} | (scan if has_scan else set())
    exact = {name.split(".")[0] for name, parameter in tokenizer.named_parameters() if parameter.dtype == torch.float32}
    assert exact == {"encoder", "before_quantizer", "quantizer"}


@pytest.mark.parametrize("half", HALVES)
def test_logits_are_near_and_scale_by_scale_they_are_those_of_the_whole(variant, half):
    (transformer, tokenizer), (narrow, _) = cast(variant, half)
    labels, inputs = torch.tensor([1, 4]), tokenizer.teacher_inputs(random_indices(Pyramid(SIDES)))
    expected, whole = transformer(labels, inputs), narrow(labels, inputs)
    assert whole.dtype == torch.float32
    tolerance = LOST[half] * expected.std()
    assert (whole - expected).square().mean().sqrt() < tolerance
    conditioning, states, start, parts = narrow.condition(labels), None, 0, []
    for k, length in enumerate(narrow.pyramid.lengths):
        count = length if k else 0
        logits, states = narrow.advance(inputs[:, start : start + count], range(k, k + 1), conditioning, states)
        parts.append(logits)
        start += count
    assert (torch.cat(parts, dim=1) - whole).square().mean().sqrt() < tolerance


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("smooth", [False, True])
def test_images_are_those_of_float32_but_for_rounding(variant, half, smooth):
    """With one candidate, where noise decides nothing; in smooth mode it decides as in float32."""
    wide, narrow = cast(variant, half)
    labels, how = torch.tensor([1, 4, 0]), {"guidance_scale": 1.5, "top_k": 1, "smooth": smooth}
    expected, made = (generate(*models, labels, generator=seeded(3), **how) for models in (wide, narrow))
    assert made.images.dtype == made.sums[-1].dtype == torch.float32
    same = torch.cat(made.indices, dim=1) == torch.cat(expected.indices, dim=1)
    assert same[:, : 1 + 4].float().mean() > 0.8  # later scales see what earlier ones chose
    assert made.images.isfinite().all()


def test_sampling_inside_a_training_keeps_its_autocast():
    """Weights in float32: what is around the call counts, as at validations of a training in bfloat16."""
    transformer, tokenizer = small_transformer(), small_tokenizer()
    seen = []
    transformer.blocks[0].register_forward_hook(lambda module, given, result: seen.append(result[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generation = generate(transformer, tokenizer, torch.tensor([0]), generator=seeded(), smooth=True)
    assert set(seen) == {torch.bfloat16}
    assert generation.images.dtype == generation.sums[-1].dtype == torch.float32


@pytest.mark.parametrize(
    ("half_is_faster", "expected"),
    [
        ((True, True), "bfloat16"),
        ((True, False), "bfloat16,float32"),
        ((False, True), "float32,bfloat16"),
        ((False, False), "float32"),
    ],
)
def test_auto_is_what_a_cpu_is_fast_in(monkeypatch, half_is_faster, expected):
    seconds = iter([second for faster in half_is_faster for second in ((2.0, 1.0) if faster else (1.1, 1.0))])
    monkeypatch.setattr(precision, "shortest", lambda call: next(seconds))
    assert str(fastest(small_transformer(), small_tokenizer())) == expected


def test_auto_measures_the_models_themselves():
    transformer, tokenizer = small_transformer(), small_tokenizer()
    before = copy.deepcopy(transformer.state_dict())
    assert fastest(transformer, tokenizer).transformer in ("float32", "bfloat16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


# --- rehearsals on a GPU that is not there ------------------------------------------------------------------------------
# Fake tensors of device cuda have no values, and refuse every wait for the device and every mix of devices.


@pytest.fixture
def fake_gpu(monkeypatch):
    """A context in which tensors are fake ones of device cuda, and autocast is as on a GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # or autocast is off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)

    @contextlib.contextmanager
    def inside():
        with FakeTensorMode(), torch.device("cuda"):
            yield

    return inside


def unfilled(family: str):
    """Small models, made where tensors are made now."""
    kinds = [(type(model), model.config) for model in (small_transformer(family, depth=1), small_tokenizer())]
    return lambda: tuple(kind(config).requires_grad_(False) for kind, config in kinds)


@pytest.mark.parametrize("half", ["float32", *HALVES])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_waits_for_no_device(family, half, smooth, fake_gpu):
    """Also as it is captured: with noise that was drawn before."""
    build = unfilled(family)
    how = SamplingConfig(guidance_scale=1.5, top_k=20, top_p=0.9, smooth=smooth)
    with fake_gpu():
        transformer, tokenizer = build()
        Precision(half, half).apply_(transformer, tokenizer)
        labels = torch.zeros(3, dtype=torch.long)
        sampled = sample_scales(transformer, tokenizer, labels, how, functools.partial(exponential_noise, generator=None))
        images = decode_sampled(tokenizer, sampled)
        captured = CapturedSampler(transformer, tokenizer, how, 3, lambda compute: (compute, compute()))(labels)
    assert images.device.type == sampled.finite.device.type == "cuda"
    assert (images.dtype, images.shape) == (torch.float32, (3, 3, 18, 18))
    assert captured.sums[-1].shape == sampled.sums[-1].shape


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_forwards_waits_for_no_device(family, half, fake_gpu):
    """Tokens -> inputs -> logits -> loss; autograd goes back on real devices only."""
    build = unfilled(family)
    with fake_gpu():
        transformer, tokenizer = build()
        transformer.train().requires_grad_(True)
        indices = [torch.zeros(2, length, dtype=torch.long) for length in transformer.pyramid.lengths]
        with torch.autocast("cuda", dtype=half):
            logits = transformer(torch.zeros(2, dtype=torch.long), tokenizer.teacher_inputs(indices))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(indices, dim=1).flatten())
    assert loss.device.type == "cuda"
    assert (logits.dtype, loss.dtype) == (torch.float32, torch.float32)


def test_the_tokenizer_waits_for_no_device(fake_gpu):
    """Encoding and decoding in half precision, as tokens are cached and validations drawn."""
    build = unfilled("var")
    with fake_gpu():
        _, tokenizer = build()
        tokenizer.cast_encoder_(torch.bfloat16)
        tokenizer.cast_decoder_(torch.float16)
        images = tokenizer.decode(tokenizer.encode(torch.zeros(2, 3, 18, 18)))
    assert (images.device.type, images.dtype) == ("cuda", torch.float32)


def test_tokens_in_half_precision_are_told_apart():
    tokenizer = small_tokenizer()
    images = torch.rand(2, 3, *tokenizer.config.image_shape, generator=seeded()) * 2 - 1
    assert tokenizer_in(tokenizer) is tokenizer
    assert changed_tokens(tokenizer, tokenizer, images) == [0.0] * len(SIDES)
    narrow = tokenizer_in(tokenizer, "bfloat16")
    shares = changed_tokens(tokenizer, narrow, images)
    assert 0 < max(shares) < 0.5
    expected, others = (torch.cat(model.encode(images), dim=1) for model in (tokenizer, narrow))
    whole = (expected != others).float().mean()
    assert f"{whole:.2%} of those of 2 images differ" in told_of_tokens("bfloat16", tokenizer, narrow, images)
    with pytest.raises(ValueError, match="not finite in bfloat16, which is too narrow for it: give float32"):
        told_of_tokens("bfloat16", tokenizer, narrow, images * float("inf"))
    assert tokenizer.before_quantizer.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="precision tf32: is of NVIDIA's GPUs, the tokenizer is on cpu"):
        tokenizer_in(tokenizer, "tf32")
