"""A network of machines on one: a Linux network namespace per node, and a router between them that loses packets.

    node a: namespace, TUN device 10.77.0.1 ─┐
    node b: namespace, TUN device 10.77.0.2 ─┼─ router: one thread of this process ─ a Way for every ordered pair
    node c: namespace, TUN device 10.77.0.3 ─┘

Every node reaches every other, and multicast reaches all. Packets are delayed, squeezed and lost each by itself, so
TCP is really half open, really sends again and really gives up, which no proxy of connections (`testing/links`) shows.
Processes in a node have its host name too, so that tllm takes nodes for machines.

Needs root on Linux; `missing` says what else. This file does not know what runs in the nodes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import heapq
import os
import random
import re
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tllm.testing.links import Line

MTU = 1500
MAX_MTU = 65000  # fewer and larger packets: a router in Python carries Gb/s of them

_NETWORK = (10, 77, 0)
_TUN = Path("/dev/net/tun")
_NAMESPACES = Path("/run/netns")
_PREFIX = "tllm-test"
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_IDLE_S = 60.0
_READS = 64  # packets of one node before it is another's turn
_STOP_S = 10.0

T = TypeVar("T")


def missing() -> str:
    """Why there can be no such network here; empty when there can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.access(_TUN, os.R_OK | os.W_OK):
        return f"{_TUN} cannot be opened"
    for program in ("ip", "unshare", "hostname"):
        if shutil.which(program) is None:
            return f"the program {program} is not installed"
    made = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else "the kernel refuses namespaces here"


def available() -> bool:
    return not missing()


@dataclass(frozen=True, slots=True, kw_only=True)
class WayStatistics:
    num_packets: int  # delivered
    num_bytes: int
    num_lost: int  # to loss, to a full queue, or because it was down


class Way:
    """From one node to another. Settings count for packets to come; any thread may change them."""

    def __init__(self, seed: str) -> None:
        self.line = Line(seed)
        self.up = True
        self.tap: Callable[[bytes], None] | None = None
        self._loss = 0.0
        self._random = random.Random(f"{seed} loss")
        self._num_packets = self._num_bytes = self._num_lost = 0

    def set(
        self,
        *,
        delay_s: float | None = None,
        jitter_s: float | None = None,
        rate_bits_per_s: float | None = None,
        loss: float | None = None,
        up: bool | None = None,
    ) -> None:
        """Change what is given. The delay is one way; the jitter, between 0 and `jitter_s`, is added to it and keeps
        the order; a rate of math.inf is no limit; `loss` is the probability that a packet is lost; a way that is not
        `up` loses all, those under way too."""
        if delay_s is not None:
            self.line.delay_s = delay_s
        if jitter_s is not None:
            self.line.jitter_s = jitter_s
        if rate_bits_per_s is not None:
            self.line.bytes_per_s = rate_bits_per_s / 8
        if loss is not None:
            self._loss = loss
        if up is not None:
            self.up = up

    def statistics(self) -> WayStatistics:
        return WayStatistics(num_packets=self._num_packets, num_bytes=self._num_bytes, num_lost=self._num_lost)

    def send(self, now: float, num_bytes: int) -> float | None:
        """When a packet arrives that is sent now; None when it does not."""
        lost = not self.up or (self._loss > 0 and self._random.random() < self._loss) or self.line.wait_s(now) > 0
        if lost:
            self._num_lost += 1
            return None
        return self.line.accept(now, num_bytes)

    def arrive(self, num_bytes: int, *, delivered: bool) -> None:
        self._num_packets += delivered
        self._num_bytes += num_bytes * delivered
        self._num_lost += not delivered


@dataclass(frozen=True, slots=True)
class Edge:
    """Both ways between two nodes."""

    there: Way
    back: Way

    def set(
        self,
        *,
        delay_s: float | None = None,
        jitter_s: float | None = None,
        rate_bits_per_s: float | None = None,
        loss: float | None = None,
        up: bool | None = None,
    ) -> None:
        """As `Way.set`, the same for both: a round trip takes twice the delay."""
        for way in (self.there, self.back):
            way.set(delay_s=delay_s, jitter_s=jitter_s, rate_bits_per_s=rate_bits_per_s, loss=loss, up=up)


class Rig:
    """The network while it stands. Made by `network`."""

    def __init__(self, namespaces: dict[str, str], ways: dict[tuple[str, str], Way]) -> None:
        self.nodes = tuple(namespaces)
        self._namespaces = namespaces
        self._ways = ways

    def address(self, node: str) -> str:
        """Its IPv4 address."""
        return _address(self.nodes.index(node))

    def command(self, node: str, argv: Sequence[str] = ()) -> list[str]:
        """How to run `argv` in the node, under its host name. The process that is started becomes the program: its pid
        and signals are the program's own."""
        enter = ["ip", "netns", "exec", self._namespaces[node]]
        return [*enter, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', node, *argv]

    def call(self, node: str, function: Callable[[], T]) -> T:
        """What the function returns on a thread that is in the node: sockets that it opens stay there, whoever uses
        them afterwards."""
        return _call_in(self._namespaces[node], function)

    def way(self, source: str, target: str) -> Way:
        return self._ways[source, target]

    def edge(self, one: str, other: str) -> Edge:
        return Edge(self.way(one, other), self.way(other, one))

    def listen_in(self, tap: Callable[[bytes], None] | None) -> None:
        """Show every packet between nodes to `tap`, on the router's thread; None ends it."""
        for way in self._ways.values():
            way.tap = tap

    def partition(self, nodes: Collection[str]) -> None:
        """Separate these nodes from all others, without a word to either."""
        for (source, target), way in self._ways.items():
            if (source in nodes) != (target in nodes):
                way.set(up=False)

    def heal(self) -> None:
        """Let every way be up."""
        for way in self._ways.values():
            way.set(up=True)


@contextmanager
def network(nodes: Sequence[str], *, mtu: int = MTU, seed: int = 0) -> Iterator[Rig]:
    """Nodes of these names, at first without delay or loss. On exit what still runs in them is killed, and neither
    namespace nor device nor thread is left; what a process that was killed left behind is removed first."""
    assert not (reason := missing()), reason
    assert len(set(nodes)) == len(nodes) < 250
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", node) for node in nodes), nodes
    assert 576 <= mtu <= MAX_MTU
    _remove_left_behind()
    token = secrets.token_hex(3)
    namespaces = {node: f"{_PREFIX}-{os.getpid()}-{token}-{node}" for node in nodes}
    with ExitStack() as stack:
        tuns: dict[str, int] = {}
        for index, (node, namespace) in enumerate(namespaces.items()):
            _ip("netns", "add", namespace)
            stack.callback(_remove, namespace)
            device = f"tt{os.getpid()}x{index}"  # at most 15 characters, and only until it is in its node
            tuns[node] = _open_tun(device)
            stack.callback(os.close, tuns[node])
            _ip("link", "set", device, "netns", namespace)
            _ip("-n", namespace, "link", "set", device, "name", "tun0")
            _ip("-n", namespace, "addr", "add", f"{_address(index)}/24", "dev", "tun0")
            _ip("-n", namespace, "link", "set", "tun0", "mtu", str(mtu), "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "route", "add", "default", "dev", "tun0")
        ways = {
            (source, target): Way(f"{seed} {source} {target}")
            for source in nodes
            for target in nodes
            if source != target
        }
        router = _Router(tuns, ways)
        stack.callback(router.close)
        router.start()
        yield Rig(namespaces, ways)


class _Router:
    """Moves packets between TUN devices, on a thread of its own."""

    def __init__(self, tuns: dict[str, int], ways: dict[tuple[str, str], Way]) -> None:
        nodes = list(tuns)
        self._neighbours = {
            tuns[source]: {
                _packed(nodes.index(target)): (ways[source, target], tuns[target])
                for target in nodes
                if target != source
            }
            for source in nodes
        }
        self._under_way: list[tuple[float, int, Way, int, bytes]] = []
        self._num_sent = 0
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="router", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        os.close(self._wake_write)
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)
        os.close(self._wake_read)

    def _run(self) -> None:
        sources = [*self._neighbours, self._wake_read]
        while True:
            wait_s = self._under_way[0][0] - time.monotonic() if self._under_way else _IDLE_S
            # select(2) sleeps to the microsecond; epoll, as Python calls it, to the millisecond above.
            readable, _, _ = select.select(sources, [], [], max(0.0, wait_s))
            if self._wake_read in readable:
                return
            self._deliver()
            for source in readable:
                self._receive(source)
            self._deliver()

    def _receive(self, source: int) -> None:
        for _ in range(_READS):
            try:
                packet = os.read(source, 65536)
            except OSError:  # there is no more, or the device is down
                return
            if packet[0] >> 4 != 4:
                continue
            neighbours = self._neighbours[source]
            target = packet[16:20]
            if (found := neighbours.get(target)) is not None:
                self._send(*found, packet)
            elif target[0] >= 224 or target[3] == 255:  # multicast and broadcast
                for way, tun in neighbours.values():
                    self._send(way, tun, packet)

    def _send(self, way: Way, tun: int, packet: bytes) -> None:
        if way.tap is not None:
            way.tap(packet)
        arrival = way.send(time.monotonic(), len(packet))
        if arrival is not None:
            self._num_sent += 1  # orders packets that arrive at once
            heapq.heappush(self._under_way, (arrival, self._num_sent, way, tun, packet))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, way, tun, packet = heapq.heappop(self._under_way)
            delivered = way.up
            if delivered:
                try:
                    os.write(tun, packet)
                except OSError:  # the device's queue is full, or it is down
                    delivered = False
            way.arrive(len(packet), delivered=delivered)


def _address(index: int) -> str:
    return ".".join(map(str, (*_NETWORK, index + 1)))


def _packed(index: int) -> bytes:
    return bytes((*_NETWORK, index + 1))


def _open_tun(device: str) -> int:
    """The file whose packets are the device's; the device lives as long as it is open."""
    tun = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(tun)
        raise
    return tun


def _call_in(namespace: str, function: Callable[[], T]) -> T:
    def run() -> T:
        with (_NAMESPACES / namespace).open("rb") as file:
            _enter(file.fileno())
        return function()

    with ThreadPoolExecutor(max_workers=1) as thread:  # its own: who has entered a namespace does not come back
        return thread.submit(run).result()


def _enter(namespace: int) -> None:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _ip(*args: str) -> str:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(errno.EIO, f"ip {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


def _remove(namespace: str) -> None:
    deadline = time.monotonic() + _STOP_S
    while pids := _ip("netns", "pids", namespace).split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        assert time.monotonic() < deadline, f"{namespace}: processes {', '.join(pids)} cannot be killed"
        time.sleep(0.01)
    _ip("netns", "del", namespace)


def _remove_left_behind() -> None:
    for namespace in _NAMESPACES.glob(f"{_PREFIX}-*"):
        pid = namespace.name.removeprefix(f"{_PREFIX}-").partition("-")[0]
        if not Path("/proc", pid).exists():
            try:
                _remove(namespace.name)
            except OSError:
                if namespace.exists():  # else another process was faster
                    raise
