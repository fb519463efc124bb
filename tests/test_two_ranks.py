"""Training by two ranks: replicated and sharded, resumed, and from one kind to the other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import SMALL, assert_same_training, run_in_process, run_in_shell, script
from safetensors.torch import load_file

import train
from dist import Ranks
from utils.checkpoint import load_transformer
from utils.runs.checkpoints import checkpoint_path, checkpoints
from utils.runs.log import read_repeatable_metrics
from utils.runs.saving import read_numbers

LEARN = ["--tblr=0.05", "--alng=0.1", "--wp=0.1"]  # so fast that every difference between two runs shows
STILL = ["--drop_path=0"]  # the one thing that each rank draws for itself
SHARDED = ["--parallel=fsdp"]
OF_CACHE = ["--data_path=imagenet"]  # the default: a cache has no images


@pytest.fixture(scope="module")
def source(images, tokenizer):
    return [*SMALL, *LEARN, "--vae", str(tokenizer), "--data_path", str(images), "--save_every=2", "--class_dropout=0.3"]


@pytest.fixture(scope="module")
def cache(images, tokenizer, tmp_path_factory) -> str:
    """Two views of every image, encoded."""
    module, out = script("cache_tokens"), tmp_path_factory.mktemp("cache") / "tokens"
    config = module.CacheConfig(vae=str(tokenizer), data_path=str(images), out=str(out), views=2)
    module.encode(config, Ranks(0, 1, torch.device("cpu")))
    return str(out)


@pytest.fixture(scope="module")
def runs(source, cache, tmp_path_factory) -> Path:
    """All runs by two ranks, in one go."""
    out = tmp_path_factory.mktemp("runs")
    dropouts = ["--drop_path=0.5", "--ac=2"]
    markov = ["--family=markov", "--window_from=1", *STILL]
    plan = [
        ("replicated", STILL),
        ("cached", [*STILL, *OF_CACHE, "--token_cache", cache, "--max_steps=8"]),
        ("accumulated", [*STILL, "--ac=2"]),
        ("sharded", [*STILL, *SHARDED]),
        ("sharded_validated", [*STILL, *SHARDED, "--val_every=1"]),
        ("sharded_accumulated", [*STILL, *SHARDED, "--ac=2"]),
        ("sharded_recomputed", [*STILL, *SHARDED, "--recompute"]),
        ("whole", dropouts),
        ("copy whole resumed", []),
        ("drop resumed 4", []),
        ("resumed", dropouts),
        ("sharded_whole", [*SHARDED, *dropouts]),
        ("copy sharded_whole sharded_resumed", []),
        ("drop sharded_resumed 4", []),
        ("sharded_resumed", [*SHARDED, *dropouts]),
        ("copy replicated to_sharded", []),
        ("drop to_sharded 4", []),
        ("to_sharded", [*STILL, *SHARDED]),
        ("copy sharded to_replicated", []),
        ("drop to_replicated 4", []),
        ("to_replicated", STILL),
        ("half", [*STILL, "--fp16=2"]),
        ("sharded_half", [*STILL, *SHARDED, "--fp16=2"]),
        ("sharded_var", [*STILL, *SHARDED, "--family=var", "--saln"]),
        ("var", [*STILL, "--family=var", "--saln"]),
        ("markov", markov),
        ("markov_each", [*markov, "--scale_groups=each"]),
        ("sharded_markov_each", [*markov, *SHARDED, "--scale_groups=each"]),
        ("markov_drawn", [*markov, "--scale_groups=drawn", "--max_steps=10"]),
        ("sharded_markov_drawn", [*markov, *SHARDED, "--scale_groups=drawn", "--max_steps=10"]),
        ("progressive", [*STILL, "--pg=0.9", "--pg0=0", "--ac=2"]),
        ("sharded_progressive", [*STILL, *SHARDED, "--pg=0.9", "--pg0=0", "--ac=2"]),
        ("poisoned", [*STILL, "--poison"]),
        ("sharded_poisoned", [*STILL, *SHARDED, "--poison"]),
        ("copy sharded full_disk", []),
        ("drop full_disk 4", []),
        ("full_disk", [*STILL, *SHARDED, "--little_room"]),
    ]
    plan = [(name, [*source, *flags]) for name, flags in plan]
    result = run_in_shell("tests/two_ranks.py", out, json.dumps(plan), ranks=2)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments: run_in_process(train.main, list(arguments), monkeypatch, capsys)


def assert_close_training(run: Path, other: Path, tolerance: float, mean_difference: float = 1e-6) -> None:
    """The same losses on the way and the same weights in the end, but for the order of float32 sums or the precision.

    Weights are compared in the mean: AdamW turns the rounding of a gradient that is nearly zero into a whole step.
    """
    ours, theirs = read_repeatable_metrics(run), read_repeatable_metrics(other)
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    for name in ("loss", "val_loss", "grad_norm"):
        losses = [[entry[name] for entry in lines if name in entry] for lines in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance), name
    assert max(losses := [entry["loss"] for entry in ours if "loss" in entry]) - min(losses) > 0.01  # it did learn
    for averaged in (False, True):
        models = [load_transformer(path, ema=averaged) for path in (run, other)]
        pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
        differences = {name: (a - b).abs().mean().item() for (name, a), b in pairs}
        assert max(differences.values()) < mean_difference, differences


# --- the same steps however they are shared out -------------------------------------------------------------------------


def test_one_rank_takes_the_same_steps_as_two(runs, source, tmp_path, command):
    """Class dropout included: it is drawn for the whole step."""
    assert command(*source, *STILL, "--local_out_dir_path", tmp_path)[0] == 0
    assert_close_training(runs / "replicated", tmp_path, 1e-5)


def test_one_rank_takes_the_same_steps_from_a_cache_as_two(runs, source, cache, tmp_path, command):
    flags = [*source, *STILL, *OF_CACHE, "--token_cache", cache, "--max_steps=8"]
    assert command(*flags, "--local_out_dir_path", tmp_path)[0] == 0
    assert_close_training(runs / "cached", tmp_path, 1e-5)


@pytest.mark.parametrize(
    ("run", "other"),
    [
        ("accumulated", "replicated"),
        ("sharded", "replicated"),
        ("sharded_accumulated", "replicated"),
        ("sharded_recomputed", "replicated"),
        ("sharded_var", "var"),
        ("markov_each", "markov"),
        ("sharded_markov_each", "markov"),
        ("sharded_markov_drawn", "markov_drawn"),
        ("sharded_progressive", "progressive"),
    ],
)
def test_the_same_steps_however_they_are_shared_out(run, other, runs):
    assert_close_training(runs / run, runs / other, 1e-5)


def test_sharded_training_in_bfloat16_is_that_of_replicas_to_its_three_digits(runs):
    """A step moves a weight by 1e-3; where bfloat16 rounds differs."""
    assert_close_training(runs / "sharded_half", runs / "half", 1e-2, mean_difference=3e-4)


def test_validations_and_samples_on_the_way_change_nothing(runs):
    """Both gather a sharded model outside of training steps, and the averaged weights take the place of the weights."""
    plain, validated = (read_repeatable_metrics(runs / name) for name in ("sharded", "sharded_validated"))
    assert [entry for entry in validated if "loss" in entry] == [entry for entry in plain if "loss" in entry]
    assert len([entry for entry in validated if "val_loss" in entry]) == 4
    ends = [shards(checkpoints(runs / name)[-1]) for name in ("sharded", "sharded_validated")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


# --- resumed ------------------------------------------------------------------------------------------------------------


def test_two_ranks_resume_bit_for_bit(runs):
    """With accumulation and dropouts."""
    assert_same_training(runs / "whole", runs / "resumed")


def test_two_sharded_ranks_resume_bit_for_bit(runs):
    whole, resumed = (shards(checkpoints(runs / name)[-1]) for name in ("sharded_whole", "sharded_resumed"))
    assert whole.keys() == resumed.keys()
    assert {name.partition(".")[0] for _, name in whole} == {"model", "ema", "optimizer"}
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert read_repeatable_metrics(runs / "sharded_whole") == read_repeatable_metrics(runs / "sharded_resumed")


def shards(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    files = sorted((checkpoint / "shards").glob("*.safetensors"))
    assert len(files) == 2
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("run", ["to_sharded", "to_replicated"])
def test_sharded_and_replicated_runs_go_on_from_one_another(run, runs):
    assert_close_training(runs / run, runs / "replicated", 1e-5)
    kinds = [(path / "shards").exists() for path in checkpoints(runs / run)]
    assert kinds == ([False, True] if run == "to_sharded" else [True, False])


def test_one_rank_goes_on_from_the_shards_of_two(runs, source, tmp_path, command):
    shutil.copytree(runs / "sharded", tmp_path / "run")
    shutil.rmtree(checkpoint_path(tmp_path / "run", 4))
    code, output, errors = command(*source, *STILL, "--local_out_dir_path", tmp_path / "run")
    assert code == 0, errors
    assert "the run so far had 2 rank(s), now 1: same batches, other draws of drop-path" in output
    assert_close_training(tmp_path / "run", runs / "replicated", 1e-5)
    assert read_numbers(checkpoints(tmp_path / "run")[-1])["ranks"] == 1


# --- exported -----------------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_is_exported_to_single_files(runs, tmp_path, monkeypatch, capsys):
    export = script("export_checkpoint").main
    code, output, errors = run_in_process(export, [runs / "sharded", "--out", tmp_path / "model"], monkeypatch, capsys)
    assert code == 0, errors
    assert "step_4" in output
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "ema.safetensors"}
    for averaged in (False, True):
        exported, kept = (load_transformer(path, ema=averaged) for path in (tmp_path / "model", runs / "sharded"))
        assert exported.config == kept.config
        assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), kept.parameters(), strict=True))
    code, _, errors = run_in_process(export, [runs / "sharded", "--out", tmp_path / "model"], monkeypatch, capsys)
    assert code == 1
    assert "is there already" in errors


# --- not finite ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["poisoned", "sharded_poisoned"])
def test_every_rank_names_the_rank_and_scale_that_went_wrong(run, runs):
    for rank in (0, 1):
        message = (runs / f"{run}.error.{rank}").read_text()
        assert message.startswith("step 3: the loss is nan at scale 2x2 on rank 1; the last checkpoint is untouched")
    assert [path.name for path in checkpoints(runs / run)] == ["step_2"]


def test_every_rank_learns_that_one_could_not_write_its_part(runs):
    for rank in (0, 1):
        message = (runs / f"full_disk.error.{rank}").read_text()
        assert message.startswith("the last checkpoint could not be written (")
        assert "\n" not in message
    assert [path.name for path in (runs / "full_disk" / "checkpoints").iterdir()] == ["step_2"]
    assert (runs / "full_disk.error.0").read_text().count("File too large") == 1


# --- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel=fsdp"], "--parallel=fsdp shares a model out over ranks, there is one: start it with torchrun"),
        (["--parallel=fsdp", "--fp16=1"], "sharded training has no loss scaling: give --fp16=2"),
        (["--scale_groups=each"], "--scale_groups=each: scales depend on one another in family mvar"),
        (["--scale_groups=drawn", "--family=markov", "--global_blocks=1"], "in family markov with --global_blocks"),
        (["--max_bad_steps=0"], "--max_bad_steps=0: give a number above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, message, source, tmp_path, command):
    code, _, errors = command(*source, *flags, "--local_out_dir_path", tmp_path / "run")
    assert code != 0
    assert message in errors
    assert not (tmp_path / "run").exists()
