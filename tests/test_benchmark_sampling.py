import json

import pytest
import torch
from commands import run_in_process, script
from small_models import VARIANTS, small_tokenizer, small_transformer

from models.generate import state_bytes
from models.tokenizer import VQVAE, TokenizerConfig
from scripts.benchmarks import sampling
from scripts.benchmarks.released import decode

benchmark = script("benchmark")


def models(name: str):
    return small_transformer(**VARIANTS[name]).requires_grad_(False), small_tokenizer().requires_grad_(False)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_released_way_gives_the_same(name):
    transformer, tokenizer = models(name)
    sampling.check_equal(sampling.Ways(transformer, tokenizer, 3))  # raises where tokens, sums or images differ
    mamba = sampling.MambaWays(transformer, 4)
    if mamba.parts:
        ours, released = (torch.cat(outputs, dim=1) for outputs in (mamba.ours(), mamba.released()))
        assert ours.shape == (4, transformer.pyramid.num_tokens, 64)
        sampling.check_near("Mamba's outputs", ours, released)
    else:
        assert name.startswith(("var", "markov"))


def test_the_released_decoder_gives_the_same():
    """With all that the released one has: levels of other widths, attention and upsampling of large maps."""
    tokenizer = VQVAE(TokenizerConfig((1, 2, 8), channels=32, multipliers=(1, 1, 2), num_blocks=2)).requires_grad_(False)
    f_hat = torch.randn(17, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((tokenizer.decode_features(f_hat) + 1) / 2, decode(tokenizer, f_hat), atol=1e-5, rtol=0)


def test_a_difference_is_an_error(monkeypatch):
    transformer, tokenizer = models("mvar")
    ways = sampling.Ways(transformer, tokenizer, 3)
    with monkeypatch.context() as patch:
        patch.setattr(ways, "ours", sampling.Ways(small_transformer("mvar", heads=1), tokenizer, 3).ours)
        with pytest.raises(ValueError, match="agree in .* of the tokens: one of them is wrong"):
            sampling.check_equal(ways)
    with pytest.raises(ValueError, match="images of the two ways differ by 1.0e"):
        sampling.check_near("images", torch.zeros(2), torch.ones(2) * 1e-3)


def test_states_are_those_that_are_carried():
    for name, ours in (("var", 2 * 2 * 64), ("markov", 0)):
        transformer, _ = models(name)
        tokens = transformer.pyramid.num_tokens
        assert state_bytes(transformer, 6) == ours * 6 * tokens * 4
        assert sampling.released_state_bytes(transformer, 6) == ours * 6 * tokens * 4
    transformer, _ = models("mvar")
    assert state_bytes(transformer, 6) == 2 * 6 * (3 * (128 + 2 * 64) + 2 * 64 * 64) * 4
    assert sampling.released_state_bytes(transformer, 6) == 2 * 6 * transformer.pyramid.num_tokens * 64 * 4


def test_sampling_is_a_row_for_every_part(monkeypatch, capsys, tmp_path):
    words = ["sampling", "--family=mvar", "--depth=1", "--pn=1_2", "--batch=2", "--repeats=1"]
    words.append(f"--json={tmp_path / 'sampling.json'}")
    code, shown, errors = run_in_process(benchmark.main, words, monkeypatch, capsys)
    assert (code, errors) == (0, "")
    rows = json.loads((tmp_path / "sampling.json").read_text())["rows"]
    parts = ["transformer", "decoder", "whole image", "whole image"]
    assert [row["part"] for row in rows] == [*parts, "Mamba"]
    assert [row["batch"] for row in rows] == [2, 2, 2, 1, 2]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["released_seconds"] / row["ours_seconds"])
        assert row["sampled_per_second"] == pytest.approx(row["batch"] / row["ours_seconds"])
    assert shown.startswith("# Sampling\n")
    assert len([line for line in shown.splitlines() if line.startswith("| d1 |")]) == 5
