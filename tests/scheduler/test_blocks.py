"""This file does not know tokens."""

from __future__ import annotations

import pytest

from tllm.core.types import BlockId
from tllm.scheduler.blocks import BlockPool


def test_blocks_are_adjacent_and_lowest() -> None:
    pool = BlockPool(10)
    assert pool.take(3) == [0, 1, 2]
    assert pool.take(2) == [3, 4]
    pool.release(BlockId(1))
    assert pool.take(2) == [5, 6], "a run is better than the lowest"
    assert pool.take(1) == [1]


def test_growth_continues_its_own_run_where_it_can() -> None:
    pool = BlockPool(10)
    first = pool.take(4)
    for block in first[1:]:
        pool.release(block)
    assert pool.take(2, after=BlockId(1)) == [2, 3]
    assert pool.take(2, after=BlockId(3)) == [4, 5]
    assert pool.take(2, after=BlockId(0)) == [1, 6], "its own run ends at block 2"


def test_fragments_are_used_when_there_is_no_run() -> None:
    pool = BlockPool(9)
    blocks = pool.take(9)
    for block in blocks[::2]:
        pool.release(block)
    assert pool.take(5) == [0, 2, 4, 6, 8]


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1)
    pool.share(block)
    pool.release(block)
    assert (pool.num_free, pool.num_held) == (0, 1)
    pool.release(block)
    assert (pool.num_free, pool.num_held) == (1, 0)


def test_a_kept_block_can_be_held_again() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1)
    pool.keep(block)
    pool.release(block)
    assert (pool.num_free, pool.num_held, pool.num_kept) == (0, 0, 1)
    pool.share(block)
    assert (pool.num_free, pool.num_held, pool.num_kept) == (0, 1, 0)
    pool.drop(block)
    pool.release(block)
    assert (pool.num_free, pool.num_held, pool.num_kept) == (1, 0, 0)


def test_misuse_is_a_bug() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="2 free"):
        pool.take(3)
    with pytest.raises(AssertionError, match="not held"):
        pool.release(BlockId(0))
    with pytest.raises(AssertionError, match="free"):
        pool.share(BlockId(0))
