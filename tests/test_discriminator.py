import pytest
import torch
from small_models import seeded

from models.discriminator import DiscriminatorConfig, PatchDiscriminator


def discriminator(**config) -> PatchDiscriminator:
    model = PatchDiscriminator(DiscriminatorConfig(**config))
    model.init_weights(seeded())
    return model


@pytest.mark.parametrize(("strided", "shape"), [(1, (8, 12)), (2, (4, 6)), (3, (2, 3))])
def test_there_is_a_judgement_for_every_patch(strided, shape):
    judged = discriminator(width=8, strided=strided)(torch.zeros(2, 3, 16, 24))
    assert judged.shape == (2, 1, *shape)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_judgement_depends_on_its_patch_alone(normalize):
    """Without norm; group norm lets the whole map in, but no other image."""
    model, images = discriminator(width=8, normalize=normalize), torch.rand(2, 3, 64, 64, generator=seeded())
    changed = images.clone()
    changed[0, :, -8:, -8:] = 0
    before, after = model(images), model(changed)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0, :, :8, :8], after[0, :, :8, :8]) == (not normalize)
    assert not torch.equal(before[0, :, -2:, -2:], after[0, :, -2:, -2:])


def test_judgements_start_neither_at_nothing_nor_far_away():
    judged = discriminator()(torch.rand(8, 3, 32, 32, generator=seeded()) * 2 - 1)
    assert 0.05 < judged.std() < 3


@pytest.mark.parametrize("normalize", [False, True])
def test_colours_are_learned_where_there_are_some(normalize):
    """Of grey images a gradient is grey, too, so a decoder is not driven to tints."""
    model, grey = discriminator(width=8, normalize=normalize), torch.rand(2, 1, 16, 16, generator=seeded()).repeat(1, 3, 1, 1)
    colourful = torch.rand(2, 3, 16, 16, generator=seeded())
    for images, is_grey in ((grey, True), (colourful, False)):
        images.requires_grad_()
        of_images, of_weights = torch.autograd.grad(model(images).square().sum(), [images, model.layers[0][0].weight])
        for gradient, differ in ((of_images, False), (of_weights, not is_grey)):
            apart = (gradient - gradient.mean(1, keepdim=True)).norm() / gradient.norm()
            assert (apart > 0.1) == differ, apart
            assert differ or apart < 1e-6


@pytest.mark.parametrize("config", [{"width": 0}, {"strided": 0}])
def test_impossible_sizes(config):
    with pytest.raises(ValueError, match="give at least 1 each"):
        DiscriminatorConfig(**config)
