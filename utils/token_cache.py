"""Images encoded once: token pyramids on disk as memory-mapped arrays, with a manifest that says what they are.

A cache directory holds, for each split, shards of tokens[n, L] uint16, labels[n] int32 and source[n] int32 (which image of the
folder, in its sorted order) as plain .npy files, and manifest.json, written last: a directory without it is not a cache. The
transformer's inputs are rebuilt from the tokens on the device.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.pyramid import Pyramid
from models.tokenizer import VQVAE
from utils.config import from_dict
from utils.data import TrainOrder, in_order
from utils.files import replace_text

ROWS_PER_SHARD = 1 << 17
ARRAYS = {"tokens": np.uint16, "labels": np.int32, "source": np.int32}


@dataclass(frozen=True)
class Manifest:
    """What a cache is made of.

    sides, num_codes: of the tokenizer; tokenizer: where it came from; fingerprint: SHA-256 of its weights. pixels, resize,
    augment, flip: how images were prepared (resize to resize * pixels, then cut out); views: encodings per image, one after
    another. rows: encodings per split; hashes: SHA-256 of every shard file by name.
    """

    sides: list
    num_codes: int
    tokenizer: str
    fingerprint: str
    class_names: list[str]
    pixels: int
    resize: float
    augment: bool
    flip: bool
    views: int
    rows: dict[str, int]
    hashes: dict[str, str]


def fingerprint(tokenizer: VQVAE) -> str:
    """SHA-256 over the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class CacheWriter:
    """Fills one split: `add` batches in order, then `close`."""

    def __init__(self, directory: Path, split: str, rows: int, num_tokens: int):
        self.directory, self.split, self.rows, self.num_tokens = directory, split, rows, num_tokens
        self.written = 0
        self.shard: dict[str, np.ndarray] = {}

    def add(self, tokens: Tensor, labels: Tensor, source: np.ndarray) -> None:
        """tokens (B, L), labels (B,), source (B,)."""
        values = {"tokens": tokens.cpu().numpy(), "labels": labels.numpy(), "source": source}
        start = 0
        while start < len(source):
            row = self.written % ROWS_PER_SHARD
            if row == 0:
                self._open_shard()
            count = min(len(source) - start, ROWS_PER_SHARD - row)
            for name, array in self.shard.items():
                array[row : row + count] = values[name][start : start + count]
            start += count
            self.written += count

    def _open_shard(self) -> None:
        number, rows = self.written // ROWS_PER_SHARD, min(ROWS_PER_SHARD, self.rows - self.written)
        for name, kind in ARRAYS.items():
            shape = (rows, self.num_tokens) if name == "tokens" else (rows,)
            path = self.directory / _shard_name(self.split, number, name)
            self.shard[name] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)

    def close(self) -> dict[str, str]:
        """Finish writing; returns the SHA-256 of every file of this split."""
        assert self.written == self.rows, f"{self.written} of {self.rows} rows written"
        for array in self.shard.values():
            array.flush()
        files = sorted(self.directory.glob(f"{self.split}_*.npy"))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    replace_text(directory / "manifest.json", json.dumps(asdict(manifest), indent=1) + "\n")


def _shard_name(split: str, number: int, array: str) -> str:
    return f"{split}_{number:05d}_{array}.npy"


class TokenCache:
    """One split of a cache: rows of tokens (L,) uint16 with labels. FileNotFoundError where there is no finished cache."""

    def __init__(self, directory: str | Path, split: str):
        self.manifest = read_manifest(directory)
        self.rows = self.manifest.rows[split]
        numbers = range(-(-self.rows // ROWS_PER_SHARD))
        self.tokens, self.labels = (
            [np.load(Path(directory) / _shard_name(split, n, name), mmap_mode="r", allow_pickle=False) for n in numbers]
            for name in ("tokens", "labels")
        )

    def __len__(self) -> int:
        return self.rows

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """tokens (B, L) int64, labels (B,) int64 of the rows asked for."""
        shards, rows = np.divmod(indices, ROWS_PER_SHARD)
        tokens = np.empty((len(indices), self.tokens[0].shape[1]), np.int64)
        labels = np.empty(len(indices), np.int64)
        for shard in np.unique(shards):
            chosen = shards == shard
            tokens[chosen] = self.tokens[shard][rows[chosen]]
            labels[chosen] = self.labels[shard][rows[chosen]]
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    def train_batches(self, order: TrainOrder, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, labels) of every micro-batch of this rank."""
        for _, indices in order.micro_batches_from(first_step, last_step):
            yield self.gather(indices)

    def val_batches(self, batch: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, labels) of this rank's part, each row once."""
        for indices in in_order(self.rows, batch, rank, world):
            yield self.gather(indices)


def read_manifest(directory: str | Path) -> Manifest:
    path = Path(directory) / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{directory}: no finished token cache (no manifest.json): make one with scripts/cache_tokens.py"
        )
    return from_dict(Manifest, json.loads(path.read_text()), str(path))


def check_cache(manifest: Manifest, tokenizer: VQVAE, source: str | Path) -> None:
    """ValueError, naming both sides, unless the cache was made by this tokenizer."""
    pyramid = Pyramid(tuple(manifest.sides))
    if pyramid != tokenizer.pyramid:
        raise ValueError(f"{source}: holds pyramids {pyramid}, the tokenizer makes {tokenizer.pyramid}")
    if manifest.fingerprint != (ours := fingerprint(tokenizer)):
        raise ValueError(
            f"{source}: made by the tokenizer {manifest.tokenizer} with hash {manifest.fingerprint[:12]}, "
            f"the one given has {ours[:12]}: encode again or give that one"
        )
