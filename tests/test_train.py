import json
import math
import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from commands import (
    D12,
    SMALL,
    TINY_TOKENIZER,
    assert_refused,
    make_images,
    run_in_process,
    run_in_shell,
    script,
)
from forked import run_forked
from safetensors import safe_open

import train
from dist import Ranks
from models.parts import parts_of
from utils import cli
from utils.checkpoint import load_description, load_transformer
from utils.runs.checkpoints import checkpoints
from utils.runs.config import TrainConfig
from utils.runs.log import read_metrics
from utils.runs.plan import step_plan


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments: run_in_process(train.main, list(arguments), monkeypatch, capsys)


def parse(text: str) -> TrainConfig:
    return cli.parse(TrainConfig, "", shlex.split(text))


# --- flags --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--depth=12 --bs=768 --ep=200 --fp16=1 --alng=1e-3 --wpe=0.1", {"depth": 12, "alng": 1e-3, "wpe": 0.1}),
        ("--depth=16 --bs=768 --ep=200 --fp16=1 --alng=1e-3 --wpe=0.1", {"depth": 16, "bs": 768, "ep": 200, "fp16": 1}),
        ("--depth=20 --bs=768 --ep=250 --fp16=1 --alng=1e-3 --wpe=0.1", {"depth": 20, "ep": 250}),
        (
            "--depth=24 --bs=768 --ep=350 --tblr=8e-5 --fp16=1 --alng=1e-4 --wpe=0.01",
            {"depth": 24, "tblr": 8e-5, "alng": 1e-4, "peak_learning_rate": 2.4e-4},
        ),
        (
            "--depth=30 --bs=1024 --ep=350 --tblr=8e-5 --fp16=1 --alng=1e-5 --wpe=0.01 --twde=0.08",
            {"depth": 30, "bs": 1024, "twd": 0.05, "twde": 0.08, "peak_learning_rate": 3.2e-4},
        ),
        (
            "--depth=36 --saln=1 --pn=512 --bs=768 --ep=350 --tblr=8e-5 --fp16=1 --alng=5e-6 --wpe=0.01 --twde=0.08",
            {"depth": 36, "saln": True, "pn": "512", "alng": 5e-6},
        ),
        (
            "--data_path=/x --ac=2 --workers=8 --pn=1_2_3_4 --hflip=True --ls=0.1 --tclip=1 --twd=0.1 --wp=2 --wp0=0.01 "
            "--sche=cos --anorm=False --hd=0.1 --aln=0.4 --ini=0.02 --seed=3 --tfast=1 --pg=0.8 --pg0=1 --pgwp=3 "
            "--local_out_dir_path=/y",
            {"ac": 2, "workers": 8, "hflip": True, "ls": 0.1, "tclip": 1, "wp": 2, "wp0": 0.01, "sche": "cos"}
            | {"anorm": False, "hd": 0.1, "aln": 0.4, "ini": 0.02, "seed": 3, "tfast": 1, "pg": 0.8, "pg0": 1, "pgwp": 3}
            | {"schedule": "lin0.8", "local_out_dir_path": "/y", "data_path": "/x"},
        ),
    ],
)
def test_released_commands_parse_to_the_released_values(flags, expected):
    config = parse(flags)
    assert {name: getattr(config, name) for name in expected} == pytest.approx(expected)


def test_defaults_are_the_released_ones():
    released = {"depth": 16, "bs": 768, "ep": 250, "tblr": 1e-4, "twd": 0.05, "twde": 0, "tclip": 2, "ls": 0, "wp": 0}
    released |= {"wp0": 0.005, "wpe": 0.01, "sche": "lin0", "alng": 1e-5, "aln": 0.5, "hd": 0.02, "ini": -1, "fp16": 0}
    released |= {"ac": 1, "saln": False, "anorm": True, "hflip": False, "mid_reso": 1.125, "tfast": 0}
    released |= {"pg": 0, "pg0": 4, "pgwp": 0, "seed": None}
    config = TrainConfig()
    assert {name: getattr(config, name) for name in released} == released
    assert config.warmup_share == pytest.approx(1 / 50)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"family": "var", "scan": "within"}, "--scan=within: family var has no Mamba"),
        ({"family": "mvar", "window": 5}, "--window=5: family mvar has no windows"),
        ({"family": "markov", "attended_scales": 2}, "--attended_scales=2: family markov has no attention to earlier scales"),
    ],
)
def test_what_is_said_of_a_mixer_that_no_block_has_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**flags)
    assert TrainConfig(family="mvar", global_blocks=1, attended_scales=2).attended_scales == 2


@pytest.mark.parametrize(("flags", "expected"), [([], 0.4), (["--alng_all"], 0.01)])
def test_the_gate_of_the_feed_forward_is_initialised_as_told(flags, expected, images, tokenizer, tmp_path):
    words = [*SMALL, "--vae", tokenizer, "--data_path", images, "--local_out_dir_path", tmp_path, "--alng=0.01", "--aln=0.4"]
    config = cli.parse(TrainConfig, "", [*map(str, words), *flags])
    transformer = train.build_trainer(config, Ranks(0, 1, torch.device("cpu"))).state.model
    rows = transformer.blocks[0].modulation[-1].weight[2 * 64 : 3 * 64]
    assert rows.std().item() == pytest.approx((1 / (3 * 64)) ** 0.5 * expected, rel=0.1)


def test_long_names_stand_beside_the_released_ones():
    assert parse("--base_lr=3e-4 --epochs=7 --grad_clip=1") == parse("--tblr=3e-4 --ep=7 --tclip=1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"token_cache": "x", "hflip": True},
            "--hflip=True: is a setting of the token cache: give it to scripts/cache_tokens.py",
        ),
        (
            {"token_cache": "x", "val_fd": 2, "vae_precision": "float16"},
            "--vae_precision=float16: is a setting of the token cache",
        ),
        ({"token_cache": "x", "data_path": "y"}, "--data_path=y: is of images, and --token_cache has none"),
        ({"token_cache": "x", "background": "black"}, "--background=black: is of images, and --token_cache has none"),
        ({"token_cache": "x", "image_column": "y"}, "--image_column=y: is of images, and --token_cache has none"),
        ({"token_cache": "x", "label_column": "y"}, "--label_column=y: is of images, and --token_cache has none"),
        ({"token_cache": "x", "max_bad": 0.5}, "--max_bad=0.5: is of images, and --token_cache has none"),
        ({"max_bad": 0.5}, "--max_bad=0.5: is of --skip_bad: give that, or leave it out"),
        ({"pg0": 2}, "--pg0=2: is of progressive training: give --pg, or leave it out"),
        ({"pgwp": 2.0}, "--pgwp=2.0: is of progressive training: give --pg, or leave it out"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**flags)


def test_beside_a_cache_what_is_of_images_counts_with_val_fd():
    flags = {"data_path": "y", "background": "black", "image_column": "a", "skip_bad": True, "max_bad": 0.5}
    assert TrainConfig(token_cache="x", val_fd=2, **flags).background == "black"


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig) if field.type is float])
def test_every_number_ends(name):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"--{name}={value}: is not finite: give a number that ends"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("pg0", "sides", "mend"), [(2, 4, ""), (3, 4, "give --pg0=2 or less"), (0, 2, ""), (0, 1, "leave it out")]
)
def test_progressive_training_has_a_scale_to_come(pg0, sides, mend):
    tokenizer = replace(TINY_TOKENIZER, sides=tuple(range(1, sides + 1)))
    config = TrainConfig(depth=1, pg=0.5, pg0=pg0)
    if not mend:
        assert step_plan(config, config.transformer_config(tokenizer, 3), 0.0, 0).num_scales == pg0 + 1
        return
    with pytest.raises(ValueError, match=f"--pg=0.5 --pg0={pg0}: starts with {pg0 + 1} scales.*: {mend}"):
        config.transformer_config(tokenizer, 3)


# --- running ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(images, tokenizer, tmp_path_factory):
    """The released d12 command with a small depth, batch and folder, by two processes on the CPU."""
    run = tmp_path_factory.mktemp("run")
    flags = [*D12, *SMALL, "--ac=2", "--vae", tokenizer, "--data_path", images, "--local_out_dir_path", run]
    result = run_in_shell("train.py", *flags, ranks=2)
    assert result.returncode == 0, result.stderr
    return run


def test_two_ranks_train_to_the_end(finished_run):
    entries = read_metrics(finished_run)
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert {"val_loss", "val_loss_last", "val_accuracy", "val_accuracy_last"} <= set(entries[-1])
    assert list(finished_run.glob("events.out.tfevents.*"))
    assert [path.name for path in checkpoints(finished_run)] == ["step_3", "step_4"]
    config = json.loads((finished_run / "config.json").read_text())
    assert (config["ranks"], config["training"]["bs"], config["model"]["num_classes"]) == (2, 8, 3)


def test_a_checkpoint_describes_itself(finished_run, tokenizer):
    transformer = load_transformer(finished_run)
    assert transformer.config.blocks == ("mvar", "mvar")
    assert load_description(finished_run).tokenizer == str(tokenizer)
    assert load_description(finished_run).class_names == ["cat", "dog", "fox"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--fp16=1"],
        ["--fp16=2"],
        ["--family=var", "--saln=1"],
        ["--family=mvar", "--saln=1", "--anorm=0", "--global_blocks=0"],
        ["--family=mvar", "--global_blocks=1"],
        ["--family=markov", "--window_from=1"],
        ["--family=markov-mamba"],
        ["--pg=0.9", "--pg0=0", "--ls=0.1", "--max_steps=8"],
        ["--workers=1", "--hflip", "--ac=2"],
        ["--max_minutes=0.02", "--max_steps=100000", "--ema=0"],
    ],
    ids=" ".join,
)
def test_variants_train(flags, images, tokenizer, tmp_path, command):
    run = ["--vae", tokenizer, "--data_path", images, "--local_out_dir_path", tmp_path / "run"]
    code, _, errors = command(*SMALL, *run, *flags)
    assert code == 0, errors
    last = read_metrics(tmp_path / "run")[-1]
    assert 0 < last["val_loss"] < 10
    assert 0 <= last["val_accuracy_last"] <= 1


# --- wrong input --------------------------------------------------------------------------------------------------------


def folder_without(images, tmp_path, change):
    root = make_images(tmp_path / "wrong")
    change(root)
    return root


def remove_val(root):
    (root / "val").rename(root / "elsewhere")


def empty_class(root):
    for file in (root / "train" / "cat").iterdir():
        file.unlink()


def empty_train(root):
    (root / "train").rename(root / "elsewhere")
    (root / "train").mkdir()


def text_file(root):
    (root / "train" / "cat" / "notes.txt").write_text("not a picture")


def broken_image(root):
    (root / "train" / "dog" / "0.png").write_bytes(b"\x89PNG but no more")
    (root / "val" / "dog" / "0.png").write_bytes(b"\x89PNG but no more")


def class_only_in_val(root):
    (root / "train" / "fox").rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_val, "val: no such directory"),
        (empty_class, "cat: no images in it"),
        (empty_train, "train: no class folders in it"),
        (text_file, "notes.txt: not an image file"),
        (broken_image, "0.png: not a readable image"),
        (class_only_in_val, "class 'fox' is in val/ but not in train/"),
    ],
)
def test_wrong_folders_get_one_line(change, message, images, tokenizer, tmp_path, command):
    root = folder_without(images, tmp_path, change)
    run = tmp_path / "run"
    code, _, errors = command(*SMALL, "--ep=5", "--vae", tokenizer, "--data_path", root, "--local_out_dir_path", run)
    assert_refused(code, errors, message)
    assert checkpoints(run) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path=/does/not/exist"], "/does/not/exist: no such directory"),
        (["--no_such_flag=1"], "unrecognized arguments: --no_such_flag=1"),
        (["--dept=3"], "unrecognized arguments: --dept=3"),
        (["--pn=1_2_3_5"], "last side 5 does not fit the tokenizer"),
        (["--pn=1_2_4"], "--pn=1_2_4 is not the pyramid of the tokenizer"),
        (["--pn=4_2"], "must not shrink"),
        (["--pn=abc"], "give 256, 512, 1024 or sides"),
        (["--bs=9", "--ac=2"], "--bs=9 is no multiple of --ac=2"),
        (["--bs=-1"], "--bs=-1: give a number above 0"),
        (["--depth=two"], "invalid int value: 'two'"),
        (["--max_steps=-5"], "--max_steps=-5: give 0 or more"),
        (["--mid_reso=0.5"], "must not become smaller than their final size"),
        (["--pn=250"], "a single number is an image size"),
        (["--family=gpt"], "invalid choice: 'gpt'"),
        (["--heads=5"], "width 64 is no multiple of heads 5"),
        (["--vae=missing.pth"], "missing.pth: no such file"),
        (["--cca_beta=3"], "--cca_beta=3.0: is of --objective=cca: give that, or leave it out"),
        (["--val_drawing=cfg=2"], "--val_drawing=cfg=2: is of the samples of --val_fd: give that, or leave it out"),
        (["--global_blocks=7"], "--global_blocks=7: give 0 to 2"),
        (["--token_cache=/does/not/exist", "--data_path=imagenet"], "no finished token cache"),
        (["--pg=0.5"], "--pg=0.5 --pg0=4: starts with 5 scales, pyramid 1_2_3_4 has 4: give --pg0=2 or less, or no --pg"),
        (["--tblr=nan"], "'nan' is not finite"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_flags_get_one_line(flags, message, images, tokenizer, tmp_path, command):
    run = ["--vae", tokenizer, "--data_path", images, "--local_out_dir_path", tmp_path / "run"]
    code, _, errors = command(*SMALL, *run, *flags)
    assert_refused(code, errors, message)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(images, tokenizer, tmp_path):
    flags = ["--vae", tokenizer, "--data_path", images, "--local_out_dir_path", tmp_path / "run"]
    result = run_forked("train.py", *SMALL, "--bs=9", *flags, ranks=2)
    assert result.returncode != 0
    assert "--bs=9 does not divide by 2 ranks x --ac=1: give a multiple of 2" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth=3"], "a run with blocks 2 x mvar is there, this command asks for 3 x mvar"),
        (["--family=var"], "2 x mvar is there, this command asks for 2 x var"),
        (["--width=128", "--heads=2"], "a run with width 64 is there, this command asks for 128"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_and_kept(flags, message, finished_run, images, tokenizer, command):
    before = sorted((str(path), path.stat().st_mtime_ns) for path in finished_run.rglob("*"))
    run = ["--vae", tokenizer, "--data_path", images, "--local_out_dir_path", finished_run]
    code, _, errors = command(*SMALL, *run, *flags)
    assert_refused(code, errors, message)
    assert sorted((str(path), path.stat().st_mtime_ns) for path in finished_run.rglob("*")) == before


def test_help_explains_every_flag(command):
    code, output, _ = command("--help")
    assert code == 0
    assert "peak learning rate per 256 images" in " ".join(output.split())


def test_a_cache_finds_its_tokenizer_beside_it_and_says_when_it_is_gone(images, tokenizer, tmp_path, monkeypatch, capsys):
    made, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tokenizer, made / "tokenizer")
    monkeypatch.chdir(made)
    words = ["--vae=tokenizer", "--data_path", images, "--out=tokens"]
    assert run_in_process(script("cache_tokens").main, words, monkeypatch, capsys)[0] == 0
    monkeypatch.chdir(elsewhere)
    config = parse(f"--token_cache=../made/tokens --depth=1 --local_out_dir_path={tmp_path / 'run'}")
    trainer = train.build_trainer(config, Ranks(0, 1, torch.device("cpu")))
    assert Path(trainer.task.description().tokenizer).resolve() == made / "tokenizer"
    (made / "tokenizer").rename(elsewhere / "other")
    with pytest.raises(
        FileNotFoundError, match="made/tokens names its tokenizer tokenizer, which cannot be had: give --vae"
    ) as error:
        train.build_trainer(config, Ranks(0, 1, torch.device("cpu")))
    assert "\n" not in str(error.value)
    train.build_trainer(replace(config, vae="other"), Ranks(0, 1, torch.device("cpu")))


# --- from other weights -------------------------------------------------------------------------------------------------


def test_a_run_starts_from_weights_of_another_kind_and_goes_on_without_them(trained_var, images, tokenizer, tmp_path, command):
    run = tmp_path / "run"
    words = [*SMALL, "--vae", tokenizer, "--data_path", images, "--local_out_dir_path", run, "--init_from"]
    code, out, errors = command(*words, trained_var, "--max_steps=1", "--alng=0")
    assert code == 0, errors
    for part in ("class embedding", "attention", "mamba", "modulation"):
        assert part in out
    assert "new, of new mixers" in out
    # one step of a small rate later it still is what it came from, but for that step
    ours, theirs = load_transformer(run, ema=False), load_transformer(trained_var)
    assert (ours.head.weight - theirs.head.weight).abs().max() < 1e-3
    # resumed, it does not need the file any more
    code, out, errors = command(*words, tmp_path / "gone", "--max_steps=2", "--alng=0")
    assert code == 0, errors
    assert "resuming at step 1" in out
    assert "mamba" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth=3"], "depth 2, not 3 (give --depth=2)"),
        (["--width=128"], "width 64, not 128 (give --width=64)"),
        (["--saln=1"], "shared modulation False, not True (give --saln=False)"),
    ],
)
def test_weights_of_another_shape_are_refused(flags, message, trained_var, images, tokenizer, tmp_path, command):
    run = ["--vae", tokenizer, "--data_path", images, "--local_out_dir_path", tmp_path / "run", "--init_from", trained_var]
    code, _, errors = command(*SMALL, *run, *flags)
    assert_refused(code, errors, message)


def class_margin(run: Path, task) -> float:
    """How much likelier training images are under their own label than under the others, mean log-likelihood of an image."""
    transformer, images = load_transformer(run, ema=False), task.data.train
    pixels, labels = zip(*(images[0, index] for index in range(len(images))), strict=True)
    labels, indices = torch.tensor(labels), task.tokenizer.encode(torch.stack(pixels))
    targets, inputs = torch.cat(indices, dim=1), task.tokenizer.teacher_inputs(indices)

    def likelihood(labels):
        with torch.no_grad():
            logits = transformer(labels, inputs).log_softmax(dim=-1)
        return logits.gather(-1, targets[..., None]).sum(dim=(1, 2))

    others = [likelihood((labels + shift) % 3) for shift in (1, 2)]
    return (likelihood(labels) - sum(others) / 2).mean().item()


def test_the_alignment_makes_images_likelier_under_their_own_class_than_under_others(images, tokenizer, tmp_path):
    common = [*SMALL, "--family=var", "--vae", tokenizer, "--data_path", images]
    align = ["--objective=cca", "--tblr=0.1", "--class_dropout=0", "--drop_path=0", "--cca_weight=1", "--ep=40"]
    align += ["--save_every=50", "--val_every=100", "--local_out_dir_path", tmp_path / "aligned"]

    def fit(*words):
        config = cli.parse(TrainConfig, "", [str(word) for word in (*common, *words)])
        trainer = train.build_trainer(config, Ranks(0, 1, torch.device("cpu")))
        trainer.fit()
        return trainer.task

    # a model in which the class matters from the start
    fit("--alng=1", "--hd=1", "--max_steps=2", "--local_out_dir_path", tmp_path / "start")
    task = fit(*align, "--init_from", tmp_path / "start", "--max_steps=100")
    first = read_metrics(tmp_path / "aligned")[0]
    assert first["likelihood_gain"] == pytest.approx(0, abs=1e-3)
    assert first["likelihood_gain_of_others"] == pytest.approx(0, abs=1e-3)
    assert class_margin(tmp_path / "aligned", task) > class_margin(tmp_path / "start", task) + 0.2
    # the reference of a resumed run is the start, not where the run has come to
    with pytest.raises(ValueError, match="was begun from other weights"):
        fit(*align, "--init_from", tmp_path / "aligned", "--max_steps=110")


def test_a_resumed_alignment_is_the_uninterrupted_one(trained_var, images, tokenizer, tmp_path, command):
    words = [*SMALL, "--family=var", "--objective=cca", "--vae", tokenizer, "--data_path", images]
    words += ["--init_from", trained_var, "--ac=2"]
    words += ["--ep=20", "--wp0=1", "--wpe=1"]  # the same rate at every step, however many there are
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            code, _, errors = command(*words, "--local_out_dir_path", tmp_path / name, f"--max_steps={stop}")
            assert code == 0, errors
    whole, parts = (load_transformer(tmp_path / name, ema=False).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective=cca"], "--objective=cca: starts from a trained transformer: give --init_from"),
        (["--objective=cca", "--init_from=x", "--pg=0.5"], "leave out --pg"),
        (["--objective=cca", "--init_from=x", "--cca_beta=0"], "--cca_beta=0.0: give a number above 0"),
        (["--objective=cca", "--init_from=x", "--bs=2", "--ac=2"], "--objective=cca compares images: give 2 or more at a time"),
        (["--objective=cca", "--init_from=START", "--family=mvar"], "is of other blocks: --objective=cca aligns a transformer"),
        (["--objective=cca", "--init_from=START", "--data_path=OTHER"], "does not know the classes 'ape' and 'owl'"),
    ],
)
def test_an_alignment_that_cannot_be_is_refused(flags, message, trained_var, images, tokenizer, tmp_path, command):
    other = make_images(tmp_path / "other", names=("ape", "owl"))
    flags = [flag.replace("START", str(trained_var)).replace("OTHER", str(other)) for flag in flags]
    code, _, errors = command(*SMALL, "--family=var", "--vae", tokenizer, "--data_path", images, *flags)
    assert_refused(code, errors, message)


def test_only_the_parts_that_are_named_are_trained_averaged_and_kept_by_the_optimizer(
    trained_var, images, tokenizer, tmp_path, command
):
    run = tmp_path / "run"
    words = [*SMALL, "--family=mvar", "--vae", tokenizer, "--data_path", images, "--local_out_dir_path", run, "--alng=0.1"]
    words += ["--init_from", trained_var, "--train_only=mamba,head", "--seed=3"]
    code, out, errors = command(*words, "--max_steps=1")
    assert code == 0, errors
    assert "trained: mamba,head, " in out
    start = load_transformer(run, ema=False)
    code, out, errors = command(*words, "--max_steps=3")
    assert code == 0, errors
    assert "resuming at step 1" in out
    end, averaged = load_transformer(run, ema=False), load_transformer(run)
    chosen = {id(parameter) for name in ("mamba", "head") for parameter in parts_of(end)[name]}
    names = {name for name, parameter in end.named_parameters() if id(parameter) in chosen}
    weights = [model.state_dict() for model in (start, end, averaged)]
    moved = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    matrices = {name for name in names if weights[0][name].ndim > 1}  # steps of a scan may be too small to be seen
    assert matrices <= moved <= names
    assert matrices <= {name for name in weights[1] if not torch.equal(weights[1][name], weights[2][name])} <= names
    checkpoint = checkpoints(run)[-1]
    with safe_open(checkpoint / "ema.safetensors", "pt") as file:
        assert set(file.keys()) == names
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        assert {name.rpartition(".")[0] for name in file.keys()} == names  # noqa: SIM118


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_only=head"], "--train_only=head: the other parts would stay as they were drawn: give --init_from"),
        (
            ["--family=var", "--train_only=mamba"],
            "no part 'mamba': give some of embeddings, modulation, feed-forward, head, attention",
        ),
    ],
)
def test_parts_that_cannot_be_trained_alone_are_refused(flags, message, trained_var, images, tokenizer, tmp_path, command):
    start = ["--init_from", trained_var] if "--family=var" in flags else []
    run = ["--vae", tokenizer, "--data_path", images, "--local_out_dir_path", tmp_path / "run", *start]
    code, _, errors = command(*SMALL, *run, *flags)
    assert_refused(code, errors, message)
