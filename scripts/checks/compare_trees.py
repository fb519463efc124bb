"""Give the same commands to two checkouts of this project and compare what they leave, to the byte.

    python scripts/checks/compare_trees.py BEFORE AFTER

For refactors, which must change nothing. Both train tokenizers and transformers of every family, resume them, cache tokens,
sample, score and convert, with a few of the embedded photographs, on a CPU with one thread. Then AFTER goes on with what BEFORE
has left: runs, caches and checkpoints. Only command lines are used, nothing is imported from the two checkouts.

Compared are tensors, logged figures, tokens, pictures, settings and scores, but not what the clock or the memory decides. What
only AFTER has, such as a new figure in a log, is told and is no difference; a tensor more is one. Left out are compiled blocks
(--tfast), stops by a signal (soak.py has them) and everything that needs a GPU.
"""

import fnmatch
import gzip
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import safetensors
from PIL import Image
from safetensors.numpy import save_file

from utils import cli, evidence
from utils.cli import argument, flag

TRAIN_IMAGES, VAL_IMAGES = 80, 24
RELEASED = {"vae": "tokenizer", "mvar": "mvar_tiny", "markov": "markov_tiny"}  # small models, by golden file
AT_A_TIME = 2  # commands
SHOWN_LINES = 6  # of the output of a command that failed
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "https_proxy": "http://127.0.0.1:9",  # a closed door: scores must not depend on what can be downloaded today
}


@dataclass(frozen=True)
class CompareConfig:
    """Arguments of scripts/checks/compare_trees.py."""

    before: str = argument("checkout to compare with; what it leaves is kept, by its commit, for the next comparison")
    after: str = argument("checkout to be compared")
    work: str = flag("out/trees", "directory for what both leave")
    only: str = flag("*", "do steps of these names and what they need, such as 'runs/*,scores/mvar.json'")
    json: str = flag("", "file for the results, empty: none")


# --- what is done -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command.

    out: what it leaves, which is also its name. words: script and flags, but for that of `out`. needs: steps before it.
    resumes: run that it takes up from the middle. crosses: AFTER does it a second time with what BEFORE has left.
    """

    out: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    ranks: int = 1
    resumes: str = ""
    crosses: bool = False

    def command(self, tree: Path) -> list[str]:
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"] if self.ranks > 1 else []
        script, *flags = self.words
        out_flag = {"train.py": "--local_out_dir_path", "scripts/evaluate.py": "--json"}.get(script, "--out")
        return [sys.executable, *ranks, str(tree / script), *flags, f"{out_flag}={self.out}"]


SMALL_TOKENS, LARGE_TOKENS = "caches/4x4", "caches/6x6"  # windows of 7x7 limit nothing on a map of 4x4
TOKENIZER_TRAINING = "--preset=f8-32 --data_path=images --bs=8 --max_steps=12 --save_every=6 --restart_every=3 --log_every=1"
TOKENIZERS = {"tokenizer": "--hflip", "tokenizer-ddp": "--l1=0.5", "tokenizer-bf16": "--fp16=2 --resize=1"}
TRAINING = (
    "--depth=3 --width=64 --heads=2 --bs=16 --ac=2 --tblr=2e-2 --alng=0.5 --hd=1 --drop_path=0.3 --class_dropout=0.2 --ema=0.9 "
    "--wp=25 --pg=0.5 --pg0=1 --pgwp=25 --max_steps=16 --save_every=8 --val_every=6 --val_samples=2 --log_every=1 --seed=5"
)
ALL_SCALES = "--pg=0 --pg0=4 --pgwp=0"
OTHER_TRAINING = f"{ALL_SCALES} --sche=cos --twde=0.1 --tclip=0.5 --ls=0.1"
TRANSFORMERS = {  # family, where tokens or images come from, flags
    "mvar": ("mvar", SMALL_TOKENS, ""),
    "var": ("var", SMALL_TOKENS, ""),
    "markov": ("markov", LARGE_TOKENS, ""),
    "markov-mamba": ("markov-mamba", LARGE_TOKENS, "--window_from=6"),
    "mvar-images": ("mvar", "images", f"--vae=runs/tokenizer --hflip --val_fd=16 {OTHER_TRAINING}"),
    "markov-images": ("markov", "images", f"--vae=converted/vae --hflip --workers=1 {OTHER_TRAINING}"),
    "markov-each": ("markov", LARGE_TOKENS, "--scale_groups=each --ls=0.1"),
    "markov-drawn": ("markov", LARGE_TOKENS, f"--scale_groups=drawn {ALL_SCALES} --ac=1"),
    "mvar-global": ("mvar", SMALL_TOKENS, "--global_blocks=1 --alng_all --anorm=0"),
    "var-saln": ("var", SMALL_TOKENS, "--saln --recompute --ema=0"),
    "mvar-bf16": ("mvar", SMALL_TOKENS, "--fp16=2"),
    "var-fp16": ("var", SMALL_TOKENS, "--fp16=1"),
    "mvar-ddp": ("mvar", SMALL_TOKENS, ""),
    "mvar-fsdp": ("mvar", SMALL_TOKENS, "--parallel=fsdp"),
}
FAMILIES = {"mvar": "images", "var": "images", "markov": "large", "markov-mamba": "large"}  # and images of the size of theirs
DUMP = "--format=npz --num_images=40 --seed=3"
DUMPS = {  # transformer, flags
    **{f"{name}.npz": (f"runs/{name}", DUMP) for name in (*FAMILIES, "mvar-fsdp")},
    "folder": ("runs/markov-mamba", "--format=png --num_images=40 --classes=random"),
    "grid.png": ("runs/var", "--format=grid --classes=0,3,none --cfg=2"),
    "smooth.png": ("runs/mvar", "--format=grid --preset=visual --classes=1,2 --ema=0"),
    "scales.png": ("runs/markov", "--format=scales --classes=4,5 --top_k=0 --top_p=0"),
    "released.png": ("released/mvar.safetensors", "--vae=released/vae.safetensors --classes=0,1"),
    "converted.npz": ("converted/mvar", f"--vae=released/vae.safetensors {DUMP}"),
}
TWO_RANKS = ("runs/tokenizer-ddp", "runs/mvar-ddp", "runs/mvar-fsdp", "caches/centre", "samples/converted.npz")
NOT_RESUMED = ("markov-each", "markov-drawn", "mvar-global", "var-saln", "mvar-bf16", "tokenizer-bf16")
CROSSING = ("caches/centre", "runs/mvar-global", "runs/markov-drawn", "scores/tokenizer.json")  # beside sampling and resuming


def all_steps() -> list[Step]:
    """Each after those that it needs."""
    vae, convert, cache = "runs/tokenizer", "scripts/convert_official.py", "scripts/cache_tokens.py"
    tokenizers = {name: f"{TOKENIZER_TRAINING} {more}" for name, more in TOKENIZERS.items()}
    steps = [
        *(step(f"runs/{name}", "scripts/train_tokenizer.py", flags) for name, flags in tokenizers.items()),
        step("converted/vae", convert, "released/vae.safetensors --sides=1,2,3,6"),
        step("converted/mvar", convert, "released/mvar.safetensors"),
        step("converted/markov", convert, "released/markov.safetensors --family=markov --tokenizer=converted/vae"),
        step(LARGE_TOKENS, cache, "--vae=converted/vae --data_path=images --views=2 --seed=1", "converted/vae"),
        step(SMALL_TOKENS, cache, f"--vae={vae} --data_path=images --views=2 --resize=1.125 --hflip", vae),
        step("caches/centre", cache, f"--vae={vae} --data_path=images --resize=1 --center_crop", vae),
    ]
    for name, (family, source, more) in TRANSFORMERS.items():
        data, needs = ("--data_path", ("converted/vae", vae)) if source == "images" else ("--token_cache", (source,))
        steps.append(step(f"runs/{name}", "train.py", f"--family={family} {TRAINING} {data}={source} {more}", *needs))
    runs = [each for each in steps if each.out.startswith("runs/")]
    steps += [resumed(run) for run in runs if Path(run.out).name not in NOT_RESUMED]
    for out, (name, flags) in DUMPS.items():
        steps.append(step(f"samples/{out}", "sample.py", f"--ckpt={name} {flags}", *([] if "released" in name else [name])))
    for name, images in FAMILIES.items():
        flags = f"samples/{name}.npz {images}/val --extractor=efflite0 --halves"
        steps.append(step(f"scores/{name}.json", "scripts/evaluate.py", flags, f"samples/{name}.npz"))
    flags = f"reconstruction images/val --vae={vae} --extractor=efflite0"
    return [*steps, step("scores/tokenizer.json", "scripts/evaluate.py", flags, vae)]


def step(out: str, script: str, flags: str, *needs: str) -> Step:
    crosses = out in CROSSING or script == "sample.py"
    return Step(out, (script, *flags.split()), needs, ranks=2 if out in TWO_RANKS else 1, crosses=crosses)


def resumed(run: Step) -> Step:
    """The same command, given to a copy of the run as it was in the middle."""
    out = run.out.replace("runs/", "resumed/")
    return replace(run, out=out, needs=(run.out, *run.needs), resumes=run.out, crosses=True)


def chosen_steps(only: str) -> list[Step]:
    """Those whose names match one of the patterns, and all that they need. ValueError where none does."""
    steps = all_steps()
    wanted = {each.out for each in steps if any(fnmatch.fnmatch(each.out, pattern) for pattern in only.split(","))}
    if not wanted:
        raise ValueError(f"--only={only}: no step has such a name: choose from {', '.join(each.out for each in steps)}")
    for each in reversed(steps):
        wanted |= set(each.needs) if each.out in wanted else set()
    return [each for each in steps if each.out in wanted]


# --- what it is done with -----------------------------------------------------------------------------------------------


def write_inputs(tree: Path, place: Path) -> None:
    """images/ and large/: some of the embedded photographs as class folders; released/: small models with released names."""
    images = read_idx(tree / "data/fashion-mnist/t10k-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
    labels = read_idx(tree / "data/fashion-mnist/t10k-labels-idx1-ubyte.gz", header=8)
    for i, image in enumerate(images[: TRAIN_IMAGES + VAL_IMAGES]):
        picture = Image.fromarray(np.pad(image, 2)).convert("RGB")  # 32x32
        for name, pixels in (("images", 32), ("large", 96)):
            folder = place / name / ("train" if i < TRAIN_IMAGES else "val") / f"kind {labels[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            picture.resize((pixels, pixels)).save(folder / f"{i:05d}.png")
    (place / "released").mkdir()
    rng = np.random.default_rng(0)
    for name, golden in RELEASED.items():
        facts = json.loads((tree / f"tests/golden/{golden}.json").read_text())
        ranges = facts["weights"] | facts.get("variants", {}).get("1234_qsr4", {}).get("weights", {})
        # each with its limits, but for buffers
        tensors = {key: rng.uniform(*(limits or (0, 0)), shape).astype(np.float32) for key, (shape, *limits) in ranges.items()}
        save_file(tensors, place / "released" / f"{name}.safetensors")


def read_idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def copy_middle(run: Path, target: Path) -> None:
    """The run as it was at the first of its checkpoints; what it has logged later is left for the resumed run to drop."""
    shutil.copytree(run, target)
    checkpoints = sorted((target / "checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    if len(checkpoints) < 2:
        raise ValueError(f"{run}: has no checkpoints/step_* in the middle and at the end, there is nothing to resume")
    for checkpoint in checkpoints[1:]:
        shutil.rmtree(checkpoint)


# --- doing it -----------------------------------------------------------------------------------------------------------


def perform(tree: Path, place: Path, this: Step, before: list[Future]) -> str:
    """Do a step once those before it are done; returns "", or what went wrong."""
    if any(future.result() for future in before):
        return "not done, because a step that it needs failed"
    out, log = place / this.out, place / "logs" / f"{this.out}.log"
    remove(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    if this.resumes:
        try:
            copy_middle(place / this.resumes, out)
        except ValueError as error:
            return f"{place.name}: {error}"
    started, environment = time.monotonic(), {**os.environ, **ENVIRONMENT}
    with open(log, "w") as file:
        shown = {"stdout": file, "stderr": subprocess.STDOUT}
        code = subprocess.run(this.command(tree), cwd=place, env=environment, check=False, **shown).returncode
    print(f"{place.name}/{this.out}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return f"{place.name}: ended with code {code}: " + "\n".join(log.read_text().splitlines()[-SHOWN_LINES:]) if code else ""


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def perform_all(tree: Path, place: Path, steps: list[Step]) -> dict[str, str]:
    """What went wrong, or "", by step; steps that are not among these are taken as done."""
    futures: dict[str, Future] = {}
    # a step waits only for earlier ones, which have been taken up before it: some step can always go on
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for this in steps:
            before = [futures[name] for name in this.needs if name in futures]
            futures[this.out] = pool.submit(perform, tree, place, this, before)
    return {name: future.result() for name, future in futures.items()}


def commit_of(tree: Path) -> str:
    """With -dirty behind it where files differ from it. ValueError for what is no checkout of this project."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    result = subprocess.run(words, cwd=tree, capture_output=True, text=True, check=False) if tree.is_dir() else None
    if result is None or result.returncode or not (tree / "train.py").exists():
        raise ValueError(f"{tree}: no checkout of this project: give the root of one")
    return result.stdout.strip()


def perform_before(tree: Path, place: Path, steps: list[Step]) -> dict[str, str]:
    """As `perform_all`, but what the same commit has done before is not done again."""
    done_file = place / "done.json"
    inputs = [TRAIN_IMAGES, VAL_IMAGES, RELEASED, ENVIRONMENT]
    made_by = {"commit": commit_of(tree), "torch": importlib.metadata.version("torch"), "all": repr([inputs, all_steps()])}
    found = json.loads(done_file.read_text()) if done_file.exists() else {}
    done = found.pop("done", [])
    if found != made_by or made_by["commit"].endswith("-dirty"):
        remove(place)
        write_inputs(tree, place)
        done = []
    failures = perform_all(tree, place, [each for each in steps if each.out not in done])
    done += [name for name, failure in failures.items() if not failure]
    done_file.write_text(json.dumps({**made_by, "done": done}, indent=1) + "\n")
    return {each.out: failures.get(each.out, "") for each in steps}


# --- comparing ----------------------------------------------------------------------------------------------------------


# at any depth of a JSON file: what the clock, the memory and the checkout decide, and where a copy of a run lies
NOT_COMPARED = ("time", "images_per_second", "memory_gb", "mfu", "seconds", "commit", "local_out_dir_path", "out")


def parse(text: str) -> Any:
    return json.loads(text, object_hook=lambda values: {key: values[key] for key in values if key not in NOT_COMPARED})


def read_json(path: Path) -> Any:
    return parse(path.read_text())


def read_tensors(path: Path) -> dict:
    tensors = dict(sorted(safetensors.deserialize(path.read_bytes())))
    values = {name: {part: tensor[part] for part in ("dtype", "shape", "data")} for name, tensor in tensors.items()}
    return {"names": list(values), **values}  # the list, so that one more is a difference


def read_dump(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: {"shape": archive[name].shape, "data": archive[name].tobytes()} for name in ("arr_0", "labels")}
        return {**arrays, "settings": parse(str(archive["settings"]))}


READERS: dict[str, Callable[[Path], Any]] = {  # of the files that are compared; the others are for people, or tell the time
    "*.safetensors": read_tensors,
    "*.jsonl": lambda path: [parse(line) for line in path.read_text().splitlines()],
    "scores/*.json": lambda path: {name: read_json(path).get(name) for name in ("scores", "notes", "codes")},
    **dict.fromkeys(("config.json", "train_state.json", "manifest.json", "samples/*.json"), read_json),
    "*.npz": read_dump,
    "*.npy": Path.read_bytes,
    "*.png": Path.read_bytes,
}


def compared_files(out: Path) -> dict[str, Any]:
    """Contents by file of what a step has left, the settings beside a folder of pictures included."""
    found = {}
    for path in sorted([out, out.with_name(f"{out.name}.json"), *out.rglob("*")]):
        reader = next((reader for pattern, reader in READERS.items() if path.match(pattern)), None)
        if reader and path.is_file():
            found[os.path.relpath(path, out.parent).removeprefix(f"{out.name}/")] = reader(path)
    return found


def differences(before: Any, after: Any, where: str) -> Iterator[tuple[bool, str]]:
    """Where and how two contents differ, each with whether it counts: what only `after` has does not."""
    if isinstance(before, dict) and isinstance(after, dict):
        # without the numbers of lines, so that a new figure is told once
        yield from ((False, f"{where.partition('[')[0]}: {key}") for key in after if key not in before)
        yield from ((True, f"{where}: {key} is missing") for key in before if key not in after)
        if [key for key in before if key in after] != [key for key in after if key in before]:
            yield True, f"{where}: keys stand in another order"
        for key in (key for key in before if key in after):
            for counts, how in differences(before[key], after[key], f"{where}: {key}"):
                yield counts and key != "training", how  # recorded flags: what they do is compared elsewhere
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
        if len(before) != len(after):
            yield True, f"{where}: {len(before)} / {len(after)} entries"
        for i, pair in enumerate(zip(before, after, strict=False)):
            yield from differences(*pair, f"{where}[{i}]")
    elif isinstance(before, bytes | bytearray) and isinstance(after, bytes | bytearray) and len(before) == len(after):
        differing = np.count_nonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
        if differing:
            yield True, f"{where}: {differing} of {len(before)} bytes"
    elif type(before) is not type(after) or before != after:
        yield True, f"{where}: {before!r:.100} / {after!r:.100}"


def check(title: str, before: Path, after: Path, failure: str) -> dict:
    """Compare what a step has left in two places, unless it failed; printed, and returned as it is stored."""
    files = {} if failure else compared_files(before)
    by_file, told = {}, set()
    for counts, how in differences(files, {} if failure else compared_files(after), ""):
        how = how.removeprefix(": ")
        if counts:
            by_file.setdefault(how.partition(": ")[0].partition("[")[0], how)  # metrics.jsonl of metrics.jsonl[3]: loss
        else:
            told.add(how)
    found = list(by_file.values()) if files else [failure or "nothing is there to be compared"]
    extent = f" in {len(by_file)} of {len(files)} files" if by_file else ""
    verdict = f"DIFFERS{extent}: {found[0]}" if found else f"same, {len(files)} files"
    print(f"{title}: {verdict}" + (f"; only in AFTER, or recorded otherwise: {', '.join(sorted(told))}" if told else ""))
    return {"name": title, "same": not found, "files": len(files), "differences": found, "told": sorted(told)}


def main() -> None:
    config = cli.parse(CompareConfig, __doc__)
    work, steps = Path(config.work).resolve(), chosen_steps(config.only)
    trees = {name: Path(path).resolve() for name, path in (("before", config.before), ("after", config.after))}
    commits = {name: commit_of(tree) for name, tree in trees.items()}
    before, after, crossed = (work / name for name in ("before", "after", "crossed"))
    failures = perform_before(trees["before"], before, steps)
    remove(after)
    write_inputs(trees["before"], after)
    ends = perform_all(trees["after"], after, steps)
    remove(crossed)
    shutil.copytree(before, crossed, ignore=shutil.ignore_patterns("logs", "done.json"))
    ends_with_old_files = perform_all(trees["after"], crossed, [each for each in steps if each.crosses])

    checks = []
    for this in steps:
        checks.append(check(this.out, before / this.out, after / this.out, failures[this.out] or ends[this.out]))
        if this.crosses:  # a resumed run must end as the one of BEFORE that went through
            failure = failures[this.out] or ends_with_old_files[this.out]
            checks.append(check(f"{this.out}, old files", before / (this.resumes or this.out), crossed / this.out, failure))
    differing = [each["name"] for each in checks if not each["same"]]
    print(f"{len(checks) - len(differing)} of {len(checks)} checks the same, {commits['before']} and {commits['after']}")
    if config.json:
        evidence.store(Path(config.json), {**commits, "checks": checks})
    if differing:
        raise ValueError(f"{len(differing)} checks differ, the first is {differing[0]}: logs and files are in {config.work}")


if __name__ == "__main__":
    cli.run(main)
