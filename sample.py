"""Generate images: a labelled grid, a picture of the scales building up, a folder of PNG, or an .npz for evaluation.

The transformer and its tokenizer may be ours or released ones. Image n depends on the seed, n and the precision alone: not on
the batch size, on the number of images, or on how many ranks of torchrun share the work. A dump (png, npz) that was killed is
resumed by the same command, in the precision that it was begun in.

Images are written by a thread, and on GPUs decoded on a stream of their own, while the next ones are sampled.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dist import Ranks, process_group
from models.captured import CapturedSampler
from models.drawing import Generators, draw_labels
from models.generate import (
    COHORT_SIZE,
    Cohort,
    Refiner,
    SampledScales,
    check_finite,
    check_models,
    decode_sampled,
    num_cohorts,
    sample,
)
from models.precision import PRECISIONS, Precision, fastest
from models.scan_backends import choose_scan_
from models.storage import weights_hash
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import cli, plots
from utils.background import Background
from utils.checkpoint import files_read, load_pair, load_transformer
from utils.class_names import are_drawn, parse_classes, shown_names, told_classes
from utils.data.token_cache import check_classes, check_trained_on
from utils.dump import Dump, begun_settings, finished_settings, strangers_in
from utils.evidence import commit
from utils.files import check_writable
from utils.runs.checkpoints import intact_checkpoints, step_of
from utils.sampling.config import AUTO, SampleConfig, Setting
from utils.sampling.editing import Edited, check_pictures
from utils.sampling.judging import BestOf, Judge, Sampler

FID_IMAGES_PER_CLASS = 50
GRID_COLUMNS = 8
DEFAULT_CLASSES = 10  # rows of a grid where neither --classes nor --num says otherwise
FRAME_MILLISECONDS = 500
NOT_SETTINGS = ("out", "overwrite", "batch")  # flags that no image depends on


def all_labels(config: SampleConfig, classes: list[int], num_classes: int, drawn: bool = False) -> list[int]:
    """The label of every image, class after class; drawn: at random, as many as there would be of `classes`."""
    in_dump = FID_IMAGES_PER_CLASS if config.preset == "fid" and config.is_dump else 1
    per_class = GRID_COLUMNS if config.format == "grid" and not config.history else in_dump
    num = config.num or per_class * len(classes)
    if drawn:
        return sorted(draw_labels(num_classes, num, torch.Generator().manual_seed(config.seed)).tolist())
    return [classes[n * len(classes) // num] for n in range(num)]


def make_sampler(
    config: SampleConfig,
    setting: Setting,
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    helpers: "Helpers | None" = None,
) -> Sampler:
    """What samples cohorts. ValueError if the models do not fit."""
    refiner, judge, edited = helpers or Helpers()
    kept = None if edited is None else edited.kept
    how = config.drawing(setting)
    if config.cuda_graph:
        draw = CapturedSampler(transformer, tokenizer, how, COHORT_SIZE["cuda"], refiner=refiner)
    else:

        def draw(labels: Tensor, generators: Generators) -> SampledScales:
            return sample(transformer, tokenizer, labels, how, generators, refiner, kept)

    return draw if judge is None else BestOf(config.best_of, draw, tokenizer, judge)


def count_in(sampler: Sampler, cohort: Cohort) -> None:
    """Tell a sampler that counts which images of what it drew last were asked for."""
    if isinstance(sampler, BestOf):
        sampler.count_in(len(cohort.numbers))


def start_decoding(tokenizer: VQVAE, sampled: SampledScales, stream: torch.cuda.Stream | None) -> Callable[[], np.ndarray]:
    """A function that waits for the images (B, H, W, 3) uint8.

    stream: beside what the GPU does next; None on a CPU, where nothing is left to wait for. ValueError then or there if what
    was sampled is not finite.
    """
    if stream is None:
        check_finite(sampled)
        images = plots.to_uint8(decode_sampled(tokenizer, sampled))
        return lambda: images
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pixels = plots.to_bytes(decode_sampled(tokenizer, sampled))
        images = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        images.copy_(pixels, non_blocking=True)
        is_finite = torch.empty((), dtype=torch.bool, pin_memory=True)
        is_finite.copy_(sampled.finite, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    for tensor in (sampled.sums[-1], sampled.finite):
        tensor.record_stream(stream)  # freed meanwhile, their memory may not be given to the next cohort before

    def wait() -> np.ndarray:
        done.synchronize()
        check_finite(sampled._replace(finite=is_finite))
        return images.numpy()

    return wait


def scale_pictures(tokenizer: VQVAE, sampled: SampledScales) -> np.ndarray:
    """The images from the first scale, the first two, ..., (B, K, H, W, 3) uint8."""
    # from the sums, not the indices: in smooth mode those were drawn but not used
    steps = [plots.to_uint8(decode_sampled(tokenizer, sampled._replace(sums=[f_hat]))) for f_hat in sampled.sums]
    return np.stack(steps, axis=1)


def write_grid(out: Path, images: np.ndarray, labels: list[int], names: list[str], edited: Edited | None = None) -> None:
    """One row per class, its name beside it; of an edited picture first that and its reconstruction."""
    rows = {label: images[np.array(labels) == label] for label in dict.fromkeys(labels)}
    shown, heads = plots.drawable(names), None
    if edited is not None:
        before = np.concatenate([plots.to_uint8(edited.original), plots.to_uint8(edited.decoded)])
        rows = {label: np.concatenate([before, row]) for label, row in rows.items()}
        heads = ["original", "decoded"]
    plots.save(plots.grid(list(rows.values()), [shown[label] for label in rows], heads), out)


def write_scales(out: Path, pictures: np.ndarray, labels: list[int], names: list[str], tokenizer: VQVAE) -> None:
    """One row per image: how it looks after each scale."""
    heads = [f"{height}x{width}" for height, width in tokenizer.pyramid.shapes]
    shown = plots.drawable(names)
    plots.save(plots.grid(list(pictures), [shown[label] for label in labels], heads), out)


def check_out(out: Path, config: SampleConfig) -> None:
    """ValueError before anything is computed where the result could not be written."""
    if config.format in ("grid", "scales"):
        plots.check_picture(out)
    check_writable(out)
    if config.format != "png" and out.is_dir():
        raise ValueError(f"{out}: is a directory, --format={config.format} writes one file: give its name")
    unfinished = config.format == "png" and out.with_name(f".{out.name}.parts").exists()
    is_used = out.is_file() or (out.is_dir() and any(out.iterdir()))
    is_ours = config.is_dump and finished_settings(out) is not None  # then looked at once its settings are known
    if is_used and not (config.overwrite or unfinished or is_ours):
        raise ValueError(f"{out}: is there already: give another --out, or --overwrite")
    if out.is_dir() and (strangers := strangers_in(out)):
        raise ValueError(f"{out}: holds {strangers[0]!r}, which is no picture of a dump: give another --out, or move it away")


class Helpers(NamedTuple):
    """Further models that take part in sampling."""

    refiner: Refiner | None = None
    judge: Judge | None = None
    edited: Edited | None = None

    @classmethod
    def load(
        cls, config: SampleConfig, transformer: ScaleTransformer, tokenizer: VQVAE, names: list[str], device: torch.device
    ) -> "Helpers":
        """Those that the flags name; names: of the transformer's classes. ValueError and FileNotFoundError where they cannot
        be had, or do not fit."""
        refiner = judge = edited = None
        if config.refine_ckpt:
            second = load_transformer(config.refine_ckpt, ema=config.ema)
            of_second = second.description
            if not config.any_tokenizer:
                check_trained_on(of_second.tokenizer_hash, tokenizer, f"--refine_ckpt={config.refine_ckpt}", "that of --ckpt")
            if names and of_second.class_names:
                check_classes(names, of_second.class_names, config.ckpt, f"--refine_ckpt={config.refine_ckpt}")
            refiner = Refiner(second.to(device), config.draft_scales)
        if config.judge:
            judge = Judge(config.judge, transformer.config.num_classes, device)
        if config.edit:
            edited = Edited.load(tokenizer, config.edit, config.mask, config.box, config.outside, config.keep_scales)
        return cls(refiner, judge, edited)

    def hashes(self) -> dict[str, str]:
        """Of their weights, for the settings of a dump."""
        found = {} if self.refiner is None else {"refiner_sha256": weights_hash(self.refiner.transformer)}
        return found if self.judge is None else found | {"judge_sha256": self.judge.fingerprint}


def choose_precision(
    config: SampleConfig, settings: list[Setting], transformer: ScaleTransformer, tokenizer: VQVAE, ranks: Ranks
) -> Precision:
    """That of --precision; auto: what a dump that is there was begun in, else what suits the device. The same on all ranks."""
    if config.precision != AUTO:
        return Precision.parse(config.precision)
    precision = Precision()
    if ranks.is_main:
        known = [begun_settings(setting.out) or {} for setting in settings] if config.is_dump and not config.overwrite else []
        there = next((of_dump["precision"] for of_dump in known if "precision" in of_dump), None)
        precision = Precision.parse(there) if there else fastest(transformer, tokenizer)
    chosen = ranks.numbers_from_main([PRECISIONS.index(name) for name in (precision.transformer, precision.decoder)])
    return Precision(*(PRECISIONS[i] for i in chosen))


def pictures_of(
    config: SampleConfig,
    setting: Setting,
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    helpers: Helpers,
    labels: list[int],
) -> np.ndarray:
    """Images of these labels, (B, H, W, 3) uint8, or for --format=scales after each scale, (B, K, H, W, 3)."""
    device = next(transformer.parameters()).device
    sampler = make_sampler(config, setting, transformer, tokenizer, helpers)
    kept = []
    with tqdm(total=len(labels), unit="image") as bar:
        for number in range(num_cohorts(len(labels), device.type)):
            cohort = Cohort.of(labels, number, config.seed, device)
            sampled = sampler(cohort.labels, cohort.generators)
            count_in(sampler, cohort)
            check_finite(sampled)
            if config.format == "scales":
                pictures = scale_pictures(tokenizer, sampled)
            else:
                images = decode_sampled(tokenizer, sampled)
                pictures = plots.to_uint8(helpers.edited.pasted(images) if config.paste else images)
            kept.append(pictures[: len(cohort.numbers)])
            bar.update(len(cohort.numbers))
    if isinstance(sampler, BestOf):
        print(sampler.told(), file=sys.stderr)
    return np.concatenate(kept)


def draw_pictures(
    config: SampleConfig,
    setting: Setting,
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    helpers: Helpers,
    labels: list[int],
    names: list[str],
) -> None:
    """A grid, or the scales of some images, in one file."""
    pictures = pictures_of(config, setting, transformer, tokenizer, helpers, labels)
    setting.out.parent.mkdir(parents=True, exist_ok=True)
    if config.format == "grid":
        write_grid(setting.out, pictures, labels, names, helpers.edited)
    else:
        write_scales(setting.out, pictures, labels, names, tokenizer)


def draw_history(
    config: SampleConfig, setting: Setting, tokenizer: VQVAE, precision: Precision, labels: list[int], device: torch.device
) -> str:
    """The same images by every whole checkpoint of a run: a row of a grid for each, and beside it a .gif of the rows.

    Returns what was written.
    """
    whole = intact_checkpoints(Path(config.history), functools.partial(files_read, ema=config.ema))
    if not whole:
        raise FileNotFoundError(f"--history={config.history}: no run with checkpoints: give the directory of one")
    rows = {}
    for checkpoint in whole:
        transformer = load_transformer(checkpoint, config.family or None, config.ema).to(device)
        choose_scan_(transformer, config.scan_backend, device)
        precision.apply_(transformer, tokenizer)
        rows[f"step {step_of(checkpoint)}"] = pictures_of(config, setting, transformer, tokenizer, Helpers(), labels)
    setting.out.parent.mkdir(parents=True, exist_ok=True)
    plots.save(plots.grid(list(rows.values()), list(rows)), setting.out)
    width = max(len(name) for name in rows)  # so that all frames are of one size
    frames = [plots.grid([row], [name.rjust(width)]) for name, row in rows.items()]
    times = [FRAME_MILLISECONDS] * (len(frames) - 1) + [4 * FRAME_MILLISECONDS]
    film = config.film(setting)
    plots.save(frames[0], film, save_all=True, append_images=frames[1:], duration=times, loop=0)
    return f"wrote {len(labels)} images by each of {len(rows)} checkpoints (grid) to {setting.out}, and as frames to {film}"


def draw_between(
    config: SampleConfig,
    setting: Setting,
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    classes: list[int],
    names: list[str],
) -> str:
    """A row for every two classes that follow one another, from one to the other, all out of the same random numbers.

    Returns what was written.
    """
    rows, device = {}, transformer.head.weight.device
    steps = torch.linspace(0, 1, config.interpolate, device=device)
    for first, second in itertools.pairwise(classes):
        shares = torch.zeros(len(steps), len(names), device=device)
        shares[:, first] += 1 - steps
        shares[:, second] += steps
        generators = [torch.Generator(device).manual_seed(config.seed) for _ in steps]
        sampled = sample(transformer, tokenizer, shares, config.drawing(setting), generators)
        check_finite(sampled)
        rows[f"{names[first]} - {names[second]}"] = plots.to_uint8(decode_sampled(tokenizer, sampled))
    setting.out.parent.mkdir(parents=True, exist_ok=True)
    plots.save(plots.grid(list(rows.values()), plots.drawable(list(rows))), setting.out)
    return f"wrote {len(rows) * len(steps)} images (grid) to {setting.out}"


def plan_dump(config: SampleConfig, setting: Setting, weights: dict[str, str], device: str, labels: list[int]) -> Dump:
    """What is to be made, with all that its images depend on; weights: hashes of both models."""
    flags = {name: value for name, value in {**asdict(config), **asdict(setting)}.items() if name not in NOT_SETTINGS}
    code = {"device": device, "torch": torch.__version__, "commit": commit()}
    uint8 = "255 times the value in [0, 1], rounded to nearest"
    return Dump(setting.out, labels, COHORT_SIZE[device], {**flags, "num": len(labels), **weights, **code, "uint8": uint8})


def write_dump(
    dump: Dump,
    config: SampleConfig,
    setting: Setting,
    transformer: ScaleTransformer,
    tokenizer: VQVAE,
    helpers: Helpers,
    ranks: Ranks,
) -> None:
    """PNG files or an .npz; every rank makes its share of the cohorts that are missing, the main rank puts them together."""
    missing: list[int] = []
    if ranks.is_main:
        dump.out.parent.mkdir(parents=True, exist_ok=True)
        dump.begin()
        missing = dump.missing()
    missing = ranks.numbers_from_main(missing)
    at_a_time = max(config.batch // dump.cohort, 1)
    mine = [cohort for i, cohort in enumerate(missing) if i // at_a_time % ranks.world == ranks.rank]
    count = len(dump.labels)
    there = count - sum(len(dump.numbers(cohort)) for cohort in missing)
    interval = 0.2 if sys.stderr.isatty() else 20
    bar = tqdm(total=count, initial=there, unit="image", mininterval=interval, disable=not ranks.is_main)

    def write(number: int, cohort: Cohort, decoded: Callable[[], np.ndarray]) -> None:
        images = decoded()[: len(cohort.numbers)]
        dump.write(number, images)
        bar.update(min(ranks.world * len(images), count - bar.n))  # the others are as far as this one

    sampler = make_sampler(config, setting, transformer, tokenizer, helpers) if mine else None
    stream = torch.cuda.Stream() if ranks.device.type == "cuda" else None
    with bar, Background() as writer:
        for number in mine:
            cohort = Cohort.of(dump.labels, number, config.seed, ranks.device)
            decoded = start_decoding(tokenizer, sampler(cohort.labels, cohort.generators), stream)
            count_in(sampler, cohort)
            writer.put(functools.partial(write, number, cohort, decoded))
    if isinstance(sampler, BestOf):
        print(sampler.told(), file=sys.stderr)
    if ranks.is_main:
        while dump.missing():  # of other ranks
            time.sleep(0.2)
        dump.finish()


def main() -> None:
    config = cli.parse(SampleConfig, __doc__)
    settings = config.sweep()
    check_pictures(config.edit, config.mask)
    for setting in settings:
        check_out(setting.out, config)
        if config.history:
            check_out(config.film(setting), config)
    with process_group() as ranks:
        if config.cuda_graph and ranks.device.type != "cuda":
            raise ValueError("--cuda_graph: needs a CUDA GPU, there is none: leave it out")
        if ranks.world > 1 and not config.is_dump:
            raise ValueError(f"--format={config.format}: a picture is made by one process: run it without torchrun")
        *models, class_names = load_pair(config.ckpt, config.vae, config.family or None, config.ema, config.any_tokenizer)
        transformer, tokenizer = (model.to(ranks.device) for model in models)
        helpers = Helpers.load(config, transformer, tokenizer, class_names, ranks.device)
        check_models(transformer, tokenizer, helpers.refiner)
        for setting in settings:
            config.drawing(setting).guided(transformer.pyramid.num_scales)
        scan_choice = choose_scan_(transformer, config.scan_backend, ranks.device)
        hashed = {"transformer_sha256": transformer, "tokenizer_sha256": tokenizer}
        weights = {name: weights_hash(model) for name, model in hashed.items()} if config.is_dump else {}
        weights |= helpers.hashes() if config.is_dump else {}
        precision = choose_precision(config, settings, transformer, tokenizer, ranks)
        precision.apply_(transformer, tokenizer)
        if helpers.refiner is not None:
            choose_scan_(helpers.refiner.transformer, config.scan_backend, ranks.device)
            precision.apply_(helpers.refiner.transformer, tokenizer)
        # those used, which images depend on
        config = replace(config, scan_backend=scan_choice.backend, precision=str(precision))
        if ranks.is_main:
            print(f"{scan_choice}\n{precision.in_words()}", file=sys.stderr)
        num_classes = transformer.config.num_classes
        names = [*shown_names(class_names, num_classes), "none"]
        drawn = are_drawn(config.classes, class_names)
        if config.classes and not drawn:
            classes = parse_classes(config.classes, class_names, num_classes)
        else:
            classes = list(range(num_classes if config.is_dump else min(num_classes, DEFAULT_CLASSES)))
        labels = all_labels(config, classes, num_classes, drawn)
        if config.interpolate and (drawn or len(classes) < 2):
            raise ValueError(f"--interpolate={config.interpolate}: from one class to another: give two or more as --classes")
        if config.judge and num_classes in labels:
            raise ValueError(f"--judge={config.judge}: of images of no class nothing can be judged: leave one of both out")
        if ranks.is_main and names[0] != "0":
            print(told_classes(classes if config.interpolate else labels, names), file=sys.stderr)
        for setting in settings:
            done = f"wrote {len(labels)} images ({config.format}) to {setting.out}"
            if config.history:
                done = draw_history(config, setting, tokenizer, precision, labels, ranks.device)
            elif config.interpolate:
                done = draw_between(config, setting, transformer, tokenizer, classes, names)
            elif not config.is_dump:
                draw_pictures(config, setting, transformer, tokenizer, helpers, labels, names)
            else:
                dump = plan_dump(config, setting, weights, ranks.device.type, labels)
                if config.overwrite and ranks.is_main:
                    dump.remove_earlier()
                if not config.overwrite and ranks.largest(int(ranks.is_main and dump.is_finished())):
                    done = f"{setting.out}: all {len(labels)} images of this command are there already"
                else:
                    write_dump(dump, config, setting, transformer, tokenizer, helpers, ranks)
            if ranks.is_main:
                print(done)


if __name__ == "__main__":
    cli.run(main)
