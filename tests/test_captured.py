import functools

import pytest
import torch
from small_models import VARIANTS, seeded, small_tokenizer, small_transformer

from models.captured import CapturedSampler
from models.drawing import exponential_noise
from models.generate import Cohort, SampledScales, SamplingConfig, decode_sampled, sample_scales

LABELS = torch.tensor([1, 4, 0])


def called_again(compute):
    """A capture for CPUs: computes again, into the same memory."""
    results = compute()

    def replay() -> None:
        for old, new in zip(flat(results), flat(compute()), strict=True):
            old.copy_(new)

    return replay, results


def flat(sampled: SampledScales) -> list[torch.Tensor]:
    return [*sampled.indices, *sampled.sums, sampled.finite]


def uncaptured(transformer, tokenizer, config, labels, generator) -> SampledScales:
    return sample_scales(transformer, tokenizer, labels, config, functools.partial(exponential_noise, generator=generator))


def models(name: str, device: str = "cpu"):
    return (model.requires_grad_(False).to(device) for model in (small_transformer(**VARIANTS[name]), small_tokenizer()))


def assert_same(captured: SampledScales, expected: SampledScales) -> None:
    for ours, theirs in zip(flat(captured), flat(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_fixed_memory_gives_what_sampling_gives(name, smooth):
    transformer, tokenizer = models(name)
    config = SamplingConfig(guidance_scale=3.0, top_k=20, top_p=0.9, smooth=smooth)
    sampler = CapturedSampler(transformer, tokenizer, config, len(LABELS), called_again)
    first = sampler(LABELS, seeded(1))
    second = sampler(LABELS.flip(0), [seeded(n) for n in range(3)])  # does not touch the first
    assert_same(first, uncaptured(transformer, tokenizer, config, LABELS, seeded(1)))
    assert_same(second, uncaptured(transformer, tokenizer, config, LABELS.flip(0), [seeded(n) for n in range(3)]))


def test_weights_that_give_no_numbers_show():
    transformer, tokenizer = models("mvar")
    sampler = CapturedSampler(transformer, tokenizer, SamplingConfig(), 1, called_again)
    assert sampler(LABELS[:1]).finite
    transformer.head.bias[0] = torch.inf
    assert not sampler(LABELS[:1]).finite


def test_a_graph_is_for_one_batch_size():
    sampler = CapturedSampler(*models("var"), SamplingConfig(), 3, called_again)
    with pytest.raises(ValueError, match="2 labels: this graph is for batches of 3"):
        sampler(LABELS[:2])


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA GPU, the models are on cpu"):
        CapturedSampler(*models("var"), SamplingConfig(), 3)


def test_models_that_do_not_fit_are_named():
    transformer, _ = models("var")
    with pytest.raises(ValueError, match="number of codes is 24, the tokenizer's 25"):
        CapturedSampler(transformer, small_tokenizer(num_codes=25), SamplingConfig(), 3, called_again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_graph_gives_what_sampling_gives(name, smooth):
    transformer, tokenizer = models(name, "cuda")
    config = SamplingConfig(guidance_scale=3.0, top_k=20, top_p=0.9, smooth=smooth)
    device = torch.device("cuda")
    cohorts = [Cohort.of([1] * 128, number, 5, device) for number in (0, 1)]
    sampler = CapturedSampler(transformer, tokenizer, config, 64)
    captured = [sampler(cohort.labels, cohort.generators) for cohort in cohorts]
    for ours, number in zip(captured, (0, 1), strict=True):
        cohort = Cohort.of([1] * 128, number, 5, device)
        expected = uncaptured(transformer, tokenizer, config, cohort.labels, cohort.generators)
        assert all(map(torch.equal, ours.indices, expected.indices))
        torch.testing.assert_close(ours.sums[-1], expected.sums[-1])
        assert decode_sampled(tokenizer, ours).isfinite().all()
