"""Where attention goes in a token pyramid: to which scale, and how far inside the own one.

M-VAR (arXiv 2411.10433, section 3.1) and MVAR (arXiv 2505.12742, section 3.1) both start from what VAR's attention does, and
published no code for it. Weights are those after the softmax, averaged over images and queries; maps are looked at one head of
one block and one scale at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import Attention
from models.pyramid import Pyramid
from models.transformer import ScaleTransformer
from utils.analysis.watch import Watch


class AttentionTally(Watch):
    """Sums over images of the attention of every block and head; figures are asked of `AttentionShares`."""

    def __init__(self, transformer: ScaleTransformer):
        super().__init__(transformer, Attention)
        if not self.mixers:
            raise ValueError("there is no attention in this transformer")
        self.attended_scales = max(mixer.attended_scales for mixer in self.mixers)
        heads, scales = self.mixers[0].heads, self.pyramid.num_scales
        self.reach = max(max(shape) for shape in self.pyramid.shapes)
        # (blocks, heads, K, K): what queries of scale k give to scale j, summed over the queries
        self.between = torch.zeros(len(self.mixers), heads, scales, scales, dtype=torch.float64)
        # (blocks, heads, K, D): what they give to tokens of their own scale so many rows or columns away
        self.inside = torch.zeros(len(self.mixers), heads, scales, self.reach, dtype=torch.float64)

    def add(self, number: int, x: Tensor, scales: range) -> None:
        mixer = self.mixers[number]
        for k, head, weights in mixer.weights(x, scales):  # (B, h_k * w_k, keys)
            by_key = weights.double().sum((0, 1))  # (keys,)
            seen = mixer.seen_scales(k)
            for j, part in zip(seen, by_key.split([self.pyramid.lengths[j] for j in seen]), strict=True):
                self.between[number, head, k, j] += part.sum().cpu()
            own = weights[:, :, -self.pyramid.lengths[k] :].double().sum(0)  # (h_k * w_k, h_k * w_k)
            distances = map_distances(*self.pyramid.shapes[k]).to(own.device)
            self.inside[number, head, k] += torch.bincount(distances.flatten(), own.flatten(), self.reach).cpu()

    def shares(self) -> "AttentionShares":
        """Of all blocks and heads together."""
        return self.shares_of(self.between.mean((0, 1)), self.inside.mean((0, 1)))

    def by_block(self) -> dict[int, "AttentionShares"]:
        parts = zip(self.blocks, self.between.mean(1), self.inside.mean(1), strict=True)
        return {block: self.shares_of(between, inside) for block, between, inside in parts}

    def by_head(self) -> dict[tuple[int, int], "AttentionShares"]:
        """(block, head) -> its shares."""
        return {
            (block, head): self.shares_of(self.between[number, head], self.inside[number, head])
            for number, block in enumerate(self.blocks)
            for head in range(self.between.shape[1])
        }

    def shares_of(self, between: Tensor, inside: Tensor) -> "AttentionShares":
        self.check_seen()
        queries = self.images * torch.tensor(self.pyramid.lengths, dtype=torch.float64)[:, None]
        return AttentionShares(self.pyramid, between / queries, inside / queries)


@dataclass(frozen=True)
class AttentionShares:
    """How a query shares out its attention, whose sum is 1.

    between (K, K): a query of scale k to all tokens of scale j; inside (K, D): to those of its own scale at most so many rows
    and columns away that one of both is exactly that.
    """

    pyramid: Pyramid
    between: Tensor
    inside: Tensor

    @classmethod
    def uniform(cls, pyramid: Pyramid, attended_scales: int) -> "AttentionShares":
        """Of queries that see all tokens alike: of their own scale, and of those before it as far as so many are seen."""
        lengths = torch.tensor(pyramid.lengths, dtype=torch.float64)
        distances = torch.arange(len(lengths))[:, None] - torch.arange(len(lengths))
        seen = (distances >= 0) & (distances < attended_scales)
        between = seen * lengths / (seen * lengths).sum(1, keepdim=True)
        reach = max(max(shape) for shape in pyramid.shapes)
        counts = [torch.bincount(map_distances(*shape).flatten(), minlength=reach) for shape in pyramid.shapes]
        inside = torch.stack(counts) / lengths[:, None] ** 2 * between.diagonal()[:, None]
        return cls(pyramid, between, inside)

    @property
    def own(self) -> Tensor:
        """(K,) the share of each scale's queries that stays in their scale."""
        return self.between.diagonal()

    @property
    def own_of_all(self) -> float:
        """The same of all queries together (M-VAR: 0.796 for VAR at 256 px)."""
        lengths = torch.tensor(self.pyramid.lengths, dtype=torch.float64)
        return float((self.own * lengths).sum() / lengths.sum())

    @property
    def own_by_scale(self) -> float:
        """The mean over the scales, without the first, which has no other to look at."""
        return float(self.own[1:].mean()) if len(self.own) > 1 else 1.0

    def at_distance(self) -> list[float]:
        """d = 0 .. K - 1: what queries give to the scale d before their own; all queries that have one."""
        lengths = torch.tensor(self.pyramid.lengths, dtype=torch.float64)
        pairs = [(self.between.diagonal(-d), lengths[d:]) for d in self.pyramid.scales]
        return [float((given * count).sum() / count.sum()) for given, count in pairs]

    def in_windows(self, k: int) -> dict[int, float]:
        """n = 1, 3, 5, ...: what queries of scale k give to the n x n tokens around them, as far as the map has them."""
        side = max(self.pyramid.shapes[k])
        within = self.inside[k].cumsum(0)
        return {2 * distance + 1: float(within[distance]) for distance in range(side)}

    def figures(self) -> dict:
        """Everything, for a JSON; windows in sums over the queries of a scale, as MVAR draws them, by scale."""
        lengths = self.pyramid.lengths
        return {
            "own_of_all": self.own_of_all,
            "own_by_scale": self.own_by_scale,
            "between": self.between.tolist(),
            "at_distance": self.at_distance(),
            "windows": {
                "x".join(map(str, self.pyramid.shapes[k])): {n: lengths[k] * share for n, share in self.in_windows(k).items()}
                for k in self.pyramid.scales
            },
        }


def map_distances(height: int, width: int) -> Tensor:
    """(h * w, h * w) how many rows or columns, whichever are more, lie between two tokens of a map."""
    rows, columns = ((torch.arange(n)[:, None] - torch.arange(n)).abs() for n in (height, width))
    return torch.maximum(rows[:, None, :, None], columns[None, :, None, :]).reshape(height * width, height * width)


def cost_shares(pyramid: Pyramid) -> dict[str, float]:
    """The scores inside the scales over all scores: of a dense map (M-VAR's 0.2392 at 256 px), and of what VAR computes."""
    inside = sum(length**2 for length in pyramid.lengths)
    causal = sum(length * end for length, end in zip(pyramid.lengths, pyramid.offsets[1:], strict=True))
    return {"of_dense": inside / pyramid.num_tokens**2, "of_causal": inside / causal}
