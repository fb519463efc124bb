import pytest

from models import build_transformer
from utils.runs.optim import parameter_groups


@pytest.fixture(scope="module")
def transformer():
    return build_transformer("mvar", 2, sides=(1, 2), width=64, heads=1, num_classes=3, num_codes=8, code_dim=4)


def test_every_parameter_is_in_one_group(transformer):
    decayed, exempt = parameter_groups(transformer)
    everything = [id(p) for p in transformer.parameters()]
    assert sorted(id(p) for group in (decayed, exempt) for p in group["params"]) == sorted(everything)


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("class_embed.weight", True),
        ("blocks.0.mixers.0.qkv.weight", True),
        ("blocks.0.mixers.1.ssm.conv1d.weight", True),
        ("blocks.0.modulation.1.weight", True),
        ("head.weight", True),
        ("head.bias", False),
        ("position_embed", False),
        ("start_embed", False),
        ("scale_embed.weight", False),
        ("blocks.0.mixers.0.log_scale", False),
        ("blocks.0.mixers.1.ssm.A_log", False),
        ("blocks.0.mixers.1.ssm.norm.weight", False),
    ],
)
def test_weight_decay_exclusions(transformer, name, decays):
    parameter = dict(transformer.named_parameters())[name]
    decayed, _ = parameter_groups(transformer)
    assert any(parameter is p for p in decayed["params"]) == decays
