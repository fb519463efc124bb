import json
import shutil
import time

import numpy as np
import pytest
import torch
from commands import assert_refused, assert_same_training, make_images, run_in_process, script
from forked import Forked, run_forked
from golden_weights import tokenizer_weights
from PIL import Image
from safetensors.torch import load_file

from models.tokenizer import TOKEN_PARTS, TOKENIZER_PRESETS, TokenizerConfig
from utils.checkpoint import load_tokenizer
from utils.data.images import Images, read_folders
from utils.data.token_cache import fingerprint, is_of
from utils.metrics.reconstruction import reconstruct
from utils.metrics.similarity import psnr
from utils.plots import to_uint8
from utils.runs.checkpoints import checkpoint_path, checkpoints
from utils.runs.log import read_metrics

TINY = TokenizerConfig(sides=(1, 2, 4), channels=32, multipliers=(1, 1), num_blocks=1, num_codes=16, code_dim=4)  # 8 px
FLAGS = ["--preset=tiny", "--bs=6", "--max_steps=30", "--log_every=5", "--save_every=10", "--gan_width=8"]
NO_GAN = ["--gan=0", "--gan_width=64"]  # the default: there is nothing that could have another
SHORT = ["--preset=tiny", "--bs=6", "--gan=0", "--perceptual=0", "--workers=0", "--seed=0"]

MEANS = ["--scale_dropout=0.5", "--perturbation=0.3", "--matching=0.1", "--perceptual=0.1", "--perceptual_logits=0.01"]
BALANCE = ["--gan=0.5", "--gan_adaptive", "--diffaug", "--lecam=0.01", "--gan_norm", "--cosine", "--best=val_psnr", "--ema=0.9"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images", pixels=10)


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setitem(TOKENIZER_PRESETS, "tiny", TINY)
    return lambda *arguments: run_in_process(script("train_tokenizer").main, list(arguments), monkeypatch, capsys)


def test_training_improves_the_reconstruction_and_uses_the_codebook(images, tmp_path, command):
    code, _, errors = command(*FLAGS, "--restart_every=3", "--data_path", images, "--out", tmp_path)
    assert code == 0, errors
    validations = [entry for entry in read_metrics(tmp_path) if "val_psnr" in entry]
    assert [entry["step"] for entry in validations] == [10, 20, 30]
    assert validations[-1]["val_psnr"] > validations[0]["val_psnr"]
    assert validations[-1]["codes_used"] >= 8
    assert list(validations[-1]["val_perplexity"]) == ["1x1", "2x2", "4x4"]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.config == TINY
    assert [len(i[0]) for i in tokenizer.encode(torch.zeros(1, 3, 8, 8))] == [1, 4, 16]


@pytest.mark.parametrize("flags", [[], ["--fp16=1", *NO_GAN], ["--gan_from=0.5", "--gan_ramp=0.2"], MEANS, BALANCE], ids=str)
def test_a_stopped_run_goes_on_to_the_same_end(flags, images, tmp_path, command):
    def train(name):
        return command(*FLAGS, "--restart_every=3", *flags, "--keep=3", "--data_path", images, "--out", tmp_path / name)

    assert train("whole")[0] == 0
    assert train("stopped")[0] == 0
    for step in (20, 30):  # stopped at step 10, between two restarts of unused codes
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step_{step}")
    code, output, errors = train("stopped")
    assert code == 0, errors
    assert "resuming at step 10" in output
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_without_a_discriminator_goes_on_with_one(images, tmp_path, command):
    run = ["--data_path", images, "--out", tmp_path]
    assert command(*FLAGS, *run, *NO_GAN, "--max_steps=10")[0] == 0
    before = load_tokenizer(tmp_path)
    code, output, errors = command(*FLAGS, *run, "--gan=0.01", "--max_steps=12", "--lr=1e-6", "--keep=9")
    assert code == 0, errors
    assert "step_10 has no discriminator, which starts anew" in output
    assert "resuming at step 10" in output
    after = load_tokenizer(tmp_path)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-3 for a, b in pairs)  # not the initial weights
    assert (checkpoints(tmp_path)[-1] / "discriminator.safetensors").exists()


def test_the_discriminator_waits_for_its_time_and_learns_to_tell_images_apart(images, tmp_path, command):
    flags = ["--log_every=1", "--gan_from=0.5", "--gan_lr=1e-2"]
    code, _, errors = command(*FLAGS, *flags, "--data_path", images, "--out", tmp_path)
    assert code == 0, errors
    entries = [entry for entry in read_metrics(tmp_path) if "loss" in entry]
    judged = [entry for entry in entries if "discriminator_loss" in entry]
    assert [entry["step"] for entry in judged] == list(range(16, 31))
    assert {entry["grad_norm_discriminator"] for entry in entries[:15]} == {0.0}
    assert sum(entry["discriminator_loss"] for entry in judged[-5:]) < sum(entry["discriminator_loss"] for entry in judged[:5])
    assert judged[-1]["judged_real"] > judged[-1]["judged_made"]


def test_bfloat16_trains(images, tmp_path, command):
    code, _, errors = command(*FLAGS, "--max_steps=2", "--fp16=2", "--data_path", images, "--out", tmp_path)
    assert code == 0, errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path=/missing"], "/missing: no such directory"),
        (["--preset=huge"], "invalid choice: 'huge'"),
        (["--bs=0"], "--bs=0: give a number above 0"),
        (["--best=val_fd"], "--best=val_fd: it is measured with --val_fd alone"),
        (["--best=val_ssim"], "--best=val_ssim: validations have no such figure here"),  # of images of 8 pixels
        (["--gan_least=2", "--gan_adaptive"], "--gan_least=2.0 is above --gan_most=1.0"),
        (["--gan_features=dino"], "--gan_features=dino: needs --gan_weights and --gan_sha256"),
        (["--gan_features=dino", "--gan_weights=/missing", "--gan_sha256=0"], "/missing: no such file of weights"),
        (["--gan_weights=x"], "--gan_weights=x: is read with --gan_features=dino alone"),
        (["--gan_features=efflite0", "--gan=0"], "there is no discriminator at --gan=0"),
        (["--gan_features=efflite0", "--gan_layers=3"], "--gan_layers=3: there are heads of one kind on --gan_features"),
        (["--gan_layers=4"], "discriminator with 4 strided layers: 8 px can be halved 3 times: give less"),
        (["--gan_from=1"], "--gan_from=1.0: the discriminator would never begin"),
        (["--matching=1", "--vq=0"], "--matching=1.0: is within --vq, which is 0"),
        (["--lpips=1"], "--lpips: needs --lpips_weights and --lpips_sha256"),
        (["--refine=/missing"], "/missing: no such file or directory"),
        (["--refine=x", "--init_from=x"], "--refine says already where to start"),
        (["--refine=x", "--matching=1"], "--matching=1.0: would change tokens"),
        (["--refine=x", "--vq=1"], "--vq=1.0: codes stay what they are with --refine"),
        (["--pn=1_2_0"], "pyramid 1_2_0: every side must be at least 1"),
    ],
)
def test_wrong_flags_get_one_line(flags, message, images, tmp_path, command):
    code, _, errors = command(*FLAGS, "--data_path", images, "--out", tmp_path / "run", *flags)
    assert code != 0
    assert message in errors
    assert "Traceback" not in errors


def test_a_tokenizer_of_another_size_is_not_overwritten(images, tmp_path, command):
    assert command(*FLAGS, "--max_steps=1", "--data_path", images, "--out", tmp_path)[0] == 0
    code, _, errors = command(*FLAGS, "--preset=f8-32", "--data_path", images, "--out", tmp_path)
    assert code == 1
    assert "a tokenizer of other sizes is there" in errors


def test_a_run_of_other_images_is_not_gone_on_with(images, tmp_path, command):
    others = make_images(tmp_path / "others", pixels=10, names=["car", "ship"])
    words = [*FLAGS, *NO_GAN, "--max_steps=1", "--out", tmp_path / "run"]
    assert command(*words, "--data_path", images)[0] == 0
    code, _, errors = command(*words, "--data_path", others)
    assert_refused(code, errors, f"step_1: its data has 3 classes, --data_path={others} 2; the first to differ, number 0")


# --- two stages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file with released names, of the golden tokenizer for 16 px."""
    path = tmp_path_factory.mktemp("released") / "vae.pth"
    torch.save(tokenizer_weights("1234_qsr4"), path)
    return path


@pytest.fixture
def sized_images(released, tmp_path):
    pixels = load_tokenizer(released, (1, 2, 3, 4)).config.image_shape[0]
    return make_images(tmp_path / "images", pixels=pixels)


def assert_decoder_alone_changed(before, after):
    ours, theirs = before.state_dict(), after.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed
    assert {name.partition(".")[0] for name in changed} <= {"decoder", "after_quantizer"}
    assert not [name for name in changed if name.startswith(TOKEN_PARTS)]


def test_refining_changes_the_decoder_and_no_token(images, tmp_path, command):
    run = ["--data_path", images, "--out"]
    assert command(*FLAGS, "--max_steps=10", *run, tmp_path / "first")[0] == 0
    code, output, errors = command(*FLAGS, "--refine", tmp_path / "first", "--lr=1e-2", "--ema=0.9", *run, tmp_path / "refined")
    assert code == 0, errors
    assert "all of its tokens stay what they are" in output
    first, refined = load_tokenizer(tmp_path / "first"), load_tokenizer(tmp_path / "refined")
    assert_decoder_alone_changed(first, refined)
    pixels = torch.rand(20, 3, 8, 8) * 2 - 1
    assert all(torch.equal(*pair) for pair in zip(first.encode(pixels), refined.encode(pixels), strict=True))
    assert fingerprint(first) == fingerprint(refined)
    errors_of = [entry["val_psnr"] for run in ("first", "refined") for entry in read_metrics(tmp_path / run)[-1:]]
    assert errors_of[1] > errors_of[0]
    assert set(load_file(checkpoints(tmp_path / "refined")[-1] / "optimizer.safetensors")) == {
        f"{name}.{key}"
        for name, _ in refined.named_parameters()
        if name.startswith(("decoder", "after_quantizer"))
        for key in ("exp_avg", "exp_avg_sq", "step")
    }


def test_a_run_goes_on_with_the_start_that_it_has_alone(images, tmp_path, command):
    """Whatever else it is given, its log and config.json would say what is not so, and moments would be lost."""

    def run(out, steps, *flags):
        return command(*SHORT, f"--max_steps={steps}", "--data_path", images, "--out", tmp_path / out, *flags)

    first, other = tmp_path / "first", tmp_path / "other"
    assert run("first", 1)[0] == run("other", 1, "--seed=5")[0] == 0
    assert run("refined", 1, "--refine", first)[0] == run("begun", 1, "--init_from", first)[0] == 0
    for out, flags, message in [
        ("first", ["--refine", other], f"the run has no --refine, not {other}: resume without, or another --out"),
        ("first", ["--init_from", other], f"the run has no --init_from, not {other}: resume without"),
        ("refined", ["--refine", other], f"the run has --refine={first}, a tokenizer with hash "),
        ("refined", [], f"the run has --refine={first}, not none: resume with that"),
        ("begun", ["--init_from", other], f"the run has --init_from={first}, not {other}: resume with that"),
        ("begun", [], f"the run has --init_from={first}, not none"),
    ]:
        before = (tmp_path / out / "config.json").read_bytes()
        assert_refused(*run(out, 2, *flags)[::2], message)
        assert (tmp_path / out / "config.json").read_bytes() == before
    shutil.copytree(first, tmp_path / "copied")
    for out, flag in (("refined", "--refine"), ("begun", "--init_from")):
        for steps, start in enumerate((first, tmp_path / "copied"), start=2):
            code, output, errors = run(out, steps, flag, start)
            assert code == 0, errors
            assert f"resuming at step {steps - 1}" in output
    for place in ("first", "copied"):
        shutil.rmtree(tmp_path / place)
    assert run("begun", 4)[0] == 0  # which needs it no more


def test_a_cache_and_a_transformer_of_the_first_stage_go_on_with_the_second(images, tmp_path, monkeypatch, command, capsys):
    run = ["--data_path", images, "--out"]
    assert command(*FLAGS, "--max_steps=5", *run, tmp_path / "first")[0] == 0
    assert command(*FLAGS, "--max_steps=5", "--refine", tmp_path / "first", *run, tmp_path / "refined")[0] == 0
    words = ["--vae", tmp_path / "first", *run, tmp_path / "tokens"]
    assert run_in_process(script("cache_tokens").main, words, monkeypatch, capsys)[0] == 0
    import train

    def go_on(tokenizer, steps):
        words = ["--token_cache", tmp_path / "tokens", "--vae", tmp_path / tokenizer, "--local_out_dir_path", tmp_path / "run"]
        words += ["--depth=1", "--width=64", "--heads=1", "--bs=4", "--fp16=0", "--seed=0", f"--max_steps={steps}"]
        return run_in_process(train.main, words, monkeypatch, capsys)

    assert go_on("first", 1)[0] == 0
    code, output, errors = go_on("refined", 2)
    assert code == 0, errors
    assert "resuming at step 1" in output


def test_what_earlier_code_noted_of_a_tokenizer_is_still_known(images, tmp_path, command):
    from models.storage import weights_hash

    assert command(*FLAGS, "--max_steps=2", "--data_path", images, "--out", tmp_path)[0] == 0
    tokenizer = load_tokenizer(tmp_path)
    earlier = weights_hash(tokenizer, "normalize_lookup=False")
    now = fingerprint(tokenizer)
    assert is_of(earlier, tokenizer)
    assert is_of(now, tokenizer)
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias.add_(1)
    assert not is_of(earlier, tokenizer)
    assert is_of(now, tokenizer)
    with torch.no_grad():
        tokenizer.quantizer.phi[0].bias.add_(1)
    assert not is_of(now, tokenizer)


@pytest.mark.parametrize("how", ["--refine", "--init_from"])
def test_released_weights_go_through_training_and_come_out_under_their_names(
    how, released, sized_images, tmp_path, command, monkeypatch, capsys
):
    """Both ways: a released file is trained further, and what comes out is a file for the released code."""
    flags = ["--pn=1_2_3_4", "--bs=4", "--max_steps=3", "--gan_width=8", "--val_every=3", "--perceptual=0", "--diffaug=0"]
    flags += ["--gan_from=0", "--val_fd=0", "--best=val_psnr"]
    run = ["--data_path", sized_images, "--out", tmp_path / "run"]
    code, _, errors = command("--preset=f16-256", how, released, *flags, *run)
    assert code == 0, errors
    before, after = load_tokenizer(released, (1, 2, 3, 4)), load_tokenizer(tmp_path / "run")
    assert after.config == before.config
    if how == "--refine":
        assert_decoder_alone_changed(before, after)
    words = [tmp_path / "run", "--out", tmp_path / "out" / "vae.pth", "--released"]
    code, _, errors = run_in_process(script("export_checkpoint").main, words, monkeypatch, capsys)
    assert code == 0, errors
    exported = torch.load(tmp_path / "out" / "vae.pth", weights_only=True)
    golden = tokenizer_weights("1234_qsr4")
    assert {name: tensor.shape for name, tensor in exported.items()} == {name: tensor.shape for name, tensor in golden.items()}
    again = load_tokenizer(tmp_path / "out" / "vae.pth", (1, 2, 3, 4))
    assert all(torch.equal(*pair) for pair in zip(again.state_dict().values(), after.state_dict().values(), strict=True))


# --- what is seen and kept ----------------------------------------------------------------------------------------------


def test_the_best_checkpoint_stays_beside_the_newest(images, tmp_path, command):
    # the rate is far too high in the end, so that the first validation stays the best
    flags = ["--best=val_psnr", "--keep=1", "--val_every=5", "--save_every=5", "--lr=0.3", *NO_GAN]
    code, _, errors = command(*FLAGS, *flags, "--data_path", images, "--out", tmp_path)
    assert code == 0, errors
    scores = {entry["step"]: entry["val_psnr"] for entry in read_metrics(tmp_path) if "val_psnr" in entry}
    best = max(scores, key=scores.get)
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step_{best}"
    assert {path.name for path in checkpoints(tmp_path)} == {f"step_{best}", "step_30"}
    load_tokenizer(tmp_path / "checkpoints" / "best")
    assert json.loads((checkpoints(tmp_path)[-1] / "train_state.json").read_text())["best_step"] == best


def test_the_best_checkpoint_outlives_other_flags_and_is_of_one_figure(images, tmp_path, command):
    def go_on(steps, *flags):
        run = ["--keep=1", "--val_every=1", "--save_every=1", f"--max_steps={steps}", "--data_path", images, "--out", tmp_path]
        code, output, errors = command(*SHORT, "--restart_every=0", "--lr=1e-20", *run, *flags)  # nothing moves
        assert code == 0, errors
        link = tmp_path / "checkpoints" / "best"
        numbers = json.loads((link / "train_state.json").read_text())
        return output, link.resolve(strict=True).name, numbers

    _, best, numbers = go_on(2, "--best=val_psnr")
    assert (best, numbers["best_figure"], numbers["best_step"]) == ("step_1", "val_psnr", 1)
    assert go_on(3)[1] == "step_1"
    output, best, _ = go_on(4, "--best=val_psnr")
    assert best == "step_1"
    assert "best checkpoint" not in output
    output, best, numbers = go_on(5, "--best=val_perceptual")
    assert "the run so far kept the best checkpoint by val_psnr: from the next validation on" in output
    assert (best, numbers["best"]) == ("step_5", read_metrics(tmp_path)[-1]["val_perceptual"])
    assert go_on(6, "--best=val_perceptual")[1] == "step_5"
    shutil.rmtree(checkpoint_path(tmp_path, 5))
    output, best, _ = go_on(7, "--best=val_perceptual")
    assert "the best checkpoint so far, step_5, is gone" in output
    assert best == "step_7"


def test_validations_score_and_show_what_is_decoded(tmp_path, command, monkeypatch):
    monkeypatch.setitem(TOKENIZER_PRESETS, "small", TokenizerConfig((1, 2, 4), 32, (1, 1, 1), 1, 16, 4))  # 16 px
    images = make_images(tmp_path / "images", pixels=16)
    flags = ["--preset=small", "--bs=6", "--max_steps=2", "--gan=0", "--val_fd=6", "--resize=1"]
    code, _, errors = command(*flags, "--data_path", images, "--out", tmp_path / "run")
    assert code == 0, errors
    last = read_metrics(tmp_path / "run")[-1]
    assert last["val_fd"] > last["val_fd_real"] > 0
    assert -1 <= last["val_ssim"] <= 1
    assert 0 < last["val_perceptual"] < 2
    assert set(last["val_codes_used"]) == {"1x1", "2x2", "4x4"}
    # the mean over the images, as an evaluation has it, and not that of the mean error
    dataset = Images(read_folders(images)[1], 16, resize=1.0)
    originals = torch.stack([dataset[(i, i)][0] for i in range(len(dataset))])
    pixels = to_uint8((originals + 1) / 2)
    decoded, _ = reconstruct(load_tokenizer(tmp_path / "run"), pixels)
    assert last["val_psnr"] == pytest.approx(psnr(torch.from_numpy(pixels), torch.from_numpy(decoded)).mean().item(), abs=0.02)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert events.Tags()["images"] == ["reconstructions"]
    with Image.open(tmp_path / "run" / "pictures" / "reconstructions_2.png") as picture:
        assert picture.height > 4 * 64  # three reconstructions and the originals


# --- a bad day ----------------------------------------------------------------------------------------------------------


def test_constant_images_are_survived(tmp_path, command):
    images = make_images(tmp_path / "images", pixels=10)
    for path in images.rglob("*.png"):
        Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(path)
    code, _, errors = command(*FLAGS, "--restart_every=3", "--data_path", images, "--out", tmp_path / "run")
    assert code == 0, errors
    equal = 10 * np.log10(255**2 * 3 * 8 * 8)  # dB, as an evaluation counts images that nothing distinguishes
    assert 0 < read_metrics(tmp_path / "run")[-1]["val_psnr"] <= equal + 1e-3


def test_a_loss_that_is_not_finite_ends_the_run_with_the_reason(images, tmp_path, command, monkeypatch, capsys):
    module = script("train_tokenizer")
    monkeypatch.setattr(module.ImageReconstruction, "_fidelity_losses", lambda self, decoded, _: (decoded.sum() / 0, {}))
    words = [*FLAGS, "--data_path", images, "--out", tmp_path]
    code, _, errors = run_in_process(module.main, words, monkeypatch, capsys)
    assert code == 1
    assert "loss or gradient is not finite" in errors
    assert "lower --lr" in errors


def test_one_and_two_ranks_take_the_same_steps(images, tmp_path):
    """Without restarts, which draw from the main rank's images, but with the discriminator at an adaptive weight."""
    flags = ["--preset=f8-32", "--bs=4", "--max_steps=4", "--gan_from=0", "--gan_adaptive", "--restart_every=0", "--resize=1"]
    flags += ["--log_every=1", "--gan_width=8", "--data_path", images]
    for ranks in (1, 2):
        result = run_forked("scripts/train_tokenizer.py", *flags, "--out", tmp_path / str(ranks), ranks=ranks)
        assert result.returncode == 0, result.stderr
    one, two = (read_metrics(tmp_path / str(ranks)) for ranks in (1, 2))
    for name in ("loss", "gan_weight", "discriminator_loss", "grad_norm", "val_psnr"):
        ours, theirs = ([entry[name] for entry in entries if name in entry] for entries in (one, two))
        assert ours == pytest.approx(theirs, rel=2e-4), name


def test_restarted_codes_are_the_same_on_two_ranks(images, tmp_path):
    flags = ["--preset=f8-32", "--bs=4", "--max_steps=5", "--restart_every=1", "--gan_from=0", "--gan_width=8"]
    run = [*flags, "--data_path", images, "--out", tmp_path]
    result = run_forked("tests/two_tokenizers.py", *run, ranks=2)
    assert result.returncode == 0, result.stderr
    assert "the same tokenizer on both ranks" in result.stdout
    assert "the same discriminator on both ranks" in result.stdout
    assert "all codes have moved" in result.stdout


def test_a_killed_run_with_a_discriminator_ends_as_if_never_killed(images, tmp_path):
    flags = ["--preset=f8-32", "--bs=4", "--max_steps=12", "--save_every=2", "--gan_from=0", "--gan_width=8", "--lecam=0.01"]
    flags += ["--log_every=1", "--keep=9", "--data_path", images]

    def words(name):
        return ["scripts/train_tokenizer.py", *flags, "--out", tmp_path / name]

    assert run_forked(*words("whole")).returncode == 0
    for step in (2, 7):
        with Forked(*words("killed")) as command:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and command.is_running():
                log = tmp_path / "killed" / "metrics.jsonl"
                if log.exists() and log.read_text().count('"loss"') >= step:
                    break
                time.sleep(0.01)
            command.kill()
    assert run_forked(*words("killed")).returncode == 0
    assert_same_training(tmp_path / "whole", tmp_path / "killed")
