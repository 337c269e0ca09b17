"""Attention of a layer in one call of C++: norms of heads, rotation, writing and reading KV (`attention.cpp`).

What depends on the step alone is laid out once and read by all its layers. A row's numbers are equal bit for bit alone
and in company, in one chunk or many, whatever the threads and the placement of blocks.

Shapes: T rows, H query heads, K kv heads, D head_dim, E = (H + 2 K) D.
This file does not know linears, nor whether there is a compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import c_float, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from tllm.engines.packing import PackedStep
from tllm.engines.torch.kv import KVCache
from tllm.engines.torch.self_attention import Attend, HeadNorms, rotary_of, windows_of
from tllm.models.spec import ModelSpec

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CPU = torch.device("cpu")


class _Step(ctypes.Structure):
    """`Step` of attention.cpp."""

    _fields_ = (
        ("dtype", c_int64),
        ("num_rows", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("num_slots", c_int64),
        ("block_size", c_int64),
        ("num_chunks", c_int64),
        ("num_pairs", c_int64),
        ("chunks", c_void_p),
        ("blocks", c_void_p),
        ("slots", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("scale", c_float),
        ("q_eps", c_float),  # of the layer at hand: set in C++
        ("k_eps", c_float),
    )


class KernelSelfAttention:
    """Implements `SelfAttention` on a CPU."""

    def __init__(self, spec: ModelSpec, layers: Iterable[int], library: ctypes.CDLL, max_positions: int) -> None:
        self._spec = spec
        self._windows = {layer: window or 0 for layer, window in windows_of(spec, layers).items()}
        self._rotary = rotary_of(spec, max_positions, _CPU)
        self._attend = library.tllm_attend
        self._attend.restype = None
        self._attend.argtypes = (c_void_p,) * 6 + (c_float, c_float, c_int64)

    def step(self, packed: PackedStep, kv: KVCache) -> Attend:
        spec = self._spec
        num_rows, width = packed.num_rows, spec.num_heads * spec.head_dim
        row_size = width + 2 * spec.num_kv_heads * spec.head_dim
        angles = None if self._rotary is None else self._rotary.angles(torch.from_numpy(packed.positions))
        chunks, blocks = _laid_out(packed)
        step = _Step(
            num_rows=num_rows,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            num_slots=kv.num_blocks * kv.block_size,
            block_size=packed.block_size,
            num_chunks=len(packed.chunks),
            num_pairs=0 if angles is None else angles[0].shape[2],
            chunks=chunks.ctypes.data,
            blocks=blocks.ctypes.data,
            slots=packed.slots.ctypes.data,
            cosines=None if angles is None else angles[0].data_ptr(),
            sines=None if angles is None else angles[1].data_ptr(),
            scale=spec.attention_scale,
        )
        held = (chunks, blocks, packed, angles)  # what the structure points to
        where, attend, windows = ctypes.addressof(step), self._attend, self._windows

        def attend_layer(qkv_TE: Tensor, layer: int, norms: HeadNorms | None) -> Tensor:
            layer_kv = kv.layer(layer)
            assert held
            assert qkv_TE.shape == (num_rows, row_size)
            assert qkv_TE.is_contiguous()
            assert qkv_TE.dtype == layer_kv.dtype
            step.dtype = _DTYPES[layer_kv.dtype]
            output = torch.empty((num_rows, width), dtype=qkv_TE.dtype)
            q_weight = k_weight = None
            q_eps = k_eps = 0.0
            if norms is not None:
                q_norm, k_norm = norms
                assert q_norm.weight.dtype == k_norm.weight.dtype == qkv_TE.dtype
                q_weight, q_eps = q_norm.weight.data_ptr(), q_norm.eps
                k_weight, k_eps = k_norm.weight.data_ptr(), k_norm.eps
            attend(
                where,
                qkv_TE.data_ptr(),
                layer_kv.data_ptr(),
                output.data_ptr(),
                q_weight,
                k_weight,
                q_eps,
                k_eps,
                windows[layer],
            )
            return output

        return attend_layer


def _laid_out(packed: PackedStep) -> tuple[np.ndarray, np.ndarray]:
    """Chunks as `Chunk` of attention.cpp has them, and the blocks of all of them one after the other."""
    rows, first_block = [], 0
    for chunk in packed.chunks:
        rows.append((chunk.first_row, chunk.num_rows, chunk.start, first_block))
        first_block += len(chunk.blocks)
    return np.array(rows, dtype=np.int64), np.concatenate([chunk.blocks for chunk in packed.chunks])
