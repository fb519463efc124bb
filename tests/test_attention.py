import pytest
import torch
import torch.nn.functional as F
from golden_weights import assert_near, facts, hashed_weights, tensors
from small_models import SIDES, randomise_, seeded

from models.attention import LEADING_TOKENS, Attention, AttentionState, window_mask
from models.pyramid import Pyramid
from utils import official

GOLDEN = tensors("attention")
PYRAMID = Pyramid(SIDES)


def golden_attention(case: str, sides: tuple) -> Attention:
    attention = Attention(128, 2, Pyramid(sides), history=False, normalize=case == "l2")
    prefix = "blocks.0.attn."
    weights = hashed_weights(facts("attention")["weights"], facts("attention")["tag"])
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    weights = official.translate(weights, official.TRANSFORMER_NAMES, [], "attention")
    if case == "l2":  # 5 is above the cap of log 100
        weights["blocks.0.mixers.0.log_scale"] = torch.tensor(facts("attention")["log_scale"]).view(1, 2, 1, 1)
    attention.load_state_dict({name.removeprefix("blocks.0.mixers.0."): tensor for name, tensor in weights.items()})
    return attention.requires_grad_(False)


def random_attention(history: bool, **config) -> Attention:
    attention = Attention(32, 2, PYRAMID, history, **config)
    randomise_(attention)
    return attention.double().requires_grad_(False)


def dense_reference(attention: Attention, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Attention over the whole sequence under one mask (L, L)."""
    q, k, v = attention._project(x)
    scores = q @ k.transpose(-1, -2) * (1 if attention.normalize else 0.25 / q.shape[-1] ** 0.5)
    y = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ v
    return attention.proj(y.transpose(1, 2).flatten(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, PYRAMID.num_tokens, 32, generator=seeded(1), dtype=torch.float64)


@pytest.mark.parametrize("case", ["l2", "nol2"])
def test_golden_attention_inside_the_scales(case):
    attention = golden_attention(case, (1, 2, 3, 4))
    y, _ = attention(GOLDEN["x"], range(4))
    assert_near(y, GOLDEN[f"{case}.own_scale"], 1e-5)


@pytest.mark.parametrize("case", ["l2", "nol2"])
def test_golden_attention_of_one_scale_alone(case):
    attention = golden_attention(case, (1, 2, 3, 4))
    y, _ = attention(GOLDEN["x"][:, 14:], range(3, 4))
    assert_near(y, GOLDEN[f"{case}.last_scale_alone"], 1e-5)


@pytest.mark.parametrize("case", ["l2", "nol2"])
def test_golden_attention_among_all_tokens(case):
    attention = golden_attention(case, ((5, 6),))
    y, _ = attention(GOLDEN["x"], range(1))
    assert_near(y, GOLDEN[f"{case}.all_tokens"], 1e-5)


def test_test_pyramid_has_scales_in_both_kinds_of_groups():
    attention = random_attention(history=False, window=3, windowed_scales=(3,))
    assert PYRAMID.num_tokens > LEADING_TOKENS
    assert [list(group) for group in attention._groups(PYRAMID.scales)] == [[0, 1, 2], [3], [4], [5]]
    assert [list(group) for group in random_attention(history=True)._groups(PYRAMID.scales)] == [[0, 1, 2, 3, 4], [5]]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("history", [True, False])
def test_groups_equal_one_dense_mask(x, history, normalize):
    ids = PYRAMID.scale_ids()
    visible = ids[:, None] >= ids if history else ids[:, None] == ids
    attention = random_attention(history, normalize=normalize)
    torch.testing.assert_close(attention(x, PYRAMID.scales)[0], dense_reference(attention, x, visible))


def test_windows_equal_one_dense_mask(x):
    ids = PYRAMID.scale_ids()
    visible = ids[:, None] == ids
    for k in (2, 4, 5):
        tokens = PYRAMID.tokens(range(k, k + 1))
        visible[tokens, tokens] = window_mask(SIDES[k], SIDES[k], 3)
    attention = random_attention(history=False, window=3, windowed_scales=(1, 2, 4, 5))
    assert attention.windowed_scales == (4, 5)  # 2x2 and 3x3 fit into the window
    torch.testing.assert_close(attention(x, PYRAMID.scales)[0], dense_reference(attention, x, visible))


@pytest.mark.parametrize("cuts", [range(7), (0, 2, 6), (0, 4, 5, 6)])
@pytest.mark.parametrize("history", [True, False])
def test_whole_equals_pieces_with_state(x, history, cuts):
    attention = random_attention(history)
    whole, last = attention(x, PYRAMID.scales)
    state, pieces = attention.init_state(2), []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        y, state = attention(x[:, PYRAMID.tokens(range(start, stop))], range(start, stop), state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    if history:
        torch.testing.assert_close(state, last)


def test_state_holds_all_keys_only_with_history(x):
    _, state = random_attention(history=True)(x, PYRAMID.scales)
    assert state.keys.shape == state.values.shape == (2, 2, PYRAMID.num_tokens, 16)
    attention = random_attention(history=False)
    _, state = attention(x, PYRAMID.scales, attention.init_state(2))
    assert isinstance(state, AttentionState)
    assert state.keys.shape[2] == 0


def test_keys_and_values_get_their_memory_once(x):
    attention = random_attention(history=True)
    state, places = attention.init_state(2), set()
    for k in PYRAMID.scales:
        _, state = attention(x[:, PYRAMID.tokens(range(k, k + 1))], range(k, k + 1), state)
        places.add((state.keys.data_ptr(), state.values.data_ptr()))
        assert state.keys.shape == (2, 2, PYRAMID.num_tokens, 16)
    assert len(places) == 1


def test_a_pass_without_state_is_continued_like_one_with_state(x):
    """Its keys and values are as long as itself, as in training; they are moved to longer memory then."""
    attention = random_attention(history=True)
    whole, _ = attention(x, PYRAMID.scales)
    _, state = attention(x[:, PYRAMID.tokens(range(3))], range(3))
    assert state.keys.shape[2] == PYRAMID.offsets[3]
    rest, state = attention(x[:, PYRAMID.offsets[3] :], range(3, 6), state)
    torch.testing.assert_close(rest, whole[:, PYRAMID.offsets[3] :])
    assert state.keys.shape[2] == PYRAMID.num_tokens


def test_the_last_scales_may_be_computed_again_from_the_same_state(x):
    """What stands behind a state's own scales in its memory is never read."""
    attention = random_attention(history=True)
    _, state = attention(x[:, PYRAMID.tokens(range(3))], range(3), attention.init_state(2))
    expected, _ = attention(x[:, PYRAMID.tokens(range(3, 4))], range(3, 4), state)
    attention(torch.randn_like(x[:, PYRAMID.offsets[3] :]), range(3, 6), state)
    again, _ = attention(x[:, PYRAMID.tokens(range(3, 4))], range(3, 4), state)
    assert torch.equal(again, expected)


@pytest.mark.parametrize(("height", "width", "window"), [(13, 13, 7), (16, 16, 7), (9, 12, 3), (7, 7, 7)])
def test_every_query_sees_exactly_the_window(height, width, window):
    mask = window_mask(height, width, window)
    assert mask.shape == (height * width, height * width)
    assert (mask.sum(dim=1) == window * window).all()
    assert mask.diagonal().all()


def test_window_inside_the_map_is_centred():
    seen = window_mask(13, 13, 7)[6 * 13 + 5].view(13, 13)
    assert seen.nonzero().amin(0).tolist() == [3, 2]
    assert seen.nonzero().amax(0).tolist() == [9, 8]


def test_window_at_the_border_is_moved_inside():
    seen = window_mask(13, 13, 7)[1 * 13 + 12].view(13, 13)
    assert seen.nonzero().amin(0).tolist() == [0, 6]
    assert seen.nonzero().amax(0).tolist() == [6, 12]


def test_window_wider_than_a_side_sees_the_whole_side():
    seen = window_mask(3, 9, 5)[0].view(3, 9)
    assert torch.equal(seen, (torch.arange(9) < 5).expand(3, 9))


def test_learned_scale_is_capped():
    """Beyond log 100 it no longer moves the output, as in the released code."""
    attention = random_attention(history=False)
    x = F.normalize(torch.randn(1, 4, 32, generator=seeded(2), dtype=torch.float64), dim=-1)
    outputs = []
    for value in (4.0, 4.7, 6.0):
        attention.log_scale.fill_(value)
        outputs.append(attention(x, range(1, 2))[0])
    assert torch.equal(outputs[1], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])
