"""Ways to make hidden states smaller before they cross a link, for measuring whether that pays.

    none            the bytes as they are
    lz4, zstd       a general compressor over them
    ...-shuffled    the same after bytes of equal significance were put together: lo hi lo hi -> lo lo hi hi
    int8            every 32 numbers of a row as integers of 8 bits and one scale of 16; what is lost is shown

                    | scale f16 | scale | ... row after row | 32 x int8 | 32 x int8 | ... row after row |

Rules:
    `decode` is total: any bytes give a matrix of exactly the shape that was said, or FrameError, and never take more
    memory than that shape.
    No number depends on another row, so that no sequence's answer depends on its batch-mates.

Steps do not use any of this: their hidden states cross as they are.
This file does not know links, nor what is sent over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tllm.core.errors import ConfigError, FrameError
from tllm.core.types import DType

Buffer = bytes | memoryview

GROUP = 32  # numbers with one scale
_ZSTD_LEVEL = 1  # the fastest of the usual ones: higher levels cost more than any network of today gives back
_MAX_INT8 = 127


class CodecName(StrEnum):
    NONE = "none"
    LZ4 = "lz4"
    ZSTD = "zstd"
    LZ4_SHUFFLED = "lz4-shuffled"
    ZSTD_SHUFFLED = "zstd-shuffled"
    INT8 = "int8"

    @property
    def lossy(self) -> bool:
        return self is CodecName.INT8


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixShape:
    """Of numbers, row after row, little-endian."""

    rows: int
    columns: int
    dtype: DType

    @property
    def num_bytes(self) -> int:
        return self.rows * self.columns * self.dtype.num_bytes


class MatrixCodec(Protocol):
    """One direction's state of one codec: calls come one at a time."""

    def encode(self, data: bytes, shape: MatrixShape) -> bytes:
        """`data` has the shape's bytes. Raises FrameError for numbers that cannot be written so."""

    def decode(self, data: Buffer, shape: MatrixShape) -> Buffer:
        """The shape's bytes. Raises FrameError for what no `encode` gave for this shape."""


def make_codec(name: CodecName) -> MatrixCodec:
    """Raises ConfigError where the codec's library is not installed."""
    match name:
        case CodecName.NONE:
            return _Plain()
        case CodecName.LZ4:
            return _Lz4()
        case CodecName.ZSTD:
            return _Zstd()
        case CodecName.LZ4_SHUFFLED:
            return _Shuffled(_Lz4())
        case CodecName.ZSTD_SHUFFLED:
            return _Shuffled(_Zstd())
        case CodecName.INT8:
            return _Int8()


def parse_codec_name(text: str) -> CodecName:
    """Raises ConfigError."""
    try:
        return CodecName(text)
    except ValueError:
        raise ConfigError(f"{text[:32]!r} is no codec. There are: {', '.join(CodecName)}.") from None


def max_encoded_bytes(shape: MatrixShape) -> int:
    """What no codec exceeds, whatever the numbers are: what does not compress grows a little."""
    return shape.num_bytes + shape.num_bytes // 128 + 2 * shape.rows * _num_groups(shape) + 1024


def relative_error(data: Buffer, decoded: Buffer, shape: MatrixShape) -> float:
    """Root mean square of what was lost, over that of the numbers."""
    before, after = (_floats(each, shape).astype(np.float64) for each in (data, decoded))
    norm = float(np.sqrt(np.mean(before**2)))
    return float(np.sqrt(np.mean((before - after) ** 2))) / norm if norm else 0.0


class _Plain:
    def encode(self, data: bytes, shape: MatrixShape) -> bytes:
        return data

    def decode(self, data: Buffer, shape: MatrixShape) -> Buffer:
        return _whole(data, shape)


class _Lz4:
    def __init__(self) -> None:
        try:
            import lz4.block
        except ModuleNotFoundError as error:
            raise _missing("lz4") from error
        self._compress: Callable[..., bytes] = lz4.block.compress
        self._decompress: Callable[..., bytes] = lz4.block.decompress
        self._error: type[Exception] = lz4.block.LZ4BlockError

    def encode(self, data: bytes, shape: MatrixShape) -> bytes:
        return self._compress(data, store_size=False)

    def decode(self, data: Buffer, shape: MatrixShape) -> Buffer:
        try:
            return _whole(self._decompress(data, uncompressed_size=shape.num_bytes), shape)
        except (self._error, ValueError) as error:
            raise FrameError("what should be compressed by lz4 is damaged") from error


class _Zstd:
    def __init__(self) -> None:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise _missing("zstandard") from error
        self._library = zstandard
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)  # kept: to make one takes a small matrix's time
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, data: bytes, shape: MatrixShape) -> bytes:
        return self._compressor.compress(data)

    def decode(self, data: Buffer, shape: MatrixShape) -> Buffer:
        try:
            # The library takes as much memory as the data says, so that is looked at first.
            if self._library.get_frame_parameters(data).content_size != shape.num_bytes:
                raise FrameError("what should be compressed by zstd has another size than was said")
            return _whole(self._decompressor.decompress(data), shape)
        except self._library.ZstdError as error:
            raise FrameError("what should be compressed by zstd is damaged") from error


class _Shuffled:
    def __init__(self, inner: MatrixCodec) -> None:
        self._inner = inner

    def encode(self, data: bytes, shape: MatrixShape) -> bytes:
        size = shape.dtype.num_bytes
        planes = np.frombuffer(data, np.uint8).reshape(-1, size)
        return self._inner.encode(b"".join(planes[:, place].tobytes() for place in range(size)), shape)

    def decode(self, data: Buffer, shape: MatrixShape) -> Buffer:
        size = shape.dtype.num_bytes
        planes = np.frombuffer(self._inner.decode(data, shape), np.uint8).reshape(size, -1)
        mixed = np.empty((planes.shape[1], size), np.uint8)
        for place in range(size):
            mixed[:, place] = planes[place]
        return mixed.tobytes()


class _Int8:
    def encode(self, data: bytes, shape: MatrixShape) -> bytes:
        groups = _num_groups(shape)
        values = np.zeros((shape.rows, groups * GROUP), np.float32)
        values[:, : shape.columns] = _floats(data, shape).reshape(shape.rows, shape.columns)
        grouped = values.reshape(-1, GROUP)
        exact = np.abs(grouped).max(axis=1, initial=0.0) / np.float32(_MAX_INT8)
        with np.errstate(over="ignore"):
            scales = exact.astype("<f2")
        # A scale that was rounded down would not reach the largest number of its group.
        scales = np.where(scales < exact, np.nextafter(scales, np.float16(np.inf)), scales).astype("<f2")
        if not np.isfinite(scales).all():
            raise FrameError("int8 cannot carry numbers that are not finite, or too large for a scale of 16 bits")
        wide = scales.astype(np.float32)[:, None]
        steps = np.divide(grouped, wide, out=np.zeros_like(grouped), where=wide > 0)
        integers = np.rint(steps, out=steps).astype(np.int8).reshape(shape.rows, -1)[:, : shape.columns]
        encoded: bytes = scales.tobytes() + integers.tobytes()
        return encoded

    def decode(self, data: Buffer, shape: MatrixShape) -> Buffer:
        groups = _num_groups(shape)
        num_scales = shape.rows * groups
        if len(data) != 2 * num_scales + shape.rows * shape.columns:
            raise FrameError(f"{len(data)} bytes are no matrix of {shape.rows} x {shape.columns} in int8")
        scales = np.frombuffer(data, "<f2", num_scales).astype(np.float32).reshape(shape.rows, groups, 1)
        integers = np.frombuffer(data, np.int8, offset=2 * num_scales).reshape(shape.rows, shape.columns)
        values = np.zeros((shape.rows, groups * GROUP), np.float32)
        values[:, : shape.columns] = integers
        with np.errstate(invalid="ignore", over="ignore"):  # a peer may send anything; it gets what it sent
            values = (values.reshape(shape.rows, groups, GROUP) * scales).reshape(shape.rows, -1)
            return _from_floats(values[:, : shape.columns], shape.dtype)


def _num_groups(shape: MatrixShape) -> int:
    """Of one row."""
    return -(-shape.columns // GROUP)


def _floats(data: Buffer, shape: MatrixShape) -> NDArray[np.float32]:
    match shape.dtype:
        case DType.FLOAT32:
            return np.frombuffer(data, "<f4")
        case DType.FLOAT16:
            return np.frombuffer(data, "<f2").astype(np.float32)
        case DType.BFLOAT16:  # the upper half of an fp32
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def _from_floats(values: NDArray[np.float32], dtype: DType) -> bytes:
    values = np.ascontiguousarray(values)
    match dtype:
        case DType.FLOAT32:
            return values.tobytes()
        case DType.FLOAT16:
            return values.astype("<f2").tobytes()
        case DType.BFLOAT16:
            return bfloat16_bytes(values)


def bfloat16_bytes(values: NDArray[Any]) -> bytes:
    """Finite numbers as bfloat16, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _whole(data: Buffer, shape: MatrixShape) -> Buffer:
    if len(data) != shape.num_bytes:
        raise FrameError(f"{len(data)} bytes where a matrix of {shape.rows} x {shape.columns} has {shape.num_bytes}")
    return data


def _missing(library: str) -> ConfigError:
    return ConfigError(f"This codec needs {library}, which is not installed here: pip install 'tllm[lab]'")
