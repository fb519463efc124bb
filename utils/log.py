"""What a run leaves to read: metrics.jsonl, TensorBoard events, log.txt and a progress bar."""

import json
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.files import replace_text


class RunLog:
    """Writes into the run directory on the main rank, nothing on the others.

    A resumed run passes the step it goes on from; what was logged after that step is dropped, since it is about to be redone.
    """

    def __init__(self, directory: Path, is_main: bool, step: int = 0):
        self.is_main = is_main
        self.bar = None
        if not is_main:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics_path, self.text_path = directory / "metrics.jsonl", directory / "log.txt"
        lines = self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        replace_text(self.metrics_path, "".join(line + "\n" for line in kept))
        self.writer = SummaryWriter(str(directory), purge_step=step + 1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point per TensorBoard curve."""
        if not self.is_main:
            return
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 2), **values}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, message: str) -> None:
        """A line for people, on the console and in log.txt."""
        if not self.is_main:
            return
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
        with open(self.text_path, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def progress(self, share: float, seconds: float, message: str) -> None:
        """The progress bar: passed share of the run, time left from it, and a few figures."""
        if not self.is_main:
            return
        if self.bar is None:
            interval = 0.2 if sys.stderr.isatty() else 20.0
            form = "{percentage:3.0f}%|{bar:24}| {desc}"
            self.bar = tqdm(total=1.0, bar_format=form, mininterval=interval, dynamic_ncols=True)
        left = seconds * (1 - share) / share if share > 0 else 0.0
        self.bar.set_description_str(f"{message}, {clock(left)} left", refresh=False)
        self.bar.n = min(share, 1.0)
        self.bar.update(0)

    def close(self) -> None:
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.close()
        self.writer.close()


def clock(seconds: float) -> str:
    """3723 -> 1:02:03"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def read_metrics(run: str | Path) -> list[dict]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
