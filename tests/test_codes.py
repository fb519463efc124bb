import pytest
import torch

from models.pyramid import Pyramid
from utils.metrics.codes import CodeCounts, CodeUsage

PYRAMID = Pyramid((1, (2, 3)))  # 1 + 6 tokens


def maps(coarse: list[list[int]], fine: list[list[int]]) -> list[torch.Tensor]:
    return [torch.tensor(coarse), torch.tensor(fine)]


def test_usage_of_codes():
    even = CodeUsage.of(torch.tensor([5, 0, 5, 5, 5, 0, 0, 0]))
    assert (even.used, even.share) == (4, 0.5)
    assert even.perplexity == pytest.approx(4)
    uneven = CodeUsage.of(torch.tensor([3, 1]))
    assert uneven.perplexity == pytest.approx(4 / 27**0.25)
    rare = CodeUsage.of(torch.tensor([10**6, 100]))  # less than a thousandth of the share of equal codes
    assert rare.used == 1


def test_counts_of_steps_add_up_by_scale():
    counts = CodeCounts(PYRAMID, num_codes=8)
    counts.add(maps([[3], [3]], [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]))
    counts.add(maps([[5]], [[0, 1, 2, 3, 4, 5]]))
    assert counts.counts.tolist() == [[0, 0, 0, 2, 0, 1, 0, 0], [3, 3, 3, 3, 3, 3, 0, 0]]
    figures = counts.figures("train_")
    assert figures["train_codes_used"] == {"1x1": 2, "2x3": 6}
    assert figures["train_perplexity"] == pytest.approx({"1x1": 3 / 4 ** (1 / 3), "2x3": 6.0})
    assert counts.by_scale() == [CodeUsage.of(row) for row in counts.counts]
    assert counts.of_all() == CodeUsage.of(torch.tensor([3, 3, 3, 5, 3, 4, 0, 0]))


def test_counts_of_ranks_add_up_in_a_copy():
    counts = CodeCounts(PYRAMID, num_codes=4)
    counts.add(maps([[1]], [[0, 0, 0, 1, 1, 1]]))
    other = torch.tensor([[0, 0, 1, 0], [0, 0, 3, 3]])
    both = counts.over(lambda own: own + other)
    assert both.counts.tolist() == [[0, 1, 1, 0], [3, 3, 3, 3]]
    assert counts.counts.tolist() == [[0, 1, 0, 0], [3, 3, 0, 0]]
    alone = counts.over(lambda own: own)
    alone.add(maps([[1]], [[0, 0, 0, 1, 1, 1]]))
    assert counts.counts.tolist() == [[0, 1, 0, 0], [3, 3, 0, 0]]


def test_scales_without_tokens_are_left_out():
    counts = CodeCounts(PYRAMID, num_codes=4)
    assert counts.figures() == {"codes_used": {}, "perplexity": {}}
    counts.add([torch.tensor([[1]]), torch.empty(1, 0, dtype=torch.long)])
    assert counts.figures() == {"codes_used": {"1x1": 1}, "perplexity": {"1x1": 1.0}}


def test_maps_of_other_scales_are_refused():
    with pytest.raises(ValueError, match="zip"):
        CodeCounts(PYRAMID, num_codes=4).add([torch.tensor([[1]])])
