"""How far back a transformer looks: what a Mamba scan still holds of earlier scales, and what they change in later ones."""

import torch
from torch import Tensor

from models.ssm import Mamba2
from models.transformer import ScaleTransformer
from utils.analysis.watch import Watch


class RetentionTally(Watch):
    """What is left of a scan's state at the end of scale j by the end of scale k, by block and head, averaged over images.

    The decays of arXiv 2405.21060, equation 1, multiplied over the tokens of the scales after j up to k. There may be no block
    with a scan.
    """

    def __init__(self, transformer: ScaleTransformer):
        super().__init__(transformer, Mamba2)
        heads, scales = self.mixers[0].ssm.heads if self.mixers else 0, self.pyramid.num_scales
        self.kept = torch.zeros(len(self.mixers), heads, scales, scales, dtype=torch.float64)

    def add(self, number: int, x: Tensor, scales: range) -> None:
        ends = torch.tensor(self.pyramid.offsets[1:], device=x.device) - 1
        decays = self.mixers[number].log_decays(x).double().cumsum(1)[:, ends].cpu()  # (B, K, H), from the first token on
        left = (decays[:, :, None] - decays[:, None]).clamp(max=0).exp()  # (B, K, K, H)
        self.kept[number] += left.sum(0).permute(2, 0, 1).tril()

    def shares(self) -> Tensor:
        """(blocks, heads, K, K), 0 to 1, 0 where j is after k. ValueError before there were images."""
        self.check_seen()
        return self.kept / max(self.images, 1)


def influence(transformer: ScaleTransformer, labels: Tensor, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """(K, K): how much the inputs of scale j change the logits of scale k, as shares that add up to 1 over j.

    By gradients: the squared norm of what a random combination of all logits of scale k, of normal numbers, hands back to the
    inputs of scale j, whose expectation is that of the whole matrix of derivatives. The inputs of the first scale are its
    class. labels (B,), inputs (B, L - h_1 * w_1, code_dim).
    """
    pyramid = transformer.pyramid
    conditioning = transformer.condition(labels)
    start = conditioning.start.detach().requires_grad_()
    inputs = inputs.detach().requires_grad_()
    logits, _ = transformer.advance(inputs, pyramid.scales, conditioning._replace(start=start))
    rows = []
    for k, part in enumerate(pyramid.split(logits)):
        weights = torch.randn(part.shape, generator=generator, device=part.device)
        last = k + 1 == pyramid.num_scales
        gradients = torch.autograd.grad((part * weights).sum(), (start, inputs), retain_graph=not last, allow_unused=True)
        of_start, of_inputs = (torch.zeros(()) if gradient is None else gradient.square() for gradient in gradients)
        later = [of_inputs[:, pyramid.inputs(range(j, j + 1))].sum() for j in pyramid.scales[1:]] if of_inputs.ndim else []
        rows.append(torch.stack([of_start.sum(), *(later or [torch.zeros(())] * (pyramid.num_scales - 1))]))
    squares = torch.stack(rows).double()
    return squares / squares.sum(1, keepdim=True)
