"""Quantized matrices as arrays: codes, and one scale and offset for every group of inputs.

    value[n, k] = scale[n, k // group] * codes[n, k] + offset[n, k // group]

Codes are unsigned. Without offsets they are counted from the middle: offset = -128 * scale with 8 bits, -8 * scale
with 4. Whatever a checkpoint stores, this is what it becomes.

Packed, the codes of a row follow each other from the low bits of each little-endian word to the high ones, so that two
codes of 4 bits share a byte, the first in its low half.

This file does not know in which formats weights are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RUN = 1 << 18  # bytes unpacked at a time

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grouped:
    """A matrix (N, K) in G = K / group groups per row.

    `scale_dtype` is the type in which scales and offsets can be held without loss; or, of formats whose scales are
    products, to within 2^-11 (`layouts.py`). With `input_order`, column i of the codes belongs to input
    `input_order[i]`.
    """

    codes: Bytes  # (N, K)
    bits: int  # 4 or 8
    group: int
    scale: Floats  # (N, G)
    offset: Floats | None  # (N, G)
    scale_dtype: str  # F32, F16 or BF16
    input_order: NDArray[np.int32] | None = None  # (K,)

    def dequantized(self) -> Floats:
        """(N, K) in fp32, columns in the order of the inputs."""
        num_rows, num_inputs = self.codes.shape
        codes = self.codes.reshape(num_rows, -1, self.group)
        if self.offset is None:
            middle = np.float32(1 << (self.bits - 1))
            values = (codes.astype(np.float32) - middle) * self.scale[:, :, None]
        else:
            values = codes * self.scale[:, :, None] + self.offset[:, :, None]
        values = values.reshape(num_rows, num_inputs)
        if self.input_order is None:
            return values
        ordered = np.empty_like(values)
        ordered[:, self.input_order] = values
        return ordered


def unpacked(packed: Bytes, bits: int) -> Bytes:
    """Codes (N, K) of bytes (N, K * bits / 8)."""
    if bits == 8:
        return packed
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    pairs = codes.view("<u2")
    at_once = max(1, _RUN // max(1, packed.shape[1]))
    for first in range(0, len(packed), at_once):
        wide = packed[first : first + at_once].astype("<u2")
        pairs[first : first + at_once] = (wide | wide << 4) & 0x0F0F
    return codes


def packed(codes: Bytes, bits: int) -> Bytes:
    """The reverse of `unpacked`; with 4 bits, K is even."""
    return codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)


def widened(stored: NDArray[np.generic], dtype: str) -> Floats:
    """In fp32, of values stored as F32, F16 or BF16 (as its bits)."""
    if dtype == "BF16":
        return (stored.astype("<u4") << 16).view("<f4")
    return stored.astype("<f4")


def narrowed(values: Floats, dtype: str) -> NDArray[np.generic]:
    """As F32, F16 or BF16 (as its bits) are stored, rounded to nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        rounded: NDArray[np.generic] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return rounded
    return values.astype("<f4" if dtype == "F32" else "<f2")
