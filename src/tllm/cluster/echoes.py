"""What a link takes, by how soon a peer answers: the round trip of nothing, and bytes per second of more.

This file does not know which nodes there are, nor what is planned by these numbers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final, Protocol

from tllm.transport.rpc import WINDOW_BYTES

Clock = Callable[[], float]

MAX_BYTES_PER_S: Final = 10e9  # what a link reports that is too fast to tell

_NUM_ECHOES: Final = 20
_BLOB_SIZES: Final = (64 << 10, 512 << 10, 1 << 20, 4 << 20)
_BLOBS_PER_SIZE: Final = 3
_BLOBS_S: Final = 0.5
# A stream waits for word of its window once that much is on its way; over a long link the wait would look like a slow
# rate, and what steps send there is mostly smaller than the window.
_LARGE_BYTES: Final = WINDOW_BYTES // 2
_SHORT_RTT_S: Final = 4e-3  # within which a window passes at 2 Gb/s


class Echoes(Protocol):
    """A peer that takes bytes and says when all of them are there: `transport.shards.ShardClient`."""

    async def echo(self, data: bytes) -> None: ...


async def measure_link(client: Echoes, *, clock: Clock = time.perf_counter) -> tuple[float, float]:
    """Seconds to the peer and back, and bytes per second on the way there. Raises TransportError.

    The time of a blob is the round trip and the bytes; the difference of two sizes' times is the bytes alone. The best
    time of a size counts, for a connection has yet to find out how much it may send at once. Over long links nothing
    is sent that is larger than half of a stream's window.
    """

    async def echo_s(data: bytes) -> float:
        began = clock()
        await client.echo(data)
        return clock() - began

    await echo_s(b"")  # whatever the first message has to wait for
    small = [await echo_s(b"") for _ in range(_NUM_ECHOES)]
    best = [(0, min(small))]  # size, seconds
    until = clock() + _BLOBS_S
    for size in _BLOB_SIZES:
        if clock() >= until or (size > _LARGE_BYTES and best[0][1] > _SHORT_RTT_S):
            break
        blob = bytes(size)
        times = [await echo_s(blob)]
        while len(times) < _BLOBS_PER_SIZE and clock() < until:
            times.append(await echo_s(blob))
        best.append((size, min(times)))
    (less, less_s), (more, more_s) = best[-2:]
    seconds = max(more_s - less_s, (more - less) / MAX_BYTES_PER_S)
    return statistics.median(small), (more - less) / seconds


_GLANCE_BYTES: Final = 64 << 10
_GLANCES: Final = 3


async def glance_at_link(client: Echoes, *, clock: Clock = time.perf_counter) -> tuple[float, float]:
    """The same by a few messages that disturb nobody: good enough to see that a link is no longer what it was."""

    async def echo_s(data: bytes) -> float:
        began = clock()
        await client.echo(data)
        return clock() - began

    await echo_s(b"")
    rtt_s = min([await echo_s(b"") for _ in range(_GLANCES)])
    blob_s = min([await echo_s(bytes(_GLANCE_BYTES)) for _ in range(_GLANCES)])
    return rtt_s, _GLANCE_BYTES / max(blob_s - rtt_s, _GLANCE_BYTES / MAX_BYTES_PER_S)
