"""Images encoded once: token pyramids on disk as memory-mapped arrays, with a manifest that says what they are.

A cache directory holds, for each split, shards of tokens[n, L] uint16, labels[n] int32 and source[n] int32 (which image of the
folder, in its sorted order) as plain .npy files, and manifest.json, written last: a directory without it is not a cache. One
in the making has plan.json instead. ImageNet's 1,281,167 images x 680 tokens x 2 bytes are 1.74 GB per view. The
transformer's inputs are rebuilt from the tokens on the device.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.pyramid import Pyramid
from models.storage import HALF_TYPES, first_line, from_dict, weights_hash
from models.tokenizer import TOKEN_PARTS, VQVAE
from utils.data.batches import TrainOrder, in_order
from utils.data.pictures import WHITE
from utils.files import replace_text, sha256

SPLITS = ("train", "val")
ARRAYS = {"tokens": np.uint16, "labels": np.int32, "source": np.int32}
TOKENS = "tokens:"  # before a hash of what decides over tokens, to tell it from one of all weights
UNFINISHED = re.compile(r"\.((train|val)_\d{5,}_(tokens|labels|source)\.npy\.\d+|(plan|manifest)\.json)\.writing")


@dataclass(frozen=True)
class CacheShard:
    """Some rows of a split: the unit in which a cache is written. Each of its arrays is a file."""

    split: str
    number: int
    rows: range

    def file(self, array: str) -> str:
        return f"{self.split}_{self.number:05d}_{array}.npy"

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Its rows, numbered within the split, `size` at a time."""
        for start in range(self.rows.start, self.rows.stop, size):
            yield np.arange(start, min(start + size, self.rows.stop))


@dataclass(frozen=True)
class Plan:
    """What a cache is made of, known before the first image is encoded.

    sides, num_codes: of the tokenizer; tokenizer: where it came from; fingerprint: hash of its weights. pixels, resize,
    augment, flip, seed: how images are prepared (resized to resize * pixels, then cut out; validation images always from the
    middle); views: encodings per training image, one after another. rows, rows_per_shard: by split. listing: SHA-256 of file
    names and labels. precision: that of the tokenizer's encoder. background: what shows through transparent pictures.
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
    seed: int
    rows: dict[str, int]
    rows_per_shard: dict[str, int]
    listing: str
    _: KW_ONLY
    precision: str = "float32"
    background: str = WHITE

    @property
    def pyramid(self) -> Pyramid:
        return Pyramid(tuple(self.sides))

    def shards(self, *splits: str) -> list[CacheShard]:
        """All shards of these splits, in order."""
        return [
            CacheShard(split, number, range(start, min(start + self.rows_per_shard[split], self.rows[split])))
            for split in splits
            for number, start in enumerate(range(0, self.rows[split], self.rows_per_shard[split]))
        ]


@dataclass(frozen=True)
class Manifest(Plan):
    """What a finished cache is made of. hashes: SHA-256 of every shard file by name."""

    hashes: dict[str, str]


def rows_per_shard(rows: int) -> int:
    """A 64th of a split, but files neither tiny nor above 45 MB at 680 tokens.

    A function of the split alone, so that the files do not depend on how many ranks write them.
    """
    return min(max(-(-rows // 64), 1 << 10), 1 << 15)


def array_bytes(images: int, views: int, num_tokens: int) -> dict[str, int]:
    """Bytes on disk of each of the ARRAYS, without file headers (128 bytes a shard)."""
    values = {"tokens": num_tokens, "labels": 1, "source": 1}
    return {name: images * views * values[name] * np.dtype(kind).itemsize for name, kind in ARRAYS.items()}


def fingerprint(tokenizer: VQVAE) -> str:
    """SHA-256 over all that decides which tokens an image has: what it is of, then the hash.

    These are the weights of the encoder and the quantizer, and how codes are looked up. The decoder is not among them, so that
    tokens stay valid when it is refined.
    """
    return TOKENS + weights_hash(_token_parts(tokenizer), _lookup(tokenizer))


def rounded_to(tokenizer: VQVAE) -> str:
    """The half precision to which all that decides over tokens has been rounded; empty where it has not."""
    weights = list(_token_parts(tokenizer).parameters())
    return next((name for name, kind in HALF_TYPES.items() if all(torch.equal(w, w.to(kind).float()) for w in weights)), "")


def _token_parts(tokenizer: VQVAE) -> nn.ModuleDict:
    return nn.ModuleDict({name: getattr(tokenizer, name) for name in TOKEN_PARTS})


def is_of(text: str, tokenizer: VQVAE) -> bool:
    """Whether a fingerprint is of this tokenizer; earlier code noted one over all weights, the decoder's too."""
    if text.startswith(TOKENS):
        return text == fingerprint(tokenizer)
    return text == weights_hash(tokenizer, _lookup(tokenizer))


def check_trained_on(known: str | None, tokenizer: VQVAE, checkpoint: str | Path, source: str | Path) -> None:
    """ValueError where a checkpoint is known to be trained on tokens of another tokenizer than the one from `source`.

    The same tokenizer rounded to half precision is another one: its codes and its tokens are others.
    """
    if known and not is_of(known, tokenizer):
        rounded = rounded_to(tokenizer)
        raise ValueError(
            f"{checkpoint}: was trained on tokens of a tokenizer with hash {short(known)}, {source} has "
            f"{short(fingerprint(tokenizer))}{rounded and f' and is rounded to {rounded}'}: give that one, or --any_tokenizer"
        )


def _lookup(tokenizer: VQVAE) -> str:
    return f"normalize_lookup={tokenizer.config.normalize_lookup}"


# --- writing ------------------------------------------------------------------------------------------------------------


def write_shard(directory: Path, shard: CacheShard, arrays: dict[str, np.ndarray]) -> None:
    """Write tokens (n, L), labels (n,) and source (n,) aside and rename them once all are on disk.

    OSError where the disk is full or fails: nothing of this shard is left, the others are untouched.
    """
    # named by process: ranks that outlive a killed torchrun must not write into the files of the run that resumes theirs
    asides = {name: directory / f".{shard.file(name)}.{os.getpid()}.writing" for name in ARRAYS}
    try:
        for name, kind in ARRAYS.items():
            # not through a memory map: on a full disk that would end the process with a signal instead of an error
            with open(asides[name], "wb") as file:
                np.save(file, arrays[name].astype(kind, copy=False), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        for name, aside in asides.items():
            os.replace(aside, directory / shard.file(name))
    except OSError as error:
        raise OSError(
            f"{directory / shard.file('tokens')}: could not be written ({error}); whole shards are kept: "
            f"see that the disk has room, then give the same command again"
        ) from error
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def missing_shards(directory: Path, plan: Plan) -> list[CacheShard]:
    """The shards of which not all files are there under their final names, and so whole."""
    present = {path.name for path in directory.iterdir()} if directory.exists() else set()
    return [shard for shard in plan.shards(*SPLITS) if not present.issuperset(map(shard.file, ARRAYS))]


def write_plan(directory: Path, plan: Plan) -> None:
    replace_text(directory / "plan.json", json.dumps(asdict(plan), indent=1) + "\n")


def write_manifest(directory: Path, plan: Plan) -> None:
    """Turn an unfinished cache whose shards are all there into a finished one."""
    hashes = {name: sha256(directory / name) for shard in plan.shards(*SPLITS) for name in map(shard.file, ARRAYS)}
    replace_text(directory / "manifest.json", json.dumps(asdict(Manifest(**asdict(plan), hashes=hashes)), indent=1) + "\n")
    (directory / "plan.json").unlink(missing_ok=True)


def check_plan(directory: Path, plan: Plan) -> None:
    """ValueError, naming both sides, where an unfinished cache in `directory` was begun with other settings or files."""
    path = directory / "plan.json"
    if not path.exists():
        return
    begun = _read(Plan, path)
    check_classes(begun.class_names, plan.class_names, f"{directory}: the unfinished cache there", "this command")
    for field in fields(Plan):
        if field.name == "tokenizer":  # the same one may lie elsewhere by now: its fingerprint counts
            continue
        theirs, ours = getattr(begun, field.name), getattr(plan, field.name)
        if theirs != ours:
            title = {"fingerprint": "tokenizer hash", "listing": "hash of file names"}.get(field.name, field.name)
            raise ValueError(
                f"{directory}: an unfinished cache with {title} {short(theirs)} is there, this command has {short(ours)}: "
                f"give what it was begun with, or another --out"
            )


def short(value: object) -> object:
    """The first digits of a hash; everything else as it is."""
    return value.removeprefix(TOKENS)[:12] if isinstance(value, str) else value


# --- reading ------------------------------------------------------------------------------------------------------------


class TokenCache:
    """One split of a cache: rows of tokens (L,) uint16 with labels.

    FileNotFoundError where there is no finished cache or a file is missing, ValueError where one is not what the manifest says.
    """

    def __init__(self, directory: str | Path, split: str):
        self.directory, self.split = Path(directory), split
        self.manifest = read_manifest(directory)
        self.rows, self.rows_per_shard = self.manifest.rows[split], self.manifest.rows_per_shard[split]
        self.shards = self.manifest.shards(split)
        arrays = {name: [self._open(shard, name) for shard in self.shards] for name in ARRAYS}
        self.tokens = arrays["tokens"]  # one (n, L) each
        self.labels = np.concatenate(arrays["labels"]).astype(np.int64)  # in memory: small beside the tokens

    def _open(self, shard: CacheShard, name: str) -> np.ndarray:
        """A file of a shard as a memory map; its size, type and shape are checked, its bytes are not (see `verify`)."""
        path = self.directory / shard.file(name)
        num_tokens = self.manifest.pyramid.num_tokens
        shape = (len(shard.rows), num_tokens) if name == "tokens" else (len(shard.rows),)
        wanted = f"{_describe(shape, ARRAYS[name])}: copy the cache again, or remove it and encode again"
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing; the manifest has {wanted}")
        try:
            # not np.load, which also opens pickles and archives
            array = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, OSError, OverflowError) as error:
            raise ValueError(f"{path}: not a whole .npy array ({error}); the manifest has {wanted}") from error
        if array.shape != shape or array.dtype != ARRAYS[name]:
            raise ValueError(f"{path}: holds {_describe(array.shape, array.dtype)}, the manifest has {wanted}")
        return np.asarray(array)  # the map as a plain array: np.memmap computes its result type anew at every access

    def __len__(self) -> int:
        return self.rows

    def verify(self) -> None:
        """Read everything once: ValueError naming the first file whose SHA-256 is not that of the manifest.

        Leaves the files in the page cache, if they fit.
        """
        for name in (shard.file(array) for shard in self.shards for array in ARRAYS):
            found, written = sha256(self.directory / name), self.manifest.hashes.get(name, "none")
            if found != written:
                raise ValueError(
                    f"{self.directory / name}: damaged: its SHA-256 is {found[:12]}, the manifest has {written[:12]}: "
                    f"copy the cache again, or remove it and encode again"
                )

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """tokens (B, L) uint16, labels (B,) int64 of the rows asked for, each in [0, len(self))."""
        shards, rows = np.divmod(indices, self.rows_per_shard)
        order = np.argsort(shards, kind="stable")
        ends = np.bincount(shards, minlength=len(self.tokens)).cumsum().tolist()
        tokens = np.empty((len(indices), self.tokens[0].shape[1]), np.uint16)
        start = 0
        for array, end in zip(self.tokens, ends, strict=True):
            chosen = order[start:end]
            tokens[chosen] = array.take(rows[chosen], axis=0)
            start = end
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[indices])

    def train_batches(self, order: TrainOrder, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, labels) of every micro-batch of this rank."""
        for _, indices in order.micro_batches_from(first_step, last_step):
            yield self.gather(indices)

    def val_batches(self, batch: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, labels) of this rank's part, each row once."""
        for indices in in_order(self.rows, batch, rank, world):
            yield self.gather(indices)


def _describe(shape: tuple[int, ...], dtype: np.dtype | type) -> str:
    return f"{' x '.join(map(str, shape)) or 'one'} {np.dtype(dtype).name}"


def read_manifest(directory: str | Path) -> Manifest:
    path = Path(directory) / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{directory}: no finished token cache (no manifest.json): make one with scripts/cache_tokens.py"
        )
    return _read(Manifest, path)


def _read(kind: type[Plan], path: Path) -> Plan:
    """ValueError for what is none, or from which the files of a cache cannot be told."""
    try:
        plan = from_dict(kind, json.loads(path.read_bytes()), kind.__name__)
        Pyramid(tuple(plan.sides))
        plan.shards(*SPLITS)
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{path}: not of a token cache of this version ({first_line(error)}): remove the cache and encode again"
        ) from error
    return plan


def check_cache(manifest: Manifest, tokenizer: VQVAE, source: str | Path) -> None:
    """ValueError, naming both sides, unless the cache was made by this tokenizer."""
    if manifest.pyramid != tokenizer.pyramid:
        raise ValueError(
            f"{source}: holds pyramids {manifest.pyramid}, the tokenizer makes {tokenizer.pyramid}: "
            f"give --pn={manifest.pyramid} with a released tokenizer, or encode again"
        )
    if not is_of(manifest.fingerprint, tokenizer):
        raise ValueError(
            f"{source}: made by the tokenizer {manifest.tokenizer} with hash {short(manifest.fingerprint)}, "
            f"the one given has {short(fingerprint(tokenizer))}: encode again or give that one"
        )


def check_classes(names: list[str], other_names: list[str], source: str, other_source: str) -> None:
    """ValueError, naming both sides and the first class that differs, unless labels mean the same classes in both."""
    if names == other_names:
        return
    label = next(
        (i for i, pair in enumerate(zip(names, other_names, strict=False)) if pair[0] != pair[1]),
        min(len(names), len(other_names)),
    )
    first, second = (repr(side[label]) if label < len(side) else "missing" for side in (names, other_names))
    raise ValueError(
        f"{source} has {len(names)} classes, {other_source} {len(other_names)}; the first to differ, number {label}, "
        f"is {first} in the one and {second} in the other: use the same class folders for both"
    )
