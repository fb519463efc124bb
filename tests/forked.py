"""Commands in processes of their own that need not load PyTorch first, which takes longer than most of what tests do in them.

They are forked from a process that has loaded it and done nothing else, and then run a file as Python would: with words,
environment, output and exit code of their own. Ranks find each other by the variables that torchrun sets and by a store that
outlives them, and where one of them fails the others are ended.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as torch_dist

from utils.processes import ROOT, environment

PROCESSES = multiprocessing.get_context("forkserver")
# what commands import on their way; not the hub's package, which reads variables as it is imported, and nothing of ours
PROCESSES.set_forkserver_preload(
    [
        "torch._dynamo",  # by every optimizer
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
        "torchvision.transforms.v2",
        "torchmetrics.functional.image",
        "timm",
        "matplotlib.figure",
    ]
)


class Forked:
    """`python words...`, words[0] a file of the repository, in its root or elsewhere, by one process or by ranks."""

    def __init__(self, *words, ranks: int = 1, cwd: Path = ROOT, **variables: str):
        self.words = list(map(str, words))
        self.outputs = tempfile.TemporaryDirectory()
        self.paths = [Path(self.outputs.name) / name for name in ("stdout", "stderr")]
        for path in self.paths:
            path.touch()
        surroundings = [environment(**variables)]
        if ranks > 1:
            self.store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            surroundings = [{**surroundings[0], **rank_variables(rank, ranks, self.store.port)} for rank in range(ranks)]
        self.processes = [
            PROCESSES.Process(target=run_file, args=(self.words, variables, self.paths, cwd)) for variables in surroundings
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """The exit code is 0 or that of the process that failed first, after which the others are terminated."""
        deadline = time.monotonic() + timeout
        while not (failed := [process.exitcode for process in self.processes if process.exitcode]):
            if all(process.exitcode == 0 for process in self.processes):
                break
            assert time.monotonic() < deadline, f"{self.words[0]} has not ended within {timeout} seconds"
            time.sleep(0.02)
        for process in self.processes:
            process.terminate()  # nothing where it has ended
            process.join(10)
        self.kill()
        return subprocess.CompletedProcess(self.words, failed[0] if failed else 0, *(path.read_text() for path in self.paths))

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """All at once, by SIGKILL."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_) -> None:
        self.kill()


def run_forked(*words, ranks: int = 1, timeout: float = 300, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run a command and wait for it."""
    with Forked(*words, ranks=ranks, cwd=cwd, **variables) as command:
        return command.wait(timeout)


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As torchrun --standalone sets them."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    texts = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return texts | {name: str(number) for name, number in numbers.items()}


def run_file(words: list[str], variables: dict[str, str], outputs: list[Path], cwd: Path) -> None:
    """In the new process: become `python words...`. outputs: what stdout and stderr of all ranks are appended to."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    file = str(ROOT / words[0])
    sys.argv, sys.path[:0] = [file if cwd != ROOT else words[0], *words[1:]], [str(Path(file).parent)]
    try:
        runpy.run_path(file, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as at the end of Python, which a forked process does not come to
