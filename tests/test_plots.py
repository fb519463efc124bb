import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from utils import plots


def test_images_are_rounded_to_bytes():
    values = torch.tensor([0.0, 0.5 / 255, 0.6 / 255, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert plots.to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255]


def test_a_grid_keeps_every_image_whole_and_in_its_place():
    rows = [np.full((3, 32, 32, 3), 10 * (i + 1), np.uint8) for i in range(2)]
    rows[1][2] = 99
    picture = np.asarray(plots.grid(rows, ["", ""]))
    margin = picture.shape[1] - 3 * 66
    assert (picture[:64, margin : margin + 64] == 10).all()
    assert (picture[66:130, margin + 2 * 66 : margin + 2 * 66 + 64] == 99).all()


def test_names_are_drawn_as_they_are_written_or_as_their_number():
    assert plots.drawable(["Müller", "été", "кошка", "猫"]) == ["Müller", "été", "кошка", "3"]


def test_curves_are_drawn(tmp_path):
    panel = {"title": "t", "x": "step", "y": "loss", "lines": {"train": [(1, 2.0), (2, 1.0)]}, "levels": {"best": 0.5}}
    plots.curves(tmp_path / "curves.png", [panel, panel])
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height


def test_a_name_has_one_colour_in_all_panels_which_stand_in_rows(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig

    def kept(figure, *words, **options):
        figures.append(figure)
        save(figure, *words, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    points = [(1, 2.0), (2, 1.0)]
    both = {"title": "t", "x": "step", "y": "", "lines": {"a": points, "b": points}}
    one = {"title": "t", "x": "step", "y": "", "lines": {"b": points}, "faint": {"b": points}, "log": True}
    words = {"title": "t", "x": "scale", "y": "", "lines": {"b": [("1x1", 1.0)]}, "dashed": {"known": [("2x2", 2.0)]}}
    plots.curves(tmp_path / "curves.png", [both, one, words], columns=2)
    first, second, third, empty = figures[0].axes
    colour = first.get_lines()[1].get_color()
    assert [line.get_color() for line in second.get_lines()] == [colour, colour]
    assert [line.get_color() for line in third.get_lines()] == [colour, "grey"]
    assert [text.get_text() for text in third.get_legend().get_texts()] == ["b", "known"]
    assert (first.get_yscale(), second.get_yscale(), empty.get_visible()) == ("linear", "log", False)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1210, 880)
