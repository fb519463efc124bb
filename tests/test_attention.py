import pytest
import torch
import torch.nn.functional as F
from golden_weights import assert_near, facts, hashed_weights, relative_error, tensors
from small_models import SIDES, randomise_, seeded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import LEADING_TOKENS, Attention, AttentionState, Tiling, _Halos, window_mask, windowed_attention
from models.pyramid import STANDARD_SIDES, Pyramid
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


def test_test_pyramid_has_scales_in_both_kinds_of_calls():
    attention = random_attention(history=False, window=3, windowed_scales=(3,))
    assert PYRAMID.num_tokens > LEADING_TOKENS
    assert [list(group) for group in attention._calls(PYRAMID.scales)] == [[0, 1, 2], [3], [4], [5]]
    assert [list(group) for group in random_attention(history=True)._calls(PYRAMID.scales)] == [[0, 1, 2, 3, 4], [5]]


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


# --- windows by tiles ---------------------------------------------------------------------------------------------------

# Undivided, divided along one side, along both; sides that tiles of 8 divide and that they do not; windows up to 11.
MAPS = [
    *[(side, side, 7) for side in (7, 8, 13, 16, 20, 21, 24, 27, 32)],
    *[(15, 15, 3), (18, 20, 5), (57, 21, 7), (29, 33, 9), (37, 41, 11), (31, 25, 1)],
    *[(8, 13, 7), (7, 30, 7), (30, 7, 7), (3, 40, 5), (24, 50, 3)],
]


def map_inputs(height: int, width: int, dtype=torch.float64, batch: int = 2, dim: int = 8) -> list[Tensor]:
    """q, k, v (B, 2 heads, h * w, dim) as views of one tensor, as attention makes them."""
    qkv = torch.randn(batch, height * width, 3, 2, dim, generator=seeded(height * width), dtype=torch.float64)
    return list(qkv.to(dtype).permute(2, 0, 3, 1, 4).requires_grad_())


def by_tiles(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, window: int) -> Tensor:
    tilings = Tiling.of(height, window), Tiling.of(width, window)
    return windowed_attention(q, k, v, tilings, tuple(side.visible() for side in tilings), scale=0.5)


def by_mask(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, window: int) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=window_mask(height, width, window), scale=0.5)
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("shape", MAPS)
def test_tiles_equal_the_mask_over_the_whole_map_forward_and_backward(shape):
    inputs = map_inputs(*shape[:2])
    ours, reference = by_tiles(*inputs, *shape), by_mask(*inputs, *shape)
    torch.testing.assert_close(ours, reference, atol=1e-10, rtol=0)
    weights = torch.randn(ours.shape, generator=seeded(1), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, inputs, weights) for y in (ours, reference)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_tiles_equal_the_mask_in_lower_precision(dtype, tolerance):
    inputs = map_inputs(27, 22, dtype)
    ours = by_tiles(*inputs, 27, 22, 7)
    exact = by_mask(*(x.double() for x in inputs), 27, 22, 7)
    assert ours.dtype == dtype
    weights = torch.randn(ours.shape, generator=seeded(1))
    grads = zip(*(torch.autograd.grad(y, inputs, weights.to(y.dtype)) for y in (ours, exact)), strict=True)
    for a, b in [(ours, exact), *grads]:
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


def test_tiles_under_autocast_stay_in_its_type():
    attention = Attention(32, 2, Pyramid((1, 24)), history=False, windowed_scales=(1,))
    randomise_(attention)
    x = torch.randn(1, 577, 32, generator=seeded(3))
    with torch.no_grad():
        exact, _ = attention(x, range(2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = attention(x, range(2))
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), exact) < 0.02


@pytest.mark.parametrize("shape", [(15, 22, 3), (21, 6, 7)])
def test_gradients_of_halos_equal_finite_differences(shape):
    height, width, window = shape
    x = torch.randn(1, 1, height, width, 1, generator=seeded(4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Halos.apply(x, Tiling.of(height, window), Tiling.of(width, window)), x)


@pytest.mark.parametrize("window", [1, 3, 5, 7, 9, 15])
def test_along_every_side_tiles_see_what_the_rule_says(window):
    """However the padding falls, the halo of a tile holds the windows of all its queries."""
    for size in range(1, 150):
        tiling, visible = Tiling.of(size, window), Tiling.of(size, window).visible()
        seen = torch.zeros(tiling.count * tiling.tile, tiling.count * tiling.tile + 2 * tiling.reach, dtype=torch.bool)
        for i in range(tiling.count):
            first = i * tiling.tile
            seen[first : first + tiling.tile, first : first + tiling.halo] = visible[i]
        first_key = tiling.before + tiling.reach
        inside = seen[tiling.before : tiling.before + size, first_key : first_key + size]
        assert torch.equal(inside, window_mask(1, size, window)), size
        assert (seen.sum(dim=1) == min(window, size)).all(), size  # queries in the padding see keys too: no NaN


def test_masks_grow_with_the_side_not_with_the_map():
    """Published 1024 px pyramid: a mask over all of 64x64 alone had 16.8 million elements."""
    sides = STANDARD_SIDES[1024]
    attention = Attention(8, 1, Pyramid(sides), history=False, windowed_scales=tuple(range(8, len(sides))))
    elements = {name: buffer.numel() for name, buffer in attention.named_buffers() if name.startswith("visible")}
    assert set(elements) == {f"visible_{side}" for side in (16, 21, 27, 36, 48, 64)}
    assert all(elements[f"visible_{side}"] <= 16 * side for side in (16, 21, 27, 36, 48, 64))


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize(("side", "factor"), [(32, 1.0), (64, 4.0), (96, 9.0)])
def test_no_tensor_is_quadratic_in_the_tokens(side, factor):
    """The largest tensor of forward and backward pass grows as the tokens do, four times from 32x32 to 64x64."""
    inputs = map_inputs(side, side, torch.float32, batch=1)
    with LargestTensor() as largest:
        by_tiles(*inputs, side, side, 7).sum().backward()
    assert largest.elements == factor * 4 * 4 * 64 * 14 * 14  # masks: 64 queries with 14 x 14 keys in each of 4 x 4 tiles


def test_windows_run_on_tensors_without_values():
    with FakeTensorMode():
        attention = Attention(32, 2, Pyramid((1, 30)), history=False, windowed_scales=(1,))
        y, _ = attention(torch.zeros(3, 901, 32), range(2))
        y.sum().backward()
    assert y.shape == (3, 901, 32)


def test_tiles_compile_to_the_same_gradients():
    """What the compiler makes of views that are written to was once wrong: gradients of all but the last tiles were lost."""
    inputs = map_inputs(21, 26)

    def gradients(function) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs, 21, 26, 7).square().sum(), inputs)

    compiled = torch.compile(by_tiles, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled), gradients(by_tiles), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 4), (0, 3, 4)])
def test_tiles_scale_by_scale_equal_all_at_once(cuts):
    sides = (3, 8, (21, 26), (24, 30))
    attention = Attention(32, 2, Pyramid(sides), history=False, windowed_scales=(1, 2, 3))
    randomise_(attention)
    attention.double().requires_grad_(False)
    x = torch.randn(2, Pyramid(sides).num_tokens, 32, generator=seeded(5), dtype=torch.float64)
    tokens = Pyramid(sides).tokens
    pieces = [attention(x[:, tokens(range(a, b))], range(a, b))[0] for a, b in zip(cuts, cuts[1:], strict=False)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x, range(4))[0])
    visible = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    for k, (height, width) in enumerate(Pyramid(sides).shapes):
        visible[tokens(range(k, k + 1)), tokens(range(k, k + 1))] = window_mask(height, width, 7)
    torch.testing.assert_close(attention(x, range(4))[0], dense_reference(attention, x, visible))


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
