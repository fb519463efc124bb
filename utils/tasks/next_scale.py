"""Next-scale prediction as a task: mean cross-entropy over all tokens (VAR, arXiv 2404.02905, section 3.1)."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dist import Ranks, gradient_exchange, replicated, shard_, whole_outside_forward
from models.adapters import Base, own_tensors
from models.generate import generate
from models.precision import tokenizer_in, told_of_tokens
from models.scan_backends import choose_scan_
from models.storage import Description, read_description
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer, recompute_blocks_
from utils import plots
from utils.data.sources import Data
from utils.data.token_cache import check_classes, fingerprint, is_of, short
from utils.metrics.fidelity import Fidelity
from utils.runs.config import TrainConfig
from utils.runs.flops import peak_flops, training_flops
from utils.runs.optim import build_adamw, set_rates_
from utils.runs.plan import StepPlan, step_plan
from utils.runs.resume import check_same_parts, check_same_transformer
from utils.runs.saving import read_numbers
from utils.runs.state import MODEL, Part, TrainState
from utils.runs.tally import Tally
from utils.runs.task import (
    ALL_RANKS,
    AUTOCAST_DTYPES,
    PRECISION_NAMES,
    Evaluation,
    StepResult,
    Task,
    autocast,
    step_seed,
)
from utils.signals import StopRequest

SHOWN_IMAGES = 8  # of the held-out ones, reconstructed at each validation


def losses_and_predictions(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and likeliest code of every token: logits (B, L, V) float32, targets (B, L) -> (B, L) each."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing)
    return losses.view_as(targets), logits.detach().argmax(dim=-1)


class NextScalePrediction(Task):
    """Every token of a pyramid is predicted from the scales before it (VAR, arXiv 2404.02905, section 3.1)."""

    drawn_by_rank = "drop-path"
    schedule = ("ep", "max_steps", "max_minutes", "tblr", "sche", "wp", "wp0", "wpe", "twd", "twde", "tclip", "ls")
    schedule += ("pg", "pg0", "pgwp", "scale_groups", "drop_path", "ema", "fp16")

    def __init__(
        self,
        config: TrainConfig,
        transformer: ScaleTransformer,
        tokenizer: VQVAE,
        data: Data,
        ranks: Ranks,
        fidelity: Fidelity | None = None,
        told: Sequence[str] = (),
        base: Base | None = None,
    ):
        """told: what a reader of the log should know of the images, and of where the weights of a new run are from.

        base: what the transformer's adapters, where it has any, are beside.
        """
        self.flags = self.config = config
        self.data, self.ranks, self.fidelity, self.told = data, ranks, fidelity, told
        self.title, self.details = f"{config.family} depth {config.depth}", f"pyramid {transformer.pyramid}"
        self.tokenizer = tokenizer.to(ranks.device).eval().requires_grad_(False)
        self.tokenizer_hash = fingerprint(self.tokenizer)
        # the same one, but for the precision of what it computes beside the training
        self.coder = tokenizer_in(self.tokenizer, config.vae_precision, PRECISION_NAMES[config.fp16])
        self.transformer, self.pyramid = transformer, transformer.pyramid
        self.rank_batch = config.rank_batch(ranks.world)
        self.scan_choice = choose_scan_(transformer, config.scan_backend, ranks.device)
        self.losses_and_predictions, self.teacher_inputs = losses_and_predictions, self.tokenizer.teacher_inputs
        if config.tfast:
            self._compile_()
        self.spread = self._spread(transformer.to(ranks.device).train())
        self.base = base
        saved = None if base is None else own_tensors(transformer, base)
        self.parts = {MODEL: Part(transformer, build_adamw(transformer), config.tclip or math.inf, saved)}
        peak = config.peak_tflops * 1e12 or peak_flops(torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu")
        # the share of the peak that one image a second takes
        self.mfu_of_image = training_flops(transformer.config) / (peak * ranks.world) if peak else None

    def _spread(self, transformer: ScaleTransformer) -> nn.Module:
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

    def _compile_(self) -> None:
        """Blocks of a kind share one graph; so do all steps, but for a graph of each stage where only some scales are trained.

        The loss is compiled for its memory too: it then keeps the logits for the backward pass, and nothing else of their size.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * self.pyramid.num_scales)
        for block in self.transformer.blocks:
            block.compile(mode={1: "reduce-overhead", 2: "max-autotune", 3: "default"}[self.config.tfast])
        self.losses_and_predictions = torch.compile(losses_and_predictions)
        self.teacher_inputs = torch.compile(self.tokenizer.teacher_inputs)

    # --- one step -------------------------------------------------------------------------------------------------------

    def step(self, state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], progress: float) -> StepResult:
        """Take `ac` micro-batches, a pass for each group of scales, and leave the gradients of the mean loss."""
        config = self.config
        plan = self._begin(state, progress)
        weights = plan.token_weights(self.pyramid, self.ranks.device)
        tally = self._new_tally()
        for micro_batch in range(config.ac):
            # images or cached tokens, and labels -> targets and inputs of the trained scales
            batch, labels = next(batches)
            labels = self._to_device(self._drop_classes(labels, state.step, micro_batch))
            targets, inputs = self._targets_and_inputs(batch, plan.num_scales)
            for scales in plan.groups:
                is_last = micro_batch == config.ac - 1 and scales == plan.groups[-1]
                with gradient_exchange(self.spread, now=is_last):
                    # -> the loss of every token -> their mean, over all tokens of the pyramid -> gradients
                    losses, predictions = self._token_losses(self.spread, targets, inputs, labels, scales, config.ls)
                    tokens = self.pyramid.tokens(scales)
                    loss = (losses * weights[tokens]).sum(dim=1).mean() / self.pyramid.num_tokens
                    state.scaler.scale(loss / config.ac).backward()
                tally.add(scales, losses, predictions, targets[:, tokens], labels)
        rates = {"learning_rate": plan.learning_rate, "weight_decay": plan.weight_decay, "scales": plan.num_scales}
        return StepResult(tally.parts["losses"].sum(), tally, rates)

    def _begin(self, state: TrainState, progress: float) -> StepPlan:
        """What this step does; the optimizer is told its rates."""
        plan = step_plan(self.config, self.transformer.config, progress, state.step)
        set_rates_(self.parts[MODEL].optimizer, plan.learning_rate, plan.weight_decay)
        return plan

    def _targets_and_inputs(self, batch: Tensor, num_scales: int) -> tuple[Tensor, Tensor]:
        """Images or cached tokens -> tokens (B, L) and inputs (B, L - h_1 * w_1, code_dim) of the first so many scales."""
        indices = self._indices(batch)[:num_scales]
        return torch.cat(indices, dim=1), self.teacher_inputs(indices)

    def _token_losses(
        self, model: nn.Module, targets: Tensor, inputs: Tensor, labels: Tensor, scales: range, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and likeliest code of every token of consecutive scales, (B, L_of_scales) each.

        targets (B, L) and inputs (B, L - h_1 * w_1, code_dim) of all scales, labels (B,). One computation for training and
        validation.
        """
        with autocast(self.ranks.device, self.config.fp16):
            logits = model(labels, inputs[:, self.pyramid.inputs(scales)], scales.start)  # (B, L_of_scales, V)
        return self.losses_and_predictions(logits, targets[:, self.pyramid.tokens(scales)], label_smoothing)

    def _to_device(self, values: Tensor) -> Tensor:
        """A copy that the host does not wait for: to a GPU it would, from memory that is not pinned."""
        values = values.pin_memory() if self.ranks.device.type == "cuda" else values
        return values.to(self.ranks.device, non_blocking=True)

    def _indices(self, batch: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) or cached tokens (B, L) -> K index tensors (B, h_k * w_k)."""
        batch = self._to_device(batch)
        return self.coder.encode(batch) if batch.is_floating_point() else self.pyramid.split(batch.long())

    def _drop_classes(self, labels: Tensor, step: int, micro_batch: int) -> Tensor:
        """Labels (B,), some replaced by "no class". Drawn for the whole step, so that the number of ranks does not matter."""
        config, ranks = self.config, self.ranks
        generator = torch.Generator().manual_seed(step_seed(config.seed, step, ALL_RANKS))
        dropped = torch.rand(config.bs, generator=generator) < config.class_dropout
        first = (micro_batch * ranks.world + ranks.rank) * self.rank_batch
        return labels.masked_fill(dropped[first : first + len(labels)], self.transformer.unconditional)

    def _new_tally(self) -> Tally:
        model = self.transformer.config
        return Tally(self.pyramid, model.num_codes, model.num_classes, self.ranks.device)

    # --- what a step leaves ---------------------------------------------------------------------------------------------

    def figures(self, result: StepResult) -> dict[str, float | dict[str, float]]:
        tally = result.outcome
        tally.sums.copy_(self.ranks.sum(tally.sums))
        return tally.metrics()

    def explain(self, result: StepResult) -> str:
        """Asked of all ranks, told by each."""
        by_scale = result.outcome.metrics()["loss_by_scale"]
        names = list(by_scale)
        by_rank = self.ranks.gather(torch.tensor(list(by_scale.values())))  # (world, scales)
        where = torch.nonzero(~torch.isfinite(by_rank)).tolist()
        if where:
            rank, k = where[0]
            return f"the loss is {by_rank[rank, k]:.4g} at scale {names[k]} on rank {rank}"
        rank, k = divmod(int(by_rank.argmax()), len(names))
        return f"the gradient is not finite (largest loss {by_rank[rank, k]:.4g} at scale {names[k]} on rank {rank})"

    def utilisation(self, result: StepResult, images_per_second: float) -> float | None:
        """Of a pyramid that is trained in part, that part counts."""
        if not self.mfu_of_image:
            return None
        trained = result.outcome.parts["tokens"].count_nonzero().item() / self.pyramid.num_tokens
        return images_per_second * self.mfu_of_image * trained

    # --- evaluation -----------------------------------------------------------------------------------------------------

    def evaluate(self, state: TrainState, stop: StopRequest | None = None) -> Evaluation | None:
        """Losses and accuracies, samples, reconstructions, and with --val_fd the distance of samples."""
        tally = self.validate(stop)
        if tally is None:
            return None
        figures, pictures = tally.metrics("val_"), {}
        if self.fidelity is not None:
            with self._sampling(state) as transformer:
                distance = self.fidelity.of_samples(transformer, self.coder, stop)
            if distance is None:
                return None
            figures |= {"val_fd": distance, "val_fd_real": self.fidelity.real}
        if self.config.val_samples and (self.ranks.is_main or self.config.parallel == "fsdp"):  # which needs all ranks
            pictures["samples"] = self._draw_samples(state)
        if self.ranks.is_main:
            pictures["reconstructions"] = self._draw_reconstructions()
        return Evaluation(figures, tally.by_class(), pictures)

    @torch.no_grad()
    def validate(self, stop: StopRequest | None = None) -> Tally | None:
        """Losses and predictions on the held-out images, summed over all ranks; None where a stop was requested meanwhile."""
        # Differs from M-VAR: the forward pass is that of training, and class dropout is off.
        transformer, tally, nowhere = self.transformer.eval(), self._new_tally(), self._new_tally()
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

    @contextlib.contextmanager
    def _sampling(self, state: TrainState) -> Iterator[ScaleTransformer]:
        """The transformer as samples are drawn from it: its averaged weights, in the precision of training."""
        transformer = self.transformer.eval()
        # a graph of every scale would take longer to compile than it saves
        uncompiled = torch.compiler.set_stance("force_eager") if self.config.tfast else contextlib.nullcontext()
        precision = autocast(self.ranks.device, self.config.fp16)
        with uncompiled, state.averaged_weights(), whole_outside_forward(transformer), precision:
            yield transformer
        transformer.train()

    def _draw_samples(self, state: TrainState) -> Image.Image:
        """A sample of each of the first classes, from the same random numbers at every validation."""
        names = self.data.class_names[: self.config.val_samples]
        generator = torch.Generator(self.ranks.device).manual_seed(0)
        with self._sampling(state) as transformer:
            labels = torch.arange(len(names), device=self.ranks.device)
            images = generate(transformer, self.coder, labels, generator=generator).images
        return plots.grid(list(plots.to_uint8(images)[:, None]), plots.drawable(names))

    def _draw_reconstructions(self) -> Image.Image:
        """A few held-out images, where there are pixels, below what their tokens decode to."""
        every = max(self.data.val_size // SHOWN_IMAGES, 1)  # so that all classes are among them
        images, _ = next(self.data.val_batches(SHOWN_IMAGES, 0, every))
        rows = {"decoded": self.coder.decode(self._indices(images))}
        if images.is_floating_point():
            rows["original"] = images
        return plots.grid([plots.to_uint8((row + 1) / 2) for row in rows.values()], list(rows))

    # --- saved with it --------------------------------------------------------------------------------------------------

    def description(self) -> Description:
        known = self.data.class_names, self.config.vae, asdict(self.config), self.tokenizer_hash
        base = {} if self.base is None else {"base": self.base.source, "base_hash": self.base.hash}
        return Description("transformer", *known, **base)

    def circumstances(self) -> dict:
        return {"tokenizer": self.tokenizer_hash}

    def check_resumable(self, checkpoint: Path) -> None:
        check_same_transformer(checkpoint, self.transformer)
        theirs = read_numbers(checkpoint).get("tokenizer", self.tokenizer_hash)  # earlier code did not note it
        if not is_of(theirs, self.tokenizer):
            raise ValueError(
                f"{checkpoint}: trained on tokens of a tokenizer with hash {short(theirs)}, the one given has "
                f"{short(self.tokenizer_hash)}: give that one, or another --local_out_dir_path"
            )
        theirs, ours = read_description(checkpoint).base_hash, None if self.base is None else self.base.hash
        if theirs != ours:
            held = "the whole transformer" if theirs is None else "adapters of other weights" if ours else "adapters alone"
            raise ValueError(
                f"{checkpoint}: holds {held}: resume with the run's own --init_from and --lora, or another --local_out_dir_path"
            )
        check_same_parts(checkpoint, self.config)
        check_classes(read_description(checkpoint).class_names, self.data.class_names, checkpoint, "the data given")

    def notes(self) -> list[str]:
        fidelity, lines = self.fidelity, [*self.told, str(self.scan_choice)]
        if self.config.vae_precision != "float32" and not self.config.token_cache:
            images, _ = next(self.data.val_batches(SHOWN_IMAGES, 0, 1))
            lines.append(told_of_tokens(self.config.vae_precision, self.tokenizer, self.coder, self._to_device(images)))
        if fidelity is None:
            return lines
        real = f"FD-EffLite0 of {fidelity.count} training images from the held-out ones: {fidelity.real:.2f}"
        return [*lines, real]
