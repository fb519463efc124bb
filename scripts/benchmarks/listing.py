"""The `listing` command of scripts/benchmark.py: what the names of a large data set cost, in time and in memory."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder

from scripts.benchmarks.config import NUM_CLASSES, BenchmarkConfig
from scripts.benchmarks.formats import Columns
from utils.data.images import ImageFiles, read_folders

FORK = multiprocessing.get_context("fork")  # as DataLoader starts its workers on Linux
HELD_OUT = 50 / 1281  # validation images to each one to train on, as ImageNet has


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


COLUMNS: Columns = {
    "listing": ("names and labels", str),
    "rows": ("images", "{:,}".format),
    "seconds": ("time to list", "{:.1f} s".format),
    "own_bytes": ("memory of the process that lists", megabytes),
    "workers": ("workers", str),
    "worker_bytes": ("each worker's own copy", megabytes),
    "total_bytes": ("all workers'", megabytes),
}


def listing(config: BenchmarkConfig) -> list[dict]:
    """Names of a large data set

    A folder of empty files, with names like ImageNet's and its share of held-out ones, is listed and handed to processes
    as DataLoader does it, by a fork. Each of these workers then looks at the name and label of every image once, as it will
    have in a long run. First as a list of tuples, which is what torchvision's ImageFolder keeps, then as train.py keeps them.

    - *Time to list*: both splits, the kernel's own memory of the folders being warm; torchrun's other ranks list nothing, but
      with ImageFolder each would.
    - *Memory of the process that lists*: what it has more than before, afterwards.
    - *Each worker's own copy*: memory of its own (not shared with any process) that looking at all names has cost, the mean.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_tree(root, config.rows)
        return [
            measured("list of tuples (ImageFolder)", image_folders, samples_of, root, config),
            measured("arrays (train.py)", read_folders, names_of, root, config),
        ]


def make_tree(root: Path, rows: int) -> None:
    """So many empty files to train on in classes of a hundred or more, and some held out."""
    classes = max(min(rows // 100, NUM_CLASSES), 1)
    for split, count in (("train", rows), ("val", max(round(rows * HELD_OUT), classes))):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(label, count, classes):
                (folder / f"n{label:08d}_{number}.JPEG").touch()


def image_folders(root: Path) -> list[ImageFolder]:
    return [ImageFolder(str(root / split)) for split in ("train", "val")]


def samples_of(folder: ImageFolder) -> int:
    """Look at everything, as a long run does."""
    return sum(len(path) + label for path, label in folder.samples)


def names_of(files: ImageFiles) -> int:
    return sum(len(files.name(index)) + int(files.labels[index]) for index in range(len(files)))


def measured(title: str, read: Callable[[Path], Any], look: Callable[[Any], int], root: Path, config: BenchmarkConfig) -> dict:
    """A row, of a process that nothing else was done in."""
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=list_and_share, args=(read, look, root, config.workers, send))
    process.start()
    send.close()
    try:
        seconds, own_bytes, worker_bytes = receive.recv()
    except EOFError as error:
        raise OSError(f"the process that lists {config.rows:,} names has ended: see that there is memory enough") from error
    process.join()
    return {
        "listing": title,
        "rows": config.rows,
        "seconds": seconds,
        "own_bytes": own_bytes,
        "workers": config.workers,
        "worker_bytes": worker_bytes,
        "total_bytes": config.workers * worker_bytes,
    }


def list_and_share(read: Callable[[Path], Any], look: Callable[[Any], int], root: Path, workers: int, send: Connection) -> None:
    """Sends the seconds, the bytes of this process, and the mean of the bytes that each worker has for itself."""
    before, start = resident_bytes(), time.perf_counter()
    train, _ = read(root)
    seconds, own_bytes = time.perf_counter() - start, resident_bytes() - before
    counts = FORK.SimpleQueue()

    def work() -> None:
        first = private_bytes()
        look(train)
        counts.put(private_bytes() - first)

    processes = [FORK.Process(target=work) for _ in range(workers)]
    for process in processes:
        process.start()
    copies = [counts.get() for _ in processes]
    for process in processes:
        process.join()
    send.send((seconds, own_bytes, sum(copies) / workers))


def resident_bytes() -> int:
    return smaps("Rss")


def private_bytes() -> int:
    """Memory that no other process has a part in."""
    return smaps("Private_Clean") + smaps("Private_Dirty")


def smaps(name: str) -> int:
    """A sum over all mappings of this process, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
