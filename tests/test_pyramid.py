import pytest

from models.pyramid import STANDARD_SIDES, Pyramid

SMALL = Pyramid((1, 2, (2, 3)))


def test_arithmetic_of_a_small_pyramid():
    assert SMALL.shapes == ((1, 1), (2, 2), (2, 3))
    assert SMALL.lengths == (1, 4, 6)
    assert SMALL.offsets == (0, 1, 5, 11)
    assert (SMALL.num_scales, SMALL.num_tokens) == (3, 11)
    assert SMALL.tokens(range(1, 3)) == slice(1, 11)
    assert SMALL.scale_ids().tolist() == [0] + [1] * 4 + [2] * 6


@pytest.mark.parametrize(("pixels", "num_tokens"), [(256, 680), (512, 2240), (1024, 9451), (64, 103), (32, 30)])
def test_tokens_of_the_standard_pyramids(pixels, num_tokens):
    assert Pyramid(STANDARD_SIDES[pixels]).num_tokens == num_tokens


def test_split_gives_every_scale_its_tokens():
    ids = SMALL.scale_ids()[None]
    assert [set(part[0].tolist()) for part in SMALL.split(ids)] == [{0}, {1}, {2}]
    assert [part.shape[1] for part in SMALL.split(ids[:, 1:], range(1, 3))] == [4, 6]


def test_lists_and_tuples_make_equal_pyramids():
    assert Pyramid([1, [2, 3]]) == Pyramid((1, (2, 3)))
    assert hash(Pyramid([1, [2, 3]])) == hash(Pyramid((1, (2, 3))))


@pytest.mark.parametrize("text", ["1_2_3_4", "1-2-3-4"])
def test_parse_of_sides(text):
    assert Pyramid.parse(text) == Pyramid((1, 2, 3, 4))
    assert str(Pyramid.parse(text)) == "1_2_3_4"


@pytest.mark.parametrize("pixels", STANDARD_SIDES)
def test_parse_of_an_image_size(pixels):
    assert Pyramid.parse(str(pixels)).sides == STANDARD_SIDES[pixels]


@pytest.mark.parametrize("text", ["", "1_x", "1,2", "1__2", "1_-2", "1.5"])
def test_parse_names_what_it_cannot_read(text):
    with pytest.raises(ValueError, match="give 256"):
        Pyramid.parse(text)


@pytest.mark.parametrize("sides", [(), (0,), (1, -2), (1, (2, 0)), (2, 1), ((1, 3), (2, 2))])
def test_impossible_pyramids(sides):
    with pytest.raises(ValueError, match="pyramid"):
        Pyramid(sides)


def test_ten_scales_mean_the_256_px_pyramid():
    assert Pyramid.standard(10).sides == STANDARD_SIDES[256]
    with pytest.raises(ValueError, match="7 scales"):
        Pyramid.standard(7)
