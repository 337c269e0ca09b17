"""A bounded queue between one side that puts and one that iterates, where either may end it.

    finish(error)   the putting side is done: what is queued is still delivered, then the iteration ends, or raises
    close()         the iterating side is done: what is queued is dropped, and `put` raises

Made for one event loop and not for threads. This file does not know messages or where they come from.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from tllm.core.errors import TransportError
from tllm.transport.base import StageMessage

T = TypeVar("T")


class Mailbox(Generic[T]):
    """`async for item in mailbox`, in order; at most `capacity` items wait."""

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._error: TransportError | None = None
        self._finished = False
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._closed = asyncio.Event()

    async def put(self, item: T) -> None:
        """Wait for room. Raises TransportError, and the item is not delivered, when either side ended the mailbox."""
        while len(self._items) >= self._capacity and not self._finished:
            self._writable.clear()
            await self._writable.wait()
        if self._finished:
            raise TransportError("the receiver closed the link" if self._closed.is_set() else "the link is closed")
        self._items.append(item)
        self._readable.set()

    def finish(self, error: TransportError | None = None) -> None:
        """No more will come: the iteration ends after what is queued, and raises `error` if there is one. Only the
        first end counts."""
        if not self._finished:
            self._finished = True
            self._error = error
            self._readable.set()
            self._writable.set()

    def close(self) -> None:
        """Drop what is queued; the iteration ends. Idempotent."""
        self.finish()
        self._error = None
        self._items.clear()
        self._closed.set()

    async def aclose(self) -> None:
        """`close`, under the name that everything that can be awaited for its end has."""
        self.close()

    async def wait_closed(self) -> None:
        """Until the iterating side closes."""
        await self._closed.wait()

    def __aiter__(self) -> Mailbox[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._finished:
                raise StopAsyncIteration
            self._readable.clear()
            await self._readable.wait()
        self._writable.set()
        return self._items.popleft()


Inbox = Mailbox[StageMessage]
"""The receiving end of a link. Ends when closed by either side, raises TransportError when the peer is lost."""
