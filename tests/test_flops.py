import pytest
import torch
from small_models import SIDES, small_transformer
from torch.utils.flop_counter import FlopCounterMode

from models.attention import window_mask
from models.pyramid import STANDARD_SIDES
from models.transformer import family_config
from utils.flops import peak_flops, training_flops

# TFLOP per image of a 256 px training step, VAR / M-VAR / Markov, to two digits, counted independently of this repository.
KNOWN = {12: (0.39, 0.57, 0.36), 16: (0.90, 1.31, 0.85), 24: (2.93, 4.32, 2.82)}


def unseen_scores(depth: int) -> float:
    """TFLOP of a step for the scores that the windows of the two last scales hide: computed here, not counted there."""
    hidden = sum((~window_mask(side, side, 7)).sum().item() for side in (13, 16))
    return 3 * depth * 2 * 2 * 64 * depth * hidden / 1e12  # two products per score, heads * head_dim = 64 * depth


@pytest.mark.parametrize("depth", KNOWN)
@pytest.mark.parametrize("family", ["var", "mvar", "markov"])
def test_published_sizes_cost_what_is_known(depth, family):
    counted = training_flops(family_config(family, depth, STANDARD_SIDES[256], 1000)) / 1e12
    if family == "markov":
        counted -= unseen_scores(depth)  # the table has 49 keys per query; dense windows cost 2 % more at d12, 1 % at d24
    known = dict(zip(("var", "mvar", "markov"), KNOWN[depth], strict=True))[family]
    assert counted == pytest.approx(known, abs=0.005 + 0.01 * known)  # two digits, and what two ways of counting may differ


@pytest.mark.parametrize("family", ["var", "markov-mamba"])
def test_a_model_without_memory_counts_like_a_real_one(family):
    transformer = small_transformer(family)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(torch.zeros(1, dtype=torch.long), torch.zeros(1, sum(side**2 for side in SIDES) - 1, 8))
    assert training_flops(transformer.config) == 3 * counter.get_total_flops()


def test_counting_draws_no_random_numbers():
    config = small_transformer("var").config
    state = torch.get_rng_state()
    training_flops(config)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-32GB", 112e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H20", None),
        ("cpu", None),
    ],
)
def test_peaks_go_by_name(name, peak):
    assert peak_flops(name) == peak
