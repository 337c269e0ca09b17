"""From a checkpoint's files to a shard's weights, reading the shard's byte ranges and nothing else.

Bytes are read, not mapped: pages of a mapped file count as the process's memory. What needs no change of type or order
is read straight into its place; the rest passes through a staging buffer. A linear that is packed is read into one
scratch buffer of at most `PACK_BYTES`, over and over, so that a shard is never held twice. Projections that share an
input become one: q, k, v -> qkv, gate, up -> up. A shard that comes after another keeps the other's tables, layers and
ends that it has too, and reads the rest.

This file does not know tensor names on disk or how slices are chosen (`Checkpoint.slices` does), nor any computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from tllm.core.errors import ModelError
from tllm.core.types import DType
from tllm.engines.torch.decoder import DecoderWeights, LayerNorm, LayerWeights, Norm, RMSNorm
from tllm.engines.torch.linear import PACK_BYTES, Linear, PackedLinear, PlainLinear, can_pack, pack_rows
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import LearnedPositions, MlpKind, ModelSpec, NormKind, Shard, TensorSlice

_STAGING_BYTES = 4 << 20
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TORCH_DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}


def no_weights(spec: ModelSpec) -> DecoderWeights:
    """What a shard has before it is loaded."""
    return DecoderWeights(embed=None, positions=None, layers={}, norm=None, head=None, tied=spec.tied)


def keep(weights: DecoderWeights, shard: Shard) -> DecoderWeights:
    """Those of the weights that another shard of the same model has as they are.

    A tied head is the plain embedding on a stage that has both, and a weight of its own, packed where that is faster,
    on a stage without the embedding: when the one becomes the other, the head is made anew.
    """
    same_head = not weights.tied or (weights.embed is not None) == shard.embed
    return replace(
        weights,
        embed=weights.embed if shard.embed else None,
        positions=weights.positions if shard.embed else None,
        layers={layer: weights.layers[layer] for layer in shard.layers if layer in weights.layers},
        norm=weights.norm if shard.head else None,
        head=weights.head if shard.head and same_head else None,
    )


def missing(checkpoint: Checkpoint, shard: Shard, kept: DecoderWeights) -> tuple[TensorSlice, ...]:
    """The slices of the shard that are not in `kept`. Raises ModelError when the shard is no part of the model."""
    ends = {"embed": kept.embed, "positions": kept.positions, "norm": kept.norm, "head": kept.head}

    def is_missing(target: str) -> bool:
        part, name, *_ = target.split(".")
        return int(name) not in kept.layers if part == "layers" else ends[part] is None

    return tuple(piece for piece in checkpoint.slices(shard) if is_missing(piece.target))


def load_weights(
    checkpoint: Checkpoint,
    shard: Shard,
    dtype: DType,
    device: torch.device,
    progress: Callable[[int, int], None],
    kept: DecoderWeights | None = None,
) -> DecoderWeights:
    """The shard in the given type on the device: what `keep` kept for it, and the rest read.

    Raises ModelError for a tensor that is missing, misshapen, of an unknown type or cut off by the end of its file.
    """
    kept = kept or no_weights(checkpoint.spec)
    with _Reader(checkpoint, missing(checkpoint, shard, kept), TORCH_DTYPES[dtype], device, progress) as reader:
        return _Assembler(checkpoint, shard, reader, kept).weights()


class _Assembler:
    """Which slices make which weight, if it is not kept."""

    def __init__(self, checkpoint: Checkpoint, shard: Shard, reader: _Reader, kept: DecoderWeights) -> None:
        self._spec = checkpoint.spec
        self._shard = shard
        self._read = reader
        self._kept = kept

    def weights(self) -> DecoderWeights:
        spec, shard, read, kept = self._spec, self._shard, self._read, self._kept
        width, vocab = spec.hidden_size, spec.vocab_size
        embed, positions, norm, head = kept.embed, kept.positions, kept.norm, kept.head
        if shard.embed and embed is None:
            embed = read.table("embed.weight", (vocab, width))
        if shard.embed and positions is None and isinstance(spec.positions, LearnedPositions):
            positions = read.table("positions.weight", (spec.positions.num_positions, width))
        layers = {
            layer: kept.layers[layer] if layer in kept.layers else self._layer(f"layers.{layer}.")
            for layer in shard.layers
        }
        if shard.head and norm is None:
            norm = self._norm("norm")
        if shard.head and head is None:
            if spec.tied and embed is not None:
                head = PlainLinear(embed, read.table("head.bias", (vocab,)) if spec.head_bias else None)
            else:
                head = read.linear(("head",), (vocab,), width, bias=spec.head_bias)
        return DecoderWeights(embed=embed, positions=positions, layers=layers, norm=norm, head=head, tied=spec.tied)

    def _layer(self, prefix: str) -> LayerWeights:
        spec, read = self._spec, self._read
        width, inner, head_dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
        q_size = spec.num_heads * head_dim
        qkv_names, qkv_sizes = (prefix + "q", prefix + "k", prefix + "v"), (q_size, spec.kv_size, spec.kv_size)
        ups = {MlpKind.GATED: (prefix + "gate", prefix + "up"), MlpKind.PLAIN: (prefix + "up",)}[spec.mlp]
        return LayerWeights(
            attention_norm=self._norm(prefix + "attention_norm"),
            qkv=read.linear(qkv_names, qkv_sizes, width, bias=spec.qkv_bias),
            q_norm=self._head_norm(prefix + "q_norm") if spec.qk_norm else None,
            k_norm=self._head_norm(prefix + "k_norm") if spec.qk_norm else None,
            o=read.linear((prefix + "o",), (width,), q_size, bias=spec.output_bias),
            mlp_norm=self._norm(prefix + "mlp_norm"),
            up=read.linear(ups, (inner,) * len(ups), width, bias=spec.mlp_bias),
            down=read.linear((prefix + "down",), (width,), inner, bias=spec.mlp_bias),
        )

    def _norm(self, name: str) -> Norm:
        shape, eps = (self._spec.hidden_size,), self._spec.norm_eps
        weight = self._read.table(name + ".weight", shape)
        match self._spec.norm:
            case NormKind.RMS:
                return RMSNorm(weight=weight, eps=eps)
            case NormKind.LAYER:
                return LayerNorm(weight=weight, bias=self._read.table(name + ".bias", shape), eps=eps)

    def _head_norm(self, name: str) -> RMSNorm:
        return RMSNorm(weight=self._read.table(name + ".weight", (self._spec.head_dim,)), eps=self._spec.norm_eps)


class _Reader:
    """Reads canonical weights by their names. Open files and buffers live as long as the `with` block."""

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
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._files: dict[Path, FileIO] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._scratch = torch.empty(0, dtype=dtype)
        self._bytes_done = 0
        self._bytes_total = sum(piece.num_bytes for piece in slices)

    def __enter__(self) -> _Reader:
        self._progress(0, self._bytes_total)
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()

    def table(self, target: str, shape: tuple[int, ...]) -> Tensor:
        """A weight as it is, on the device."""
        return self._stacked((target,), (shape[0],), shape[1:])

    def linear(self, names: Sequence[str], sizes: Sequence[int], num_inputs: int, *, bias: bool) -> Linear:
        """The linears of these names on top of each other, as one."""
        targets = [name + ".weight" for name in names]
        bias_N = self._stacked([name + ".bias" for name in names], sizes, ()) if bias else None
        if not can_pack(self._device, self._dtype):
            return PlainLinear(self._stacked(targets, sizes, (num_inputs,)), bias_N)
        num_outputs = sum(sizes)
        row_bytes = num_inputs * self._dtype.itemsize
        num_packs = math.ceil(num_outputs * row_bytes / PACK_BYTES)
        num_rows = math.ceil(num_outputs / num_packs)
        packed, rows = [], []
        for first in range(0, num_outputs, num_rows):
            stop = min(first + num_rows, num_outputs)
            weight = self._take_scratch(stop - first, num_inputs)
            self._fill(weight, targets, sizes, first)
            packed.append(pack_rows(weight))
            rows.append(stop - first)
        weight_bytes = num_outputs * row_bytes
        bias_bytes = 0 if bias_N is None else bias_N.nbytes
        return PackedLinear(packed, rows, bias_N, weight_bytes + bias_bytes)

    def _stacked(self, targets: Sequence[str], sizes: Sequence[int], rest: tuple[int, ...]) -> Tensor:
        weight = torch.empty((sum(sizes), *rest), dtype=self._dtype)
        self._fill(weight, targets, sizes, 0)
        return weight.to(self._device)

    def _take_scratch(self, num_rows: int, num_inputs: int) -> Tensor:
        if self._scratch.numel() < num_rows * num_inputs:
            self._scratch = torch.empty(0, dtype=self._dtype)  # first give back, then take
            self._scratch = torch.empty(num_rows * num_inputs, dtype=self._dtype)
        return self._scratch[: num_rows * num_inputs].view(num_rows, num_inputs)

    def _fill(self, weight: Tensor, targets: Sequence[str], sizes: Sequence[int], first: int) -> None:
        """Rows `[first, first + len(weight))` of the stacked targets into `weight`."""
        base = 0
        for target, size in zip(targets, sizes, strict=True):
            start, stop = max(first, base), min(first + weight.shape[0], base + size)
            piece = self._piece(target, (size, *weight.shape[1:]))
            if start < stop:
                self._read_rows(piece, start - base, stop - base, weight[start - first : stop - first])
            base += size

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
            if whole and stored == self._dtype and target.is_contiguous():
                self._read_bytes(info.file, offset, target.view(-1).view(torch.uint8))
            else:
                staged = self._take_staging((stop - row) * row_bytes)
                self._read_bytes(info.file, offset, staged)
                target.copy_(staged.view(stored).view(stop - row, num_columns)[:, columns[0] : columns[1]])
            self._bytes_done += (stop - row) * used_bytes
            self._progress(self._bytes_done, self._bytes_total)

    def _take_staging(self, num_bytes: int) -> Tensor:
        if self._staging.numel() < num_bytes:
            self._staging = torch.empty(num_bytes, dtype=torch.uint8)
        return self._staging[:num_bytes]

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
