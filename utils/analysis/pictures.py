"""The figure of scripts/analyze_attention.py."""

from pathlib import Path
from typing import Any

from torch import Tensor

from models.pyramid import Pyramid
from utils.analysis.attention import AttentionShares, AttentionTally, cost_shares
from utils.analysis.history import RetentionTally
from utils.plots import save_figure

SHOWN_SCALES = 3  # the last ones, whose windows are drawn


def draw(path: Path, title: str, attention: AttentionTally, retention: RetentionTally, changed: Tensor) -> None:
    """Between the scales, over their distance, by block, inside the last scales, what a scan keeps, and influence (K, K)."""
    from matplotlib.figure import Figure  # here, as it takes half a second

    pyramid, shares = attention.pyramid, attention.shares()
    uniform = AttentionShares.uniform(pyramid, attention.attended_scales)
    figure = Figure(figsize=(16, 9.5))
    axes = figure.subplots(2, 3)
    costs = cost_shares(pyramid)

    draw_matrix(axes[0, 0], shares.between, pyramid, "to scale")
    axes[0, 0].set_title(
        f"attention between scales: {shares.own_of_all:.1%} in the own scale,\n"
        f"at {costs['of_dense']:.1%} of the scores of a dense map, {costs['of_causal']:.1%} of a causal one",
        fontsize=10,
    )
    axis = axes[0, 1]
    for name, each, style in (("measured", shares, "-"), ("uniform", uniform, "--")):
        axis.plot(pyramid.scales, each.at_distance(), style, marker=".", label=name)
    axis.set(title="over the distance between scales", xlabel="scales before the own one", ylabel="share of the attention")
    axis = axes[0, 2]
    blocks = attention.by_block()
    axis.plot(list(blocks), [each.own_of_all for each in blocks.values()], "-o", label="mean of its heads")
    for (block, _), each in attention.by_head().items():
        axis.plot(block, each.own_of_all, ".", color="grey", markersize=3)
    axis.axhline(uniform.own_of_all, linestyle="--", color="grey", label="uniform")
    axis.set(title="inside the own scale, by block (grey: heads)", xlabel="block", ylabel="share of the attention")
    axis = axes[1, 0]
    for number, k in enumerate(pyramid.scales[-SHOWN_SCALES:]):
        height, width = pyramid.shapes[k]
        for each, style in ((shares, "-"), (uniform, "--")):
            windows = each.in_windows(k)
            label = f"{height}x{width}" if style == "-" else None
            axis.plot(list(windows), list(windows.values()), style, color=f"C{number}", marker=".", label=label)
    axis.set(
        title="inside a window of the own scale (dashed: uniform)", xlabel="side of the window", ylabel="share of the attention"
    )
    for axis in (axes[0, 1], axes[0, 2], axes[1, 0]):
        axis.set_ylim(0, 1.05)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    if retention.blocks:
        draw_matrix(axes[1, 1], retention.shares().mean((0, 1)), pyramid, "of what scale wrote")
        axes[1, 1].set_title("state of the scan: left by the end of scale (rows)", fontsize=10)
    else:
        axes[1, 1].set_visible(False)
    draw_matrix(axes[1, 2], changed, pyramid, "by inputs of scale")
    axes[1, 2].set_title("influence on the logits of scale (rows), by gradients", fontsize=10)
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path, dpi=100)


def draw_matrix(axis: Any, values: Tensor, pyramid: Pyramid, xlabel: str) -> None:
    """Shares (K, K) as colours, with their numbers in per cent."""
    names = ["x".join(map(str, shape)) for shape in pyramid.shapes]
    axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1)
    for k in pyramid.scales:
        for j in pyramid.scales[: k + 1]:
            value = float(values[k, j])
            axis.text(
                j, k, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color="black" if value > 0.6 else "white"
            )
    axis.set(xlabel=xlabel, xticks=list(pyramid.scales), yticks=list(pyramid.scales))
    axis.set_xticklabels(names, fontsize=7)
    axis.set_yticklabels(names, fontsize=7)
