import pytest
import torch
from small_models import SIDES, small_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.attention import window_mask
from models.pyramid import STANDARD_SIDES
from models.transformer import family_config
from utils.runs.flops import peak_flops, training_flops

# TFLOP per image of a 256 px training step, VAR / M-VAR / Markov, to two digits, counted independently of this repository.
KNOWN = {12: (0.39, 0.57, 0.36), 16: (0.90, 1.31, 0.85), 24: (2.93, 4.32, 2.82)}


@pytest.mark.parametrize("depth", KNOWN)
@pytest.mark.parametrize("family", ["var", "mvar", "markov"])
def test_published_sizes_cost_what_is_known(depth, family):
    counted = training_flops(family_config(family, depth, STANDARD_SIDES[256], 1000)) / 1e12
    known = dict(zip(("var", "mvar", "markov"), KNOWN[depth], strict=True))[family]
    assert counted == pytest.approx(known, abs=0.005 + 0.01 * known)  # two digits, and what two ways of counting may differ


@pytest.mark.parametrize("sides", [STANDARD_SIDES[256], STANDARD_SIDES[512], (1, 6, (9, 30))])
def test_windows_count_what_they_show(sides):
    """Whether a map is divided in tiles or not: a query in a window costs its keys, here against the whole map."""
    windows, whole = (family_config("markov", 2, sides, 10, window_from=size, num_codes=16) for size in (13, 1000))
    hidden = sum((~window_mask(*shape, 7)).sum().item() for shape in windows.pyramid.shapes if max(shape) >= 13)
    per_score = 3 * windows.depth * 2 * 2 * windows.width  # two products, forward and twice backward
    assert training_flops(whole) - training_flops(windows) == per_score * hidden


@pytest.mark.parametrize("family", ["var", "mvar"])
def test_a_model_without_memory_counts_like_a_real_one(family):
    transformer = small_transformer(family)
    # attention as plain products, as in training_flops: some versions of the counter know no fused attention of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
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
