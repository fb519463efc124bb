"""What a run leaves to read: metrics.jsonl, val_classes.jsonl, TensorBoard events, log.txt and lines on the console.

A run of days does not end because one of them cannot be written, as on a full disk: that is told on the console, once, and the
run goes on. Lines wait until there is room again; TensorBoard, whose writer has ended then, goes without the rest.
"""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import plots
from utils.files import append_whole, replace_text

CLOCK_FIGURES = ("time", "images_per_second", "mfu", "memory_gb", "data_wait")  # differ from run to run of the same training
CONSOLE_SECONDS = 20.0  # at least so long between two lines where no terminal can redraw a bar


class RunLog:
    """Writes into the run directory on the main rank, nothing on the others.

    A resumed run passes the step it goes on from; what was logged after that step is dropped, since it is about to be redone.
    ValueError where the directory holds a metrics.jsonl that is not a run's.
    """

    def __init__(self, directory: Path, is_main: bool, step: int = 0):
        self.is_main = is_main
        if not is_main:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics_path, self.classes_path = directory / "metrics.jsonl", directory / "val_classes.jsonl"
        self.text_path, self.pictures = directory / "log.txt", directory / "pictures"
        kept = [entry for entry in read_entries(self.metrics_path) if entry["step"] <= step]
        self.validated = {entry["step"] for entry in kept if any(name.startswith("val_") for name in entry)}
        by_class = [entry for entry in read_entries(self.classes_path) if entry["step"] in self.validated]
        for path, entries in ((self.metrics_path, kept), (self.classes_path, by_class)):
            if path.exists():
                replace_text(path, "".join(map(json_line, entries)))
        self.unwritten: dict[Path, bytes] = {}  # lines that wait for room
        self.curves = Curves(directory, step + 1, self._complain)
        self.bar: tqdm | None = None
        self.waiting: str | None = None  # the newest console line, while it is too early to print it
        self.printed_at = -math.inf

    def has_validation(self, step: int) -> bool:
        """Whether the run so far has logged the validation of this step; the main rank knows."""
        return self.is_main and step in self.validated

    def metrics(self, step: int, values: dict[str, float | dict[str, float]]) -> None:
        """One line of metrics.jsonl and one point per TensorBoard curve.

        {"loss": 3.2, "loss_by_scale": {"1x1": 2.0}} stays nested in the file and makes the curves loss and loss_by_scale/1x1.
        """
        if not self.is_main:
            return
        self._append(self.metrics_path, json_line({"step": step, "time": round(time.time(), 2), **values}))
        for name, value in values.items():
            curves = {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
            for curve, number in curves.items():
                self.curves.add(SummaryWriter.add_scalar, curve, number, step)

    def classes(self, step: int, loss: list[float | None], accuracy: list[float | None]) -> None:
        """One line of val_classes.jsonl: a validation by class, None or NaN for a class without images."""
        if not self.is_main:
            return
        self._append(self.classes_path, json_line({"step": step, "loss": loss, "accuracy": accuracy}))

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture in TensorBoard, and as a file: pictures/NAME_STEP.png."""
        if not self.is_main:
            return
        path = self.pictures / f"{name}_{step}.png"
        try:
            self.pictures.mkdir(exist_ok=True)
            plots.save(picture, path)
        except OSError as error:
            self._complain(f"a picture is left out: {error}")
        self.curves.add(SummaryWriter.add_image, name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.curves.add(SummaryWriter.flush)  # pictures are rare: each is there to be looked at now

    def text(self, message: str) -> None:
        """A line for people, on the console and in log.txt."""
        if not self.is_main:
            return
        self._print(message)
        self._append(self.text_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def progress(self, step: int, total: int, share: float, seconds: float, values: dict[str, float]) -> None:
        """How far the run is: `step` of `total`, `share` of it passed in `seconds`, and the figures of `console_line`.

        A bar where stderr is a terminal; else a line on stdout, at most one every CONSOLE_SECONDS, and the last one at the end.
        """
        if not self.is_main:
            return
        line = console_line(step, total, values, seconds * (1 - share) / share if share > 0 else None)
        if sys.stderr.isatty():
            if self.bar is None:
                self.bar = tqdm(total=1.0, bar_format="|{bar:12}| {desc}", mininterval=0.2, dynamic_ncols=True)
            self.bar.set_description_str(line, refresh=False)
            self.bar.n = min(share, 1.0)
            self.bar.update(0)
            return
        self.waiting = line
        if time.monotonic() - self.printed_at >= CONSOLE_SECONDS:
            self._print_waiting()

    def close(self) -> None:
        """End the console output and the event file; without a terminal the newest line is printed if it was not yet."""
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.refresh()  # the last figures, whatever the interval
            self.bar.close()
        self._print_waiting()
        self.curves.close()
        for path in list(self.unwritten):
            self._append(path, "")
        for path, lines in self.unwritten.items():
            count = len(lines.splitlines())
            self._complain(f"{path}: could not be written to the end, lines lost: {count}")

    def _append(self, path: Path, line: str) -> None:
        """To the end of a file, after what still waits for that."""
        before = self.unwritten.pop(path, b"")
        content = before + line.encode(errors="surrogateescape")
        try:
            append_whole(path, content)
        except OSError as error:
            self.unwritten[path] = content
            if not before:
                self._complain(
                    f"{path}: could not be written ({reason(error)}): make room there; the run goes on, and lines wait so long"
                )

    def _complain(self, message: str) -> None:
        tqdm.write(f"warning: {message}", file=sys.stderr)

    def _print(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)  # above the bar where there is one
        sys.stdout.flush()

    def _print_waiting(self) -> None:
        if self.waiting is not None:
            self._print(self.waiting)
            self.waiting, self.printed_at = None, time.monotonic()


class Curves:
    """TensorBoard's event file of a run, which goes without the rest once it cannot be written."""

    def __init__(self, directory: Path, purge_step: int, complain: Callable[[str], None]):
        self.directory, self.complain = directory, complain
        self.ending = contextlib.ExitStack()
        self.ending.enter_context(silent_writer())
        self.writer: SummaryWriter | None = None
        try:
            self.writer = SummaryWriter(str(directory), purge_step=purge_step)
        except OSError as error:
            self._leave_out(error)

    def add(self, what: Callable, *arguments: Any, **options: Any) -> None:
        """Call a method of the writer."""
        if self.writer is None:
            return
        try:
            what(self.writer, *arguments, **options)
        except OSError as error:  # of its thread, which has ended with that
            self._leave_out(error)

    def _leave_out(self, error: OSError) -> None:
        self.writer = None
        self.complain(
            f"{self.directory}: TensorBoard's file could not be written ({reason(error)}) and goes without the rest, which "
            "metrics.jsonl keeps: make room there; a run that is resumed begins another"
        )

    def close(self) -> None:
        self.add(SummaryWriter.close)
        self.ending.close()


@contextlib.contextmanager
def silent_writer() -> Iterator[None]:
    """Keep the traceback of a thread of TensorBoard off the console: who writes next is told what it was."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        is_writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            usual(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


def reason(error: OSError) -> str:
    return error.strerror or str(error)


def console_line(step: int, total: int, values: dict[str, float], seconds_left: float | None) -> str:
    """The state of a run in one line, `step 1200/50000 (2.4%) | loss 6.123 (last 7.01) | ... | 1:02:03 left`.

    Shown of `values`, where present: loss, loss_last, psnr (dB), accuracy (0 to 1), grad_norm, learning_rate, loss_scale,
    images_per_second, mfu (model FLOP/s over the peak, 0 to 1), memory_gb, data_wait (waiting for data,
    share of the time). seconds_left: None while unknown.
    """
    forms = {
        "loss": "loss {:#.4g}",
        "loss_last": "(last {:#.3g})",
        "psnr": "{:.1f} dB",
        "accuracy": "acc {:.1%}",
        "grad_norm": "grad {:.3g}",
        "learning_rate": "lr {:.1e}",
        "loss_scale": "scale {:.7g}",
        "images_per_second": "{:.0f} img/s" if values.get("images_per_second", 0) >= 10 else "{:.2g} img/s",
        "mfu": "mfu {:.0%}",
        "data_wait": "data {:.0%}",
        "memory_gb": "{:.1f} GB",
    }
    parts = [f"step {step}/{total} ({step / total:.1%})"]
    for name, form in forms.items():
        if name in values:
            text = form.format(values[name])
            if name == "loss_last" and "loss" in values:
                parts[-1] += f" {text}"  # in brackets behind the loss
            else:
                parts.append(text)
    if seconds_left is not None:
        parts.append(f"{clock(seconds_left)} left")
    return " | ".join(parts)


def clock(seconds: float) -> str:
    """3723 -> 1:02:03"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def json_line(entry: dict) -> str:
    """One line of a .jsonl file. NaN and infinities become null: JSON has no word for them, and other tools refuse Python's."""
    return json.dumps(_finite(entry), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_entries(path: Path) -> list[dict]:
    """All lines of a .jsonl file of a run, none where there is no file; a last line torn by a kill is dropped.

    ValueError, with the number of the line, where one is no object with a step.
    """
    entries = []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(
                f"{path}: line {number} is no line of a run's log: give the directory of a run, or repair the file"
            )
        entries.append(entry)
    return entries


def read_metrics(run: str | Path) -> list[dict]:
    """All lines of a run's metrics.jsonl. FileNotFoundError where there is none, ValueError where it is not a run's."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no metrics.jsonl there: give the directory of a run")
    return read_entries(path)


def read_repeatable_metrics(run: str | Path) -> list[dict]:
    """The same without what depends on the clock: equal for runs of the same training."""
    return [{name: value for name, value in entry.items() if name not in CLOCK_FIGURES} for entry in read_metrics(run)]
