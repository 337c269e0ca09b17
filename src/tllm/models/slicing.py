"""Which part of which stored tensor a rank needs, and how much memory that takes. Pure.

A tensor-parallel group of R ranks divides a layer so that two sums over the group suffice (Megatron-LM, arXiv
1909.08053, section 3):

    q k v, gate, up      by outputs: a rank has whole heads, and a run of the MLP's width
    o, down              by inputs, the same heads and the same run; the ranks' partial results are summed
    o.bias, down.bias    on rank 0 alone, or the sum would count them R times
    head                 by outputs: a run of the vocabulary
    norms, embeddings    whole on every rank

Nothing needs to divide evenly. With R <= key-value heads a rank has a run of them and all queries they serve; with
more ranks than that, each key-value head is held by several ranks, which share its queries:

    8 query heads, 2 kv heads:    R = 2   q 0-3 kv 0 | q 4-7 kv 1
                                  R = 3   q 0-3 kv 0 | q 4-5 kv 1 | q 6-7 kv 1
                                  R = 8   one query head each, every kv head four times

So on every rank each of its key-value heads serves equally many of its queries, in order.

This file does not know where a tensor's bytes are, nor what a family calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, assert_never

from tllm.core.errors import ModelError
from tllm.core.types import DType, Quantization
from tllm.models.headers import ELEMENT_BYTES, TensorInfo
from tllm.models.layouts import StoredWeight
from tllm.models.spec import GroupedFormat, LearnedPositions, MlpKind, ModelSpec, NormKind, Shard, TensorSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """What one rank of a group has of every layer and of the head: runs of global indices, none empty."""

    query_heads: range
    kv_heads: range
    mlp: range  # of the intermediate size
    vocab: range


class Axis(Enum):
    """Along what a group divides a weight."""

    NONE = auto()  # every rank holds it whole
    RANK_0 = auto()  # rank 0 holds it whole, the others not at all
    QUERY_HEADS = auto()
    KV_HEADS = auto()
    MLP = auto()
    VOCAB = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A canonical weight of the whole model, and how a group divides it: along `axis`, which lies in dim `dim`."""

    target: str
    shape: tuple[int, ...]
    axis: Axis = Axis.NONE
    dim: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a whole canonical weight lies: outputs `[offset, offset + outputs)` of the stored tensor `name`; of a
    quantized one, that of its codes."""

    name: str
    offset: int = 0
    transpose: bool = False  # stored as (inputs, outputs)
    interleaved: int = 0  # see TensorSlice


def max_ranks(spec: ModelSpec) -> int:
    """The largest group that the model can be divided among: a rank has at least one query head."""
    return min(spec.num_heads, spec.intermediate_size, spec.vocab_size)


def divide(spec: ModelSpec, rank: int, ranks: int) -> Division:
    """The part of rank `rank` in a group of `ranks`. Raises ModelError when the group is larger than `max_ranks`."""
    if not 0 <= rank < ranks:
        raise ModelError(f"Rank {rank} is not in a group of {ranks}.")
    if ranks > max_ranks(spec):
        raise ModelError(
            f"A model with {spec.num_heads} attention heads cannot be divided among {ranks} ranks; "
            f"at most {max_ranks(spec)} are possible."
        )
    queries_per_kv = spec.num_heads // spec.num_kv_heads
    if ranks <= spec.num_kv_heads:
        kv_heads = _part(spec.num_kv_heads, rank, ranks)
        query_heads = range(kv_heads.start * queries_per_kv, kv_heads.stop * queries_per_kv)
    else:
        # Ranks are dealt to the kv heads as kv heads would be to ranks; those of one share its queries.
        head = next(h for h in range(spec.num_kv_heads) if rank in _part(ranks, h, spec.num_kv_heads))
        sharers = _part(ranks, head, spec.num_kv_heads)
        own = _part(queries_per_kv, rank - sharers.start, len(sharers))
        kv_heads = range(head, head + 1)
        query_heads = range(head * queries_per_kv + own.start, head * queries_per_kv + own.stop)
    return Division(
        query_heads=query_heads,
        kv_heads=kv_heads,
        mlp=_part(spec.intermediate_size, rank, ranks),
        vocab=_part(spec.vocab_size, rank, ranks),
    )


def _part(total: int, index: int, parts: int) -> range:
    """Consecutive runs that cover `range(total)`, equal to within one."""
    return range(index * total // parts, (index + 1) * total // parts)


def layer_weights(spec: ModelSpec, layer: int) -> Iterator[Weight]:
    """The canonical weights of one layer."""
    at = f"layers.{layer}."
    width, inner, head_dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    queries, keys = spec.num_heads * head_dim, spec.num_kv_heads * head_dim

    yield from _norm(spec, f"{at}attention_norm")
    yield from _by_outputs(f"{at}q", (queries, width), Axis.QUERY_HEADS, bias=spec.qkv_bias)
    yield from _by_outputs(f"{at}k", (keys, width), Axis.KV_HEADS, bias=spec.qkv_bias)
    yield from _by_outputs(f"{at}v", (keys, width), Axis.KV_HEADS, bias=spec.qkv_bias)
    if spec.qk_norm:
        yield Weight(target=f"{at}q_norm.weight", shape=(head_dim,))
        yield Weight(target=f"{at}k_norm.weight", shape=(head_dim,))
    yield from _by_inputs(f"{at}o", (width, queries), Axis.QUERY_HEADS, bias=spec.output_bias)
    yield from _norm(spec, f"{at}mlp_norm")
    if spec.mlp is MlpKind.GATED:
        yield from _by_outputs(f"{at}gate", (inner, width), Axis.MLP, bias=spec.mlp_bias)
    yield from _by_outputs(f"{at}up", (inner, width), Axis.MLP, bias=spec.mlp_bias)
    yield from _by_inputs(f"{at}down", (width, inner), Axis.MLP, bias=spec.mlp_bias)


def embed_weights(spec: ModelSpec) -> Iterator[Weight]:
    """The canonical weights of the embedding."""
    yield Weight(target="embed.weight", shape=(spec.vocab_size, spec.hidden_size))
    if isinstance(spec.positions, LearnedPositions):
        yield Weight(target="positions.weight", shape=(spec.positions.num_positions, spec.hidden_size))


def head_weights(spec: ModelSpec) -> Iterator[Weight]:
    """The canonical weights from the last layer to the logits, the output projection included even when tied."""
    yield from _norm(spec, "norm")
    yield from _by_outputs("head", (spec.vocab_size, spec.hidden_size), Axis.VOCAB, bias=spec.head_bias)


def shard_weights(spec: ModelSpec, shard: Shard) -> Iterator[Weight]:
    """The whole canonical weights of which the shard holds a part. Raises ModelError when it is no part of the model.

    With tied embeddings a shard that has both ends lacks `head.weight`: its engine uses `embed.weight` for both.
    """
    if not 0 <= shard.first_layer <= shard.last_layer <= spec.num_layers:
        raise ModelError(
            f"Layers [{shard.first_layer}, {shard.last_layer}) are not a run of the model's {spec.num_layers} layers."
        )
    if shard.embed:
        yield from embed_weights(spec)
    for layer in shard.layers:
        yield from layer_weights(spec, layer)
    if shard.head:
        for weight in head_weights(spec):
            if not (spec.tied and shard.embed and weight.target == "head.weight"):
                yield weight


def slices(
    spec: ModelSpec,
    shard: Shard,
    sources: Mapping[str, Source],
    tensors: Mapping[str, TensorInfo],
    quantized: Mapping[str, StoredWeight],
) -> tuple[TensorSlice, ...]:
    """The slices of a shard, in the order embedding, layers, head.

    `sources` maps every canonical weight to where it lies, `tensors` every stored name to what it is, `quantized` the
    names of codes to the matrices they are of. Raises ModelError when the shard is no part of the model, its group is
    larger than `max_ranks`, or would cut a quantized weight where that is not possible.
    """
    division = divide(spec, shard.rank, shard.ranks)
    found = []
    for weight in shard_weights(spec, shard):
        run = _run(spec, weight, division, shard.rank)
        if run is None:
            continue
        source = sources[weight.target]
        stored = quantized.get(source.name)
        if stored is None:
            found.append(_slice(weight, run, source, ELEMENT_BYTES[tensors[source.name].dtype]))
        else:
            found.append(_quantized_slice(weight, run, source, stored, tensors))
    return tuple(found)


def _run(spec: ModelSpec, weight: Weight, division: Division, rank: int) -> range | None:
    """The part of `weight` along its dim; None when the rank has none of it."""
    match weight.axis:
        case Axis.NONE:
            return range(weight.shape[weight.dim])
        case Axis.RANK_0:
            return range(weight.shape[weight.dim]) if rank == 0 else None
        case Axis.QUERY_HEADS:
            return range(division.query_heads.start * spec.head_dim, division.query_heads.stop * spec.head_dim)
        case Axis.KV_HEADS:
            return range(division.kv_heads.start * spec.head_dim, division.kv_heads.stop * spec.head_dim)
        case Axis.MLP:
            return division.mlp
        case Axis.VOCAB:
            return division.vocab
        case _:
            assert_never(weight.axis)


def _slice(weight: Weight, run: range, source: Source, element_bytes: int) -> TensorSlice:
    shape = (*weight.shape[: weight.dim], len(run), *weight.shape[weight.dim + 1 :])
    offset = source.offset if weight.dim == 0 else 0
    # One run along one dim cannot cut both the outputs out of a fused tensor and the inputs for a rank.
    assert weight.dim == 0 or source.offset == 0, f"{weight.target} is divided by inputs within a fused tensor"
    return TensorSlice(
        source=source.name,
        target=weight.target,
        dim=1 - weight.dim if source.transpose else weight.dim,
        start=offset + run.start,
        stop=offset + run.stop,
        transpose=source.transpose,
        shape=shape,
        num_bytes=math.prod(shape) * element_bytes,
        interleaved=source.interleaved,
    )


def _quantized_slice(
    weight: Weight, run: range, source: Source, stored: StoredWeight, tensors: Mapping[str, TensorInfo]
) -> TensorSlice:
    shape = (*weight.shape[: weight.dim], len(run), *weight.shape[weight.dim + 1 :])
    offset = source.offset if weight.dim == 0 else 0
    assert weight.dim == 0 or source.offset == 0, f"{weight.target} is divided by inputs within a fused tensor"
    part = range(offset + run.start, offset + run.stop)
    whole = range(source.offset, source.offset + weight.shape[0]), range(weight.shape[1])
    rows, columns = (part, whole[1]) if weight.dim == 0 else (whole[0], part)
    return TensorSlice(
        source=source.name,
        target=weight.target,
        dim=weight.dim,
        start=part.start,
        stop=part.stop,
        shape=shape,
        num_bytes=sum(band.num_bytes(tensors[band.name]) for band in stored.bands(rows, columns)),
        others=stored.names[1:],
        grouped=stored.part_format(columns),
        interleaved=source.interleaved,
    )


_LINEARS: Final = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
_ENDS: Final = frozenset({"embed", "head"})


def held_format(target: str, num_inputs: int, quantization: Quantization) -> GroupedFormat | None:
    """How a weight that is stored plain is held where weights are quantized; None: plain.

    Linears as asked: a scale, and with 4 bits an offset, for every group of inputs of an output, in smaller groups
    where those do not divide the inputs. Embedding and head, whose errors the answer shows at once, have 8 bits. So has
    what no group divides, with one scale for an output.
    """
    *_, name, kind = target.split(".")
    if kind != "weight" or name not in _LINEARS | _ENDS:
        return None
    asked = quantization if name in _LINEARS else Quantization.parse("int8")
    group = math.gcd(asked.group, num_inputs)
    if group % _LEAST_GROUP == 0 and not (asked.bits == 8 and group == num_inputs):
        return GroupedFormat(bits=asked.bits, group=group, symmetric=asked.bits == 8, scale_dtype="BF16")
    return GroupedFormat(bits=8, group=num_inputs, symmetric=True, scale_dtype="F32")


_LEAST_GROUP: Final = 16


def weight_bytes(parts: Sequence[TensorSlice], dtype: DType, quantization: Quantization | None = None) -> int:
    """What the slices take in memory: those that are stored quantized as they are, linears, embedding and head in the
    format asked for, all else as `dtype`."""
    return sum(_held_bytes(part, dtype, quantization) for part in parts)


def _held_bytes(part: TensorSlice, dtype: DType, quantization: Quantization | None) -> int:
    if part.grouped is not None:
        return part.grouped.num_bytes(part.shape)
    return held_bytes(part.target, part.shape, dtype, quantization)


def held_bytes(target: str, shape: tuple[int, ...], dtype: DType, quantization: Quantization | None) -> int:
    """What a weight that is stored plain takes in memory."""
    held = None if quantization is None or len(shape) < 2 else held_format(target, shape[1], quantization)
    return math.prod(shape) * dtype.num_bytes if held is None else held.num_bytes(shape)


def kv_bytes(spec: ModelSpec, shard: Shard, num_positions: int, dtype: DType) -> int:
    """2 (keys, values) x the shard's layers x the rank's kv heads x head_dim x positions x bytes per element."""
    kv_heads = divide(spec, shard.rank, shard.ranks).kv_heads
    return 2 * len(shard.layers) * len(kv_heads) * spec.head_dim * num_positions * dtype.num_bytes


def _norm(spec: ModelSpec, name: str) -> Iterator[Weight]:
    yield Weight(target=f"{name}.weight", shape=(spec.hidden_size,))
    if spec.norm is NormKind.LAYER:
        yield Weight(target=f"{name}.bias", shape=(spec.hidden_size,))


def _by_outputs(name: str, shape: tuple[int, int], axis: Axis, *, bias: bool) -> Iterator[Weight]:
    yield Weight(target=f"{name}.weight", shape=shape, axis=axis, dim=0)
    if bias:
        yield Weight(target=f"{name}.bias", shape=shape[:1], axis=axis, dim=0)


def _by_inputs(name: str, shape: tuple[int, int], axis: Axis, *, bias: bool) -> Iterator[Weight]:
    yield Weight(target=f"{name}.weight", shape=shape, axis=axis, dim=1)
    if bias:
        yield Weight(target=f"{name}.bias", shape=shape[:1], axis=Axis.RANK_0)
