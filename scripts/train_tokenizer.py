"""Train the multi-scale VQVAE on a folder of images, with reconstruction, VQ, perceptual and adversarial losses.

Codes that no vector of the last steps chose are moved onto vectors that look for one, or small data sets would use a fraction
of the codebook. With --refine the decoder alone learns, and tokens stay what they are. The same command resumes a run that was
killed.
"""

import functools
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dist import Ranks, process_group, replicated
from models.storage import WEIGHTS, Description, read_config, read_description, read_model, weights_hash
from models.tokenizer import TOKEN_PARTS, VQVAE
from trainer import Trainer
from utils import cli, plots
from utils.checkpoint import load_fitting_tokenizer
from utils.data.sources import FolderData
from utils.data.token_cache import check_classes, fingerprint, short
from utils.files import check_folder
from utils.losses.adversarial import adaptive_weight, ramp
from utils.losses.backbones import DinoMaps, EfficientNetMaps
from utils.losses.critic import Balance, Critic, CriticConfig
from utils.losses.perceptual import PerceptualLoss, lpips_loss
from utils.metrics.codes import CodeCounts
from utils.metrics.features import EfficientNetLite0
from utils.metrics.fidelity import Fidelity
from utils.metrics.similarity import WINDOW, psnr_of_error, ssim
from utils.runs.listing import RECORD, images_of
from utils.runs.plan import learning_rate_factor
from utils.runs.state import MODEL, Part, TrainState, optimizer_section
from utils.runs.task import Evaluation, RunConfig, StepResult, Task, autocast, step_seed
from utils.runs.tokenizer_config import TokenizerTraining, recipe
from utils.signals import StopRequest

CRITIC = "discriminator"  # the part
CRITIC_CLIP = 10.0
SHOWN_IMAGES = 8
BIASED = "FD-EffLite0 of this tokenizer flatters it: its discriminator looked at images through the same network"


class ImageReconstruction(Task):
    """Images are encoded, quantized and decoded; what comes out is to be what went in (VAR, arXiv 2404.02905, section 3.2)."""

    drawn_by_rank = "restarted codes"
    schedule = ("max_steps", "max_minutes", "lr", "lr_end", "weight_decay", "clip", "ema", "fp16", "restart_every")
    schedule += ("l1", "l2", "vq", "perceptual", "perceptual_logits", "lpips", "scale_dropout", "perturbation", "matching")
    schedule += ("gan", "gan_adaptive", "gan_least", "gan_most", "gan_from", "gan_ramp", "gan_lr", "diffaug", "lecam")
    higher_is_better = ("val_psnr", "val_ssim")
    may_start_anew = (CRITIC, optimizer_section(CRITIC))  # a run without one may go on with one

    def __init__(self, config: TokenizerTraining, ranks: Ranks):
        self.flags = self.config = config
        self.ranks = ranks
        if config.bs % ranks.world:
            raise ValueError(f"--bs={config.bs} does not divide by {ranks.world} ranks: give a multiple")
        self.tokenizer = first_tokenizer(config).to(ranks.device)
        *self.images, self.told = images_of(config, ranks, Path(config.out) / RECORD)  # to train on, held out
        self.data = self._build_data()
        start = config.refine or config.init_from  # whose sizes count
        self.title = f"tokenizer from {start}" if start else f"tokenizer {config.preset}"
        self.details = f"pyramid {self.tokenizer.pyramid}"
        self.spread = self.tokenizer if ranks.world == 1 else replicated(self.tokenizer)
        trained = [parameter for parameter in self.tokenizer.parameters() if parameter.requires_grad]
        settings = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "weight_decay": config.weight_decay}
        optimizer = torch.optim.AdamW(trained, **settings, fused=True)
        self.parts = {MODEL: Part(self.tokenizer, optimizer, config.clip)}
        self.perceptual = build_perceptual(config, ranks.device)
        if config.gan and not config.gan_features:
            config.discriminator().check_side(min(self.tokenizer.config.image_shape))
        self.critic = Critic(critic_config(config, ranks.device), ranks) if config.gan else None
        if self.critic is not None:
            self.parts[CRITIC] = Part(self.critic.model, self.critic.optimizer, CRITIC_CLIP)
        self.balance = Balance()
        self.hits = torch.zeros(self.tokenizer.config.num_codes, device=ranks.device)  # of each code since the last restart

    def _build_data(self) -> FolderData:
        config, (height, width) = self.config, self.tokenizer.config.image_shape
        if height != width:
            raise ValueError(f"the tokenizer is for images of {width}x{height} px, and training cuts squares: give another")
        how = height, config.resize, config.hflip, config.seed, config.workers, config.background
        return FolderData(*self.images, *how)

    # --- one step -------------------------------------------------------------------------------------------------------

    def step(self, state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], progress: float) -> StepResult:
        """One batch; the gradients of all losses meet in the decoded images and go back from there together."""
        config, ranks = self.config, self.ranks
        # what this step does
        rate = config.lr * learning_rate_factor("cos", progress, warmup=0.02, start=0.05, end=config.lr_end)
        for group in self.parts[MODEL].optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(step_seed(config.seed, state.step, ranks.rank))
        # images -> codes -> images
        images = next(batches)[0].to(ranks.device, non_blocking=True)
        if config.restart_every and state.step % config.restart_every == 0 and progress <= 0.5:
            self._restart_codes(images, state.step)
        with autocast(ranks.device, config.fp16):
            result = self.spread(images, config.against_collapse(), generator)
        # -> losses
        decoded = result.images.detach().float().requires_grad_()
        loss, figures = self._fidelity_losses(decoded, images)
        # -> gradients in the decoded images
        (gradient,) = torch.autograd.grad(state.scaler.scale(loss), decoded)
        if self.critic is not None and progress >= config.gan_from:
            pull, more = self._adversarial_gradient(state, images, decoded, generator, gradient)
            gradient = gradient + ramp(progress, config.gan_from, config.gan_ramp) * pull
            figures |= more
        # -> gradients
        roots = {result.images: gradient.to(result.images.dtype)}
        if result.vq_loss.requires_grad:
            roots[result.vq_loss] = state.scaler.scale(torch.full_like(result.vq_loss, config.vq))
        torch.autograd.backward(list(roots), list(roots.values()))
        # what is told of it
        self.hits += torch.cat(result.indices, dim=1).flatten().bincount(minlength=len(self.hits))
        figures |= {"loss": (loss + config.vq * result.vq_loss).detach(), "vq_loss": result.vq_loss.detach()}
        figures["psnr"] = psnr_of_pixels(decoded.detach(), images).mean()
        return StepResult(torch.stack(list(figures.values())).sum(), (figures, result.indices), {"learning_rate": rate})

    def _fidelity_losses(self, decoded: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """How far decoded images are from what they were, (): pixels and features; and figures of it."""
        config = self.config
        loss, figures = config.l1 * F.l1_loss(decoded, images) + config.l2 * F.mse_loss(decoded, images), {}
        for name, (weight, distance_of) in self.perceptual.items():
            with autocast(self.ranks.device, config.fp16):
                distance = distance_of(decoded, images)
            loss = loss + weight * distance
            figures[name] = distance.detach()
        return loss, figures

    def _adversarial_gradient(
        self, state: TrainState, images: Tensor, decoded: Tensor, generator: torch.Generator, others: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted gradient of the adversarial loss in the decoded images; leaves the discriminator's own in it.

        others: the gradient of all other losses there.
        """
        config, ranks, scaler = self.config, self.ranks, state.scaler
        with autocast(ranks.device, config.fp16):
            figures = self.critic.learn(images, decoded, generator, scaler)
            adversarial = self.critic.judge(decoded, generator)
        (pull,) = torch.autograd.grad(scaler.scale(adversarial), decoded)
        squares = torch.stack([others.square().sum(), pull.square().sum()])
        weight = torch.full_like(adversarial, config.gan).detach()
        if config.gan_adaptive:
            squares = ranks.sum(squares)  # the same weight on all ranks
            weight *= adaptive_weight(*squares, config.gan_least, config.gan_most)
        share = weight * (squares[1] / squares[0].clamp_min(1e-30)).sqrt()
        figures |= {"gan_loss": adversarial.detach(), "gan_weight": weight, "gan_share": share}
        return weight * pull, figures

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

    def remarks(self, step: int, figures: dict) -> list[str]:
        return self.balance.remarks(step, figures)

    def explain(self, result: StepResult) -> str:
        losses = self.ranks.gather(result.loss)
        bad = torch.nonzero(~losses.isfinite()).flatten().tolist()
        rank = bad[0] if bad else int(losses.argmax())
        return f"loss or gradient is not finite (loss {losses[rank]:.4g} on rank {rank})"

    # --- evaluation -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, state: TrainState, stop: StopRequest | None = None) -> Evaluation | None:
        """How near reconstructions of the held-out images are, use of the codebook, and with --val_fd their distance."""
        tokenizer = self.tokenizer.eval()
        with state.averaged_weights():
            figures = self._likeness(tokenizer, stop)
            if figures is not None and self.fidelity is not None:
                distance = self.fidelity.of_reconstructions(tokenizer)
                figures |= {"val_fd": distance, "val_fd_real": self.fidelity.real}
            pictures = {"reconstructions": self._draw(tokenizer)} if self.ranks.is_main else None
        tokenizer.train()
        return None if figures is None else Evaluation(figures, pictures=pictures)

    def _likeness(self, tokenizer: VQVAE, stop: StopRequest | None) -> dict[str, float | dict[str, float]] | None:
        """PSNR, SSIM and perceptual distance over all held-out images, and codes; None where a stop was requested."""
        ranks, with_ssim = self.ranks, min(tokenizer.config.image_shape) >= WINDOW
        counts = CodeCounts(tokenizer.pyramid, tokenizer.config.num_codes, ranks.device)
        totals = torch.zeros(4, dtype=torch.float64, device=ranks.device)  # images, PSNR, SSIM, perceptual distance
        for images, _ in self.data.val_batches(self.config.bs // ranks.world, ranks.rank, ranks.world):
            if stop is not None and stop.number:
                break
            images = images.to(ranks.device)
            indices = tokenizer.encode(images)
            decoded = tokenizer.decode(indices)
            counts.add(indices)
            totals[0] += len(images)
            totals[1] += psnr_of_pixels(decoded, images).double().sum()
            if with_ssim:
                totals[2] += ssim(*(plots.to_bytes((batch + 1) / 2) for batch in (decoded, images))).sum()
            totals[3] += self.distance(decoded, images) * len(images)
        if ranks.largest(stop.number if stop is not None else 0):
            return None
        count, ratio, similarity, distance = ranks.sum(totals).tolist()
        counts = counts.over(ranks.sum)
        usage = counts.of_all()
        figures = {"val_psnr": ratio / count}
        figures |= {"val_ssim": similarity / count} if with_ssim else {}
        figures |= {"val_perceptual": distance / count, "codes_used": usage.used, "perplexity": usage.perplexity}
        return figures | counts.figures("val_")

    @functools.cached_property
    def distance(self) -> nn.Module:
        """SqueezeNet's, of its features alone: a score only where it is not a loss."""
        return PerceptualLoss().to(self.ranks.device)

    @functools.cached_property
    def fidelity(self) -> Fidelity | None:
        """For --val_fd; all ranks ask for it together."""
        config = self.config
        if not config.val_fd:
            return None
        how = self.data.pixels, config.resize, config.workers, self.ranks, config.background
        return Fidelity(*self.images, config.val_fd, *how)

    def _draw(self, tokenizer: VQVAE) -> Image.Image:
        """A few held-out images below what is decoded from the first scale, from two, and so on to all."""
        every = max(self.data.val_size // SHOWN_IMAGES, 1)  # so that all classes are among them
        images = next(self.data.val_batches(SHOWN_IMAGES, 0, every))[0].to(self.ranks.device)
        steps = tokenizer.decode_progressive(tokenizer.encode(images))
        names = ["x".join(map(str, shape)) for shape in tokenizer.pyramid.shapes]
        rows = {f"up to {name}": step for name, step in zip(names, steps, strict=True)} | {"original": images}
        return plots.grid([plots.to_uint8((row + 1) / 2) for row in rows.values()], list(rows))

    # --- saved with it --------------------------------------------------------------------------------------------------

    def description(self) -> Description:
        return Description("tokenizer", self.data.class_names, None, asdict(self.config))

    def notes(self) -> list[str]:
        lines = [*self.told, *([BIASED] if self.config.gan_features == "efflite0" else [])]
        if self.config.refine:
            lines.append(f"refining the decoder of {self.config.refine}: all of its tokens stay what they are")
        return lines

    def check_resumable(self, checkpoint: Path) -> None:
        if read_config(checkpoint, VQVAE) != self.tokenizer.config:
            raise ValueError(
                f"{checkpoint}: a tokenizer of other sizes is there: resume with its --preset, or use another --out"
            )
        theirs = read_description(checkpoint).class_names
        check_classes(theirs, self.data.class_names, f"{checkpoint}: its data", f"--data_path={self.config.data_path}")
        check_same_start(checkpoint, self.config, self.tokenizer)

    def numbers(self) -> dict:
        anchors = {"anchors": self.critic.anchors.tolist()} if self.critic is not None else {}
        return {"hits": self.ranks.sum(self.hits).tolist()} | anchors

    def set_numbers(self, numbers: dict) -> None:
        if self.ranks.is_main:  # the sum over all ranks; the others go on from zero
            self.hits.copy_(torch.tensor(numbers["hits"]))
        if self.critic is not None and "anchors" in numbers:
            self.critic.anchors.copy_(torch.tensor(numbers["anchors"]))


def psnr_of_pixels(decoded: Tensor, images: Tensor) -> Tensor:
    """PSNR (B,) in dB of two batches (B, 3, H, W); images in [-1, 1], and what is beyond them in decoded ones is cut off.

    Its mean is over images, as in utils/metrics/reconstruction.py: that of the mean error is lower. Equal ones count as there.
    """
    errors = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    return psnr_of_error(errors.clamp_min((2 / 255) ** 2 / images[0].numel()), peak=2)


# --- what a run begins with ---------------------------------------------------------------------------------------------


def first_tokenizer(config: TokenizerTraining) -> VQVAE:
    """A new one, or the one to go on from; with --refine nothing but its decoder is trained."""
    torch.manual_seed(config.seed)
    source = config.refine or config.init_from
    if not source:
        tokenizer = VQVAE(config.sizes())
        tokenizer.init_weights()
        return tokenizer
    tokenizer = load_fitting_tokenizer(source, config.pn).train()
    if config.refine:
        for name in TOKEN_PARTS:
            getattr(tokenizer, name).requires_grad_(False)
    return tokenizer


def check_same_start(checkpoint: Path, config: TokenizerTraining, tokenizer: VQVAE) -> None:
    """ValueError where the run that wrote a checkpoint began with another tokenizer, or trains other parts of it.

    tokenizer: what the command begins with. The same one may lie elsewhere by now; one that a run with --init_from began with
    may be gone, and the flag with it, as the run has weights of its own.
    """
    flags = read_description(checkpoint).training
    before, now = ({name: of.get(name, "") for name in ("refine", "init_from")} for of in (flags, vars(config)))
    if before["refine"] and now["refine"]:
        theirs, ours = fingerprint(read_model(VQVAE, checkpoint / WEIGHTS)), fingerprint(tokenizer)
        if theirs != ours:
            raise ValueError(
                f"{checkpoint}: the run has --refine={before['refine']}, a tokenizer with hash {short(theirs)}, not "
                f"{now['refine']} with {short(ours)}: resume with that, or another --out"
            )
        return
    for name, source in before.items():
        if source != now[name] and not (name == "init_from" and _may_replace(source, now[name], config, tokenizer)):
            differs = f"--{name}={source}, not {now[name] or 'none'}" if source else f"no --{name}, not {now[name]}"
            raise ValueError(
                f"{checkpoint}: the run has {differs}: resume {'with that' if source else 'without'}, or another --out"
            )


def _may_replace(before: str, now: str, config: TokenizerTraining, tokenizer: VQVAE) -> bool:
    """Whether --init_from may be `now` where it was `before`: of the same weights, or left out as those are gone."""
    if not before:
        return False
    try:
        start = load_fitting_tokenizer(before, config.pn)
    except (ValueError, OSError):
        return not now
    return bool(now) and weights_hash(start) == weights_hash(tokenizer)


def build_perceptual(config: TokenizerTraining, device: torch.device) -> dict[str, tuple[float, nn.Module]]:
    """Perceptual losses that the flags ask for: name in the log -> weight and loss."""
    losses = {}
    if config.perceptual:
        losses["perceptual"] = config.perceptual, PerceptualLoss(config.perceptual_logits).to(device)
    if config.lpips:
        losses["lpips"] = config.lpips, lpips_loss(Path(config.lpips_weights), config.lpips_sha256).to(device)
    return losses


def critic_config(config: TokenizerTraining, device: torch.device) -> CriticConfig:
    """What the flags say of the discriminator. ValueError and FileNotFoundError for another file than that of --gan_sha256."""
    features = None
    if config.gan_features == "dino":
        features = DinoMaps(Path(config.gan_weights), config.gan_sha256).to(device)
    elif config.gan_features == "efflite0":
        features = EfficientNetMaps(EfficientNetLite0(EfficientNetLite0.published_file(), device).network)
    return CriticConfig(config.discriminator(), features, config.gan_lr, config.lecam, config.diffaug)


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
        best=config.best,
    )


def main() -> None:
    config = cli.parse(TokenizerTraining, __doc__, defaults=recipe)
    check_folder(config.out, "--out")
    with process_group() as ranks:
        Trainer(ImageReconstruction(config, ranks), run_config(config), ranks).fit()


if __name__ == "__main__":
    cli.run(main)
