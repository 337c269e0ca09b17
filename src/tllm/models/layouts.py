"""How quantized weights lie on disk, format by format: which rectangles of which tensors make a part of a matrix, and
from their bytes to codes, scales and offsets. N outputs, K inputs, g inputs to a group, b bits.

    MLX     weight (N, K b/32) words, scales (N, K/g), biases (N, K/g): the offsets. As `mlx.core.quantize` makes them.
            tllm's own: the same with one group to a row, or without biases; see docs/guides/quantization.md
    GPTQ    qweight (K b/32, N) words along K; qzeros (K/g, N b/32) words along N; scales (K/g, N); g_idx (K,): the
            group of each input. value = scale * (code - zero), in the first version of the format zeros are stored
            less one. With activation order, groups are not runs of inputs: then codes are taken group by group
    AWQ     qweight (K, N/8), qzeros (K/g, N/8): words of 4 bits along N, of whose eight columns the order from the low
            bits is 0 2 4 6 1 3 5 7; scales (K/g, N)
    ggml    rows of blocks of 32 or 256 inputs, each with its scales in fp16 (ggml-common.h, ggml-quants.c):
              Q4_0  d, 16 bytes: value = d * (code - 8); the low halves are codes 0-15, the high ones 16-31
              Q4_1  d, m, 16 bytes: d * code + m                Q8_0  d, 32 signed bytes: d * code
              Q5_0  d, 32 fifth bits, 16 bytes: d * (code - 16) Q5_1  d, m, 32 fifth bits, 16 bytes: d * code + m
              Q4_K  d, e, 8 scales s and 8 minima m of 6 bits, 128 bytes: d * s * code - e * m, in groups of 32
              Q5_K  the same with 32 bytes of fifth bits before the 128
              Q6_K  128 bytes of low and 64 of high bits, 16 signed scales s, d: d * s * (code - 32), in groups of 16

The products d * s and e * m are rounded to fp16 to be held, unless a row's largest is no normal number there.

This file does not know files or names.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tllm.core.errors import ModelError
from tllm.models.grouped import Bytes, Floats, Grouped, unpacked, widened
from tllm.models.headers import BLOCKS, ELEMENT_BYTES, TensorInfo
from tllm.models.spec import GroupedFormat

Array = NDArray[np.generic]
Read = Callable[[TensorInfo], "bytes | bytearray | memoryview"]  # the `num_bytes` at `offset` of `file`

_LEAST_GROUP: Final = 16  # what engines compute with
_RUN: Final = 1 << 18  # weights decoded at a time
_NUMPY: Final[Mapping[str, str]] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "I32": "<i4", "U8": "u1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A rectangle of a stored tensor. Columns are its elements; of ggml's types, its blocks."""

    name: str
    rows: range
    columns: range

    def num_bytes(self, info: TensorInfo) -> int:
        return len(self.rows) * len(self.columns) * _column_bytes(info)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight(ABC):
    """One quantized matrix (N, K) on disk. `names` are its tensors, that of the codes first."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    format: GroupedFormat

    @property
    def rows_are_runs(self) -> bool:
        """Whether some of its outputs can be read without reading all around them."""
        return True

    @abstractmethod
    def bands(self, rows: range, columns: range) -> tuple[Band, ...]:
        """What has to be read for these outputs and inputs, one band per tensor."""

    @abstractmethod
    def decoded(self, rows: range, columns: range, arrays: Sequence[Array]) -> Grouped:
        """That part of the matrix, from the arrays of its bands. Raises ModelError."""

    def part_format(self, columns: range) -> GroupedFormat:
        """How a part with these inputs is quantized: in smaller groups if it begins or ends within one.

        Raises ModelError when those would be too small to compute with.
        """
        group = self.format.group
        if len(columns) < self.shape[1]:
            one = columns.start // group == (columns.stop - 1) // group
            group = len(columns) if one else math.gcd(columns.start, columns.stop, group)
            if group % _LEAST_GROUP:
                raise ModelError(
                    f"{self.names[0]} is quantized in groups of {self.format.group} inputs, which ranks with inputs "
                    f"{columns.start} to {columns.stop} cannot divide; use fewer ranks."
                )
        return replace(self.format, group=group)

    def read(self, tensors: Mapping[str, TensorInfo], rows: range, columns: range, read: Read) -> Grouped:
        """These outputs and inputs. Raises ModelError for a file that is cut off or contradicts itself."""
        bands = self.bands(rows, columns)
        return self.decoded(rows, columns, [read_band(tensors[band.name], band, read) for band in bands])

    def _groups(self, columns: range) -> range:
        group = self.format.group
        return range(columns.start // group, -(-columns.stop // group))

    def _cut(self, columns: range, codes: Bytes, first: int, scale: Floats, offset: Floats | None) -> Grouped:
        """From codes that begin at input `first`, and scales of all groups that the inputs touch."""
        made = self.part_format(columns)
        begin = columns.start - first
        codes = codes[:, begin : begin + len(columns)]
        if made.group != self.format.group:
            index = np.arange(columns.start, columns.stop, made.group) // self.format.group
            index -= columns.start // self.format.group
            scale, offset = scale[:, index], None if offset is None else offset[:, index]
        return Grouped(
            codes=np.require(codes, requirements=("C", "W")),
            bits=made.bits,
            group=made.group,
            scale=np.ascontiguousarray(scale),
            offset=None if offset is None else np.ascontiguousarray(offset),
            scale_dtype=made.scale_dtype,
        )


def read_band(info: TensorInfo, band: Band, read: Read) -> Array:
    """(rows, columns), of ggml's types (rows, blocks, bytes of a block). Whole rows are read at once."""
    column_bytes = _column_bytes(info)
    row_bytes = info.num_bytes // _num_rows(info)
    begin, size = band.columns.start * column_bytes, len(band.columns) * column_bytes
    data: bytes | bytearray | memoryview
    if size == row_bytes:
        data = read(replace(info, offset=info.offset + band.rows.start * row_bytes, num_bytes=band.num_bytes(info)))
    else:
        starts = (info.offset + row * row_bytes + begin for row in band.rows)
        data = b"".join(read(replace(info, offset=start, num_bytes=size)) for start in starts)
    if info.dtype in BLOCKS:
        return np.frombuffer(data, np.uint8).reshape(len(band.rows), len(band.columns), column_bytes)
    return np.frombuffer(data, _NUMPY[info.dtype]).reshape(len(band.rows), len(band.columns))


def _column_bytes(info: TensorInfo) -> int:
    return BLOCKS[info.dtype][1] if info.dtype in BLOCKS else ELEMENT_BYTES[info.dtype]


def _num_rows(info: TensorInfo) -> int:
    return info.shape[0] if len(info.shape) == 2 else 1


# ------------------------------------------------------------------------------------------------------ MLX, and tllm


@dataclass(frozen=True, slots=True, kw_only=True)
class WordWeight(StoredWeight):
    """`names`: weight, scales, and biases unless the format is symmetric."""

    word_codes: int  # codes in an element of weight

    def bands(self, rows: range, columns: range) -> tuple[Band, ...]:
        words = range(columns.start // self.word_codes, -(-columns.stop // self.word_codes))
        groups = self._groups(columns)
        weight, *others = self.names
        return (
            Band(name=weight, rows=rows, columns=words),
            *(Band(name=name, rows=rows, columns=groups) for name in others),
        )

    def decoded(self, rows: range, columns: range, arrays: Sequence[Array]) -> Grouped:
        words, *others = arrays
        codes = unpacked(words.view(np.uint8), self.format.bits)
        scale, *biases = (widened(values, self.format.scale_dtype) for values in others)
        first = columns.start // self.word_codes * self.word_codes
        return self._cut(columns, codes, first, scale, biases[0] if biases else None)


# ------------------------------------------------------------------------------------------------------ GPTQ and AWQ


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqWeight(StoredWeight):
    """`names`: qweight, scales, qzeros, and g_idx where there is one."""

    zero_shift: int  # what is added to stored zeros
    stored_scale_dtype: str
    ordered: bool  # groups may be any sets of inputs

    @property
    def rows_are_runs(self) -> bool:
        return False

    def part_format(self, columns: range) -> GroupedFormat:
        if self.ordered and len(columns) < self.shape[1]:
            raise ModelError(
                f"{self.names[0]} has its inputs in activation order (desc_act), which ranks cannot divide; use one."
            )
        return StoredWeight.part_format(self, columns)

    def bands(self, rows: range, columns: range) -> tuple[Band, ...]:
        per_word = 32 // self.format.bits
        groups = self._groups(columns)
        words = range(columns.start // per_word, -(-columns.stop // per_word))
        zeros = range(rows.start // per_word, -(-rows.stop // per_word))
        weight, scales, qzeros, *g_idx = self.names
        return (
            Band(name=weight, rows=words, columns=rows),
            Band(name=scales, rows=groups, columns=rows),
            Band(name=qzeros, rows=groups, columns=zeros),
            *(Band(name=name, rows=range(1), columns=columns) for name in g_idx),
        )

    def decoded(self, rows: range, columns: range, arrays: Sequence[Array]) -> Grouped:
        words, scales, zero_words, *g_idx = arrays
        bits = self.format.bits
        per_word = 32 // bits
        codes = unpacked(np.ascontiguousarray(words.T).view(np.uint8), bits)
        scale = widened(scales, self.stored_scale_dtype).T
        zeros = unpacked(np.ascontiguousarray(zero_words).view(np.uint8), bits).astype(np.int32) + self.zero_shift
        begin = rows.start % per_word
        zero = zeros[:, begin : begin + len(rows)].T
        offset = None if self.format.symmetric else -scale * zero.astype(np.float32)
        if self.format.symmetric and not (zero == 1 << (bits - 1)).all():
            raise ModelError(f"{self.names[2]} has zero points, but the config says that there are none (sym).")
        made = self._cut(columns, codes, columns.start // per_word * per_word, scale, offset)
        if not g_idx:
            return made
        index = g_idx[0][0].astype(np.int64)
        if (index == np.arange(columns.start, columns.stop) // self.format.group).all():
            return made
        order = np.argsort(index, kind="stable").astype(np.int32)
        if not self.ordered or (index[order] != np.arange(self.shape[1]) // self.format.group).any():
            raise ModelError(
                f"{self.names[3]} does not put {self.format.group} inputs in each group; the checkpoint is damaged."
            )
        return replace(made, codes=np.ascontiguousarray(made.codes[:, order]), input_order=order)


_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each half byte of a word, from the low bits


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqWeight(StoredWeight):
    """`names`: qweight, scales, qzeros."""

    stored_scale_dtype: str

    @property
    def rows_are_runs(self) -> bool:
        return False

    def bands(self, rows: range, columns: range) -> tuple[Band, ...]:
        groups = self._groups(columns)
        words = range(rows.start // 8, -(-rows.stop // 8))
        weight, scales, qzeros = self.names
        return (
            Band(name=weight, rows=columns, columns=words),
            Band(name=scales, rows=groups, columns=rows),
            Band(name=qzeros, rows=groups, columns=words),
        )

    def decoded(self, rows: range, columns: range, arrays: Sequence[Array]) -> Grouped:
        words, scales, zero_words = arrays
        begin = rows.start % 8
        codes = _awq_columns(words)[begin : begin + len(rows)]
        zero = _awq_columns(zero_words)[begin : begin + len(rows)]
        scale = widened(scales, self.stored_scale_dtype).T
        return self._cut(columns, codes, columns.start, scale, -scale * zero.astype(np.float32))


def _awq_columns(words: Array) -> Bytes:
    """(N, K) codes of (K, N/8) words."""
    num_rows, num_words = words.shape
    codes = np.empty((num_words, 8, num_rows), np.uint8)
    bytes_NK = np.ascontiguousarray(words).view(np.uint8).reshape(num_rows, num_words, 4)
    for place, column in enumerate(_AWQ_ORDER):
        pair = bytes_NK[:, :, place // 2].T
        codes[:, column] = pair >> 4 if place % 2 else pair & 15
    return codes.reshape(num_words * 8, num_rows)


# ------------------------------------------------------------------------------------------------------ ggml


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeight(StoredWeight):
    """`interleaved`: of so many rows for a head, the first half lie at the even places, the second at the odd."""

    dtype: str
    interleaved: int = 0

    def bands(self, rows: range, columns: range) -> tuple[Band, ...]:
        size, _ = BLOCKS[self.dtype]
        blocks = range(columns.start // size, -(-columns.stop // size))
        return (Band(name=self.names[0], rows=whole_heads(rows, self.interleaved), columns=blocks),)

    def decoded(self, rows: range, columns: range, arrays: Sequence[Array]) -> Grouped:
        blocks = np.asarray(arrays[0], np.uint8)
        num_rows, num_blocks, block_bytes = blocks.shape
        size, _ = BLOCKS[self.dtype]
        codes, scale, offset = _decoded(blocks.reshape(-1, block_bytes), self.dtype)
        codes = codes.reshape(num_rows, num_blocks * size)
        scale = scale.reshape(num_rows, -1)
        offset = None if offset is None else offset.reshape(num_rows, -1)
        if self.interleaved:
            order = stored_rows(rows, self.interleaved)
            codes, scale = codes[order], scale[order]
            offset = None if offset is None else offset[order]
        base = columns.start // size * size
        groups = self._groups(columns)
        skipped = groups.start - base // self.format.group
        scale = scale[:, skipped : skipped + len(groups)]
        offset = None if offset is None else offset[:, skipped : skipped + len(groups)]
        made = self._cut(columns, codes, base, scale, offset)
        fits = all(_fits_half(values) for values in (made.scale, made.offset) if values is not None)
        return made if fits else replace(made, scale_dtype="F32")


def whole_heads(rows: range, interleaved: int) -> range:
    """The rows of all heads that these rows are of, as they lie on disk; without interleaving, the rows."""
    if not interleaved:
        return rows
    return range(rows.start // interleaved * interleaved, -(-rows.stop // interleaved) * interleaved)


def stored_rows(rows: range, interleaved: int) -> NDArray[np.int64]:
    """Where these rows of interleaved heads lie, counted from the first of `whole_heads`."""
    row = np.arange(rows.start, rows.stop)
    head, place = row // interleaved, row % interleaved
    half = interleaved // 2
    return head * interleaved + place % half * 2 + place // half - whole_heads(rows, interleaved).start


def _fits_half(values: Floats) -> bool:
    """Whether fp16 holds the values to within 2^-11 of the largest of their row."""
    largest = np.abs(values).max(axis=1, initial=0)
    return bool(((largest == 0) | ((largest >= 2.0**-14) & (largest < 65504))).all())


_Decoded = tuple[Bytes, Floats, "Floats | None"]  # codes (B, block), scales and offsets (B, groups)


def _decoded(blocks: Bytes, dtype: str) -> _Decoded:
    """A run of blocks at a time: what is made on the way to codes takes several times their memory."""
    size, _ = BLOCKS[dtype]
    codes = np.empty((len(blocks), size), np.uint8)
    num_groups = size // BLOCK_FORMATS[dtype].group
    scale = np.empty((len(blocks), num_groups), "<f4")
    offset = None if BLOCK_FORMATS[dtype].symmetric else np.empty((len(blocks), num_groups), "<f4")
    at_once = _RUN // size
    for first in range(0, len(blocks), at_once):
        run = slice(first, first + at_once)
        codes[run], scale[run], offsets = _DECODERS[dtype](blocks[run])
        if offset is not None and offsets is not None:
            offset[run] = offsets
    return codes, scale, offset


def _half(blocks: Bytes, at: int) -> Floats:
    """The fp16 at byte `at` of each block, (B, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype("<f4")


def _halves(data: Bytes) -> Bytes:
    """The low halves of the bytes of each block, then the high ones."""
    return np.concatenate((data & 15, data >> 4), axis=1)


def _fifth(blocks: Bytes, at: int) -> Bytes:
    """16 times bit j of the word at byte `at`, for code j of 32."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") * np.uint8(16)


def _q4_0(blocks: Bytes) -> _Decoded:
    return _halves(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> _Decoded:
    return _halves(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> _Decoded:
    codes = _halves(blocks[:, 6:]) | _fifth(blocks, 2)
    return codes + np.uint8(128 - 16), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> _Decoded:
    return _halves(blocks[:, 8:]) | _fifth(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> _Decoded:
    return blocks[:, 2:] ^ np.uint8(0x80), _half(blocks, 0), None


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """The products d * s and -e * m of the 8 groups of a block: bytes 0-3 hold the low six bits of scales 0-3, bytes
    4-7 those of minima 0-3, bytes 8-11 the low four of scales and minima 4-7, whose high two top the first eight."""
    low, middle, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((low & 63, rest & 15 | low >> 6 << 4), axis=1)
    minima = np.concatenate((middle & 63, rest >> 4 | middle >> 6 << 4), axis=1)
    return _half(blocks, 0) * scales.astype("<f4"), -(_half(blocks, 2) * minima.astype("<f4"))


def _k_halves(data: Bytes) -> Bytes:
    """Codes of 128 bytes: of every 32 bytes the low halves, then the high ones."""
    quarters = data.reshape(-1, 4, 1, 32)
    return np.concatenate((quarters & 15, quarters >> 4), axis=2).reshape(len(data), 256)


def _q4_k(blocks: Bytes) -> _Decoded:
    return _k_halves(blocks[:, 16:]), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> _Decoded:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = (blocks[:, None, 16:48] >> shifts & np.uint8(1)) * np.uint8(16)
    return _k_halves(blocks[:, 48:]) | fifth.reshape(-1, 256), *_k_scales(blocks)


def _q6_k(blocks: Bytes) -> _Decoded:
    halves = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate((halves & 15, halves >> 4), axis=2).reshape(-1, 256)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)) * np.uint8(16)
    codes = (low | high.reshape(-1, 256)) + np.uint8(128 - 32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype("<f4")
    return codes, _half(blocks, 208) * scales, None


_DECODERS: Final[Mapping[str, Callable[[Bytes], _Decoded]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip

# Codes of five bits take eight: nothing computes with five.
BLOCK_FORMATS: Final[Mapping[str, GroupedFormat]] = {
    "Q4_0": GroupedFormat(bits=4, group=32, symmetric=True, scale_dtype="F16"),
    "Q4_1": GroupedFormat(bits=4, group=32, symmetric=False, scale_dtype="F16"),
    "Q5_0": GroupedFormat(bits=8, group=32, symmetric=True, scale_dtype="F16"),
    "Q5_1": GroupedFormat(bits=8, group=32, symmetric=False, scale_dtype="F16"),
    "Q8_0": GroupedFormat(bits=8, group=32, symmetric=True, scale_dtype="F16"),
    "Q4_K": GroupedFormat(bits=4, group=32, symmetric=False, scale_dtype="F16"),
    "Q5_K": GroupedFormat(bits=8, group=32, symmetric=False, scale_dtype="F16"),
    "Q6_K": GroupedFormat(bits=8, group=16, symmetric=True, scale_dtype="F16"),
}
