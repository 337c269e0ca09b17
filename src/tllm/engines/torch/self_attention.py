"""From a layer's queries, keys and values to what attention makes of them, with the operations of torch.

Per row: the norms of heads if the model has them, the rotation, keys and values into their slots, then attention over
all that the row sees. What depends on the step alone is worked out once for all its layers.

Shapes: T rows, H query heads, K kv heads, D head_dim, E = (H + 2 K) D.
This file does not know linears or who comes before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, assert_never

import torch
from torch import Tensor

from tllm.engines.packing import PackedStep
from tllm.engines.torch.attention import Kernel, attend, plan
from tllm.engines.torch.kv import KVCache, Writes
from tllm.engines.torch.norm import RMSNorm
from tllm.engines.torch.rotary import Rotary
from tllm.models.spec import LearnedPositions, ModelSpec, Rope

HeadNorms = tuple[RMSNorm, RMSNorm]  # of queries, of keys

# (qkv (T, E), which may be written to; the layer; the norms of its heads) -> (T, H D)
Attend = Callable[[Tensor, int, HeadNorms | None], Tensor]


class SelfAttention(Protocol):
    """The attention of a shard's layers."""

    def step(self, packed: PackedStep, kv: KVCache) -> Attend:
        """What each layer does with this step. Calling it writes the rows' keys and values into that layer's KV."""


def windows_of(spec: ModelSpec, layers: Iterable[int]) -> Mapping[int, int | None]:
    """Layer -> how many positions a query sees, itself included; None: all."""
    return {layer: spec.windows[layer] if spec.windows else None for layer in layers}


def rotary_of(spec: ModelSpec, max_positions: int, device: torch.device) -> Rotary | None:
    match spec.positions:
        case Rope() as rope:
            return Rotary(rope, max_positions, device)
        case LearnedPositions():
            return None
        case _:
            assert_never(spec.positions)


class TorchSelfAttention:
    def __init__(
        self, spec: ModelSpec, layers: Iterable[int], device: torch.device, kernel: Kernel, max_positions: int
    ) -> None:
        self._spec = spec
        self._device = device
        self._kernel = kernel
        self._windows = windows_of(spec, layers)
        self._rotary = rotary_of(spec, max_positions, device)

    def step(self, packed: PackedStep, kv: KVCache) -> Attend:
        spec, rotary = self._spec, self._rotary
        positions_T = torch.from_numpy(packed.positions).to(self._device)
        angles = None if rotary is None else rotary.angles(positions_T)
        writes = Writes(packed, self._device)
        tiles = {window: plan(packed, window, self._device) for window in set(self._windows.values())}
        kv_shape = (packed.num_rows, 2, spec.num_kv_heads, spec.head_dim)
        num_qk = spec.num_heads + spec.num_kv_heads

        def attend_layer(qkv_TE: Tensor, layer: int, norms: HeadNorms | None) -> Tensor:
            heads_THD = qkv_TE.view(len(qkv_TE), -1, spec.head_dim)
            if norms is not None:
                q_norm, k_norm = norms
                heads_THD[:, : spec.num_heads] = q_norm(heads_THD[:, : spec.num_heads])
                heads_THD[:, spec.num_heads : num_qk] = k_norm(heads_THD[:, spec.num_heads : num_qk])
            if rotary is not None and angles is not None:
                rotary.turn_(heads_THD.narrow(1, 0, num_qk), angles)
            q_THD = heads_THD.narrow(1, 0, spec.num_heads)
            kv_2KTD = heads_THD[:, spec.num_heads :].view(kv_shape).permute(1, 2, 0, 3)
            layer_kv = kv.layer(layer)
            writes.write(layer_kv, kv_2KTD)
            return attend(q_THD, kv_2KTD, layer_kv, tiles[self._windows[layer]], spec.attention_scale, self._kernel)

        return attend_layer
