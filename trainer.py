"""The loop: step, check, validate, log, save, resume and stop, for whatever is trained.

What that is, a task says (utils/runs/task.py): how a batch becomes losses and gradients, and how good the model is. The loop
knows neither models nor losses. Random numbers are functions of (seed, step, rank), so a checkpoint needs no generator state
and a resumed run is the uninterrupted one.
"""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from dist import Ranks
from utils.data.batches import Timed, TrainOrder
from utils.files import locked, replace_text
from utils.runs.log import RunLog
from utils.runs.pace import Pace, peak_memory
from utils.runs.resume import agreed_checkpoint, changes, take_up_best_
from utils.runs.saving import ShardedSaver, read_numbers, restore_, save_checkpoint
from utils.runs.state import AVERAGED, MODEL, TrainState, trained
from utils.runs.task import RunConfig, StepResult, Task, step_seed
from utils.signals import Stopped, StopRequest

INITIAL_LOSS_SCALE, LARGEST_LOSS_SCALE, LOSS_SCALE_GROWTH = 2.0**11, 2.0**15, 1000  # as released
SAVE_FAILED = 1000  # above all signals, in the vote of the ranks on whether to go on


class PendingStep(NamedTuple):
    """A step that was taken and not looked at yet, see Trainer.check_step."""

    result: StepResult
    loss_scale: Tensor  # () that its gradients were computed with
    is_bad: Tensor  # () bool on the CPU, copied there while the device goes on
    copied: torch.cuda.Event | None  # when it has arrived; None where there is nothing to wait for


class Trainer:
    """One run."""

    def __init__(self, task: Task, config: RunConfig, ranks: Ranks):
        self.task, self.config, self.ranks = task, config, ranks
        scaler = torch.amp.GradScaler(
            ranks.device.type,
            init_scale=INITIAL_LOSS_SCALE,
            growth_interval=LOSS_SCALE_GROWTH,
            enabled=config.fp16 == 1,
        )
        self.state = TrainState(task.parts, scaler)
        if config.ema > 0:
            self.state.ema = {name: weight.clone() for name, weight in trained(self.state.model).items()}
        self.sharded = ShardedSaver(ranks.is_main, ranks.barrier) if config.sharded else None
        self.saved_step = 0  # the newest checkpoint's
        self.pending: PendingStep | None = None

    # --- one step -------------------------------------------------------------------------------------------------------

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[StepResult, dict[str, Tensor]]:
        """Advance the state by one step, which is checked by the next one or by `check_step`; returns gradient norms, too.

        On a GPU nothing in it waits for the device, but for what the step before has left.
        """
        config, state = self.config, self.state
        # random numbers of this step
        torch.manual_seed(step_seed(config.seed, state.step, self.ranks.rank))
        # batches -> losses -> gradients
        result = self.task.step(state, batches, self.progress())
        # the step before, now that there is enough on its way to keep the device busy
        self.check_step()
        # gradients -> weights
        return result, self._advance(result)

    def _advance(self, result: StepResult) -> dict[str, Tensor]:
        """Apply the gradients of a step; returns their norms, "grad_norm" for MODEL."""
        state = self.state
        norms = {
            "grad_norm" if name == MODEL else f"grad_norm_{name}": part.advance(state.scaler)
            for name, part in state.parts.items()
        }
        is_bad = ~torch.isfinite(sum(norms.values()) + result.loss)
        one = torch.ones_like(norms["grad_norm"])
        loss_scale = state.scaler.scale(one)
        state.scaler.update()
        if state.scaler.is_enabled():
            state.scaler.update(state.scaler.scale(one).clamp(max=LARGEST_LOSS_SCALE))
        state.step += 1
        is_bad = is_bad.to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if self.ranks.device.type == "cuda" else None
        if copied is not None:
            copied.record()
        self.pending = PendingStep(result, loss_scale, is_bad, copied)
        return norms

    def check_step(self) -> None:
        """Look at the last step, where that has not been done: average its weights, count it as skipped, or end the run.

        FloatingPointError, on all ranks, where loss or gradient of any are not finite, unless loss scaling may mend it. The
        weights are then spoilt, so whatever uses or saves them checks first.
        """
        if self.pending is None:
            return
        config, state, step = self.config, self.state, self.pending
        self.pending = None
        if step.copied is not None:
            step.copied.synchronize()
        if not self.ranks.largest(int(step.is_bad)):  # the gradient is the same on all ranks, the loss is not
            state.skipped_in_a_row = 0
            state.update_average(config.ema)
            return
        state.skipped_in_a_row += 1
        if config.fp16 != 1 or state.skipped_in_a_row >= config.max_bad_steps:
            scaling = f" at loss scale {step.loss_scale.item():g}" if config.fp16 == 1 else ""
            in_a_row = f", {state.skipped_in_a_row} such steps in a row" if state.skipped_in_a_row > 1 else ""
            raise FloatingPointError(
                f"step {state.step}: {self.task.explain(step.result)}{scaling}{in_a_row}; the last checkpoint is untouched: "
                f"lower {config.rate_flag}{' or use --fp16=0' if config.fp16 else ''}"
            )
        state.skipped_steps += 1

    # --- the loop -------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to the end, from the last checkpoint where there is one; returns the final validation figures.

        After SIGTERM or SIGINT the step is finished and saved, and SystemExit with 128 + the signal's number ends the run.
        """
        with contextlib.ExitStack() as stack:
            if self.ranks.is_main:
                stack.enter_context(locked(self.config.directory))
            notes = self._resume()
            log = stack.enter_context(contextlib.closing(RunLog(self.config.directory, self.ranks.is_main, self.state.step)))
            stop = stack.enter_context(StopRequest())
            if self.ranks.is_main:
                self._write_config()
            if self.state.validation_due and self.ranks.largest(int(log.has_validation(self.state.step))):
                self.state.validation_due = False  # it was done after the checkpoint had been written
            for note in [*notes, self._headline(), *self.task.notes()]:
                log.text(note)
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
        views = self.task.data.views
        order = TrainOrder(self.task.data.size, config.batch, config.seed, ranks.rank, ranks.world, config.micro_batches, views)
        batches = Timed(self.task.data.train_batches(order, state.step, config.total_steps))
        final: dict[str, float] = {}
        pace = Pace(batches, state.step, self.task.data.mend)
        clock_start = time.monotonic() - state.seconds
        while True:
            # validate
            is_best = False
            if state.validation_due:
                final = self._validate(log, stop)
                is_best = self._note_best(final)
                pace.mark(state.step)
            # stop?
            save_failed = self.sharded is not None and self.sharded.has_failed()
            stopped_by = ranks.largest(SAVE_FAILED if save_failed else stop.number)
            if stopped_by == SAVE_FAILED:
                self._finish_saving()
                raise OSError("another rank could not write the last checkpoint; what it says tells why")
            # save
            is_last = self._finished() or stopped_by
            if is_best or ((is_last or state.step % config.save_every == 0) and state.step > self.saved_step):
                self.save()
            if is_last:
                return final, stopped_by
            # step
            try:
                result, norms = self.train_step(batches)
            except Stopped:  # while a batch did not come: nothing of the step was done
                if ranks.world > 1:
                    raise  # the others wait for this one
                self.save()
                return final, stop.number
            state.seconds = time.monotonic() - clock_start
            if config.max_minutes:
                state.seconds = ranks.from_main(state.seconds)
            state.validation_due = state.step % config.val_every == 0 or self._finished()
            # log
            if state.step % config.log_every == 0 or self._finished():
                speed, waited = pace.measure(state.step)
                waited = ranks.largest(round(1000 * waited)) / 1000
                metrics = self._metrics(result, norms, speed * config.batch) | {"data_wait": waited}
                log.metrics(state.step, metrics)
                share = self.progress()
                total = round(state.step / share) if config.max_minutes else config.total_steps
                log.progress(state.step, total, share, state.seconds, metrics)
                for remark in [*self.task.remarks(state.step, metrics), *pace.remarks(waited)]:
                    log.text(f"step {state.step}: {remark}")

    def progress(self) -> float:
        """The passed share of the run, by steps or by minutes, whichever is further."""
        by_steps = self.state.step / max(self.config.schedule_steps, 1)
        by_time = self.state.seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
        return min(max(by_steps, by_time), 1.0)

    def _finished(self) -> bool:
        over_time = self.config.max_minutes and self.state.seconds >= 60 * self.config.max_minutes
        return self.state.step >= self.config.total_steps or bool(over_time)

    def _epoch(self) -> float:
        return self.state.step * self.config.batch / self.task.data.size

    # --- what is logged -------------------------------------------------------------------------------------------------

    def _headline(self) -> str:
        config, state = self.config, self.state
        count = sum(parameter.numel() for parameter in state.model.parameters())
        return (
            f"{f'resuming at step {state.step}' if state.step else 'training'}: {self.task.title}, "
            f"{count / 1e6:.2f}M parameters, {self.task.details}, {self.task.data.size} images, "
            f"{config.total_steps} steps{f' or {config.max_minutes:g} minutes' if config.max_minutes else ''} "
            f"of {config.batch}, {self.ranks.world} rank(s) on {self.ranks.device.type}"
        )

    def _metrics(self, result: StepResult, norms: dict[str, Tensor], speed: float) -> dict[str, float | dict[str, float]]:
        """Figures of the last step for the log, over all ranks; speed in images per second."""
        self.check_step()
        metrics = {
            "epoch": self._epoch(),
            **self.task.figures(result),
            **{name: norm.item() for name, norm in norms.items()},
            **result.rates,
            "images_per_second": speed,
            "memory_gb": peak_memory(self.ranks.device) / 1e9,
        }
        if self.config.fp16 == 1:
            metrics |= {"loss_scale": self.state.scaler.get_scale(), "skipped_steps": self.state.skipped_steps}
        utilisation = self.task.utilisation(result, speed)
        return metrics if utilisation is None else metrics | {"mfu": utilisation}

    def _validate(self, log: RunLog, stop: StopRequest) -> dict[str, float]:
        """Evaluate and log; the validation stays due where a stop was requested meanwhile."""
        self.check_step()
        evaluation = self.task.evaluate(self.state, stop)
        if evaluation is None:
            return {}
        state = self.state
        if evaluation.by_class:
            log.classes(state.step, *evaluation.by_class)
        for name, picture in (evaluation.pictures or {}).items():
            log.image(state.step, name, picture)
        log.metrics(state.step, {"epoch": self._epoch(), **evaluation.figures})  # last: it says that the validation was done
        figures = {name: value for name, value in evaluation.figures.items() if not isinstance(value, dict)}
        log.text(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        state.validation_due = False
        return figures

    def _note_best(self, figures: dict[str, float]) -> bool:
        """Whether a validation is the best so far by config.best, and to be kept; a stopped one has no figures.

        ValueError where validations have no such figure.
        """
        state, name = self.state, self.config.best
        if not name or not figures:
            return False
        if name not in figures:
            raise ValueError(f"--best={name}: validations have no such figure here, they have {', '.join(figures)}: give one")
        sign = 1 if name in self.task.higher_is_better else -1
        if state.best is not None and not sign * figures[name] > sign * state.best:
            return False
        state.best, state.best_step, state.best_figure = figures[name], state.step, name
        return True

    # --- saving and resuming --------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All that is saved and restored in place."""
        return self.state.tensors() | self.task.tensors()

    def circumstances(self) -> dict:
        """What the order of the data and the meaning of the tokens depend on; kept with every checkpoint."""
        kept = {"ranks": self.ranks.world, "seed": self.config.seed, "batch": self.config.batch}
        schedule = {name: getattr(self.task.flags, name) for name in self.task.schedule}
        return kept | {"images": self.task.data.size, "schedule": schedule} | self.task.circumstances()

    def save(self) -> None:
        """Write a checkpoint: the main rank while the others wait; of a sharded model, all ranks in the background."""
        self.check_step()
        state, config = self.state, self.config
        numbers = state.numbers() | self.circumstances() | self.task.numbers()
        described = state.model.config, self.task.description()
        arguments = (config.directory, state.step, *described, numbers, self.tensors(), config.keep)
        arguments += (state.best_step,) if config.best else ()
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

    def _resume(self) -> list[str]:
        """Take up the newest undamaged checkpoint of the run, if there is one; returns what is to be told about it."""
        checkpoint, notes = agreed_checkpoint(self.config.directory, self.ranks)
        if checkpoint is None:
            return notes
        self.task.check_resumable(checkpoint)
        numbers = read_numbers(checkpoint)
        notes += changes(numbers, self.circumstances(), self.task.drawn_by_rank)
        anew = restore_(self.tensors(), checkpoint, (AVERAGED, *self.task.may_start_anew))
        self.state.start_anew_(anew)
        notes += [f"{checkpoint.name} has no {section}, which starts anew" for section in sorted(anew)]
        self.state.set_numbers(numbers)
        notes += take_up_best_(self.state, self.config.best, self.config.directory, self.ranks)
        self.task.set_numbers(numbers)
        self.saved_step = self.state.step
        return notes

    def _write_config(self) -> None:
        self.config.directory.mkdir(parents=True, exist_ok=True)
        resolved = {
            "training": asdict(self.task.flags),
            "model": asdict(self.state.model.config),
            "ranks": self.ranks.world,
            "torch": torch.__version__,
        }
        replace_text(self.config.directory / "config.json", json.dumps(resolved, indent=1) + "\n")
