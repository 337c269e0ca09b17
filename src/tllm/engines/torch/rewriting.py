"""The quantization of a loading engine for whoever writes a checkpoint anew: the same codes, as arrays.

This file does not know files.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tllm.engines.torch.kernels import build, linear
from tllm.engines.torch.quantize import quantized
from tllm.models.grouped import Grouped
from tllm.models.spec import GroupedFormat


def quantize_rows(rows_NK: NDArray[np.float32], wanted: GroupedFormat) -> Grouped:
    """By the kernels where there are any, as loading on this machine would."""
    rows = torch.from_numpy(rows_NK)
    if build.library() is None:
        return quantized(rows, wanted)
    codes_NK, scale_NG, offset_NG = linear.quantize_rows(rows, wanted.bits, wanted.group)
    return Grouped(
        codes=codes_NK.numpy(),
        bits=wanted.bits,
        group=wanted.group,
        scale=scale_NG.numpy(),
        offset=None if offset_NG is None else offset_NG.numpy(),
        scale_dtype=wanted.scale_dtype,
    )
