"""Train the multi-scale VQVAE on a folder of images, with reconstruction, VQ, perceptual and adversarial losses.

Codes that no vector of the last steps chose are moved onto vectors that look for one, or small data sets would use a fraction
of the codebook. The same command resumes a run that was killed.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist import Ranks, process_group, replicated
from models.discriminator import DiscriminatorConfig, PatchDiscriminator
from models.quantizer import QuantizerTraining
from models.storage import Description, read_config
from models.tokenizer import TOKENIZER_PRESETS, VQVAE
from trainer import Trainer
from utils import cli
from utils.cli import flag, required
from utils.data.images import check_resize
from utils.data.sources import FolderData
from utils.losses.adversarial import discriminator_loss, generator_loss, ramp
from utils.losses.perceptual import PerceptualLoss
from utils.metrics.codes import CodeCounts
from utils.metrics.similarity import psnr_of_error
from utils.runs.plan import learning_rate_factor
from utils.runs.state import MODEL, Part, TrainState, optimizer_section
from utils.runs.task import Evaluation, RunConfig, StepResult, Task, autocast, step_seed
from utils.signals import StopRequest

GRAD_CLIP = 1.0
CRITIC = "discriminator"  # the part
CRITIC_CLIP = 10.0


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
    perceptual: float = flag(0.0, "weight of the distance in features of SqueezeNet, 0: none")
    perceptual_logits: float = flag(0.0, "weight, within it, of the distance of SqueezeNet's logits; 0.01 makes both alike")
    gan: float = flag(0.01, "weight of the adversarial loss, 0: no discriminator")
    gan_from: float = flag(0.05, "share of the run after which the discriminator begins to learn")
    gan_ramp: float = flag(0.05, "share of the run over which the adversarial loss then comes in")
    gan_lr: float = flag(1e-3, "learning rate of the discriminator, constant")
    gan_width: int = flag(64, "channels of its first layer")
    restart_every: int = flag(20, "steps between restarts of unused codes, in the first half of the run; 0: never")
    scale_dropout: float = flag(0.0, "share of the images of which only a random number of first scales is decoded")
    perturbation: float = flag(0.0, "share of the codes that are swapped for near neighbours before they are decoded")
    matching: float = flag(0.0, "weight, within --vq, of how far the codes' distribution is from that of what looks for one")
    resize: float = flag(1.125, "images are resized to this times their final size, then cropped", "--mid_reso")
    hflip: bool = flag(False, "mirror half of the training images")
    workers: int = flag(0, "processes that load images, per rank")
    ema: float = flag(0.0, "decay of the averaged weights, ramped up at the start; 0: no average")
    fp16: int = flag(0, "0: float32, 1: float16 with loss scaling, 2: bfloat16", "--precision", choices=(0, 1, 2))
    max_bad_steps: int = flag(20, "fp16: end the run after so many steps in a row whose gradient is not finite")
    seed: int = flag(0, "of data order, initial weights and restarts")
    log_every: int = flag(20, "steps between log lines")
    val_every: int = flag(0, "steps between validations, 0: as --save_every")
    save_every: int = flag(1000, "steps between checkpoints")
    keep: int = flag(2, "checkpoints to keep")

    def __post_init__(self):
        for name in ("bs", "max_steps", "log_every", "save_every", "keep", "max_bad_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give a number above 0")
        for name in ("val_every", "workers", "max_minutes", "restart_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give 0 or more")
        for name in ("ema", "gan_from", "gan_ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name}={getattr(self, name)}: give a share from 0 to 1")
        for name in ("l1", "l2", "vq", "perceptual", "perceptual_logits", "gan", "gan_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give 0 or more")
        DiscriminatorConfig(self.gan_width)
        check_resize(self.resize)
        self.against_collapse()

    def against_collapse(self) -> QuantizerTraining:
        """The means that the flags ask for. ValueError for impossible values."""
        return QuantizerTraining(scale_dropout=self.scale_dropout, perturbation=self.perturbation, matching=self.matching)


class ImageReconstruction(Task):
    """Images are encoded, quantized and decoded; what comes out is to be what went in (VAR, arXiv 2404.02905, section 3.2)."""

    drawn_by_rank = "restarted codes"
    may_start_anew = (CRITIC, optimizer_section(CRITIC))  # a run without one may go on with one

    def __init__(self, config: TokenizerTraining, ranks: Ranks):
        self.flags = self.config = config
        self.ranks = ranks
        if config.bs % ranks.world:
            raise ValueError(f"--bs={config.bs} does not divide by {ranks.world} ranks: give a multiple")
        model = TOKENIZER_PRESETS[config.preset]
        pixels = model.image_shape[0]
        self.data = FolderData(config.data_path, pixels, config.resize, config.hflip, config.seed, config.workers)
        torch.manual_seed(config.seed)
        self.tokenizer = VQVAE(model)
        self.tokenizer.init_weights()
        self.tokenizer.to(ranks.device)
        self.title, self.details = f"tokenizer {config.preset}", f"pyramid {self.tokenizer.pyramid}"
        self.spread = self.tokenizer if ranks.world == 1 else replicated(self.tokenizer)
        optimizer = torch.optim.AdamW(self.tokenizer.parameters(), lr=config.lr, betas=(0.5, 0.9), weight_decay=0.0)
        self.parts = {MODEL: Part(self.tokenizer, optimizer, GRAD_CLIP)}
        self.perceptual = PerceptualLoss(config.perceptual_logits).to(ranks.device) if config.perceptual else None
        if config.gan:
            self._add_discriminator()
        self.hits = torch.zeros(model.num_codes, device=ranks.device)  # of each code since the last restart

    def _add_discriminator(self) -> None:
        config = self.config
        self.discriminator = PatchDiscriminator(DiscriminatorConfig(config.gan_width))
        self.discriminator.init_weights()
        self.discriminator.to(self.ranks.device)
        self.spread_discriminator = self.discriminator if self.ranks.world == 1 else replicated(self.discriminator)
        optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=config.gan_lr, betas=(0.5, 0.9), weight_decay=0.0)
        self.parts[CRITIC] = Part(self.discriminator, optimizer, CRITIC_CLIP)

    # --- one step -------------------------------------------------------------------------------------------------------

    def step(self, state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], progress: float) -> StepResult:
        """One batch: the weighted sum of absolute error, squared error and VQ loss."""
        config = self.config
        # what this step does
        rate = config.lr * learning_rate_factor("cos", progress, warmup=0.02, start=0.05, end=0.01)
        for group in self.parts[MODEL].optimizer.param_groups:
            group["lr"] = rate
        # images -> codes -> images
        images = next(batches)[0].to(self.ranks.device, non_blocking=True)
        if config.restart_every and state.step % config.restart_every == 0 and progress <= 0.5:
            self._restart_codes(images, state.step)
        generator = torch.Generator().manual_seed(step_seed(config.seed, state.step, self.ranks.rank))
        with autocast(self.ranks.device, config.fp16):
            result = self.spread(images, config.against_collapse(), generator)
        decoded = result.images.float()
        # -> losses -> gradients
        loss = config.l1 * F.l1_loss(decoded, images) + config.l2 * F.mse_loss(decoded, images) + config.vq * result.vq_loss
        figures = {"loss": loss.detach(), "vq_loss": result.vq_loss.detach()}
        if self.perceptual is not None:
            with autocast(self.ranks.device, config.fp16):
                distance = self.perceptual(decoded, images)
            loss = loss + config.perceptual * distance
            figures["perceptual"] = distance.detach()
        if config.gan and progress >= config.gan_from:
            judged = self._judge(state, images, decoded, figures)
            loss = loss + config.gan * ramp(progress, config.gan_from, config.gan_ramp) * judged
        state.scaler.scale(loss).backward()
        self.hits += torch.cat(result.indices, dim=1).flatten().bincount(minlength=len(self.hits))
        error = F.mse_loss(decoded.detach().clamp(-1, 1), images)
        figures["psnr"] = psnr_of_error(error, peak=2)
        return StepResult(torch.stack(list(figures.values())).sum(), (figures, result.indices), {"learning_rate": rate})

    def _judge(self, state: TrainState, images: Tensor, decoded: Tensor, figures: dict[str, Tensor]) -> Tensor:
        """The decoder's adversarial loss, (); leaves the gradients of the discriminator's own loss in it."""
        with autocast(self.ranks.device, self.config.fp16):
            # real and made in one batch, as they are to be told apart
            real, made = self.spread_discriminator(torch.cat([images, decoded.detach()])).float().chunk(2)
        own = discriminator_loss(real, made)
        state.scaler.scale(own).backward()
        with frozen(self.discriminator), autocast(self.ranks.device, self.config.fp16):
            adversarial = generator_loss(self.discriminator(decoded).float())
        figures |= {"gan_loss": adversarial.detach(), "discriminator_loss": own.detach()}
        figures |= {"judged_real": real.detach().mean(), "judged_made": made.detach().mean()}
        return adversarial

    # Differs from VAR: its tokenizer training is not public; restarts are one of the known means against unused codes.
    def _restart_codes(self, images: Tensor, step: int) -> None:
        """Move the codes that were not chosen since the last time; at the first step these are all codes."""
        unused = self.ranks.sum(self.hits) == 0
        generator = torch.Generator().manual_seed(self.config.seed + step)
        with torch.no_grad():
            self.tokenizer.quantizer.restart_codes_(unused, self.tokenizer.features(images), generator)
        # each rank drew from its own images: the main rank's count
        self.ranks.copy_from_main_(self.tokenizer.quantizer.codebook.weight.data)
        self.hits.zero_()

    def figures(self, result: StepResult) -> dict[str, float]:
        """Losses, and the use of the codebook in this step."""
        figures, indices = result.outcome
        counts = CodeCounts(self.tokenizer.pyramid, len(self.hits), self.ranks.device)
        counts.add(indices)
        means = {name: (self.ranks.sum(value) / self.ranks.world).item() for name, value in figures.items()}
        return means | counts.over(self.ranks.sum).figures()

    def explain(self, result: StepResult) -> str:
        losses = self.ranks.gather(result.loss)
        bad = torch.nonzero(~losses.isfinite()).flatten().tolist()
        rank = bad[0] if bad else int(losses.argmax())
        return f"loss or gradient is not finite (loss {losses[rank]:.4g} on rank {rank})"

    # --- evaluation -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, state: TrainState, stop: StopRequest | None = None) -> Evaluation | None:
        """Reconstruction error and use of the codebook on the held-out images."""
        tokenizer, ranks = self.tokenizer.eval(), self.ranks
        counts = CodeCounts(tokenizer.pyramid, tokenizer.config.num_codes, ranks.device)
        totals = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # squared error, images
        batches = self.data.val_batches(self.config.bs // ranks.world, ranks.rank, ranks.world)
        for images, _ in batches:
            if stop is not None and stop.number:
                break
            images = images.to(ranks.device)
            indices = tokenizer.encode(images)
            errors = (tokenizer.decode(indices) - images).square().mean(dim=(1, 2, 3))
            totals[0] += errors.double().sum()
            totals[1] += len(images)
            counts.add(indices)
        tokenizer.train()
        if ranks.largest(stop.number if stop is not None else 0):
            return None
        squared_error, count = ranks.sum(totals)
        counts = counts.over(ranks.sum)
        usage = counts.of_all()
        figures = {"val_psnr": psnr_of_error(squared_error / count, peak=2).item()}
        figures |= {"codes_used": usage.used, "perplexity": usage.perplexity}
        return Evaluation(figures | counts.figures("val_"))

    # --- saved with it --------------------------------------------------------------------------------------------------

    def description(self) -> Description:
        return Description("tokenizer", self.data.class_names, None, asdict(self.config))

    def check_resumable(self, checkpoint: Path) -> None:
        if read_config(checkpoint, VQVAE) != self.tokenizer.config:
            raise ValueError(
                f"{checkpoint}: a tokenizer of other sizes is there: resume with its --preset, or use another --out"
            )

    def numbers(self) -> dict:
        return {"hits": self.ranks.sum(self.hits).tolist()}

    def set_numbers(self, numbers: dict) -> None:
        if self.ranks.is_main:  # the sum over all ranks; the others go on from zero
            self.hits.copy_(torch.tensor(numbers["hits"]))


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, gradients pass through the model and not into it."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


# --- the command --------------------------------------------------------------------------------------------------------


def run_config(config: TokenizerTraining) -> RunConfig:
    """What the loop is told."""
    return RunConfig(
        directory=Path(config.out),
        seed=config.seed,
        batch=config.bs,
        micro_batches=1,
        total_steps=config.max_steps,
        schedule_steps=config.max_steps,
        max_minutes=config.max_minutes,
        val_every=config.val_every or config.save_every,
        save_every=config.save_every,
        log_every=config.log_every,
        keep=config.keep,
        ema=config.ema,
        fp16=config.fp16,
        max_bad_steps=config.max_bad_steps,
        sharded=False,
        rate_flag="--lr",
    )


def main() -> None:
    config = cli.parse(TokenizerTraining, __doc__)
    with process_group() as ranks:
        Trainer(ImageReconstruction(config, ranks), run_config(config), ranks).fit()


if __name__ == "__main__":
    cli.run(main)
