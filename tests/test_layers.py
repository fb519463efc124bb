import torch
from small_models import seeded

from models import layers
from models.layers import DropPath, FeedForward, Modulation, ModulationOffset, modulate


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


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(4000, 3, 2))
    assert (y == y[:, :1, :1]).all()
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(y.mean().item() - 1) < 0.05


def test_drop_path_does_nothing_in_evaluation():
    x = torch.ones(100, 2)
    assert torch.equal(DropPath(0.9).eval()(x), x)


def test_a_shared_modulation_leaves_the_precision_alone():
    """Under autocast it is half precision, and so must everything be that it modulates."""
    offset = ModulationOffset(4, 6)
    assert offset(torch.zeros(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert offset(torch.zeros(2, 24)).dtype == torch.float32
