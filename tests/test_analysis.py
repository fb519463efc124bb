"""Where attention goes: on attention whose answer is known, on uniform and windowed models, and from the command line."""

import json
import math

import pytest
import torch
from commands import assert_refused, make_images, run_in_process, script
from small_models import SIDES, random_indices, small_tokenizer, small_transformer

from models.attention import Attention
from models.pyramid import Pyramid
from models.ssm import Mamba2
from utils.analysis.attention import AttentionShares, AttentionTally, cost_shares, map_distances
from utils.analysis.history import RetentionTally, influence

PYRAMID = Pyramid(SIDES)


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("windowed", [(), (2, 3)])
def test_weights_are_those_that_attention_computes_with(history, normalize, windowed):
    if history and windowed:
        return
    torch.manual_seed(0)
    mixer = Attention(32, 2, PYRAMID, history, normalize, window=3, windowed_scales=windowed).requires_grad_(False)
    x = torch.randn(2, PYRAMID.num_tokens, 32)
    expected, _ = mixer(x, PYRAMID.scales)
    _, _, values = mixer._project(x)  # (B, H, L, D)
    outputs = torch.zeros(2, 2, PYRAMID.num_tokens, 16)
    for k, head, weights in mixer.weights(x, PYRAMID.scales):
        queries = PYRAMID.tokens(range(k, k + 1))
        keys = slice(0 if history else queries.start, queries.stop)
        outputs[:, head, queries] = weights @ values[:, head, keys]
    torch.testing.assert_close(mixer.proj(outputs.transpose(1, 2).flatten(2)), expected, rtol=1e-4, atol=1e-5)


def seen(transformer) -> AttentionTally:
    tally = AttentionTally(transformer)
    inputs = small_tokenizer().teacher_inputs(random_indices(PYRAMID))
    with tally.watching(), torch.no_grad():
        transformer(torch.tensor([1, 4]), inputs)
        transformer(torch.tensor([0, 2]), inputs)
    transformer(torch.tensor([1, 4]), inputs)  # not watched
    assert tally.images == 4
    return tally


@torch.no_grad()
def indifferent(family: str, **config):
    """A transformer whose queries are all alike, so that it attends to everything that it sees alike."""
    transformer = small_transformer(family, **config)
    for block in transformer.blocks:
        mixer = block.mixers[0]
        mixer.qkv.weight[: len(mixer.q_bias)] = 0
        mixer.q_bias.zero_()
    return transformer


@pytest.mark.parametrize(("family", "history"), [("var", True), ("mvar", False)])
def test_an_indifferent_model_is_uniform(family, history):
    shares = seen(indifferent(family)).shares()
    expected = AttentionShares.uniform(PYRAMID, PYRAMID.num_scales if history else 1)
    torch.testing.assert_close(shares.between, expected.between, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shares.inside, expected.inside, rtol=1e-5, atol=1e-6)
    lengths = PYRAMID.lengths
    own = [length / end if history else 1 for length, end in zip(lengths, PYRAMID.offsets[1:], strict=True)]
    assert shares.own_of_all == pytest.approx(
        sum(length * share for length, share in zip(lengths, own, strict=True)) / sum(lengths)
    )
    assert shares.own_by_scale == pytest.approx(sum(own[1:]) / (len(own) - 1))


def test_what_lies_outside_of_a_window_gets_nothing():
    """In a window of 3, moved inside at the borders, every query sees nine tokens, at most two rows away."""
    shares = seen(indifferent("markov", window=3, window_from=4)).shares()
    last = shares.in_windows(3)
    side = PYRAMID.sides[3]
    assert side > 3
    inner = (side - 2) ** 2 / side**2  # queries whose window is around them
    assert last[1] == pytest.approx(1 / 9, abs=1e-6)
    at_edge, corner = 4 * (side - 2) / side**2, 4 / side**2
    assert last[3] == pytest.approx(inner + at_edge * 6 / 9 + corner * 4 / 9, abs=1e-6)
    assert last[5] == pytest.approx(1, abs=1e-6)


def test_shares_of_attention_made_by_hand():
    """Scales of one token and of 2 x 2: the latter's queries give half to the first scale, and half to themselves."""
    pyramid = Pyramid((1, 2))
    between = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    inside = torch.tensor([[1.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
    shares = AttentionShares(pyramid, between, inside)
    assert shares.own_of_all == pytest.approx((1 + 4 * 0.5) / 5)
    assert shares.own_by_scale == 0.5
    assert shares.at_distance() == pytest.approx([(1 + 4 * 0.5) / 5, 0.5])
    assert shares.in_windows(1) == {1: 0.5, 3: 0.5}
    assert shares.figures()["windows"]["2x2"] == {1: 2.0, 3: 2.0}
    assert map_distances(1, 3).tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


def test_the_shares_of_the_cost():
    """M-VAR (arXiv 2411.10433, section 3.1) has 23.92 % and 30.32 % for what is 23.89 % and 30.34 % of all scores."""
    small, large = (cost_shares(Pyramid.parse(pixels)) for pixels in ("256", "512"))
    assert small["of_dense"] == pytest.approx(110_468 / 680**2)
    assert large["of_dense"] == pytest.approx(sum(length**2 for length in Pyramid.parse("512").lengths) / 2240**2)
    assert (small["of_dense"], large["of_dense"]) == pytest.approx((0.2392, 0.3032), abs=5e-4)
    assert round(small["of_causal"], 3) == 0.386


# --- history ------------------------------------------------------------------------------------------------------------


def test_what_a_scan_keeps_of_earlier_scales():
    transformer = small_transformer("mvar")
    with torch.no_grad():
        for block in transformer.blocks:
            mixer = block.mixers[1]
            assert isinstance(mixer, Mamba2)
            mixer.in_proj.weight[-mixer.ssm.heads :] = 0  # the same step for every token
            mixer.ssm.dt_bias.fill_(math.log(math.e - 1))  # of size 1
            mixer.ssm.A_log.fill_(math.log(0.1))
    tally = RetentionTally(transformer)
    with tally.watching(), torch.no_grad():
        transformer(torch.tensor([1, 4]), small_tokenizer().teacher_inputs(random_indices(PYRAMID)))
    ends = PYRAMID.offsets[1:]
    for k in PYRAMID.scales:
        for j in PYRAMID.scales:
            left = math.exp(-0.1 * (ends[k] - ends[j])) if j <= k else 0.0
            torch.testing.assert_close(tally.shares()[..., k, j], torch.full_like(tally.shares()[..., k, j], left))


@pytest.mark.parametrize(("family", "looks_back"), [("var", True), ("mvar", True), ("markov", False)])
def test_influence_comes_from_where_a_model_looks(family, looks_back):
    inputs = small_tokenizer().teacher_inputs(random_indices(PYRAMID))
    shares = influence(small_transformer(family), torch.tensor([1, 4]), inputs, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares), dtype=torch.float64))
    assert shares.triu(1).abs().sum() == 0  # nothing of what comes later
    assert (shares.tril(-1).sum() > 0) == looks_back


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    main = script("analyze_attention").main
    return lambda *arguments: run_in_process(main, list(map(str, arguments)), monkeypatch, capsys)


def test_the_command_writes_figures_and_a_picture(trained_var, images, tokenizer, tmp_path, command):
    words = ["--ckpt", trained_var, "--data_path", images, "--out", tmp_path / "out", "--num=5"]
    code, out, errors = command(*words)
    assert code == 0, errors
    assert "attention inside the own scale: " in out
    figures = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert figures["images"] == 5
    for row in figures["attention"]["between"]:
        assert sum(row) == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "out" / "attention.png").stat().st_size > 10_000
    code, _, errors = command(*words)
    assert_refused(code, errors, "attention.json: is there already: give another --out, or --overwrite")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num=0"], "--num=0: give at least 1"),
        (["--data_path=/nowhere"], "/nowhere"),
        (["--vae=/nowhere"], "/nowhere: no such file or directory"),
        (["--data_path=OTHER"], "the first to differ, number 0"),
    ],
)
def test_wrong_words_are_refused(flags, message, trained_var, images, tmp_path, command):
    if flags == ["--data_path=OTHER"]:
        flags = ["--data_path", make_images(tmp_path / "other", names=("ape", "owl", "yak"))]
    code, _, errors = command("--ckpt", trained_var, "--data_path", images, "--out", tmp_path / "out", *flags)
    assert_refused(code, errors, message)
    assert not (tmp_path / "out").exists()
