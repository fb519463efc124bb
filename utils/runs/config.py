"""What a training run is told: the flags of train.py with the released names, meanings and defaults, and what follows.

The recipes are those of the released trainers of VAR (arXiv 2404.02905) and M-VAR (arXiv 2411.10433).
"""

from dataclasses import dataclass
from typing import Literal

from models.families import FAMILIES, Family
from models.precision import PRECISIONS
from models.pyramid import Pyramid
from models.scan_backends import SCAN_BACKENDS
from models.ssm import SCANS
from models.tokenizer import TokenizerConfig
from models.transformer import TransformerConfig, family_config
from utils.cli import check_finite, check_idle, flag
from utils.data.batches import worker_count
from utils.data.hub_sets import DATA_PATH_HELP, IMAGE_COLUMN_HELP, LABEL_COLUMN_HELP
from utils.data.images import check_resize
from utils.data.layouts import VAL_SHARE_HELP, check_share
from utils.data.pictures import BACKGROUND_HELP, WHITE, background_colour
from utils.runs.listing import MAX_HELP, SKIP_HELP, check_max_bad
from utils.sampling.flags import read_sampling

SCHEDULES = ("lin0", "lin00", "lin", "cos", "exp")
OBJECTIVES = ("likelihood", "cca")
SCALE_GROUPS = ("together", "each", "drawn")
RELEASED_TOKENIZER = "vae_ch160v4096z32.pth"


@dataclass(frozen=True)
class TrainConfig:
    """Flags of train.py. Short names are released ones, with their meanings and defaults; the others are ours."""

    # Differs from VAR: averaged weights (--ema) are kept and used by sample.py; the released trainers keep none.

    # what is trained
    family: str = flag("mvar", "kind of transformer", choices=FAMILIES)
    depth: int = flag(16, "number of blocks; width is 64 * depth and heads are depth unless given")
    width: int = flag(0, "width in channels, 0: 64 * depth")
    heads: int = flag(0, "attention heads, 0: depth")
    global_blocks: int = flag(0, "so many first blocks attend over all scales (M-VAR, figure 5)")
    window_from: int = flag(0, "markov kinds: windows on scales of this side or more, 0: as published for the kind")
    window: int = flag(7, "markov kinds: side of the window, an odd number")
    attended_scales: int = flag(0, "blocks with a history: scales that their attention sees, its own included; 0: all")
    scan: str = flag(
        "across", "kinds with Mamba: over all scales, within each of them anew, or over all with each reversed", choices=SCANS
    )
    saln: bool = flag(False, "one modulation for all blocks plus an offset each", "--shared_modulation")
    anorm: bool = flag(True, "L2-normalised queries and keys", "--normalize_attention")
    pn: str = flag("", "pyramid: 256, 512, 1024 or sides such as 1_2_3_4; empty: the tokenizer's", "--pyramid")
    # data
    vae: str = flag("", f"tokenizer: file, directory or owner/name[:file]; empty: {RELEASED_TOKENIZER}, or the cache's")
    data_path: str = flag("imagenet", DATA_PATH_HELP)
    image_column: str = flag("", IMAGE_COLUMN_HELP)
    label_column: str = flag("", LABEL_COLUMN_HELP)
    val_share: float = flag(0.0, VAL_SHARE_HELP)
    skip_bad: bool = flag(False, SKIP_HELP)
    max_bad: float = flag(0.001, MAX_HELP)
    token_cache: str = flag("", "directory made by scripts/cache_tokens.py, to train from instead of --data_path")
    mid_reso: float = flag(1.125, "images are resized to this times their final size, then cropped", "--resize")
    hflip: bool = flag(False, "mirror half of the training images")
    vae_precision: str = flag(
        "float32",
        "of the tokenizer's encoder when training from images: others are faster and change tokens, how many is told",
        choices=PRECISIONS,
    )
    background: str = flag(WHITE, BACKGROUND_HELP)
    workers: int | Literal["auto"] = flag("auto", "processes that load images, per rank; 0: none; auto: one less than cores")
    # initialisation
    init_from: str = flag("", "weights that a new run starts from: file, run, checkpoint or name on the hub, of any family")
    ini: float = flag(-1.0, "std of the initial weights, negative: sqrt(1 / (3 * width))", "--init_std")
    hd: float = flag(0.02, "factor on the initial weights of the head", "--init_head")
    aln: float = flag(0.5, "factor on the initial scale and shift rows of the modulation", "--init_scale_shift")
    alng: float = flag(1e-5, "factor on the initial gamma rows of the modulation", "--init_gamma")
    alng_all: bool = flag(
        False, "--alng for the feed-forward's gamma in blocks with Mamba too; the released M-VAR leaves it at --aln"
    )
    train_only: str = flag(
        "", "parts to train, with commas between them: modulation, mamba, attention, feed-forward, head, embeddings; empty: all"
    )
    lora: int = flag(0, "rank of adapters, which are trained and saved alone, beside the linear layers of --init_from; 0: none")
    lora_alpha: float = flag(0.0, "their factor times the rank, 0: the rank")
    lora_parts: str = flag("", "parts with adapters: attention, mamba, feed-forward, modulation; empty: the first three")
    # optimisation
    bs: int = flag(768, "images per step, over all ranks and micro-batches", "--batch_size")
    ac: int = flag(1, "micro-batches per step (gradient accumulation)", "--accumulate")
    ep: float = flag(250.0, "epochs", "--epochs")
    max_steps: int = flag(0, "stop after so many steps instead of --ep epochs, 0: off")
    max_minutes: float = flag(0.0, "end the run, schedules included, after so many minutes at the latest, 0: off")
    tblr: float = flag(1e-4, "peak learning rate per 256 images of --bs", "--base_lr")
    sche: str = flag("lin0", f"learning-rate schedule: {', '.join(SCHEDULES)}", "--schedule", choices=SCHEDULES)
    wp: float = flag(0.0, "epochs of learning-rate warm-up, 0: ep / 50", "--warmup")
    wp0: float = flag(0.005, "learning rate at the start of the warm-up, over the peak", "--warmup_start")
    wpe: float = flag(0.01, "learning rate at the end of the run, over the peak", "--lr_end")
    twd: float = flag(0.05, "weight decay at the start", "--weight_decay")
    twde: float = flag(0.0, "weight decay at the end, 0: as at the start", "--weight_decay_end")
    tclip: float = flag(2.0, "largest norm of the gradient, 0: no limit", "--grad_clip")
    ls: float = flag(0.0, "label smoothing, 0 to 1", "--label_smoothing")
    class_dropout: float = flag(0.1, "share of images trained without their class, for guidance")
    drop_path: float = flag(-1.0, "drop-path rate of the last block, negative: 0.1 * depth / 24")
    ema: float = flag(0.9999, "decay of the averaged weights, ramped up at the start; 0: no average")
    fp16: int = flag(0, "0: float32, 1: float16 with loss scaling, 2: bfloat16", "--precision", choices=(0, 1, 2))
    max_bad_steps: int = flag(20, "fp16: end the run after so many steps in a row whose gradient is not finite")
    scale_groups: str = flag(
        "together",
        "markov: train all scales together, in turn (same gradient, memory of the largest group), or one group a step, 8:1:1",
        choices=SCALE_GROUPS,
    )
    objective: str = flag(
        "likelihood",
        "what is learnt; cca: condition contrastive alignment, an epoch from --init_from makes guidance needless",
        choices=OBJECTIVES,
    )
    cca_beta: float = flag(0.02, "--objective=cca: how far from the start, large: hardly")
    cca_weight: float = flag(50.0, "--objective=cca: weight of images under labels of others; published: 50, d24 100, d30 1000")
    # progressive training
    pg: float = flag(0.0, "train more and more scales during this first share of the run, 0: all from the start")
    pg0: int = flag(4, "--pg: it starts with this many scales plus one, less than the pyramid has")
    pgwp: float = flag(0.0, "--pg: epochs over which the loss of a new scale is faded in, 0: ep / 300")
    # running
    local_out_dir_path: str = flag("local_output", "run directory; a run in it is resumed", "--out")
    seed: int | None = flag(None, "of data order, initial weights and dropouts; none: drawn, and kept in the run's config.json")
    parallel: str = flag("ddp", "over ranks: ddp replicates the model, fsdp shards it (fp16 0 or 2)", choices=("ddp", "fsdp"))
    recompute: bool = flag(False, "activation checkpointing: keep the inputs of each block only and compute the rest twice")
    scan_backend: str = flag(
        "auto", "kernels of Mamba-2; auto: on a GPU those that are installed, else plain torch", choices=SCAN_BACKENDS
    )
    tfast: int = flag(0, "compile the blocks: 0 no, 1 reduce-overhead, 2 max-autotune, 3 default", choices=(0, 1, 2, 3))
    log_every: int = flag(20, "steps between log lines")
    val_every: int = flag(0, "steps between validations, 0: 10 epochs")
    save_every: int = flag(0, "steps between checkpoints, 0: one epoch")
    keep: int = flag(2, "checkpoints to keep")
    val_samples: int = flag(8, "classes of which each validation draws a sample into the TensorBoard log, 0: none")
    val_fd: int = flag(
        0,
        "samples that each validation draws and scores: their FD-EffLite0 from the held-out images of --data_path, "
        "to be given beside a token cache too; 0: none",
    )
    val_drawing: str = flag(
        "", "how samples for --val_fd are drawn, such as 'cfg=2 cfg_scales=3-8 temperature=1:0.5'; empty: as published"
    )
    peak_tflops: float = flag(0.0, "peak of one GPU in TFLOP/s, for the model FLOPs utilisation; 0: known by the GPU's name")

    def __post_init__(self):
        object.__setattr__(self, "workers", worker_count(self.workers))
        check_finite(self)
        background_colour(self.background)
        check_share(self.val_share)
        check_max_bad(self.max_bad)
        for name in ("depth", "bs", "ac", "log_every", "keep", "ep", "max_bad_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give a number above 0")
        for name in ("width", "heads", "global_blocks", "window_from", "workers", "max_steps", "max_minutes", "tblr", "wp"):
            self._check_at_least(name, 0)
        for name in ("wp0", "wpe", "twd", "twde", "tclip", "pg0", "pgwp", "val_every", "save_every"):
            self._check_at_least(name, 0)
        for name in ("val_samples", "peak_tflops", "val_fd"):
            self._check_at_least(name, 0)
        if self.val_fd == 1:
            raise ValueError("--val_fd=1: a distance needs more images: give 2 or more, or 0 for none")
        self._check_idle()
        try:
            read_sampling(self.val_drawing)
        except ValueError as error:
            raise ValueError(f"--val_drawing: {error}") from error
        check_resize(self.mid_reso)
        for name in ("class_dropout", "ls", "pg", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name}={getattr(self, name)}: give a share from 0 to 1")
        if self.bs % self.ac:
            raise ValueError(f"--bs={self.bs} is no multiple of --ac={self.ac}: change one of them")
        if self.pn:
            Pyramid.parse(self.pn)
        kinds = {self.family} | ({"var"} if self.global_blocks else set())
        self._check_kinds([FAMILIES[kind] for kind in kinds])
        if self.scale_groups != "together" and any(FAMILIES[kind].traits.carries_state for kind in kinds):
            raise ValueError(
                f"--scale_groups={self.scale_groups}: scales depend on one another in family {self.family}"
                f"{' with --global_blocks' if self.global_blocks else ''}: only all of --family=markov can be trained so"
            )
        if self.train_only and not self.init_from:
            raise ValueError(f"--train_only={self.train_only}: the other parts would stay as they were drawn: give --init_from")
        self._check_adapters()
        if self.objective == "cca":
            self._check_contrast()
        if self.parallel == "fsdp" and self.fp16 == 1:
            raise ValueError("--parallel=fsdp with --fp16=1: sharded training has no loss scaling: give --fp16=2 (bfloat16)")

    def _check_idle(self) -> None:
        """What is said of something that this run has not would say nothing."""
        cached = ("hflip", "mid_reso", "vae_precision")
        images = ("data_path", "image_column", "label_column", "val_share", "skip_bad", "max_bad", "background")
        of_images = "is of images, and --token_cache has none: give it to scripts/cache_tokens.py, or --val_fd too"
        for names, needed, reason in (
            (cached, not self.token_cache, "is a setting of the token cache: give it to scripts/cache_tokens.py"),
            (images, not self.token_cache or self.val_fd, of_images),
            (("max_bad",), self.skip_bad, "is of --skip_bad: give that, or leave it out"),
            (("val_drawing",), self.val_fd, "is of the samples of --val_fd: give that, or leave it out"),
            (("pg0", "pgwp"), self.pg, "is of progressive training: give --pg, or leave it out"),
            (("cca_beta", "cca_weight"), self.objective == "cca", "is of --objective=cca: give that, or leave it out"),
            (("lora_alpha", "lora_parts"), self.lora, "is of adapters: give --lora, their rank, or leave it out"),
        ):
            if not needed:
                check_idle(self, names, reason)

    def _check_kinds(self, kinds: list[Family]) -> None:
        """What is said of a mixer that no block has would say nothing."""
        self._check_at_least("attended_scales", 0)
        for name, applies, lack in (
            ("window", lambda kind: kind.windows, "no windows"),
            ("attended_scales", lambda kind: kind.traits.has_history, "no attention to earlier scales"),
            ("scan", lambda kind: kind.traits.has_mamba, "no Mamba"),
        ):
            value = getattr(self, name)
            if value != getattr(TrainConfig, name) and not any(map(applies, kinds)):
                raise ValueError(f"--{name}={value}: family {self.family} has {lack}: leave it out")

    def _check_adapters(self) -> None:
        if not (self.lora >= 0 and self.lora_alpha >= 0):
            raise ValueError(f"--lora={self.lora}, --lora_alpha={self.lora_alpha}: give numbers of at least 0")
        if self.lora and not self.init_from:
            raise ValueError(f"--lora={self.lora}: adapters are nothing without trained weights: give --init_from")
        if self.lora and self.parallel == "fsdp":
            raise ValueError(f"--lora={self.lora}: adapters are small: give --parallel=ddp")

    def _check_contrast(self) -> None:
        if not self.init_from:
            raise ValueError("--objective=cca: starts from a trained transformer: give --init_from")
        if self.pg or self.scale_groups != "together" or self.parallel == "fsdp" or self.ls:
            raise ValueError(
                "--objective=cca: takes all scales at once, on every rank: leave out --pg, --scale_groups, --ls, fsdp"
            )
        if self.bs == self.ac:
            raise ValueError(f"--bs={self.bs} --ac={self.ac}: --objective=cca compares images: give 2 or more at a time")
        for name in ("cca_beta", "cca_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give a number above 0")

    def _check_at_least(self, name: str, least: float) -> None:
        if not getattr(self, name) >= least:
            raise ValueError(f"--{name}={getattr(self, name)}: give {least} or more")

    @property
    def peak_learning_rate(self) -> float:
        return self.tblr * self.bs / 256

    @property
    def warmup_share(self) -> float:
        """Warm-up as a share of the run."""
        return (self.wp or self.ep / 50) / self.ep

    @property
    def schedule(self) -> str:
        """Progressive training has a schedule of its own, as released."""
        return f"lin{self.pg:g}" if 0 < self.pg < 1 else self.sche

    def rank_batch(self, world: int) -> int:
        """Images per rank and micro-batch; ValueError where the batch cannot be divided evenly."""
        if self.bs % (world * self.ac):
            raise ValueError(
                f"--bs={self.bs} does not divide by {world} ranks x --ac={self.ac}: give a multiple of {world * self.ac}"
            )
        return self.bs // (world * self.ac)

    def _check_progressive(self, pyramid: Pyramid) -> None:
        """ValueError where all scales would be trained from the start."""
        if self.pg and self.pg0 + 1 >= pyramid.num_scales:
            most = pyramid.num_scales - 2
            mend = f"give --pg0={most}{' or less' if most else ''}, or no --pg" if most >= 0 else "leave it out"
            raise ValueError(
                f"--pg={self.pg:g} --pg0={self.pg0}: starts with {self.pg0 + 1} scales, pyramid {pyramid} has "
                f"{pyramid.num_scales}: {mend}"
            )

    def transformer_config(self, tokenizer: TokenizerConfig, num_classes: int) -> TransformerConfig:
        if not 0 <= self.global_blocks <= self.depth:
            raise ValueError(f"--global_blocks={self.global_blocks}: give 0 to {self.depth}, the depth")
        self._check_progressive(tokenizer.pyramid)
        chosen = {"width": self.width, "heads": self.heads, "window_from": self.window_from}
        chosen |= {"window": self.window, "attended_scales": self.attended_scales, "scan": self.scan}
        overrides = {name: value for name, value in chosen.items() if value}  # 0 leaves it to the family
        if self.drop_path >= 0:
            overrides["drop_path"] = self.drop_path
        return family_config(
            self.family,
            self.depth,
            tokenizer.pyramid.sides,
            num_classes,
            self.global_blocks,
            num_codes=tokenizer.num_codes,
            code_dim=tokenizer.code_dim,
            normalize_attention=self.anorm,
            shared_modulation=self.saln,
            **overrides,
        )
