"""What a tokenizer loses of images: it encodes and decodes them, and the results are measured beside the originals.

Legend: N images, K scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dist import Ranks
from models.tokenizer import VQVAE
from utils.metrics.codes import CodeCounts, CodeUsage
from utils.metrics.features import Extractor
from utils.metrics.image_sets import ImageSet, Statistics
from utils.metrics.measure import ALONE, Measurement, progress, share
from utils.metrics.similarity import LPIPS, WINDOW, psnr, ssim
from utils.plots import to_uint8

BATCH = {"cpu": 8, "cuda": 32}  # large tokenizers need gigabytes for a few images
SHOWN = 8  # images that are kept to be looked at


@dataclass(frozen=True)
class Quality:
    """originals, reconstructions: statistics of their features; psnr in dB, ssim and lpips: means over all images.

    None for ssim of images smaller than its window, and for lpips where no network was given. scales: (K,) usage of codes.
    pairs: the first images of this rank, originals and reconstructions, each (SHOWN or fewer, H, W, 3) uint8.
    """

    originals: Statistics
    reconstructions: Statistics
    psnr: float
    ssim: float | None
    lpips: float | None
    scales: list[CodeUsage]
    all_scales: CodeUsage
    pairs: tuple[np.ndarray, np.ndarray]


def device_of(tokenizer: VQVAE) -> torch.device:
    return next(tokenizer.parameters()).device


@torch.inference_mode()
def reconstruct(tokenizer: VQVAE, images: np.ndarray) -> tuple[np.ndarray, list[Tensor]]:
    """(N, H, W, 3) uint8 -> the same from its tokens, rounded to nearest, and those: K tensors (N, h_k * w_k).

    ValueError for NaN or infinity, which codes and rounding would hide.
    """
    pixels = torch.from_numpy(images).to(device_of(tokenizer)).permute(0, 3, 1, 2).float() / 127.5 - 1
    indices, finite = tokenizer.encode_checked(pixels)
    if not finite:
        raise ValueError(f"features of images are not finite, so they have no tokens: {_mend(tokenizer.before_quantizer)}")
    decoded = tokenizer.decode(indices)
    if not decoded.isfinite().all():
        raise ValueError(f"reconstructions are not finite: {_mend(tokenizer.after_quantizer)}")
    return to_uint8((decoded + 1) / 2), indices


def _mend(layer: nn.Module) -> str:
    """Of values that are not finite; layer: one of the half of the tokenizer that has made them, which is of one precision."""
    dtype = layer.weight.dtype
    if dtype == torch.float32:
        return "the weights of the tokenizer are damaged, give others"
    return f"{str(dtype).removeprefix('torch.')} may be too narrow for this tokenizer: give --precision=float32"


def measure_reconstruction(
    tokenizer: VQVAE,
    images: ImageSet,
    extractor: Extractor,
    lpips: LPIPS | None = None,
    *,
    rows: Sequence[int] | None = None,
    batch: int = 0,
    ranks: Ranks = ALONE,
) -> Quality:
    """Of images of the tokenizer's size, all or those of these rows, shared out over ranks; on every rank.

    batch: images at a time, 0: as suits the device. ValueError for images that cannot be read or are fewer than two.
    """
    device = device_of(tokenizer)
    batch = batch or BATCH[device.type]
    rows = range(images.count) if rows is None else rows
    part = share(len(rows), batch, ranks)
    before, after = (
        Measurement(extractor, name, keep_features=False, first=part.start)
        for name in (images.source, f"reconstructions of {images.source}")
    )
    codes = CodeCounts(tokenizer.pyramid, tokenizer.config.num_codes, device)
    compare = {"psnr": psnr} | ({"ssim": ssim} if min(images.height, images.width) >= WINDOW else {})
    compare |= {"lpips": lpips} if lpips else {}
    sums = torch.zeros(len(compare), dtype=torch.float64, device=device)
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    with progress(images.source, len(rows), ranks) as advance, ranks.failing_together():
        for originals in images.batches(batch, rows[part]):
            decoded, indices = reconstruct(tokenizer, originals)
            before.add(originals)
            after.add(decoded)
            codes.add(indices)
            pair = [torch.from_numpy(images_of_batch).to(device) for images_of_batch in (originals, decoded)]
            sums += torch.stack([similarity(*pair).sum() for similarity in compare.values()])
            if len(shown) * batch < SHOWN:
                shown.append((originals, decoded))
            advance(len(originals))
    real, made = (measurement.result(ranks).statistics for measurement in (before, after))
    means = dict(zip(compare, (ranks.sum(sums) / real.count).tolist(), strict=True))
    codes = codes.over(ranks.sum)
    none = np.empty((0, images.height, images.width, 3), np.uint8)  # of a rank that has no images
    pairs = tuple(np.concatenate([none, *column])[:SHOWN] for column in (zip(*shown, strict=True) if shown else ((), ())))
    return Quality(real, made, means["psnr"], means.get("ssim"), means.get("lpips"), codes.by_scale(), codes.of_all(), pairs)
