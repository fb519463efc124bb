"""Training of the transformer: one step, evaluation, and the loop around them with its saving, resuming and stopping.

One class on purpose, longer than other files here: it is the place where everything that a run does stands in its order.

The recipe is VAR's (arXiv 2404.02905, appendix, and the released trainers of VAR and M-VAR): AdamW, mean cross-entropy over
all tokens, class dropout for guidance, fp16 with loss scaling. Random numbers are functions of (seed, step, rank), so a
checkpoint needs no generator state and a resumed run is the uninterrupted one.
"""

import contextlib
import json
import math
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dist import Ranks, gradient_exchange, replicated, shard_, whole_outside_forward
from models.generate import generate
from models.scan_backends import choose_scan_
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer, recompute_blocks_
from utils import plots
from utils.checkpoint import Description, load_description
from utils.data.batches import TrainOrder
from utils.data.sources import Data
from utils.data.token_cache import check_classes, fingerprint
from utils.files import locked, replace_text
from utils.metrics.fidelity import Fidelity
from utils.runs.config import TrainConfig
from utils.runs.flops import peak_flops, training_flops
from utils.runs.log import RunLog
from utils.runs.optim import build_adamw, learning_rate_factor, progressive_stage, scale_groups, set_rates_, weight_decay
from utils.runs.resume import agreed_checkpoint, changes, check_same_model
from utils.runs.saving import ShardedSaver, read_numbers, restore_, save_checkpoint
from utils.runs.state import TrainState, named
from utils.runs.tally import Tally
from utils.signals import StopRequest

AUTOCAST_DTYPES = {1: torch.float16, 2: torch.bfloat16}
INITIAL_LOSS_SCALE, LARGEST_LOSS_SCALE, LOSS_SCALE_GROWTH = 2.0**11, 2.0**15, 1000  # as released
VALIDATION_EPOCHS = 10  # the released trainers validate and save this often
SHOWN_IMAGES = 8  # of the held-out ones, reconstructed at each validation
SAVE_FAILED = 1000  # above all signals, in the vote of the ranks on whether to go on
ALL_RANKS = 1 << 31  # in the place of a rank, for random numbers that all ranks draw alike


class Unsettled(NamedTuple):
    """A step that was taken and not looked at yet, see Trainer.settle."""

    tally: Tally
    loss_scale: Tensor  # () that its gradients were computed with
    is_bad: Tensor  # () bool on the CPU, copied there while the device goes on
    copied: torch.cuda.Event | None  # when it has arrived; None where there is nothing to wait for


class StepResult(NamedTuple):
    """What one step leaves for the log; nothing in it is synchronised between ranks yet."""

    tally: Tally
    grad_norm: Tensor
    learning_rate: float
    weight_decay: float
    num_scales: int


def losses_and_predictions(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and likeliest code of every token: logits (B, L, V) float32, targets (B, L) -> (B, L) each."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing)
    return losses.view_as(targets), logits.detach().argmax(dim=-1)


def step_seed(seed: int, step: int, rank: int) -> int:
    """What the random numbers of one step start from, on one rank or on ALL_RANKS."""
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
        fidelity: Fidelity | None = None,
    ):
        self.run = Path(config.local_out_dir_path)
        self.config, self.ranks, self.data, self.fidelity = config, ranks, data, fidelity
        self.tokenizer = tokenizer.to(ranks.device).eval().requires_grad_(False)
        self.pyramid = transformer.pyramid
        self.rank_batch = config.rank_batch(ranks.world)
        steps_per_epoch = math.ceil(data.size / config.bs)
        self.total_steps = config.max_steps or math.ceil(config.ep * steps_per_epoch)
        self.val_every = config.val_every or VALIDATION_EPOCHS * steps_per_epoch
        self.save_every = config.save_every or steps_per_epoch
        self.large_scales = transformer.config.windowed_scales("markov")

        self.scan_choice = choose_scan_(transformer, config.scan_backend, ranks.device)
        self.losses_and_predictions, self.teacher_inputs = losses_and_predictions, self.tokenizer.teacher_inputs
        if config.tfast:
            self._compile_(transformer)
        self.model = self._spread(transformer.to(ranks.device).train())
        self.sharded = ShardedSaver(ranks.is_main, ranks.barrier) if config.parallel == "fsdp" else None
        self.state = TrainState(
            transformer,
            build_adamw(transformer),
            torch.amp.GradScaler(
                ranks.device.type,
                init_scale=INITIAL_LOSS_SCALE,
                growth_interval=LOSS_SCALE_GROWTH,
                enabled=config.fp16 == 1,
            ),
        )
        if config.ema > 0:
            self.state.ema = {name: weight.clone() for name, weight in named(transformer).items()}
        self.tokenizer_hash = fingerprint(self.tokenizer)
        self.saved_step = 0  # the newest checkpoint's
        self.unsettled: Unsettled | None = None
        peak = config.peak_tflops * 1e12 or peak_flops(torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu")
        # the share of the peak that one image a second takes
        self.mfu_of_image = training_flops(transformer.config) / (peak * ranks.world) if peak else None

    def _spread(self, transformer: ScaleTransformer) -> torch.nn.Module:
        """The transformer as the ranks train it together."""
        config, ranks = self.config, self.ranks
        if config.recompute:
            recompute_blocks_(transformer)
        if config.parallel == "fsdp":
            shard_(transformer, ranks, AUTOCAST_DTYPES.get(config.fp16))
        if config.parallel == "fsdp" or ranks.world == 1:
            return transformer
        # accumulation is not possible with a static graph
        same_every_step = config.ac == 1 and config.pg == 0 and config.scale_groups == "together"
        return replicated(transformer, static_graph=same_every_step, unused_parameters=config.scale_groups == "drawn")

    def _compile_(self, transformer: ScaleTransformer) -> None:
        """Blocks of a kind share one graph; so do all steps, but for a graph of each stage where only some scales are trained.

        The loss is compiled for its memory too: it then keeps the logits for the backward pass, and nothing else of their size.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * self.pyramid.num_scales)
        for block in transformer.blocks:
            block.compile(mode={1: "reduce-overhead", 2: "max-autotune", 3: "default"}[self.config.tfast])
        self.losses_and_predictions = torch.compile(losses_and_predictions)
        self.teacher_inputs = torch.compile(self.tokenizer.teacher_inputs)

    # --- what a step needs ----------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """The passed share of the run, by steps or by minutes, whichever is further."""
        by_steps = self.state.step / max(self.total_steps - 1, 1)
        by_time = self.state.seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
        return min(max(by_steps, by_time), 1.0)

    def _to_device(self, values: Tensor) -> Tensor:
        """A copy that the host does not wait for: to a GPU it would, from memory that is not pinned."""
        values = values.pin_memory() if self.ranks.device.type == "cuda" else values
        return values.to(self.ranks.device, non_blocking=True)

    def _indices(self, batch: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) or cached tokens (B, L) -> K index tensors (B, h_k * w_k)."""
        batch = self._to_device(batch)
        return self.tokenizer.encode(batch) if batch.is_floating_point() else self.pyramid.split(batch.long())

    def _drop_classes(self, labels: Tensor, micro_batch: int) -> Tensor:
        """Labels (B,), some replaced by "no class". Drawn for the whole step, so that the number of ranks does not matter."""
        config, ranks = self.config, self.ranks
        generator = torch.Generator().manual_seed(step_seed(config.seed, self.state.step, ALL_RANKS))
        dropped = torch.rand(config.bs, generator=generator) < config.class_dropout
        first = (micro_batch * ranks.world + ranks.rank) * self.rank_batch
        return labels.masked_fill(dropped[first : first + len(labels)], self.state.transformer.unconditional)

    def _token_losses(
        self, model: torch.nn.Module, targets: Tensor, inputs: Tensor, labels: Tensor, scales: range, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and likeliest code of every token of consecutive scales, (B, L_of_scales) each.

        targets (B, L) and inputs (B, L - h_1 * w_1, code_dim) of all scales, labels (B,). One computation for training and
        validation.
        """
        tokens, start = self.pyramid.tokens(scales), self.pyramid.lengths[0]
        with self._autocast():
            own_inputs = inputs[:, max(tokens.start - start, 0) : tokens.stop - start]
            logits = model(labels, own_inputs, scales.start)  # (B, L_of_scales, V)
        return self.losses_and_predictions(logits, targets[:, tokens], label_smoothing)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST_DTYPES.get(self.config.fp16)
        return torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype is not None)

    def _new_tally(self) -> Tally:
        model = self.state.transformer.config
        return Tally(self.pyramid, model.num_codes, model.num_classes, self.ranks.device)

    # --- one step -------------------------------------------------------------------------------------------------------

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> StepResult:
        """Take `ac` micro-batches and advance the state by one step, which is settled by the next one or by `settle`.

        On a GPU nothing in it waits for the device, but for what the step before has left.
        """
        config, state = self.config, self.state
        torch.manual_seed(step_seed(config.seed, state.step, self.ranks.rank))
        progress = self.progress()
        learning_rate = config.peak_learning_rate * learning_rate_factor(
            config.schedule, progress, config.warmup_share, config.wp0, config.wpe
        )
        decay = weight_decay(progress, config.twd, config.twde or config.twd)
        set_rates_(state.optimizer, learning_rate, decay)
        num_scales, newest_weight = progressive_stage(
            progress,
            self.pyramid.num_scales,
            config.pg,
            min(config.pg0, self.pyramid.num_scales - 1),
            config.warmup_share,
            (config.pgwp or config.ep / 300) / config.ep,
        )
        groups = scale_groups(config.scale_groups, num_scales, self.large_scales, state.step)
        weights = torch.ones(self.pyramid.num_tokens, device=self.ranks.device)
        weights[self.pyramid.tokens(range(num_scales - 1, num_scales))] = newest_weight

        tally = self._new_tally()
        for micro_batch in range(config.ac):
            batch, labels = next(batches)
            labels = self._to_device(self._drop_classes(labels, micro_batch))
            indices = self._indices(batch)[:num_scales]
            targets, inputs = torch.cat(indices, dim=1), self.teacher_inputs(indices)
            for scales in groups:
                is_last = micro_batch == config.ac - 1 and scales == groups[-1]
                with gradient_exchange(self.model, now=is_last):
                    losses, predictions = self._token_losses(self.model, targets, inputs, labels, scales, config.ls)
                    tokens = self.pyramid.tokens(scales)
                    loss = (losses * weights[tokens]).sum(dim=1).mean() / self.pyramid.num_tokens
                    state.scaler.scale(loss / config.ac).backward()
                tally.add(scales, losses, predictions, targets[:, tokens], labels)

        grad_norm = self._advance(tally)
        return StepResult(tally, grad_norm, learning_rate, decay, num_scales)

    def _advance(self, tally: Tally) -> Tensor:
        """Settle the step before and apply the gradients of this one; returns their norm before clipping.

        With loss scaling the device itself skips a step whose gradients are not finite.
        """
        self.settle()  # now, that there is enough on its way to keep the device busy
        config, state = self.config, self.state
        state.scaler.unscale_(state.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(state.transformer.parameters(), config.tclip or math.inf)
        grad_norm = grad_norm.full_tensor() if config.parallel == "fsdp" else grad_norm
        is_bad = ~torch.isfinite(grad_norm + tally.parts["losses"].sum())
        one = torch.ones_like(grad_norm)
        loss_scale = state.scaler.scale(one)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.scaler.is_enabled():
            state.scaler.update(state.scaler.scale(one).clamp(max=LARGEST_LOSS_SCALE))
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        is_bad = is_bad.to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if self.ranks.device.type == "cuda" else None
        if copied is not None:
            copied.record()
        self.unsettled = Unsettled(tally, loss_scale, is_bad, copied)
        return grad_norm

    def settle(self) -> None:
        """Look at the last step, where that has not been done: average its weights, count it as skipped, or end the run.

        FloatingPointError, on all ranks, where loss or gradient of any are not finite, unless loss scaling may mend it. The
        weights are then spoilt, so whatever uses or saves them settles first.
        """
        if self.unsettled is None:
            return
        config, state, step = self.config, self.state, self.unsettled
        self.unsettled = None
        if step.copied is not None:
            step.copied.synchronize()
        if self.ranks.largest(int(step.is_bad)):  # the gradient is the same on all ranks, the loss is not
            state.skipped_in_a_row += 1
            if config.fp16 != 1 or state.skipped_in_a_row >= config.max_bad_steps:
                raise FloatingPointError(self._explain(step))
            state.skipped_steps += 1
        else:
            state.skipped_in_a_row = 0
            state.update_average(config.ema)

    def _explain(self, step: Unsettled) -> str:
        """Where a step that is not finite went wrong: asked of all ranks, told by each."""
        state = self.state
        by_scale = step.tally.metrics()["loss_by_scale"]
        names = list(by_scale)
        by_rank = self.ranks.gather(torch.tensor(list(by_scale.values())))  # (world, scales)
        where = torch.nonzero(~torch.isfinite(by_rank)).tolist()
        if where:
            rank, k = where[0]
            what = f"the loss is {by_rank[rank, k]:.4g} at scale {names[k]} on rank {rank}"
        else:
            rank, k = divmod(int(by_rank.argmax()), len(names))
            what = f"the gradient is not finite (largest loss {by_rank[rank, k]:.4g} at scale {names[k]} on rank {rank})"
        scaling = f" at loss scale {step.loss_scale.item():g}" if self.config.fp16 == 1 else ""
        in_a_row = f", {state.skipped_in_a_row} such steps in a row" if state.skipped_in_a_row > 1 else ""
        return (
            f"step {state.step}: {what}{scaling}{in_a_row}; the last checkpoint is untouched: "
            f"lower --tblr{' or use --fp16=0' if self.config.fp16 else ''}"
        )

    # --- evaluation -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, stop: StopRequest | None = None) -> Tally | None:
        """Losses and predictions on the held-out images, summed over all ranks; None where a stop was requested meanwhile."""
        self.settle()
        # Differs from M-VAR: the forward pass is that of training, and class dropout is off.
        transformer, tally, nowhere = self.state.transformer.eval(), self._new_tally(), self._new_tally()
        filler = torch.zeros(1, self.pyramid.num_tokens, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        batches = iter(self.data.val_batches(self.rank_batch, self.ranks.rank, self.ranks.world))
        with whole_outside_forward(transformer):
            while True:
                batch = next(batches, None)
                going_on = self.ranks.largest(2 if stop is not None and stop.number else int(batch is not None))
                if going_on != 1:
                    break
                # a rank that has no more goes through the motions: the ranks of a sharded model compute together
                images, labels = filler if batch is None else batch
                labels, indices = labels.to(self.ranks.device), self._indices(images)
                targets, inputs = torch.cat(indices, dim=1), self.tokenizer.teacher_inputs(indices)
                losses, predictions = self._token_losses(transformer, targets, inputs, labels, self.pyramid.scales, 0.0)
                (nowhere if batch is None else tally).add(self.pyramid.scales, losses, predictions, targets, labels)
        transformer.train()
        if going_on == 2:
            return None
        tally.sums.copy_(self.ranks.sum(tally.sums))
        return tally

    def _validate(self, log: RunLog, stop: StopRequest) -> dict[str, float]:
        """Evaluate and log; the validation stays due where a stop was requested meanwhile."""
        tally = self.evaluate(stop)
        if tally is None:
            return {}
        state, metrics = self.state, tally.metrics("val_")
        if self.fidelity is not None:
            distance = self._sample_distance(stop)
            if distance is None:
                return {}
            metrics |= {"val_fd": distance, "val_fd_real": self.fidelity.real}
        log.classes(state.step, *tally.by_class())
        if self.config.val_samples and (self.ranks.is_main or self.sharded is not None):  # a sharded model needs all ranks
            log.image(state.step, "samples", self._draw_samples())
        if self.ranks.is_main:
            log.image(state.step, "reconstructions", self._draw_reconstructions())
        log.metrics(state.step, {"epoch": self._epoch(), **metrics})  # last: it says that the validation was done
        figures = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
        log.text(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        state.validation_due = False
        return figures

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[ScaleTransformer]:
        """The transformer as samples are drawn from it: its averaged weights, in the precision of training."""
        transformer = self.state.transformer.eval()
        # a graph of every scale would take longer to compile than it saves
        uncompiled = torch.compiler.set_stance("force_eager") if self.config.tfast else contextlib.nullcontext()
        with uncompiled, self.state.averaged_weights(), whole_outside_forward(transformer), self._autocast():
            yield transformer
        transformer.train()

    def _sample_distance(self, stop: StopRequest) -> float | None:
        """FD-EffLite0 of samples; None where a stop was requested meanwhile."""
        with self._sampling() as transformer:
            return self.fidelity.of_samples(transformer, self.tokenizer, stop)

    def _draw_samples(self) -> Image.Image:
        """A sample of each of the first classes, from the same random numbers at every validation."""
        names = self.data.class_names[: self.config.val_samples]
        generator = torch.Generator(self.ranks.device).manual_seed(0)
        with self._sampling() as transformer:
            labels = torch.arange(len(names), device=self.ranks.device)
            images = generate(transformer, self.tokenizer, labels, generator=generator).images
        return plots.grid(list(plots.to_uint8(images)[:, None]), names)

    def _draw_reconstructions(self) -> Image.Image:
        """A few held-out images, where there are pixels, below what their tokens decode to."""
        every = max(self.data.val_size // SHOWN_IMAGES, 1)  # so that all classes are among them
        images, _ = next(self.data.val_batches(SHOWN_IMAGES, 0, every))
        rows = {"decoded": self.tokenizer.decode(self._indices(images))}
        if images.is_floating_point():
            rows["original"] = images
        return plots.grid([plots.to_uint8((row + 1) / 2) for row in rows.values()], list(rows))

    # --- the loop -------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to the end, from the last checkpoint where there is one; returns the final validation figures.

        After SIGTERM or SIGINT the step is finished and saved, and SystemExit with 128 + the signal's number ends the run.
        """
        with contextlib.ExitStack() as stack:
            if self.ranks.is_main:
                stack.enter_context(locked(self.run))
            notes = self._resume()
            log = stack.enter_context(contextlib.closing(RunLog(self.run, self.ranks.is_main, self.state.step)))
            stop = stack.enter_context(StopRequest())
            if self.ranks.is_main:
                self._write_config()
            if self.state.validation_due and self.ranks.largest(int(log.has_validation(self.state.step))):
                self.state.validation_due = False  # it was done after the checkpoint had been written
            for note in [*notes, self._headline(), str(self.scan_choice)]:
                log.text(note)
            if self.fidelity is not None:
                log.text(
                    f"FD-EffLite0 of {self.fidelity.count} training images from the held-out ones: {self.fidelity.real:.2f}"
                )
            if self._finished():
                log.text(
                    f"nothing left to do at step {self.state.step}: for more, give a larger --ep, --max_steps or --max_minutes"
                )
            try:
                final, stopped_by = self._train(log, stop)
            except FloatingPointError:  # on all ranks alike
                self._finish_saving()
                raise
            self._finish_saving()
            if stopped_by:
                name = signal.Signals(stopped_by).name
                log.text(f"stopped by {name} after step {self.state.step}, which is saved: the same command goes on from there")
        if stopped_by:
            raise SystemExit(128 + stopped_by)
        return final

    def _train(self, log: RunLog, stop: StopRequest) -> tuple[dict[str, float], int]:
        """Step by step to the end, or to a request to stop; returns the last validation figures and the signal, or 0."""
        state, config, ranks = self.state, self.config, self.ranks
        order = TrainOrder(self.data.size, config.bs, config.seed, ranks.rank, ranks.world, config.ac, self.data.views)
        batches = self.data.train_batches(order, state.step, self.total_steps)
        final: dict[str, float] = {}
        mark_time, mark_step = time.monotonic(), state.step  # of the last log line
        clock_start = time.monotonic() - state.seconds
        while True:
            if state.validation_due:
                final = self._validate(log, stop)
                mark_time, mark_step = time.monotonic(), state.step
            save_failed = self.sharded is not None and self.sharded.has_failed()
            stopped_by = ranks.largest(SAVE_FAILED if save_failed else stop.number)
            if stopped_by == SAVE_FAILED:
                self._finish_saving()
                raise OSError("another rank could not write the last checkpoint; what it says tells why")
            is_last = self._finished() or stopped_by
            if (is_last or state.step % self.save_every == 0) and state.step > self.saved_step:
                self.save()
            if is_last:
                return final, stopped_by
            result = self.train_step(batches)
            state.seconds = time.monotonic() - clock_start
            if config.max_minutes:
                state.seconds = ranks.from_main(state.seconds)
            state.validation_due = state.step % self.val_every == 0 or self._finished()
            if state.step % config.log_every == 0 or self._finished():
                speed = (state.step - mark_step) * config.bs / (time.monotonic() - mark_time)
                mark_time, mark_step = time.monotonic(), state.step
                metrics = self._metrics(result, speed)
                log.metrics(state.step, metrics)
                share = self.progress()
                total = round(state.step / share) if config.max_minutes else self.total_steps
                log.progress(state.step, total, share, state.seconds, metrics)

    def _headline(self) -> str:
        config, state = self.config, self.state
        count = sum(parameter.numel() for parameter in state.transformer.parameters())
        return (
            f"{f'resuming at step {state.step}' if state.step else 'training'}: {config.family} depth {config.depth}, "
            f"{count / 1e6:.2f}M parameters, pyramid {self.pyramid}, {self.data.size} images, "
            f"{self.total_steps} steps{f' or {config.max_minutes:g} minutes' if config.max_minutes else ''} of {config.bs}, "
            f"{self.ranks.world} rank(s) on {self.ranks.device.type}"
        )

    def _epoch(self) -> float:
        return self.state.step * self.config.bs / self.data.size

    def _finished(self) -> bool:
        over_time = self.config.max_minutes and self.state.seconds >= 60 * self.config.max_minutes
        return self.state.step >= self.total_steps or bool(over_time)

    def _metrics(self, result: StepResult, speed: float) -> dict[str, float | dict[str, float]]:
        """Figures of the last step for the log, over all ranks; speed in images per second."""
        self.settle()
        state, tally = self.state, result.tally
        tally.sums.copy_(self.ranks.sum(tally.sums))
        metrics = {
            "epoch": self._epoch(),
            **tally.metrics(),
            "grad_norm": result.grad_norm.item(),
            "learning_rate": result.learning_rate,
            "weight_decay": result.weight_decay,
            "scales": result.num_scales,
            "images_per_second": speed,
            "memory_gb": peak_memory(self.ranks.device) / 1e9,
        }
        if self.config.fp16 == 1:
            metrics |= {"loss_scale": state.scaler.get_scale(), "skipped_steps": state.skipped_steps}
        if self.mfu_of_image:  # of a pyramid that is trained in part, that part
            trained = tally.parts["tokens"].count_nonzero().item() / self.pyramid.num_tokens
            metrics["mfu"] = speed * self.mfu_of_image * trained
        return metrics

    # --- saving and resuming --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint: the main rank while the others wait; of a sharded model, all ranks in the background."""
        self.settle()
        state, config = self.state, self.config
        description = Description("transformer", self.data.class_names, config.vae, asdict(config))
        numbers = state.numbers() | self._circumstances()
        arguments = (self.run, state.step, state.transformer.config, description, numbers, state.tensors(), config.keep)
        self.saved_step = state.step
        if self.sharded is not None:
            self.sharded.start(*arguments)
            return
        if self.ranks.is_main:
            save_checkpoint(*arguments)
        self.ranks.barrier()

    def _finish_saving(self) -> None:
        """Wait for a checkpoint that is being written in the background; no rank leaves before it is in its place."""
        if self.sharded is not None:
            self.sharded.finish()
            self.ranks.barrier()

    def _circumstances(self) -> dict:
        """What the order of the data and the meaning of the tokens depend on; kept with every checkpoint."""
        config = self.config
        return {
            "ranks": self.ranks.world,
            "seed": config.seed,
            "batch": config.bs,
            "images": self.data.size,
            "tokenizer": self.tokenizer_hash,
        }

    def _resume(self) -> list[str]:
        """Take up the newest undamaged checkpoint of the run, if there is one; returns what is to be told about it."""
        checkpoint, notes = agreed_checkpoint(self.run, self.ranks)
        if checkpoint is None:
            return notes
        check_same_model(checkpoint, self.state.transformer.config)
        check_classes(load_description(checkpoint).class_names, self.data.class_names, checkpoint, "the data given")
        numbers = read_numbers(checkpoint)
        notes += changes(numbers, self._circumstances(), checkpoint)
        restore_(self.state.tensors(), checkpoint)
        self.state.set_numbers(numbers)
        self.saved_step = self.state.step
        return notes

    def _write_config(self) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        resolved = {
            "training": asdict(self.config),
            "model": asdict(self.state.transformer.config),
            "ranks": self.ranks.world,
            "torch": torch.__version__,
        }
        replace_text(self.run / "config.json", json.dumps(resolved, indent=1) + "\n")


def peak_memory(device: torch.device) -> int:
    """Bytes at most in use so far: of the GPU by tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
