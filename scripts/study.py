"""Run a study: transformers trained alike but for what is asked, with seeds, scored alike, in one table with error bars.

    python scripts/study.py studies/families.toml

What a plan says stands in utils/studies/plan.py, and in the plans of studies/. Whatever is there is not made again, so the same
command goes on where it was stopped. It ends with exit code 1 where runs have failed; the tables name them.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from models.generate import generate, state_bytes
from models.storage import weights_hash
from models.transformer import ScaleTransformer, TransformerConfig
from utils import cli, evidence
from utils.checkpoint import load_tokenizer, load_transformer
from utils.cli import argument, flag
from utils.data.fashion_mnist import export_fashion_mnist
from utils.data.images import ImageFiles, listing_hash, read_folders
from utils.data.token_cache import fingerprint
from utils.files import check_folder, locked, replace_text, sha256
from utils.metrics.judges import Judges
from utils.processes import begin
from utils.runs.log import clock
from utils.runs.tokenizer_config import TokenizerTraining
from utils.signals import Stopped, StopRequest, check_stopped
from utils.studies import figures, tables
from utils.studies.plan import EMBEDDED, NOWHERE, Plan, read_plan
from utils.studies.runs import PlannedRun, Tokens, check_rows, figures_of, key_of, planned, starts_of, told_of, words_of
from utils.studies.tables import Run

SAMPLED_AT_ONCE = 16  # images of a timed batch
REPEATS = 5
NEIGHBOURS = 3  # of precision and recall
MOST_READ = 2**30  # bytes of images that are read to know them again
GRACE = 60.0  # seconds that a run has to save itself when the study is stopped


@dataclass(frozen=True)
class StudyConfig:
    """Arguments of scripts/study.py."""

    plan: str = argument("what is asked: a file such as studies/families.toml")
    out: str = flag("out/studies", "directory of images, tokens and runs, which all plans share")
    results: str = flag(
        "out/studies/results", "directory for what came out: figures, tables and pictures under the plan's name"
    )
    overwrite: bool = flag(False, "replace results of another plan of this name")
    jobs: int | Literal["auto"] = flag("auto", "runs at a time; auto: one on each GPU, or on each core")

    def __post_init__(self):
        if self.jobs != "auto" and self.jobs < 1:
            raise ValueError(f"--jobs={self.jobs}: give 1 or more")


Place = dict[str, str]  # where a run is computed: what is in the environment of its processes


def places(jobs: int | str) -> list[Place]:
    """One for each of the runs at a time."""
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    count = jobs if jobs != "auto" else (gpus or cores)
    threads = {"OMP_NUM_THREADS": str(max(cores // count, 1))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else {}) for number in range(count)]


def carry_out(words: Sequence[str | Path], log: Path, place: Place) -> None:
    """A command of this repository to its end; what it prints goes into a file.

    ValueError with its last line where it fails; Stopped, after it has had time to save itself, where the study is to stop.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = begin(*words, output=log, variables=place)
    try:
        while process.poll() is None:
            check_stopped()
            time.sleep(0.1)
    except BaseException:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if process.returncode:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no word")
        raise ValueError(f"{words[0]} ended with exit code {process.returncode} ({last.strip()}): see {log}")


def wait_until_left(directory: Path) -> None:
    """Until no process writes there any more: the run of a study that was killed has to save itself first."""
    until = time.monotonic() + GRACE
    while directory.exists():
        try:
            with locked(directory):
                return
        except ValueError:
            if time.monotonic() > until:
                raise
            check_stopped()
            time.sleep(0.2)


def prepare(plan: Plan, out: Path, place: Place) -> tuple[Path, Tokens]:
    """The images, and a tokenizer with a cache of their tokens, made where they are not there.

    FileNotFoundError or ValueError, before anything is trained, for data that are not there and rows that fit no transformer.
    """
    images = out / "images" if plan.data == EMBEDDED else Path(plan.data)
    if plan.reference and not Path(plan.reference).exists():
        raise FileNotFoundError(f"reference = {plan.reference!r}: not there: give images, or statistics of them")
    if plan.data == EMBEDDED:
        export_fashion_mnist(images)
    elif not images.exists():
        raise FileNotFoundError(
            f"data = {plan.data!r}: not there: {plan.data_from or 'put a folder with train/ and val/ there'}"
        )
    files = read_folders(images)
    if not plan.reference and len(files[1]) <= NEIGHBOURS:
        raise ValueError(f"{images}: has {len(files[1])} images in val/: precision and recall need {NEIGHBOURS + 1} or more")
    data, num_classes = plan.data if plan.data == EMBEDDED else content_key(images, *files), len(files[0].class_names)
    if "source" in plan.tokenizer:
        source = plan.tokenizer["source"]
    else:
        if not plan.tokenizer.keys() & {"init_from", "refine"}:  # which would say the sizes
            check_rows(plan, TokenizerTraining(**NOWHERE, **plan.tokenizer).sizes(), num_classes)
        run = out / "tokenizers" / key_of(plan.tokenizer, data)
        if not (done := run.with_suffix(".done")).exists():
            print(f"tokenizer: {run}", flush=True)
            wait_until_left(run)
            words = ["scripts/train_tokenizer.py", "--data_path", images, "--out", run, "--val_every=1000000"]
            carry_out([*words, *words_of(plan.tokenizer)], run.with_suffix(".log"), place)
            done.touch()
        source = str(run)
    tokenizer = load_tokenizer(source)
    check_rows(plan, tokenizer.config, num_classes)
    key = key_of(fingerprint(tokenizer), data)
    cache = out / "tokens" / key
    if not (cache / "manifest.json").exists():
        print(f"tokens: {cache}", flush=True)
        how = ("--resize=1", "--center_crop")
        carry_out(
            ["scripts/cache_tokens.py", "--vae", source, "--data_path", images, "--out", cache, *how],
            cache.with_suffix(".log"),
            place,
        )
    return images, Tokens(cache, source, tokenizer, num_classes, key)


def content_key(root: Path, *splits: ImageFiles) -> str:
    """Of names, labels and sizes of all files, and of what is in them, unless it is too much to be read."""
    paths = [root / name for files in splits for name in files.listing()]
    sizes = [path.stat().st_size for path in paths]
    contents = [sha256(path) for path in paths] if sum(sizes) <= MOST_READ else []
    return key_of(listing_hash(*splits), sizes, contents)


class Judged:
    """Scores of samples by two judges, which are made when they are first needed, and asked by one run at a time."""

    def __init__(self, images: Path, pixels: int, count: int):
        self.lock = threading.Lock()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.judges = functools.cache(lambda: Judges(images, pixels, count, device))

    def write(self, run: PlannedRun, place: Place) -> None:
        with self.lock:
            store_scores(run, self.judges().scores_of(run.samples))

    def of_real(self) -> Run:
        """Of as many training images: what the scores of a perfect model would be like."""
        with self.lock:
            judges = self.judges()
            of_real = judges.scores(judges.train[judges.chosen], judges.train_labels[judges.chosen])
            return of_real | {"images": len(judges.chosen)}


def store_scores(run: PlannedRun, scores: Run) -> None:
    """With the code that they are of, which may be another one by the time that they are shown."""
    replace_text(run.scores, json.dumps(scores | {"commit": evidence.commit()}))


@dataclass(frozen=True)
class Referred:
    """Scores of samples by scripts/evaluate.py, against a reference of its own."""

    reference: str

    def write(self, run: PlannedRun, place: Place) -> None:
        told = run.scores.with_name(f"evaluate-{run.scores.name}")
        words = ["scripts/evaluate.py", run.samples, self.reference, "--json", told, "--overwrite"]
        carry_out(words, run.log("evaluate"), place)
        scores = json.loads(told.read_text())["scores"]["samples"]
        names = {"fid": "FID", "is": "Inception score", "precision": "precision", "recall": "recall"}
        store_scores(run, {ours: scores[theirs] for ours, theirs in names.items()})

    def of_real(self) -> Run:
        """Nothing: the reference is not ours."""
        return {}


def complete(run: PlannedRun, tokens: Tokens, scores: Judged | Referred, place: Place) -> None:
    """Train, sample and score a run, whatever of it is not there yet."""
    wait_until_left(run.directory)
    train = ["train.py", "--token_cache", tokens.cache, "--vae", tokens.source, "--local_out_dir_path", run.directory]
    carry_out([*train, *run.words], run.log("train"), place)
    draw = ["sample.py", "--ckpt", run.directory, "--vae", tokens.source, "--out", run.samples, "--overwrite"]
    carry_out([*draw, *run.drawing], run.log("sample"), place)
    scores.write(run, place)
    run.samples.unlink()  # hundreds of them would fill a disk, and a run draws the same ones again


def in_places(
    runs: Sequence[PlannedRun], one: Callable[[PlannedRun, Place], None], where: list[Place]
) -> Iterator[tuple[PlannedRun, str]]:
    """Carry out runs, as many at a time as there are places; each is given as it ends, with why it has failed, or ""."""
    free: queue.Queue[Place] = queue.Queue()
    for place in where:
        free.put(place)

    def in_a_place(run: PlannedRun) -> None:
        check_stopped()
        place = free.get()
        try:
            one(run, place)
        finally:
            free.put(place)

    with concurrent.futures.ThreadPoolExecutor(len(where)) as pool:
        begun = {pool.submit(in_a_place, run): run for run in runs}
        for future in concurrent.futures.as_completed(begun):
            try:
                future.result()
                yield begun[future], ""
            except (ValueError, OSError) as error:
                yield begun[future], str(error)


def complete_all(runs: Sequence[PlannedRun], one: Callable[[PlannedRun, Place], None], where: list[Place]) -> dict[Path, str]:
    """Carry out all runs that are not there yet and tell how far it is. Returns why some have failed, by directory."""
    all_runs = {run.directory: run for run in runs}  # two rows may ask for the same one
    missing = [run for run in all_runs.values() if not run.scores.exists()]
    alone = [run for run in missing if run.alone]
    others = [run for run in missing if not run.alone]
    failed, began = {}, time.monotonic()
    ended = itertools.chain(in_places(alone, one, places(1)), in_places(others, one, where))
    for count, (run, failure) in enumerate(ended, start=1):
        if failure:
            failed[run.directory] = failure
        left = (time.monotonic() - began) / count * (len(missing) - count)
        there = len(all_runs) - len(missing) + count - len(failed)
        print(
            f"{there} of {len(all_runs)} runs, {len(failed)} failed, about {clock(left)} left"
            f" | {run.comparison}: {run.row}, seed {run.seed}: {f'failed: {failure}' if failure else 'done'}",
            flush=True,
        )
    return failed


def costs(runs: Sequence[PlannedRun], tokens: Tokens) -> dict[TransformerConfig, Run]:
    """Parameters, state and sampling time of each kind and size, in turn, so that what else runs meets all of them alike.

    Sampling is that of a batch of 16 with guidance, everything included, in float32, over the images; state that of one image.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = tokens.tokenizer.to(device)
    models: dict[TransformerConfig, ScaleTransformer] = {}  # one of each shape and kind
    for run in runs:
        if run.model not in models:
            with contextlib.suppress(ValueError, OSError):  # its weights were lost since: another seed has the same sizes
                models[run.model] = load_transformer(run.directory).to(device)
    labels = torch.arange(SAMPLED_AT_ONCE, device=device) % tokens.num_classes
    seconds: dict[TransformerConfig, list[float]] = {config: [] for config in models}
    for repeat in range(REPEATS + 1):  # the first warms up
        for config, model in models.items():
            start = time.perf_counter()
            generate(model, tokenizer, labels, top_k=0).images.sum().item()  # waits for the device
            if repeat:
                seconds[config].append((time.perf_counter() - start) / SAMPLED_AT_ONCE)
    return {
        config: {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "state_bytes": state_bytes(model, 2),
            "sampling_seconds": median(seconds[config]),
        }
        for config, model in models.items()
    }


def check_results(plan: Plan, folder: Path) -> None:
    """ValueError where results of the plan's name are of runs that it does not ask for."""
    path = folder / f"{plan.name}.json"
    if not path.exists():
        return
    asked = {(part.name, row, seed) for part in plan.comparisons for row in part.rows for seed in range(plan.seeds)}
    try:
        stored = [(run["comparison"], run["row"], run["seed"]) for run in json.loads(path.read_text())["runs"]]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path}: is no result of a study: give another --results, or --overwrite") from None
    if others := [run for run in stored if run not in asked]:
        comparison, row, seed = others[0]
        raise ValueError(
            f"{path}: has runs that the plan does not ask for, such as {comparison}: {row}, seed {seed}: "
            "give another --results, or --overwrite"
        )


def report(plan: Plan, folder: Path, runs: list[Run], real: Run, missing: int) -> None:
    """Write NAME.json, .csv, .md and a picture of every comparison into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"question": plan.question, "missing_runs": missing, "real": real, "runs": runs}
    evidence.store(folder / f"{plan.name}.json", stored)
    replace_text(folder / f"{plan.name}.csv", tables.as_csv(runs))
    told = evidence.circumstances()
    lines = [f"# {plan.name}", plan.question, f"Made by `{told['command']}`, {told['device']}, commit {told['commit']}."]
    commits = sorted({run["commit"] for run in runs if "commit" in run} - {told["commit"]})
    if commits:
        lines.append(f"Runs were made by commit {', '.join(commits)} too.")
    if missing:
        lines.append(f"**Not complete: {missing} of {missing + len(runs)} runs are missing.**")
    for comparison in plan.comparisons:
        own = [run for run in runs if run["comparison"] == comparison.name]
        failures = [f"failed: {run['row']}, seed {run['seed']}: {run['failed']}" for run in own if "failed" in run]
        if len(failures) == len(own):
            lines += [f"## {comparison.name}", *(failures or ["No run of it is there."])]
            continue
        kind, amount = comparison.budget
        unit = "TFLOP of training" if kind == "teraflops" else kind
        lines += [f"## {comparison.name}", comparison.question, f"Budget of every row: {amount:g} {unit}."]
        lines.append(tables.table_of_scores(runs, comparison.name, real))
        lines.append(tables.table_of_differences(runs, comparison.name, comparison.baseline))
        lines += failures
        picture = folder / f"{plan.name}_{comparison.slug}.png"
        figures.draw(picture, runs, comparison.name, real)
        lines.append(f"![{comparison.name}]({picture.name})")
        if comparison.fit_by and (table := tables.table_of_fits(runs, comparison.name, comparison.fit_by)):
            lines.append(table)
            fitted = picture.with_stem(f"{picture.stem}_fitted")
            figures.draw_fits(fitted, runs, comparison.name, comparison.fit_by)
            lines.append(f"![{comparison.name}, fitted]({fitted.name})")
    replace_text(folder / f"{plan.name}.md", "\n\n".join(line.strip() for line in lines if line) + "\n")


def main() -> None:
    config = cli.parse(StudyConfig, __doc__)
    plan = read_plan(config.plan)
    out, results = Path(config.out), Path(config.results)
    check_folder(out, "--out")
    check_folder(results, "--results")
    if not config.overwrite:
        check_results(plan, results)
    where = places(config.jobs)
    with locked(out), StopRequest():
        images, tokens = prepare(plan, out, places(1)[0])  # nothing runs beside it
        starts = {start: weights_hash(load_transformer(start)) for start in starts_of(plan)}
        runs = planned(plan, tokens, out, starts)
        pixels = tokens.tokenizer.config.image_shape[0]
        scores = Referred(plan.reference) if plan.reference else Judged(images, pixels, plan.samples)
        check_stopped()
        failed, stopped = {}, None
        try:
            failed = complete_all(runs, lambda run, place: complete(run, tokens, scores, place), where)
        except Stopped as stop:
            stopped = stop
        known = []
        for run in runs:
            if run.scores.exists() and run.directory not in failed:
                try:
                    known.append((run, figures_of(run)))
                except ValueError as error:
                    failed[run.directory] = str(error)
        if known or failed:
            by_model = costs([run for run, _ in known], tokens)
            told = [figures | by_model.get(run.model, {}) | {"samples": plan.samples} for run, figures in known]
            told += [told_of(run) | {"failed": failed[run.directory]} for run in runs if run.directory in failed]
            report(plan, results, told, scores.of_real(), len(runs) - len(told))
            print(f"{results / plan.name}.md: {len(known)} of {len(runs)} runs")
    if stopped is not None:
        raise stopped
    if failed:
        run = next(run for run in runs if run.directory in failed)
        raise ValueError(
            f"{len(failed)} of {len(runs)} runs failed, such as {run.row}, seed {run.seed}: {failed[run.directory]}: "
            "mend it, and give the same command again"
        )


if __name__ == "__main__":
    cli.run(main)
