"""In which form this machine holds a shard's linears, and making them from what is read.

This file does not know layers, nor how anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import CDLL
from typing import Protocol

import torch
from torch import Tensor

from tllm.core.types import Quantization
from tllm.engines.torch.grouped import SCALE_DTYPES, GroupedLinear, GroupedTable, GroupedWeight
from tllm.engines.torch.kernels.linear import KernelLinear, Part
from tllm.engines.torch.linear import (
    PACK_BYTES,
    Linear,
    PackedLinear,
    PlainLinear,
    SideBySide,
    Table,
    TorchLinear,
    can_pack,
    pack_rows,
)
from tllm.engines.torch.quantize import quantized
from tllm.engines.torch.reading import WeightReader
from tllm.models.slicing import held_format
from tllm.models.spec import GroupedFormat


class Linears(Protocol):
    """Names are canonical ones without `.weight` and `.bias`."""

    def linear(self, names: Sequence[str], sizes: Sequence[int], num_inputs: int, *, bias: bool) -> Linear:
        """The linears of these names side by side, as one."""

    def table(self, name: str, num_rows: int, num_columns: int) -> Table:
        """The embedding."""


def linears_for(reader: WeightReader, quantization: Quantization | None, library: CDLL | None) -> Linears:
    """Of the kernels on a CPU if there is a library of them."""
    if library is not None and reader.device.type == "cpu":
        return KernelLinears(reader, quantization)
    return TorchLinears(reader, quantization)


class KernelLinears:
    """In the kernels' layout, filled from one scratch buffer."""

    def __init__(self, reader: WeightReader, quantization: Quantization | None) -> None:
        self._read = reader
        self._quantization = quantization

    def linear(self, names: Sequence[str], sizes: Sequence[int], num_inputs: int, *, bias: bool) -> Linear:
        parts = [self._part(name + ".weight", size, num_inputs) for name, size in zip(names, sizes, strict=True)]
        return KernelLinear(parts, self._read.stacked([n + ".bias" for n in names], sizes, ()) if bias else None)

    def table(self, name: str, num_rows: int, num_columns: int) -> Table:
        return _KernelTable(self._part(name + ".weight", num_rows, num_columns), self._read.dtype)

    def _part(self, target: str, num_rows: int, num_inputs: int) -> Part:
        read = self._read
        if read.stored_format(target) is not None:
            return self._stored_part(target, num_rows, num_inputs)
        held = _held(target, num_inputs, self._quantization)
        if held is None:
            part = Part.empty(num_rows, num_inputs, read.dtype)
        else:
            part = Part.empty_quantized(
                num_rows,
                num_inputs,
                held.bits,
                held.group,
                SCALE_DTYPES[held.scale_dtype],
                offsets=not held.symmetric,
            )
        for first, rows in read.runs(target, num_rows, num_inputs):
            part.fill(first, rows)
        return part

    def _stored_part(self, target: str, num_rows: int, num_inputs: int, scale_dtype: torch.dtype | None = None) -> Part:
        """The first rows choose the type of the scales; where it turns out too narrow, all begins again in fp32."""
        part: Part | None = None
        for first, rows in self._read.grouped_runs(target, (num_rows, num_inputs)):
            wanted = SCALE_DTYPES[rows.scale_dtype]
            if part is not None and wanted.itemsize > part.scale_dtype.itemsize:
                return self._stored_part(target, num_rows, num_inputs, wanted)
            if part is None:
                part = Part.empty_quantized(
                    num_rows,
                    num_inputs,
                    rows.bits,
                    rows.group,
                    scale_dtype or wanted,
                    offsets=rows.offset is not None,
                    input_order=None if rows.input_order is None else torch.from_numpy(rows.input_order),
                )
            offset = None if rows.offset is None else torch.from_numpy(rows.offset)
            part.fill_codes(first, torch.from_numpy(rows.codes), torch.from_numpy(rows.scale), offset)
        assert part is not None
        return part


class _KernelTable:
    def __init__(self, part: Part, dtype: torch.dtype) -> None:
        self._part = part
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        return self._part.num_bytes

    def rows(self, ids_T: Tensor) -> Tensor:
        return self._part.rows(ids_T, self._dtype)

    def head(self, bias_V: Tensor | None) -> Linear:
        return KernelLinear([self._part], bias_V)


class TorchLinears:
    """Plain weights, or oneDNN's layout where that is faster; quantized ones spelled out at every use."""

    def __init__(self, reader: WeightReader, quantization: Quantization | None) -> None:
        self._read = reader
        self._quantization = quantization

    def linear(self, names: Sequence[str], sizes: Sequence[int], num_inputs: int, *, bias: bool) -> Linear:
        read = self._read
        targets = [name + ".weight" for name in names]
        bias_N = read.stacked([name + ".bias" for name in names], sizes, ()) if bias else None
        if any(self._format(target, num_inputs) is not None for target in targets):
            parts = [self._part(target, size, num_inputs) for target, size in zip(targets, sizes, strict=True)]
            return SideBySide(parts, bias_N)
        if not can_pack(read.device, read.dtype):
            return PlainLinear(read.stacked(targets, sizes, (num_inputs,)), bias_N)
        num_outputs = sum(sizes)
        row_bytes = num_inputs * read.dtype.itemsize
        num_packs = math.ceil(num_outputs * row_bytes / PACK_BYTES)
        num_rows = math.ceil(num_outputs / num_packs)
        packed: list[Tensor] = []
        rows: list[int] = []
        for first in range(0, num_outputs, num_rows):
            stop = min(first + num_rows, num_outputs)
            weight = read.scratch(stop - first, num_inputs)
            read.fill(weight, targets, sizes, first)
            packed.append(pack_rows(weight))
            rows.append(stop - first)
        weight_bytes = num_outputs * row_bytes
        bias_bytes = 0 if bias_N is None else bias_N.nbytes
        return PackedLinear(packed, rows, bias_N, weight_bytes + bias_bytes)

    def table(self, name: str, num_rows: int, num_columns: int) -> Table:
        target = name + ".weight"
        if self._format(target, num_columns) is not None:
            return GroupedTable(self._grouped(target, num_rows, num_columns), self._read.dtype)
        return PlainLinear(self._read.table(target, (num_rows, num_columns)))

    def _part(self, target: str, num_rows: int, num_inputs: int) -> TorchLinear:
        if self._format(target, num_inputs) is None:
            return PlainLinear(self._read.table(target, (num_rows, num_inputs)))
        return GroupedLinear(self._grouped(target, num_rows, num_inputs))

    def _format(self, target: str, num_inputs: int) -> GroupedFormat | None:
        return self._read.stored_format(target) or _held(target, num_inputs, self._quantization)

    def _grouped(self, target: str, num_rows: int, num_inputs: int) -> GroupedWeight:
        read = self._read
        if read.stored_format(target) is not None:
            stored = [rows for _, rows in read.grouped_runs(target, (num_rows, num_inputs))]
            return GroupedWeight(stored, read.device)
        wanted = _held(target, num_inputs, self._quantization)
        assert wanted is not None
        return GroupedWeight(
            [quantized(rows, wanted) for _, rows in read.runs(target, num_rows, num_inputs)], read.device
        )


def _held(target: str, num_inputs: int, quantization: Quantization | None) -> GroupedFormat | None:
    """How a weight that is stored plain is held; None: plain."""
    return None if quantization is None else held_format(target, num_inputs, quantization)
