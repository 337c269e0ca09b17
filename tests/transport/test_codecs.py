"""Codecs of matrices: what they lose, what they refuse, and that a peer's bytes never become more than was said."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.core.errors import ConfigError, FrameError
from tllm.core.types import DType
from tllm.transport.codecs import (
    GROUP,
    CodecName,
    MatrixShape,
    bfloat16_bytes,
    make_codec,
    max_encoded_bytes,
    parse_codec_name,
    relative_error,
)

LOSSLESS = [name for name in CodecName if not name.lossy]

shapes = st.builds(
    MatrixShape, rows=st.integers(1, 5), columns=st.integers(1, 2 * GROUP + 1), dtype=st.sampled_from(list(DType))
)


def numbers(shape: MatrixShape, seed: int, scale: float = 1.0) -> bytes:
    values = np.random.default_rng(seed).standard_normal(shape.rows * shape.columns).astype(np.float32) * scale
    match shape.dtype:
        case DType.FLOAT32:
            return values.tobytes()
        case DType.FLOAT16:
            return values.astype(np.float16).tobytes()
        case DType.BFLOAT16:
            return bfloat16_bytes(values)


def floats(data: bytes | memoryview, shape: MatrixShape) -> np.ndarray:
    match shape.dtype:
        case DType.FLOAT32:
            values = np.frombuffer(data, np.float32)
        case DType.FLOAT16:
            values = np.frombuffer(data, np.float16).astype(np.float32)
        case DType.BFLOAT16:
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape.rows, shape.columns).astype(np.float64)


@given(shape=shapes, data=st.data())
def test_lossless_codecs_give_back_every_bit(shape: MatrixShape, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(LOSSLESS))
    matrix = data.draw(st.binary(min_size=shape.num_bytes, max_size=shape.num_bytes))
    codec = make_codec(name)
    encoded = codec.encode(matrix, shape)
    assert len(encoded) <= max_encoded_bytes(shape)
    assert bytes(codec.decode(memoryview(encoded), shape)) == matrix


@settings(deadline=None)
@given(name=st.sampled_from(list(CodecName)), shape=shapes, junk=st.binary(max_size=600), seed=st.integers(0, 9))
def test_any_bytes_are_a_matrix_of_the_shape_or_refused(
    name: CodecName, shape: MatrixShape, junk: bytes, seed: int
) -> None:
    codec = make_codec(name)
    other = MatrixShape(rows=shape.rows + 1, columns=shape.columns, dtype=shape.dtype)
    whole = codec.encode(numbers(other, seed), other)
    for data in (junk, whole, whole[:-1], whole + b"x", codec.encode(numbers(shape, seed), shape)[:-1]):
        try:
            assert memoryview(codec.decode(data, shape)).nbytes == shape.num_bytes
        except FrameError:
            pass


@given(shape=shapes, seed=st.integers(0, 99), exponent=st.integers(-4, 3))
def test_int8_errs_by_half_a_step_of_its_group_at_most(shape: MatrixShape, seed: int, exponent: int) -> None:
    matrix = numbers(shape, seed, 10.0**exponent)
    codec = make_codec(CodecName.INT8)
    encoded = codec.encode(matrix, shape)
    assert len(encoded) <= max_encoded_bytes(shape)
    before, after = floats(matrix, shape), floats(codec.decode(encoded, shape), shape)
    for first in range(0, shape.columns, GROUP):
        largest = np.abs(before[:, first : first + GROUP]).max(axis=1, keepdims=True)
        step = 1.002 * largest / 127 + 2**-24  # the scale is rounded up, to one of fp16
        rounding = (largest + step) * {DType.FLOAT32: 1e-6, DType.FLOAT16: 2**-11, DType.BFLOAT16: 2**-8}[shape.dtype]
        error = np.abs(before - after)[:, first : first + GROUP]
        assert (error <= step / 2 + rounding + 2**-24).all()


@pytest.mark.parametrize("columns", [GROUP, 2 * GROUP + 5])
def test_no_row_of_int8_depends_on_another(columns: int) -> None:
    codec = make_codec(CodecName.INT8)
    both, one = (MatrixShape(rows=rows, columns=columns, dtype=DType.FLOAT32) for rows in (2, 1))
    quiet, loud = numbers(one, 1), numbers(one, 2, 1000.0)
    together = bytes(codec.decode(codec.encode(quiet + loud, both), both))
    apart = b"".join(bytes(codec.decode(codec.encode(row, one), one)) for row in (quiet, loud))
    assert together == apart


def test_int8_takes_eight_and_a_half_bits() -> None:
    shape = MatrixShape(rows=1, columns=8192, dtype=DType.BFLOAT16)
    assert shape.num_bytes == 16384
    encoded = make_codec(CodecName.INT8).encode(numbers(shape, 0), shape)
    assert len(encoded) == 8704


def test_the_error_of_int8_is_the_one_that_is_shown() -> None:
    shape = MatrixShape(rows=64, columns=512, dtype=DType.FLOAT32)
    matrix, codec = numbers(shape, 0), make_codec(CodecName.INT8)
    decoded = codec.decode(codec.encode(matrix, shape), shape)
    before, after = floats(matrix, shape), floats(decoded, shape)
    expected = np.linalg.norm(before - after) / np.linalg.norm(before)
    assert relative_error(matrix, decoded, shape) == pytest.approx(expected)
    # Uniform over a step of 2.4/127 (the largest of 32 normals is 2.1 sigma on average): step / sqrt(12).
    assert 0.004 < expected < 0.007
    assert relative_error(matrix, matrix, shape) == 0.0
    assert relative_error(bytes(len(matrix)), bytes(len(matrix)), shape) == 0.0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_int8_refuses_what_it_cannot_carry(value: float) -> None:
    shape = MatrixShape(rows=1, columns=2, dtype=DType.FLOAT32)
    with pytest.raises(FrameError, match="not finite, or too large"):
        make_codec(CodecName.INT8).encode(np.array([1.0, value], np.float32).tobytes(), shape)


def test_zstd_that_says_it_is_larger_is_refused_before_memory_is_taken() -> None:
    small = MatrixShape(rows=1, columns=8, dtype=DType.BFLOAT16)
    codec = make_codec(CodecName.ZSTD)
    bomb = codec.encode(bytes(64 << 20), small)
    assert len(bomb) < 1 << 14
    with pytest.raises(FrameError, match="another size"):
        codec.decode(bomb, small)


def test_a_library_that_is_missing_costs_its_own_codecs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    for name in (CodecName.LZ4, CodecName.LZ4_SHUFFLED):
        with pytest.raises(ConfigError, match=r"needs lz4.*tllm\[lab\]"):
            make_codec(name)
    for name in set(CodecName) - {CodecName.LZ4, CodecName.LZ4_SHUFFLED}:
        make_codec(name)


def test_an_unknown_codec_is_refused_with_those_there_are() -> None:
    assert parse_codec_name("zstd-shuffled") is CodecName.ZSTD_SHUFFLED
    with pytest.raises(ConfigError, match=r"'zip' is no codec.*lz4-shuffled"):
        parse_codec_name("zip")


@given(st.lists(st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99), min_size=1))
def test_bfloat16_is_rounded_to_the_nearest(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    lower = exact.view(np.uint32) >> 16 << 16  # towards 0
    upper = lower + (1 << 16)
    below, above = (abs(each.view(np.float32).astype(np.float64) - exact) for each in (lower, upper))
    odd = (lower >> 16) % 2 == 1
    expected = np.where((above < below) | ((above == below) & odd), upper, lower) >> 16
    assert np.frombuffer(bfloat16_bytes(exact), np.uint16).tolist() == expected.tolist()
