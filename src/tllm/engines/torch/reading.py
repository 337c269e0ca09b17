"""Canonical weights by their names, from a checkpoint's files: a shard's byte ranges and nothing else.

Bytes are read, not mapped: pages of a mapped file count as the process's memory. What needs no change of type or order
is read straight into its place; the rest passes through a staging buffer. Weights that are kept in another form than
they are stored in pass through one scratch buffer, over and over, so that a shard is never held twice.

This file does not know tensor names on disk or how slices are chosen (`Checkpoint.slices` does), nor what weights make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from tllm.core.errors import ModelError
from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.models.grouped import Grouped
from tllm.models.headers import TensorInfo
from tllm.models.spec import GroupedFormat, TensorSlice

_STAGING_BYTES = 4 << 20
_RUN_BYTES = 8 << 20  # what is read is still in the cache when it is laid out
_RUN_ROWS = 64  # of which kernels lay out as many at a time
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TORCH_DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}


class WeightReader:
    """Open files and buffers live as long as the `with` block. `progress(bytes done, bytes in all)` from time to time.

    Its methods raise ModelError for a tensor that is missing, misshapen, of an unknown type or cut off by the end of
    its file.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        slices: Sequence[TensorSlice],
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._slices = {piece.target: piece for piece in slices}
        self.dtype = dtype
        self.device = device
        self._progress = progress
        self._files: dict[Path, FileIO] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._scratch = torch.empty(0, dtype=dtype)
        self._bytes_done = 0
        self._bytes_total = sum(piece.num_bytes for piece in slices)

    def __enter__(self) -> WeightReader:
        self._progress(0, self._bytes_total)
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()

    def table(self, target: str, shape: tuple[int, ...]) -> Tensor:
        """A weight as it is, on the device."""
        return self.stacked((target,), (shape[0],), shape[1:])

    def stacked(self, targets: Sequence[str], sizes: Sequence[int], rest: tuple[int, ...]) -> Tensor:
        """Weights of shape (size, *rest) each, on top of each other, on the device."""
        weight = torch.empty((sum(sizes), *rest), dtype=self.dtype)
        self.fill(weight, targets, sizes, 0)
        return weight.to(self.device)

    def runs(self, target: str, num_rows: int, num_columns: int) -> Iterator[tuple[int, Tensor]]:
        """A matrix, a run of rows at a time: the first row's number, and the rows in memory that the next run takes."""
        at_once = max(_RUN_ROWS, _RUN_BYTES // (num_columns * self.dtype.itemsize) // _RUN_ROWS * _RUN_ROWS)
        for first in range(0, num_rows, at_once):
            rows = self.scratch(min(at_once, num_rows - first), num_columns)
            self.fill(rows, (target,), (num_rows,), first)
            yield first, rows

    def scratch(self, num_rows: int, num_inputs: int) -> Tensor:
        """A matrix in the reader's type that is used anew by the next call."""
        if self._scratch.numel() < num_rows * num_inputs:
            self._scratch = torch.empty(0, dtype=self.dtype)  # first give back, then take
            self._scratch = torch.empty(num_rows * num_inputs, dtype=self.dtype)
        return self._scratch[: num_rows * num_inputs].view(num_rows, num_inputs)

    def fill(self, weight: Tensor, targets: Sequence[str], sizes: Sequence[int], first: int) -> None:
        """Rows `[first, first + len(weight))` of the stacked targets into `weight`."""
        base = 0
        for target, size in zip(targets, sizes, strict=True):
            start, stop = max(first, base), min(first + weight.shape[0], base + size)
            piece = self._piece(target, (size, *weight.shape[1:]))
            if start < stop:
                self._read_rows(piece, start - base, stop - base, weight[start - first : stop - first])
            base += size

    def stored_format(self, target: str) -> GroupedFormat | None:
        """How a weight is quantized in the checkpoint; None: it is plain there, or missing."""
        piece = self._slices.get(target)
        return None if piece is None else piece.grouped

    def grouped_runs(self, target: str, shape: tuple[int, int]) -> Iterator[tuple[int, Grouped]]:
        """A matrix that the checkpoint has quantized, a run of rows at a time: the first row's number, and the rows.

        Where rows are no runs on disk it is one run, and the whole matrix in memory.
        """
        piece = self._piece(target, shape)
        num_rows, num_columns = shape
        at_once = max(_RUN_ROWS, _RUN_BYTES // num_columns // _RUN_ROWS * _RUN_ROWS)
        if not self._checkpoint.rows_are_runs(piece):
            at_once = num_rows
        for first in range(0, num_rows, at_once):
            yield first, self._checkpoint.read_grouped(piece, self._read_part, first, min(first + at_once, num_rows))

    def _piece(self, target: str, shape: tuple[int, ...]) -> TensorSlice:
        piece = self._slices.get(target)
        if piece is None:
            raise ModelError(f"{self._checkpoint.directory} has no tensor for {target}, which this shard needs")
        if piece.shape != shape:
            raise ModelError(f"{piece.source} gives {target} the shape {piece.shape}, but the config asks for {shape}")
        if piece.source not in self._checkpoint.tensors:
            raise ModelError(f"{self._checkpoint.directory} has no tensor {piece.source}, needed for {target}")
        return piece

    def _read_rows(self, piece: TensorSlice, first: int, stop: int, out: Tensor) -> None:
        """Rows `[first, stop)` of the slice's result into `out`, which is contiguous."""
        if piece.interleaved:
            rows_in_order = self._checkpoint.read_rows(piece, self._read_part, first, stop)
            stored = torch.from_numpy(rows_in_order)
            out.copy_(stored.view(torch.bfloat16) if stored.dtype == torch.uint16 else stored)
            return
        shape = self._checkpoint.tensors[piece.source].shape
        num_columns = shape[1] if len(shape) == 2 else 1
        matrix = out.view(out.shape[0], -1)
        rows, columns = (piece.start, piece.stop), (0, num_columns)
        if piece.dim == 1:
            rows, columns = (0, shape[0]), (piece.start, piece.stop)
        if piece.transpose:
            columns = (columns[0] + first, columns[0] + stop)
            matrix = matrix.t()
        else:
            rows = (rows[0] + first, rows[0] + stop)
        self._read_rectangle(piece.source, rows, columns, num_columns, matrix)

    def _read_rectangle(
        self, source: str, rows: tuple[int, int], columns: tuple[int, int], num_columns: int, out: Tensor
    ) -> None:
        info = self._checkpoint.tensors[source]
        stored = _STORED.get(info.dtype)
        if stored is None:
            raise ModelError(f"{info.file.name}: {source} is stored as {info.dtype}; allowed are {', '.join(_STORED)}")
        row_bytes = num_columns * stored.itemsize
        whole = columns == (0, num_columns)
        used_bytes = (columns[1] - columns[0]) * stored.itemsize
        at_once = max(1, _STAGING_BYTES // row_bytes)
        for row in range(rows[0], rows[1], at_once):
            stop = min(row + at_once, rows[1])
            offset = info.offset + row * row_bytes
            target = out[row - rows[0] : stop - rows[0]]
            if whole and stored == self.dtype and target.is_contiguous():
                self._read_bytes(info.file, offset, target.view(-1).view(torch.uint8))
            else:
                staged = self._take_staging((stop - row) * row_bytes)
                self._read_bytes(info.file, offset, staged)
                target.copy_(staged.view(stored).view(stop - row, num_columns)[:, columns[0] : columns[1]])
            self._advance((stop - row) * used_bytes)

    def _take_staging(self, num_bytes: int) -> Tensor:
        if self._staging.numel() < num_bytes:
            self._staging = torch.empty(num_bytes, dtype=torch.uint8)
        return self._staging[:num_bytes]

    def _read_part(self, info: TensorInfo) -> memoryview:
        out = torch.empty(info.num_bytes, dtype=torch.uint8)
        self._read_bytes(info.file, info.offset, out)
        self._advance(info.num_bytes)
        return memoryview(out.numpy().data)

    def _advance(self, num_bytes: int) -> None:
        self._bytes_done += num_bytes
        self._progress(self._bytes_done, self._bytes_total)

    def _read_bytes(self, path: Path, offset: int, out: Tensor) -> None:
        if path not in self._files:
            try:
                self._files[path] = FileIO(path)
            except OSError as error:
                raise ModelError(f"{path} cannot be read: {error.strerror}") from error
        file = self._files[path]
        view = memoryview(out.numpy().data)
        try:
            file.seek(offset)
            while view:
                num_read = file.readinto(view)
                if not num_read:
                    raise ModelError(f"{path} ends before byte {offset + len(view)}")
                view = view[num_read:]
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error
