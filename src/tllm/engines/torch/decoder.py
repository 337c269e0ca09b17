"""The decoder: a loop over the shard's layers with optional ends, the same for every family.

What a family is, the `ModelSpec` says; which layers there are, the keys of `DecoderWeights.layers`, counted from the
model's first layer. A stage is the same code with fewer keys, so a cut changes nothing. The residual stream is in the
model's type on both sides of a cut and inside a stage alike; norms and rotations compute in fp32.

Shapes: T rows, R rows projected, M hidden size, E = (H + 2 K) D with H query heads and K kv heads of D, I intermediate
size, V vocabulary.
This file does not know files, steps' meaning, sampling or other stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tllm.engines.packing import PackedStep
from tllm.engines.torch.kv import KVCache
from tllm.engines.torch.linear import Linear, Table
from tllm.engines.torch.norm import Norm
from tllm.engines.torch.self_attention import HeadNorms, SelfAttention
from tllm.models.spec import MlpKind, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    attention_norm: Norm
    qkv: Linear  # outputs: H query heads, K keys, K values, each of D
    head_norms: HeadNorms | None
    o: Linear
    mlp_norm: Norm
    up: Linear  # gated: outputs are I gates, then I ups
    down: Linear

    @property
    def num_bytes(self) -> int:
        norms: tuple[Norm, ...] = (self.attention_norm, self.mlp_norm, *(self.head_norms or ()))
        linears = (self.qkv, self.o, self.up, self.down)
        return sum(norm.num_bytes for norm in norms) + sum(linear.num_bytes for linear in linears)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderWeights:
    """`embed` and `positions` belong to the first stage, `norm` and `head` to the last; None elsewhere.

    With tied embeddings, where both ends are, `head` is made of `embed` itself.
    """

    embed: Table | None
    positions: Tensor | None  # (P, M), only with learned positions
    layers: Mapping[int, LayerWeights]
    norm: Norm | None
    head: Linear | None
    tied: bool  # the model's

    @property
    def num_bytes(self) -> int:
        """Memory of all of them; what two share counts once."""
        positions = 0 if self.positions is None else self.positions.nbytes
        layers = sum(layer.num_bytes for layer in self.layers.values())
        ends = sum(end.num_bytes for end in (self.embed, self.norm, self.head) if end is not None)
        shared = self.embed.num_bytes if self.tied and self.embed is not None and self.head is not None else 0
        return positions + layers + ends - shared


class Decoder:
    """The computation of one shard. Keeps nothing between calls; KV is passed in."""

    def __init__(
        self, spec: ModelSpec, weights: DecoderWeights, attention: SelfAttention, device: torch.device
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._attention = attention
        self._device = device

    def embed(self, packed: PackedStep) -> Tensor:
        """(T, M): what the first layer reads."""
        assert self._weights.embed is not None
        x_TM = self._weights.embed.rows(self._to_device(packed.tokens))
        if self._weights.positions is not None:
            x_TM += functional.embedding(self._to_device(packed.positions), self._weights.positions)
        return x_TM

    def layers(self, x_TM: Tensor, packed: PackedStep, kv: KVCache) -> Tensor:
        """(T, M) after the shard's layers; writes the rows' keys and values into the KV."""
        attend = self._attention.step(packed, kv)
        for layer, weights in self._weights.layers.items():
            qkv_TE = weights.qkv(x_TM, weights.attention_norm)
            x_TM = weights.o.add(attend(qkv_TE, layer, weights.head_norms), x_TM)
            x_TM = weights.down.add(self._up(weights, x_TM), x_TM)
        return x_TM

    def logits(self, x_RM: Tensor) -> Tensor:
        """(R, V) in fp32 of rows that left the last layer."""
        assert self._weights.norm is not None
        assert self._weights.head is not None
        return self._weights.head.logits(x_RM, self._weights.norm)

    def _up(self, weights: LayerWeights, x_TM: Tensor) -> Tensor:
        match self._spec.mlp:
            case MlpKind.GATED:
                return weights.up.gated(x_TM, weights.mlp_norm, self._spec.activation)
            case MlpKind.PLAIN:
                return weights.up.activated(x_TM, weights.mlp_norm, self._spec.activation)
            case _:
                assert_never(self._spec.mlp)

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
