"""Editing: what is kept comes out as it was, whatever is drawn beside it."""

import pytest
import torch
from small_models import SIDES, seeded, small_tokenizer, small_transformer

from models.editing import Kept, covered
from models.generate import generate
from models.pyramid import Pyramid

PYRAMID = Pyramid(SIDES)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def an_image(tokenizer, count: int = 1):
    return torch.rand(count, 3, *tokenizer.config.image_shape, generator=seeded(5)) * 2 - 1


def a_box(tokenizer):
    """The lower right quarter."""
    height, width = tokenizer.config.image_shape
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[height // 2 :, width // 2 :] = True
    return mask


@pytest.mark.parametrize("family", ["mvar", "var", "markov", "markov-mamba"])
@pytest.mark.parametrize("smooth", [False, True])
def test_outside_of_the_mask_is_the_reconstruction(family, smooth, tokenizer):
    images, mask = an_image(tokenizer), a_box(tokenizer)
    kept = Kept.of(tokenizer, images, mask)
    made = generate(small_transformer(family), tokenizer, torch.tensor([1, 4]), smooth=smooth, generator=seeded(3), kept=kept)
    *_, features = tokenizer.quantizer.partial_sums(tokenizer.encode(images))
    redrawn = covered(mask, PYRAMID.shapes[-1])
    assert torch.equal(made.sums[-1][:, :, ~redrawn], features[:, :, ~redrawn].expand(2, -1, -1))
    assert ((made.sums[-1] - features)[:, :, redrawn].abs().amax(1) > 1e-3).float().mean() > 0.5
    plain = generate(small_transformer(family), tokenizer, torch.tensor([1, 4]), smooth=smooth, generator=seeded(3))
    assert not torch.equal(made.indices[-1], plain.indices[-1])


def test_tokens_are_drawn_where_they_cover_any_pixel_of_the_mask(tokenizer):
    kept = Kept.of(tokenizer, an_image(tokenizer), a_box(tokenizer))
    assert not kept.tokens[0].any()  # the one token of the first scale covers all
    for k, (height, width) in enumerate(PYRAMID.shapes):
        tokens = kept.tokens[k].view(height, width)
        assert tokens[: height // 2].all()
        assert not tokens[(height + 1) // 2 :, (width + 1) // 2 :].any()


@pytest.mark.parametrize("count", [1, 3])
def test_coarse_scales_that_are_kept_are_those_of_the_image(count, tokenizer):
    images = an_image(tokenizer)
    kept = Kept.of(tokenizer, images, keep_scales=count)
    made = generate(small_transformer(), tokenizer, torch.tensor([1, 4]), generator=seeded(3), kept=kept)
    for k, (ours, theirs) in enumerate(zip(made.indices, tokenizer.encode(images), strict=True)):
        assert torch.equal(ours, theirs.expand(2, -1)) == (k < count)
    for ours, theirs in zip(made.sums[:count], kept.sums[:count], strict=True):
        assert torch.equal(ours, theirs.expand(2, -1, -1, -1))


def test_a_model_sees_of_what_is_kept_what_it_would_see_of_the_image(tokenizer):
    """All but the last scale kept: its logits are those of the image's own tokens, so that the likeliest are drawn alike."""
    images, transformer = an_image(tokenizer), small_transformer()
    indices = tokenizer.encode(images)
    expected = transformer(torch.tensor([2]), tokenizer.teacher_inputs(indices))[:, PYRAMID.offsets[-2] :].argmax(-1)
    kept = Kept.of(tokenizer, images, keep_scales=len(SIDES) - 1)
    made = generate(transformer, tokenizer, torch.tensor([2]), guidance_scale=0, top_k=1, generator=seeded(3), kept=kept)
    assert torch.equal(made.indices[-1], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redrawn": torch.ones(3, 5, dtype=torch.bool)}, "a mask of 3x5: the images have"),
        ({"keep_scales": len(SIDES)}, f"{len(SIDES)} kept scales: the pyramid has {len(SIDES)}: give 0 to {len(SIDES) - 1}"),
        ({"keep_scales": -1}, "-1 kept scales"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        Kept.of(tokenizer, an_image(tokenizer), **options)


def test_an_empty_mask_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the mask is empty: nothing would be drawn anew"):
        Kept.of(tokenizer, an_image(tokenizer), torch.zeros(tokenizer.config.image_shape, dtype=torch.bool))
