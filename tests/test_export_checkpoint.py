"""Files in half precision: what is in them, that everything reads them, and that tokens and hashes stay.

And checkpoints that are damaged. Sharded ones: tests/test_two_ranks.py. Under released names in float32:
tests/test_train_tokenizer.py.
"""

import json
import os

import pytest
import torch
from commands import assert_refused, run_in_process, script
from safetensors.torch import load_file, save_file
from small_models import assert_same_model, small_tokenizer, small_transformer

import sample
from models import VQVAE, ScaleTransformer, generate
from models.precision import Precision, cast_for_file_
from models.storage import Description, weights_hash
from utils.checkpoint import load_description, load_fitting_tokenizer, load_tokenizer, load_transformer, save_model
from utils.data.token_cache import fingerprint
from utils.runs.checkpoints import checkpoint_path
from utils.runs.saving import save_checkpoint

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def export(monkeypatch, capsys):
    main = script("export_checkpoint").main
    return lambda *arguments: run_in_process(main, list(arguments), monkeypatch, capsys)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints of a tokenizer and of a transformer that was trained on its tokens, in float32."""
    directory = tmp_path_factory.mktemp("models")
    transformer, tokenizer = small_transformer(), small_tokenizer()
    known = Description("transformer", tokenizer=str(directory / "vae"), tokenizer_hash=fingerprint(tokenizer))
    for name, model, description in (("vae", tokenizer, Description("tokenizer")), ("run", transformer, known)):
        (directory / name).mkdir()
        save_model(directory / name, model, description)
    return directory


@pytest.fixture
def run(tmp_path):
    """Two checkpoints of a tokenizer, whose averaged weights are others and lack those of the encoder's first convolution."""
    tokenizer = small_tokenizer()
    model = {f"model.{name}": tensor for name, tensor in tokenizer.state_dict().items()}
    averaged = {f"ema.{name}": tensor + 1 for name, tensor in tokenizer.state_dict().items() if "encoder.conv_in" not in name}
    tensors = model | averaged | {"optimizer.moment": torch.zeros(9)}
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", step, tokenizer.config, Description("tokenizer"), {"step": step}, tensors, keep=2)
    return tmp_path / "run"


def flip(path):
    """Change four bytes in the middle of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-8:-4] = b"\x00\x00\x80\x3f"
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "fault"),
    [
        (flip, "ema", "ema.safetensors is not what was written (SHA-256 differs)"),
        (flip, "model", "model.safetensors is not what was written (SHA-256 differs)"),  # with weights that the average lacks
        (lambda path: os.truncate(path, 99), "model", "model.safetensors has 99 of "),
        (lambda path: os.truncate(path, 9), "optimizer", "optimizer.safetensors has 9 of "),  # such are written no more
    ],
)
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_is_taken(damage, file, fault, run, tmp_path, export):
    expected = load_tokenizer(run)
    newest = checkpoint_path(run, 2)
    damage(newest / f"{file}.safetensors")
    code, output, errors = export(run, "--out", tmp_path / "out")
    assert code == 0, errors
    assert output.startswith(f"wrote {checkpoint_path(run, 1)} to ")
    (line,) = errors.splitlines()
    assert line.startswith(f"{newest}: damaged, {fault}")
    assert line.endswith(": taking step_1")
    assert_same_model(load_tokenizer(tmp_path / "out"), expected)
    if file == "optimizer":
        load_tokenizer(newest)  # which does not read it
        return
    assert_refused(*export(newest, "--out", tmp_path / "other")[::2], f"{newest}: damaged, {fault}")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match=r"damaged, .*: restore it, or give another checkpoint of its run"):
        load_tokenizer(newest / f"{file}.safetensors")
    damage(checkpoint_path(run, 1) / f"{file}.safetensors")
    with pytest.raises(ValueError, match=r"step_2: damaged, .*, and no earlier checkpoint of the run is whole: restore one"):
        load_tokenizer(run)


def test_damage_in_what_is_not_read_is_no_matter(run):
    checkpoint = checkpoint_path(run, 2)
    expected = load_tokenizer(checkpoint, ema=False)
    for file in ("ema", "optimizer"):
        flip(checkpoint / f"{file}.safetensors")
    assert_same_model(load_tokenizer(checkpoint, ema=False), expected)
    assert_same_model(load_tokenizer(checkpoint / "model.safetensors"), expected)


def load(directory):
    return (load_transformer if directory.name == "run" else load_tokenizer)(directory)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["run", "vae"])
def test_a_half_file_loads_as_its_values_in_float32(half, name, models, tmp_path, export):
    out = tmp_path / name
    code, output, errors = export(models / name, "--out", out, f"--dtype={half}")
    assert code == 0, errors
    assert output.endswith(f"weights in {half}\n")
    assert load_description(out).precision == half
    exact, stored = load_file(models / name / "model.safetensors"), load_file(out / "model.safetensors")
    rounded = {key for key, tensor in stored.items() if tensor.dtype == HALVES[half]}
    assert {tensor.dtype for key, tensor in stored.items() if key not in rounded} == {torch.float32}
    assert all(torch.equal(stored[key], exact[key].to(HALVES[half]) if key in rounded else exact[key]) for key in exact)
    assert stored.keys() == load_file(out / "ema.safetensors").keys() == exact.keys()
    assert sum(exact[key].numel() for key in rounded) > 0.4 * sum(tensor.numel() for tensor in exact.values())
    loaded = load(out)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, stored[key].float()) for key, tensor in loaded.state_dict().items())
    assert_same_model(type(loaded).from_pretrained(out), loaded)


@pytest.mark.parametrize("half", HALVES)
def test_sampled_in_its_own_precision_a_half_file_gives_the_same_images(half, models, tmp_path, export):
    """To the bit: what is cast when one samples is what the file holds in that type."""
    images = []
    for directory in (models, tmp_path):
        if directory is tmp_path:
            assert all(export(models / name, "--out", tmp_path / name, f"--dtype={half}")[0] == 0 for name in ("run", "vae"))
        transformer, tokenizer = load_transformer(directory / "run"), load_tokenizer(directory / "vae")
        Precision(half, half).apply_(transformer, tokenizer)
        generator = torch.Generator().manual_seed(0)
        images.append(generate(transformer, tokenizer, torch.tensor([0, 3]), generator=generator).images)
    assert torch.equal(*images)


def test_tokens_and_their_hash_stay(models, tmp_path, export):
    export(models / "vae", "--out", tmp_path / "vae", "--dtype=bfloat16")
    exact, half = load_tokenizer(models / "vae"), load_fitting_tokenizer(str(tmp_path / "vae"), "")
    assert fingerprint(half) == fingerprint(exact)
    assert weights_hash(half) != weights_hash(exact)
    images = torch.rand(4, 3, 18, 18, generator=torch.Generator().manual_seed(0)) * 2 - 1
    indices = exact.encode(images)
    assert all(torch.equal(*pair) for pair in zip(indices, half.encode(images), strict=True))
    assert not torch.equal(exact.decode(indices), half.decode(indices))


def test_a_transformer_takes_its_tokenizer_in_half_but_not_one_rounded_all_over(models, tmp_path, export, monkeypatch, capsys):
    """As people make them: every tensor cast. Then the tokens are others, and so is the hash."""
    export(models / "vae", "--out", tmp_path / "vae", "--dtype=bfloat16")
    words = [f"--ckpt={models / 'run'}", "--num=1", "--classes=0", "--precision=float32", f"--out={tmp_path / 'a.png'}"]
    code, _, errors = run_in_process(sample.main, [*words, f"--vae={tmp_path / 'vae'}"], monkeypatch, capsys)
    assert code == 0, errors
    (tmp_path / "all").mkdir()
    save_model(tmp_path / "all", small_tokenizer().half(), Description("tokenizer"))
    words[-1] = f"--out={tmp_path / 'b.png'}"
    code, _, errors = run_in_process(sample.main, [*words, f"--vae={tmp_path / 'all'}"], monkeypatch, capsys)
    assert code == 1
    assert "was trained on tokens of a tokenizer with hash" in errors
    assert " and is rounded to float16: give that one, or --any_tokenizer" in errors
    assert not (tmp_path / "b.png").exists()


def test_weights_that_people_have_cast_themselves(models, tmp_path, export):
    """What the tensors are counts, not what config.json says; exported again they stay what they are."""
    (tmp_path / "run").mkdir()
    weights = load_file(models / "run" / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "config.json").write_text((models / "run" / "config.json").read_text())
    loaded = load_transformer(tmp_path / "run")
    assert loaded.description.precision == "bfloat16"
    assert all(torch.equal(tensor, weights[name].bfloat16().float()) for name, tensor in loaded.state_dict().items())
    assert export(tmp_path / "run", "--out", tmp_path / "again")[0] == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["precision"] == "bfloat16"
    assert_same_model(load_transformer(tmp_path / "again"), loaded)
    assert export(tmp_path / "run", "--out", tmp_path / "wide", "--dtype=float32")[0] == 0
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["precision"] == "float32"
    assert_same_model(load_transformer(tmp_path / "wide"), loaded)


def test_a_half_tokenizer_under_released_names(models, tmp_path, export):
    code, _, errors = export(models / "vae", "--released", "--out", tmp_path / "vae.pth", "--dtype=float16")
    assert code == 0, errors
    released = torch.load(tmp_path / "vae.pth", weights_only=True)
    kinds = {
        part: {t.dtype for name, t in released.items() if name.startswith(part)} for part in ("encoder", "decoder", "quant")
    }
    assert kinds == {"encoder": {torch.float32}, "decoder": {torch.float16}, "quant": {torch.float32}}
    again = load_tokenizer(tmp_path / "vae.pth", small_tokenizer().config.sides)
    export(models / "vae", "--out", tmp_path / "vae", "--dtype=float16")
    assert_same_model(load_tokenizer(tmp_path / "vae"), again)


def test_what_float16_cannot_hold_is_refused(tmp_path, export):
    transformer = small_transformer()
    with torch.no_grad():
        transformer.blocks[1].ffn.fc1.weight[0, 0] = 1e5
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", transformer, Description("transformer"))
    code, _, errors = export(tmp_path / "run", "--out", tmp_path / "out", "--dtype=float16")
    assert code == 1
    assert "blocks.1.ffn.fc1.weight holds values beyond the range of float16: give bfloat16" in errors
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "run", "--out", tmp_path / "out", "--dtype=bfloat16")[0] == 0


@pytest.mark.parametrize("model_class", [VQVAE, ScaleTransformer])
def test_the_card_tells_the_precision(model_class):
    model = small_tokenizer() if model_class is VQVAE else small_transformer()
    assert "| precision of the file | float32 |" in model.generate_model_card().text
    cast_for_file_(model, "bfloat16")
    exact = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.float32)
    assert f"| precision of the file | bfloat16 ({exact:,} of them float32) |" in model.generate_model_card().text
