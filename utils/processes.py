"""Commands of this repository as processes of their own: on one rank, or under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

# Asks the kernel for the signal, then becomes the command: code between fork and exec may hang in a process with threads.
ENDS_WITH_PARENT = """
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.argv[1], sys.argv[1:])
"""
ROOT = Path(__file__).resolve().parents[1]


def shell_words(*words: str | Path | int, ranks: int = 1) -> list[str]:
    """`python words...`, or the same under torchrun; the first word is a file of this repository."""
    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*python, str(ROOT / words[0]), *map(str, words[1:])]


def environment(**variables: str) -> dict[str, str]:
    """One thread per process: small models are many times slower with threads that wait for one another."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def begin(
    *words: str | Path | int, ranks: int = 1, output: Path | None = None, variables: dict[str, str] | None = None
) -> subprocess.Popen:
    """Start a command; what it prints is shown, or goes into the file `output`.

    Paths among its words are relative to where this process is. variables: of its environment, beside ours. It gets SIGTERM
    where this process ends before it, however that ends (on Linux).
    """
    command = [sys.executable, "-c", ENDS_WITH_PARENT, *shell_words(*words, ranks=ranks)]
    env = environment(**(variables or {}))
    if output is None:
        return subprocess.Popen(command, env=env)
    with open(output, "w") as file:
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)


def run(*words: str | Path | int, ranks: int = 1) -> None:
    """Start a command and wait for its end; ValueError where it fails."""
    code = subprocess.run(shell_words(*words, ranks=ranks), env=environment(), check=False).returncode
    if code:
        raise ValueError(f"{words[0]} ended with exit code {code}: see its message above")


def children(pid: int) -> list[int]:
    """The processes that a process started, such as the ranks of torchrun; none where it has ended."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except FileNotFoundError:
        return []
