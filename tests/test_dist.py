"""How a model is spread over ranks, in a group of one; what two ranks make of it stands in test_two_ranks.py."""

import threading
import time

import pytest
import torch
import torch.distributed as torch_dist
from small_models import CODE_DIM, small_transformer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import dist
from dist import Ranks, gradient_exchange, process_group, replicated, shard_, whole_outside_forward

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def group(monkeypatch):
    torch_dist.init_process_group("gloo", store=torch_dist.HashStore(), rank=0, world_size=1)
    # a model is sharded over two ranks or more, of which there is only one here
    monkeypatch.setattr(dist, "init_device_mesh", lambda kind, shape: init_device_mesh(kind, (1,)))
    yield
    torch_dist.destroy_process_group()


def backward(model: torch.nn.Module) -> None:
    inputs = torch.zeros(2, 183, CODE_DIM)
    model(torch.tensor([0, 1]), inputs).square().mean().backward()


def test_replicas_keep_gradients_in_buckets_and_search_for_nothing():
    model = replicated(small_transformer().train(), static_graph=True, unused_parameters=False)
    assert model.gradient_as_bucket_view
    assert model.static_graph
    assert not model.find_unused_parameters
    assert not model.broadcast_buffers


def test_replicas_exchange_gradients_once_per_step():
    model = replicated(small_transformer().train(), static_graph=False, unused_parameters=False)
    exchanged = []

    def count(state, bucket):
        exchanged.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, count)
    for now in (False, False, True):
        with gradient_exchange(model, now=now):
            backward(model)
        assert bool(exchanged) == now


def test_a_sharded_model_keeps_what_is_sensitive_in_float32():
    model = small_transformer().train()
    seen = {}

    def look(name):
        return lambda module, *_: seen.update({f"{name}.{key}": p.dtype for key, p in module.named_parameters(recurse=False)})

    for name, module in model.named_modules():
        module.register_forward_pre_hook(look(name), prepend=False)
    shard_(model, Ranks(0, 2, CPU), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(model)
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    half = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert {"blocks.0.mixers.0.qkv.weight", "blocks.0.ffn.fc1.weight", "blocks.0.modulation.1.weight"} - half <= {
        "blocks.0.mixers.0.qkv.weight"  # used without calling its module
    }
    assert not [name for name in half if ".ssm." in name or "embed" in name or name.startswith("head")]
    assert seen["blocks.0.mixers.1.ssm.A_log"] == torch.float32
    assert seen["class_embed.weight"] == torch.float32


def test_a_sharded_model_is_whole_outside_of_forward_only_when_told():
    model = small_transformer().eval()
    shard_(model, Ranks(0, 2, CPU), None)
    assert isinstance(model, FSDPModule)
    assert isinstance(model.start_embed, DTensor)
    with torch.no_grad(), whole_outside_forward(model):
        model(torch.tensor([0, 1]), torch.zeros(2, 0, CODE_DIM))
        conditioning = model.condition(torch.tensor([0, 1]))
        logits, _ = model.advance(torch.zeros(2, 0, CODE_DIM), range(1), conditioning)
        assert not isinstance(logits, DTensor)
    assert isinstance(model.start_embed, DTensor)


def test_one_rank_has_nothing_to_shard():
    with pytest.raises(ValueError, match="--parallel=fsdp shares a model out over ranks, there is one"):
        shard_(small_transformer(), Ranks(0, 1, CPU), None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234\nmore"), ConnectionError),
        (torch_dist.DistBackendError("NCCL error: unhandled system error"), ConnectionError),
        (RuntimeError("shape mismatch"), RuntimeError),
    ],
)
def test_lost_ranks_are_told_from_errors_of_our_own(error, kind, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "_meet", lambda: (None, 0))
    monkeypatch.setattr(torch_dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch_dist, "destroy_process_group", lambda: None)
    with pytest.raises(kind) as caught, process_group():
        raise error
    monkeypatch.undo()
    assert (kind is RuntimeError) == ("shape mismatch" in str(caught.value))
    if kind is ConnectionError:
        assert "lost the other ranks" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_ranks_meet_in_spite_of_what_dead_ones_left(monkeypatch):
    """After a restart by torchrun the store still holds the words of the ranks before."""
    store = torch_dist.HashStore()
    for attempt in range(3):
        met = {}

        def meet(rank: int, met=met) -> None:
            met[rank] = dist._meet()

        def rendezvous(url: str):
            yield store, int(threading.current_thread().name), 3

        monkeypatch.setattr(torch_dist, "rendezvous", rendezvous)
        threads = [threading.Thread(target=meet, args=(rank,), name=str(rank)) for rank in range(3)]
        for thread in threads if attempt else reversed(threads):
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(20)
        assert [met[rank][1] for rank in range(3)] == [0, 1, 2]
        assert not met[1][0].check(["address"])  # that of an earlier attempt
        met[0][0].set("address", str(attempt))
        assert met[1][0].get("address") == met[2][0].get("address") == str(attempt).encode()


def test_numbers_of_one_rank_are_its_own():
    ranks = Ranks(0, 1, CPU)
    assert ranks.largest(3) == 3
    assert ranks.from_main(2.5) == 2.5
    assert ranks.gather(torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]]
    ranks.barrier()
