"""All scales of a batch as one CUDA graph, for GPUs that wait for Python.

At the small scales a block takes less time than its kernels take to be launched one by one. A graph holds all kernels of all
scales, with guidance, filtering and drawing, and is launched as a whole. Memory is fixed by it: labels and random numbers are
copied in before, results are copied out after.

Random numbers are drawn before the launch and not in the graph, where generators of the images, one each, would have to be
registered with it and could not be exchanged. They are drawn from the same generators, in the same order and shapes as without
a graph, so image n still depends on the seed and n alone, and is the same.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from models.drawing import Generators, fill_exponential_
from models.generate import Refiner, SampledScales, SamplingConfig, check_models, sample_scales
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer

WARM_UPS = 3  # before the capture, so that libraries choose their kernels and get their workspaces outside of it

Compute = Callable[[], SampledScales]
Capture = Callable[[Compute], tuple[Callable[[], Any], SampledScales]]


def cuda_graph(compute: Compute) -> tuple[Callable[[], Any], SampledScales]:
    """A function that computes it again into the same memory, and that memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute()
    return graph.replay, results


class CapturedSampler:
    """`sample_scales` for batches of one size and one way of drawing.

    The graph reads the models' weights where they lie: changes in place are seen, but the models may not be moved. It keeps
    the random numbers of a batch, batch * L * V * 4 bytes, twice that with config.smooth, beside what sampling takes.
    ValueError if the models do not fit, or are not on a GPU. refiner: as in `sample_scales`.

    capture: how a computation is recorded; another one than a graph is for tests.
    """

    def __init__(
        self,
        transformer: ScaleTransformer,
        tokenizer: VQVAE,
        config: SamplingConfig,
        batch: int,
        capture: Capture = cuda_graph,
        refiner: Refiner | None = None,
    ):
        check_models(transformer, tokenizer, refiner)
        device = transformer.head.weight.device
        if capture is cuda_graph and device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA GPU, the models are on {device.type}: sample without it")
        draws = 2 if config.smooth else 1  # at every scale
        shapes = [(batch, length, transformer.config.num_codes) for length in transformer.pyramid.lengths for _ in range(draws)]
        self.labels = torch.zeros(batch, dtype=torch.long, device=device)
        self.noise = [torch.ones(shape, device=device) for shape in shapes]

        def compute() -> SampledScales:
            drawn = iter(self.noise)
            return sample_scales(transformer, tokenizer, self.labels, config, lambda logits: _next(drawn, logits), refiner)

        self.replay, self.results = capture(compute)

    def __call__(self, labels: Tensor, generator: Generators = None) -> SampledScales:
        """labels (B,), generator as in `generate` -> the scales of these images. ValueError for another batch size."""
        if labels.shape != self.labels.shape:
            raise ValueError(f"{len(labels)} labels: this graph is for batches of {len(self.labels)}")
        self.labels.copy_(labels)
        for noise in self.noise:
            fill_exponential_(noise, generator)
        self.replay()
        indices, sums, finite = self.results  # the next call writes over them
        return SampledScales([part.clone() for part in indices], [part.clone() for part in sums], finite.clone())


def _next(drawn: Iterator[Tensor], logits: Tensor) -> Tensor:
    noise = next(drawn)
    assert noise.shape == logits.shape, "random numbers are drawn in the order of sample_scales"
    return noise
