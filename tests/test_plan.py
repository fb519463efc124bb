import math

import pytest

from utils.runs.plan import learning_rate_factor, progressive_stage, scale_groups, weight_decay


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("lin0", 0.0, 0.005),
        ("lin0", 0.01, (0.005 + 1) / 2),
        ("lin0", 0.02, 1.0),
        ("lin0", 0.02 + 0.98 * 0.04, 1.0),
        ("lin0", 0.02 + 0.98 * 0.525, 0.1 + 0.9 * 0.5),
        ("lin0", 1.0, 0.1),
        ("lin00", 0.51, 0.55),
        ("lin", 1.0, 0.1),
        ("cos", 0.51, 0.55),
        ("exp", 1.0, 0.1),
        ("exp", 0.02 + 0.98 * 0.575, math.sqrt(0.1)),
        ("lin0.5", 0.02, 1.0),
        ("lin0.5", 0.51, (1 + 0.55) / 2),
        ("lin0.5", 1.0, 0.1),
    ],
)
def test_learning_rate_schedules(schedule, progress, factor):
    assert learning_rate_factor(schedule, progress, warmup=0.02, start=0.005, end=0.1) == pytest.approx(factor)


def test_weight_decay_is_half_a_cosine():
    values = [weight_decay(progress, 0.05, 0.08) for progress in (0, 0.5, 1)]
    assert values == pytest.approx([0.05, 0.065, 0.08])


def test_without_progressive_training_all_scales_are_trained():
    assert progressive_stage(0.0, 10, until=0.0, first=4, warmup=0.02, stage_warmup=0.01) == (10, 1.0)


def test_progressive_training_adds_scales_one_by_one_and_fades_each_in():
    stages = [progressive_stage(i / 1000, 10, until=0.5, first=4, warmup=0.02, stage_warmup=0.01) for i in range(1001)]
    counts = [count for count, _ in stages]
    assert counts[0] == 5
    assert counts[500] == counts[-1] == 10
    assert all(later - earlier in (0, 1) for earlier, later in zip(counts, counts[1:], strict=False))
    new = next(i for i, count in enumerate(counts) if count == 6)
    weights = [weight for _, weight in stages[new : new + 11]]
    assert weights[0] < 0.2
    assert weights[-1] == 1.0
    assert stages[0][1] == 1.0
    assert stages[counts.index(10)][1] == 1.0  # as released, the last scale is not faded in


@pytest.mark.parametrize(
    ("mode", "num_scales", "large", "expected"),
    [
        ("together", 10, (8, 9), [range(10)]),
        ("each", 10, (8, 9), [range(9, 10), range(8, 9), range(8)]),
        ("each", 9, (8, 9), [range(8, 9), range(8)]),  # progressive training has not come to the last scale yet
        ("each", 4, (8, 9), [range(4)]),
        ("each", 4, (0, 1, 2, 3), [range(3, 4), range(2, 3), range(2)]),
        ("each", 2, (), [range(2)]),
    ],
)
def test_groups_of_scales_that_are_trained_in_one_step(mode, num_scales, large, expected):
    groups = scale_groups(mode, num_scales, large, step=0)
    assert groups == expected
    assert sorted(k for group in groups for k in group) == list(range(num_scales))


def test_drawn_groups_come_eight_to_one_to_one():
    drawn = [scale_groups("drawn", 10, (8, 9), step) for step in range(20)]
    assert all(len(groups) == 1 for groups in drawn)
    assert [drawn.count([group]) for group in (range(8), range(8, 9), range(9, 10))] == [16, 2, 2]
