"""Training of the transformer: the state that advances, one step, evaluation, and the loop around them.

The recipe is VAR's (arXiv 2404.02905, appendix, and the released trainers of VAR and M-VAR): AdamW, mean cross-entropy over
all tokens, class dropout for guidance, fp16 with loss scaling. Random numbers are functions of (seed, step, rank), so a
checkpoint needs no generator state and a resumed run is the uninterrupted one.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist import Ranks
from models.ssm import choose_scan
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer, TransformerConfig
from utils.checkpoint import Description, latest_checkpoint, load_training, read_model_config, save_checkpoint
from utils.data import TrainOrder
from utils.files import replace_text
from utils.log import RunLog
from utils.optim import build_adamw, learning_rate_factor, progressive_stage, set_rates, weight_decay
from utils.recipe import TrainConfig

AUTOCAST_DTYPES = {1: torch.float16, 2: torch.bfloat16}
VALIDATION_EPOCHS = 10  # the released trainers validate and save this often


class Data(Protocol):
    """Where batches come from: images (B, 3, H, W) in [-1, 1] or tokens (B, L), with labels (B,)."""

    class_names: list[str]
    size: int  # training images
    views: int  # stored encodings of each

    def train_batches(self, order: TrainOrder, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def val_batches(self, batch: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class TrainState:
    """Everything that advances during training; exactly this is saved."""

    step: int
    seconds: float
    transformer: ScaleTransformer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: dict[str, Tensor] | None  # averaged weights, on the main rank only


def step_seed(seed: int, step: int, rank: int) -> int:
    """What the random numbers of one step on one rank start from."""
    # Differs from VAR: generators are seeded at every step, not once, so that a resumed run draws the same numbers.
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint32)[0])


class Trainer:
    """One run of train.py."""

    def __init__(
        self,
        config: TrainConfig,
        transformer: ScaleTransformer,
        tokenizer: VQVAE,
        data: Data,
        ranks: Ranks,
    ):
        self.run = Path(config.local_out_dir_path)
        self.config, self.ranks, self.data = config, ranks, data
        self.tokenizer = tokenizer.to(ranks.device).eval().requires_grad_(False)
        self.pyramid = transformer.pyramid
        self.rank_batch = config.rank_batch(ranks.world)
        steps_per_epoch = math.ceil(data.size / config.bs)
        self.total_steps = config.max_steps or math.ceil(config.ep * steps_per_epoch)
        self.val_every = config.val_every or VALIDATION_EPOCHS * steps_per_epoch
        self.save_every = config.save_every or steps_per_epoch

        transformer.to(ranks.device).train()
        choose_scan(transformer, config.scan_backend)
        self.state = TrainState(
            step=0,
            seconds=0.0,
            transformer=transformer,
            optimizer=build_adamw(transformer),
            scaler=torch.amp.GradScaler(ranks.device.type, init_scale=2.0**11, growth_interval=1000, enabled=config.fp16 == 1),
            ema=None,
        )
        if config.ema > 0 and ranks.is_main:
            self.state.ema = {name: weight.detach().clone() for name, weight in transformer.state_dict().items()}
        if config.tfast:
            for block in transformer.blocks:
                block.compile(mode={1: "reduce-overhead", 2: "max-autotune", 3: "default"}[config.tfast])
        self.model = transformer
        if ranks.world > 1:
            self.model = DistributedDataParallel(
                transformer,
                broadcast_buffers=False,  # they are constants
                gradient_as_bucket_view=True,
                static_graph=config.ac == 1 and config.pg == 0,
            )

    # --- what a step needs ----------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """The passed share of the run, by steps or by minutes, whichever is further."""
        by_steps = self.state.step / max(self.total_steps - 1, 1)
        by_time = self.state.seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
        return min(max(by_steps, by_time), 1.0)

    def _indices(self, batch: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) or cached tokens (B, L) -> K index tensors (B, h_k * w_k)."""
        batch = batch.to(self.ranks.device, non_blocking=True)
        return self.tokenizer.encode(batch) if batch.is_floating_point() else self.pyramid.split(batch)

    def _token_losses(
        self, model: torch.nn.Module, indices: list[Tensor], labels: Tensor, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and correctness of every token, (B, L) each: one computation for training and validation."""
        targets = torch.cat(indices, dim=1)  # (B, L)
        inputs = self.tokenizer.teacher_inputs(indices)
        with self._autocast():
            logits = model(labels, inputs)  # (B, L, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing)
        return losses.view_as(targets), logits.detach().argmax(dim=-1) == targets

    def _gradient_exchange(self, now: bool) -> contextlib.AbstractContextManager:
        """Ranks average their gradients in the last micro-batch of a step only."""
        return contextlib.nullcontext() if now or self.ranks.world == 1 else self.model.no_sync()

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST_DTYPES.get(self.config.fp16)
        return torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype is not None)

    # --- one step -------------------------------------------------------------------------------------------------------

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Take `ac` micro-batches, advance the state by one step and return sums for the log."""
        config, state = self.config, self.state
        torch.manual_seed(step_seed(config.seed, state.step, self.ranks.rank))
        progress = self.progress()
        learning_rate = config.peak_learning_rate * learning_rate_factor(
            config.schedule, progress, config.warmup_share, config.wp0, config.wpe
        )
        decay = weight_decay(progress, config.twd, config.twde or config.twd)
        set_rates(state.optimizer, learning_rate, decay)
        num_scales, newest_weight = progressive_stage(
            progress,
            self.pyramid.num_scales,
            config.pg,
            min(config.pg0, self.pyramid.num_scales - 1),
            config.warmup_share,
            (config.pgwp or config.ep / 300) / config.ep,
        )
        newest = self.pyramid.tokens(range(num_scales - 1, num_scales))

        sums = torch.zeros(4, device=self.ranks.device)  # loss, last loss, accuracy, last accuracy
        for micro_batch in range(config.ac):
            batch, labels = next(batches)
            indices = self._indices(batch)[:num_scales]
            labels = labels.to(self.ranks.device, non_blocking=True)
            dropped = torch.rand(labels.shape, device=labels.device) < config.class_dropout
            labels = labels.masked_fill(dropped, state.transformer.unconditional)
            with self._gradient_exchange(now=micro_batch == config.ac - 1):
                losses, correct = self._token_losses(self.model, indices, labels, config.ls)
                weights = losses.new_ones(losses.shape[1])
                weights[newest] = newest_weight
                loss = (losses * weights).sum(dim=1).mean() / self.pyramid.num_tokens
                state.scaler.scale(loss / config.ac).backward()
            for i, values in enumerate((losses, losses[:, newest], correct, correct[:, newest])):
                sums[i] += values.detach().float().mean() / config.ac

        state.scaler.unscale_(state.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(state.transformer.parameters(), config.tclip or math.inf)
        if config.fp16 != 1 and not torch.isfinite(grad_norm):
            raise FloatingPointError(
                f"step {state.step}: the gradient is not finite (loss {sums[0].item():.4g}); the last checkpoint is untouched: "
                f"lower --tblr or use --fp16=0"
            )
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.ema is not None:
            self._update_ema()
        return {
            "sums": sums,
            "grad_norm": grad_norm,
            "learning_rate": torch.tensor(learning_rate),
            "weight_decay": torch.tensor(decay),
            "scales": torch.tensor(num_scales),
        }

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema, (1 + self.state.step) / (10 + self.state.step))
        averaged, current = self.state.ema, self.state.transformer.state_dict()
        torch._foreach_lerp_(list(averaged.values()), [current[name] for name in averaged], 1 - decay)

    # --- evaluation -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the held-out images, over all tokens and over those of the last scale."""
        # Differs from M-VAR: the forward pass is that of training, and class dropout is off.
        transformer = self.state.transformer.eval()
        totals = torch.zeros(2, self.pyramid.num_tokens, dtype=torch.float64, device=self.ranks.device)
        count = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for batch, labels in self.data.val_batches(self.rank_batch, self.ranks.rank, self.ranks.world):
            indices = self._indices(batch)
            losses, correct = self._token_losses(transformer, indices, labels.to(self.ranks.device), 0.0)
            totals += torch.stack([losses.double().sum(0), correct.double().sum(0)])
            count += len(losses)
        transformer.train()
        losses, accuracies = self.ranks.sum(totals) / self.ranks.sum(count)  # (L,) each
        last = self.pyramid.tokens(self.pyramid.scales[-1:])
        return {
            "val_loss": losses.mean().item(),
            "val_loss_last": losses[last].mean().item(),
            "val_accuracy": accuracies.mean().item(),
            "val_accuracy_last": accuracies[last].mean().item(),
        }

    # --- the loop -------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to the end, from the last checkpoint where there is one; returns the final validation figures."""
        state, config = self.state, self.config
        resumed = self._resume()
        log = RunLog(self.run, self.ranks.is_main, state.step)
        if self.ranks.is_main:
            self._write_config()
        count = sum(parameter.numel() for parameter in state.transformer.parameters())
        log.text(
            f"{'resuming at step ' + str(state.step) if resumed else 'training'}: {config.family} depth {config.depth}, "
            f"{count / 1e6:.2f}M parameters, pyramid {self.pyramid}, {self.data.size} images, "
            f"{self.total_steps} steps{f' or {config.max_minutes:g} minutes' if config.max_minutes else ''} of {config.bs}, "
            f"{self.ranks.world} rank(s) on {self.ranks.device.type}"
        )
        ranks, views = self.ranks, self.data.views
        order = TrainOrder(self.data.size, config.bs, config.seed, ranks.rank, ranks.world, config.ac, views)
        batches = self.data.train_batches(order, state.step, self.total_steps)
        final: dict[str, float] = {}
        if self._finished():
            log.text(f"nothing left to do at step {state.step}: a longer run needs a larger --ep, --max_steps or --max_minutes")
        mark_time, mark_step = time.monotonic(), state.step  # of the last log line
        clock_start = time.monotonic() - state.seconds
        while not self._finished():
            values = self.train_step(batches)
            state.seconds = time.monotonic() - clock_start
            if config.max_minutes:
                state.seconds = self.ranks.from_main(state.seconds)
            logs, validates, saves = (
                state.step % every == 0 or self._finished() for every in (config.log_every, self.val_every, self.save_every)
            )
            if logs or saves:
                speed = (state.step - mark_step) * config.bs / (time.monotonic() - mark_time)
                metrics = self._metrics(values, speed)
            if logs:
                mark_time, mark_step = time.monotonic(), state.step
                log.metrics(state.step, metrics)
                log.progress(
                    self.progress(),
                    state.seconds,
                    f"step {state.step}, loss {metrics['loss']:.3f}, {speed:.0f} images/s",
                )
            if validates:
                final = self.evaluate()
                log.metrics(state.step, final)
                log.text(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in final.items()))
                mark_time, mark_step = time.monotonic(), state.step
            if saves:
                self.save()
        log.close()
        return final

    def _finished(self) -> bool:
        over_time = self.config.max_minutes and self.state.seconds >= 60 * self.config.max_minutes
        return self.state.step >= self.total_steps or bool(over_time)

    def _metrics(self, values: dict[str, Tensor], speed: float) -> dict[str, float]:
        """Figures of the last step for the log; FloatingPointError where the loss, float32 under fp16 too, is not finite."""
        loss, loss_last, accuracy, accuracy_last = (self.ranks.sum(values["sums"]) / self.ranks.world).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {self.state.step}: the loss is {loss} (loss scale {self.state.scaler.get_scale():g}); "
                f"the last checkpoint is untouched: lower --tblr or use --fp16=0"
            )
        return {
            "loss": loss,
            "loss_last": loss_last,
            "accuracy": accuracy,
            "accuracy_last": accuracy_last,
            "grad_norm": values["grad_norm"].item(),
            "learning_rate": values["learning_rate"].item(),
            "weight_decay": values["weight_decay"].item(),
            "scales": values["scales"].item(),
            "loss_scale": self.state.scaler.get_scale(),
            "images_per_second": speed,
        }

    # --- saving and resuming --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint (main rank); the others wait."""
        state = self.state
        if self.ranks.is_main:
            description = Description("transformer", self.data.class_names, self.config.vae, asdict(self.config))
            training = {"seconds": state.seconds, "scaler": state.scaler.state_dict()}
            optimizer = state.optimizer.state_dict()
            save_checkpoint(
                self.run, state.step, state.transformer, description, training, optimizer, state.ema, self.config.keep
            )
        self.ranks.barrier()

    def _resume(self) -> bool:
        checkpoint = latest_checkpoint(self.run)
        if checkpoint is None:
            return False
        check_same_model(checkpoint, self.state.transformer.config)
        training, optimizer, ema = load_training(checkpoint, self.state.transformer)
        self.state.step, self.state.seconds = training["step"], training["seconds"]
        self.state.optimizer.load_state_dict(optimizer)
        if training["scaler"] and self.config.fp16 == 1:  # empty where the run so far had another precision
            self.state.scaler.load_state_dict(training["scaler"])
        if self.state.ema is not None:  # a run so far without an average starts one from its weights
            average = ema if ema is not None else self.state.transformer.state_dict()
            self.state.ema = {name: weight.detach().clone().to(self.ranks.device) for name, weight in average.items()}
        return True

    def _write_config(self) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        resolved = {
            "training": asdict(self.config),
            "model": asdict(self.state.transformer.config),
            "ranks": self.ranks.world,
            "torch": torch.__version__,
        }
        replace_text(self.run / "config.json", json.dumps(resolved, indent=1) + "\n")


def check_same_model(checkpoint: Path, config: TransformerConfig) -> None:
    """ValueError unless the checkpoint holds a model of this shape."""
    saved = read_model_config(checkpoint, "transformer")
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(saved, field.name)
        if ours != theirs and field.name != "drop_path":
            raise ValueError(
                f"{checkpoint}: a run with {field.name} {_short(theirs)} is there, this command asks for {_short(ours)}: "
                f"use its flags to resume, or another --local_out_dir_path"
            )


def _short(value: object) -> str:
    """A readable form of a field: ('mvar', 'mvar') -> 2 x mvar."""
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return " + ".join(f"{value.count(kind)} x {kind}" for kind in dict.fromkeys(value))
    return str(value)


def with_seed(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The configuration with a seed: the one given, that of the run being resumed, or a fresh one, the same on all ranks."""
    if config.seed is not None:
        return config
    saved = Path(config.local_out_dir_path) / "config.json"
    if saved.exists() and latest_checkpoint(saved.parent):
        return replace(config, seed=json.loads(saved.read_text())["training"]["seed"])
    return replace(config, seed=int(ranks.from_main(np.random.SeedSequence().entropy % 2**31)))
