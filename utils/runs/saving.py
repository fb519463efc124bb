"""Checkpoints that training goes on from: written whole by the main rank, or in shards by all ranks in the background.

A whole checkpoint holds model.safetensors, ema.safetensors and optimizer.safetensors, a sharded one the same tensors in a
folder of shards; beside them stand config.json, train_state.json and checksums.json. Either kind is resumed by either kind of
run, on any number of ranks.
"""

import json
import shutil
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as torch_dist
from safetensors import safe_open
from torch import Tensor

from models.storage import Description, write_config, write_tensors
from models.tokenizer import TokenizerConfig
from models.transformer import TransformerConfig
from utils.files import aside_of, put_in_place, written_aside
from utils.runs.checkpoints import checkpoint_path, prune, seal
from utils.runs.shards import SHARDS, fill_from_shards_, is_sharded, shard_sizes
from utils.runs.state import sectioned

ModelConfig = TokenizerConfig | TransformerConfig


def save_checkpoint(
    run: Path,
    step: int,
    config: ModelConfig,
    description: Description,
    numbers: dict,
    tensors: dict[str, Tensor],
    keep: int,
    best: int = 0,
) -> Path:
    """Write checkpoints/step_N with all that training needs to go on, then remove all but the newest `keep` and the `best`.

    tensors: named "model.NAME", "optimizer.NAME" and so on, a file for each of these sections; numbers: for train_state.json.
    best: a step, 0 for none. OSError where it cannot be written; the checkpoints before it are then as they were.
    """
    target = checkpoint_path(run, step)
    with written_aside(target) as directory:
        for section, members in sectioned(tensors).items():
            write_tensors(directory / f"{section}.safetensors", members)
        _write_surroundings(directory, config, description, numbers)
    prune(run, target, keep, best)
    return target


class ShardedSaver:
    """Writes sharded checkpoints in the background, one at a time; every rank has one and calls it in the same order.

    The tensors are copied before `start` returns, so training may go on. The main rank puts the checkpoint in its place once
    all ranks have written their parts. An error in the background comes out of the next call, as OSError.
    """

    def __init__(self, is_main: bool, barrier: Callable[[], None]):
        self.is_main, self.barrier = is_main, barrier
        self.group = torch_dist.new_group(backend="gloo")  # of its own: training goes on talking over the other one
        self.finisher = ThreadPoolExecutor(1)
        self.running: Future | None = None

    def start(
        self,
        run: Path,
        step: int,
        config: ModelConfig,
        description: Description,
        numbers: dict,
        tensors: dict[str, Tensor],
        keep: int,
        best: int = 0,
    ) -> None:
        """As `save_checkpoint`, after the one before it has been finished."""
        import torch.distributed.checkpoint as dcp  # here, as it takes a second

        self.finish()
        target = checkpoint_path(run, step)
        aside = target.with_name(f".{target.name}.writing")
        if self.is_main:
            aside_of(target)
        self.barrier()
        writer = dcp.HuggingFaceStorageWriter(str(aside / SHARDS), save_distributed=True)
        written = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)

        def put_away() -> None:
            try:
                written.result()
                if self.is_main:
                    _write_surroundings(aside, config, description, numbers)
                    put_in_place(aside, target)
                    prune(run, target, keep, best)
            except BaseException:
                if self.is_main:
                    shutil.rmtree(aside, ignore_errors=True)
                raise

        self.running = self.finisher.submit(put_away)

    def has_failed(self) -> bool:
        """Whether a save is known by now not to have worked on this rank; `finish` says why."""
        return self.running is not None and self.running.done() and self.running.exception() is not None

    def finish(self) -> None:
        """Wait until the checkpoint that was started last is in its place."""
        running, self.running = self.running, None
        if running is None:
            return
        from torch.distributed.checkpoint import CheckpointException

        try:
            running.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise OSError(f"the last checkpoint could not be written ({_first_cause(error)})") from error


def _first_cause(error: BaseException) -> str:
    """One line of what went wrong: of a CheckpointException, on the first rank where it did."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(cause).split())[:200] or type(cause).__name__


def _write_surroundings(directory: Path, config: ModelConfig, description: Description, numbers: dict) -> None:
    """Everything of a checkpoint but its tensors; the checksums last."""
    write_config(directory, config, description)
    (directory / "train_state.json").write_text(json.dumps(numbers) + "\n")
    seal(directory)


def read_numbers(checkpoint: Path) -> dict:
    """What train_state.json holds."""
    return json.loads((checkpoint / "train_state.json").read_text())


@torch.no_grad()
def restore_(tensors: dict[str, Tensor], checkpoint: Path, may_lack: Container[str] = ()) -> set[str]:
    """Fill the tensors of a training state, whole or sharded, from a checkpoint, whole or sharded.

    may_lack: sections, such as "ema", that it need not have. Returns those that it has not, whose tensors stay as they are.
    ValueError names other tensors that it lacks or has in another size.
    """
    sharded = is_sharded(checkpoint)
    sizes = shard_sizes(checkpoint) if sharded else _file_sizes(checkpoint)
    lacking = set(sectioned(tensors)) - {name.partition(".")[0] for name in sizes}
    lacking = {section for section in lacking if section in may_lack}
    wanted = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in lacking}
    for name, tensor in wanted.items():
        if name not in sizes:
            raise ValueError(f"{checkpoint}: {name} is missing: it was written for another model or by other code")
        if tensor.shape != sizes[name]:
            raise ValueError(f"{checkpoint}: {name} has size {tuple(sizes[name])}, this model wants {tuple(tensor.shape)}")
    (fill_from_shards_ if sharded else _fill_from_files_)(wanted, checkpoint)
    return lacking


def _file_sizes(checkpoint: Path) -> dict[str, torch.Size]:
    sizes = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes |= {f"{path.stem}.{name}": torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return sizes


def _fill_from_files_(tensors: dict[str, Tensor], checkpoint: Path) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor  # here, as it takes a second

    for section, members in sectioned(tensors).items():
        with safe_open(checkpoint / f"{section}.safetensors", "pt") as file:
            for name, tensor in members.items():
                whole = file.get_tensor(name).to(tensor.device)
                if isinstance(tensor, DTensor):  # every rank reads all of it and keeps its part
                    whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
                tensor.copy_(whole)
