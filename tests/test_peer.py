import pytest
from commands import run_in_process, script
from small_models import small_tokenizer, small_transformer

from scripts.benchmarks import peer

benchmark = script("benchmark")


@pytest.fixture
def measure(monkeypatch, capsys):
    words = ["peer", "--depth=1", "--batches=1", "--threads=1", "--repeats=1"]
    return lambda checkout: run_in_process(benchmark.main, [*words, "--checkout", checkout], monkeypatch, capsys)


def test_a_folder_that_is_no_checkout_is_named(measure, tmp_path):
    code, _, errors = measure(tmp_path)
    assert code == 1
    assert f"--checkout={tmp_path}: no checkout of FoundationVision/VAR is there: give its directory" in errors


def test_a_checkout_that_does_not_run_ends_the_measurement(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(peer, "random_models", lambda *which: (small_transformer(), small_tokenizer()))
    models = tmp_path / "models"
    models.mkdir()
    (models / "var.py").write_text("")
    (models / "__init__.py").write_text("raise ImportError('another VAR')")
    code, _, errors = measure(tmp_path)
    assert code == 1
    assert "the checkout's process ended with exit code 1: see its message above" in errors
