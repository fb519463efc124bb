import torch
from small_models import seeded

from models import layers
from models.layers import FeedForward, Modulation, ModulationOffset, drop_paths, modulate


def test_flat_modulation_holds_all_gates_then_all_scales_then_all_shifts():
    width, parts = 4, 3
    flat = torch.arange(3 * parts).repeat_interleave(width).expand(2, -1)
    modulation = Modulation.from_flat(flat, parts)
    assert all(part.shape == (2, parts, 1, width) for part in modulation)
    assert modulation.gamma[0, :, 0, 0].tolist() == [0, 1, 2]
    assert modulation.scale[0, :, 0, 0].tolist() == [3, 4, 5]
    assert modulation.shift[0, :, 0, 0].tolist() == [6, 7, 8]


def test_modulate_normalises_each_token_before_scale_and_shift():
    x = 5 + 3 * torch.randn(2, 7, 64, generator=seeded())
    scale, shift = torch.full((2, 1, 64), 0.5), torch.full((2, 1, 64), 2.0)
    y = modulate(x, scale, shift)
    torch.testing.assert_close(y.mean(dim=-1), torch.full((2, 7), 2.0))
    torch.testing.assert_close(y.std(dim=-1, correction=0), torch.full((2, 7), 1.5))


def test_long_sequences_go_through_the_feed_forward_piece_by_piece(monkeypatch):
    ffn = FeedForward(8, 4).double()
    x = torch.randn(2, 23, 8, generator=seeded(1), dtype=torch.float64)
    whole = ffn(x)
    monkeypatch.setattr(layers, "MAX_PIECE", 10)
    torch.testing.assert_close(ffn(x), whole)


def test_drop_path_closes_gates_of_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    modulation = Modulation(torch.ones(4000, 3, 1, 2), torch.ones(1), torch.ones(1))
    gamma, scale, shift = drop_paths(modulation, 0.25)
    assert (gamma == gamma[..., :1]).all()
    assert set(gamma.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (gamma.mean(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    assert 0.5 < (gamma[:, 0] == gamma[:, 1]).float().mean() < 0.75  # 10/16: each sub-layer on its own
    assert scale is modulation.scale
    assert shift is modulation.shift


def test_a_shared_modulation_leaves_the_precision_alone():
    """Under autocast it is half precision, and so must everything be that it modulates."""
    offset = ModulationOffset(4, 6)
    assert offset(torch.zeros(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert offset(torch.zeros(2, 24)).dtype == torch.float32
