"""Waiting with a client: event streams that say they live, and work that ends when nobody waits for it any more.

This file does not know what is in an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tllm.api.errors import ClientGone, ErrorReply, RefusedError, internal_error, reply_for
from tllm.core.errors import TllmError

logger = logging.getLogger(__name__)

PING = b": ping\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

Write = Callable[[bytes], Awaitable[None]]
Result = TypeVar("Result")


async def while_connected(receive: Receive, work: Coroutine[object, object, Result]) -> Result:
    """The result of `work`; when the client goes away first, cancel it, wait for its end and raise ClientGone.

    The request's body must have been read. Cancelling this cancels `work`.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait((task, watch))


async def together(works: Sequence[Coroutine[object, object, None]]) -> None:
    """Run all; when one fails, cancel the others, wait for their end and raise what the first one raised."""
    if len(works) == 1:  # the usual case needs no task of its own
        await works[0]
        return
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def reply_for_any(error: Exception, request_id: str) -> ErrorReply:
    """The reply to whatever a request raised; a bug is logged here, with its traceback."""
    if isinstance(error, RefusedError):
        return error.reply
    if isinstance(error, TllmError):
        reply = reply_for(error)
        if reply.status >= 500 and reply.status != 503:
            logger.error("request %s failed: %s", request_id, error)
        return reply
    logger.error("request %s failed by a bug", request_id, exc_info=error)
    return internal_error(request_id)


class EventStream(Response):
    """A response of server-sent events, written as bytes by `produce`, which ends it by returning.

    An error from `produce` is told in a last event and the stream closes without its usual end. A client that goes
    away cancels `produce`; `close` is called in any case. Writing waits for a slow reader.
    """

    def __init__(
        self,
        produce: Callable[[Write], Coroutine[object, object, None]],
        *,
        close: Callable[[], None],
        request_id: str,
        ping_interval_s: float,
    ) -> None:
        super().__init__(None, 200, HEADERS)
        del self.headers["content-length"]
        self._produce = produce
        self._close = close
        self._request_id = request_id
        self._ping_interval_s = ping_interval_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._run(send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._close()

    async def _run(self, send: Send) -> None:
        writer = _Writer(send)
        pings = asyncio.create_task(writer.ping_when_idle(self._ping_interval_s))
        try:
            await self._produce(writer.write)
        except Exception as error:  # noqa: BLE001  (the request's boundary, once its response has begun)
            await writer.write(b"data: " + reply_for_any(error, self._request_id).body() + b"\n\n")
        finally:
            pings.cancel()
            await asyncio.wait((pings,))


class _Writer:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._clock = asyncio.get_running_loop().time
        self._num_writing = 0  # several choices of one request may wait for the reader at once
        self._last_s = self._clock()

    async def write(self, data: bytes) -> None:
        """Pass `data` on, whole and in order of calls; waits while the reader is slow."""
        self._num_writing += 1
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            self._num_writing -= 1
            self._last_s = self._clock()

    async def ping_when_idle(self, interval_s: float) -> None:
        while True:
            idle_s = self._clock() - self._last_s
            if self._num_writing == 0 and idle_s >= interval_s:
                await self.write(PING)
                idle_s = 0.0
            await asyncio.sleep(max(interval_s - idle_s, interval_s / 10))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
