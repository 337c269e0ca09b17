"""Attention of a step's rows over paged KV, each sequence over its own positions only.

A chunk's rows are cut into *tiles*; a tile's keys are a few *parts*, each a plain matrix read where it lies:

    positions   0 ............... start ......... context        decode, one row: every part is a run of slots
                |--run--|---run---| own rows, causal |           a longer chunk: runs before it, then its own rows
                      |window of row r|                          with a window: runs under a mask, tile by tile

Every part gives an output and the logarithm of its sum of exponentials (LSE), by which parts are merged exactly:
o = sum_i softmax_i(lse_i) o_i. Query heads that share a kv head are rows of one product, so every key is read once
for all of them and nothing is repeated.

Fragmented sequences: every kernel call costs 20 us or so, so neighbouring short runs are read through a scratch copy of
a bounded number of positions that stays in the core's cache. One decode at 4096 positions, one layer of 8 kv heads of
64, bf16, one Zen 5 core, us (fp32 breaks even at runs of 100 positions):

    positions per run          32    64   128   256   512   4096
    each run in place        3335  1964  1442  1119   973    886
    gathered, 1024 at once   1160  1181  1160  1148  1162      -

Shapes: T rows of a step, N of a tile, H query heads, K kv heads, G = H / K, S positions read, D head_dim.
This file does not know layers, weights or rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import assert_never

import torch
from torch import Tensor

from tllm.engines.packing import PackedChunk, PackedStep, clip

_HIDDEN = -1e30  # finite: a row that sees nothing of a part gets an LSE that weighs nothing, and never NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPolicy:
    """How positions are cut into parts; changes the last bits of an answer at most."""

    short_run: int = 128  # neighbouring runs shorter than that are gathered
    gather_positions: int = 1024  # at most so many at once
    window_rows: int = 256  # rows of a chunk that share a masked read: the mask is rows x (window + rows)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InPlace:
    """Slots `[slot, slot + length)`."""

    slot: int
    length: int
    mask: Tensor | None  # (N, S)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gathered:
    """Positions `[skip, skip + length)` of these blocks laid side by side."""

    blocks: Tensor
    block_size: int
    skip: int
    length: int
    mask: Tensor | None  # (N, S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The tile's own rows, each seeing itself and those before it."""


Part = InPlace | Gathered | Own


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tile:
    """Rows `[first_row, first_row + num_rows)` of the step and all that they read."""

    first_row: int
    num_rows: int
    parts: tuple[Part, ...]


# (q (B, E, R, D), k (B, E, S, D), v (B, E, S, D), scale, mask (R, S) added to the scores or None, causal)
#   -> output (B, E, R, D), LSE (B, E, R) in fp32, natural logarithm. `causal` is for R = S alone.
Kernel = Callable[[Tensor, Tensor, Tensor, float, Tensor | None, bool], tuple[Tensor, Tensor]]


def plan(
    packed: PackedStep, window: int | None, device: torch.device, policy: ReadPolicy = ReadPolicy()
) -> tuple[Tile, ...]:
    """What every row of the step reads in layers with this window. The tiles cover the rows in order."""
    tiles: list[Tile] = []
    for chunk in packed.chunks:
        planner = _Planner(chunk=chunk, block_size=packed.block_size, policy=policy, device=device)
        tiles.extend(planner.tiles(window))
    return tuple(tiles)


def kernel_for(device: torch.device) -> Kernel:
    """The kernel that reads a part fastest on this device."""
    return flash_cpu if device.type == "cpu" else matmul


def attend(q_THD: Tensor, kv_2KTD: Tensor, kv: Tensor, tiles: Sequence[Tile], scale: float, kernel: Kernel) -> Tensor:
    """(T, H * D): attention of every row. `kv` is the layer's (2, K, slots, D), `kv_2KTD` the step's own rows of it."""
    num_rows, num_heads, head_dim = q_THD.shape
    num_kv_heads = kv.shape[1]
    cache, own = _halves(kv), _halves(kv_2KTD)
    q_TKGD = q_THD.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    outputs = []
    for tile in tiles:
        q_NKGD = q_TKGD.narrow(0, tile.first_row, tile.num_rows)
        if tile.num_rows == 1:
            results = [kernel(q_NKGD, *_keys(part, cache, own, tile), scale, None, False) for part in tile.parts]
            outputs.append(results[0][0] if len(results) == 1 else merge(results))
        else:
            o_KGND = _attend_rows(q_NKGD.permute(1, 2, 0, 3), cache, own, tile, scale, kernel)
            outputs.append(o_KGND.permute(2, 0, 1, 3))
    o_TKGD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return o_TKGD.reshape(num_rows, num_heads * head_dim)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The output over all parts together, from each part's own output and LSE; sums in fp32."""
    outputs = torch.stack([o for o, _ in parts]).float()
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0)
    return (outputs * weights.unsqueeze(-1)).sum(0).to(parts[0][0].dtype)


def flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """torch's CPU flash attention; any strides but the last."""
    output, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return output, lse


def matmul(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Plain products in fp32, for any device; also the reference of the others. Scores of a part are held at once."""
    scores = torch.matmul(q.float(), k.float().transpose(2, 3)).mul_(scale)
    if causal:
        mask = _band(0, q.shape[2], 0, k.shape[2], None, q.device)
    if mask is not None:
        scores += mask
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.exp(scores.sub_(lse.unsqueeze(-1)))
    return torch.matmul(probabilities, v.float()).to(q.dtype), lse


_KeysValues = tuple[Tensor, Tensor]  # (1, K, S, D) each


def _halves(kv: Tensor) -> _KeysValues:
    return kv.narrow(0, 0, 1), kv.narrow(0, 1, 1)


def _keys(part: Part, cache: _KeysValues, own: _KeysValues, tile: Tile) -> _KeysValues:
    match part:
        case InPlace():
            return cache[0].narrow(2, part.slot, part.length), cache[1].narrow(2, part.slot, part.length)
        case Gathered():
            return _gathered(part, cache[0]), _gathered(part, cache[1])
        case Own():
            return own[0].narrow(2, tile.first_row, tile.num_rows), own[1].narrow(2, tile.first_row, tile.num_rows)
        case _:
            assert_never(part)


def _gathered(part: Gathered, x: Tensor) -> Tensor:
    blocks = x.view(1, x.shape[1], -1, part.block_size, x.shape[3]).index_select(2, part.blocks)
    return blocks.flatten(2, 3).narrow(2, part.skip, part.length)


def _attend_rows(
    q_KGND: Tensor, cache: _KeysValues, own: _KeysValues, tile: Tile, scale: float, kernel: Kernel
) -> Tensor:
    """(K, G, N, D) of several rows of one chunk.

    Without a mask, the G x N rows that share a kv head are one matrix against its keys. A mask knows rows alone: there
    the kv heads take the place of the batch, and stride 0 that of repeating them for each head of a group.
    """
    num_kv_heads, group, num_rows, head_dim = q_KGND.shape
    results = []
    for part in tile.parts:
        k, v = _keys(part, cache, own, tile)
        mask, causal = (None, True) if isinstance(part, Own) else (part.mask, False)
        if mask is None and not causal:
            q_1KRD = q_KGND.reshape(1, num_kv_heads, group * num_rows, head_dim)
            output, lse = kernel(q_1KRD, k, v, scale, None, False)
            results.append((output.view(q_KGND.shape), lse.reshape(q_KGND.shape[:3])))
        else:
            k, v = (x.transpose(0, 1).expand(-1, group, -1, -1) for x in (k, v))
            results.append(kernel(q_KGND, k, v, scale, mask, causal))
    return results[0][0] if len(results) == 1 else merge(results)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planner:
    """Plans one chunk."""

    chunk: PackedChunk
    block_size: int
    policy: ReadPolicy
    device: torch.device

    def tiles(self, window: int | None) -> Iterator[Tile]:
        chunk = self.chunk
        if chunk.num_rows == 1:
            first = 0 if window is None else max(0, chunk.context - window)
            yield Tile(first_row=chunk.first_row, num_rows=1, parts=self._read(first, chunk.context))
        elif window is None or chunk.context <= window:
            before = self._read(0, chunk.start)
            yield Tile(first_row=chunk.first_row, num_rows=chunk.num_rows, parts=(*before, Own()))
        else:
            yield from self._windowed(window)

    def _windowed(self, window: int) -> Iterator[Tile]:
        """Several rows, the last of which does not see position 0: all read from the cache, under band masks."""
        chunk = self.chunk
        for first in range(0, chunk.num_rows, self.policy.window_rows):
            num_rows = min(self.policy.window_rows, chunk.num_rows - first)
            begin, end = chunk.start + first, chunk.start + first + num_rows
            position = max(0, begin + 1 - window)
            masked = []
            for part in self._read(position, end):
                mask = _band(begin, end, position, position + part.length, window, self.device)
                masked.append(replace(part, mask=mask))
                position += part.length
            yield Tile(first_row=chunk.first_row + first, num_rows=num_rows, parts=tuple(masked))

    def _read(self, start: int, stop: int) -> tuple[InPlace | Gathered, ...]:
        """Positions `[start, stop)` of the sequence, in order."""
        parts: list[InPlace | Gathered] = []
        for short, group in groupby(
            clip(self.chunk.runs, start, stop), key=lambda run: run.length < self.policy.short_run
        ):
            runs = list(group)
            if short and len(runs) > 1:
                parts.extend(self._gather(runs[0].position, runs[-1].position + runs[-1].length))
            else:
                parts.extend(InPlace(slot=run.slot, length=run.length, mask=None) for run in runs)
        return tuple(parts)

    def _gather(self, start: int, stop: int) -> Iterator[Gathered]:
        size = self.block_size
        last = -(-stop // size)
        at_once = max(1, self.policy.gather_positions // size)
        for first in range(start // size, last, at_once):
            blocks = self.chunk.blocks[first : min(first + at_once, last)]
            begin, end = max(start, first * size), min(stop, (first + len(blocks)) * size)
            yield Gathered(
                blocks=torch.from_numpy(blocks).to(self.device),
                block_size=size,
                skip=begin - first * size,
                length=end - begin,
                mask=None,
            )


def _band(begin: int, end: int, first: int, stop: int, window: int | None, device: torch.device) -> Tensor:
    """Mask of queries at positions `[begin, end)` over keys at `[first, stop)`."""
    q_N1 = torch.arange(begin, end, device=device).unsqueeze(1)
    k_1S = torch.arange(first, stop, device=device).unsqueeze(0)
    hidden = k_1S > q_N1
    if window is not None:
        hidden |= k_1S <= q_N1 - window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, _HIDDEN)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
