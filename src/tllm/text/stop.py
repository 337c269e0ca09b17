"""Stop strings: where a stream of text must end, and how much of it must wait until that is known.

The rules:

1. Text ends where a stop string first stands complete in it; of several complete at the same character, the longest
   counts. That moment does not depend on how the text was cut into tokens, and no later text can change it.
2. Text that may still turn out to be the beginning of a stop string is held back, and no more than that.

All strings are sought at once by the automaton of Aho and Corasick (CACM 18:6, 1975): its state is the longest suffix
of the text that begins a stop string, so a state's depth is exactly what rule 2 holds back, and each character costs
amortised constant time however many and long the strings are.

This file does not know tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tllm.core.errors import RequestError


@dataclass(slots=True, kw_only=True)
class _Node:
    depth: int
    children: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None  # the longest proper suffix that begins a stop string; None at the root
    stop: str | None = None  # the longest stop string that ends here


class StopMatcher:
    """Passes text through until a stop string appears."""

    def __init__(self, stop: Iterable[str], *, include_stop_string: bool = False) -> None:
        """`include_stop_string` lets the stop string itself through. Raises RequestError for an empty stop string."""
        self._root = _Node(depth=0)
        self._state = self._root
        self._held = ""
        self._include = include_stop_string
        self.stopped: str | None = None
        for string in stop:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        if not string:
            raise RequestError("A stop string is empty; give at least one character, or leave it out.", param="stop")
        node = self._root
        for char in string:
            node = node.children.setdefault(char, _Node(depth=node.depth + 1))
        node.stop = string

    def _link(self) -> None:
        """Set the fallbacks, breadth first: a node's fallback is shallower, so it is ready before."""
        queue = deque([self._root])
        while queue:
            node = queue.popleft()
            for char, child in node.children.items():
                child.fallback = self._root if node.fallback is None else self._next(node.fallback, char)
                child.stop = child.stop or child.fallback.stop
                queue.append(child)

    def _next(self, node: _Node, char: str) -> _Node:
        while (child := node.children.get(char)) is None:
            if node.fallback is None:
                return node
            node = node.fallback
        return child

    def push(self, text: str) -> str:
        """The text that is now sure to stand before any stop string. Empty once `stopped` is set."""
        if self.stopped is not None:
            return ""
        if not self._root.children:
            return text
        text = self._held + text
        state = self._state
        for index in range(len(self._held), len(text)):
            state = self._next(state, text[index])
            if state.stop is not None:
                self.stopped = state.stop
                self._held, self._state = "", self._root
                end = index + 1
                return text[: end if self._include else end - len(state.stop)]
        self._state = state
        self._held = text[len(text) - state.depth :]
        return text[: len(text) - state.depth]

    def finish(self) -> str:
        """What was held back: the text ended, and it is no stop string."""
        held, self._held, self._state = self._held, "", self._root
        return held
