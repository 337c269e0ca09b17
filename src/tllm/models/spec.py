"""What a model is, as numbers: everything a decoder, a planner or a slicer needs to know, and no arrays.

Layers are always counted from the model's first layer; a layer's id is the same on every machine.
This file does not know file formats, tensor names of any family, or any framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tllm.core.types import DType


class NormKind(StrEnum):
    RMS = "rms"
    LAYER = "layer"  # mean and bias as well


class ActivationKind(StrEnum):
    SILU = "silu"
    GELU = "gelu"  # exact, by erf
    GELU_TANH = "gelu_tanh"


class MlpKind(StrEnum):
    GATED = "gated"  # down(act(gate(x)) * up(x))
    PLAIN = "plain"  # down(act(up(x)))


class RopeKind(StrEnum):
    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions with the scaling of one checkpoint, resolved as `models/rope.py` documents.

    `dim` is the rotated part of a head (the first `dim` of `head_dim`, in halves, not interleaved).
    """

    kind: RopeKind
    theta: float
    dim: int
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    attention_factor: float | None = None  # yarn, longrope
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositions:
    """A table of position embeddings, added once to the token embeddings."""

    num_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer with pre-norm layers."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # as given, never hidden_size / num_heads
    vocab_size: int
    max_positions: int
    norm: NormKind
    norm_eps: float
    positions: Rope | LearnedPositions
    mlp: MlpKind
    activation: ActivationKind
    attention_scale: float
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's query and key before the rotation
    tied: bool = False  # the output projection is the embedding
    windows: tuple[int | None, ...] = ()  # per layer: a query sees that many positions, itself included; None: all

    @property
    def kv_size(self) -> int:
        """Elements of one position's keys in one layer, K = kv heads x head_dim; values take as many."""
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_position(self, num_layers: int, dtype: DType) -> int:
        """2 (keys, values) x layers x kv heads x head_dim x bytes per element."""
        return 2 * num_layers * self.kv_size * dtype.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's part of one stage: a run of layers with optional ends, and its place in the stage's group."""

    first_layer: int
    last_layer: int  # exclusive
    embed: bool
    head: bool
    rank: int = 0
    ranks: int = 1

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.last_layer)


_SCALE_BYTES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedFormat:
    """How a matrix (outputs, inputs) is quantized: value = scale * code + offset, codes 0 .. 2**bits - 1, with one
    scale and one offset for every `group` inputs of an output; symmetric: offset = -(2 ** (bits - 1)) * scale."""

    bits: int  # 4 or 8
    group: int  # divides the inputs
    symmetric: bool
    scale_dtype: str  # F32, F16 or BF16: what scales and offsets are held in

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Of a matrix in memory: codes, scales and offsets."""
        num_outputs, num_inputs = shape
        group_bytes = _SCALE_BYTES[self.scale_dtype] * (1 if self.symmetric else 2)
        return num_outputs * (num_inputs * self.bits // 8 + num_inputs // self.group * group_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """Rows `[start, stop)` along `dim` of a tensor on disk become (part of) one canonical weight.

    Canonical targets: `embed.weight` (V, D) · `positions.weight` (P, D) · `layers.{i}.` + {`attention_norm`,
    `mlp_norm`} `.weight`/`.bias` (D) · `q`, `k`, `v`, `o`, `gate`, `up`, `down` `.weight` (outputs, inputs) and `.bias`
    (outputs) · `q_norm`, `k_norm` `.weight` (head_dim) · `norm.weight`/`.bias` (D) · `head.weight` (V, D), `head.bias`.
    With `tied`, a shard that has the head gets `head.weight` from the embedding tensor, unless it also embeds: then
    the engine uses `embed.weight` for both and no `head.weight` slice exists.

    Of a quantized weight `source` is the tensor of its codes and `dim`, `start`, `stop` are those of the matrix
    (outputs, inputs), wherever on disk that is; `Checkpoint.read_grouped` reads it. With `interleaved`, the rows of
    every head of so many lie as 0, n/2, 1, n/2 + 1, ...; `Checkpoint.read_rows` reads a plain one in order.
    """

    source: str
    target: str
    dim: int
    start: int
    stop: int
    transpose: bool = False  # after slicing: the tensor on disk is (inputs, outputs)
    shape: tuple[int, ...]  # of the result, after the transpose
    num_bytes: int  # as stored on disk, of all tensors
    others: tuple[str, ...] = ()  # the stored tensors beside `source`: scales and the like
    grouped: GroupedFormat | None = None  # of the result, if it is quantized
    interleaved: int = 0
