"""A dump of many images: made in cohorts by any number of ranks, resumable, and put together without holding it in memory.

A cohort is a file of its own until all are there; then they become one .npz in a shuffled order (evaluators cut what they get
into consecutive parts, so the Inception score of a class-sorted dump is too low), or they are PNG files already. Cohorts do not
depend on who computes them. What is there counts by its content: size and checksum, not by its name.
"""

import json
import os
import shutil
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import rename_whole, replace_text

PLAN = "plan.json"
PNGS = "[0-9]*_class*.png"  # names of a dump's pictures


@dataclass(frozen=True)
class Dump:
    """Where a dump goes and what is in it.

    out: an .npz file, or a directory of PNG files. labels: of every image. cohort: images that are computed together.
    settings: everything that the images depend on, kept with them. whole: cohorts that have been found to be whole.
    """

    out: Path
    labels: list[int]
    cohort: int
    settings: dict
    whole: set[int] = field(default_factory=set, compare=False)

    @property
    def parts(self) -> Path:
        """The directory of what is not finished."""
        return _parts_beside(self.out)

    @property
    def is_npz(self) -> bool:
        return self.settings["format"] == "npz"

    def numbers(self, cohort: int) -> range:
        """The images of a cohort."""
        return range(cohort * self.cohort, min((cohort + 1) * self.cohort, len(self.labels)))

    def is_finished(self) -> bool:
        """Whether all of just this is there, so that nothing is left to do. ValueError where another finished dump is."""
        there = None if self.parts.exists() else finished_settings(self.out)
        other = there and self._other(there)
        if other:
            raise ValueError(f"{self.out}: a dump with {other}: give another --out, or --overwrite")
        return there is not None

    def begin(self) -> None:
        """Note what is being made. ValueError, and nothing changed, where something else was begun there."""
        plan = self.parts / PLAN
        if plan.exists():
            other = self._other(read_settings(plan) or {})
            if other and self._has_begun():
                raise ValueError(
                    f"{self.out}: an unfinished dump with {other}: give what it was begun with, or remove {self.parts}"
                )
        self.parts.mkdir(parents=True, exist_ok=True)
        if not self.is_npz:
            self.out.mkdir(exist_ok=True)
        replace_text(plan, json.dumps(self.settings) + "\n")

    def remove_earlier(self) -> None:
        """For --overwrite: of an unfinished dump of other settings nothing stays, of a finished one no picture.

        A finished file stays until the new one is whole.
        """
        plan = self.parts / PLAN
        if plan.exists() and self._other(read_settings(plan) or {}):
            shutil.rmtree(self.parts)
        if not self.parts.exists():
            for old in self._pngs():
                old.unlink()

    def missing(self) -> list[int]:
        """Cohorts that are not there yet, or not whole."""
        is_whole = self._is_whole_npy if self.is_npz else self._are_whole_pngs
        self.whole.update(cohort for cohort in self._cohorts() if cohort not in self.whole and is_whole(cohort))
        return [cohort for cohort in self._cohorts() if cohort not in self.whole]

    def write(self, cohort: int, images: np.ndarray) -> None:
        """images (B, H, W, 3) uint8 of one cohort."""
        if self.is_npz:
            replace_text(self._checksum(cohort), f"{zlib.crc32(np.ascontiguousarray(images)):08x}\n")
            # of this process: one that outlives a killed torchrun may write the same cohort
            aside = self.parts / f".{cohort:06d}.{os.getpid()}.npy"
            np.save(aside, images, allow_pickle=False)
            rename_whole(aside, self.parts / f"{cohort:06d}.npy")
        else:
            for n, image in zip(self.numbers(cohort), images, strict=True):
                aside = self.parts / f"{os.getpid()}.{self._png(n)}"
                Image.fromarray(image).save(aside)
                rename_whole(aside, self.out / self._png(n))
        self.whole.add(cohort)

    def finish(self) -> None:
        """Put the cohorts together, once none is missing."""
        if self.is_npz:
            self._write_npz()
        else:
            replace_text(_settings_beside(self.out), json.dumps(self.settings, indent=1) + "\n")
        shutil.rmtree(self.parts)

    def _checksum(self, cohort: int) -> Path:
        return self.parts / f"{cohort:06d}.crc32"

    def _is_whole_npy(self, cohort: int) -> bool:
        path = self.parts / f"{cohort:06d}.npy"
        if not path.exists() or not self._checksum(cohort).exists():
            return False
        try:
            images = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return f"{zlib.crc32(images):08x}" == self._checksum(cohort).read_text().strip()

    def _are_whole_pngs(self, cohort: int) -> bool:
        return all(is_whole_png(self.out / self._png(n)) for n in self.numbers(cohort))

    def _has_begun(self) -> bool:
        """Whether there is anything but a plan, of whatever settings."""
        return any(self.parts.glob("[0-9]*")) or bool(self._pngs())

    def _pngs(self) -> list[Path]:
        """The pictures that are there, of whatever dump."""
        return list(self.out.glob(PNGS)) if self.out.is_dir() else []

    def _write_npz(self) -> None:
        """arr_0 (N, H, W, 3) uint8, labels (N,) and settings, image after image."""
        cohorts = [np.load(self.parts / f"{cohort:06d}.npy", mmap_mode="r", allow_pickle=False) for cohort in self._cohorts()]
        order = np.random.default_rng(self.settings["seed"]).permutation(len(self.labels))
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(order), *cohorts[0].shape[1:])}
        aside = self.parts / "all.npz"
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for n in order:
                    member.write(cohorts[n // self.cohort][n % self.cohort].tobytes())
            others = {"labels": np.array(self.labels, np.int64)[order], "settings": np.asarray(json.dumps(self.settings))}
            for name, values in others.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
        os.replace(aside, self.out)

    def _other(self, settings: dict) -> str:
        """The first setting of a dump that is there in which it is not this one, in words; empty where it is."""
        for name in sorted(settings.keys() | self.settings.keys()):
            if settings.get(name) != self.settings.get(name):
                return f"{name} {settings.get(name)} is there, this command has {self.settings.get(name)}"
        return ""

    def _cohorts(self) -> range:
        return range(-(-len(self.labels) // self.cohort))

    def _png(self, n: int) -> str:
        return f"{n:06d}_class{self.labels[n]:04d}.png"


def finished_settings(out: Path) -> dict | None:
    """The settings that a finished dump carries; None where there is no dump, or one of other code."""
    try:
        if out.is_dir():
            return read_settings(_settings_beside(out)) or read_settings(out.with_name(f"{out.name}.json"))  # of earlier code
        if not zipfile.is_zipfile(out):
            return None
        with np.load(out, allow_pickle=False) as archive:
            values = json.loads(str(archive["settings"]))
            return values if isinstance(values, dict) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def begun_settings(out: Path) -> dict | None:
    """The settings of a dump that is there, unfinished or finished; None where there is none, or one of other code."""
    plan = _parts_beside(out) / PLAN
    return read_settings(plan) if plan.exists() else finished_settings(out)


def strangers_in(folder: Path) -> list[str]:
    """Names of what is in the folder of a dump and none of its pictures; evaluators would take it for some."""
    return sorted(path.name for path in folder.iterdir() if not (path.match(PNGS) or path.name.startswith(".")))


def read_settings(path: Path) -> dict | None:
    """The settings of a dump in a file; None where there is none, or something else such as scores."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and {"format", "uint8"} <= values.keys() else None


def is_whole_png(path: Path) -> bool:
    """Whether a PNG file is there whose parts all have their checksums."""
    try:
        with Image.open(path) as image:
            image.verify()
            return True
    except (OSError, SyntaxError, ValueError):
        return False


def _parts_beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def _settings_beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.settings.json")
