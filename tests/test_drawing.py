import pytest
import torch
from golden_weights import assert_near, facts, tensors
from small_models import seeded

from models.drawing import (
    Generators,
    _largest,
    draw_indices,
    draw_labels,
    exponential_noise,
    filter_logits,
    guide,
    mix_weights,
)

SAMPLING = tensors("sampling")
FILTERS = [tuple(case) for case in facts("sampling")["filters"]]


def drawn(logits: torch.Tensor, generator: Generators) -> torch.Tensor:
    return draw_indices(logits, exponential_noise(logits, generator))


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_golden_filters(top_k, top_p):
    golden = {kind: SAMPLING[f"k{top_k}_p{top_p:g}.{kind}"] for kind in ("keep", "probabilities", "samples")}
    logits = filter_logits(SAMPLING["logits"], top_k, top_p)
    assert torch.equal(logits.isfinite(), golden["keep"])
    probabilities = logits.softmax(dim=-1)[..., :: facts("sampling")["probability_stride"]]
    assert_near(probabilities, golden["probabilities"], 1e-6)
    assert torch.equal(drawn(logits, seeded(11)), golden["samples"])


@pytest.mark.parametrize("temperature", facts("sampling")["temperatures"])
def test_golden_gumbel_weights(temperature):
    logits = filter_logits(SAMPLING["logits"], 10, 0.96) * 1.5
    weights = mix_weights(logits, temperature, exponential_noise(logits, seeded(13)))
    assert_near(weights, SAMPLING[f"gumbel.{temperature:g}"], 1e-3)
    assert_near(weights.sum(dim=-1), torch.ones(3, 7), 1e-5)


# --- filters ------------------------------------------------------------------------------------------------------------


def test_ties_with_the_last_kept_logit_stay():
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [True, True, True, True, False]


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert filter_logits(torch.arange(5.0), top_k=9).isfinite().all()


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert filter_logits(logits, top_p=0.4).isfinite().sum() == 1
    assert filter_logits(logits, top_p=0.6).isfinite().sum() == 2
    assert filter_logits(logits, top_p=0.9).isfinite().sum() == 3
    assert filter_logits(logits, top_p=1e-9).isfinite().tolist() == [True, False, False, False]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (3, 0.0), (0, 0.9)])
def test_min_p_keeps_what_is_at_least_so_likely_as_the_likeliest(top_k, top_p):
    logits = torch.tensor([0.5, 0.3, 0.14, 0.06]).log() + 7  # not normalised
    kept = torch.isfinite(filter_logits(logits, top_k, top_p))
    assert torch.isfinite(filter_logits(logits, top_k, top_p, min_p=0.27)).tolist() == [True, True, bool(kept[2]), False]
    assert torch.isfinite(filter_logits(logits, top_k, top_p, min_p=0.3)).tolist() == [True, True, False, False]


def test_filters_leave_their_argument_alone():
    logits = torch.arange(5.0)
    filter_logits(logits, top_k=2, top_p=0.5)
    assert torch.equal(logits, torch.arange(5.0))


def filtered_by_sorting(logits: torch.Tensor, top_k: int, top_p: float, stable: bool) -> torch.Tensor:
    """The released filter: the whole vocabulary is sorted."""
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[..., -1:], -torch.inf)
    ascending, order = logits.sort(dim=-1, stable=stable)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


@pytest.mark.parametrize("num_values", [0, 1, 9, 60])
@pytest.mark.parametrize("top_k", [0, 1, 7, 64, 100, 700, 2000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.96, 1.0])
def test_sorting_the_largest_is_sorting_all(top_k, top_p, num_values):
    """With and without ties, also more of them with the k-th largest than are sorted. On GPUs, where sorting is stable, nothing
    may depend on values; the mask that they use is compared too."""
    logits = 3 * torch.randn(2, 5, 1024, generator=seeded(top_k))
    if num_values:
        logits = (logits / 20 * num_values).round() / num_values * 20
    assert torch.equal(filter_logits(logits, top_k, top_p), filtered_by_sorting(logits, top_k, top_p, stable=False))
    keep, _ = _largest(logits, top_k, top_p)
    assert torch.equal(keep, filtered_by_sorting(logits, top_k, top_p, stable=True).isfinite())


@pytest.mark.parametrize("num_codes", [7, 24, 4096])
def test_indices_are_those_of_multinomial(num_codes):
    """So are the random numbers that it takes, from one generator or from one for each image."""
    logits = filter_logits(torch.randn(3, 5, num_codes, generator=seeded()), top_k=num_codes // 2)
    probabilities = logits.softmax(dim=-1)
    ours, theirs = seeded(4), seeded(4)
    expected = torch.multinomial(probabilities.flatten(0, 1), 1, replacement=True, generator=theirs).view(3, 5)
    assert torch.equal(drawn(logits, ours), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())
    each = [torch.multinomial(part, 1, True, generator=seeded(n))[:, 0] for n, part in enumerate(probabilities)]
    assert torch.equal(drawn(logits, [seeded(n) for n in range(3)]), torch.stack(each))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_filter_and_draw_as_before():
    logits = torch.randn(3, 5, 4096, generator=seeded()).cuda()
    filtered = filter_logits(logits, 900, 0.96)
    assert torch.equal(filtered, filtered_by_sorting(logits, 900, 0.96, stable=False))
    generators = [torch.Generator("cuda").manual_seed(1) for _ in range(2)]
    expected = torch.multinomial(filtered.softmax(dim=-1).flatten(0, 1), 1, replacement=True, generator=generators[0])
    assert torch.equal(drawn(filtered, generators[1]), expected.view(3, 5))


def test_guidance_of_no_strength_is_the_conditional_half():
    logits = torch.randn(4, 3, 5, generator=seeded())
    assert torch.equal(guide(logits, 0.0), logits[:2])
    assert_near(guide(logits, 2.0), 3 * logits[:2] - 2 * logits[2:], 1e-6)


def test_drawn_labels_are_classes_and_never_no_class():
    labels = draw_labels(3, 1000, seeded())
    assert sorted(labels.unique().tolist()) == [0, 1, 2]
    assert torch.equal(labels, draw_labels(3, 1000, seeded()))
