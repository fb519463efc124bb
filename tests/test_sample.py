import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CLASSES, TINY_TOKENIZER, run_in_process, run_in_shell
from forked import run_forked
from golden_weights import tokenizer_weights, transformer_weights
from PIL import Image

import sample
from models.precision import Precision
from models.storage import write_tensors
from models.tokenizer import VQVAE
from models.transformer import build_transformer
from utils.checkpoint import Description, load_tokenizer, load_transformer, save_model
from utils.data.token_cache import TOKENS, fingerprint
from utils.dump import finished_settings
from utils.files import sha256, written_aside


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("transformer") / "checkpoint"
    torch.manual_seed(0)
    transformer = build_transformer(
        "mvar", 1, sides=TINY_TOKENIZER.sides, width=64, heads=1, num_classes=3, num_codes=32, code_dim=8
    )
    transformer.init_weights(gamma=0.5, head=1.0)
    with written_aside(directory) as aside:
        known = fingerprint(load_tokenizer(tokenizer))
        save_model(aside, transformer, Description("transformer", list(CLASSES), str(tokenizer), tokenizer_hash=known))
    return directory


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setattr(sample, "fastest", lambda *models: Precision())  # what is measured on a busy machine may change
    return lambda *arguments: run_in_process(sample.main, list(arguments), monkeypatch, capsys)


def test_a_grid_has_a_row_per_class_with_its_name(checkpoint, tmp_path, command):
    code, output, errors = command("--ckpt", checkpoint, "--out", tmp_path / "grid.png", "--classes", "fox,0")
    assert code == 0, errors
    assert "wrote 16 images (grid)" in output
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape[0] == 2 * (64 + 2)
    assert picture.shape[1] > 8 * (64 + 2)
    margin = picture[:, : picture.shape[1] - 8 * 66]
    assert (margin < 128).any()  # letters


def test_scales_show_each_image_building_up(checkpoint, tmp_path, command):
    code, _, errors = command("--ckpt", checkpoint, "--out", tmp_path / "scales.png", "--format", "scales")
    assert code == 0, errors
    with Image.open(tmp_path / "scales.png") as picture:
        assert picture.height == 22 + 3 * 66
        assert picture.width >= 4 * 66


def test_npz_has_what_evaluators_read(checkpoint, tmp_path, command):
    flags = ["--ckpt", checkpoint, "--out", tmp_path / "s.npz", "--format", "npz", "--num", 7, "--batch", 3, "--cfg", 2]
    code, _, errors = command(*flags)
    assert code == 0, errors
    with np.load(tmp_path / "s.npz", allow_pickle=False) as archive:
        assert archive["arr_0"].shape == (7, 16, 16, 3)
        assert archive["arr_0"].dtype == np.uint8
        assert sorted(archive["labels"].tolist()) == [0, 0, 0, 1, 1, 2, 2]
        assert json.loads(str(archive["settings"]))["cfg"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def dump_flags(out, *flags) -> list:
    return ["--out", out, "--format=npz", "--num_images=200", "--seed=3", *flags]


def test_a_dump_is_the_same_however_it_was_made(checkpoint, tmp_path, command, monkeypatch):
    """By one rank in batches of 50, and by two in batches of 32 after a run that was interrupted, in the precision of that."""
    begun = "--precision=bfloat16,float32"
    assert command("--ckpt", checkpoint, *dump_flags(tmp_path / "one.npz", "--batch=50", begun))[0] == 0
    usual, written = sample.Dump.write, []

    def write_five(dump, cohort, images):
        if len(written) == 5:
            raise OSError("interrupted")
        written.append(cohort)
        usual(dump, cohort, images)

    with monkeypatch.context() as patch:
        patch.setattr(sample.Dump, "write", write_five)
        assert command("--ckpt", checkpoint, *dump_flags(tmp_path / "two.npz", "--batch=32", begun))[0] == 1
    assert not (tmp_path / "two.npz").exists()
    result = run_forked("sample.py", "--ckpt", checkpoint, *dump_flags(tmp_path / "two.npz", "--batch=32"), ranks=2)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]
    with np.load(tmp_path / "one.npz", allow_pickle=False) as archive:
        images, labels, settings = archive["arr_0"], archive["labels"].tolist(), json.loads(str(archive["settings"]))
    assert len({image.tobytes() for image in images}) == 200  # no image twice
    assert labels != sorted(labels)
    assert [labels.count(label) for label in range(3)] == [67, 67, 66]
    assert len(settings["transformer_sha256"]) == 64
    assert "rounded to nearest" in settings["uint8"]
    assert settings["scan_backend"] == "torch"  # the one used, not auto
    assert settings["precision"] == "bfloat16,float32"


def test_an_image_depends_on_seed_and_number_alone(checkpoint, tmp_path, command):
    """Not on how many there are: the first of 21 and of 40 are the same."""
    for num in (21, 40):
        flags = ["--out", tmp_path / f"{num}", "--format=png", f"--num={num}", "--classes=1", "--seed=3"]
        assert command("--ckpt", checkpoint, *flags)[0] == 0
    for n in range(21):
        name = f"{n:06d}_class0001.png"
        assert (tmp_path / "21" / name).read_bytes() == (tmp_path / "40" / name).read_bytes()
    assert json.loads((tmp_path / "40.settings.json").read_text())["num"] == 40


def test_an_archive_of_others_is_no_dump_of_any_settings(tmp_path):
    for name in ("list.npz", "none.npz"):
        np.savez(tmp_path / name, **({"settings": np.array("[]")} if name == "list.npz" else {"arr_0": np.zeros(3)}))
        assert finished_settings(tmp_path / name) is None


def test_an_unfinished_dump_of_other_settings_is_refused(checkpoint, tmp_path, command, monkeypatch):
    def fail(dump):
        raise OSError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(sample.Dump, "finish", fail)
        assert command("--ckpt", checkpoint, *dump_flags(tmp_path / "s.npz"))[0] == 1
    code, _, errors = command("--ckpt", checkpoint, *dump_flags(tmp_path / "s.npz", "--cfg=3"))
    assert code == 1
    assert "an unfinished dump with cfg 1.5 is there, this command has 3.0" in errors
    code, _, errors = command("--ckpt", checkpoint, *dump_flags(tmp_path / "s.npz", "--precision=bfloat16"))
    assert code == 1
    assert "an unfinished dump with precision float32 is there, this command has bfloat16" in errors
    assert command("--ckpt", checkpoint, *dump_flags(tmp_path / "s.npz"))[0] == 0


@pytest.mark.parametrize(("form", "damage"), [("npz", "torn"), ("npz", "zeros"), ("png", "empty"), ("png", "torn")])
def test_parts_count_by_their_content(form, damage, checkpoint, tmp_path, command, monkeypatch):
    """A loss of power may leave a name without its content; the same command makes what is missing."""
    flags = ["--ckpt", checkpoint, f"--format={form}", "--num=40", "--seed=3", "--precision=float32"]
    ending = ".npz" if form == "npz" else ""
    assert command(*flags, "--out", tmp_path / f"whole{ending}")[0] == 0

    def fail(dump):
        raise OSError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(sample.Dump, "finish", fail)
        assert command(*flags, "--out", tmp_path / f"cut{ending}")[0] == 1
    part = tmp_path / ".cut.npz.parts" / "000001.npy" if form == "npz" else tmp_path / "cut" / "000020_class0001.png"
    content = part.read_bytes()
    damaged = {"empty": b"", "torn": content[: len(content) // 2], "zeros": content[:-200] + bytes(200)}[damage]
    part.write_bytes(damaged)
    code, _, errors = command(*flags, "--out", tmp_path / f"cut{ending}")
    assert code == 0, errors
    if form == "npz":
        assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    else:
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_a_failed_start_does_not_block_the_corrected_command(checkpoint, tmp_path, command, monkeypatch):
    def fail(*arguments):
        raise ValueError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(sample, "make_sampler", fail)
        assert command("--ckpt", checkpoint, *dump_flags(tmp_path / "s.npz", "--cfg=9"))[0] == 1
    assert command("--ckpt", checkpoint, *dump_flags(tmp_path / "s.npz"))[0] == 0


def test_overwrite_wins_over_what_is_unfinished(checkpoint, tmp_path, command, monkeypatch):
    def fail(dump):
        raise OSError("interrupted")

    flags = ["--ckpt", checkpoint, "--format=png", "--num=3", "--out", tmp_path / "s"]
    with monkeypatch.context() as patch:
        patch.setattr(sample.Dump, "finish", fail)
        assert command(*flags, "--seed=1")[0] == 1
    assert command(*flags)[0] == 1
    assert command(*flags, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "s.settings.json").read_text())["seed"] == 0
    assert len(list((tmp_path / "s").iterdir())) == 3


def test_a_full_disk_ends_a_dump_with_one_line(checkpoint, tmp_path, command, monkeypatch):
    """While images are written by a thread; what was written stays, and the same command goes on."""
    usual = sample.Dump.write

    def fail_at_3(dump, cohort, images):
        if cohort == 3:
            raise OSError("No space left on device")
        usual(dump, cohort, images)

    with monkeypatch.context() as patch:
        patch.setattr(sample.Dump, "write", fail_at_3)
        code, _, errors = command("--ckpt", checkpoint, *dump_flags(tmp_path / "s.npz"))
    assert code == 1
    assert "error: No space left on device" in errors
    assert errors.count("error") == 1
    written = [path.name for path in (tmp_path / ".s.npz.parts").glob("[0-9]*.npy")]
    assert {"000000.npy", "000001.npy", "000002.npy"} <= set(written)
    assert command("--ckpt", checkpoint, *dump_flags(tmp_path / "s.npz"))[0] == 0


def test_cohorts_are_sampled_while_one_is_written(checkpoint, tmp_path, command, monkeypatch):
    usual_write, usual_sample, sampled, seen = sample.Dump.write, sample.sample, [], []

    def write(dump, cohort, images):
        deadline = time.monotonic() + 20
        while len(sampled) < 2 and time.monotonic() < deadline:  # the second one comes while the first is written
            time.sleep(0.01)
        seen.append(len(sampled))
        usual_write(dump, cohort, images)

    def record(*arguments):
        sampled.append(1)
        return usual_sample(*arguments)

    monkeypatch.setattr(sample.Dump, "write", write)
    monkeypatch.setattr(sample, "sample", record)
    assert command("--ckpt", checkpoint, "--out", tmp_path / "s.npz", "--format=npz", "--num=40")[0] == 0
    assert seen[0] >= 2


def test_png_files_are_numbered_and_named_by_class(checkpoint, tmp_path, command):
    flags = ["--ckpt", checkpoint, "--out", tmp_path / "png", "--format", "png", "--num", 3, "--classes", "dog,none"]
    assert command(*flags)[0] == 0
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == ["000000_class0001.png", "000001_class0001.png", "000002_class0003.png"]


def test_the_same_seed_gives_the_same_images_and_batches_differ(checkpoint, tmp_path, command):
    images = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ["--out", tmp_path / f"{name}.npz", "--format", "npz", "--num", 8, "--batch", 4, "--classes", "1"]
        assert command("--ckpt", checkpoint, *flags, "--seed", seed)[0] == 0
        images.append(np.load(tmp_path / f"{name}.npz")["arr_0"])
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()
    assert (images[0][:4] != images[0][4:]).any()  # the released dumps repeat the seed in every batch


def test_presets_are_defaults_that_flags_override():
    for preset in ("", "fid"):
        (fid,) = sample.SampleConfig("a", "b", preset=preset).sweep()
        assert fid == sample.Setting(Path("b"), cfg=1.5, top_k=900, top_p=0.96, smooth=False)
    (visual,) = sample.SampleConfig("a", "b", preset="visual", cfg="3").sweep()
    assert (visual.cfg, visual.top_p, visual.smooth) == (3.0, 0.95, True)


def test_a_dump_for_fid_has_50_images_of_each_class():
    flags = {"ckpt": "a", "out": "b", "format": "npz"}
    for preset, each in (("fid", 50), ("visual", 1), ("", 1)):
        labels = sample.all_labels(sample.SampleConfig(**flags, preset=preset), [0, 1, 2], 3)
        assert labels == sorted([0, 1, 2] * each)
    assert len(sample.all_labels(sample.SampleConfig(**flags, preset="fid", num=7), [0, 1, 2], 3)) == 7


def test_values_are_swept_into_a_dump_each(checkpoint, tmp_path, command, monkeypatch):
    flags = ["--ckpt", checkpoint, "--format=npz", "--num=8", "--cfg=0,2.5", "--top_k=1,0"]
    usual, finished = sample.Dump.finish, []

    def finish_two(dump):
        if len(finished) == 2:
            raise OSError("interrupted")
        finished.append(dump)
        usual(dump)

    with monkeypatch.context() as patch:
        patch.setattr(sample.Dump, "finish", finish_two)
        assert command(*flags, "--out", tmp_path / "s.npz")[0] == 1
    code, output, _ = command(*flags, "--out", tmp_path / "s.npz")
    assert code == 0
    assert output.count("all 8 images of this command are there already") == 2
    names = [f"s-cfg{cfg}-top_k{top_k}.npz" for cfg in ("0", "2.5") for top_k in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        with np.load(tmp_path / name, allow_pickle=False) as archive:
            settings = json.loads(str(archive["settings"]))
        assert name == f"s-cfg{settings['cfg']:g}-top_k{settings['top_k']}.npz"
    single = tmp_path / "single.npz"
    assert command(*flags[:4], "--cfg=2.5", "--top_k=1", "--out", single)[0] == 0
    assert single.read_bytes() == (tmp_path / names[3]).read_bytes()


def test_a_finished_dump_is_left_alone(checkpoint, tmp_path, command):
    flags = ["--ckpt", checkpoint, "--num=3", "--out", tmp_path / "dump"]
    for form in ("png", "npz"):
        flags[-1] = tmp_path / form
        assert command(*flags, "--format", form)[0] == 0
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, output, _ = command(*flags, "--format", form)
        assert code == 0
        assert "all 3 images of this command are there already" in output
        code, _, errors = command(*flags, "--format", form, "--seed=1")
        assert code == 1
        assert "a dump with seed 0 is there, this command has 1: give another --out, or --overwrite" in errors
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_sampling_as_a_command_of_its_own(checkpoint, tmp_path):
    flags = ["--ckpt", checkpoint, "--out", tmp_path / "grid.png", "--preset", "visual", "--num", 3]
    result = run_in_shell("sample.py", *flags)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "grid.png").exists()


def test_the_precision_is_told_and_what_auto_chooses_is_one(checkpoint, tmp_path, command, monkeypatch):
    monkeypatch.setattr(sample, "fastest", lambda *models: Precision("bfloat16", "float32"))
    flags = ["--ckpt", checkpoint, "--format=npz", "--num=3"]
    code, _, errors = command(*flags, "--out", tmp_path / "auto.npz")
    assert code == 0
    assert "precision: transformer bfloat16, decoder float32" in errors
    assert command(*flags, "--out", tmp_path / "given.npz", "--precision=bfloat16,float32")[0] == 0
    assert (tmp_path / "auto.npz").read_bytes() == (tmp_path / "given.npz").read_bytes()
    assert command(*flags, "--out", tmp_path / "wide.npz", "--precision=float32")[0] == 0
    assert (tmp_path / "auto.npz").read_bytes() != (tmp_path / "wide.npz").read_bytes()


def test_released_files_are_sampled_too(tmp_path, command):
    torch.save({"trainer": {"mvar_wo_ddp": transformer_weights("mvar_tiny")}}, tmp_path / "mvar.pth")
    torch.save(tokenizer_weights("1234_qsr4"), tmp_path / "vae.pth")
    flags = ["--ckpt", tmp_path / "mvar.pth", "--vae", tmp_path / "vae.pth", "--classes", "7,9", "--top_k", 20]
    code, _, errors = command(*flags, "--out", tmp_path / "grid.png", "--num", 4)
    assert code == 0, errors
    assert (tmp_path / "grid.png").exists()
    code, _, errors = command(*flags[:2], "--out", tmp_path / "other.png")
    assert code == 1
    assert "does not name its tokenizer: give --vae" in errors


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("0,2", [0, 2]),
        ("fox, none", [1, 4]),
        ("tench, Tinca tinca", [2]),
        ('"tench, Tinca tinca",0', [2, 0]),
        ("label:3,name:3", [3, 0]),
        ("name:fox,label:none", [1, 4]),
    ],
)
def test_classes_are_labels_or_names(text, labels):
    assert sample.parse_classes(text, ["3", "fox", "tench, Tinca tinca", "ape"], 4) == labels


def test_a_number_that_is_a_label_and_another_name_is_refused():
    """Folders named 0 ... 11 are sorted as words: label 2 is folder 10."""
    names = sorted(map(str, range(12)))
    assert sample.parse_classes("0,1", names, 12) == [0, 1]
    with pytest.raises(
        ValueError, match="2 is the label of class '10' and the name of the class with label 4: give label:2 or"
    ):
        sample.parse_classes("2", names, 12)
    assert sample.parse_classes("label:2,name:2", names, 12) == [2, 4]


def test_words_that_are_names_of_classes_are_refused():
    names = ["Bag", "none", "random"]
    assert sample.parse_classes("name:none,label:none", names, 3) == [1, 3]
    assert sample.are_drawn("label:random", names)
    assert not sample.are_drawn("name:random", names)
    with pytest.raises(ValueError, match="none is a class's name, and means no class: give name:none or label:none"):
        sample.parse_classes("none", names, 3)
    with pytest.raises(ValueError, match="is a class's name, and means labels at random: give name:random or label:random"):
        sample.are_drawn("random", names)


def test_it_is_told_which_classes_the_labels_are(checkpoint, tmp_path, command):
    code, _, errors = command("--ckpt", checkpoint, "--out", tmp_path / "grid.png", "--classes=fox,0", "--num=2")
    assert code == 0
    assert "classes: label 2 = 'fox', label 0 = 'cat'" in errors


def test_another_tokenizer_of_the_same_shapes_is_refused(checkpoint, tokenizer, tmp_path, command):
    torch.manual_seed(9)
    other = VQVAE(TINY_TOKENIZER)
    other.init_weights()
    with written_aside(tmp_path / "other") as aside:
        save_model(aside, other, Description("tokenizer"))
    flags = ["--ckpt", checkpoint, "--vae", tmp_path / "other", "--num=1", "--classes=0", "--out", tmp_path / "a.png"]
    code, _, errors = command(*flags)
    assert code == 1
    assert "was trained on tokens of a tokenizer with hash" in errors
    assert "give that one, or --any_tokenizer" in errors
    assert not (tmp_path / "a.png").exists()
    assert command(*flags, "--any_tokenizer")[0] == 0


def test_a_relative_tokenizer_is_found_beside_the_run(tokenizer, tmp_path, command, monkeypatch):
    shutil.copytree(tokenizer, tmp_path / "home" / "out" / "a" / "vae")
    torch.manual_seed(0)
    transformer = build_transformer(
        "mvar", 1, sides=TINY_TOKENIZER.sides, width=64, heads=1, num_classes=3, num_codes=32, code_dim=8
    )
    with written_aside(tmp_path / "home" / "out" / "run") as aside:
        save_model(aside, transformer, Description("transformer", list(CLASSES), "out/a/vae"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    flags = ["--num=1", "--classes=0", "--out", tmp_path / "a.png"]
    code, _, errors = command("--ckpt", tmp_path / "home" / "out" / "run", *flags)
    assert code == 0, errors
    (tmp_path / "home" / "out" / "run").rename(tmp_path / "alone")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, errors = command("--ckpt", tmp_path / "alone", *flags, "--overwrite")
    assert code == 1
    assert "alone names its tokenizer out/a/vae, which cannot be had: give --vae" in errors


def test_scales_end_with_the_image_in_smooth_mode_too(checkpoint, tokenizer):
    (setting,) = sample.SampleConfig("a", "b", preset="visual").sweep()
    transformer, vae = load_transformer(checkpoint), load_tokenizer(tokenizer)
    labels, generators = torch.arange(3), [torch.Generator().manual_seed(seed) for seed in range(3)]
    sampled = sample.make_sampler(sample.SampleConfig("a", "b"), setting, transformer, vae)(labels, generators)
    pictures = sample.scale_pictures(vae, sampled)
    assert pictures.shape == (3, 4, 16, 16, 3)
    np.testing.assert_array_equal(pictures[:, -1], sample.start_decoding(vae, sampled, None)())


def test_labels_can_be_drawn(checkpoint, tmp_path, command):
    flags = ["--format", "npz", "--num", 30, "--classes", "random", "--out", tmp_path / "s.npz"]
    assert command("--ckpt", checkpoint, *flags)[0] == 0
    assert set(np.load(tmp_path / "s.npz")["labels"].tolist()) == {0, 1, 2}


def test_a_folder_with_other_things_is_no_place_for_a_dump(checkpoint, tmp_path, command):
    (tmp_path / "holiday.png").write_text("mine")
    code, _, errors = command("--ckpt", checkpoint, "--format=png", "--num=1", "--out", tmp_path, "--overwrite")
    assert code == 1
    assert "holds 'holiday.png', which is no picture of a dump: give another --out, or move it away" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]


def test_an_overwritten_folder_keeps_no_older_images(checkpoint, tmp_path, command):
    for num in (6, 2):
        flags = ["--format", "png", "--num", num, "--out", tmp_path, "--overwrite"]
        assert command("--ckpt", checkpoint, *flags)[0] == 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes=7"], "no class '7': give numbers from 0 to 2, or names such as 'cat'"),
        (["--classes=wolf"], "no class 'wolf'"),
        (["--classes=cat\ndog"], "give names with commas between them"),
        (["--interpolate=3", "--classes=cat,dog", "--num=3"], "--num=3: --interpolate=3 says how many images there are"),
        (["--interpolate=3", "--classes=random"], "give two or more as --classes"),
        (["--cfg=0", "--cfg_scales=1-2"], "--cfg=0: without guidance --cfg_scales and --cfg_schedule say nothing"),
        (["--ckpt=/missing"], "/missing: no such file or directory"),
        (["--top_p=2"], "--top_p=2: give a number of 0 to 1, or several with commas between them"),
        (["--cfg=1.5,high"], "--cfg=1.5,high: give a number of 0 or more"),
        (["--cfg=nan"], "--cfg=nan: give a number"),
        (["--top_k=1.5"], "--top_k=1.5: give a whole number"),
        (["--cfg=1.5,1.5"], "has a value twice"),
        (["--batch=0"], "--batch=0"),
        (["--seed=-1"], "--seed=-1: give a whole number from 0"),
        (["--out=/dev/null/a.png"], "/dev/null/a.png: /dev/null is a file and no folder: give another name"),
        (["--out=a.psd"], "a.psd: is to be a picture: give a name that ends in .png"),
        (["--cfg=1e38", "--num=1", "--classes=0"], "logits are not finite"),
        (["--cfg_scales=2-12"], "guided scales 2-12: the pyramid has"),
        (["--cfg_scales=all"], "--cfg_scales=all: give the first and the last guided scale"),
        (["--temperature=0"], "--temperature=0: give a number above 0"),
        (["--min_p=2"], "min_p=2.0: give a share from 0 to 1"),
        (["--best_of=2"], "--best_of=2 --judge=: give both"),
        (["--best_of=2", "--judge=gone.pth"], "--judge=gone.pth: no such file: give efflite0"),
        (["--best_of=2", "--judge=efflite0"], "--judge=efflite0: knows 1000 classes, the transformer 3"),
        (["--draft_scales=2"], "--draft_scales=2: give both, or neither"),
        (["--precision=half"], "precision 'half': give one of float32, tf32, bfloat16, float16"),
        (["--precision=tf32,float32"], "tf32 is a setting of the whole process"),
        (["--format=gif"], "invalid choice: 'gif'"),
        (["--out=/tmp/picture"], "/tmp/picture: is to be a picture: give a name that ends in .png"),
        (["--out=/tmp", "--format=npz"], "/tmp: is a directory"),
        (["--scan_backend=mamba_ssm"], "scan backend mamba_ssm"),
        pytest.param(
            ["--cuda_graph"],
            "--cuda_graph: needs a CUDA GPU, there is none: leave it out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_flags_get_one_line(flags, message, checkpoint, tmp_path, command):
    code, _, errors = command("--ckpt", checkpoint, "--out", tmp_path / "x.png", *flags)
    assert code != 0
    assert message in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_asked(checkpoint, tmp_path, command):
    target = tmp_path / "grid.png"
    target.write_text("mine")
    code, _, errors = command("--ckpt", checkpoint, "--out", target, "--classes=0")
    assert code == 1
    assert "is there already" in errors
    assert target.read_text() == "mine"
    assert command("--ckpt", checkpoint, "--out", target, "--classes=0", "--overwrite")[0] == 0


def test_a_tokenizer_is_no_transformer(checkpoint, tokenizer, tmp_path, command):
    code, _, errors = command("--ckpt", tokenizer, "--out", tmp_path / "x.png")
    assert code == 1
    assert "describes a tokenizer, not a transformer" in errors


def test_a_second_transformer_draws_the_fine_scales(checkpoint, tmp_path, command):
    common = ["--ckpt", checkpoint, "--format=npz", "--num=3", "--precision=float32", "--seed=5"]
    pair = ["--refine_ckpt", checkpoint, "--draft_scales"]
    for name, words in (("alone", []), ("pair", [*pair, "2"])):
        code, _, errors = command(*common, *words, "--out", tmp_path / f"{name}.npz")
        assert code == 0, errors
    alone, both = (np.load(tmp_path / f"{name}.npz") for name in ("alone", "pair"))
    assert np.abs(alone["arr_0"].astype(int) - both["arr_0"]).max() <= 1  # of the same weights the same images
    settings = json.loads(str(both["settings"]))
    assert settings["refiner_sha256"] == settings["transformer_sha256"]
    code, _, errors = command(*common, *pair, "9", "--out", tmp_path / "beyond.npz")
    assert code == 1
    assert "9 drafted scales: the pyramid has" in errors
    assert not list(tmp_path.glob("*beyond*"))
    for name, about in (("names", {"class_names": ["a", "b", "c"]}), ("tokens", {"tokenizer_hash": f"{TOKENS}{'0' * 64}"})):
        with written_aside(tmp_path / name) as aside:
            known = replace(load_transformer(checkpoint).description, **about)
            save_model(aside, load_transformer(checkpoint), known)
        code, _, errors = command(
            *common, "--refine_ckpt", tmp_path / name, "--draft_scales=2", "--out", tmp_path / "beyond.npz"
        )
        assert code == 1
        assert {"names": "the first to differ, number 0", "tokens": "was trained on tokens of a tokenizer"}[name] in errors


def test_the_best_of_several_is_kept_and_told(checkpoint, tmp_path, command):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    judge = tmp_path / "resnet18.safetensors"
    write_tensors(judge, resnet18(num_classes=3).state_dict())
    words = ["--ckpt", checkpoint, "--format=npz", "--num=3", "--best_of=3", "--judge", judge, "--out", tmp_path / "best.npz"]
    code, _, errors = command(*words)
    assert code == 0, errors
    assert f"best of 3 by {judge}: " in errors
    assert "33% of all candidates are kept" in errors
    assert json.loads(str(np.load(tmp_path / "best.npz")["settings"]))["judge_sha256"] == sha256(judge)
