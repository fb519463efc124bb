import pytest
import torch
import torch.nn.functional as F
from golden_weights import GRADIENTS, assert_near, facts, hashed_weights, relative_error, tensors
from small_models import randomise_, seeded
from torch import Tensor

from models import ssm
from models.ssm import Mamba2, StateSpace, causal_conv, chunked_scan
from utils import official

GOLDEN = tensors("mamba2")
AFTER = (1, 5, 14, 30, 55, 91, 155, 200)


def our_names(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a released Mamba block under our names."""
    inside = {f"blocks.0.mamba.{name}": tensor for name, tensor in released.items()}
    names = official.translate(inside, official.TRANSFORMER_NAMES, [], "mamba2")
    return {name.removeprefix("blocks.0.mixers.1."): tensor for name, tensor in names.items()}


@pytest.fixture(scope="module")
def golden_block() -> Mamba2:
    block = Mamba2(64)
    block.load_state_dict(our_names(hashed_weights(facts("mamba2")["weights"], facts("mamba2")["tag"])))
    return block


@pytest.fixture(scope="module")
def random_block() -> Mamba2:
    block = Mamba2(64, state_dim=16, head_dim=32)
    randomise_(block)
    return block.double()


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What chunked_scan computes, token by token."""
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]))
    return torch.stack(outputs, dim=1), state


def scan_inputs(length: int, heads: int = 2, head_dim: int = 3, state_dim: int = 2, dtype=torch.float64) -> list[Tensor]:
    """x, dt, A, B, C, state with decays from 0.3 to nearly 1."""
    generator = seeded(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt = F.softplus(normal(1, length, heads) - 3)
    A = -torch.linspace(1, 16, heads, dtype=torch.float64)
    B, C = normal(1, length, state_dim), normal(1, length, state_dim)
    inputs = [normal(1, length, heads, head_dim), dt, A, B, C, normal(1, heads, head_dim, state_dim)]
    return [tensor.to(dtype).requires_grad_() for tensor in inputs]


def gradients(scan, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a fixed random functional of output and final state."""
    y, state = scan(*inputs)
    generator = seeded(9)
    value = 0
    for tensor in (y, state):
        value = value + (tensor * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)).sum()
    return torch.autograd.grad(value, inputs)


def test_golden_output(golden_block):
    y, _ = golden_block(GOLDEN["x"], range(1))
    assert_near(y.detach(), GOLDEN["y"], 1e-4)


def test_golden_states_after_pieces(golden_block):
    state, pieces, stride = None, [], facts("mamba2")["state_stride"]
    for start, stop in zip((0, *AFTER), AFTER, strict=False):
        with torch.no_grad():
            y, state = golden_block(GOLDEN["x"][:, start:stop], range(1), state)
        pieces.append(y)
        assert_near(state.conv, GOLDEN[f"state.{stop}.conv"], 1e-5)
        assert_near(state.ssm.flatten()[::stride], GOLDEN[f"state.{stop}.ssm"], 1e-4)
    assert_near(torch.cat(pieces, dim=1), GOLDEN["y"], 1e-4)


def test_golden_gradients(golden_block):
    x = GOLDEN["x"].clone().requires_grad_()
    y, _ = golden_block(x, range(1))
    names, parameters = zip(*golden_block.named_parameters(), strict=True)
    grad_x, *grads = torch.autograd.grad((y * GOLDEN["grad_y"]).sum(), [x, *parameters])
    assert relative_error(grad_x[:, ::2], GOLDEN["gradient.x"]) < GRADIENTS
    expected = our_names(
        {n.removeprefix("gradient."): t for n, t in GOLDEN.items() if n.startswith("gradient.") and n != "gradient.x"}
    )
    errors = {name: relative_error(grad, expected[name]) for name, grad in zip(names, grads, strict=True)}
    assert max(errors.values()) < GRADIENTS, errors


@pytest.mark.parametrize("length", [1, 3, 4, 7, 10])
def test_scan_equals_the_recurrence(length):
    inputs = scan_inputs(length)
    for ours, reference in zip(chunked_scan(*inputs, max_chunk=4), recurrence(*inputs), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("length", [1, 4, 7, 10])
def test_scan_gradients_equal_finite_differences(length):
    assert torch.autograd.gradcheck(lambda *inputs: chunked_scan(*inputs, max_chunk=4), scan_inputs(length))


@pytest.mark.parametrize("length", [7, 10])
def test_scan_gradients_equal_those_of_the_recurrence(length):
    inputs = scan_inputs(length)
    ours = gradients(lambda *inputs: chunked_scan(*inputs, max_chunk=4), inputs)
    for a, b in zip(ours, gradients(recurrence, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_long_sequences_go_piece_by_piece_with_the_same_result(random_block, monkeypatch):
    x = torch.randn(3, 23, 64, generator=seeded(7), dtype=torch.float64, requires_grad=True)
    results = []
    for longest in (69, 50, 23, 10):  # all images at once, two and one, each alone, each in pieces
        monkeypatch.setattr(ssm, "MAX_PIECE", longest)
        first, state = random_block(x[:, :3], range(1))
        y, state = random_block(x[:, 3:], range(1), state)
        results.append((first, y, *state, *torch.autograd.grad(y.square().sum(), x)))
    for others in results[1:]:
        torch.testing.assert_close(others, results[0])


def test_float32_gradients_over_a_whole_pyramid():
    """680 tokens in chunks of 64 against the float64 recurrence."""
    exact = scan_inputs(680, heads=4, head_dim=16, state_dim=16)
    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    for ours, reference in zip(gradients(chunked_scan, single), gradients(recurrence, exact), strict=True):
        assert relative_error(ours.double(), reference) < 1e-4


def scan_with_decays(dt: Tensor, rate: float) -> None:
    """Compare float32 with the float64 recurrence; the gradients must at least be finite."""
    x, _, A, B, C, state = (tensor.detach() for tensor in scan_inputs(150, dtype=torch.float32))
    inputs = [tensor.requires_grad_() for tensor in (x, dt.expand(1, 150, 2).clone(), torch.full_like(A, rate), B, C, state)]
    for ours, reference in zip(chunked_scan(*inputs), recurrence(*(tensor.double() for tensor in inputs)), strict=True):
        assert relative_error(ours.double(), reference) < 1e-4
    assert all(grad.isfinite().all() for grad in gradients(chunked_scan, inputs))


@pytest.mark.parametrize("rate", [-1e-12, -1e3, -1e30])
def test_every_token_forgets_nothing_or_everything(rate):
    scan_with_decays(torch.ones(150, 1), rate)


def test_some_tokens_forget_everything():
    scan_with_decays(torch.where(torch.arange(150) % 7 == 0, 3.0, 1e-3)[:, None], rate=-10.0)


def test_scan_in_bfloat16_keeps_its_state_in_float32():
    x, dt, A, B, C, state = scan_inputs(70, dtype=torch.float32)
    y, last = chunked_scan(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), state)
    expected, expected_last = recurrence(x, dt, A, B, C, state)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(y.float(), expected) < 2e-2
    assert relative_error(last, expected_last) < 2e-2


def test_causal_conv_is_a_depthwise_convolution_behind_its_tail():
    generator = seeded()
    x, tail = torch.randn(2, 9, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    weight, bias = torch.randn(5, 1, 4, generator=generator), torch.randn(5, generator=generator)
    y, new_tail = causal_conv(x, tail, weight, bias)
    padded = torch.cat([tail, x], dim=1)
    torch.testing.assert_close(y, F.conv1d(padded.transpose(1, 2), weight, bias, groups=5).transpose(1, 2))
    assert torch.equal(new_tail, x[:, -3:])


@pytest.mark.parametrize("length", [1, 2, 6])
def test_causal_conv_gradients_equal_finite_differences(length):
    generator = seeded()
    shapes = ((2, length, 3), (2, 3, 3), (3, 1, 4), (3,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(causal_conv, inputs)


@pytest.mark.parametrize("cuts", [(0, 1, 5, 14, 30, 200), (0, 2, 3, 131, 200), (0, 64, 128, 200)])
def test_block_whole_equals_pieces_with_state(random_block, cuts):
    x = torch.randn(2, 200, 64, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        whole, last = random_block(x, range(1))
        state, pieces = random_block.init_state(2), []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            y, state = random_block(x[:, start:stop], range(1), state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-9, rtol=0)
    torch.testing.assert_close(tuple(state), tuple(last), atol=1e-9, rtol=0)


def test_state_is_not_changed_in_place(random_block):
    x = torch.randn(2, 9, 64, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        _, state = random_block(x, range(1))
        copies = [part.clone() for part in state]
        random_block(x, range(1), state)
    assert all(torch.equal(part, copy) for part, copy in zip(state, copies, strict=True))


def test_initial_steps_and_decays_are_in_their_ranges():
    block = StateSpace(2048, state_dim=64, d_conv=4, head_dim=64)
    block.init_weights(seeded())
    steps, rates = F.softplus(block.dt_bias), block.A_log.exp()
    assert 1e-3 * 0.999 <= steps.min() < 5e-3
    assert 2e-2 < steps.max() <= 1e-1 * 1.001
    assert 1 <= rates.min() < 4
    assert 12 < rates.max() <= 16


def test_width_that_does_not_hold_whole_heads():
    with pytest.raises(ValueError, match="Mamba head size 64"):
        Mamba2(48)
