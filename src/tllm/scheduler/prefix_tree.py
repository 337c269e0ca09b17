"""Which kept block holds the KV of which tokens.

    A node is one block. The path from a root to it spells the tokens from position 0 to the node's last one; there is
    one root per salt. Inner nodes are full blocks; a leaf may be a partial one. No sibling's tokens begin another's.

                         ┌─ [d e f g] ─ [h i]
        root ─ [a b c c] ┤
                         └─ [d e x y]               looking up  a b c c d e x z  finds one node to share and two
                                                    candidates to copy from: d e x is longest

    Siblings stand in the order of their tokens. The longest common prefix with any of them is then that with one of the
    two neighbours of the place where the new tokens would stand.

    Whoever holds a node's block holds the blocks of all nodes above it. So below a node that nobody holds nobody holds
    anything, every kept block can be evicted, and eviction takes leaves: the least recently released first.

This file does not know sequences, nor when KV may be believed: whoever inserts says that it has been computed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from tllm.core.types import BlockId, TokenId
from tllm.scheduler.blocks import BlockPool

Tokens = tuple[TokenId, ...]


class Node:
    """One kept block. Only the tree changes it."""

    __slots__ = ("block", "children", "last_used", "parent", "salt", "serial", "tokens")

    def __init__(self, salt: str, parent: Node | None, tokens: Tokens, block: BlockId, serial: int) -> None:
        self.salt = salt
        self.parent = parent  # None: a root, which has no block, or a node that was removed
        self.tokens = tokens
        self.block = block
        self.serial = serial
        self.children: list[Node] = []  # in the order of their tokens
        self.last_used = 0


_tokens_of = attrgetter("tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The longest known beginning of some tokens: full blocks to share, then `length` positions of `source` to copy."""

    nodes: tuple[Node, ...] = ()
    source: Node | None = None
    length: int = 0


class PrefixTree:
    """Kept blocks of a pool, found by the tokens they hold. Holds nothing for sequences: that is the pool's part."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.num_evicted = 0
        self._pool = pool
        self._block_size = block_size
        self._roots: dict[str, Node] = {}
        self._nodes: dict[BlockId, Node] = {}
        self._clock = 0  # counts releases
        self._num_serials = 0
        # (last_used, serial, node) of every leaf that nobody holds, and stale entries, which are skipped.
        self._leaves: list[tuple[int, int, Node]] = []

    def match(self, salt: str, tokens: Sequence[TokenId], limit: int) -> Match:
        """What is known of `tokens[:limit]`, to the token. Changes nothing and reserves nothing."""
        node = self._roots.get(salt)
        if node is None:
            return Match()
        size = self._block_size
        nodes: list[Node] = []
        while (start := len(nodes) * size) + size <= limit:
            key = tuple(tokens[start : start + size])
            index = bisect_left(node.children, key, key=_tokens_of)
            if index == len(node.children) or node.children[index].tokens != key:
                break
            node = node.children[index]
            nodes.append(node)
        source, length = None, 0
        key = tuple(tokens[start : min(start + size, limit)])
        index = bisect_left(node.children, key, key=_tokens_of)
        for neighbour in node.children[max(index - 1, 0) : index + 1]:
            common = _common_length(neighbour.tokens, key)
            if common > length:
                source, length = neighbour, common
        return Match(nodes=tuple(nodes), source=source, length=length)

    def insert(self, salt: str, parent: Node | None, tokens: Tokens, block: BlockId) -> Node | None:
        """Keep `block`, which the caller holds, as `tokens` after `parent` (None: at the beginning).

        Returns the node that now stands for these tokens. Its block is another one when they were known already; it is
        None when they are only the beginning of something known. In both cases `block` is not kept.
        """
        if parent is None:
            parent = self._roots.get(salt)
            if parent is None:
                parent = self._roots[salt] = Node(salt, None, (), BlockId(-1), 0)
        index = bisect_left(parent.children, tokens, key=_tokens_of)
        if index < len(parent.children):
            following = parent.children[index]
            if following.tokens == tokens:
                return following
            if following.tokens[: len(tokens)] == tokens:
                return None
        self._num_serials += 1
        node = Node(salt, parent, tokens, block, self._num_serials)
        parent.children.insert(index, node)
        if index > 0:
            preceding = parent.children[index - 1]
            if tokens[: len(preceding.tokens)] == preceding.tokens:
                self._remove(preceding)
        self._nodes[block] = node
        self._pool.keep(block)
        return node

    def released(self, block: BlockId) -> None:
        """Tell that the last of a path's blocks has just been released, after those above it: it is the newest now.

        Blocks that are not kept are ignored.
        """
        last = self._nodes.get(block)
        if last is None:
            return
        self._clock += 1
        node = last
        while node.parent is not None and not self._pool.num_holders(node.block):
            node.last_used = self._clock
            node = node.parent
        self._offer(last)
        if len(self._leaves) > 64 + 2 * len(self._nodes):
            self._leaves.clear()
            for node in self._nodes.values():
                self._offer(node)

    def evict(self, num: int) -> None:
        """Free `num` blocks, least recently released first. The pool must have so many that are kept and not held."""
        assert num <= self._pool.num_kept, f"{num} evictions wanted, {self._pool.num_kept} possible"
        self.num_evicted += num
        while num:
            last_used, _, node = heapq.heappop(self._leaves)
            if self._is_evictable(node) and node.last_used == last_used:
                parent = node.parent
                self._remove(node)
                num -= 1
                if parent is not None:
                    self._offer(parent)

    def forget(self, blocks: Iterable[BlockId]) -> None:
        """Remove those of `blocks`, and all that follows them, that are kept and that nobody holds."""
        for block in blocks:
            node = self._nodes.get(block)
            if node is None or self._pool.num_holders(block):
                continue
            parent = node.parent
            below = [node]
            for each in below:  # grows while it is walked
                below += each.children
            for each in reversed(below):
                self._remove(each)
            if parent is not None:
                self._offer(parent)

    def blocks(self) -> Iterable[BlockId]:
        return self._nodes.keys()

    def check(self) -> None:
        """Assert that the tree is one, and that every rule at the head of this file holds."""
        found = 0
        offered = {(last_used, serial) for last_used, serial, _ in self._leaves}
        for salt, root in self._roots.items():
            assert root.children, f"the root of salt {salt!r} has nothing below it"
            pending = [root]
            while pending:
                node = pending.pop()
                pending += node.children
                for left, right in zip(node.children, node.children[1:], strict=False):
                    assert left.tokens < right.tokens, "siblings are out of order"
                    assert right.tokens[: len(left.tokens)] != left.tokens, "a sibling begins another"
                if node is root:
                    continue
                found += 1
                assert node.salt == salt
                assert self._nodes[node.block] is node, f"block {node.block} stands for two runs of tokens"
                assert node.parent is not None
                assert node in node.parent.children
                assert 0 < len(node.tokens) <= self._block_size
                assert len(node.tokens) == self._block_size or not node.children, "a partial block has children"
                if node.parent is not root and self._pool.num_holders(node.block):
                    assert self._pool.num_holders(node.parent.block), "a node is held, but not the one above it"
                if self._is_evictable(node):
                    assert (node.last_used, node.serial) in offered, f"block {node.block} can never be evicted"
        assert found == len(self._nodes), "a kept block is not in the tree"

    def _is_evictable(self, node: Node) -> bool:
        return node.parent is not None and not node.children and not self._pool.num_holders(node.block)

    def _offer(self, node: Node) -> None:
        if self._is_evictable(node):
            heapq.heappush(self._leaves, (node.last_used, node.serial, node))

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        assert not node.children
        del parent.children[bisect_left(parent.children, node.tokens, key=_tokens_of)]
        if parent.parent is None and not parent.children:
            del self._roots[node.salt]
        del self._nodes[node.block]
        node.parent = None
        self._pool.drop(node.block)


def _common_length(left: Tokens, right: Tokens) -> int:
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1
    return length
