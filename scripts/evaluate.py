"""Score samples of any model against reference images: Fréchet and kernel distance, Inception score, precision and recall,
density and coverage.

`scripts/evaluate.py stats FOLDER --out FILE` stores the statistics of a reference, so that they are computed once.
`scripts/evaluate.py reconstruction IMAGES --vae TOKENIZER` scores what a tokenizer makes of images against these themselves.
Scores depend on the extractor and on the numbers of images: compare those of the same extractor and the same numbers, and look
at the score of real images (--real, --halves) beside that of samples. torchrun shares the images out over ranks.
"""

import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dist import Ranks, process_group
from models.precision import PRECISIONS, tokenizer_in
from models.storage import weights_hash
from utils import cli, evidence, plots
from utils.checkpoint import load_tokenizer
from utils.cli import argument, flag, required
from utils.data.hub_sets import IMAGE_COLUMN_HELP, is_hub_set
from utils.data.pictures import BACKGROUND_HELP, WHITE
from utils.dump import finished_settings, read_settings
from utils.files import check_file
from utils.metrics.bias import find_biases
from utils.metrics.by_class import ByClass, read_classes, score_by_class
from utils.metrics.distances import frechet_distance
from utils.metrics.features import EXTRACTORS, Extractor, load_extractor
from utils.metrics.image_sets import (
    FittedImages,
    FolderImages,
    ImageSet,
    NpzImages,
    Reference,
    Statistics,
    open_images,
    open_reference,
    read_statistics,
    write_statistics,
)
from utils.metrics.measure import Measured, batch_size, measure
from utils.metrics.reconstruction import BATCH, measure_reconstruction
from utils.metrics.scores import in_halves, notes_on_distance, notes_on_judge, notes_on_scores, score
from utils.metrics.similarity import LPIPS, LPIPS_SIDE, WINDOW, load_lpips

IMAGES = "an .npz, a folder of PNG or JPEG, or a data set, hf:DIRECTORY:SPLIT or hf:OWNER/NAME:SPLIT"
ARRAY_HELP = "array of the .npz that holds the images, where it is not arr_0"
EXTRACTOR_HELP = "network that looks at the images: inception for FID, efflite0 where its weights cannot be had"
BATCH_HELP = "images that a rank takes at a time; 0: as suits the device"
SHOWN_CLASSES = 20  # of more only those that are recognised least are shown


@dataclass(frozen=True)
class EvaluateConfig:
    """Arguments of scripts/evaluate.py."""

    samples: str = argument(f"images to be scored: {IMAGES}")
    reference: str = argument("real images, likewise, or statistics of them")
    extractor: str = flag("inception", EXTRACTOR_HELP, choices=tuple(EXTRACTORS))
    weights: str = flag("", "file of its weights; empty: those it comes with")
    array: str = flag("", ARRAY_HELP)
    image_column: str = flag("", IMAGE_COLUMN_HELP)
    background: str = flag(WHITE, BACKGROUND_HELP)
    real: str = flag("", "further real images, scored beside the samples")
    any_statistics: bool = flag(False, "take statistics as a reference that do not say who made them")
    halves: bool = flag(False, "score one half of the reference against the other, beside the samples")
    k: int = flag(3, "precision and recall: neighbours within a ball")
    float32: bool = flag(False, "precision and recall: distances in float32; else in float16, as in the OpenAI evaluator")
    split: int = flag(5000, "Inception score: images per split")
    subset: int = flag(0, "kernel distance: images per subset; 0: 1000, or half of the smaller set where it has no more")
    by_class: bool = flag(False, "also score each class by itself: of dumps, class folders, .npz with labels")
    batch: int = flag(0, BATCH_HELP)
    json: str = flag("", "also write the scores, with all settings, to this file")
    overwrite: bool = flag(False, "replace what is at --json")

    def __post_init__(self):
        check_batch(self.batch)
        if self.k < 1 or self.split < 1:
            raise ValueError(f"--k={self.k}, --split={self.split}: give at least 1 each")
        if self.subset < 0 or self.subset == 1:
            raise ValueError(f"--subset={self.subset}: give at least 2 images, or 0 for a number that suits the sets")
        if self.real and self.halves:
            raise ValueError(f"--real={self.real} with --halves: both are scores of real images: give one of them")


@dataclass(frozen=True)
class StatsConfig:
    """Arguments of scripts/evaluate.py stats."""

    images: str = argument(f"real images: {IMAGES}")
    out: str = required("file to write, .npz")
    extractor: str = flag("inception", EXTRACTOR_HELP, choices=tuple(EXTRACTORS))
    array: str = flag("", ARRAY_HELP)
    image_column: str = flag("", IMAGE_COLUMN_HELP)
    background: str = flag(WHITE, BACKGROUND_HELP)
    weights: str = flag("", "file of its weights; empty: those it comes with")
    batch: int = flag(0, BATCH_HELP)
    overwrite: bool = flag(False, "replace what is at --out")

    def __post_init__(self):
        check_batch(self.batch)
        if not self.out.endswith(".npz"):
            raise ValueError(f"--out={self.out}: statistics are an .npz: give a name that ends so")


@dataclass(frozen=True)
class ReconstructionConfig:
    """Arguments of scripts/evaluate.py reconstruction."""

    images: str = argument(f"real images, of any size: {IMAGES}")
    vae: str = required("tokenizer: released file, run or checkpoint directory, or owner/name[:file]")
    num: int = flag(
        0, "take so many of the images, evenly spread over all; 0: all; under torchrun: --num_images", "--num_images"
    )
    extractor: str = flag("inception", EXTRACTOR_HELP, choices=tuple(EXTRACTORS))
    array: str = flag("", ARRAY_HELP)
    image_column: str = flag("", IMAGE_COLUMN_HELP)
    background: str = flag(WHITE, BACKGROUND_HELP)
    weights: str = flag("", "file of its weights; empty: those it comes with")
    precision: str = flag(
        "float32", "of the tokenizer: others are faster, and their scores are of themselves", choices=PRECISIONS
    )
    batch: int = flag(0, BATCH_HELP)
    json: str = flag("", "also write the scores, with all settings, to this file")
    out: str = flag("", "also write a picture to this file: some images above what is made of them")
    overwrite: bool = flag(False, "replace what is at --json and --out")

    def __post_init__(self):
        check_batch(self.batch)
        if self.num < 0 or self.num == 1:
            raise ValueError(f"--num={self.num}: give at least 2 images, or 0 for all")
        if self.out:
            plots.check_picture(self.out)
        if self.out and self.out == self.json:
            raise ValueError(f"--out={self.out} with --json={self.json}: one would replace the other: give two names")


def check_batch(batch: int) -> None:
    if batch < 0:
        raise ValueError(f"--batch={batch}: give at least 1, or 0 for a size that suits the device")


def check_free(path: str, flag: str, overwrite: bool) -> None:
    """ValueError before anything is computed where the result would replace a file unasked."""
    if path and read_settings(Path(path)) is not None:
        raise ValueError(f"{path}: holds the settings of a dump: give another {flag}")
    if path:
        check_file(path, flag, overwrite)


# --- looking before anything is computed --------------------------------------------------------------------------------


def check_sizes(samples: ImageSet, other: ImageSet | Statistics) -> None:
    """ValueError for images of different sizes: how they are resized would count more than how they look."""
    if other.height is not None and (samples.height, samples.width) != (other.height, other.width):
        sizes = [f"{images.source}: {images.width}x{images.height} pixels" for images in (samples, other)]
        raise ValueError(f"{', '.join(sizes)}: only images of one size can be compared: resize one of them")


def check_count(source: str, count: int, needed: int, reason: str) -> None:
    if count < needed:
        raise ValueError(f"{source}: {count} image{'s' * (count != 1)}, {reason} at least {needed}: give more")


def check_sets(config: EvaluateConfig, samples: ImageSet, reference: Reference, real: ImageSet | None) -> None:
    """ValueError for sets that are too small, or that cannot be compared."""
    needed, reason = config.k + 1, f"k={config.k} neighbours need"
    if config.subset > needed:
        needed, reason = config.subset, f"--subset={config.subset} needs"
    for images in (samples, reference.images, real):
        if images is not None:
            check_sizes(samples, images)
            check_count(images.source, images.count, needed, reason)
    if config.halves:
        if reference.statistics is not None:
            raise ValueError(f"{config.reference}: statistics cannot be halved: give a reference of images, or no --halves")
        check_count(config.reference, reference.images.count, 2 * needed, f"halves and {reason}")


def check_told(config: EvaluateConfig | StatsConfig | ReconstructionConfig, sources: list[str], *sets: ImageSet | None) -> None:
    """ValueError for flags that say how images are read, where no set is read so. sources: of all sets, as they are named."""
    pictures, archived = (any(isinstance(images, kind) for images in sets) for kind in (FolderImages, NpzImages))
    is_named = any(isinstance(images, NpzImages) and images.array == config.array for images in sets)
    of_files = "no .npz has such an array" if archived else "is of an .npz, and none is read"
    for name, needed, reason in (
        ("array", is_named, f"{of_files}: leave it out"),
        ("background", pictures, "shows through pictures of folders and data sets, and none are read: leave it out"),
        ("image_column", any(map(is_hub_set, sources)), "is of data sets, hf:..., and none is read: leave it out"),
    ):
        if not needed:
            cli.check_idle(config, [name], reason)


# --- measuring ----------------------------------------------------------------------------------------------------------


def measure_reference(extractor: Extractor, reference: Reference, batch: int, ranks: Ranks) -> Measured:
    """Statistics that are stored count; images beside them are for precision and recall."""
    statistics = None
    if reference.statistics is not None:
        widths = extractor.dim, extractor.spatial_dim
        with ranks.failing_together():
            statistics = read_statistics(reference.statistics, extractor.name, extractor.fingerprint, *widths)
    if reference.images is None:
        return Measured(statistics, None)
    measured = measure(extractor, reference.images, batch, ranks)
    return measured._replace(statistics=statistics or measured.statistics)


def notes_on_files(*sets: ImageSet | None) -> list[str]:
    """What lies among the pictures of folders and was not scored."""
    folders = [images for images in sets if isinstance(images, FolderImages) and images.strangers]
    return [f"{folder.source}: {folder.strangers} files there are no pictures and are left out" for folder in folders]


# --- showing ------------------------------------------------------------------------------------------------------------


def table(columns: dict[str, dict]) -> str:
    """Scores below one another, samples and real images side by side."""
    first, *_ = columns.values()
    lines = ["".join([" " * 18, *(f"{name:>16}" for name in columns)])]
    for name in first:
        lines.append("".join([f"{name:<18}", *(f"{as_text(name, column[name]):>16}" for column in columns.values())]))
    return "\n".join(lines)


def as_text(name: str, value: float | str | None) -> str:
    if value is None:
        return "unknown" if name == "reference images" else "needs images"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.6f}"  # kernel distances are small


def class_table(scores: ByClass) -> str:
    """Scores of each class in a line; of many classes those that are recognised least."""
    rows = scores.classes
    if len(rows) > SHOWN_CLASSES:
        rows = dict(sorted(rows.items(), key=lambda item: item[1]["recognised"])[:SHOWN_CLASSES])
    names = list(next(iter(rows.values())))
    lines = [f"{'class':<18}{''.join(f'{name:>18}' for name in names)}"]
    for name, row in rows.items():
        cells = ("-" if value is None else as_text("", value) for value in row.values())
        lines.append(f"{name:<18}{''.join(f'{cell:>18}' for cell in cells)}")
    if len(rows) < len(scores.classes):
        lines.append(f"(the {len(rows)} of {len(scores.classes)} classes that are recognised least)")
    lines.append(
        f"recognised, all classes: {scores.recognised:.4f} of the samples, {scores.real_recognised:.4f} of the real images"
    )
    return "\n".join(lines)


def code_table(codes: dict[str, dict]) -> str:
    """Usage of codes by scale."""
    lines = [f"{'codes at scale':<18}{'used':>8}{'share':>8}{'perplexity':>12}"]
    lines += [f"{name:<18}{row['used']:>8,}{row['share']:>8.1%}{row['perplexity']:>12,.1f}" for name, row in codes.items()]
    return "\n".join(lines)


# --- the commands -------------------------------------------------------------------------------------------------------


def load(config: EvaluateConfig | StatsConfig | ReconstructionConfig, ranks: Ranks) -> Extractor:
    """The extractor, on this rank's device."""
    for is_first in (True, False):  # the main rank downloads what is not there yet, the others find it
        with ranks.failing_together():
            if is_first == ranks.is_main:
                extractor = load_extractor(config.extractor, config.weights, ranks.device)
    return extractor


def load_lpips_of_all(ranks: Ranks) -> tuple[LPIPS | None, str]:
    """LPIPS on this rank's device, or None on all ranks with what one of them lacks."""
    for is_first in (True, False):  # the main rank downloads, as above
        if is_first == ranks.is_main:
            lpips, lacking = load_lpips(ranks.device)
        ranks.barrier()
    if ranks.largest(int(lpips is None)):
        return None, lacking or "is not to be had on every rank"
    return lpips, ""


def store(
    config: EvaluateConfig | ReconstructionConfig, figures: dict, extractor: Extractor, batch: int, ranks: Ranks, began: float
) -> None:
    """The figures, with what they depend on and what they took, at --json where it is given."""
    if not config.json:
        return
    settings = {
        "settings": {**asdict(config), "batch": batch},
        "extractor": {"name": extractor.name, "weights_sha256": extractor.fingerprint},
    }
    effort = {
        "ranks": ranks.world,
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),  # of the main rank
    }
    evidence.store(Path(config.json), {**settings, **figures, **effort})


def evaluate(config: EvaluateConfig, ranks: Ranks) -> None:
    began = time.monotonic()
    with ranks.failing_together():
        check_free(config.json, "--json", config.overwrite)
        samples = open_images(config.samples, config.background, config.array, config.image_column)
        how = config.background, config.array, config.image_column, config.any_statistics
        reference = open_reference(config.reference, config.extractor, *how)
        real = open_images(config.real, config.background, image_column=config.image_column) if config.real else None
        sources = [config.samples, config.reference, config.real]
        check_told(config, sources, samples, reference.images, real)
        check_sets(config, samples, reference, real)
        classes = read_classes(samples, reference) if config.by_class else None

    extractor = load(config, ranks)
    batch = config.batch or batch_size(extractor)
    against = measure_reference(extractor, reference, batch, ranks)
    with ranks.failing_together():
        check_sizes(samples, against.statistics)
    made = measure(extractor, samples, batch, ranks)
    further = measure(extractor, real, batch, ranks) if real else None
    if not ranks.is_main:
        return
    pairs = {"samples": (made, against)}
    if further is not None:
        pairs["real"] = further, against
    elif config.halves:
        pairs["real, halves"] = in_halves(against)
    choices = (config.k, config.split, torch.float32 if config.float32 else torch.float16, config.subset)
    columns = {name: score(*pair, extractor, *choices) for name, pair in pairs.items()}
    biases = find_biases(pairs, extractor, config.split)
    of_classes = score_by_class(made.features, against.features, *classes, extractor) if classes else None
    notes = notes_on_scores(made, against, extractor, config.split) + notes_on_files(samples, reference.images, real)
    dump = finished_settings(Path(config.samples))  # of samples that sample.py made
    notes += notes_on_judge(dump or {}, extractor)
    notes += [bias.in_words(name) for name, bias in biases.items()]
    if biases and against.features is not None:
        notes.append(f"{extractor.kernel_name}: not biased, however few the images")
    print("\n".join([table(columns), *([class_table(of_classes)] if of_classes else []), *notes]))
    figures = {"pixels": [samples.height, samples.width], "dump": dump, "scores": columns, "notes": notes}
    figures["biases"] = {name: bias._asdict() for name, bias in biases.items()}
    if of_classes:
        figures["by_class"] = of_classes._asdict()
    store(config, figures, extractor, batch, ranks, began)


def stats(config: StatsConfig, ranks: Ranks) -> None:
    with ranks.failing_together():
        check_free(config.out, "--out", config.overwrite)
        images = open_images(config.images, config.background, config.array, config.image_column)
        check_told(config, [config.images], images)
        check_count(images.source, images.count, 2, "a covariance needs")
    extractor = load(config, ranks)
    statistics = measure(extractor, images, config.batch, ranks, keep_features=False).statistics
    if ranks.is_main:
        write_statistics(Path(config.out), statistics, extractor.name, extractor.fingerprint)
        for note in notes_on_files(images):
            print(note)
        print(f"wrote the statistics of {images.count} images of {images.width}x{images.height} pixels to {config.out}")


def reconstruction(config: ReconstructionConfig, ranks: Ranks) -> None:
    began = time.monotonic()
    with ranks.failing_together():
        check_free(config.json, "--json", config.overwrite)
        check_free(config.out, "--out", config.overwrite)
        whole = open_images(config.images, config.background, config.array, config.image_column)
        check_told(config, [config.images], whole)
        reason = f"--num={config.num} needs" if config.num else "a covariance needs"
        check_count(whole.source, whole.count, config.num or 2, reason)
        tokenizer = load_tokenizer(config.vae).to(ranks.device)
        fingerprint = weights_hash(tokenizer)
        tokenizer = tokenizer_in(tokenizer, config.precision, config.precision)
        images = FittedImages(whole, *tokenizer.config.image_shape)
    extractor = load(config, ranks)
    lpips, lacking = None, f"needs {LPIPS_SIDE}x{LPIPS_SIDE} pixels"
    if min(images.height, images.width) >= LPIPS_SIDE:
        lpips, lacking = load_lpips_of_all(ranks)
    batch = config.batch or BATCH[ranks.device.type]
    rows = [i * whole.count // config.num for i in range(config.num)] if config.num else None
    quality = measure_reconstruction(tokenizer, images, extractor, lpips, rows=rows, batch=batch, ranks=ranks)
    if not ranks.is_main:
        return
    count, distance = quality.originals.count, f"r{extractor.distance_name}"
    scores = {
        "images": count,
        distance: frechet_distance(*quality.originals.pooled, *quality.reconstructions.pooled),
        "PSNR": quality.psnr,
        "SSIM": quality.ssim,
        "LPIPS": quality.lpips,
    }
    lacks = {"SSIM": f"needs {WINDOW}x{WINDOW} pixels", "LPIPS": lacking}
    shown = {name: lacks[name] if value is None else value for name, value in scores.items()}
    names = [f"{height}x{width}" for height, width in tokenizer.pyramid.shapes]
    codes = {name: asdict(usage) for name, usage in zip([*names, "all"], [*quality.scales, quality.all_scales], strict=True)}
    notes = notes_on_distance(extractor, distance, count) + notes_on_files(whole)
    if tokenizer.description.training.get("gan_features") == extractor.name:
        notes.append(f"{distance} flatters: the tokenizer's discriminator looked at images through {extractor.name}, too")
    print("\n".join([table({"reconstructions": shown}), code_table(codes), *notes]))
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        plots.save(plots.grid(list(quality.pairs), ["original", "reconstruction"]), config.out)
    figures = {
        "pixels": [images.height, images.width],
        "tokenizer": {"weights_sha256": fingerprint, "num_codes": tokenizer.config.num_codes},
        "scores": scores,
        "codes": codes,
        "notes": [*notes, *(f"{name} {lacks[name]}" for name, value in scores.items() if value is None)],
    }
    store(config, figures, extractor, batch, ranks, began)


COMMANDS = {
    "stats": (StatsConfig, stats, "Store the statistics of reference images."),
    "reconstruction": (ReconstructionConfig, reconstruction, "Score what a tokenizer makes of images, against the images."),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        config_class, command, description = COMMANDS[name]
        config = cli.parse(config_class, description, sys.argv[2:])
    else:
        command, config = evaluate, cli.parse(EvaluateConfig, __doc__)
    with process_group() as ranks:
        command(config, ranks)


if __name__ == "__main__":
    cli.run(main)
