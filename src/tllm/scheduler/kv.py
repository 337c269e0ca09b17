"""Which blocks each sequence has: joins the pool, the prefix tree and the sequences' block tables.

A sequence's table, from its first block on:

    │ num_kept: full, confirmed, the tree's own │ one partly confirmed │ blocks for positions to come │
    shared with whoever has the same tokens       written by this sequence alone

Only confirmed positions get into the tree, so that a failed step leaves nothing there. A full block enters as soon as
it is confirmed; if the tree has the same tokens by then (two equal prompts ran side by side), the sequence adopts the
tree's block and gives its own back. The partly filled block enters when the sequence leaves.

Giving a block back while a step in flight still writes it is sound: steps are computed in the order in which they were
made, so the late write lands before the next owner's first one.

This file does not know when a sequence runs, nor whom to preempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tllm.core.types import BlockCopy, BlockId
from tllm.scheduler.blocks import BlockPool
from tllm.scheduler.prefix_tree import Match, PrefixTree
from tllm.scheduler.sequence import Sequence


class KVAccount:
    """The blocks of one epoch. `prefix_cache` False: nothing is kept and nothing is found."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._tree = PrefixTree(self.pool, block_size) if prefix_cache else None

    @property
    def num_available(self) -> int:
        """Blocks that can be had without preempting anybody."""
        return self.pool.num_free + self.pool.num_kept

    @property
    def num_evicted(self) -> int:
        return 0 if self._tree is None else self._tree.num_evicted

    def admit(self, seq: Sequence, *, num_spare: int) -> bool:
        """Give blocks for all tokens the sequence has, the prefix it shares among them, and leave `num_spare` others.

        Sets `computed` and `scheduled` to the length of the shared prefix: at most all tokens but one, because somebody
        must compute the logits. False, and nothing is changed, when there are not enough blocks.
        """
        assert not seq.blocks
        num_blocks = -(-len(seq.tokens) // self.block_size)
        match = Match()
        # A prompt that must be scored needs the logits of every row.
        if self._tree is not None and seq.scores is None:
            match = self._tree.match(seq.salt, seq.tokens, len(seq.tokens) - 1)
        num_shared = len(match.nodes)
        # What is kept only now will be held then: it does not count as available.
        num_revived = sum(1 for node in match.nodes if not self.pool.num_holders(node.block))
        num_needed = num_blocks - num_shared + num_revived + num_spare
        source = match.source
        if source is not None and num_needed + (not self.pool.num_holders(source.block)) > self.num_available:
            source = None  # holding the source while it is copied would take the last block: compute instead
        elif source is not None:
            num_needed += not self.pool.num_holders(source.block)
        if num_needed > self.num_available:
            return False

        shared = [node.block for node in match.nodes]
        for block in shared:
            self.pool.share(block)
        if source is not None:
            self.pool.share(source.block)
        fresh = self._take(num_blocks - num_shared, after=shared[-1] if shared else None)
        if source is not None:
            seq.copy = BlockCopy(source=source.block, target=fresh[0], length=match.length)
        seq.blocks = (*shared, *fresh)
        seq.num_positions = num_blocks * self.block_size
        seq.node = match.nodes[-1] if match.nodes else None
        seq.num_kept = seq.num_matched = num_shared
        seq.computed = seq.scheduled = num_shared * self.block_size + (match.length if source is not None else 0)
        return True

    def grow(self, seq: Sequence) -> None:
        """One more block, of those available."""
        seq.blocks = (*seq.blocks, *self._take(1, after=seq.blocks[-1]))
        seq.num_positions += self.block_size

    def confirm(self, seq: Sequence) -> None:
        """Positions up to `computed` are on every stage: keep the blocks that are full, let go of the copy's source."""
        self._end_copy(seq)
        if self._tree is None:
            return
        blocks = seq.blocks
        adopted: list[BlockId] | None = None
        size = self.block_size
        while (stop := (seq.num_kept + 1) * size) <= seq.computed:
            block = blocks[seq.num_kept]
            node = self._tree.insert(seq.salt, seq.node, tuple(seq.tokens[stop - size : stop]), block)
            assert node is not None, "full blocks begin nothing but themselves"
            if node.block != block:
                self.pool.share(node.block)
                self.pool.release(block)
                adopted = list(blocks) if adopted is None else adopted
                adopted[seq.num_kept] = node.block
            seq.node = node
            seq.num_kept += 1
        if adopted is not None:
            seq.blocks = tuple(adopted)

    def release(self, seq: Sequence) -> None:
        """Take all blocks back; what is confirmed stays in the tree for as long as nobody needs the room."""
        last = seq.node.block if seq.node is not None else None
        start = seq.num_kept * self.block_size
        # With a copy pending, only what is shared is known to be there.
        if self._tree is not None and seq.copy is None and start < seq.computed:
            tokens = tuple(seq.tokens[start : seq.computed])
            tail = self._tree.insert(seq.salt, seq.node, tokens, seq.blocks[seq.num_kept])
            last = last if tail is None else tail.block
        self._give_back(seq)
        if self._tree is not None and last is not None:
            self._tree.released(last)

    def discard(self, seq: Sequence) -> None:
        """Take all blocks back, and keep nothing that the sequence computed itself: its KV may be wrong."""
        blocks, num_matched, num_kept = seq.blocks, seq.num_matched, seq.num_kept
        self._give_back(seq)
        if self._tree is not None and num_kept:
            self._tree.released(blocks[num_kept - 1])
            self._tree.forget(blocks[num_matched:num_kept])

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that `sequences`, all that have blocks, account for every holder of every block."""
        holders: Counter[BlockId] = Counter()
        for seq in sequences:
            holders.update(seq.blocks)
            assert seq.num_positions == len(seq.blocks) * self.block_size
            assert seq.computed <= seq.scheduled <= min(len(seq.tokens), seq.num_positions)
            assert len(set(seq.blocks)) == len(seq.blocks), f"sequence {seq.id} has a block twice"
            if seq.copy is not None:
                holders[seq.copy.source] += 1
                assert seq.copy.target == seq.blocks[seq.num_kept]
            path = []
            node = seq.node
            while node is not None and node.parent is not None:
                path.append(node.block)
                node = node.parent
            assert tuple(reversed(path)) == seq.blocks[: seq.num_kept], f"sequence {seq.id} left the tree"
            if self._tree is not None:
                assert seq.num_kept == seq.computed // self.block_size
        if self._tree is not None:
            self._tree.check()
        self.pool.check(holders, () if self._tree is None else self._tree.blocks())

    def _take(self, num: int, *, after: BlockId | None) -> list[BlockId]:
        if num > self.pool.num_free:
            assert self._tree is not None
            self._tree.evict(num - self.pool.num_free)
        return self.pool.take(num, after=after)

    def _end_copy(self, seq: Sequence) -> None:
        if seq.copy is not None:
            source = seq.copy.source
            seq.copy = None
            self.pool.release(source)
            if self._tree is not None:
                self._tree.released(source)

    def _give_back(self, seq: Sequence) -> None:
        self._end_copy(seq)
        for block in seq.blocks:
            self.pool.release(block)
        seq.blocks = ()
        seq.num_positions = 0
        seq.node = None
        seq.num_kept = seq.num_matched = 0
