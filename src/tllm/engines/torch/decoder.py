"""The decoder: a loop over the shard's layers with optional ends, the same for every family.

What a family is, the `ModelSpec` says; which layers there are, the keys of `DecoderWeights.layers`, counted from the
model's first layer. A stage is the same code with fewer keys, so a cut changes nothing. The residual stream is in the
model's type on both sides of a cut and inside a stage alike; norms and rotations compute in fp32.

Shapes: T rows, R rows projected, M hidden size, H query heads, K kv heads, D head_dim, I intermediate size,
V vocabulary.
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
from tllm.engines.torch.attention import Kernel, attend, plan
from tllm.engines.torch.kv import KVCache, Writes
from tllm.engines.torch.linear import Linear
from tllm.engines.torch.rotary import Rotary
from tllm.models.spec import ActivationKind, LearnedPositions, MlpKind, ModelSpec, Rope


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RMSNorm:
    weight: Tensor
    eps: float

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


Norm = RMSNorm | LayerNorm


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    attention_norm: Norm
    qkv: Linear  # outputs: H query heads, K keys, K values, each of D
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    o: Linear
    mlp_norm: Norm
    up: Linear  # gated: outputs are I gates, then I ups
    down: Linear

    @property
    def num_bytes(self) -> int:
        norms = (self.attention_norm, self.q_norm, self.k_norm, self.mlp_norm)
        linears = (self.qkv, self.o, self.up, self.down)
        return sum(norm.num_bytes for norm in norms if norm is not None) + sum(linear.num_bytes for linear in linears)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderWeights:
    """`embed` and `positions` belong to the first stage, `norm` and `head` to the last; None elsewhere.

    With tied embeddings, where both ends are, `head` is made of `embed` itself.
    """

    embed: Tensor | None  # (V, M)
    positions: Tensor | None  # (P, M), only with learned positions
    layers: Mapping[int, LayerWeights]
    norm: Norm | None
    head: Linear | None
    tied: bool  # the model's

    @property
    def num_bytes(self) -> int:
        """Memory of all of them; what two share counts once."""
        tables = sum(table.nbytes for table in (self.embed, self.positions) if table is not None)
        layers = sum(layer.num_bytes for layer in self.layers.values())
        ends = sum(end.num_bytes for end in (self.norm, self.head) if end is not None)
        shared = self.embed.nbytes if self.tied and self.embed is not None and self.head is not None else 0
        return tables + layers + ends - shared


class Decoder:
    """The computation of one shard. Keeps nothing between calls; KV is passed in."""

    def __init__(
        self, spec: ModelSpec, weights: DecoderWeights, device: torch.device, kernel: Kernel, max_positions: int
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._device = device
        self._kernel = kernel
        self._windows = {layer: spec.windows[layer] if spec.windows else None for layer in weights.layers}
        match spec.positions:
            case Rope() as rope:
                self._rotary: Rotary | None = Rotary(rope, max_positions, device)
            case LearnedPositions():
                self._rotary = None
            case _:
                assert_never(spec.positions)

    def embed(self, packed: PackedStep) -> Tensor:
        """(T, M): what the first layer reads."""
        assert self._weights.embed is not None
        x_TM = functional.embedding(self._to_device(packed.tokens), self._weights.embed)
        if self._weights.positions is not None:
            x_TM += functional.embedding(self._to_device(packed.positions), self._weights.positions)
        return x_TM

    def layers(self, x_TM: Tensor, packed: PackedStep, kv: KVCache) -> Tensor:
        """(T, M) after the shard's layers; writes the rows' keys and values into the KV."""
        angles = None if self._rotary is None else self._rotary.angles(self._to_device(packed.positions))
        writes = Writes(packed, self._device)
        tiles = {window: plan(packed, window, self._device) for window in set(self._windows.values())}
        spec = self._spec
        kv_shape = (packed.num_rows, 2, spec.num_kv_heads, spec.head_dim)
        num_qk = spec.num_heads + spec.num_kv_heads
        for layer, weights in self._weights.layers.items():
            qkv = weights.qkv(weights.attention_norm(x_TM))
            heads_THD = qkv.view(len(qkv), -1, spec.head_dim)
            if weights.q_norm is not None and weights.k_norm is not None:
                heads_THD[:, : spec.num_heads] = weights.q_norm(heads_THD[:, : spec.num_heads])
                heads_THD[:, spec.num_heads : num_qk] = weights.k_norm(heads_THD[:, spec.num_heads : num_qk])
            if self._rotary is not None and angles is not None:
                self._rotary.turn_(heads_THD.narrow(1, 0, num_qk), angles)
            q_THD = heads_THD.narrow(1, 0, spec.num_heads)
            kv_2KTD = heads_THD[:, spec.num_heads :].view(kv_shape).permute(1, 2, 0, 3)
            layer_kv = kv.layer(layer)
            writes.write(layer_kv, kv_2KTD)
            attended = attend(q_THD, kv_2KTD, layer_kv, tiles[self._windows[layer]], spec.attention_scale, self._kernel)
            x_TM = weights.o.add(attended, x_TM)
            x_TM = weights.down.add(self._activated(weights.up(weights.mlp_norm(x_TM))), x_TM)
        return x_TM

    def logits(self, x_RM: Tensor) -> Tensor:
        """(R, V) in fp32 of rows that left the last layer."""
        assert self._weights.norm is not None
        assert self._weights.head is not None
        return self._weights.head(self._weights.norm(x_RM)).float()

    def _activated(self, up: Tensor) -> Tensor:
        match self._spec.mlp:
            case MlpKind.GATED:
                gate_TI, up_TI = up.chunk(2, dim=1)
                return self._activation(gate_TI).mul_(up_TI)
            case MlpKind.PLAIN:
                return self._activation(up)
            case _:
                assert_never(self._spec.mlp)

    def _activation(self, x: Tensor) -> Tensor:
        match self._spec.activation:
            case ActivationKind.SILU:
                return functional.silu(x)
            case ActivationKind.GELU:
                return functional.gelu(x)
            case ActivationKind.GELU_TANH:
                return functional.gelu(x, approximate="tanh")
            case _:
                assert_never(self._spec.activation)

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
