"""This file does not know sequences."""

from __future__ import annotations

from tllm.core.types import BlockId, TokenId
from tllm.scheduler.blocks import BlockPool
from tllm.scheduler.prefix_tree import Match, Node, PrefixTree


def tokens(*ids: int) -> tuple[TokenId, ...]:
    return tuple(map(TokenId, ids))


class Shelf:
    """A tree of blocks of four, and the shortest way to put something into it."""

    def __init__(self, num_blocks: int = 20) -> None:
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, 4)

    def put(self, *ids: int, salt: str = "") -> list[BlockId]:
        """As one sequence that has computed these tokens and ends; returns the blocks in the tree."""
        blocks = self.pool.take(-(-len(ids) // 4))
        node: Node | None = None
        kept = []
        for index, block in enumerate(blocks):
            node = self.tree.insert(salt, node, tokens(*ids[4 * index : 4 * index + 4]), block)
            if node is not None:
                kept.append(node.block)
        for block in blocks:
            self.pool.release(block)
        if kept:
            self.tree.released(kept[-1])
        self.check()
        return kept

    def match(self, *ids: int, salt: str = "") -> Match:
        return self.tree.match(salt, tokens(*ids), len(ids))

    def length(self, *ids: int, salt: str = "") -> int:
        match = self.match(*ids, salt=salt)
        return 4 * len(match.nodes) + match.length

    def check(self) -> None:
        self.tree.check()
        self.pool.check({}, self.tree.blocks())


def test_full_blocks_are_shared_and_the_parting_one_is_copied() -> None:
    shelf = Shelf()
    blocks = shelf.put(1, 2, 3, 4, 5, 6, 7, 8, 9)
    match = shelf.match(1, 2, 3, 4, 5, 6, 0, 0)
    assert [node.block for node in match.nodes] == blocks[:1]
    assert match.source is not None
    assert (match.source.block, match.length) == (blocks[1], 2)


def test_a_partial_block_is_a_source_too() -> None:
    shelf = Shelf()
    blocks = shelf.put(1, 2, 3, 4, 5, 6)
    match = shelf.match(1, 2, 3, 4, 5, 6, 7, 8)
    assert match.source is not None
    assert (match.source.block, match.length) == (blocks[1], 2)


def test_the_longest_of_several_candidates_is_the_source() -> None:
    shelf = Shelf()
    shelf.put(1, 0, 0, 0)
    best = shelf.put(1, 2, 3, 0)
    shelf.put(1, 2, 4, 0)
    shelf.put(1, 2)  # known already
    match = shelf.match(1, 2, 3, 9)
    assert match.source is not None
    assert (match.source.block, match.length) == (best[0], 3)


def test_salts_do_not_see_each_other() -> None:
    shelf = Shelf()
    shelf.put(1, 2, 3, 4, salt="a")
    assert shelf.length(1, 2, 3, 4, salt="a") == 4
    assert shelf.length(1, 2, 3, 4, salt="b") == 0
    assert shelf.length(1, 2, 3, 4) == 0


def test_what_only_begins_something_known_is_not_kept_twice() -> None:
    shelf = Shelf()
    shelf.put(1, 2, 3)
    shelf.put(1, 2)
    assert shelf.pool.num_kept == 1
    shelf.put(1, 2, 3, 4)
    assert shelf.pool.num_kept == 1
    shelf.put(1, 2, 3, 4)
    assert shelf.pool.num_kept == 1
    assert shelf.length(1, 2, 3, 4) == 4


def test_the_least_recently_released_goes_first_and_from_its_end() -> None:
    shelf = Shelf()
    shelf.put(1, 1, 1, 1, 2, 2, 2, 2)
    shelf.put(3, 3, 3, 3, 4, 4, 4, 4)
    shelf.put(1, 1, 1, 1, 2, 2, 2, 2)  # used again
    shelf.tree.evict(1)
    shelf.check()
    assert shelf.length(3, 3, 3, 3, 4, 4, 4, 4) == 4
    shelf.tree.evict(1)
    shelf.check()
    assert shelf.length(3, 3, 3, 3, 4, 4, 4, 4) == 0
    assert shelf.length(1, 1, 1, 1, 2, 2, 2, 2) == 8


def test_held_blocks_are_never_evicted() -> None:
    shelf = Shelf()
    (held,) = shelf.put(1, 1, 1, 1)
    shelf.put(2, 2, 2, 2)
    shelf.pool.share(held)
    shelf.tree.evict(1)
    assert shelf.length(1, 1, 1, 1) == 4
    assert shelf.length(2, 2, 2, 2) == 0
    shelf.pool.release(held)
    shelf.tree.released(held)
    shelf.check()


def test_forgetting_takes_what_follows_along() -> None:
    shelf = Shelf()
    blocks = shelf.put(1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
    shelf.put(1, 1, 1, 1, 2, 2, 2, 2, 4, 4)
    shelf.tree.forget([blocks[1]])
    shelf.check()
    assert shelf.length(1, 1, 1, 1, 2, 2, 2, 2) == 4
    assert shelf.pool.num_kept == 1
    shelf.tree.evict(1)
    shelf.check()


def test_years_of_use_do_not_fill_the_list_of_leaves() -> None:
    shelf = Shelf()
    for _ in range(1000):
        shelf.put(1, 1, 1, 1)
    assert len(shelf.tree._leaves) < 100
