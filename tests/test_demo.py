import json
import time

import numpy as np
import pytest
import torch
from commands import export_some, make_images, run_in_process, script

from utils.data.token_cache import TokenCache


@pytest.fixture(scope="module")
def demo():
    return script("demo")


def test_unigram_entropy_of_even_codes_is_the_logarithm_of_their_number(demo):
    class Split:
        def __init__(self, tokens):
            self.tokens = torch.tensor(tokens)
            self.manifest = type("Manifest", (), {"num_codes": 8})

        def __len__(self):
            return len(self.tokens)

        def gather(self, indices):
            return self.tokens[indices], None

    even = [[i % 8, (i + 1) % 8] for i in range(64)]
    assert demo.unigram_entropy(Split(even), Split(even)) == pytest.approx(np.log(8), abs=1e-6)
    one_code = [[3, 3]] * 5000
    assert demo.unigram_entropy(Split(one_code), Split(one_code)) < 0.01


def test_diversity_is_the_mean_distance_inside_a_class(demo):
    pixels = np.array([[0, 0], [3, 4], [7, 7], [7, 7]], np.float32)
    assert demo.diversity(pixels, np.array([0, 0, 1, 1])) == pytest.approx(2.5)


def test_samples_are_judged_beside_real_images(demo, tmp_path):
    root = make_images(tmp_path / "images", train=12, val=6)
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), 5)
    right = (rng.integers(0, 80, (15, 20, 20, 3)) + 80 * labels[:, None, None, None]).astype(np.uint8)
    for name, asked, expected in (("right", labels, 1.0), ("wrong", (labels + 1) % 3, 0.0)):
        np.savez(tmp_path / f"{name}.npz", arr_0=right, labels=asked)
        judged = demo.judge_samples(root, tmp_path / f"{name}.npz")
        assert judged["recognised_samples"] == expected
        assert judged["recognised_real"] == 1.0
    assert judged["diversity_real"] == pytest.approx(judged["diversity_samples"], rel=0.1)


def test_a_failing_step_ends_the_demo_with_its_name(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "export_fashion_mnist", lambda root: None)  # so there are no images
    code, _, errors = run_in_process(demo.main, ["--out", tmp_path], monkeypatch, capsys)
    assert code == 1
    assert "scripts/train_tokenizer.py ended with exit code 1" in errors


def command(path, text):
    path.write_text(text)
    return (path,)


def test_commands_side_by_side_are_told_apart(demo, tmp_path, capsys):
    one, other = command(tmp_path / "one.py", "print('first')"), command(tmp_path / "other.py", "print('second')")
    demo.run_together("two", {"one": one, "other": other})
    lines = capsys.readouterr().out.splitlines()
    assert {"one | first", "other | second"} <= set(lines)


def test_one_that_fails_stops_the_other(demo, tmp_path):
    one = command(tmp_path / "one.py", "import time; time.sleep(60)")
    other = command(tmp_path / "other.py", "raise SystemExit(3)")
    start = time.monotonic()
    with pytest.raises(ValueError, match="other.py ended with exit code 3: see its message above"):
        demo.run_together("two", {"one": one, "other": other})
    assert time.monotonic() - start < 30


def test_the_whole_demo_runs_and_writes_everything(demo, tmp_path, monkeypatch, capsys):
    """A few steps of everything; the figures are worth nothing, but all of them are there."""
    monkeypatch.setattr(demo, "NUM_SAMPLES", 80)
    monkeypatch.setattr(demo, "export_fashion_mnist", export_some)
    words = ["--out", tmp_path, "--tokenizer_minutes=0.03", "--transformer_minutes=0.03"]
    code, output, errors = run_in_process(demo.main, words, monkeypatch, capsys)
    assert code == 0, errors
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"reconstructions.png", "samples.png", "scales.png", "curves.png", "metrics.json"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"val_loss", "unigram_entropy", "recognised_samples", "recognised_real"} <= set(metrics)
    assert f"{metrics['recognised_real']:.1%} of real held-out images" in output
    assert f"FD-EffLite0          {metrics['fd_samples']:.1f} of 80 samples" in output
    assert min(metrics["fd_samples"], metrics["fd_reconstructions"]) > metrics["fd_real"] > 1
    assert len(TokenCache(tmp_path / "tokens", "train")) == 900
