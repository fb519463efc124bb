import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from golden_weights import tokenizer, tokenizer_weights, transformer, transformer_weights
from safetensors.torch import save_file
from small_models import assert_same_model, small_tokenizer, small_transformer

from utils.checkpoint import (
    Description,
    load_description,
    load_tokenizer,
    load_transformer,
    read_tensors,
    save_model,
)

TRANSFORMER = Description("transformer", class_names=["cat", "dog"], tokenizer="vae.pth", training={"seed": 3})
TOKENIZER = Description("tokenizer")


class Code:
    """Unpickling this makes a directory."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def model():
    return small_transformer()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Released files of the golden models."""
    directory = tmp_path_factory.mktemp("released")
    torch.save(transformer_weights("mvar_tiny"), directory / "mvar.pth")
    torch.save(transformer_weights("var_tiny"), directory / "var.pth")
    torch.save({"epoch": 1, "trainer": {"var_wo_ddp": transformer_weights("var_tiny")}}, directory / "training.pth")
    torch.save(tokenizer_weights("1234_qsr4"), directory / "vae.pth")
    torch.save({"trainer": {"vae_local": tokenizer_weights("1234_qsr4")}}, directory / "vae_training.pth")
    return directory


def saved(path: Path, model: torch.nn.Module, description: Description) -> Path:
    path.mkdir(parents=True)
    save_model(path, model, description)
    return path


# --- released files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "name"), [("mvar", "mvar_tiny"), ("var", "var_tiny"), ("training", "var_tiny")])
def test_released_transformer(files, file, name):
    assert_same_model(load_transformer(files / f"{file}.pth"), transformer(name))


@pytest.mark.parametrize("file", ["vae", "vae_training"])
def test_released_tokenizer(files, file):
    assert_same_model(load_tokenizer(files / f"{file}.pth"), tokenizer("1234_qsr4"))


def test_released_tokenizer_with_another_pyramid(files):
    assert load_tokenizer(str(files / "vae.pth"), sides=(1, 2, 4)).config.sides == (1, 2, 4)


def test_released_file_as_safetensors(files, tmp_path):
    save_file(transformer_weights("mvar_tiny"), tmp_path / "mvar.safetensors")
    assert_same_model(load_transformer(tmp_path / "mvar.safetensors"), transformer("mvar_tiny"))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_released_files_in_half_precision(tmp_path, kind, suffix):
    """As `model.half()` leaves them, every tensor: the parameters are float32 and have just these values."""
    save = torch.save if suffix == ".pth" else save_file
    for name, weights in (("var", transformer_weights("mvar_tiny")), ("vae", tokenizer_weights("1234_qsr4"))):
        save({key: tensor.to(kind) for key, tensor in weights.items()}, tmp_path / f"{name}{suffix}")
    pairs = (
        (load_transformer(tmp_path / f"var{suffix}"), transformer("mvar_tiny")),
        (load_tokenizer(tmp_path / f"vae{suffix}"), tokenizer("1234_qsr4")),
    )
    for loaded, exact in pairs:
        assert loaded.config == exact.config
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, exact.state_dict()[name].to(kind).float()), name


def test_integers_are_no_weights(tmp_path):
    """Quantised ones mean nothing without their scales."""
    weights = transformer_weights("var_tiny")
    weights["head.weight"] = weights["head.weight"].mul(100).to(torch.int8)
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: head\.weight is of torch\.int8, the model wants torch\.float32"):
        load_transformer(tmp_path / "x.pth")


def test_family_of_a_released_file(files):
    assert load_transformer(files / "var.pth", family="markov").config.blocks == ("markov", "markov")
    with pytest.raises(ValueError, match=r"mvar\.pth: family 'var' does not fit"):
        load_transformer(files / "mvar.pth", family="var")


def test_released_file_has_no_description(files):
    assert load_description(files / "vae.pth") is None


# --- wrong files --------------------------------------------------------------------------------------------------------


def test_tokenizer_given_as_transformer(files):
    with pytest.raises(ValueError, match="not a released transformer: pos_1LC.* missing.* a released VQVAE tokenizer"):
        load_transformer(files / "vae.pth")


def test_transformer_given_as_tokenizer(files):
    with pytest.raises(ValueError, match=r"quantize\.embedding\.weight.* missing.*seems to be a released M-VAR transformer"):
        load_tokenizer(files / "mvar.pth")


def test_extra_key_is_named(tmp_path):
    torch.save(transformer_weights("var_tiny") | {"extra.weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"unexpected extra\.weight; .* a released VAR or MVAR transformer"):
        load_transformer(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["blocks.1.ffn.fc2.bias", "blocks.0.ffn.fc1.weight", "lvl_embed.weight"])
def test_missing_key_of_a_transformer_is_named(tmp_path, name):
    weights = transformer_weights("var_tiny")
    del weights[name]
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"x\.pth: .*{name}.*"):
        load_transformer(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["decoder.conv_out.bias", "encoder.down.2.block.0.conv2.weight"])
def test_missing_key_of_a_tokenizer_is_named(tmp_path, name):
    weights = tokenizer_weights("1234_qsr4")
    del weights[name]
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: .*(decoder\.conv_out\.bias|encoder\.(down|levels)\.2\.)"):
        load_tokenizer(tmp_path / "x.pth")


def test_wrong_shape_is_named(tmp_path):
    weights = transformer_weights("var_tiny") | {"head.bias": torch.zeros(63)}
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"head\.bias has shape \(63,\), the model wants \(64,\)"):
        load_transformer(tmp_path / "x.pth")


def test_weights_of_other_models(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"first keys are conv1\.weight; the file seems to be none of the released models"):
        load_transformer(tmp_path / "resnet.pth")


def test_our_weights_without_their_configuration(tmp_path, model):
    path = saved(tmp_path / "ours", model, TRANSFORMER)
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"weights of a transformer of this project: load them with their config\.json"):
        load_transformer(path / "model.safetensors")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file(tmp_path, suffix, kept):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    (torch.save if suffix == ".pth" else save_file)({"a": torch.zeros(1000)}, whole)
    contents = whole.read_bytes()
    cut.write_bytes(contents[: kept if isinstance(kept, int) else int(kept * len(contents))])
    with pytest.raises(ValueError, match=f"cut{suffix}: not a readable weights file"):
        load_transformer(cut)


@pytest.mark.parametrize("start", ["hello", "# Title", "<html>", '{"a": 1}', "version https://git-lfs"])
def test_text_file(tmp_path, start):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"text{suffix}"
        path.write_text(f"{start} is no pickle\n")
        with pytest.raises(ValueError, match="not a readable weights file"):
            load_tokenizer(path)


def test_text_file_of_any_first_letter(tmp_path):
    """Pickle takes letters for instructions, which fail each in their own way."""
    path = tmp_path / "text.pth"
    for letter in map(chr, range(32, 127)):
        path.write_text(f"{letter}\nsome more text\n")
        with pytest.raises(ValueError, match="not a readable weights file"):
            read_tensors(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("dump", [torch.save, lambda contents, path: path.write_bytes(pickle.dumps(contents))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, dump):
    marker = tmp_path / "was run"
    dump({"pos_1LC": Code(marker)}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: not a readable weights file"):
        load_transformer(tmp_path / "evil.pth")
    assert not marker.exists()


def test_something_else_than_a_dictionary(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth: holds a list"):
        load_tokenizer(tmp_path / "list.pth")


@pytest.mark.parametrize("name", ["absent.pth", "a/b/c", "absent.safetensors", "a/absent.pth"])
def test_missing_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file or directory"):
        load_transformer(name)


def test_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load_transformer(tmp_path)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({0: torch.zeros(3)}, r"a\.pth: 0 is no tensor with a name"),
        ({"word_embed.bias": None}, r"a\.pth: word_embed\.bias is no tensor with a name"),
        ({"pos_1LC": 3.0}, r"a\.pth: pos_1LC is no tensor with a name"),
    ],
)
def test_what_is_no_tensor_or_has_no_name(tmp_path, others, message):
    torch.save(transformer_weights("mvar_tiny") | others, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        load_transformer(tmp_path / "a.pth")
    torch.save(dict.fromkeys(range(9), torch.zeros(3)), tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: not a released .* first keys are 0, 1, 2 and 6 more"):
        load_transformer(tmp_path / "b.pth")


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("name", ["encoder.conv_in.bias", "quantize.embedding.weight"])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    """From one NaN in them a tokenizer makes code 0 everywhere, without any error."""
    tensors = tokenizer_weights("1234_qsr4")
    tensors[name].view(-1)[3] = value
    torch.save(tensors, tmp_path / "vae.pth")
    theirs = {"encoder.conv_in.bias": "encoder.conv_in.bias", "quantize.embedding.weight": "quantizer.codebook.weight"}[name]
    with pytest.raises(ValueError, match=rf"vae\.pth: {theirs} is not finite: the file is damaged"):
        load_tokenizer(tmp_path / "vae.pth")


# --- our format ---------------------------------------------------------------------------------------------------------


def test_transformer_round_trip(tmp_path):
    model = small_transformer("mvar", depth=3, global_blocks=1, drop_path=0.1, sides=(1, (2, 3), (4, 4)))
    path = saved(tmp_path / "ours", model, TRANSFORMER)
    assert_same_model(load_transformer(path), model)
    assert_same_model(load_transformer(path / "model.safetensors"), model)
    assert load_description(path) == TRANSFORMER


def test_tokenizer_round_trip(tmp_path):
    model = small_tokenizer(normalize_lookup=True, num_phi=0)
    path = saved(tmp_path / "ours", model, TOKENIZER)
    assert_same_model(load_tokenizer(path), model)


def test_tokenizer_of_ours_with_another_pyramid(tmp_path):
    path = saved(tmp_path / "ours", small_tokenizer(), TOKENIZER)
    assert load_tokenizer(path, sides=(1, 4)).config.sides == (1, 4)


def test_other_family_for_weights_of_ours(tmp_path, model):
    path = saved(tmp_path / "ours", model, TRANSFORMER)
    assert load_transformer(path, family="markov-mamba").config.blocks == ("markov-mamba",) * 2
    with pytest.raises(ValueError, match="unexpected blocks.0.mixers.1"):
        load_transformer(path, family="var")


def test_wrong_kind_of_model(tmp_path, model):
    path = saved(tmp_path / "ours", model, TRANSFORMER)
    with pytest.raises(ValueError, match="describes a transformer, not a tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["model"].update(widht=3), "has no field widht"),
        (lambda values: values["model"].pop("sides"), "needs sides"),
        (lambda values: values.pop("kind"), "describes a model of other code"),
        (lambda values: values.pop("model"), "model"),
        (lambda values: values.update(model=None), "holds a NoneType in place of a TransformerConfig"),
        (lambda values: values["model"].update(sides=None), "TransformerConfig: .*NoneType"),
    ],
)
def test_configuration_is_read_strictly(tmp_path, model, change, message):
    path = saved(tmp_path / "ours", model, TRANSFORMER) / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load_transformer(path.parent)


def test_broken_configuration(tmp_path, model):
    path = saved(tmp_path / "ours", model, TRANSFORMER)
    for text in ("{", ""):
        (path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
            load_transformer(path)


# --- files as people have them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "seems"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "it is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html><head><title>Log in</title>", "it is a web page"),
        (b"  <HTML>", "it is a web page"),
        (b"PK\x03\x04 and then something else", "it is a damaged or truncated .pth file"),
        (b'\x10\x00\x00\x00\x00\x00\x00\x00{"a": [1, 2', "it is a damaged or truncated safetensors file"),
        (b"\x1f\x8b\x08packed", "it is a packed archive: unpack it first"),
        (b'{"weight_map": {}}', "it is JSON"),
        (b"hello", "give a .safetensors or a .pth of plain tensors"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.bin"])
def test_what_is_no_weights_file_is_named_in_our_words(tmp_path, content, seems, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a readable weights file: {seems}") as error:
        load_transformer(tmp_path / name)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_the_content_tells_the_format_and_not_the_name(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "really_safetensors.pth")
    torch.save(tensors, tmp_path / "really_pickled.safetensors")
    for name in ("really_safetensors.pth", "really_pickled.safetensors"):
        assert torch.equal(read_tensors(tmp_path / name)["a"], tensors["a"])


WRAPPED = {
    "module": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "compiled": lambda tensors: {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "state_dict": lambda tensors: {"state_dict": tensors, "epoch": 3},
    "model": lambda tensors: {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}, "optimizer": {}},
    "ema": lambda tensors: {"model": {name: tensor + 1 for name, tensor in tensors.items()}, "ema": tensors},
    "half": lambda tensors: {name: tensor.half().float().half() for name, tensor in tensors.items()},
    "released trainer": lambda tensors: {"trainer": {"mvar_wo_ddp": tensors}, "args": "..."},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_people_have_around_released_tensors_is_taken_off(tmp_path, kind, capsys):
    tensors = transformer_weights("mvar_tiny")
    torch.save(WRAPPED[kind](tensors), tmp_path / "a.pth")
    rounded = {name: tensor.half().float() for name, tensor in tensors.items()}
    torch.save(rounded if kind == "half" else tensors, tmp_path / "b.pth")
    assert_same_model(load_transformer(tmp_path / "a.pth"), load_transformer(tmp_path / "b.pth"))
    told = capsys.readouterr().err
    assert ("took the tensors out of" in told) == (kind not in ("half", "released trainer"))


def test_released_tensors_beside_the_configuration_of_others(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in transformer_weights("mvar_tiny").items()}
    torch.save(tensors, tmp_path / "b.pth")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["VAR"], "depth": 2}')
    assert_same_model(load_transformer(tmp_path / "model.safetensors"), load_transformer(tmp_path / "b.pth"))


def test_a_sharded_index_is_read(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in transformer_weights("mvar_tiny").items()}
    torch.save(tensors, tmp_path / "b.pth")
    names = list(tensors)
    files = {"one.safetensors": names[: len(names) // 2], "two.safetensors": names[len(names) // 2 :]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_transformer(tmp_path / "model.safetensors.index.json")
    assert_same_model(loaded, load_transformer(tmp_path / "b.pth"))
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names two.safetensors, which is not beside it: fetch all of its files"):
        load_transformer(tmp_path / "model.safetensors.index.json")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: holds a JSON list and no object"):
        load_transformer(tmp_path / "model.safetensors.index.json")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret"}}')
    with pytest.raises(ValueError, match='has no "weight_map" from tensors to files beside it'):
        load_transformer(tmp_path / "model.safetensors.index.json")


def test_weights_have_the_rights_of_every_other_file(tmp_path, model):
    path = saved(tmp_path / "ours", model, TRANSFORMER)
    assert (path / "model.safetensors").stat().st_mode == (path / "config.json").stat().st_mode
