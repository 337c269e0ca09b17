"""From rows of floats to codes, scales and offsets: what kernels do while they load, written out with torch.

With 8 bits a group's scale is its largest magnitude / 127. With 4, ten ranges from the group's whole one to narrower
ones are tried; for the codes that each rounds to, the least squares fit of scale and offset; the best is fitted twice
more.

Shapes: N rows, G groups of a row, g inputs of a group.
This file does not know where codes are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tllm.engines.torch.grouped import SCALE_DTYPES
from tllm.models.grouped import Grouped
from tllm.models.spec import GroupedFormat

_CUTS = ((0, 0), (0.04, 0.04), (0.08, 0.08), (0.12, 0.12), (0, 0.08), (0.08, 0), (0.04, 0.12), (0.12, 0.04), (0, 0.16),
         (0.16, 0))  # fmt: skip


def quantized(rows_NK: Tensor, wanted: GroupedFormat) -> Grouped:
    """Of any float type. `wanted` has 8 bits without offsets or 4 bits with them."""
    assert wanted.symmetric == (wanted.bits == 8), wanted
    w_NGg = rows_NK.float().reshape(len(rows_NK), -1, wanted.group)
    dtype = SCALE_DTYPES[wanted.scale_dtype]
    if wanted.symmetric:
        scale = (w_NGg.abs().amax(2, keepdim=True) * (1 / 127)).to(dtype).float()
        codes, offset = (w_NGg * _inverse(scale)).clamp_(-127, 127).round_() + 128, None
    else:
        scale, offset = (found.to(dtype).float() for found in _fit(w_NGg))
        codes = _rounded(w_NGg, scale, offset)
    return Grouped(
        codes=codes.to(torch.uint8).view(rows_NK.shape).numpy(),
        bits=wanted.bits,
        group=wanted.group,
        scale=scale.squeeze(2).numpy(),
        offset=None if offset is None else offset.squeeze(2).numpy(),
        scale_dtype=wanted.scale_dtype,
    )


def _fit(w_NGg: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (N, G, 1)."""
    low, high = w_NGg.amin(2, keepdim=True), w_NGg.amax(2, keepdim=True)
    span = high - low
    scale, offset, gain = span / 15, low, torch.zeros_like(low)
    for below, above in _CUTS:
        found = _refit(w_NGg, span * ((1 - below - above) / 15), low + span * below)
        better = found[2] > gain
        scale, offset, gain = (
            torch.where(better, new, old) for new, old in zip(found, (scale, offset, gain), strict=True)
        )
    for _ in range(2):
        scale, offset, _ = _refit(w_NGg, scale, offset)
    return scale, offset


def _refit(w_NGg: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The least squares fit to the codes rounded by scale and offset, and by how much it lowers the sum of squares
    below that of the group's mean alone."""
    codes = _rounded(w_NGg, scale, offset)
    mean, codes_mean = w_NGg.mean(2, keepdim=True), codes.mean(2, keepdim=True)
    variance = (codes * codes).sum(2, keepdim=True) - codes.sum(2, keepdim=True) * codes_mean
    covariance = (codes * (w_NGg - mean)).sum(2, keepdim=True)
    slope = covariance / variance
    scale = torch.where(variance > 0, slope, scale)
    return scale, mean - scale * codes_mean, torch.where(variance > 0, covariance * slope, 0)


def _rounded(w_NGg: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return ((w_NGg - offset) * _inverse(scale)).clamp_(0, 15).round_()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0, 1 / x)
