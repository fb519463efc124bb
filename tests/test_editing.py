"""Editing: what is kept comes out as it was, whatever is drawn beside it."""

import numpy as np
import pytest
import torch
from commands import assert_refused, run_in_process
from PIL import Image
from small_models import SIDES, seeded, small_tokenizer, small_transformer

import sample
from models.editing import Kept, covered
from models.generate import generate
from models.pyramid import Pyramid
from utils.checkpoint import load_tokenizer
from utils.sampling.editing import Edited, centre_of, marked

PYRAMID = Pyramid(SIDES)


@pytest.fixture(scope="module")
def small():
    return small_tokenizer()


def an_image(small, count: int = 1):
    return torch.rand(count, 3, *small.config.image_shape, generator=seeded(5)) * 2 - 1


def a_box(small):
    """The lower right quarter."""
    height, width = small.config.image_shape
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[height // 2 :, width // 2 :] = True
    return mask


@pytest.mark.parametrize("family", ["mvar", "var", "markov", "markov-mamba"])
@pytest.mark.parametrize("smooth", [False, True])
def test_outside_of_the_mask_is_the_reconstruction(family, smooth, small):
    images, mask = an_image(small), a_box(small)
    kept = Kept.of(small, images, mask)
    made = generate(small_transformer(family), small, torch.tensor([1, 4]), smooth=smooth, generator=seeded(3), kept=kept)
    *_, features = small.quantizer.partial_sums(small.encode(images))
    redrawn = covered(mask, PYRAMID.shapes[-1])
    assert torch.equal(made.sums[-1][:, :, ~redrawn], features[:, :, ~redrawn].expand(2, -1, -1))
    assert ((made.sums[-1] - features)[:, :, redrawn].abs().amax(1) > 1e-3).float().mean() > 0.5
    plain = generate(small_transformer(family), small, torch.tensor([1, 4]), smooth=smooth, generator=seeded(3))
    assert not torch.equal(made.indices[-1], plain.indices[-1])


def test_tokens_are_drawn_where_they_cover_any_pixel_of_the_mask(small):
    kept = Kept.of(small, an_image(small), a_box(small))
    assert not kept.tokens[0].any()  # the one token of the first scale covers all
    for k, (height, width) in enumerate(PYRAMID.shapes):
        tokens = kept.tokens[k].view(height, width)
        assert tokens[: height // 2].all()
        assert not tokens[(height + 1) // 2 :, (width + 1) // 2 :].any()


@pytest.mark.parametrize("count", [1, 3])
def test_coarse_scales_that_are_kept_are_those_of_the_image(count, small):
    images = an_image(small)
    kept = Kept.of(small, images, keep_scales=count)
    made = generate(small_transformer(), small, torch.tensor([1, 4]), generator=seeded(3), kept=kept)
    for k, (ours, theirs) in enumerate(zip(made.indices, small.encode(images), strict=True)):
        assert torch.equal(ours, theirs.expand(2, -1)) == (k < count)
    for ours, theirs in zip(made.sums[:count], kept.sums[:count], strict=True):
        assert torch.equal(ours, theirs.expand(2, -1, -1, -1))


def test_a_model_sees_of_what_is_kept_what_it_would_see_of_the_image(small):
    """All but the last scale kept: its logits are those of the image's own tokens, so that the likeliest are drawn alike."""
    images, transformer = an_image(small), small_transformer()
    indices = small.encode(images)
    expected = transformer(torch.tensor([2]), small.teacher_inputs(indices))[:, PYRAMID.offsets[-2] :].argmax(-1)
    kept = Kept.of(small, images, keep_scales=len(SIDES) - 1)
    made = generate(transformer, small, torch.tensor([2]), guidance_scale=0, top_k=1, generator=seeded(3), kept=kept)
    assert torch.equal(made.indices[-1], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redrawn": torch.ones(3, 5, dtype=torch.bool)}, "a mask of 3x5: the images have"),
        ({"keep_scales": len(SIDES)}, f"{len(SIDES)} kept scales: the pyramid has {len(SIDES)}: give 0 to {len(SIDES) - 1}"),
        ({"keep_scales": -1}, "-1 kept scales"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, message, small):
    with pytest.raises(ValueError, match=message):
        Kept.of(small, an_image(small), **options)


def test_an_empty_mask_is_refused(small):
    with pytest.raises(ValueError, match="the mask is empty: nothing would be drawn anew"):
        Kept.of(small, an_image(small), torch.zeros(small.config.image_shape, dtype=torch.bool))


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    """A picture of 40 x 32 px, a mask with a white square, and one of another size."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = np.zeros((32, 40), np.uint8)
    mask[4:28, 20:36] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:16]).save(tmp_path / "small.png")
    return tmp_path / "photo.png"


@pytest.fixture
def command(monkeypatch, capsys, trained_var, tokenizer, tmp_path):
    common = ["--ckpt", trained_var, "--vae", tokenizer, "--num=3", "--out", tmp_path / "edited.png"]
    return lambda *arguments: run_in_process(sample.main, list(map(str, [*common, *arguments])), monkeypatch, capsys)


@pytest.mark.parametrize(
    "flags", [["--box=20,4,36,28"], ["--mask=MASK", "--outside"], ["--keep_scales=2"], ["--mask=MASK", "--paste", "--smooth"]]
)
def test_a_picture_is_edited(flags, picture, tmp_path, command):
    flags = [flag.replace("MASK", str(tmp_path / "mask.png")) for flag in flags]
    code, _, errors = command("--edit", picture, "--classes=0,2", *flags)
    assert code == 0, errors
    with Image.open(tmp_path / "edited.png") as made:
        assert made.size[0] > made.size[1]  # two rows of four: original, decoded and two drawn


def test_boxes_masks_and_pasted_pixels(picture, tokenizer, tmp_path):
    model = load_tokenizer(tokenizer)
    by_box = Edited.load(model, str(picture), "", "20,4,36,28", outside=False, keep_scales=0)
    by_mask = Edited.load(model, str(picture), str(tmp_path / "mask.png"), "", outside=False, keep_scales=0)
    beyond = Edited.load(model, str(picture), "", "20,4,36,28", outside=True, keep_scales=0)
    assert torch.equal(by_box.redrawn, by_mask.redrawn)
    assert torch.equal(by_box.redrawn, ~beyond.redrawn)
    height, width = model.config.image_shape
    inside = by_box.redrawn.float().mean().item()
    assert 0.3 < inside < 0.5  # 24 x 16 of the 32 x 32 in the middle
    images = torch.full((2, 3, height, width), 0.5)
    pasted = by_box.pasted(images)
    assert torch.equal(pasted[:, :, by_box.redrawn], images[:, :, by_box.redrawn])
    far = ~by_box.redrawn
    far[:, width // 4 :] = False
    assert far.any()
    assert torch.equal(pasted[:, :, far], by_box.original[:, :, far].expand(2, -1, -1))


@pytest.mark.parametrize("outside", [False, True])
def test_no_stroke_is_too_thin(outside, small):
    """Lines of one pixel in a picture of twenty times the size, of which the sides are cut off."""
    side, ratio = small.config.image_shape[0], 20
    drawn = np.zeros((side * ratio, side * ratio + 6), dtype=bool)
    drawn[37], drawn[:, 3 + 51] = True, True
    drawn[5 * ratio : 7 * ratio, 3 + 5 * ratio : 3 + 8 * ratio] = True
    cells = (drawn ^ outside)[:, 3:-3].reshape(side, ratio, side, ratio).any((1, 3))
    redrawn = marked(Image.fromarray(drawn.astype(np.uint8) * 255), small, outside)
    assert np.array_equal(redrawn.numpy(), cells)


def test_masks_smaller_than_the_images_are_enlarged(small):
    height, width = small.config.image_shape
    redrawn = marked(Image.fromarray(np.array([[0, 255], [0, 0]], np.uint8)), small)
    expected = torch.zeros(height, width, dtype=torch.bool)
    expected[: (height + 1) // 2, width // 2 :] = True
    assert torch.equal(redrawn, expected)


@pytest.mark.parametrize(
    ("size", "shape", "centre"),
    [
        ((96, 32), (16, 16), (32, 0, 64, 32)),
        ((32, 97), (16, 16), (0, 32, 32, 65)),
        ((40, 30), (16, 32), (0, 5, 40, 25)),
        ((50, 50), (8, 8), (0, 0, 50, 50)),
    ],
)
def test_the_centre_is_what_pictures_are_cut_to(size, shape, centre):
    assert centre_of(size, shape) == centre


def test_what_is_transparent_in_a_mask_is_not_drawn_anew(picture, tokenizer, tmp_path):
    """White strokes on a transparent ground, as painting programs export them."""
    model = load_tokenizer(tokenizer)
    with Image.open(tmp_path / "mask.png") as mask:
        Image.merge("LA", (Image.new("L", mask.size, 255), mask)).save(tmp_path / "strokes.png")
    painted, plain = (
        Edited.load(model, str(picture), str(tmp_path / name), "", outside=False, keep_scales=0).redrawn
        for name in ("strokes.png", "mask.png")
    )
    assert torch.equal(painted, plain)


def test_what_keeps_scales_or_pixels_alone_is_taken(picture, tokenizer, tmp_path, capsys):
    """Everywhere is drawn anew, but for coarse scales; or but for pixels, which are none of any token's."""
    model = load_tokenizer(tokenizer)
    coarse = Edited.load(model, str(picture), "", "4,0,36,32", outside=False, keep_scales=2)
    assert coarse.redrawn.all()
    assert coarse.kept.keeps_any
    assert capsys.readouterr().err == ""
    pixels = Edited.load(model, str(picture), "", "6,0,36,32", outside=False, keep_scales=0)
    assert not pixels.redrawn.all()
    assert not pixels.kept.keeps_any
    assert "--box=6,0,36,32: every token is drawn anew" in capsys.readouterr().err


def test_what_is_cut_off_of_a_mask_is_told(picture, tokenizer, tmp_path, capsys):
    model = load_tokenizer(tokenizer)
    for left, told in ((4, False), (3, True)):
        mask = Image.new("L", (40, 32), 0)
        mask.paste(255, (left, 0, 16, 32))
        mask.save(tmp_path / "left.png")
        Edited.load(model, str(picture), str(tmp_path / "left.png"), "", outside=False, keep_scales=0)
        assert ("left.png: what it marks outside of 4,0,36,32, the centre of " in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--box=1,1,2,2"], "--mask, --box, --outside, --keep_scales and --paste are of a picture: give it as --edit"),
        (["--edit=PHOTO"], "nothing of it would be kept: give --mask, --box or --keep_scales"),
        (["--edit=PHOTO", "--box=4,4,99,8"], "--box=4,4,99,8: does not lie in "),
        (["--edit=PHOTO", "--box=4,4,8"], "--box=4,4,8: give left, top, right and bottom in pixels, such as 8,8,24,24"),
        (["--edit=PHOTO", "--mask=SMALL"], "is of 40x16 px"),
        (["--edit=PHOTO", "--mask=SMALL", "--box=1,1,2,2"], "give one of both"),
        (["--edit=nowhere.png", "--box=1,1,2,2"], "nowhere.png: no such picture"),
        (["--edit=PHOTO", "--keep_scales=9"], "9 kept scales: the pyramid has "),
        (["--edit=PHOTO", "--box=1,1,9,9", "--format=npz"], "is for pictures: give --format=grid or scales"),
        (
            ["--edit=PHOTO", "--box=1,1,9,9", "--paste", "--format=scales"],
            "pixels are put back into whole images: give --format=grid",
        ),
        (["--edit=TEXT", "--box=1,1,9,9"], "not a readable image"),
        (["--edit=PHOTO", "--box=4,0,6,1", "--outside", "--keep_scales=-1"], "-1 kept scales"),
        (["--edit=PHOTO", "--box=0,0,9,9"], "--box=0,0,9,9: does not lie in 4,0,36,32, the centre that "),
        (["--edit=PHOTO", "--box=20,0,37,9", "--outside"], "--box=20,0,37,9: does not lie in 4,0,36,32, the centre that "),
        (["--edit=PHOTO", "--mask=EDGE"], "the mask is empty within 4,0,36,32, the centre that the picture is cut to"),
        (
            ["--edit=PHOTO", "--mask=EDGE", "--outside"],
            "the mask is empty within 4,0,36,32, the centre that the picture is cut to",
        ),
        (["--edit=PHOTO", "--mask=BLACK"], "the mask is empty: nothing would be drawn anew"),
        (["--edit=PHOTO", "--mask=BLACK", "--outside"], "black.png --outside: nothing of it would be kept: give less of it"),
        (["--edit=PHOTO", "--mask=WHITE"], "white.png: nothing of it would be kept: give less of it, or --keep_scales"),
        (["--edit=PHOTO", "--box=4,0,36,32", "--paste"], "--box=4,0,36,32: nothing of it would be kept: give less of it"),
    ],
)
def test_wrong_words_about_editing_are_refused(flags, message, picture, tmp_path, command):
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("L", (40, 32), 0).save(tmp_path / "black.png")
    Image.new("L", (40, 32), 255).save(tmp_path / "white.png")
    with Image.open(tmp_path / "black.png") as edge:
        edge.paste(255, (0, 0, 4, 32))
        edge.save(tmp_path / "edge.png")
    files = {"PHOTO": "photo", "SMALL": "small", "TEXT": "notes", "BLACK": "black", "WHITE": "white", "EDGE": "edge"}
    for name, file in files.items():
        flags = [flag.replace(name, str(tmp_path / f"{file}.png")) for flag in flags]
    code, _, errors = command(*flags)
    assert_refused(code, errors, message)
    assert not (tmp_path / "edited.png").exists()
