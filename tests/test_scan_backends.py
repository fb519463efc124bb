"""The adapters against stand-ins that compute what the packages document, their kernels where they can run, and the choice."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from commands import run_in_shell
from scan_comparison import scan_errors
from small_models import SIDES, random_indices, small_tokenizer, small_transformer
from test_ssm import recurrence

from models import scan_backends
from models.pyramid import STANDARD_SIDES, Pyramid
from models.scan_backends import ScanChoice, choose_scan_
from models.ssm import StateSpace, chunked_scan, conv_silu

CPU, GPU = torch.device("cpu"), torch.device("cuda")


# --- stand-ins ----------------------------------------------------------------------------------------------------------


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, dt_softplus=False, return_final_states=False
):
    """x (b, L, H, P), dt (b, L, H), A (H,), B and C (b, L, groups, N), states (b, H, P, N)."""
    assert x.shape[1] % chunk_size == 0, "NaN gradients in half precision"
    assert B.shape == C.shape == (*x.shape[:2], 1, B.shape[3])
    assert (D, z, dt_bias, dt_softplus, return_final_states) == (None, None, None, False, True)
    empty = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
    wide = [tensor.float() for tensor in (x, dt, A, B[:, :, 0], C[:, :, 0])]
    y, state = recurrence(*wide, empty.float() if initial_states is None else initial_states)
    return y.to(x.dtype), state


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    headdim=None,
    norm_before_gate=True,
):
    """zxbcdt (b, L, 2 * inner + 2 * N + H), conv1d_weight (inner + 2 * N, taps) -> out (b, L, inner), final states."""
    assert zxbcdt.shape[1] % chunk_size == 0, "NaN gradients in half precision"
    assert (initial_states, return_final_states, activation) == (None, True, "silu")
    heads = len(D)
    inner, taps = heads * headdim, conv1d_weight.shape[1]
    z, xBC, dt = zxbcdt.float().split([inner, len(conv1d_weight), heads], dim=-1)
    before = F.pad(xBC.transpose(1, 2), (taps - 1, 0))
    xBC = F.silu(F.conv1d(before, conv1d_weight.unsqueeze(1), conv1d_bias, groups=len(conv1d_weight))).transpose(1, 2)
    x, B, C = xBC.split([inner, (xBC.shape[2] - inner) // 2, (xBC.shape[2] - inner) // 2], dim=-1)
    x = x.unflatten(2, (heads, headdim))
    empty = x.new_zeros(len(x), heads, headdim, B.shape[2])
    y, state = recurrence(x, F.softplus(dt + dt_bias), A, B, C, empty)
    y = (y + D.unsqueeze(-1) * x).flatten(2)
    if norm_before_gate:
        y = F.rms_norm(y, (inner,), rmsnorm_weight, rmsnorm_eps) * F.silu(z)
    else:
        y = F.rms_norm(y * F.silu(z), (inner,), rmsnorm_weight, rmsnorm_eps)
    return y.to(zxbcdt.dtype), state


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    """q and k (b, L, H, K), v (b, L, H, V), g (b, L, H) logarithms of the decays, states (b, H, K, V) in float32."""
    assert q.shape == k.shape
    assert q.dtype == k.dtype == v.dtype
    assert g.shape == v.shape[:3]
    assert g.dtype == torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = torch.zeros(len(q), *q.shape[2:], v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None, None] * state + k[:, t].float().unsqueeze(-1) * v[:, t].float().unsqueeze(-2)
        outputs.append(scale * (q[:, t].float().unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs, dim=1).to(q.dtype), state if output_final_state else None


def causal_conv1d(
    x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None, backend="triton"
):
    """x (b, L, D), weight (D, taps), bias (D,) -> (b, L, D), final state."""
    assert (residual, initial_state, output_final_state) == (None, None, False)
    before = F.pad(x.float().transpose(1, 2), (weight.shape[1] - 1, 0))
    y = F.conv1d(before, weight.unsqueeze(1), bias, groups=len(weight)).transpose(1, 2)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), None


STAND_INS = {
    "mamba_ssm.ops.triton.ssd_combined": (mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined),
    "causal_conv1d": (),
    "fla.ops.simple_gla": (chunk_simple_gla,),
    "fla.modules.causal_conv1d": (causal_conv1d,),
}


@pytest.fixture
def install(monkeypatch):
    """Stand-ins for the named modules are importable, the real ones and all others are not."""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")  # choosing sets it: not beyond this test

    def install(*names: str) -> None:
        for name in STAND_INS:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:end]), None)  # cannot be imported
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts)):
                monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
            module = types.ModuleType(name)
            for function in STAND_INS[name]:
                setattr(module, function.__name__, function)
            monkeypatch.setitem(sys.modules, name, module)

    return install


MAMBA, CONV, *FLA = STAND_INS
BACKENDS = {"mamba_ssm": [MAMBA], "mamba_ssm with causal-conv1d": [MAMBA, CONV], "fla": FLA}


@pytest.fixture(params=BACKENDS)
def stand_in(request, install) -> str:
    install(*BACKENDS[request.param])
    return request.param.split()[0]


@pytest.mark.parametrize("lengths", [[1], [2], [3], [64], [70], [1, 4, 9], [2, 1, 67, 64]], ids=str)
def test_adapters_compute_what_the_reference_does(stand_in, lengths):
    """Output, state and gradients, in one piece and from the state of the piece before."""
    errors = scan_errors(stand_in, lengths, inner=64, state_dim=4, head_dim=16)
    assert max(errors.values()) < 1e-5, errors


def test_adapters_take_half_precision_and_keep_the_state_in_single(stand_in):
    errors = scan_errors(stand_in, [70, 5], dtype=torch.bfloat16, inner=64, state_dim=8, head_dim=16)
    assert max(errors.values()) < 2e-2, errors  # few numbers, so their roundings do not even out


def test_a_training_step_of_a_transformer_is_that_of_the_reference(stand_in):
    """All blocks, through autocast, checkpoints and the projections around."""
    model = small_transformer("markov-mamba")
    inputs = small_tokenizer().teacher_inputs(random_indices(Pyramid(SIDES)))
    gradients = []
    for backend in ("torch", stand_in):
        choose_scan_(model, backend, GPU)
        loss = model(torch.tensor([0, 3]), inputs).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-3)


def test_the_whole_in_one_function_is_used_where_nothing_came_before(install, monkeypatch):
    install(MAMBA, CONV)
    calls = []
    for name in ("mamba_ssm_whole", "mamba_ssm_scan"):
        function = getattr(scan_backends, name)
        monkeypatch.setattr(scan_backends, name, lambda *a, name=name, f=function: calls.append(name) or f(*a))
    model = small_transformer("mvar", depth=1)
    choose_scan_(model, "mamba_ssm", GPU)
    inputs = small_tokenizer().teacher_inputs(random_indices(Pyramid(SIDES)))
    model(torch.tensor([0, 3]), inputs).sum().backward()
    assert calls == ["mamba_ssm_whole"]  # once: what it needs again, the kernels compute themselves
    states = model.init_state(2)
    model.advance(inputs[:, :0], range(1), model.condition(torch.tensor([0, 3])), states)
    assert calls[1:] == ["mamba_ssm_scan"]


# --- the choice ---------------------------------------------------------------------------------------------------------


def test_a_cpu_takes_the_reference(install):
    install(*STAND_INS)
    block = StateSpace(64, 4, 4, 16)
    assert choose_scan_(block, "auto", CPU).backend == "torch"
    assert (block.scan, block.conv, block.whole) == (chunked_scan, conv_silu, None)


@pytest.mark.parametrize(
    ("installed", "backend", "remark"),
    [
        ([], "torch", "mamba_ssm: import of mamba_ssm.ops.triton.ssd_combined halted"),
        ([MAMBA], "mamba_ssm", "without causal-conv1d"),
        ([MAMBA, CONV], "mamba_ssm", "installed"),
        (FLA, "fla", "installed"),
        ([MAMBA, *FLA], "mamba_ssm", "without causal-conv1d"),
        (FLA[:1], "torch", "fla: import of fla.modules.causal_conv1d halted"),
    ],
)
def test_a_gpu_takes_what_is_installed_and_says_so(install, installed, backend, remark):
    install(*installed)
    choice = choose_scan_(StateSpace(64, 4, 4, 16), "auto", GPU)
    assert choice.backend == backend
    assert remark in str(choice)
    assert "\n" not in str(choice)


@pytest.mark.parametrize("backend", ["mamba_ssm", "fla"])
def test_a_backend_that_is_not_there_is_an_error(install, backend):
    install()
    message = f"scan backend {backend}: import of {backend}.* halted.*: take --scan_backend=torch, which needs nothing, or auto"
    with pytest.raises(ValueError, match=message):
        choose_scan_(StateSpace(64, 4, 4, 16), backend, GPU)
    with pytest.raises(ValueError, match=f"scan backend {backend}: its kernels need a CUDA GPU"):
        choose_scan_(StateSpace(64, 4, 4, 16), backend, CPU)


def test_torch_can_be_told_anywhere_and_told_again(install):
    install(*STAND_INS)
    block = StateSpace(64, 4, 4, 16)
    choose_scan_(block, "fla", GPU)
    assert block.scan is not chunked_scan
    assert choose_scan_(block, "torch", GPU) == ScanChoice("torch", "as told")
    assert (block.scan, block.conv, block.whole) == (chunked_scan, conv_silu, None)


# --- real kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "precision"), [("9", "float32"), ("1,4,70", "float32"), ("9,3", "float16")])
def test_kernels_of_fla_in_the_interpreter_of_triton(lengths, precision):
    """Without a GPU, on few numbers: Triton's language computed by NumPy, in a process of its own."""
    pytest.importorskip("triton")
    pytest.importorskip("fla.ops.simple_gla")
    result = run_in_shell("tests/interpreted_kernels.py", lengths, precision, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


@pytest.fixture
def few_configurations(monkeypatch):
    """Kernels are tuned over two or three of their dozens of configurations, each of which takes a second to compile."""
    from triton.runtime.autotuner import Autotuner

    usual = Autotuner.prune_configs

    def prune(tuner, arguments):
        configurations = usual(tuner, arguments)
        return configurations[:: max(len(configurations) // 2, 1)]

    monkeypatch.setattr(Autotuner, "prune_configs", prune)


SCALES = {680: Pyramid(STANDARD_SIDES[256]).lengths, 2240: Pyramid(STANDARD_SIDES[512]).lengths}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["whole", "scale by scale"])
@pytest.mark.parametrize("tokens", SCALES)
@pytest.mark.parametrize("backend", ["mamba_ssm", "fla"])
def test_kernels_on_a_gpu_equal_the_reference(backend, tokens, way, dtype, tolerance, few_configurations):
    pytest.importorskip(backend)
    lengths = [tokens] if way == "whole" else list(SCALES[tokens])
    own, errors = (scan_errors(name, lengths, "cuda", dtype, inner=1024) for name in ("torch", backend))
    # a gradient that sums up what cancels out is no better in PyTorch
    assert all(error < max(tolerance, 2 * own[name]) for name, error in errors.items()), (errors, own)


@pytest.mark.gpu
def test_the_reference_on_a_gpu_is_that_of_a_cpu():
    on_gpu = scan_errors("torch", [680], "cuda")
    assert max(on_gpu.values()) < 1e-6
