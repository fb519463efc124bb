"""Train the multi-scale VQVAE on a folder of images, with reconstruction and VQ losses.

Perceptual and adversarial losses are not there yet. Codes that no vector of the last steps chose are moved onto vectors that
look for one, or small data sets would use a fraction of the codebook. The same command resumes a run that was killed.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist import Ranks, process_group
from models.tokenizer import TOKENIZER_PRESETS, VQVAE
from utils import cli
from utils.checkpoint import Description, read_model_config
from utils.cli import flag, required
from utils.data.batches import TrainOrder, train_batches, val_batches
from utils.data.images import Images, check_resize, read_folders
from utils.files import locked
from utils.metrics.similarity import psnr_of_error
from utils.runs.log import RunLog
from utils.runs.optim import learning_rate_factor
from utils.runs.resume import agreed_checkpoint
from utils.runs.saving import read_numbers, restore_, save_checkpoint
from utils.runs.state import flattened, named, optimizer_tensors
from utils.signals import StopRequest


@dataclass(frozen=True)
class TokenizerTraining:
    """Flags of scripts/train_tokenizer.py."""

    data_path: str = required("directory with train/<class>/* and val/<class>/*")
    out: str = required("run directory; a run in it is resumed")
    preset: str = flag("f16-256", "sizes of the tokenizer", choices=tuple(TOKENIZER_PRESETS))
    bs: int = flag(128, "images per step, over all ranks", "--batch_size")
    lr: float = flag(1e-3, "peak learning rate", "--learning_rate")
    max_steps: int = flag(100_000, "steps")
    max_minutes: float = flag(0.0, "end the run, schedule included, after so many minutes at the latest, 0: off")
    l1: float = flag(0.2, "weight of the mean absolute error")
    l2: float = flag(1.0, "weight of the mean squared error")
    vq: float = flag(0.25, "weight of the codebook and commitment loss")
    restart_every: int = flag(20, "steps between restarts of unused codes, in the first half of the run; 0: never")
    resize: float = flag(1.125, "images are resized to this times their final size, then cropped", "--mid_reso")
    hflip: bool = flag(False, "mirror half of the training images")
    workers: int = flag(0, "processes that load images, per rank")
    fp16: int = flag(0, "0: float32, 2: bfloat16", choices=(0, 2))
    seed: int = flag(0, "of data order, initial weights and restarts")
    log_every: int = flag(20, "steps between log lines")
    save_every: int = flag(1000, "steps between checkpoints, each with a validation")
    keep: int = flag(2, "checkpoints to keep")

    def __post_init__(self):
        for name in ("bs", "max_steps", "log_every", "save_every", "keep"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give a number above 0")
        check_resize(self.resize)


def reconstruction_loss(images: Tensor, reconstruction: Tensor, config: TokenizerTraining) -> Tensor:
    return config.l1 * F.l1_loss(reconstruction, images) + config.l2 * F.mse_loss(reconstruction, images)


class TokenizerTrainer:
    """One run of scripts/train_tokenizer.py."""

    def __init__(self, config: TokenizerTraining, ranks: Ranks):
        self.config, self.ranks, self.run = config, ranks, Path(config.out)
        if config.bs % ranks.world:
            raise ValueError(f"--bs={config.bs} does not divide by {ranks.world} ranks: give a multiple")
        train, val = read_folders(config.data_path)
        self.class_names = train.class_names
        model_config = TOKENIZER_PRESETS[config.preset]
        pixels = model_config.image_shape[0]
        self.train_images = Images(train, pixels, config.resize, augment=True, flip=config.hflip, seed=config.seed)
        self.val_images = Images(val, pixels, config.resize)
        torch.manual_seed(config.seed)
        self.tokenizer = VQVAE(model_config)
        self.tokenizer.init_weights()
        self.tokenizer.to(ranks.device)
        self.model = self.tokenizer if ranks.world == 1 else DistributedDataParallel(self.tokenizer)
        self.optimizer = torch.optim.AdamW(self.tokenizer.parameters(), lr=config.lr, betas=(0.5, 0.9), weight_decay=0.0)
        self.step, self.seconds = 0, 0.0
        self.hits = torch.zeros(model_config.num_codes, device=ranks.device)  # since the last restart

    def fit(self) -> None:
        with locked(self.run) if self.ranks.is_main else contextlib.nullcontext():
            self._fit()

    def _fit(self) -> None:
        config = self.config
        notes = self._resume()
        log = RunLog(self.run, self.ranks.is_main, self.step)
        for note in notes:
            log.text(note)
        log.text(
            f"training tokenizer {config.preset} on {len(self.train_images)} images, pyramid {self.tokenizer.pyramid}, "
            f"{sum(p.numel() for p in self.tokenizer.parameters()) / 1e6:.2f}M parameters, from step {self.step}"
        )
        order = TrainOrder(len(self.train_images), config.bs, config.seed, self.ranks.rank, self.ranks.world)
        batches = train_batches(self.train_images, order, self.step, config.max_steps, config.workers)
        start = time.monotonic() - self.seconds
        mark_time, mark_step = time.monotonic(), self.step
        with StopRequest() as stop:
            stopped_by = 0
            while not self._finished() and not stopped_by:
                metrics = self.train_step(batches)
                self.seconds = time.monotonic() - start
                if config.max_minutes:
                    self.seconds = self.ranks.from_main(self.seconds)
                if self.step % config.log_every == 0 or self._finished():
                    speed = (self.step - mark_step) * config.bs / (time.monotonic() - mark_time)
                    mark_time, mark_step = time.monotonic(), self.step
                    values = {name: (self.ranks.sum(value) / self.ranks.world).item() for name, value in metrics.items()}
                    values["images_per_second"] = speed
                    log.metrics(self.step, values)
                    share = self._progress()
                    total = round(self.step / share)  # a run that ends by the clock does not reach max_steps
                    log.progress(self.step, total, share, self.seconds, values)
                stopped_by = 0 if self._finished() else self.ranks.largest(stop.number)
                if stopped_by:
                    log.text(f"stopped after step {self.step}, which is saved: the same command goes on from there")
                    self._save()
                elif self.step % config.save_every == 0 or self._finished():
                    figures = self.evaluate()
                    log.metrics(self.step, figures)
                    log.text(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
                    self._save()
                    mark_time, mark_step = time.monotonic(), self.step
        log.close()
        if stopped_by:
            raise SystemExit(128 + stopped_by)

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        config = self.config
        rate = config.lr * learning_rate_factor("cos", self._progress(), warmup=0.02, start=0.05, end=0.01)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = next(batches)[0].to(self.ranks.device, non_blocking=True)
        self._restart_codes(images)
        with torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=config.fp16 == 2):
            result = self.model(images)
        loss = reconstruction_loss(images, result.images.float(), config) + config.vq * result.vq_loss
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), 1.0)
        if self.ranks.largest(int(not torch.isfinite(grad_norm + loss.detach()))):
            raise FloatingPointError(
                f"step {self.step + 1}: loss or gradient is not finite (loss {loss.item():.4g} on rank {self.ranks.rank}); "
                f"the last checkpoint is untouched: lower --lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.hits += torch.cat(result.indices, dim=1).flatten().bincount(minlength=len(self.hits))
        error = F.mse_loss(result.images.detach().float().clamp(-1, 1), images)
        return {"loss": loss.detach(), "vq_loss": result.vq_loss.detach(), "psnr": psnr_of_error(error, peak=2)}

    # Differs from VAR: its tokenizer training is not public; restarts are one of the known means against unused codes.
    def _restart_codes(self, images: Tensor) -> None:
        """Now and then move the codes that were not chosen since the last time; at the first step these are all codes."""
        every = self.config.restart_every
        if not every or self.step % every or self._progress() > 0.5:
            return
        unused = self.ranks.sum(self.hits) == 0
        generator = torch.Generator().manual_seed(self.config.seed + self.step)
        with torch.no_grad():
            self.tokenizer.quantizer.restart_codes_(unused, self.tokenizer.features(images), generator)
        if self.ranks.world > 1:  # each rank drew from its own images: the main rank's count
            torch.distributed.broadcast(self.tokenizer.quantizer.codebook.weight.data, src=0)
        self.hits.zero_()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Reconstruction error and use of the codebook on the held-out images."""
        tokenizer = self.tokenizer.eval()
        share = self.config.bs // self.ranks.world
        scales, num_codes = tokenizer.pyramid.num_scales, tokenizer.config.num_codes
        hits = torch.zeros(scales, num_codes, device=self.ranks.device)
        totals = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)  # squared error, images
        for images, _ in val_batches(self.val_images, share, self.ranks.rank, self.ranks.world):
            images = images.to(self.ranks.device)
            indices = tokenizer.encode(images)
            errors = (tokenizer.decode(indices) - images).square().mean(dim=(1, 2, 3))
            totals[0] += errors.double().sum()
            totals[1] += len(images)
            for k, scale_indices in enumerate(indices):
                hits[k] += scale_indices.flatten().bincount(minlength=num_codes)
        tokenizer.train()
        squared_error, count = self.ranks.sum(totals)
        hits = self.ranks.sum(hits)
        figures = {
            "val_psnr": psnr_of_error(squared_error / count, peak=2).item(),
            "codes_used": (hits.sum(0) > 0).sum().item(),
        }
        return figures | {f"codes_used_scale_{k}": (row > 0).sum().item() for k, row in enumerate(hits)}

    def _progress(self) -> float:
        by_time = self.seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
        return min(max(self.step / self.config.max_steps, by_time), 1.0)

    def _finished(self) -> bool:
        return self._progress() >= 1

    def _save(self) -> None:
        hits = self.ranks.sum(self.hits)
        if self.ranks.is_main:
            description = Description("tokenizer", self.class_names, None, asdict(self.config))
            numbers = {"step": self.step, "seconds": self.seconds, "hits": hits.tolist()}
            config, tensors = self.tokenizer.config, self._tensors()
            save_checkpoint(self.run, self.step, config, description, numbers, tensors, self.config.keep)
        self.ranks.barrier()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that is saved and restored in place."""
        return flattened({"model": named(self.tokenizer), "optimizer": optimizer_tensors(self.tokenizer, self.optimizer)})

    def _resume(self) -> list[str]:
        """Take up the newest undamaged checkpoint of the run, if there is one; returns what is to be told about it."""
        checkpoint, notes = agreed_checkpoint(self.run, self.ranks)
        if checkpoint is None:
            return notes
        if read_model_config(checkpoint, "tokenizer") != self.tokenizer.config:
            raise ValueError(
                f"{checkpoint}: a tokenizer of other sizes is there: resume with its --preset, or use another --out"
            )
        numbers = read_numbers(checkpoint)
        restore_(self._tensors(), checkpoint)
        self.step, self.seconds = numbers["step"], numbers["seconds"]
        if self.ranks.is_main:  # the sum over all ranks; the others go on from zero
            self.hits.copy_(torch.tensor(numbers["hits"]))
        return notes


def main() -> None:
    config = cli.parse(TokenizerTraining, __doc__)
    with process_group() as ranks:
        TokenizerTrainer(config, ranks).fit()


if __name__ == "__main__":
    cli.run(main)
