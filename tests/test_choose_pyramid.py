import re
import shlex

import pytest
from commands import ROOT, run_in_process, script

from models.pyramid import STANDARD_SIDES, Pyramid
from models.tokenizer import TOKENIZER_PRESETS

choose_pyramid = script("choose_pyramid")
choose, smooth_sides, Proposal = choose_pyramid.choose, choose_pyramid.smooth_sides, choose_pyramid.Proposal


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *words: run_in_process(choose_pyramid.main, words, monkeypatch, capsys)


def texts(choice) -> list[str]:
    return [str(proposal.pyramid) for proposal in choice.proposals]


@pytest.mark.parametrize(("pixels", "off"), [(32, 0), (64, 0), (256, 0), (512, 2), (1024, 1)])
def test_smooth_sides_come_close_to_the_standard_ones(pixels, off):
    """Those for 256 px are met exactly; of 512 px no side is missed by more than 2: 8, 11, 16, 23 for 9, 13, 18, 24."""
    standard = STANDARD_SIDES[pixels]
    sides = smooth_sides(len(standard), standard[-1])
    assert max(abs(ours - theirs) for ours, theirs in zip(sides, standard, strict=True)) == off


def test_smooth_sides_of_512_px():
    assert smooth_sides(10, 32) == (1, 2, 3, 4, 6, 8, 11, 16, 23, 32)  # published: 1_2_3_4_6_9_13_18_24_32


def test_smooth_sides_for_the_preset_of_32_px():
    assert smooth_sides(6, 8) == TOKENIZER_PRESETS["f4-32"].sides


@pytest.mark.parametrize("side", [2, 3, 7, 16, 33, 64])
def test_smooth_sides_grow_strictly_from_1_to_the_side(side):
    for num_scales in range(2, side + 1):
        sides = smooth_sides(num_scales, side)
        assert len(sides) == num_scales
        assert (sides[0], sides[-1]) == (1, side)
        assert all(before < after for before, after in zip(sides, sides[1:], strict=False))


def test_figures_of_the_published_pyramid():
    proposal = Proposal(Pyramid(STANDARD_SIDES[256]), "")
    assert proposal.growth == 4
    assert proposal.free_growth == (8 / 6) ** 2
    assert proposal.last_share == 256 / 680
    # lengths 1, 4, 9, 16, 25, 36, 64, 100, 169, 256; with all before them 1, 5, 14, 30, 55, 91, 155, 255, 424, 680
    assert proposal.mvar_attention == 1 + 16 + 81 + 256 + 625 + 1296 + 4096 + 10000 + 28561 + 65536
    assert proposal.var_attention == 1 + 20 + 126 + 480 + 1375 + 3276 + 9920 + 25500 + 71656 + 174080


def test_sides_that_grow_by_one_have_no_free_growth():
    assert Proposal(Pyramid((1, 2, 3, 4)), "").free_growth == 1


def test_published_pyramid_comes_first():
    choice = choose(16, 16)
    assert texts(choice) == ["1_2_3_4_5_6_8_10_13_16", "1_2_4_8_16", "1_2_3_4_6_8_11_16", "1_2_3_4_5_6_7_8_9_10_12_14_16"]
    assert choice.proposals[0].why == "as published for 256 px"
    assert choice.reference == choice.proposals[0]
    limits = [4, 2.5, 1.5]
    assert all(
        proposal.free_growth <= limit and proposal.why.endswith(f" {limit:g}")
        for proposal, limit in zip(choice.proposals[1:], limits, strict=True)
    )


def test_exactly_these_images_before_others_of_the_same_last_side():
    assert [proposal.why for proposal in choose(8, 4).proposals[:2]] == [
        "as in our preset f4-32",
        "as in our preset f8-64, /8, with the same last side",
    ]
    assert choose(8, 8).proposals[0].why == "as in our preset f8-64"
    assert choose(32, 8).proposals[0].why == "as published for 512 px, /16, with the same last side"


@pytest.mark.parametrize("pixels", STANDARD_SIDES)
def test_every_standard_pyramid_is_the_first_for_its_size(command, pixels):
    code, output, _ = command(pixels)
    assert code == 0
    assert output.splitlines()[2].startswith(f"{Pyramid(STANDARD_SIDES[pixels])} ")


def test_unknown_sizes_begin_with_what_grows_as_published():
    first = choose(20, 8).proposals[0]
    assert str(first.pyramid) == "1_2_3_4_5_6_8_10_13_16_20"
    assert first.free_growth <= 1.8
    assert first.why == "free growth of at most 1.8, as published for 256 px"


@pytest.mark.parametrize("tokens", [257, 300, 500, 680, 2000])
def test_tokens_are_the_most(tokens):
    choice = choose(16, 16, tokens=tokens)
    assert all(proposal.pyramid.num_tokens <= tokens for proposal in choice.proposals)
    num_scales = max(n for n in range(2, 17) if Pyramid(smooth_sides(n, 16)).num_tokens <= tokens)
    (most,) = [proposal for proposal in choice.proposals if proposal.pyramid.num_scales == num_scales]
    assert most.why == ("as published for 256 px" if tokens == 680 else f"the most scales that fit {tokens} tokens")
    assert str(choice.reference.pyramid) == "1_2_3_4_5_6_8_10_13_16"


def test_scales_as_asked_for():
    published, *others = choose(32, 16, scales=10).proposals
    assert published.why == "as published for 512 px"
    assert [(proposal.pyramid.num_scales, proposal.why) for proposal in others] == [
        (10, "10 scales, as asked for"),
        (9, "one scale less"),
        (11, "one scale more"),
    ]
    assert texts(choose(16, 16, scales=10))[0] == "1_2_3_4_5_6_8_10_13_16"


def test_a_handful_of_different_ones():
    """3 to 5, of which none comes twice; sides below 4 have fewer pyramids."""
    for side in range(2, 70):
        for limits in ({}, {"scales": 2}, {"scales": min(side, 64)}, {"tokens": side**2 + 1}, {"tokens": 2 * side**2}):
            choice = choose(side, 8, **limits)
            proposed = texts(choice)
            assert len(set(proposed)) == len(proposed) <= 5
            if side >= 4 and "tokens" not in limits:
                assert len(proposed) >= 3
            assert all(proposal.pyramid.sides[-1] == side and proposal.why for proposal in choice.proposals)
            if limits == {"tokens": side**2 + 1}:
                assert proposed == [f"1_{side}"]


def test_output(command):
    code, output, errors = command("256", "--tokens=500")
    assert (code, errors) == (0, "")
    table, legend, advice = output.split("\n\n")
    heading, titles, first, *_ = table.splitlines()
    assert heading == "256 px, 16 px per token: pyramids that end in 16x16 tokens"
    assert re.split("  +", titles) == list(choose_pyramid.TITLES)
    assert re.split("  +", first) == [
        *("1_2_3_5_7_11_16", "7", "465", "0.68", "4.00", "2.78", "55%", "0.52", "0.29", "the most scales that fit 500 tokens")
    ]
    assert "tokens over those of 1_2_3_4_5_6_8_10_13_16 (as published for 256 px)" in legend
    assert len(advice.splitlines()) == 1 + 3


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["256x128"], "images have to be square: the nearest that fits is 184 px"),
        (["512X384"], "images have to be square: the nearest that fits is 448 px"),
        (["100"], "side 100: no multiple of the downsampling, 8: the nearest that fits is 104 px"),
        (["99"], "the nearest that fits is 96 px"),
        (["333"], "side 333: no multiple of the downsampling, 16: the nearest that fits is 336 px"),
        (["8"], "side 8: a pyramid needs 2 tokens of 8 px: the nearest that fits is 16 px"),
        (["3"], "the nearest that fits is 16 px"),
        (["0x7"], "the nearest that fits is 16 px"),
        (["photo"], "side 'photo': give the side of square images in pixels, such as 256"),
        (["25.6"], "give the side of square images"),
        (["256", "--tokens=200"], "--tokens=200: two scales, 1_16, take 257: allow those or make tokens larger"),
        (["256", "--scales=17"], "--scales=17: 16x16 tokens are reached in 2 to 16 scales"),
        (["256", "--scales=1"], "--scales=1: 16x16 tokens are reached in 2 to 16 scales"),
        (["256", "--scales=10", "--tokens=300"], "takes 680 tokens: allow those or ask for at most 3 scales"),
        (["256", "--tokens=-1"], "--tokens=-1: give a number above 0"),
        (["256", "--downsampling=12"], "--downsampling=12: a tokenizer halves: give a power of 2"),
        (["256", "--tokens=many"], "invalid int value"),
        ([], "required: side"),
    ],
)
def test_what_is_refused(command, words, complaint):
    code, output, errors = command(*words)
    assert code != 0
    assert complaint in errors
    assert errors.count("\n") == 1
    assert output == ""


def test_the_nearest_that_fits_does(command):
    for words in ("100", "255", "264", "256x128", "5", "3000x2000"):
        _, _, errors = command(words)
        assert command(re.search(r"fits is (\d+) px", errors)[1])[0] == 0, words


def test_the_largest_images(command):
    """So many scales as are looked at are enough for every growth that a line may claim."""
    for proposal in choose(99999, 1).proposals:
        assert proposal.free_growth <= float(re.search(r"at most ([\d.]+)", proposal.why)[1])
    assert command("99999", "--downsampling=1")[0] == 0
    assert command("100000")[0] == 1


def test_a_square_may_be_given_by_both_sides(command):
    assert command("256x256") == command("256")


def test_the_commands_of_the_pages_run(command):
    texts = [(ROOT / "docs" / f"{page}.md").read_text() for page in ("faq", "own_images", "tokenizer")]
    for text in texts:
        lines = re.findall(r"python scripts/choose_pyramid.py ([^`\n]+)", text)
        assert lines
        assert all(command(*shlex.split(line))[0] == 0 for line in lines)
