import pytest
import torch
from small_models import seeded

from utils.losses.augment import augment, cut_out, recolour, translate


@pytest.fixture
def images():
    return torch.rand(6, 3, 16, 24, generator=seeded()) * 2 - 1


def test_every_image_is_changed_otherwise_and_the_same_seed_draws_the_same(images):
    same = images[:1].expand(6, -1, -1, -1)
    changed = augment(same, seeded(1))
    assert changed.shape == same.shape
    assert len({tuple(image.flatten().tolist()) for image in changed}) == 6
    assert torch.equal(changed, augment(same, seeded(1)))


def test_images_move_by_an_eighth_at_most_and_what_comes_in_is_zero():
    images = 1.0 + torch.arange(16 * 24.0).view(1, 1, 16, 24).expand(200, 3, -1, -1)
    moved = translate(images, seeded())
    seen = set()
    for image, original in zip(moved, images, strict=True):
        row, column = (image[0] > 0).nonzero()[0].tolist()
        shift = image[0, row, column] - 1 - (row * 24 + column)
        rows, columns = round(shift.item() / 24), round(shift.item() - 24 * round(shift.item() / 24))
        seen.add((rows, columns))
        inside = original[:, max(rows, 0) : 16 + rows, max(columns, 0) : 24 + columns]
        top, left = max(-rows, 0), max(-columns, 0)
        assert torch.equal(image[:, top : top + inside.shape[1], left : left + inside.shape[2]], inside)
        assert (image != 0).sum() == inside.numel()
    assert {rows for rows, _ in seen} == set(range(-2, 3))
    assert {columns for _, columns in seen} == set(range(-3, 4))


def test_a_square_of_half_a_side_is_cut_out(images):
    holes = (cut_out(torch.ones(200, 3, 16, 24), seeded()) == 0)[:, 0]
    assert holes.sum((1, 2)).max() == 8 * 12
    assert holes.sum((1, 2)).min() < 8 * 12  # some stick out
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), rows * columns)


def test_colours_change_by_what_is_published():
    grey = torch.full((500, 3, 8, 8), 0.25)
    changed = recolour(grey, seeded())  # no contrast and no colour to change
    assert torch.allclose(changed, changed[:, :1, :1, :1].expand_as(changed), atol=1e-6)
    assert -0.25 <= changed.min() < -0.23
    assert 0.73 < changed.max() <= 0.75


def test_gradients_come_back_to_the_places_that_are_seen(images):
    images.requires_grad_()
    augment(images, seeded()).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad != 0).any(dim=1).float().mean() > 0.3
