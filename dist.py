"""Many processes as one: the group that torchrun describes, what its ranks tell each other, and how a model is spread over it.

Gradients travel by NCCL between GPUs and by gloo between CPUs. Decisions (stop, save, which checkpoint) always travel between
CPUs, so that they never wait for a GPU.
"""

import contextlib
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

MEETING_SECONDS = 1800  # how long rank 0 waits for the others at the start
STILL_AT_IT = 60.0  # seconds, between two words of rank 0 to those who wait for what it does
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """Who this process is: rank of world processes, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks; every rank gets it."""
        if self.world == 1:
            return values
        total = values.clone()
        torch_dist.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's values (...) -> (world, ...) on every rank, on the CPU."""
        values = values.detach().cpu()
        if self.world == 1:
            return values.unsqueeze(0)
        parts = [torch.empty_like(values) for _ in range(self.world)]
        torch_dist.all_gather(parts, values)
        return torch.stack(parts)

    def largest(self, value: int) -> int:
        """The largest of all ranks' numbers."""
        if self.world == 1:
            return value
        shared = torch.tensor(value)
        torch_dist.all_reduce(shared, torch_dist.ReduceOp.MAX)
        return int(shared)

    def from_main(self, value: float) -> float:
        """Rank 0's number on every rank."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        torch_dist.broadcast(shared, src=0)
        return shared.item()

    def numbers_from_main(self, values: list[int]) -> list[int]:
        """Rank 0's list on every rank."""
        length = int(self.from_main(len(values)))
        shared = torch.tensor(values if self.is_main else [0] * length, dtype=torch.int64)
        if self.world > 1:
            torch_dist.broadcast(shared, src=0)
        return shared.tolist()

    def once(self, work: Callable[[], Value]) -> Value:
        """What `work` gives on rank 0, on every rank, however long it takes; a mistake that it finds ends all.

        It travels as a pickle, between processes of one run.
        """
        if self.world == 1:
            return work()
        given: list[Value] = []
        raised: list[BaseException] = []

        def do() -> None:
            try:
                given.append(work())
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=do, daemon=True)
        if self.is_main:
            thread.start()
            thread.join(STILL_AT_IT)
        while self.from_main(thread.is_alive()):  # the others wait here, not in one collective, which would time out
            if self.is_main:
                thread.join(STILL_AT_IT)
        with self.failing_together():
            if raised:
                raise raised[0]
        shared = given if self.is_main else [None]
        torch_dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
        return shared[0]

    def copy_from_main_(self, values: Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        if self.world > 1:
            torch_dist.broadcast(values, src=0)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.largest(0)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """A mistake that any rank finds inside ends all: the first that found one raises it, the others leave without a word.

        For what each rank does by itself: inside, none may wait for another.
        """
        mistake = None
        try:
            yield
        except (ValueError, OSError) as error:
            mistake = error
        failed = self.gather(torch.tensor(mistake is not None)).tolist()
        if mistake is not None and failed.index(True) == self.rank:
            raise mistake
        if any(failed):
            with contextlib.suppress(RuntimeError):
                self.barrier()  # until that rank is gone: if this one went first, torchrun could end it before it speaks
            raise SystemExit(1)


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the group that torchrun's environment describes, or be alone; leave it at the end.

    ConnectionError where other ranks are lost on the way.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world == 1:
        yield Ranks(0, 1, device)
        return
    store, rank = _meet()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    # After an error on this rank alone the group is left as it is: taking it down could wait for the others for ever.
    try:
        yield Ranks(rank, world, device)
    except SystemExit:
        torch_dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not isinstance(error, torch_dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0][:120]
        raise ConnectionError(f"lost the other ranks ({reason}); what they say tells why; the same command resumes") from error
    torch_dist.destroy_process_group()


def _meet() -> tuple[torch_dist.Store, int]:
    """A store that only those ranks share which have just been started together, and the number of this one.

    torchrun keeps its store when it restarts all ranks, so new ranks could read the addresses of dead ones there and wait for
    them (pytorch issue 135712). Here rank 0 draws a prefix and hands it to each of the others under a word that this one has
    just drawn, until it is thanked for it: whoever is dead does not answer.
    """
    store, rank, world = next(torch_dist.rendezvous("env://"))
    drawn = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", drawn)
        prefix = store.get(f"prefix/{drawn}").decode()  # waits for it
        store.set(f"thanks/{drawn}/{prefix}", "")
        return torch_dist.PrefixStore(prefix, store), rank
    missing = set(range(1, world))
    deadline = time.monotonic() + MEETING_SECONDS
    while missing:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"ranks {sorted(missing)} of {world} have not come within {MEETING_SECONDS} s: see what they say"
            )
        for other in sorted(missing):
            if store.check([f"here/{other}"]):
                word = store.get(f"here/{other}").decode()
                store.set(f"prefix/{word}", drawn)
                if store.check([f"thanks/{word}/{drawn}"]):
                    missing.remove(other)
        time.sleep(0.01)
    return torch_dist.PrefixStore(drawn, store), rank


# --- spreading a model over the ranks -----------------------------------------------------------------------------------


def replicated(model: nn.Module, static_graph: bool = False, unused_parameters: bool = False) -> DistributedDataParallel:
    """DDP: the whole model on every rank.

    static_graph: every step runs the same operations. unused_parameters: some steps leave out some, which is searched for.
    """
    # the name that newer versions want does not exist in the oldest one that we take
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    return DistributedDataParallel(
        model,
        broadcast_buffers=False,  # they are constants
        gradient_as_bucket_view=True,
        static_graph=static_graph,
        find_unused_parameters=unused_parameters,
    )


class InParts(Protocol):
    """A model that says which modules are gathered on their own, inner ones first, itself last."""

    precision_parts: list  # of (module, exact); exact: always in float32


def shard_(model: InParts, ranks: Ranks, compute_dtype: torch.dtype | None) -> None:
    """FSDP2: every rank keeps a part of each parameter, gathered part by part when it is needed.

    compute_dtype: what parts that need not be exact are gathered as, None: float32. Gradients are reduced in float32.
    ValueError for a single rank.
    """
    if ranks.world == 1:
        raise ValueError("--parallel=fsdp shares a model out over ranks, there is one: start it with torchrun, or use ddp")
    # Blocks return their states too, views among them; nothing here writes to what a block returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    halved = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module, is_exact in model.precision_parts:
        fully_shard(module, mesh=mesh, mp_policy=exact if is_exact else halved)


@contextlib.contextmanager
def gradient_exchange(model: nn.Module, now: bool) -> Iterator[None]:
    """Replicas average their gradients in backward passes inside, or keep them to themselves until a later one.

    Sharded models always do: gradients that are kept are those of the whole model on every rank.
    """
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def whole_outside_forward(model: nn.Module) -> Iterator[None]:
    """Lets methods other than forward be called, after a first forward: parameters of no block are gathered meanwhile."""
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()
