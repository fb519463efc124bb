"""Low-rank adapters: beside which layers, trained and saved alone, merged for sampling."""

import copy
import json
import shutil

import pytest
import torch
from commands import SMALL, assert_refused, make_images, run_in_process, script
from safetensors import safe_open
from small_models import SIDES, random_indices, small_tokenizer, small_transformer

import sample
import train
from models.adapters import Base, add_adapters_, merged, own_tensors, plain_name, shared_with
from models.parts import is_adapter, train_only_
from models.pyramid import Pyramid
from models.storage import read_tensors, weights_hash, write_tensors
from utils.checkpoint import load_transformer
from utils.runs.checkpoints import checkpoints, seal

RANK, ALPHA = 3, 6.0


def adapted(family: str, parts: tuple[str, ...] = ()):
    """A small transformer, and a copy of it with adapters that do something."""
    plain = small_transformer(family)
    other = copy.deepcopy(plain)
    add_adapters_(other, RANK, ALPHA, parts)
    return plain, other


def random_inputs():
    """(2, L - 1, code_dim) of random tokens."""
    return small_tokenizer().teacher_inputs(random_indices(Pyramid(SIDES)))


@torch.no_grad()
def stir_(transformer) -> None:
    for name, parameter in transformer.named_parameters():
        if is_adapter(name):
            parameter.normal_(std=0.2)


@pytest.mark.parametrize("family", ["mvar", "var", "markov", "markov-mamba"])
def test_adapters_start_as_nothing_and_merge_into_what_they_compute(family):
    plain, other = adapted(family)
    labels, inputs = torch.tensor([1, 4]), random_inputs()
    with torch.no_grad():
        torch.testing.assert_close(other(labels, inputs), plain(labels, inputs), rtol=1e-5, atol=1e-5)
        stir_(other)
        expected = other(labels, inputs)
        assert (expected - plain(labels, inputs)).abs().max() > 0.01
        own = {name: tensor for name, tensor in other.named_parameters() if tensor.requires_grad}
        assert all(map(is_adapter, own))
        plain.load_state_dict(merged(plain.state_dict(), own, ALPHA / RANK))
        torch.testing.assert_close(plain(labels, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mvar", "var"])
def test_every_linear_layer_of_the_parts_has_one_and_takes_part(family):
    """An adapter beside a layer that is computed with in another way than by calling it would be trained in vain."""
    _, other = adapted(family, ("attention", "feed-forward", "modulation", *(["mamba"] if family == "mvar" else [])))
    stir_(other)
    other(torch.tensor([1, 4]), random_inputs()).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in gradients} == {
        "qkv", "proj", "fc1", "fc2", "1", *(["in_proj", "out_proj"] if family == "mvar" else [])
    }  # fmt: skip
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


def test_what_is_kept_beside_adapters_is_what_the_base_has_not():
    base, target = small_transformer("var"), small_transformer("mvar")
    with torch.no_grad():
        target.blocks[0].mixers[0].load_state_dict(base.blocks[0].mixers[0].state_dict())
    shared = Base("somewhere", weights_hash(base), shared_with(target, base))
    add_adapters_(target, RANK, ALPHA)
    train_only_(target, ["head"])
    own = own_tensors(target, shared)
    assert {name for name in own if name.startswith("head.")} == {"head.weight", "head.bias"}
    assert any(is_adapter(name) for name in own)
    assert not any(plain_name(name).startswith("blocks.0.mixers.0.") for name in own if not is_adapter(name))
    assert any(".mixers.1." in name and not is_adapter(name) for name in own)


@pytest.mark.parametrize(("family", "part"), [("markov", "mamba"), ("mvar", "head"), ("mvar", "embeddings"), ("var", "qkv")])
def test_parts_without_such_layers_are_refused(family, part):
    with pytest.raises(ValueError, match=f"no part '{part}' with linear layers for adapters: give some of .*attention"):
        add_adapters_(small_transformer(family), RANK, ALPHA, (part,))


# --- commands -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda main, *arguments: run_in_process(main, list(map(str, arguments)), monkeypatch, capsys)


@pytest.fixture
def words(trained_var, images, tokenizer, tmp_path):
    """Of a run with adapters beside a copy of a VAR, which may then be moved or changed."""
    base = tmp_path / "base"
    shutil.copytree(trained_var, base)
    words = [*SMALL, "--vae", tokenizer, "--data_path", images, "--local_out_dir_path", tmp_path / "run", "--init_from", base]
    return [*words, "--family=var", "--lora=2", "--seed=3"]


def test_adapters_are_trained_saved_alone_resumed_sampled_and_exported(words, tokenizer, tmp_path, command):
    run = tmp_path / "run"
    code, out, errors = command(train.main, *words, "--max_steps=1")
    assert code == 0, errors
    assert "trained: adapters of rank 2 beside " in out
    code, out, errors = command(train.main, *words, "--max_steps=3")
    assert code == 0, errors
    assert "resuming at step 1" in out
    checkpoint = checkpoints(run)[-1]
    names = {}
    for section in ("model", "ema", "optimizer"):
        with safe_open(checkpoint / f"{section}.safetensors", "pt") as file:
            names[section] = set(file.keys())
    assert all(map(is_adapter, names["model"]))
    assert names["ema"] == names["model"] == {name.rpartition(".")[0] for name in names["optimizer"]}

    plain, averaged, last = load_transformer(tmp_path / "base"), load_transformer(run), load_transformer(run, ema=False)
    assert weights_hash(plain) != weights_hash(averaged) != weights_hash(last)
    assert not any(is_adapter(name) for name, _ in averaged.named_parameters())
    code, _, errors = command(
        sample.main, "--ckpt", run, "--vae", tokenizer, "--out", tmp_path / "a.npz", "--format=npz", "--num=2"
    )
    assert code == 0, errors
    exporting = script("export_checkpoint").main
    code, _, errors = command(exporting, run, "--out", tmp_path / "whole")
    assert code == 0, errors
    shutil.rmtree(tmp_path / "base")  # no longer needed
    assert weights_hash(load_transformer(tmp_path / "whole")) == weights_hash(averaged)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["base"] is None


def test_adapters_whose_base_is_gone_or_another_one_are_told(words, tmp_path, command):
    code, _, errors = command(train.main, *words, "--max_steps=1")
    assert code == 0, errors
    base, run = tmp_path / "base", tmp_path / "run"
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"adapters beside .*base, which is not there: put it there"):
        load_transformer(run)
    (tmp_path / "moved").rename(base)
    for name in ("model", "ema"):
        path = checkpoints(base)[-1] / f"{name}.safetensors"
        write_tensors(path, {name: tensor + 1 for name, tensor in read_tensors(path).items()})
    (path.parent / "checksums.json").unlink()
    seal(path.parent)
    with pytest.raises(ValueError, match=r"adapters beside .*base, which has other weights by now: give those back"):
        load_transformer(run)
    code, _, errors = command(train.main, *words, "--max_steps=2")
    assert_refused(code, errors, "holds adapters of other weights: resume with the run's own --init_from and --lora")


def test_a_run_of_adapters_is_not_gone_on_with_whole_nor_the_other_way_round(words, trained_var, tmp_path, command):
    code, _, errors = command(train.main, *words, "--max_steps=1")
    assert code == 0, errors
    whole = [word for word in words if not str(word).startswith("--lora")]
    code, _, errors = command(train.main, *whole, "--max_steps=2")
    assert_refused(code, errors, "holds adapters alone: resume with the run's own --init_from and --lora")
    for flag, message in (
        ("--lora_alpha=32", "the run has --lora_alpha=2.0, not 32.0: resume with that"),
        ("--train_only=embeddings", "the run has --train_only=, not embeddings: resume with that"),
    ):
        code, _, errors = command(train.main, *words, flag, "--max_steps=2")
        assert_refused(code, errors, message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora=2"], "--lora=2: adapters are nothing without trained weights: give --init_from"),
        (["--lora=-1"], "--lora=-1, --lora_alpha=0.0: give numbers of at least 0"),
        (["--lora_parts=mamba"], "--lora_parts=mamba: is of adapters: give --lora, their rank, or leave it out"),
        (
            ["--init_from=START", "--family=markov", "--lora=2", "--lora_parts=mamba"],
            "--lora_parts=mamba: no part 'mamba' with linear layers for adapters: give some of modulation, feed-forward",
        ),
        (
            ["--init_from=START", "--lora=2", "--data_path=OTHER"],
            "does not know the classes 'ape' and 'owl': embeddings have to be trained: give --train_only=embeddings",
        ),
        (["--init_from=START", "--lora=2", "--parallel=fsdp"], "--lora=2: adapters are small: give --parallel=ddp"),
    ],
)
def test_wrong_words_about_adapters_are_refused(flags, message, trained_var, images, tokenizer, tmp_path, command):
    if "--data_path=OTHER" in flags:
        make_images(tmp_path / "other", names=("ape", "owl"))
    flags = [flag.replace("START", str(trained_var)).replace("OTHER", str(tmp_path / "other")) for flag in flags]
    run = ["--vae", tokenizer, "--data_path", images, "--local_out_dir_path", tmp_path / "run"]
    code, _, errors = command(train.main, *SMALL, *run, *flags)
    assert_refused(code, errors, message)
    assert not (tmp_path / "run").exists()
