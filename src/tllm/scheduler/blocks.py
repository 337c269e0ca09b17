"""Who holds which block: counts of holders, and the free ones.

    free   nobody has it                                    take ──▶ held
    held   at least one sequence reads or writes it         share, release
    kept   no sequence has it, the prefix tree does         share ──▶ held, drop ──▶ free

A held block may be kept as well; it is counted as held until its last holder releases it. So free + held + kept is
always the total.

This file does not know tokens, sequences, or what a block contains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tllm.core.types import BlockId


class BlockPool:
    """`num_blocks` block ids, 0 and up. All methods are constant time, except that `take` may scan the free map."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_kept = 0  # kept and not held
        self._free = bytearray(b"\1" * num_blocks)
        self._lowest = 0  # no free block is below
        self._num_holders = [0] * num_blocks
        self._kept = bytearray(num_blocks)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free - self.num_kept

    def num_holders(self, block: BlockId) -> int:
        """Sequences that hold it; the prefix tree is not counted."""
        return self._num_holders[block]

    def take(self, num: int, *, after: BlockId | None = None) -> list[BlockId]:
        """`num` free blocks, each then held once. At least so many must be free.

        Adjacent ids make attention one long read. So: first those that follow `after`, then the lowest run that is
        long enough, then the lowest runs of half, a quarter, ... that length.
        """
        assert num <= self.num_free, f"{num} blocks wanted, {self.num_free} free"
        taken: list[BlockId] = []
        if after is not None:
            block = after + 1
            while len(taken) < num and block < self.num_blocks and self._free[block]:
                taken.append(BlockId(block))
                self._free[block] = 0
                block += 1
        length, begin = num - len(taken), self._lowest
        while (left := num - len(taken)) > 0:
            if left < length:
                length, begin = left, self._lowest
            start = self._free.find(b"\1" * length, begin)
            if start < 0:  # no run of this length is left, and none appears by taking
                length, begin = (length + 1) // 2, self._lowest
                continue
            taken += map(BlockId, range(start, start + length))
            self._free[start : start + length] = bytes(length)
            begin = start + length
            if length == 1 or start == self._lowest:
                self._lowest = begin
        for block in taken:
            self._num_holders[block] = 1
        self.num_free -= num
        return taken

    def share(self, block: BlockId) -> None:
        """One more holder of a block that is held or kept."""
        if self._num_holders[block] == 0:
            assert self._kept[block], f"block {block} is free and cannot be shared"
            self.num_kept -= 1
        self._num_holders[block] += 1

    def release(self, block: BlockId) -> None:
        """One holder less; after the last one the block is kept, or free."""
        assert self._num_holders[block] > 0, f"block {block} is not held"
        self._num_holders[block] -= 1
        if self._num_holders[block] == 0:
            if self._kept[block]:
                self.num_kept += 1
            else:
                self._set_free(block)

    def keep(self, block: BlockId) -> None:
        """The prefix tree wants a held block to stay when it is released."""
        assert self._num_holders[block] > 0, f"block {block} is not held"
        assert not self._kept[block], f"block {block} is kept already"
        self._kept[block] = 1

    def drop(self, block: BlockId) -> None:
        """The prefix tree wants it no more; it is free unless somebody holds it."""
        assert self._kept[block], f"block {block} is not kept"
        self._kept[block] = 0
        if self._num_holders[block] == 0:
            self.num_kept -= 1
            self._set_free(block)

    def check(self, holders: Mapping[BlockId, int], kept: Iterable[BlockId]) -> None:
        """Assert that the account agrees with `holders` (block to number of holders) and the tree's blocks."""
        kept_blocks = set(kept)
        for block in map(BlockId, range(self.num_blocks)):
            is_held, is_kept = self._num_holders[block] > 0, bool(self._kept[block])
            assert self._num_holders[block] == holders.get(block, 0), f"block {block} has a wrong number of holders"
            assert is_kept == (block in kept_blocks), f"block {block} disagrees with the prefix tree"
            assert bool(self._free[block]) == (not is_held and not is_kept), f"block {block} is free and taken"
            assert not self._free[block] or block >= self._lowest, f"block {block} is free below the lowest"
        assert self.num_free == sum(self._free)
        assert self.num_kept == sum(1 for block in kept_blocks if not self._num_holders[block])
        assert self.num_free + self.num_held + self.num_kept == self.num_blocks
        assert self.num_held == len(holders)

    def _set_free(self, block: BlockId) -> None:
        self._free[block] = 1
        self.num_free += 1
        self._lowest = min(self._lowest, block)
