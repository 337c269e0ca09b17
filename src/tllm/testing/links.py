"""A network cable that tests can stretch, squeeze, cut and let rot: a TCP proxy for one edge, on a thread of its own.

    who connects ──▶ listener │ read ─▶ rate ─▶ delay line ─▶ write │ ──▶ target        Direction.TO_TARGET
                 ◀── write │ delay line ◀─ rate ◀─ read │ ◀──                          Direction.TO_CLIENT

Rules:
    Each direction is one line with one rate, shared by all connections, and it keeps the order of what enters it.
    What waits for the rate is at most QUEUE_S long, so that backpressure reaches the sender; what is under way is at
    most LINE_BYTES per connection. The kernel's buffers on either side of the proxy are fixed and small.
    A direction that does not flow loses nothing: like TCP, which sends again, it goes on when it is healed.
    Whatever is random is drawn from the seed.

What a TCP proxy cannot do, `testing/namespaces` does: lose single packets, or acknowledge nothing in one direction.
This file does not know what is carried: gRPC, TLS and HTTP look the same here.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import random
import selectors
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

log = logging.getLogger(__name__)

QUEUE_S = 0.05  # that bytes may wait for a slow line, as in a router that is not bloated
LINE_BYTES = 32 << 20  # of one connection on their way: 1 Gb/s at 250 ms
SOCKET_BYTES = 256 << 10  # in each of the proxy's kernel buffers
_MAX_READ_BYTES = 256 << 10
_MIN_READ_BYTES = 1500
_READ_S = 0.002  # of a line's time that one read may take
_BACKLOG = 128
_CALL_S = 10.0  # for a call from another thread to be done
_CONNECT_S = 10.0  # for the target to accept
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST, throw away what was not sent

Which = Callable[[int], bool]  # chooses connections by their number, in the order of arrival, from 0


class Direction(Enum):
    TO_TARGET = "to target"
    TO_CLIENT = "to client"


BOTH = (Direction.TO_TARGET, Direction.TO_CLIENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStatistics:
    num_connections: int  # that ever arrived
    num_open: int
    bytes_to_target: int  # delivered
    bytes_to_client: int


class Line:
    """When bytes arrive at the other end of one direction. Pure: who asks says what time it is."""

    def __init__(self, seed: str) -> None:
        self.delay_s = 0.0
        self.jitter_s = 0.0
        self.bytes_per_s = math.inf
        self._random = random.Random(seed)
        self._free_at = -math.inf  # when all that was accepted has left the near end
        self.last_arrival = -math.inf  # of what was accepted
        self._corrupt = 0.0
        self._bytes_to_next_damage = 0

    @property
    def read_bytes(self) -> int:
        """How much to read at once: little on a slow line, so that connections share it."""
        return int(min(_MAX_READ_BYTES, max(_MIN_READ_BYTES, self.bytes_per_s * _READ_S)))

    def wait_s(self, now: float) -> float:
        """How long whoever wants to send must wait because too much waits already."""
        return max(0.0, self._free_at - now - QUEUE_S)

    def accept(self, now: float, num_bytes: int) -> float:
        """Take bytes; returns when they arrive, never before what was taken earlier."""
        self._free_at = max(now, self._free_at) + num_bytes / self.bytes_per_s
        arrival = self._free_at + self.delay_s
        if self.jitter_s:
            arrival += self._random.uniform(0.0, self.jitter_s)
        self.last_arrival = max(arrival, self.last_arrival)
        return self.last_arrival

    def corrupt(self, probability: float) -> None:
        """From now on change each byte with this probability, independently."""
        self._corrupt = probability
        self._bytes_to_next_damage = self._distance()

    def carry(self, data: bytes) -> bytes:
        """The bytes as they arrive. Which ones are damaged depends on the seed, not on how they are cut."""
        if not self._corrupt:
            return data
        damaged = bytearray(data)
        place = self._bytes_to_next_damage
        while place < len(data):
            damaged[place] ^= self._random.randrange(1, 256)
            place += 1 + self._distance()
        self._bytes_to_next_damage = place - len(data)
        return bytes(damaged)

    def _distance(self) -> int:
        """How many bytes stay whole before the next damage: geometrically distributed."""
        if not 0.0 < self._corrupt < 1.0:
            return 0
        return int(math.log(1.0 - self._random.random()) / math.log1p(-self._corrupt))


class EmulatedLink:
    """One edge: connections to `address` go on to the target. Every method may be called from any thread but the
    link's own; what it says is done when it returns. Made by `emulated_link`."""

    def __init__(self, *, target: tuple[str, int], listen_host: str, listen_port: int, seed: int) -> None:
        self.target = target  # may be changed: it counts for connections to come
        self.host = listen_host
        self.port = listen_port  # the real one once the link is open
        self._lines = {direction: Line(f"{seed} {direction.value}") for direction in BOTH}
        self._turns = {direction: asyncio.Lock() for direction in BOTH}
        self._stalls: dict[Direction, Which | None] = dict.fromkeys(BOTH)
        self._delivered = dict.fromkeys(BOTH, 0)
        self._connections: dict[int, _Connection] = {}
        self._num_connections = 0
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._fillers: set[Any] = set()  # addresses of our own connections that fill the listener's queue
        self._accepting: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._listener: socket.socket
        self._tasks: asyncio.TaskGroup

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def statistics(self) -> LinkStatistics:
        return LinkStatistics(
            num_connections=self._num_connections,
            num_open=len(self._connections),
            bytes_to_target=self._delivered[Direction.TO_TARGET],
            bytes_to_client=self._delivered[Direction.TO_CLIENT],
        )

    def shape(
        self,
        direction: Direction | None = None,
        *,
        delay_s: float | None = None,
        jitter_s: float | None = None,
        rate_bits_per_s: float | None = None,
    ) -> None:
        """Set what is given, in one direction or (None) in both: the delay is one way, the jitter is added to it and
        is between 0 and `jitter_s`, a rate of math.inf is no limit. What is under way arrives as it would have."""
        assert min(delay_s or 0.0, jitter_s or 0.0) >= 0
        assert rate_bits_per_s is None or rate_bits_per_s > 0

        async def change() -> None:
            for line in self._lines_of(direction):
                if delay_s is not None:
                    line.delay_s = delay_s
                if jitter_s is not None:
                    line.jitter_s = jitter_s
                if rate_bits_per_s is not None:
                    line.bytes_per_s = rate_bits_per_s / 8

        self._call(change())

    def corrupt(self, probability: float, direction: Direction | None = None) -> None:
        """Change each byte with this probability, until it is 0 again or the link is healed."""
        assert 0.0 <= probability <= 1.0

        async def change() -> None:
            for line in self._lines_of(direction):
                line.corrupt(probability)

        self._call(change())

    def cut(self) -> None:
        """Reset every connection and refuse new ones, as a machine does whose program ended."""
        self._call(self._cut())

    def reset_connections(self, which: Which | None = None) -> None:
        """Reset the chosen connections, or all; new ones are welcome. Both ends have been told on return."""
        self._call(self._reset(which))

    def black_hole(self, which: Which | None = None) -> None:
        """Forward nothing, close nothing, say nothing, as a pulled cable does. Without `which`, new connections hang
        while they connect; with it, the chosen ones stall, those to come among them."""
        self._call(self._stall(BOTH, which))

    def partition(self, direction: Direction, which: Which | None = None) -> None:
        """As `black_hole`, but bytes the other way still arrive. (To connect takes both ways.)"""
        self._call(self._stall((direction,), which))

    def heal(self) -> None:
        """Undo cut, black_hole, partition and corrupt. What was held back arrives; shapes stay."""
        self._call(self._heal())

    def close(self) -> None:
        """Let `run` end: nothing listens then, and every connection has been reset."""

        async def close() -> None:
            self._closing.set()

        self._call(close())

    # The rest runs on the link's own thread.

    def run(self, opened: Future[None]) -> None:
        # select(2) sleeps to the microsecond; epoll, as Python calls it, to the millisecond above.
        loop_factory = lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())  # noqa: E731
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(self._main(opened))

    async def _main(self, opened: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = self._bind()
        self._listener.listen(_BACKLOG)
        self.port = self._listener.getsockname()[1]
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._accepting = self._tasks.create_task(self._accept())
                opened.set_result(None)
                await self._closing.wait()
                await self._stop_accepting()
                await self._reset(None)
        finally:
            self._listener.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)

    def _lines_of(self, direction: Direction | None) -> list[Line]:
        return [self._lines[each] for each in BOTH if direction in (None, each)]

    def _bind(self) -> socket.socket:
        listener = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        _fix_buffers(listener)  # before it listens: what it accepts inherits them
        try:
            listener.bind((self.host, self.port))
        except OSError:
            listener.close()
            raise
        return listener

    async def _accept(self) -> None:
        while True:
            client, address = await self._loop.sock_accept(self._listener)
            if address in self._fillers:
                self._fillers.discard(address)
                client.close()
                continue
            connection = _Connection(self, self._num_connections, client)
            self._connections[self._num_connections] = connection
            self._num_connections += 1
            connection.task = self._tasks.create_task(connection.serve())

    async def _stop_accepting(self) -> None:
        if self._accepting is not None:
            accepting, self._accepting = self._accepting, None
            accepting.cancel()
            await asyncio.wait({accepting})

    async def _cut(self) -> None:
        await self._stop_accepting()
        self._listener.close()
        self._listener = self._bind()  # keeps the port, and refuses because it does not listen
        self._fillers.clear()
        await self._reset(None)

    async def _reset(self, which: Which | None) -> None:
        chosen = [each.task for number, each in self._connections.items() if which is None or which(number)]
        for task in chosen:
            task.cancel()
        if chosen:
            await asyncio.wait(chosen)

    async def _stall(self, directions: tuple[Direction, ...], which: Which | None) -> None:
        for direction in directions:
            self._stalls[direction] = which or (lambda _number: True)
        if which is None and self._accepting is not None:
            await self._stop_accepting()
            await self._fill_backlog()

    async def _fill_backlog(self) -> None:
        """Let connects hang: a kernel whose queue of connections is full drops the packets that open new ones."""
        self._listener.listen(0)
        for _ in range(_BACKLOG + 2):
            with socket.socket(self._listener.family, socket.SOCK_STREAM) as filler:
                filler.setblocking(False)
                try:
                    async with asyncio.timeout(0.05):
                        await self._loop.sock_connect(filler, (self.host, self.port))
                except TimeoutError:
                    return
                self._fillers.add(filler.getsockname())

    async def _heal(self) -> None:
        for direction in BOTH:
            self._stalls[direction] = None
            self._lines[direction].corrupt(0.0)
        self._changed.set()
        self._changed = asyncio.Event()
        if self._accepting is None:
            self._listener.listen(_BACKLOG)
            self._accepting = self._tasks.create_task(self._accept())

    async def flowing(self, directions: tuple[Direction, ...], number: int) -> None:
        """Wait until these directions flow for this connection."""
        while any((stalls := self._stalls[each]) is not None and stalls(number) for each in directions):
            await self._changed.wait()

    async def admit(self, direction: Direction, num_bytes: int) -> float:
        """Wait until the line has room, in turn with other connections; returns when the bytes arrive."""
        line = self._lines[direction]
        async with self._turns[direction]:
            if (wait_s := line.wait_s(self._loop.time())) > 0:
                await asyncio.sleep(wait_s)
            return line.accept(self._loop.time(), num_bytes)

    def read_bytes(self, direction: Direction) -> int:
        return self._lines[direction].read_bytes

    def carry(self, direction: Direction, data: bytes) -> bytes:
        return self._lines[direction].carry(data)

    def delivered(self, direction: Direction, num_bytes: int) -> None:
        self._delivered[direction] += num_bytes

    def forget(self, number: int) -> None:
        del self._connections[number]


class _Connection:
    """One connection and its continuation to the target."""

    def __init__(self, link: EmulatedLink, number: int, client: socket.socket) -> None:
        self.task: asyncio.Task[None]
        self._link = link
        self._number = number
        self._client = client

    async def serve(self) -> None:
        """Until both sides have said all, or one of them is reset; then the other one is told."""
        sockets = [self._client]
        in_order = False
        try:
            self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._link.flowing(BOTH, self._number)
            sockets.append(target := await _connect(self._link.target))
            async with asyncio.TaskGroup() as tasks:
                for direction, source, sink in (
                    (Direction.TO_TARGET, self._client, target),
                    (Direction.TO_CLIENT, target, self._client),
                ):
                    pump = _Pump(self._link, self._number, direction, source, sink)
                    tasks.create_task(pump.read())
                    tasks.create_task(pump.write())
            in_order = True
        except* OSError as errors:
            log.debug("connection %d is gone: %s", self._number, errors.exceptions[0])
        finally:
            for each in sockets:
                if not in_order:
                    with suppress(OSError):  # it may be gone already
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                each.close()
            self._link.forget(self._number)


class _Pump:
    """One direction of one connection. An empty `data` is the end of the stream, None a reset."""

    def __init__(
        self, link: EmulatedLink, number: int, direction: Direction, source: socket.socket, sink: socket.socket
    ) -> None:
        self._link = link
        self._number = number
        self._direction = direction
        self._source = source
        self._sink = sink
        self._under_way: deque[tuple[float, bytes | None]] = deque()
        self._num_bytes = 0  # under way
        self._moved = asyncio.Event()  # something was put in or taken out

    async def read(self) -> None:
        loop = asyncio.get_running_loop()
        data: bytes | None = b"more"
        while data:
            await self._link.flowing((self._direction,), self._number)
            while self._num_bytes >= LINE_BYTES:
                await self._wait()
            try:
                data = await loop.sock_recv(self._source, self._link.read_bytes(self._direction))
            except OSError:
                data = None
            size = self._link.read_bytes(self._direction)  # less than was read, if the line became slow meanwhile
            for start in range(0, len(data or b""), size):
                assert data
                await self._enter(data[start : start + size])
        await self._enter(data)

    async def _enter(self, data: bytes | None) -> None:
        arrival = await self._link.admit(self._direction, len(data or b""))
        self._under_way.append((arrival, data))
        self._num_bytes += len(data or b"")
        self._moved.set()

    async def write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._under_way:
                await self._wait()
            arrival, data = self._under_way[0]
            if (wait_s := arrival - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            await self._link.flowing((self._direction,), self._number)
            if data is None:
                raise ConnectionResetError(errno.ECONNRESET, "the other side was reset")
            try:
                if not data:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                await loop.sock_sendall(self._sink, self._link.carry(self._direction, data))
            except OSError:
                await self._link.flowing(BOTH, self._number)  # nobody hears of a reset through a black hole
                raise
            self._link.delivered(self._direction, len(data))
            self._under_way.popleft()
            self._num_bytes -= len(data)
            self._moved.set()

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()


async def _connect(target: tuple[str, int]) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(*target, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _fix_buffers(sock)
        async with asyncio.timeout(_CONNECT_S):
            await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _fix_buffers(sock: socket.socket) -> None:
    """A buffer that grows, as the kernel's do, would be a longer queue than the line's."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)


@contextmanager
def emulated_link(
    *, target: tuple[str, int], listen_host: str = "127.0.0.1", listen_port: int = 0, seed: int = 0
) -> Iterator[EmulatedLink]:
    """A link that lives as long as the context: what connects to its `address` reaches `target`, at first unhindered.
    On exit all its connections are reset, and neither thread nor socket is left.

    Raises OSError when the port cannot be had.
    """
    link = EmulatedLink(target=target, listen_host=listen_host, listen_port=listen_port, seed=seed)
    opened: Future[None] = Future()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="link") as threads:
        running = threads.submit(link.run, opened)
        try:
            wait((opened, running), timeout=_CALL_S, return_when=FIRST_COMPLETED)
            if opened.done():
                yield link
        finally:
            if not running.done():
                link.close()
            running.result(_CALL_S)
