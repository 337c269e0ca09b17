"""Whatever is taken, shared, kept, found and evicted: the account balances, and hits are exact to the token.

This file does not know sequences.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.core.types import BlockId, TokenId
from tllm.scheduler.blocks import BlockPool
from tllm.scheduler.prefix_tree import PrefixTree

TOKENS = st.lists(st.integers(0, 2).map(TokenId), min_size=1, max_size=24)


def common_length(left: list[TokenId], right: list[TokenId]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@given(num_blocks=st.integers(1, 20), data=st.data())
def test_every_block_is_free_held_or_kept(num_blocks: int, data: st.DataObject) -> None:
    pool = BlockPool(num_blocks)
    holders: Counter[BlockId] = Counter()
    kept: set[BlockId] = set()
    for _ in range(data.draw(st.integers(1, 40))):
        acts = ["take"]
        acts += ["release", "keep"] * bool(holders) + ["share"] * bool(holders or kept) + ["drop"] * bool(kept)
        act = data.draw(st.sampled_from(acts))
        if act == "take":
            after = data.draw(st.one_of(st.none(), st.integers(0, num_blocks - 1).map(BlockId)))
            num_free = pool.num_free
            taken = pool.take(data.draw(st.integers(0, num_free)), after=after)
            assert len(set(taken)) == len(taken) == num_free - pool.num_free
            assert not any(block in holders or block in kept for block in taken)
            holders.update(taken)
        elif act == "share":
            block = data.draw(st.sampled_from(sorted(kept | set(holders))))
            pool.share(block)
            holders[block] += 1
        elif act == "release":
            block = data.draw(st.sampled_from(sorted(holders)))
            pool.release(block)
            holders -= Counter([block])
        elif act == "keep":
            block = data.draw(st.sampled_from(sorted(holders)))
            if block not in kept:
                pool.keep(block)
                kept.add(block)
        else:
            block = data.draw(st.sampled_from(sorted(kept)))
            pool.drop(block)
            kept.remove(block)
        pool.check(holders, kept)


@given(busy=st.sets(st.integers(0, 29).map(BlockId)), num=st.integers(1, 30))
def test_a_long_enough_run_is_taken_whole(busy: set[BlockId], num: int) -> None:
    pool = BlockPool(30)
    for block in pool.take(30):
        if block not in busy:
            pool.release(block)
    runs = [start for start in range(31 - num) if not busy & set(range(start, start + num))]
    if runs:
        assert pool.take(num) == list(range(runs[0], runs[0] + num))
    elif num <= pool.num_free:
        assert len(set(pool.take(num)) - busy) == num
    pool.check(Counter({BlockId(block): 1 for block in range(30) if not pool._free[block]}), ())


class Shelf:
    """Puts whole token runs into a tree as finished sequences do, and remembers them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, block_size)
        self.block_size = block_size
        self.known: dict[str, list[list[TokenId]]] = {}

    def put(self, salt: str, tokens: list[TokenId]) -> None:
        size = self.block_size
        num = -(-len(tokens) // size)
        if num > self.pool.num_free:
            self.tree.evict(num - self.pool.num_free)
        blocks, node, held, last = self.pool.take(num), None, [], None
        for index, block in enumerate(blocks):
            found = self.tree.insert(salt, node, tuple(tokens[index * size : (index + 1) * size]), block)
            if found is not None and found.block != block:
                self.pool.share(found.block)
                held.append(found.block)
            node, last = found, found.block if found is not None else last
        for block in (*held, *blocks):
            self.pool.release(block)
        if last is not None:
            self.tree.released(last)
        self.known.setdefault(salt, []).append(tokens)

    def check(self) -> None:
        self.tree.check()
        self.pool.check({}, self.tree.blocks())


@given(
    block_size=st.integers(1, 6),
    runs=st.lists(st.tuples(st.sampled_from(["", "other"]), TOKENS), max_size=12),
    wanted=st.lists(st.tuples(st.sampled_from(["", "other", "third"]), TOKENS), max_size=6),
    data=st.data(),
)
@settings(max_examples=200)
def test_a_hit_is_the_longest_common_prefix_with_anything_kept(
    block_size: int, runs: list[tuple[str, list[TokenId]]], wanted: list[tuple[str, list[TokenId]]], data: st.DataObject
) -> None:
    shelf = Shelf(400, block_size)
    for salt, tokens in runs:
        shelf.put(salt, tokens)
        shelf.check()
    for salt, tokens in wanted:
        limit = data.draw(st.integers(0, len(tokens)))
        match = shelf.tree.match(salt, tokens, limit)
        found = len(match.nodes) * block_size + match.length
        assert found == max((common_length(run, tokens[:limit]) for run in shelf.known.get(salt, [])), default=0)
        assert (match.source is None) == (match.length == 0)
        spelt = [token for node in match.nodes for token in node.tokens]
        if match.source is not None:
            spelt += match.source.tokens[: match.length]
        assert spelt == tokens[:found]


@given(block_size=st.integers(1, 4), runs=st.lists(TOKENS, max_size=30))
def test_eviction_frees_as_many_as_asked_and_leaves_a_tree(block_size: int, runs: list[list[TokenId]]) -> None:
    shelf = Shelf(24, block_size)
    for tokens in runs:
        shelf.put("", tokens)
        shelf.check()
        match = shelf.tree.match("", tokens, len(tokens))
        assert len(match.nodes) * block_size + match.length == len(tokens), "the newest was evicted"
    shelf.tree.evict(shelf.pool.num_kept)
    shelf.check()
    assert shelf.pool.num_free == 24
