"""What sample.py is told: its flags, and the settings that several values of them make."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from models.families import FAMILIES
from models.generate import GUIDANCE_SCHEDULES, SamplingConfig
from models.precision import PRECISIONS, Precision
from models.scan_backends import SCAN_BACKENDS
from utils.cli import flag
from utils.sampling.editing import check_editing
from utils.sampling.flags import guided_scales, temperatures

PRESETS = {
    "fid": {"cfg": "1.5", "top_k": "900", "top_p": "0.96", "smooth": False},
    "visual": {"cfg": "4.0", "top_k": "900", "top_p": "0.95", "smooth": True},
}
AUTO = "auto"


@dataclass(frozen=True)
class SampleConfig:
    """Flags of sample.py."""

    ckpt: str = flag("", "transformer: released file, run or checkpoint directory, or owner/name[@revision][:file]")
    out: str = flag("", "picture, directory (png) or file (npz) to write")
    history: str = flag(
        "", "instead of --ckpt: a run, of whose checkpoints each draws the same images, as a grid and, beside it, as a .gif"
    )
    vae: str = flag("", "tokenizer, likewise; empty: the one the checkpoint names")
    any_tokenizer: bool = flag(False, "take the tokenizer given, even where it is not the one that ckpt was trained with")
    family: str = flag("", "needed for released MVAR weights: markov", choices=("", *FAMILIES))
    format: str = flag("grid", "what to write", choices=("grid", "scales", "png", "npz"))
    classes: str = flag(
        "", "labels, such as 0,3,7, or class names, in quotes where they hold a comma; none: no class; random: drawn"
    )
    num: int = flag(
        0,
        "images in all, evenly over the classes; 0: of each class a row of a grid, 50 with --preset=fid, else one; "
        "under torchrun: --num_images",
        "--num_images",
    )
    seed: int = flag(0, "of the sampling")
    preset: str = flag(
        "",
        "cfg, top_k, top_p and smooth at once, flags beside it win; none: as fid, which also makes 50 images of each class",
        choices=("", *PRESETS),
    )
    cfg: str | None = flag(None, "guidance scale, 0 for none; several, such as 1.25,1.5,1.75, are sampled one after another")
    top_k: str | None = flag(None, "keep the so many likeliest codes, 0: all; or several")
    top_p: str | None = flag(None, "of those keep the likeliest with this mass, 0: all; or several")
    smooth: bool | None = flag(None, "mix codes by Gumbel-softmax: for pictures only")
    cfg_schedule: str = flag(
        "linear", "how guidance grows over the scales, linear as published", choices=tuple(GUIDANCE_SCHEDULES)
    )
    cfg_scales: str = flag("", "scales that are guided, counted from 1, such as 3-8; those after them take half the time")
    temperature: str = flag("1", "what logits are divided by; two with a comma: at the first and at the last scale")
    best_of: int = flag(1, "draw every image so many times and keep the one that --judge finds likeliest to be of its class")
    judge: str = flag("", "--best_of: efflite0, for ImageNet's classes, or weights of a torchvision classifier")
    refine_ckpt: str = flag(
        "", "a second transformer that draws the scales after the first --draft_scales; with state or without"
    )
    draft_scales: int = flag(0, "--refine_ckpt: so many coarse scales are drawn by --ckpt")
    min_p: float = flag(0.0, "leave out codes that are less than so many times as likely as the likeliest, 0: none")
    interpolate: int = flag(0, "so many images from each of --classes to the next, out of the same random numbers; a grid")
    edit: str = flag("", "a picture of which a part is kept and the rest is drawn, of each of --classes; grids and scales")
    mask: str = flag("", "--edit: a picture of its size, white where it is drawn anew")
    box: str = flag("", "--edit: that as left,top,right,bottom, in pixels of the picture")
    outside: bool = flag(False, "--edit: draw anew all but what --mask or --box say")
    keep_scales: int = flag(0, "--edit: the so many coarsest scales are kept everywhere, for variations")
    paste: bool = flag(False, "--edit: put the picture's own pixels back where nothing was drawn, with a soft edge")
    batch: int = flag(
        64, "images that a rank takes at a time, in whole cohorts of 16 (on GPUs 64) that are always computed alike"
    )
    precision: str = flag(
        "auto",
        f"what images are computed in, of {', '.join(PRECISIONS)}, or two of them with a comma: of the transformer and of the "
        "decoder; auto: the half precision of the device where it is much faster, which a CPU is measured for",
    )
    cuda_graph: bool = flag(False, "launch all scales of a batch as one graph: for GPUs that wait for Python")
    scan_backend: str = flag(
        "auto", "kernels of Mamba-2; auto: on a GPU those that are installed, else plain torch", choices=SCAN_BACKENDS
    )
    ema: bool = flag(True, "use the averaged weights of our checkpoints")
    overwrite: bool = flag(False, "replace what is at --out")

    def __post_init__(self):
        if not (self.ckpt or self.history):
            raise ValueError("nothing to sample from: give --ckpt, a transformer, or --history, a run")
        if self.history and self.ckpt not in ("", self.history):
            raise ValueError(f"--ckpt={self.ckpt} --history={self.history}: give one of both")
        object.__setattr__(self, "ckpt", self.ckpt or self.history)
        if self.history and (self.format != "grid" or self.edit or self.refine_ckpt or self.judge or self.cuda_graph):
            raise ValueError(f"--history={self.history}: is a grid of plain samples: leave out what asks for more")
        if self.history and Path(self.out).suffix.lower() == ".gif":
            raise ValueError(f"--out={self.out}: of --history this is the grid, beside which a .gif is made: give a .png")
        if self.batch < 1 or self.num < 0:
            raise ValueError(f"--batch={self.batch}, --num={self.num}: give at least 1 image at a time and 0 or more in all")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"--seed={self.seed}: give a whole number from 0 to {(1 << 63) - 1}")
        for name, value in PRESETS[self.preset or "fid"].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not Path(self.out).name:
            raise ValueError(f"--out={self.out}: no name of a file or folder: give one")
        for setting in self.sweep():
            self.drawing(setting)
        is_shaped = self.cfg_scales or self.cfg_schedule != SampleConfig.cfg_schedule
        if is_shaped and not any(setting.cfg for setting in self.sweep()):
            raise ValueError(f"--cfg={self.cfg}: without guidance --cfg_scales and --cfg_schedule say nothing: leave them out")
        if self.best_of < 1 or (self.best_of > 1) != bool(self.judge):
            raise ValueError(f"--best_of={self.best_of} --judge={self.judge}: give both, --best_of 2 or more, or neither")
        if bool(self.refine_ckpt) != bool(self.draft_scales):
            raise ValueError(f"--refine_ckpt={self.refine_ckpt} --draft_scales={self.draft_scales}: give both, or neither")
        asks_for_more = self.history or self.edit or self.judge or self.refine_ckpt or self.cuda_graph
        if self.interpolate and (self.format != "grid" or self.interpolate < 2 or asks_for_more):
            raise ValueError(
                f"--interpolate={self.interpolate}: gives a grid of 2 or more: leave out what asks for other things"
            )
        if self.interpolate and self.num:
            raise ValueError(f"--num={self.num}: --interpolate={self.interpolate} says how many images there are: leave it out")
        check_editing(self.edit, self.mask, self.box, self.outside, self.keep_scales, self.paste)
        if self.paste and self.format != "grid":
            raise ValueError(f"--paste with --format={self.format}: pixels are put back into whole images: give --format=grid")
        if self.edit and (self.is_dump or self.cuda_graph):
            raise ValueError(f"--edit={self.edit}: is for pictures: give --format=grid or scales, without --cuda_graph")
        if self.precision != AUTO:
            Precision.parse(self.precision)

    def film(self, setting: "Setting") -> Path:
        """Where --history puts its frames."""
        return setting.out.with_suffix(".gif")

    @property
    def is_dump(self) -> bool:
        return self.format in ("png", "npz")

    def sweep(self) -> list["Setting"]:
        """Every combination of the values of --cfg, --top_k and --top_p; ValueError for values that are none."""
        values = {name: _numbers(name, getattr(self, name), kind) for name, kind in SWEPT.items()}
        varied = [name for name in SWEPT if len(values[name]) > 1]
        settings = []
        for combination in itertools.product(*values.values()):
            chosen = dict(zip(SWEPT, combination, strict=True))
            name = "".join(f"-{name}{chosen[name]:g}" for name in varied)
            out = Path(self.out)
            is_folder = self.format == "png"
            out = out.with_name(out.name + name if is_folder else out.stem + name + out.suffix)
            settings.append(Setting(out, chosen["cfg"], chosen["top_k"], chosen["top_p"], self.smooth))
        return settings

    def drawing(self, setting: "Setting") -> SamplingConfig:
        """ValueError for a way of drawing that is none."""
        return SamplingConfig(
            setting.cfg,
            setting.top_k,
            setting.top_p,
            setting.smooth,
            self.cfg_schedule,
            guided_scales(self.cfg_scales),
            temperatures(self.temperature),
            self.min_p,
        )


@dataclass(frozen=True)
class Setting:
    """How images are drawn, and where they go."""

    out: Path
    cfg: float
    top_k: int
    top_p: float
    smooth: bool


SWEPT: dict[str, type] = {"cfg": float, "top_k": int, "top_p": float}


def _numbers(name: str, text: str, kind: type) -> list:
    """'1.25,1.5' -> [1.25, 1.5]"""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 0 or (name == "top_p" and max(values) > 1) or not all(map(math.isfinite, values)):
        what = f"{'a whole number' if kind is int else 'a number'} of 0{' to 1' if name == 'top_p' else ' or more'}"
        raise ValueError(f"--{name}={text}: give {what}, or several with commas between them")
    if len(set(values)) < len(values):
        raise ValueError(f"--{name}={text}: has a value twice: leave one out")
    return values
