"""Many short runs of train.py by the same two ranks, for tests/test_two_ranks.py: starting processes takes longer than these.

torchrun --nproc_per_node=2 tests/two_ranks.py OUT RUNS: RUNS is a JSON list of [name, flags]; each runs into OUT/name, unless
it says "copy A B", which copies a run, or "drop A N", which removes its checkpoint of step N. The message of a run that fails
is written to OUT/name.error.RANK. Two flags are not those of train.py: --poison makes a loss not finite, --little_room lets the
second rank write small files only, as a full disk would.
"""

import itertools
import json
import resource
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from dist import Ranks, process_group
from utils import cli
from utils.runs.checkpoints import checkpoint_path
from utils.runs.config import TrainConfig

LITTLE_ROOM = 50_000  # bytes


def spoil_the_loss_of_rank_one(rank: int) -> None:
    """What --poison stands for: in the third step the second scale of the second rank is not finite."""
    usual = train.NextScalePrediction._token_losses

    steps = itertools.count()  # one pass a step

    def token_losses(self, *arguments):
        losses, predictions = usual(self, *arguments)
        if rank == 1 and next(steps) == 2:
            losses = losses.clone()
            losses[:, 1:5] *= torch.nan
        return losses, predictions

    train.NextScalePrediction._token_losses = token_losses


def run(out: Path, name: str, flags: list[str], ranks: Ranks) -> None:
    action, *words = name.split()
    if action in ("copy", "drop"):
        if ranks.is_main and action == "copy":
            shutil.copytree(out / words[0], out / words[1])
        elif ranks.is_main:
            shutil.rmtree(checkpoint_path(out / words[0], int(words[1])))
        ranks.barrier()
        return
    usual = train.NextScalePrediction._token_losses
    room, largest_room = resource.getrlimit(resource.RLIMIT_FSIZE)
    if "--poison" in flags:
        spoil_the_loss_of_rank_one(ranks.rank)
    if "--little_room" in flags and ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE_ROOM, largest_room))
    flags = [flag for flag in flags if flag not in ("--poison", "--little_room")]
    try:
        config = cli.parse(TrainConfig, "", [*flags, "--local_out_dir_path", str(out / action)])
        train.build_trainer(config, ranks).fit()
    except (ValueError, FloatingPointError, OSError) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, largest_room))
        (out / f"{action}.error.{ranks.rank}").write_text(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, largest_room))
        train.NextScalePrediction._token_losses = usual


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group() as ranks:
        for name, flags in json.loads(sys.argv[2]):
            run(Path(sys.argv[1]), name, flags, ranks)
