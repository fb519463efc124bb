"""The `tokens` command of scripts/benchmark.py: batches of a token cache, read as training reads them."""

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from models.pyramid import STANDARD_SIDES
from scripts.benchmarks.config import BATCHES_PER_REPEAT, IMAGENET_IMAGES, NUM_CLASSES, PIXELS, BenchmarkConfig
from scripts.benchmarks.formats import Columns, gigabytes
from utils.data import token_cache

COLUMNS: Columns = {
    "rows": ("images in the cache", "{:,}".format),
    "shards": ("shards", str),
    "batch_seconds": ("time per batch", lambda seconds: f"{1000 * seconds:.2f} ms"),
    "imagenet_view_tokens_bytes": ("tokens of a view of ImageNet", gigabytes),
    "imagenet_view_bytes": ("with labels and sources", gigabytes),
}


def tokens(config: BenchmarkConfig) -> list[dict]:
    """Reading a token cache

    Random rows of a token cache, gathered into batches as training does, by one thread. The cache is made for it, of random
    tokens in the real format (256 px, 680 tokens of 16 bits), and lies in memory (page cache), as ImageNet's does after an
    epoch on a machine with room for it. The size of a view of ImageNet follows from the format.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        cache = synthetic_cache(Path(directory), config.rows)
        rng = np.random.default_rng(0)
        seconds = []
        for _ in range(config.repeats + 1):
            batches = [rng.integers(0, len(cache), config.batch) for _ in range(BATCHES_PER_REPEAT)]
            start = time.perf_counter()
            for batch in batches:
                cache.gather(batch)
            seconds.append((time.perf_counter() - start) / BATCHES_PER_REPEAT)
    batch_seconds = median(seconds[1:])  # the first repeat warms up
    view = token_cache.array_bytes(IMAGENET_IMAGES, 1, cache.manifest.pyramid.num_tokens)
    return [
        {
            "batch": config.batch,
            "rows": config.rows,
            "shards": len(cache.shards),
            "images_per_second": config.batch / batch_seconds,
            "batch_seconds": batch_seconds,
            "imagenet_view_tokens_bytes": view["tokens"],
            "imagenet_view_bytes": sum(view.values()),
        }
    ]


def synthetic_cache(directory: Path, rows: int) -> token_cache.TokenCache:
    """The training split of a cache with random tokens, in the format of scripts/cache_tokens.py."""
    plan = token_cache.Plan(
        sides=list(STANDARD_SIDES[PIXELS]),
        num_codes=4096,
        tokenizer="none",
        fingerprint="none",
        class_names=[str(number) for number in range(NUM_CLASSES)],
        pixels=PIXELS,
        resize=1.125,
        augment=True,
        flip=False,
        views=1,
        seed=0,
        rows={"train": rows, "val": 0},
        rows_per_shard={split: token_cache.rows_per_shard(rows) for split in token_cache.SPLITS},
        listing="none",
    )
    rng = np.random.default_rng(0)
    for shard in plan.shards("train"):
        arrays = {
            "tokens": rng.integers(0, plan.num_codes, (len(shard.rows), plan.pyramid.num_tokens), np.uint16),
            "labels": rng.integers(0, NUM_CLASSES, len(shard.rows), np.int32),
            "source": np.array(shard.rows, np.int32),
        }
        token_cache.write_shard(directory, shard, arrays)
    token_cache.write_manifest(directory, plan)
    return token_cache.TokenCache(directory, "train")
