"""Paged attention against the textbook: every row over exactly the positions it may see."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tllm.core.types import Epoch, Step, StepId
from tllm.engines.packing import pack
from tllm.engines.torch.attention import (
    Gathered,
    InPlace,
    Kernel,
    Own,
    ReadPolicy,
    attend,
    flash_cpu,
    matmul,
    merge,
    plan,
)
from tllm.engines.torch.kv import KVCache, Writes
from tllm.testing.stages import chunk

CPU = torch.device("cpu")
SCALE = 0.3


def textbook(q_NHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, start: int, window: int | None) -> Tensor:
    num_rows, num_heads, _ = q_NHD.shape
    group = num_heads // k_SKD.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).double() for x in (k_SKD, v_SKD))
    scores = torch.einsum("nhd,shd->hns", q_NHD.double(), k) * SCALE
    query = torch.arange(start, start + num_rows).unsqueeze(1)
    key = torch.arange(len(k)).unsqueeze(0)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hns,shd->nhd", probabilities, v).flatten(1)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 5]), st.sampled_from([4, 10, 16])),
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 4, 8]),
    window=st.sampled_from([None, 1, 3, 7, 16, 40]),
    policy=st.builds(
        ReadPolicy,
        short_run=st.sampled_from([0, 5, 9, 100]),
        gather_positions=st.sampled_from([1, 8, 1000]),
        window_rows=st.sampled_from([2, 7, 100]),
    ),
    kernel=st.sampled_from([flash_cpu, matmul]),
    scattered=st.booleans(),
)
def test_attention_over_blocks_equals_attention_over_whole_sequences(
    seed: int,
    shape: tuple[int, int, int],
    sizes: list[tuple[int, int]],
    block_size: int,
    window: int | None,
    policy: ReadPolicy,
    kernel: Kernel,
    scattered: bool,
) -> None:
    num_kv_heads, group, head_dim = shape
    generator, shuffler = torch.Generator().manual_seed(seed), random.Random(seed)
    num_blocks = sum(-(-(start + length) // block_size) for start, length in sizes) + 3
    free = list(range(num_blocks))
    if scattered:
        shuffler.shuffle(free)
    cache = KVCache(
        [7],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=torch.float32,
        device=CPU,
    )
    kv = cache.layer(7)
    kv.fill_(float("nan"))  # whatever is read without having been written shows
    sequences = [torch.randn(2, start + n, num_kv_heads, head_dim, generator=generator) for start, n in sizes]
    chunks = []
    for seq, (start, length) in enumerate(sizes):
        blocks = [free.pop() for _ in range(-(-(start + length) // block_size))]
        chunks.append(chunk(seq, start, [0] * length, blocks))
        for position in range(start):
            slot = blocks[position // block_size] * block_size + position % block_size
            kv[:, :, slot] = sequences[seq][:, position]
    packed = pack(
        Step(id=StepId(0), epoch=Epoch(1), chunks=tuple(chunks)), num_blocks=num_blocks, block_size=block_size
    )
    q_THD = torch.randn(packed.num_rows, num_kv_heads * group, head_dim, generator=generator)
    own = torch.cat([x[:, start:] for x, (start, _) in zip(sequences, sizes, strict=True)], dim=1)
    own_2KTD = own.permute(0, 2, 1, 3)
    Writes(packed, CPU).write(kv, own_2KTD)

    tiles = plan(packed, window, CPU, policy)
    assert [row for tile in tiles for row in range(tile.first_row, tile.first_row + tile.num_rows)] == list(
        range(packed.num_rows)
    )
    got = attend(q_THD, own_2KTD, kv, tiles, SCALE, kernel)

    for part, (start, _), (k, v) in zip(packed.chunks, sizes, sequences, strict=True):
        rows = slice(part.first_row, part.first_row + part.num_rows)
        expected = textbook(q_THD[rows], k, v, start, window)
        torch.testing.assert_close(got[rows].double(), expected, atol=2e-5, rtol=1e-4)


def tiles_of(start: int, num_tokens: int, blocks: list[int], window: int | None = None, block_size: int = 4):  # type: ignore[no-untyped-def]
    step = Step(id=StepId(0), epoch=Epoch(1), chunks=(chunk(1, start, [0] * num_tokens, blocks),))
    policy = ReadPolicy(short_run=6, gather_positions=8)
    return plan(pack(step, num_blocks=1000, block_size=block_size), window, CPU, policy)


def test_a_decode_over_adjacent_blocks_is_one_read_in_place() -> None:
    (tile,) = tiles_of(18, 1, [3, 4, 5, 6, 7])
    (part,) = tile.parts
    assert isinstance(part, InPlace)
    assert (part.slot, part.length) == (12, 19)


def test_a_window_limits_what_is_read_and_not_only_what_counts() -> None:
    (tile,) = tiles_of(101, 1, list(range(30)), window=9)
    (part,) = tile.parts
    assert isinstance(part, InPlace)
    assert (part.slot, part.length) == (93, 9)
    tiles = tiles_of(101, 10, list(range(30)), window=9)
    assert sum(part.length for tile in tiles for part in tile.parts) == 9 + 9


def test_a_fresh_prompt_reads_nothing_from_the_cache() -> None:
    (tile,) = tiles_of(0, 18, [3, 9, 1, 7, 5])
    assert tile.parts == (Own(),)


def test_scattered_blocks_are_gathered_a_bounded_number_at_a_time_and_long_runs_are_not() -> None:
    (tile,) = tiles_of(33, 1, [9, 7, 5, 20, 21, 22, 1, 3, 11])
    kinds = [(type(part), part.length) for part in tile.parts]
    assert kinds == [(Gathered, 8), (Gathered, 4), (InPlace, 12), (Gathered, 8), (Gathered, 2)]


@pytest.mark.parametrize("kernel", [flash_cpu, matmul])
def test_parts_merge_exactly_also_when_a_row_sees_nothing_of_one(kernel: Kernel) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (4, 12, 12))
    mask = torch.zeros(4, 12)
    mask[2:, :5] = -1e30
    whole, _ = kernel(q, k, v, SCALE, mask, False)
    parts = [kernel(q, k[:, :, a:b], v[:, :, a:b], SCALE, mask[:, a:b], False) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(merge(parts), whole, atol=1e-6, rtol=1e-5)


def test_the_kernels_agree_in_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, n, 64, generator=generator).bfloat16() for n in (4, 300, 300))
    fast, fast_lse = flash_cpu(q, k, v, SCALE, None, False)
    plain, plain_lse = matmul(q, k, v, SCALE, None, False)
    torch.testing.assert_close(fast, plain, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(fast_lse, plain_lse, atol=1e-2, rtol=1e-3)
