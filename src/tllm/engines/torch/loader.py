"""Which of a checkpoint's slices make which weight of a shard.

Projections that share an input become one linear: q, k, v -> qkv, gate, up -> up. A shard that comes after another
keeps the other's tables, layers and ends that it has too, and reads the rest.

This file does not know files, in which form a linear is held, nor any computation.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL
from dataclasses import replace

import torch

from tllm.core.types import DType, Quantization
from tllm.engines.torch.decoder import DecoderWeights, LayerWeights
from tllm.engines.torch.linears import Linears, linears_for
from tllm.engines.torch.norm import LayerNorm, Norm, RMSNorm
from tllm.engines.torch.reading import TORCH_DTYPES, WeightReader
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import LearnedPositions, MlpKind, ModelSpec, NormKind, Shard, TensorSlice


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
    *,
    quantization: Quantization | None = None,
    kept: DecoderWeights | None = None,
    library: CDLL | None = None,
) -> DecoderWeights:
    """The shard in the given type on the device: what `keep` kept for it, and the rest read.

    With the library of kernels, on a CPU, linears are made for them.

    Raises ModelError for a tensor that is missing, misshapen, of an unknown type or cut off by the end of its file.
    """
    kept = kept or no_weights(checkpoint.spec)
    slices = missing(checkpoint, shard, kept)
    with WeightReader(checkpoint, slices, TORCH_DTYPES[dtype], device, progress) as reader:
        linears = linears_for(reader, quantization, library)
        return _Assembler(checkpoint.spec, shard, reader, linears, kept).weights()


class _Assembler:
    """Makes each weight, if it is not kept."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        reader: WeightReader,
        linears: Linears,
        kept: DecoderWeights,
    ) -> None:
        self._spec = spec
        self._shard = shard
        self._read = reader
        self._linears = linears
        self._kept = kept

    def weights(self) -> DecoderWeights:
        spec, shard, kept = self._spec, self._shard, self._kept
        width, vocab = spec.hidden_size, spec.vocab_size
        embed, positions, norm, head = kept.embed, kept.positions, kept.norm, kept.head
        if shard.embed and embed is None:
            embed = self._linears.table("embed", vocab, width)
        if shard.embed and positions is None and isinstance(spec.positions, LearnedPositions):
            positions = self._read.table("positions.weight", (spec.positions.num_positions, width))
        layers = {
            layer: kept.layers[layer] if layer in kept.layers else self._layer(f"layers.{layer}.")
            for layer in shard.layers
        }
        if shard.head and norm is None:
            norm = self._norm("norm")
        if shard.head and head is None:
            if spec.tied and embed is not None:
                head = embed.head(self._read.table("head.bias", (vocab,)) if spec.head_bias else None)
            else:
                head = self._linears.linear(("head",), (vocab,), width, bias=spec.head_bias)
        return DecoderWeights(embed=embed, positions=positions, layers=layers, norm=norm, head=head, tied=spec.tied)

    def _layer(self, prefix: str) -> LayerWeights:
        spec, linear = self._spec, self._linears.linear
        width, inner, head_dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
        q_size = spec.num_heads * head_dim
        qkv_names, qkv_sizes = (prefix + "q", prefix + "k", prefix + "v"), (q_size, spec.kv_size, spec.kv_size)
        ups = {MlpKind.GATED: (prefix + "gate", prefix + "up"), MlpKind.PLAIN: (prefix + "up",)}[spec.mlp]
        head_norms = (self._head_norm(prefix + "q_norm"), self._head_norm(prefix + "k_norm")) if spec.qk_norm else None
        return LayerWeights(
            attention_norm=self._norm(prefix + "attention_norm"),
            qkv=linear(qkv_names, qkv_sizes, width, bias=spec.qkv_bias),
            head_norms=head_norms,
            o=linear((prefix + "o",), (width,), q_size, bias=spec.output_bias),
            mlp_norm=self._norm(prefix + "mlp_norm"),
            up=linear(ups, (inner,) * len(ups), width, bias=spec.mlp_bias),
            down=linear((prefix + "down",), (width,), inner, bias=spec.mlp_bias),
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
