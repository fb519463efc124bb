"""The `sampling` command of scripts/benchmark.py: ours beside the released way."""

import copy
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from models.captured import CapturedSampler
from models.drawing import exponential_noise
from models.generate import SampledScales, SamplingConfig, decode_sampled, sample_scales, state_bytes
from models.layers import Modulation, modulate
from models.precision import TYPES, Precision
from models.pyramid import Pyramid
from models.ssm import Mamba2
from models.tokenizer import VQVAE, TokenizerConfig
from models.transformer import ScaleTransformer, build_transformer
from scripts.benchmarks.config import BenchmarkConfig
from scripts.benchmarks.formats import Columns, gigabytes, optional
from scripts.benchmarks.released import BlockCache, ReleasedSampler, decode
from scripts.benchmarks.timing import Measured, measure

SEED = 0
TOLERANCE = 1e-4  # of images in [0, 1] and of Mamba's outputs
HOW = SamplingConfig()  # the published one


COLUMNS: Columns = {
    "part": ("part", str),
    "released_seconds": ("released way", "{:.3f} s".format),
    "released_spread": ("spread", "{:.0%}".format),
    "ours_seconds": ("ours", "{:.3f} s".format),
    "ours_spread": ("spread of ours", "{:.0%}".format),
    "ratio": ("times faster", "{:.2f}".format),
    "sampled_per_second": ("ours, images per second", "{:.3g}".format),
    "graph_seconds": ("ours as a CUDA graph", optional("{:.3f} s".format)),
    "released_state_bytes": ("state, released way", optional(lambda count: f"{count / 1e6:.1f} MB")),
    "ours_state_bytes": ("state, ours", optional(lambda count: f"{count / 1e6:.1f} MB")),
    "released_peak_bytes": ("memory, released way", optional(gigabytes)),
    "ours_peak_bytes": ("memory, ours", optional(gigabytes)),
}


def sampling(config: BenchmarkConfig) -> list[dict]:
    """Sampling

    Images with guidance 1.5, top-k 900 and top-p 0.96, by our code and by the way of the released samplers, written in plain
    code over the same weights: `scripts/benchmarks/released.py`. Weights are random, the decoder is the released one's. Before
    anything is timed, both give the same tokens from the same random numbers, and the same images.

    - *Transformer*: everything but the decoder: all blocks at all scales, guidance, filtering, drawing, sums of codes.
    - *Mamba*: its sub-layers in all blocks alone, with norm and modulation, at all scales: from the carried state, or over all
      tokens so far.
    - *Decoder*: sums of codes to pixels.
    - *Whole image*: from label to pixels, of the batch and of a single image, which is the latency.

    In half precision, which is the default on a GPU, our weights are cast once, as sample.py does it, and the released way runs
    under autocast, as VAR's README has it.

    *State* is what is carried from scale to scale at most. *Memory* is what a GPU needs beyond the weights. Medians of repeats
    in which both ways take turns; the spread is the largest less the smallest over the median. On a CPU all its threads are
    used, OMP_NUM_THREADS of them where it is set; their number is in the file.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for depth, family, pyramid in tqdm(list(itertools.product(config.depths, config.families, config.pyramids)), disable=None):
        models = random_models(family, depth, pyramid, device)
        precision = config.precision_on(device)
        for row in compare(*models, config.batch, config.repeats, precision):
            rows.append({"model": f"d{depth}", "family": family, "tokens": pyramid.num_tokens, "precision": precision} | row)
    return rows


def random_models(family: str, depth: int, pyramid: Pyramid, device: torch.device) -> tuple[ScaleTransformer, VQVAE]:
    """With weights so large that every part shows in the tokens."""
    torch.manual_seed(SEED)
    transformer = build_transformer(family, depth, sides=pyramid.sides)
    transformer.init_weights(gamma=0.5, head=1.0)
    tokenizer = VQVAE(TokenizerConfig(sides=pyramid.sides))
    tokenizer.init_weights()
    return tuple(model.eval().requires_grad_(False).to(device) for model in (transformer, tokenizer))


class Ways:
    """Every part of sampling a batch in both ways, as calls to be timed."""

    def __init__(self, transformer: ScaleTransformer, tokenizer: VQVAE, batch: int, precision: str = "float32"):
        self.transformer, self.tokenizer, self.batch, self.precision = transformer, tokenizer, batch, precision
        self.device = transformer.head.weight.device
        self.our_models = transformer, tokenizer
        if precision != "float32":
            self.our_models = copy.deepcopy(self.our_models)
            Precision(precision, precision).apply_(*self.our_models)
        self.labels = torch.arange(batch, device=self.device) % transformer.config.num_classes
        self.released_sampler = ReleasedSampler(transformer, tokenizer, HOW)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(SEED)

    def ours(self) -> SampledScales:
        noise = functools.partial(exponential_noise, generator=self.generator())
        return sample_scales(*self.our_models, self.labels, HOW, noise)

    def released(self) -> tuple[list[Tensor], Tensor]:
        with self.autocast():
            return self.released_sampler(self.labels, self.generator())

    def ours_decoded(self, f_hat: Tensor) -> Tensor:
        return decode_sampled(self.our_models[1], SampledScales([], [f_hat], torch.tensor(True)))

    def released_decoded(self, f_hat: Tensor) -> Tensor:
        with self.autocast():
            return decode(self.tokenizer, f_hat)

    def ours_whole(self) -> Tensor:
        return self.ours_decoded(self.ours().sums[-1])

    def released_whole(self) -> Tensor:
        return self.released_decoded(self.released()[1])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=TYPES[self.precision], enabled=self.precision != "float32")

    def captured(self) -> Callable[[], SampledScales]:
        sampler = CapturedSampler(*self.our_models, HOW, self.batch)
        return lambda: sampler(self.labels, self.generator())


class MambaWays:
    """The Mamba sub-layers of all blocks at all scales in both ways, on random inputs."""

    def __init__(self, transformer: ScaleTransformer, rows: int):
        self.pyramid = transformer.pyramid
        device = transformer.head.weight.device
        generator = torch.Generator(device).manual_seed(SEED)
        conditioning = transformer.condition(torch.arange(rows, device=device) % transformer.config.num_classes)
        self.parts: list[tuple[Mamba2, Modulation]] = [
            (block.mixers[1], modulation)
            for block, modulation in zip(transformer.blocks, conditioning.blocks, strict=True)
            if len(block.mixers) > 1
        ]
        size = (rows, self.pyramid.num_tokens, transformer.config.width)
        self.inputs = self.pyramid.split(torch.randn(size, device=device, generator=generator))  # K x (rows, l, C)

    @torch.no_grad()
    def ours(self) -> list[Tensor]:
        """K x (rows, l, C): what the last block adds."""
        for mixer, modulation in self.parts:
            gamma, scale, shift = (part[:, 1] for part in modulation)
            state, outputs = mixer.init_state(len(gamma)), []
            for k, x in enumerate(self.inputs):
                y, state = mixer(modulate(x, scale, shift), range(k, k + 1), state)
                outputs.append(y * gamma)
        return outputs

    @torch.no_grad()
    def released(self) -> list[Tensor]:
        for mixer, modulation in self.parts:
            gamma, scale, shift = (part[:, 1] for part in modulation)
            cache = BlockCache()
            outputs = [cache.mamba(mixer, x, gamma, scale, shift) for x in self.inputs]
        return outputs


def compare(
    transformer: ScaleTransformer, tokenizer: VQVAE, batch: int, repeats: int, precision: str = "float32"
) -> list[dict]:
    """A row for every part. ValueError where the ways differ in float32."""
    f_hat = check_equal(Ways(transformer, tokenizer, batch))
    ways, alone = (Ways(transformer, tokenizer, size, precision) for size in (batch, 1))
    calls: dict[tuple[str, int, str], Callable[[], object]] = {
        ("transformer", batch, "released"): ways.released,
        ("transformer", batch, "ours"): ways.ours,
        ("decoder", batch, "released"): lambda: ways.released_decoded(f_hat),
        ("decoder", batch, "ours"): lambda: ways.ours_decoded(f_hat),
        ("whole image", batch, "released"): ways.released_whole,
        ("whole image", batch, "ours"): ways.ours_whole,
        ("whole image", 1, "released"): alone.released_whole,
        ("whole image", 1, "ours"): alone.ours_whole,
    }
    mamba = MambaWays(transformer, 2 * batch)
    if mamba.parts:
        check_near("Mamba's outputs", torch.cat(mamba.ours(), dim=1), torch.cat(mamba.released(), dim=1))
        ours = MambaWays(ways.our_models[0], 2 * batch)
        calls |= {
            ("Mamba", batch, "released"): lambda: in_autocast(ways, mamba.released),
            ("Mamba", batch, "ours"): lambda: in_autocast(ways, ours.ours),
        }
    if ways.device.type == "cuda":
        calls["transformer", batch, "graph"] = ways.captured()
    measured = measure(calls, repeats, ways.device)
    rows = []
    for part, size, way in calls:
        if way == "ours":
            released, ours, graph = (measured.get((part, size, other)) for other in ("released", "ours", "graph"))
            rows.append({"part": part, "batch": size} | figures(size, released, ours, graph) | states(part, ways))
    return rows


def in_autocast(ways: Ways, call: Callable[[], object]) -> object:
    with ways.autocast():
        return call()


def figures(batch: int, released: Measured, ours: Measured, graph: Measured | None) -> dict:
    return {
        "released_seconds": released.seconds,
        "released_spread": released.spread,
        "ours_seconds": ours.seconds,
        "ours_spread": ours.spread,
        "ratio": released.seconds / ours.seconds,
        "sampled_per_second": batch / ours.seconds,
        "graph_seconds": graph and graph.seconds,
        "released_peak_bytes": released.peak_bytes,
        "ours_peak_bytes": ours.peak_bytes,
    }


def states(part: str, ways: Ways) -> dict:
    """What belongs to one part only."""
    is_transformer = part == "transformer"
    return {
        "released_state_bytes": released_state_bytes(ways.transformer, 2 * ways.batch) if is_transformer else None,
        "ours_state_bytes": state_bytes(ways.transformer, 2 * ways.batch) if is_transformer else None,
    }


def released_state_bytes(transformer: ScaleTransformer, rows: int) -> int:
    """Of keys and values, and of Mamba's inputs, of all tokens."""
    vectors = [2 * int(block.mixers[0].history) + len(block.mixers) - 1 for block in transformer.blocks]
    return sum(vectors) * rows * transformer.pyramid.num_tokens * transformer.config.width * 4


def check_equal(ways: Ways) -> Tensor:
    """The sum of codes that both ways give. ValueError where they differ."""
    indices, f_hat = ways.released()
    ours = ways.ours()
    share = (torch.cat(ours.indices, dim=1) == torch.cat(indices, dim=1)).float().mean().item()
    if share < 1:
        raise ValueError(f"the two ways of sampling agree in {share:.2%} of the tokens: one of them is wrong")
    check_near("sums of codes", ours.sums[-1], f_hat)
    expected = decode(ways.tokenizer, f_hat)
    check_near("images", (ways.tokenizer.decode_features(f_hat) + 1) / 2, expected)
    return f_hat


def check_near(what: str, ours: Tensor, released: Tensor) -> None:
    difference = (ours - released).abs().max().item()
    if not difference <= TOLERANCE:
        raise ValueError(f"{what} of the two ways differ by {difference:.1e}: one of them is wrong")
