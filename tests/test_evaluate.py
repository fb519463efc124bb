import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import make_tokenizer, run_in_process, script
from forked import run_forked
from PIL import Image

from models.tokenizer import TokenizerConfig
from utils.checkpoint import load_tokenizer
from utils.metrics.bias import coverage_of_the_same
from utils.metrics.distances import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
from utils.metrics.features import Features
from utils.metrics.reconstruction import reconstruct
from utils.metrics.similarity import psnr

evaluate = script("evaluate")


class SmallExtractor:
    """Mean, spread and other sums of an image instead of a network's features, fast and easy to follow."""

    name = "efflite0"
    distance_name = "FD-EffLite0"
    kernel_name = "KD-EffLite0"
    score_name = "IS-EffLite0"
    dim = 5
    num_classes = 7
    spatial_dim = 0
    fingerprint = published = "small"
    device = torch.device("cpu")
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))

    def __call__(self, images):
        pixels = images.float() / 255
        colours = pixels.mean((1, 2))
        pooled = torch.stack([*colours.T, pixels.std((1, 2, 3)), pixels[:, 0].mean((1, 2))], dim=1)
        return Features(pooled, pooled @ self.weight)


class SpatialExtractor(SmallExtractor):
    """With spatial features, as Inception has them."""

    name = "inception"
    distance_name = "FID"
    kernel_name = "KID"
    score_name = "Inception score"
    spatial_dim = 3
    published = "another"

    def __call__(self, images):
        return super().__call__(images)._replace(spatial=images[:, 0, 0].float() / 255)


class BrokenExtractor(SmallExtractor):
    """NaN for images whose first pixel is white."""

    def __call__(self, images):
        features = super().__call__(images)
        return features._replace(pooled=features.pooled.where(images[:, 0, 0, :1] != 255, torch.nan))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: SmallExtractor())


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Called with file names in the test's folder, with EfficientNet-Lite0 unless told otherwise.

    Gives exit code, output, and errors without the progress bar.
    """

    def call(*words):
        words = [tmp_path / word if str(word).split(".")[0] in NAMES else word for word in words]
        if not any(str(word).startswith("--extractor") for word in words):
            words.append("--extractor=efflite0")
        code, output, errors = run_in_process(evaluate.main, words, monkeypatch, capsys)
        return (
            code,
            output,
            "".join(line for line in errors.splitlines(keepends=True) if line.strip() and "image/s" not in line),
        )

    return call


NEED_IMAGES = ("KID", "KD-EffLite0", "KID std", "KD-EffLite0 std", "precision", "recall", "density", "coverage")
NAMES = ("samples", "real", "other", "statistics", "scores", "picture", "pictures", "none")


def some_images(count: int, seed: int = 0, brightness: int = 256, height: int = 8, width: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = rng.integers(0, brightness // 2, (count, 1, 1, 3))
    return (means + rng.integers(0, brightness // 2, (count, height, width, 3))).astype(np.uint8)


def stored_scores(tmp_path, column: str = "samples") -> dict:
    return json.loads((tmp_path / "scores.json").read_text())["scores"][column]


def by_statistics_alone(scores: dict) -> dict:
    return {name: None if name in NEED_IMAGES else value for name, value in scores.items()}


def save(tmp_path, **sets):
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)


def features_of(images: np.ndarray) -> Features:
    return SmallExtractor()(torch.from_numpy(images))


# --- scores -------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_features(tmp_path, small, command):
    made, real = some_images(37, seed=1, brightness=180), some_images(50)
    save(tmp_path, samples=made, real=real)
    words = ["samples.npz", "real.npz", "--json", "scores.json", "--batch=8", "--k=2", "--split=20", "--subset=30"]
    code, shown, errors = command(*words)
    assert (code, errors) == (0, "")
    ours, theirs = features_of(made), features_of(real)
    distance = frechet_distance(*moments(ours.pooled), *moments(theirs.pooled))
    precision, recall = precision_recall(theirs.pooled, ours.pooled, 2)
    score = inception_score(ours.logits.softmax(1), 20)
    stored = json.loads((tmp_path / "scores.json").read_text())
    found = stored["scores"]["samples"]
    assert (found["images"], found["reference images"]) == (37, 50)
    assert found["FD-EffLite0"] == pytest.approx(distance, rel=1e-4)
    assert found["IS-EffLite0"] == pytest.approx(score, rel=1e-5)
    assert (found["precision"], found["recall"]) == (precision, recall)
    assert (found["KD-EffLite0"], found["KD-EffLite0 std"]) == kernel_distance(ours.pooled, theirs.pooled, 30)
    assert (found["density"], found["coverage"]) == density_coverage(theirs.pooled, ours.pooled)
    assert (stored["settings"]["k"], stored["settings"]["batch"], stored["pixels"]) == (2, 8, [8, 8])
    assert stored["extractor"] == {"name": "efflite0", "weights_sha256": "small"}
    for name, value in found.items():
        exact = f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.6f}"
        assert any(line.startswith(f"{name} ") and exact.rstrip("0").rstrip(".") in line for line in shown.splitlines())


def test_a_set_is_at_no_distance_from_itself(tmp_path, small, command):
    save(tmp_path, samples=some_images(20))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(some_images(20)):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    assert command("samples.npz", "pictures", "--json=" + str(tmp_path / "scores.json"))[0] == 0
    found = stored_scores(tmp_path)
    assert found["FD-EffLite0"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1, 1)


def test_real_images_are_scored_beside_the_samples(tmp_path, small, command):
    made, real, other = some_images(30, seed=1, brightness=120), some_images(40, seed=2), some_images(30, seed=3)
    save(tmp_path, samples=made, real=real, other=other)
    code, shown, errors = command("samples.npz", "real.npz", "--real", "other.npz", "--json", "scores.json")
    assert (code, errors) == (0, "")
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert list(scores) == ["samples", "real"]
    assert shown.splitlines()[0].split() == ["samples", "real"]
    expected = frechet_distance(*moments(features_of(other).pooled), *moments(features_of(real).pooled))
    assert scores["real"]["FD-EffLite0"] == pytest.approx(expected, rel=1e-4)
    assert scores["real"]["FD-EffLite0"] < scores["samples"]["FD-EffLite0"]


def test_halves_of_the_reference_are_scored_beside_the_samples(tmp_path, small, command):
    save(tmp_path, samples=some_images(30, seed=1), real=some_images(41))
    code, shown, _ = command("samples.npz", "real.npz", "--halves", "--json", "scores.json")
    assert code == 0
    halves = stored_scores(tmp_path, "real, halves")
    assert (halves["images"], halves["reference images"]) == (20, 21)
    assert 0 < halves["FD-EffLite0"] < 1


def test_statistics_give_the_same_distance_and_need_images_for_the_rest(tmp_path, small, command):
    save(tmp_path, samples=some_images(30, seed=1), real=some_images(40))
    code, shown, errors = command("stats", "real.npz", "--out", "statistics.npz")
    assert (code, errors) == (0, "")
    assert "statistics of 40 images of 8x8 pixels" in shown
    for reference in ("real", "statistics"):
        code, shown, errors = command("samples.npz", f"{reference}.npz", "--json", f"scores.{reference}.json")
        assert (code, errors) == (0, "")
    lines = [line.split(maxsplit=1) for line in shown.splitlines()]
    assert ["precision", "needs images"] in lines
    assert ["coverage", "needs images"] in lines
    assert "statistics.npz holds statistics alone: KD-EffLite0, precision, recall, density and coverage need" in shown
    by_images, by_statistics = (
        json.loads((tmp_path / f"scores.{name}.json").read_text())["scores"]["samples"] for name in ("real", "statistics")
    )
    assert by_statistics["precision"] is by_statistics["recall"] is None
    assert by_statistics == by_statistics_alone(by_images)


def test_what_few_images_do_to_scores_is_shown_and_stored(tmp_path, small, command):
    save(tmp_path, samples=some_images(8, seed=1), real=some_images(40))
    code, shown, errors = command("samples.npz", "real.npz", "--halves", "--json", "scores.json")
    assert (code, errors) == (0, "")
    stored = json.loads((tmp_path / "scores.json").read_text())
    biases = stored["biases"]
    assert list(biases) == ["FD-EffLite0", "IS-EffLite0", "precision", "recall", "density", "coverage"]
    for name, bias in biases.items():
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{name}: {bias['says']}"))
        assert line in stored["notes"]
        assert list(bias["by"]) == ["samples", "real, halves"]
        assert (", by about" in line) == (name not in ("precision", "recall", "density"))
    assert biases["FD-EffLite0"]["by"]["samples"] > biases["FD-EffLite0"]["by"]["real, halves"] > 0
    assert biases["coverage"]["by"]["samples"] == pytest.approx(coverage_of_the_same(40, 8) - 1)
    assert "KD-EffLite0: not biased, however few the images" in shown.splitlines()


def save_classes(tmp_path, brightnesses: dict[str, int]) -> None:
    """samples.npz with labels 0, 1, ... and class folders in pictures/, where each class has a brightness of its own."""
    made = np.concatenate([some_images(7, seed, bright, 8, 8) // 2 + bright // 2 for seed, bright in enumerate((60, 230))])
    np.savez(tmp_path / "samples.npz", arr_0=made, labels=np.repeat([0, 1], 7))
    for number, (name, bright) in enumerate(brightnesses.items()):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i, image in enumerate(some_images(6, 10 + number, bright) // 2 + bright // 2):
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "pictures" / name / f"{i}.png")


def test_each_class_is_scored_by_itself(tmp_path, small, command, monkeypatch):
    """What was drawn for day is as dark as night, and the other way round."""
    save_classes(tmp_path, {"day": 230, "night": 60})
    words = ["samples.npz", "pictures", "--by_class", "--json", "scores.json"]
    code, shown, errors = command(*words)
    assert (code, errors) == (0, "")
    stored = json.loads((tmp_path / "scores.json").read_text())["by_class"]
    assert list(stored["classes"]) == ["day", "night"]
    for name, row in stored["classes"].items():
        assert (row["images"], row["reference images"], row["recognised"], row["real recognised"]) == (7, 6, 0, 1)
        (line,) = (line.split() for line in shown.splitlines() if line.startswith(name))
        assert line[1:4] == ["7", "6", f"{row['KD-EffLite0']:.4f}"]
    assert (stored["recognised"], stored["real_recognised"]) == (0, 1)
    assert "recognised, all classes: 0.0000 of the samples, 1.0000 of the real images" in shown
    monkeypatch.setattr(evaluate, "SHOWN_CLASSES", 1)
    shown = command(*words, "--overwrite")[1]
    assert "(the 1 of 2 classes that are recognised least)" in shown
    assert "\nnight" not in shown


def test_samples_sorted_by_class_are_remarked_on(tmp_path, small, command):
    dark, bright = np.zeros((20, 8, 8, 3), np.uint8), np.full((20, 8, 8, 3), 250, np.uint8)
    real = some_images(40)
    mixed = np.stack([dark, bright], axis=1).reshape(40, 8, 8, 3)
    save(tmp_path, samples=np.concatenate([dark, bright]), other=mixed, real=real)
    remark = "they seem to be sorted by class"
    assert remark in command("samples.npz", "real.npz", "--split=20")[1]
    assert remark not in command("other.npz", "real.npz", "--split=20")[1]
    assert remark not in command("samples.npz", "real.npz")[1]


def test_the_real_network_tells_noise_from_pictures(tmp_path, command):
    y, x = np.mgrid[:32, :32]
    waves = [np.sin(x / (3 + i) + phase) + np.cos(y / (2 + i)) for i in range(6) for phase in (0, 1)]
    pictures = np.stack([(127 + 60 * wave)[..., None].repeat(3, axis=-1) for wave in waves]).astype(np.uint8)
    save(tmp_path, samples=some_images(12, height=32, width=32), real=pictures[::2], other=pictures[1::2])
    code, shown, errors = command("samples.npz", "real.npz", "--real", "other.npz", "--json", "scores.json")
    assert (code, errors) == (0, "")
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["samples"]["FD-EffLite0"] > 2 * scores["real"]["FD-EffLite0"] > 0
    assert "FID" not in shown


@pytest.fixture
def spatial(monkeypatch):
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: SpatialExtractor())


INCEPTION = ("--extractor=inception", "--json", "scores.json", "--overwrite")


def test_with_inception_there_is_a_distance_of_spatial_features(tmp_path, spatial, command):
    made, real = some_images(30, seed=1, brightness=120), some_images(40)
    save(tmp_path, samples=made, real=real)
    code, shown, errors = command("samples.npz", "real.npz", "--halves", *INCEPTION)
    assert (code, errors) == (0, "")
    names = ["images", "reference images", "FID", "sFID", "KID", "KID std", "Inception score"]
    names += ["precision", "recall", "density", "coverage"]
    assert [line[:18].strip() for line in shown.splitlines()[1:12]] == names
    assert "the weights are not those published for FID" in shown
    corners = [moments(images[:, 0, 0] / np.float32(255)) for images in (made, real)]
    assert stored_scores(tmp_path)["sFID"] == pytest.approx(frechet_distance(*corners[0], *corners[1]), rel=1e-4)
    assert 0 < stored_scores(tmp_path, "real, halves")["sFID"] < stored_scores(tmp_path)["sFID"]
    by_images = stored_scores(tmp_path)
    assert command("stats", "real.npz", "--out", "statistics.npz", "--extractor=inception")[0] == 0
    assert command("samples.npz", "statistics.npz", *INCEPTION)[0] == 0
    assert stored_scores(tmp_path) == by_statistics_alone(by_images)


def test_references_of_the_openai_evaluator_give_their_own_statistics(tmp_path, spatial, command):
    made, real = some_images(30, seed=1), some_images(40)
    save(tmp_path, samples=made)
    whole, corners = (
        moments(images) for images in (features_of(some_images(90, seed=3)).pooled, some_images(90)[:, 0, 0] / 255)
    )
    values = {"mu": whole[0], "sigma": whole[1], "mu_s": corners[0], "sigma_s": corners[1]}
    np.savez(tmp_path / "real.npz", arr_0=real, **values)
    code, shown, errors = command("samples.npz", "real.npz", *INCEPTION)
    assert (code, errors) == (0, "")
    ours = features_of(made).pooled
    found = stored_scores(tmp_path)
    assert found["FID"] == pytest.approx(frechet_distance(*moments(ours), *whole), rel=1e-4)
    assert found["sFID"] == pytest.approx(frechet_distance(*moments(made[:, 0, 0] / np.float32(255)), *corners), rel=1e-4)
    assert (found["precision"], found["recall"]) == precision_recall(features_of(real).pooled, ours)
    assert "reference images           unknown" in shown
    np.savez(tmp_path / "real.npz", mu=whole[0], sigma=whole[1])
    code, _, errors = command("samples.npz", "real.npz", *INCEPTION)
    assert code == 1
    assert "real.npz: statistics that do not say who made them" in errors
    assert command("samples.npz", "real.npz", "--any_statistics", *INCEPTION)[0] == 0
    assert stored_scores(tmp_path) == {**by_statistics_alone(found), "sFID": None}


def test_distances_may_be_in_float32(tmp_path, small, command):
    """Features of hundreds with differences of a hundredth: in float16 all distances are alike."""
    made, real = (np.full((30, 8, 8, 3), 200, np.uint8) for _ in range(2))
    made[:, :2], real[:, :2] = some_images(30, seed=1)[:, :2], some_images(30)[:, :2]
    save(tmp_path, samples=made, real=real)
    for words, dtype in (([], torch.float16), (["--float32"], torch.float32)):
        assert command("samples.npz", "real.npz", "--json", "scores.json", "--overwrite", *words)[0] == 0
        found = stored_scores(tmp_path)
        expected = precision_recall(features_of(real).pooled, features_of(made).pooled, dtype=dtype)
        assert (found["precision"], found["recall"]) == expected
        assert json.loads((tmp_path / "scores.json").read_text())["settings"]["float32"] == bool(words)


# --- reconstruction -----------------------------------------------------------------------------------------------------


def test_reconstructions_are_scored_against_their_originals(tmp_path, tokenizer, small, command):
    real = some_images(20, height=16, width=16)
    save(tmp_path, real=real)
    words = ["real.npz", "--vae", tokenizer, "--batch=8", "--json", "scores.json", "--out", "picture.png"]
    code, shown, errors = command("reconstruction", *words)
    assert (code, errors) == (0, "")
    decoded, indices = reconstruct(load_tokenizer(tokenizer), real)
    stored = json.loads((tmp_path / "scores.json").read_text())
    found = stored["scores"]
    expected = frechet_distance(*moments(features_of(decoded).pooled), *moments(features_of(real).pooled))
    assert list(found) == ["images", "rFD-EffLite0", "PSNR", "SSIM", "LPIPS"]
    assert found["images"] == 20
    assert found["rFD-EffLite0"] == pytest.approx(expected, rel=1e-3)
    assert found["PSNR"] == pytest.approx(psnr(torch.from_numpy(real), torch.from_numpy(decoded)).mean().item(), abs=1e-3)
    assert -1 < found["SSIM"] < 1
    for name in ("rFD-EffLite0", "PSNR", "SSIM"):
        assert any(line.split() == [name, f"{found[name]:.4f}"] for line in shown.splitlines())
    assert list(stored["codes"]) == ["1x1", "2x2", "3x3", "4x4", "all"]
    assert stored["codes"]["4x4"]["used"] == len(indices[3].unique())
    assert stored["codes"]["4x4"]["share"] == len(indices[3].unique()) / stored["tokenizer"]["num_codes"]
    assert any(line.split()[:2] == ["4x4", str(len(indices[3].unique()))] for line in shown.splitlines())
    assert (stored["settings"]["vae"], stored["settings"]["batch"], stored["pixels"]) == (str(tokenizer), 8, [16, 16])
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.height < 2 * 70  # two rows of 64 pixels
        assert picture.width > 8 * 64


@pytest.fixture
def large_tokenizer(tmp_path):
    """Of images of 32 pixels."""
    return make_tokenizer(tmp_path / "tokenizer", TokenizerConfig((1, 2), 32, (1, 1, 1, 1, 1), 1, 32, 8))


def reconstruct_from_shell(tmp_path, command, tokenizer) -> tuple[str, dict]:
    """What is shown of nine images, and stored."""
    save(tmp_path, real=some_images(9, height=32, width=32))
    code, shown, errors = command("reconstruction", "real.npz", "--vae", tokenizer, "--json", "scores.json")
    assert code == 0, errors
    return shown, json.loads((tmp_path / "scores.json").read_text())


def test_lpips_is_the_mean_over_images(tmp_path, large_tokenizer, small, command, monkeypatch):
    monkeypatch.setattr(evaluate, "load_lpips", lambda device: (lambda a, b: torch.arange(len(a)).double(), ""))
    shown, stored = reconstruct_from_shell(tmp_path, command, large_tokenizer)
    assert stored["scores"]["LPIPS"] == pytest.approx((28 + 0) / 9)  # batches of 8 and of 1
    assert ["LPIPS", "3.1111"] in [line.split() for line in shown.splitlines()]


def test_lpips_that_cannot_be_had_is_no_error(tmp_path, large_tokenizer, small, command, monkeypatch):
    monkeypatch.setattr(evaluate, "load_lpips", lambda device: (None, "needs weights of AlexNet"))
    shown, stored = reconstruct_from_shell(tmp_path, command, large_tokenizer)
    assert ["LPIPS", "needs weights of AlexNet"] in [line.split(maxsplit=1) for line in shown.splitlines()]
    assert stored["scores"]["LPIPS"] is None
    assert "LPIPS needs weights of AlexNet" in stored["notes"]


def test_small_images_have_no_ssim_and_no_lpips(tmp_path, small, command):
    small_tokenizer = make_tokenizer(tmp_path / "tokenizer", TokenizerConfig((1, 2), 32, (1, 1, 1), 1, 32, 8))  # 8 px
    save(tmp_path, real=some_images(9))
    code, shown, _ = command("reconstruction", "real.npz", "--vae", small_tokenizer)
    assert code == 0
    lines = [line.split(maxsplit=1) for line in shown.splitlines()]
    assert ["SSIM", "needs 11x11 pixels"] in lines
    assert ["LPIPS", "needs 31x31 pixels"] in lines


def test_images_of_a_data_set_are_resized_and_spread_evenly(images, tokenizer, small, command, monkeypatch):
    """Nine of 20x20 pixels in class folders; four of them come from all three."""
    seen = []
    measure_reconstruction = evaluate.measure_reconstruction
    monkeypatch.setattr(
        evaluate,
        "measure_reconstruction",
        lambda tokenizer, images, *_, **options: (
            seen.append((images, options["rows"])) or measure_reconstruction(tokenizer, images, *_, **options)
        ),
    )
    code, shown, _ = command("reconstruction", images / "val", "--vae", tokenizer, "--num=4")
    assert code == 0
    assert ["images", "4"] in [line.split() for line in shown.splitlines()]
    ((fitted, rows),) = seen
    assert (fitted.height, fitted.width) == (16, 16)
    assert [Path(fitted.whole.files.name(row)).parent.name for row in rows] == ["cat", "cat", "dog", "fox"]


# --- several ranks ------------------------------------------------------------------------------------------------------


def assert_nearly_equal(found: dict, expected: dict) -> None:
    """But for rounding, as sums are added in another order; singular covariances show it most."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        exactness = 1e-8 if "FD" in name else 1e-12
        assert found[name] == (value if value is None else pytest.approx(value, rel=exactness)), name


def test_two_ranks_give_the_scores_of_one(tmp_path, command):
    """27 images are four batches, two for each; 5 are one, so the second rank has none."""
    save(tmp_path, samples=some_images(27, seed=1), real=some_images(21), other=some_images(5, seed=2))
    words = ["samples.npz", "real.npz", "--real", "other.npz", "--batch=8", "--split=10", "--json", "scores.json"]
    words.append("--extractor=efflite0")
    assert command(*words)[0] == 0
    alone = json.loads((tmp_path / "scores.json").read_text())
    paths = [tmp_path / word if word.endswith((".npz", ".json")) else word for word in words]
    together = run_forked("scripts/evaluate.py", *paths, "--overwrite", ranks=2)
    assert together.returncode == 0, together.stderr
    shared = json.loads((tmp_path / "scores.json").read_text())
    assert (alone["ranks"], shared["ranks"]) == (1, 2)
    for column in ("samples", "real"):
        assert_nearly_equal(shared["scores"][column], alone["scores"][column])
    assert together.stdout.count("FD-EffLite0  ") == 1
    assert shared["notes"] == alone["notes"]


def test_two_ranks_reconstruct_what_one_does(tmp_path, tokenizer, command):
    save(tmp_path, real=some_images(21, height=20, width=16))
    words = ["reconstruction", "real.npz", "--vae", tokenizer, "--batch=8", "--num_images=19", "--json", "scores.json"]
    words.append("--extractor=efflite0")
    assert command(*words, "--out", "picture.png")[0] == 0
    alone, picture = json.loads((tmp_path / "scores.json").read_text()), (tmp_path / "picture.png").read_bytes()
    paths = [tmp_path / word if str(word).startswith(("real.", "scores.")) else word for word in words]
    together = run_forked("scripts/evaluate.py", *paths, "--out", tmp_path / "picture.png", "--overwrite", ranks=2)
    assert together.returncode == 0, together.stderr
    shared = json.loads((tmp_path / "scores.json").read_text())
    assert_nearly_equal(shared["scores"], alone["scores"])
    assert shared["codes"] == alone["codes"]
    assert (tmp_path / "picture.png").read_bytes() == picture


def test_a_bad_file_that_one_rank_finds_ends_both_with_one_line(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(some_images(20)):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    (folder / "17.png").write_bytes((folder / "17.png").read_bytes()[:120])
    out = tmp_path / "statistics.npz"
    words = ["scripts/evaluate.py", "stats", folder, "--out", out, "--batch=4", "--extractor=efflite0"]
    found = run_forked(*words, ranks=2, timeout=100)
    assert found.returncode != 0
    assert found.stderr.count("error: ") == 1
    assert "[rank 1]: error: " in found.stderr
    assert "17.png: not a readable image" in found.stderr
    assert not out.exists()


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["other.npz", "real.npz"],
            "other.npz: 9x8 pixels, {tmp}/real.npz: 8x8 pixels: only images of one size can be compared",
        ),
        (["real.npz", "samples.npz", "--real", "other.npz"], "real.npz: 8x8 pixels, {tmp}/other.npz: 9x8 pixels"),
        (["other.npz", "statistics.npz"], "other.npz: 9x8 pixels, {tmp}/statistics.npz: 8x8 pixels"),
        (["samples.npz", "real.npz", "--k=30"], "samples.npz: 30 images, k=30 neighbours need at least 31: give more"),
        (["real.npz", "samples.npz", "--k=30"], "samples.npz: 30 images, k=30 neighbours need at least 31: give more"),
        (["samples.npz", "real.npz", "--k=20", "--halves"], "real.npz: 40 images, halves and k=20 neighbours need at least 42"),
        (["samples.npz", "statistics.npz", "--halves"], "statistics.npz: statistics cannot be halved"),
        (["samples.npz", "real.npz", "--subset=31"], "samples.npz: 30 images, --subset=31 needs at least 31: give more"),
        (["samples.npz", "real.npz", "--subset=21", "--halves"], "real.npz: 40 images, halves and --subset=21 needs"),
        (["samples.npz", "statistics.npz", "--by_class"], "statistics.npz: statistics know no classes: give a reference of"),
        (["samples.npz", "real.npz", "--by_class"], "samples.npz: --by_class needs the classes of the images, in the array"),
        (["samples.npz", "none.npz"], "none.npz: no such file or folder"),
        (["pictures", "real.npz"], "pictures: no pictures"),
        (["samples.npz", "pictures"], "pictures: no pictures"),
        (["statistics.npz", "real.npz"], "statistics.npz: has mu float64 (5,), sigma float64 (5, 5)"),
        (["stats", "pictures", "--out", "scores.npz"], "pictures: no pictures"),
        (["stats", "real.npz", "--out", "pictures.npz"], "pictures.npz: is a directory: give --out the name of a file"),
        (["reconstruction", "none.npz", "--vae=none"], "none.npz: no such file or folder"),
        (["reconstruction", "real.npz", "--vae=none"], "none: no such file or directory; give a tokenizer"),
        (["reconstruction", "real.npz", "--vae=none", "--num=41"], "real.npz: 40 images, --num=41 needs at least 41"),
        (["reconstruction", "pictures", "--vae=none"], "pictures: no pictures"),
        (["reconstruction", "real.npz", "--vae=none", "--out", "statistics.png"], "statistics.png: is there already"),
        (
            ["stats", "real.npz", "--out", "statistics.npz"],
            "statistics.npz: is there already: give another --out, or --overwrite",
        ),
    ],
)
def test_input_that_cannot_be_scored_gets_one_line(tmp_path, small, command, words, message):
    save(tmp_path, samples=some_images(30, seed=1), real=some_images(40), other=some_images(30, width=9))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures.npz").mkdir()
    (tmp_path / "statistics.png").write_text("mine")
    assert command("stats", "real.npz", "--out", "statistics.npz")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    code, shown, errors = command(*words, *([] if words[0] == "stats" else ["--json", "scores.json"]))
    assert (code, shown) == (1, "")
    assert message.format(tmp=tmp_path) in errors
    assert errors.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["samples.npz", "statistics.npz", "--background=black"],
            "--background=black: shows through pictures of folders and data",
        ),
        (["samples.npz", "real.npz", "--image_column=x"], "--image_column=x: is of data sets, hf:..., and none is read"),
        (["pictures", "statistics.npz", "--array=x"], "--array=x: is of an .npz, and none is read: leave it out"),
        (["pictures", "real.npz", "--array=x"], "--array=x: no .npz has such an array: leave it out"),
        (["stats", "pictures", "--out", "none.npz", "--array=x"], "--array=x: is of an .npz, and none is read: leave it out"),
        (["stats", "real.npz", "--out", "none.npz", "--background=black"], "--background=black: shows through pictures"),
        (["reconstruction", "real.npz", "--vae=x", "--background=black"], "--background=black: shows through pictures"),
        (["samples.npz", "pictures", "--background=black", "--array=arr_0"], ""),
        (["pictures", "real.npz", "--array=arr_0"], ""),
    ],
)
def test_what_is_said_of_sets_that_are_not_read_is_refused(tmp_path, small, command, words, message):
    save(tmp_path, samples=some_images(30, seed=1), real=some_images(40))
    assert command("stats", "real.npz", "--out", "statistics.npz")[0] == 0
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(some_images(5)):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{number}.png")
    code, _, errors = command(*words)
    if not message:
        assert code == 0, errors
        return
    assert code == 1
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "none.npz").exists()


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pictures_one_of_them_cut(folder: Path) -> None:
    folder.mkdir()
    for i, image in enumerate(some_images(9, height=40, width=40)):
        Image.fromarray(image).save(folder / f"{i}.png")
    cut_in_half(folder / "7.png")


def statistics_with(path: Path, **changes) -> None:
    origin = {"extractor": "efflite0", "fingerprint": "small", "count": 9, "height": 40, "width": 40}
    np.savez(path, **({"mu": np.zeros(5), "sigma": np.eye(5)} | origin | changes))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.npz", lambda path: np.savez(path, np.zeros((9, 40, 40), np.uint8)), "has arr_0 uint8 (9, 40, 40): images are"),
        (
            "a.npz",
            lambda path: np.savez(path, np.zeros((9, 40, 40, 3), np.float32)),
            "has arr_0 float32 (9, 40, 40, 3): ",
        ),
        ("a.npz", lambda path: np.savez(path, some_images(3, height=40, width=40)), "3 images, k=3 neighbours need at least 4"),
        (
            "a.npz",
            lambda path: (np.savez(path, some_images(9)), cut_in_half(path)),
            "not a readable .npz (File is not a zip",
        ),
        ("a.npz", lambda path: path.mkdir(), "no pictures (.jpg, .jpeg, .png"),
        ("a", pictures_one_of_them_cut, "a/7.png: not a readable image (image file is truncated"),
        (
            "a.npz",
            lambda path: np.savez(path, labels=np.array([Trap(path.with_name("executed"))]), arr_0=some_images(9)),
            "labels holds pickled objects, which are not loaded",
        ),
        (
            "a.npz",
            lambda path: statistics_with(path, mu=np.array([Trap(path.with_name("executed"))] * 5)),
            "mu holds pickled objects, which are not loaded",
        ),
        ("a.npz", lambda path: statistics_with(path, extractor="inception"), "statistics of inception, not of efflite0"),
        ("a.npz", lambda path: statistics_with(path, fingerprint="other"), "made with other weights of efflite0"),
        ("a.npz", lambda path: statistics_with(path, mu=np.zeros(7)), "mean (7,) and covariance (5, 5) instead of 5 features"),
        (
            "a.npz",
            lambda path: statistics_with(path, mu=np.full(5, np.nan)),
            "has NaN or infinity: make these",
        ),
        ("a.npz", lambda path: statistics_with(path, sigma=np.full((5, 5), np.inf)), "has NaN or infinity"),
        ("a.npz", lambda path: statistics_with(path, count=np.zeros(3)), "described by more than single values"),
        ("a.npz", lambda path: path.write_text("image,label"), "not a readable .npz"),
    ],
)
def test_wrong_files_get_one_line_and_nothing_is_written(tmp_path, small, command, name, make, message):
    save(tmp_path, samples=some_images(9, height=40, width=40))
    make(tmp_path / name)
    (tmp_path / "scores.json").write_text("mine")
    for words in (["samples.npz", tmp_path / name], [tmp_path / name, "samples.npz"]):
        code, shown, errors = command(*words, "--json", "scores.json", "--overwrite")
        assert (code, shown) == (1, "")
        assert errors.count("\n") == 1
        if name == "a" or words[0] == "samples.npz":
            assert message in errors
        assert (tmp_path / "scores.json").read_text() == "mine"
    assert not (tmp_path / "executed").exists()


def test_nothing_is_executed_from_the_shell_either(tmp_path):
    np.savez(tmp_path / "trap.npz", arr_0=np.array([Trap(tmp_path / "executed")] * 9))
    save(tmp_path, real=some_images(9))
    found = run_forked("scripts/evaluate.py", tmp_path / "trap.npz", tmp_path / "real.npz", "--json", tmp_path / "scores.json")
    assert (found.returncode, found.stdout) == (1, "")
    assert "trap.npz: not a readable .npz (arr_0 holds pickled objects, which are not loaded)" in found.stderr
    assert found.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.npz", "trap.npz"]


def test_one_image_has_no_statistics(tmp_path, small, command):
    save(tmp_path, real=some_images(1))
    code, _, errors = command("stats", "real.npz", "--out", "statistics.npz")
    assert code == 1
    assert "real.npz: 1 image, a covariance needs at least 2: give more" in errors


def test_features_that_are_not_finite_name_their_set(tmp_path, monkeypatch, command):
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: BrokenExtractor())
    made = some_images(30, seed=1, brightness=120)
    made[20, 0, 0] = 255
    save(tmp_path, samples=made, real=some_images(40, brightness=120))
    code, shown, errors = command("samples.npz", "real.npz", "--json", "scores.json", "--batch=8")
    assert (code, shown) == (1, "")
    assert "samples.npz: features of images 16 to 23 are not finite" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "scores.json").exists()


def test_scores_are_not_overwritten_unasked(tmp_path, small, command):
    save(tmp_path, samples=some_images(30, seed=1), real=some_images(40))
    (tmp_path / "scores.json").write_text("mine")
    words = ["samples.npz", "real.npz", "--json", "scores.json"]
    code, _, errors = command(*words)
    assert code == 1
    assert "scores.json: is there already: give another --json, or --overwrite" in errors
    assert (tmp_path / "scores.json").read_text() == "mine"
    assert command(*words, "--overwrite")[0] == 0
    assert "scores" in json.loads((tmp_path / "scores.json").read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["samples.npz"], "the following arguments are required: reference"),
        (["samples.npz", "real.npz", "--real=a.npz", "--halves"], "--real=a.npz with --halves: both are scores of real images"),
        (["samples.npz", "real.npz", "--k=0"], "--k=0, --split=5000: give at least 1 each"),
        (["samples.npz", "real.npz", "--subset=1"], "--subset=1: give at least 2 images, or 0"),
        (["samples.npz", "real.npz", "--batch=-1"], "--batch=-1: give at least 1, or 0"),
        (["stats", "real.npz"], "the following arguments are required: --out"),
        (["stats", "real.npz", "--out=statistics.json"], "--out=statistics.json: statistics are an .npz"),
        (["reconstruction", "real.npz"], "the following arguments are required: --vae"),
        (["reconstruction", "real.npz", "--vae=none", "--num=1"], "--num=1: give at least 2 images, or 0 for all"),
        (["reconstruction", "real.npz", "--vae=none", "--out=a.txt"], "a.txt: is to be a picture"),
    ],
)
def test_wrong_flags_get_one_line(command, words, message):
    code, _, errors = command(*words)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
