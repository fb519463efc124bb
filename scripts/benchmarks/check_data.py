"""The `check_data` command of scripts/benchmark.py: how fast a folder of images is looked at before training."""

import os
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from scripts.benchmarks.config import BenchmarkConfig
from scripts.benchmarks.formats import Columns
from utils.data.fashion_mnist import export_fashion_mnist
from utils.data.survey import duplicates, list_folder, look_at, reasons_to_stop

COLUMNS: Columns = {
    "pictures": ("pictures", str),
    "count": ("number", "{:,}".format),
    "processes": ("processes", str),
    "images_per_cpu_second": ("images per second of a core", "{:,.0f}".format),
    "seconds": ("time", "{:.1f} s".format),
    "cpu_seconds": ("time of cores", "{:.1f} s".format),
    "load": ("load before", "{:.1f}".format),
}
JPEG_SIZE, JPEG_QUALITY = (500, 375), 90  # the usual size in ImageNet
GRAIN = 16  # random colours along the longer side, smooth between them


def check_data(config: BenchmarkConfig) -> list[dict]:
    """Looking at a folder of images

    What scripts/check_data.py does before it prints: list the folder, read every picture as training does, hash its bytes,
    look for copies and for what would end a training. The embedded photographs as PNG of 32x32, and JPEG of 500x375 with
    random smooth content, which decode faster than photographs with detail. Files are in memory (page cache). Medians of the
    repeats. Other programs may run beside it, as the load of the machine before each row tells: so processor time, of all
    processes together, stands beside the time by the clock, and it is what counts.
    """
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        folders = {"PNG 32x32": Path(directory) / "png", "JPEG 500x375": Path(directory) / "jpeg"}
        export_fashion_mnist(folders["PNG 32x32"])
        make_jpegs(folders["JPEG 500x375"], config.rows)
        for name, folder in folders.items():
            for processes in config.numbers("processes"):
                load = os.getloadavg()[0]
                survey(folder, processes)  # warms up
                counts, clock, cores = zip(*(survey(folder, processes) for _ in range(config.repeats)), strict=True)
                count, seconds, cpu_seconds = counts[0], median(clock), median(cores)
                rows.append(
                    {
                        "pictures": name,
                        "count": count,
                        "processes": processes,
                        "images_per_second": count / seconds,
                        "images_per_cpu_second": count / cpu_seconds,
                        "seconds": seconds,
                        "cpu_seconds": cpu_seconds,
                        "load": load,
                    }
                )
    return rows


def make_jpegs(root: Path, count: int) -> None:
    """train/<class>/*.jpg and, every tenth, val/<class>/*.jpg."""
    rng = np.random.default_rng(0)
    width, height = JPEG_SIZE
    for number in range(count):
        folder = root / ("val" if number % 10 == 9 else "train") / f"class_{number // 10 % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        colours = rng.integers(0, 256, (GRAIN * height // width, GRAIN, 3), np.uint8)
        picture = Image.fromarray(colours).resize(JPEG_SIZE, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:05d}.jpg", quality=JPEG_QUALITY)


def survey(root: Path, processes: int) -> tuple[int, float, float]:
    """Number of pictures, seconds by the clock and of processors. ValueError where one is found to be faulty."""
    start, cpu_start = time.perf_counter(), cpu_time()
    splits, places = list_folder(root)
    for place, picture in look_at(places, processes):
        splits[place.split].classes[place.label].append(picture)
    duplicates(splits)
    if stops := reasons_to_stop(splits):
        raise ValueError(f"the pictures made for it are faulty: {stops[0]}")
    return len(places), time.perf_counter() - start, cpu_time() - cpu_start


def cpu_time() -> float:
    """Seconds that processors have spent on this process and on those of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
