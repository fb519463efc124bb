"""What the training of a tokenizer is told: the flags of scripts/train_tokenizer.py, and the recipe of each preset.

VAR's own recipe is not public. That of the large presets is what FoundationVision/vaex does, whose author calls it VAR's; that
of the small ones was found by trials (docs/tokenizer.md).
"""

from dataclasses import dataclass, replace
from typing import Literal

from models.discriminator import DiscriminatorConfig
from models.pyramid import Pyramid
from models.quantizer import QuantizerTraining
from models.tokenizer import TOKENIZER_PRESETS, TokenizerConfig
from utils.cli import check_finite, check_idle, flag, required
from utils.data.batches import worker_count
from utils.data.hub_sets import DATA_PATH_HELP, IMAGE_COLUMN_HELP, LABEL_COLUMN_HELP
from utils.data.images import check_resize
from utils.data.layouts import VAL_SHARE_HELP, check_share
from utils.data.pictures import BACKGROUND_HELP, WHITE, background_colour
from utils.runs.listing import MAX_HELP, SKIP_HELP, check_max_bad

FEATURES = ("", "dino", "efflite0")  # what a discriminator can look at instead of pixels
SCORES = ("", "val_psnr", "val_ssim", "val_fd", "val_perceptual")

# Of flags that are not given; what a recipe does not say, the defaults below do.
LARGE_RECIPE = {
    "lr": 3e-4,
    "lr_end": 0.3,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "weight_decay": 5e-3,
    "clip": 10.0,
    "perceptual": 1.0,
    "gan": 0.4,
    "gan_adaptive": True,
    "gan_from": 0.2,
    "gan_ramp": 0.02,
    "gan_lr": 3e-4,
    "gan_layers": 3,
    "gan_norm": True,
    "diffaug": True,
    "ema": 0.9999,
}
SMALL_RECIPE = {"lr": 2e-3}
RECIPES = {"f16-256": LARGE_RECIPE, "f16-512": LARGE_RECIPE} | dict.fromkeys(("f8-64", "f8-32", "f4-32"), SMALL_RECIPE)
# Of --refine: the decoder alone, from one that has learnt (VQ-Transplant's second stage: a small constant rate).
REFINE_RECIPE = {"lr": 1e-4, "lr_end": 1.0, "gan_from": 0.0, "gan_ramp": 0.1, "restart_every": 0}

# Of --gan=0: with an adversary long averages are a harm, and without one a gain (docs/tokenizer.md).
ALONE_RECIPE = {"adam_beta1": 0.9, "adam_beta2": 0.99}


def recipe(given: dict) -> dict:
    """The defaults that come with a preset, with --refine or with --gan=0, from the flags so far."""
    alone = ALONE_RECIPE if given["gan"] == 0 else {}
    return alone | RECIPES.get(given["preset"], {}) | (REFINE_RECIPE if given["refine"] else {})


@dataclass(frozen=True)
class TokenizerTraining:
    """Flags of scripts/train_tokenizer.py."""

    data_path: str = required(DATA_PATH_HELP)
    out: str = required("run directory; a run in it is resumed")
    # what is trained
    preset: str = flag("f16-256", "sizes of the tokenizer, and defaults of other flags", choices=TOKENIZER_PRESETS)
    pn: str = flag("", "pyramid instead of the preset's: sides such as 1_2_3_4_5_6", "--pyramid")
    cosine: bool = flag(False, "codes are chosen by cosine instead of distance", "--normalize_lookup")
    init_from: str = flag("", "weights to start from: released file, run, checkpoint or name on the hub; its sizes count")
    refine: str = flag("", "the same, but the decoder alone is trained, so that all tokens stay what they are")
    # optimisation
    bs: int = flag(128, "images per step, over all ranks", "--batch_size")
    lr: float = flag(1e-3, "peak learning rate", "--learning_rate")
    lr_end: float = flag(0.01, "learning rate at the end of the run, over the peak, by a cosine", "--wpe")
    adam_beta1: float = flag(0.5, "how much of its average of gradients AdamW keeps at a step")
    adam_beta2: float = flag(0.9, "how much of that of squared gradients; the discriminator's are always 0.5 and 0.9")
    weight_decay: float = flag(0.0, "of all weights", "--twd")
    clip: float = flag(1.0, "largest norm of the gradient", "--tclip")
    max_steps: int = flag(100_000, "steps")
    max_minutes: float = flag(0.0, "end the run, schedule included, after so many minutes at the latest, 0: off")
    ema: float = flag(0.0, "decay of the averaged weights, ramped up at the start; 0: no average")
    fp16: int = flag(0, "0: float32, 1: float16 with loss scaling, 2: bfloat16", "--precision", choices=(0, 1, 2))
    max_bad_steps: int = flag(20, "fp16: end the run after so many steps in a row whose gradient is not finite")
    # losses
    l1: float = flag(0.2, "weight of the mean absolute error")
    l2: float = flag(1.0, "weight of the mean squared error")
    vq: float = flag(0.25, "weight of the codebook and commitment loss")
    perceptual: float = flag(0.0, "weight of the distance in features of SqueezeNet, 0: none")
    perceptual_logits: float = flag(0.0, "weight, within it, of the distance of SqueezeNet's logits; 0.01 makes both alike")
    lpips: float = flag(0.0, "weight of LPIPS by VGG16, 0: none")
    lpips_weights: str = flag("", "torchvision's weights of VGG16, a file")
    lpips_sha256: str = flag("", "its SHA-256")
    # the adversary
    gan: float = flag(0.01, "weight of the adversarial loss, 0: no discriminator")
    gan_adaptive: bool = flag(False, "--gan is the adversarial gradient over that of the other losses, not a fixed weight")
    gan_least: float = flag(1e-4, "--gan_adaptive: smallest factor on the adversarial loss, before --gan")
    gan_most: float = flag(1.0, "--gan_adaptive: largest one")
    gan_from: float = flag(0.05, "share of the run after which the discriminator begins to learn")
    gan_ramp: float = flag(0.05, "share of the run over which the adversarial loss then comes in")
    gan_lr: float = flag(1e-3, "learning rate of the discriminator, constant")
    gan_width: int = flag(64, "channels of its first layer")
    gan_layers: int = flag(2, "layers that halve the resolution")
    gan_norm: bool = flag(False, "group norm between its layers")
    gan_features: str = flag("", "what it looks at instead of pixels; efflite0 makes FD-EffLite0 worthless", choices=FEATURES)
    gan_weights: str = flag("", "--gan_features=dino: the file of DINO's ViT-S/16")
    gan_sha256: str = flag("", "its SHA-256")
    diffaug: bool = flag(False, "the discriminator sees images with other colours, moved and with a hole (DiffAugment)")
    lecam: float = flag(0.0, "weight of LeCAM's regularisation of the discriminator; published: 0.001")
    # against collapse
    restart_every: int = flag(20, "steps between restarts of unused codes, in the first half of the run; 0: never")
    scale_dropout: float = flag(0.0, "share of the images of which only a random number of first scales is decoded")
    perturbation: float = flag(0.0, "share of the codes that are swapped for near neighbours before they are decoded")
    matching: float = flag(0.0, "weight, within --vq, of how far the codes' distribution is from that of what looks for one")
    # data
    image_column: str = flag("", IMAGE_COLUMN_HELP)
    label_column: str = flag("", LABEL_COLUMN_HELP)
    val_share: float = flag(0.0, VAL_SHARE_HELP)
    skip_bad: bool = flag(False, SKIP_HELP)
    max_bad: float = flag(0.001, MAX_HELP)
    resize: float = flag(1.125, "images are resized to this times their final size, then cropped", "--mid_reso")
    hflip: bool = flag(False, "mirror half of the training images")
    background: str = flag(WHITE, BACKGROUND_HELP)
    workers: int | Literal["auto"] = flag("auto", "processes that load images, per rank; 0: none; auto: one less than cores")
    seed: int = flag(0, "of data order, initial weights and restarts")
    # what is seen and kept
    log_every: int = flag(20, "steps between log lines")
    val_every: int = flag(0, "steps between validations, 0: as --save_every")
    val_fd: int = flag(0, "FD-EffLite0 of so many decoded training images at every validation, beside that of real ones")
    save_every: int = flag(1000, "steps between checkpoints")
    keep: int = flag(2, "checkpoints to keep")
    best: str = flag("", "also keep the checkpoint that is best in this, as checkpoints/best", choices=SCORES)

    def __post_init__(self):
        object.__setattr__(self, "workers", worker_count(self.workers))
        check_finite(self)
        background_colour(self.background)
        check_share(self.val_share)
        check_max_bad(self.max_bad)
        for name in ("bs", "max_steps", "log_every", "save_every", "keep", "max_bad_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give a number above 0")
        for name in ("clip", "lr", "gan_lr", "gan_most"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give a number above 0")
        for name in ("val_every", "workers", "max_minutes", "restart_every", "val_fd", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give 0 or more")
        for name in ("ema", "gan_from", "gan_ramp", "lr_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name}={getattr(self, name)}: give a share from 0 to 1")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: give a share from 0 to below 1")
        for name in ("l1", "l2", "vq", "perceptual", "perceptual_logits", "lpips", "gan", "gan_least", "lecam"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name}={getattr(self, name)}: give 0 or more")
        self._check_idle()
        self._check_together()
        check_resize(self.resize)
        self.discriminator()
        self.against_collapse()

    def _check_idle(self) -> None:
        """What is said of a loss that this run has not would say nothing; what a recipe says of it nobody has given."""
        adversary = ("gan_adaptive", "gan_from", "gan_ramp", "gan_lr", "gan_width", "gan_layers", "gan_norm", "gan_features")
        dino = self.gan_features == "dino"
        for names, needed, reason in (
            (
                (*adversary, "diffaug", "lecam"),
                self.gan,
                "there is no discriminator at --gan=0: give a weight, or leave it out",
            ),
            (("gan_layers", "gan_norm"), not self.gan_features, "there are heads of one kind on --gan_features: leave it out"),
            (("vq",), not self.refine, "codes stay what they are with --refine: leave it out"),
            (("matching",), self.vq, "is within --vq, which is 0: give that, or leave it out"),
            (("gan_least", "gan_most"), self.gan_adaptive, "is of --gan_adaptive: give that, or leave it out"),
            (("gan_weights", "gan_sha256"), dino, "is read with --gan_features=dino alone: give both or neither"),
            (("lpips_weights", "lpips_sha256"), self.lpips, "is read with --lpips alone: give both or neither"),
            (("perceptual_logits",), self.perceptual, "is of --perceptual: give that, or leave it out"),
            (("max_bad",), self.skip_bad, "is of --skip_bad: give that, or leave it out"),
        ):
            if not needed:
                check_idle(self, names, reason, recipe({"preset": self.preset, "refine": self.refine, "gan": self.gan}))

    def _check_together(self) -> None:
        """ValueError for flags that do not go together."""
        if self.val_fd == 1:
            raise ValueError("--val_fd=1: one image has no spread: give 2 or more")
        if self.best == "val_fd" and not self.val_fd:
            raise ValueError(
                "--best=val_fd: it is measured with --val_fd alone: give a number of images, such as --val_fd=1000"
            )
        if self.gan and self.gan_from == 1:
            raise ValueError("--gan_from=1.0: the discriminator would never begin: give less, or --gan=0")
        if self.gan_least > self.gan_most:
            raise ValueError(f"--gan_least={self.gan_least} is above --gan_most={self.gan_most}: give less")
        for wanted, asked, prefix in (
            ("gan_features=dino", self.gan_features == "dino", "gan"),
            ("lpips", self.lpips, "lpips"),
        ):
            file, digits = getattr(self, f"{prefix}_weights"), getattr(self, f"{prefix}_sha256")
            if asked and not (file and digits):
                raise ValueError(f"--{wanted}: needs --{prefix}_weights and --{prefix}_sha256: give the file and its hash")
        if self.refine:
            if self.init_from:
                raise ValueError(f"--init_from={self.init_from}: --refine says already where to start: give one of them")
            for name in ("restart_every", "matching", "cosine"):
                if getattr(self, name):
                    raise ValueError(f"--{name}={getattr(self, name)}: would change tokens, which --refine keeps: leave it out")
        if self.init_from and self.cosine:
            raise ValueError(f"--cosine=1: {self.init_from} says how its codes are chosen: leave it out")

    def sizes(self) -> TokenizerConfig:
        """Of the tokenizer, where no other one says them. ValueError for a pyramid that does not fit."""
        config = TOKENIZER_PRESETS[self.preset]
        if self.cosine or self.pn:
            sides = Pyramid.parse(self.pn).sides if self.pn else config.sides
            config = replace(config, sides=sides, normalize_lookup=self.cosine)
        return config

    def against_collapse(self) -> QuantizerTraining:
        """The means that the flags ask for. ValueError for impossible values."""
        return QuantizerTraining(scale_dropout=self.scale_dropout, perturbation=self.perturbation, matching=self.matching)

    def discriminator(self) -> DiscriminatorConfig:
        """Its sizes. ValueError for impossible ones."""
        return DiscriminatorConfig(self.gan_width, self.gan_layers, self.gan_norm)
