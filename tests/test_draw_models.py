"""The pictures of the documentation: what is in them is asked of the models, and both are written."""

import pytest
from commands import run_in_process, script
from PIL import Image
from toy_mixer import FAMILY, KIND

from models.families import FAMILIES
from models.pyramid import Pyramid
from models.ssm import SCANS
from models.transformer import family_config

draw_models = script("draw_models")
PYRAMID = Pyramid.parse("256")
OURS = ("mvar", "var", "markov", "markov-mamba")  # without that of tests/toy_mixer.py


def test_every_kind_is_drawn_with_its_mixers_and_what_they_hand_on():
    blocks = draw_models.kinds(PYRAMID)
    assert list(blocks) == list(FAMILIES)
    parts = {family: [part.part for part in blocks[family]] for family in OURS}
    with_mamba, without = ["attention", "mamba", "feed-forward"], ["attention", "feed-forward"]
    assert parts == {"mvar": with_mamba, "var": without, "markov": without, "markov-mamba": with_mamba}
    states = {family: [part.state for part in blocks[family] if part.state] for family in OURS}
    scan = [("conv", "ssm")]
    assert states == {"mvar": scan, "var": [("keys", "values")], "markov": [], "markov-mamba": scan}


def test_windows_stand_where_the_kind_has_them():
    said = {family: draw_models.kinds(PYRAMID)[family][0].says for family in OURS}
    windows = ("attention", "its own scale", "7x7 windows on 13x13, 16x16")
    assert said == {
        "mvar": ("attention", "its own scale"),
        "var": ("attention", "all scales so far"),
        "markov": windows,
        "markov-mamba": windows,
    }
    larger = draw_models.kinds(Pyramid.parse("512"))
    assert "18x18" in larger["markov-mamba"][0].says[-1]
    assert "18x18" not in larger["markov"][0].says[-1]  # the last two only


def test_what_is_chosen_otherwise_is_drawn_otherwise():
    def said(family: str, **chosen: object) -> list[str]:
        config = family_config(family, 2, PYRAMID.sides, 10, **chosen)
        return [part.says[1] for part in draw_models.sub_layers(config)[:-1]]

    assert said("var", attended_scales=3) == ["the last 3 scales"]
    assert said("mvar", scan="within") == ["its own scale", "over its own scale"]
    assert set(draw_models.SCANNED) == set(SCANS)


def test_a_kind_that_is_added_is_drawn_too(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, FAMILY, KIND)
    blocks = draw_models.kinds(PYRAMID)
    (mixer, _) = blocks[FAMILY]
    assert (mixer.says, mixer.state) == (("runningmean",), ("total",))
    draw_models.draw_block(tmp_path / "block.png", blocks)
    with Image.open(tmp_path / "block.png") as picture:
        inches = draw_models.MARGIN + len(FAMILIES) * draw_models.COLUMN
        assert picture.width == pytest.approx(draw_models.DOTS_PER_INCH * inches, abs=1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn") / "docs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_models.cli, "parse", lambda *_: draw_models.DrawConfig(str(out)))
        draw_models.main()
    return out


@pytest.mark.parametrize("name", ["block.png", "flow.png"])
def test_both_pictures_are_written_small_and_not_empty(drawn, name):
    assert (drawn / name).stat().st_size < 150_000
    with Image.open(drawn / name) as picture:
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_another_place_is_refused_where_it_is_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").write_text("")
    code, _, errors = run_in_process(draw_models.main, ["--out", tmp_path / "docs"], monkeypatch, capsys)
    assert code == 1
    assert "is a file" in errors
