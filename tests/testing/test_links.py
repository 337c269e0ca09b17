"""The emulated link against real sockets: what it promises about bytes, order, resets and silence."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.testing.links import BOTH, LINE_BYTES, QUEUE_S, Direction, EmulatedLink, Line, emulated_link

TIMEOUT_S = 10.0
SILENCE_S = 0.1  # to see that nothing comes: longer makes the tests slower and a false alarm no less impossible


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.create_server((host, 0), family=family)) as server:
        server.settimeout(TIMEOUT_S)
        yield server


class Ends:
    """A link with a target behind it, and connections made through it."""

    def __init__(self, link: EmulatedLink, server: socket.socket, stack: ExitStack) -> None:
        self.link = link
        self._server = server
        self._stack = stack

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a new connection. Bytes are sent, so that its number is known to be the next."""
        number = self.link.statistics().num_connections
        client = self._stack.enter_context(socket.create_connection((self.link.host, self.link.port), TIMEOUT_S))
        target = self._stack.enter_context(self._server.accept()[0])
        target.settimeout(TIMEOUT_S)
        assert self.link.statistics().num_connections == number + 1
        return client, target


@pytest.fixture
def ends() -> Iterator[Ends]:
    with ExitStack() as stack:
        server = stack.enter_context(listening())
        link = stack.enter_context(emulated_link(target=server.getsockname(), seed=1))
        yield Ends(link, server, stack)


def receive(sock: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes and (piece := sock.recv(min(num_bytes - len(data), 65536))):
        data += piece
    return bytes(data)


def receive_all(sock: socket.socket) -> bytes:
    return receive(sock, 1 << 30)


def assert_carries(one: socket.socket, other: socket.socket, data: bytes = b"hello") -> None:
    one.sendall(data)
    assert receive(other, len(data)) == data


def assert_silent(sock: socket.socket) -> None:
    """No byte, no end and no reset."""
    sock.settimeout(SILENCE_S)
    with pytest.raises(TimeoutError):
        sock.recv(1)
    sock.settimeout(TIMEOUT_S)


def assert_reset(sock: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        sock.recv(1)


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# Arithmetic of one line, without a clock.

PIECES = st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 0.01)), min_size=1, max_size=60)


@given(PIECES, st.floats(1e6, 1e9), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_line_carries_at_its_rate_after_its_delay_and_in_order(
    pieces: list[tuple[int, float]], bits_per_s: float, delay_s: float, jitter_s: float
) -> None:
    line = Line("seed")
    line.bytes_per_s, line.delay_s, line.jitter_s = bits_per_s / 8, delay_s, jitter_s
    now, num_bytes, arrivals = 0.0, 0, []
    busy_until = 0.0
    for size, pause_s in pieces:
        now += pause_s
        now += line.wait_s(now)
        busy_until = max(now, busy_until) + size / line.bytes_per_s
        assert busy_until - now <= QUEUE_S + size / line.bytes_per_s + 1e-9
        num_bytes += size
        arrivals.append(line.accept(now, size))
        assert arrivals[-1] >= busy_until + delay_s - 1e-9
        assert arrivals[-1] <= busy_until + delay_s + jitter_s + 1e-9
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] >= num_bytes / line.bytes_per_s + delay_s - 1e-9


@given(st.binary(min_size=50, max_size=300), st.lists(st.integers(0, 50), max_size=5), st.floats(0.01, 1))
def test_damage_depends_on_the_seed_and_not_on_how_bytes_are_cut(
    data: bytes, cuts: list[int], probability: float
) -> None:
    whole, pieces = Line("seed"), Line("seed")
    whole.corrupt(probability)
    pieces.corrupt(probability)
    places = [0, *sorted(cuts), len(data)]
    carried = [pieces.carry(data[start:stop]) for start, stop in pairwise(places)]
    assert b"".join(carried) == whole.carry(data)


@pytest.mark.parametrize("probability", [0.0, 0.01, 0.5, 1.0])
def test_as_many_bytes_are_damaged_as_was_asked_for(probability: float) -> None:
    line = Line("seed")
    line.corrupt(probability)
    num_damaged = sum(byte != 0 for byte in line.carry(bytes(100_000)))
    # Binomial, with a standard deviation of at most 160; the seed is fixed, so this passes always or never.
    assert num_damaged == pytest.approx(100_000 * probability, abs=800 * (probability not in (0, 1)))


# Real bytes.


@settings(max_examples=20, deadline=None)
@given(forth=st.lists(st.binary(max_size=100_000), max_size=4), back=st.lists(st.binary(max_size=1000), max_size=4))
def test_bytes_arrive_unchanged_and_each_direction_ends_by_itself(forth: list[bytes], back: list[bytes]) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(listening())
        link = stack.enter_context(emulated_link(target=server.getsockname()))
        link.shape(delay_s=0.001, jitter_s=0.002)
        client, target = Ends(link, server, stack).connect()
        for piece in forth:
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(target) == b"".join(forth)
        for piece in back:  # after the other direction has ended
            target.sendall(piece)
        target.close()
        assert receive_all(client) == b"".join(back)
        eventually(lambda: link.statistics().num_open == 0)
        statistics = link.statistics()
        assert statistics.bytes_to_target == sum(map(len, forth))
        assert statistics.bytes_to_client == sum(map(len, back))


def test_delay_counts_once_per_direction_and_can_be_changed_while_running(ends: Ends) -> None:
    client, target = ends.connect()

    def round_trip_s() -> float:
        start = time.monotonic()
        assert_carries(client, target)
        assert_carries(target, client)
        return time.monotonic() - start

    ends.link.shape(delay_s=0.05)
    assert 0.1 <= round_trip_s() < TIMEOUT_S
    ends.link.shape(Direction.TO_CLIENT, delay_s=0.0)
    assert 0.05 <= round_trip_s() < TIMEOUT_S
    ends.link.shape(delay_s=0.0)
    assert min(round_trip_s() for _ in range(20)) < 0.05


def test_connections_share_the_rate_of_a_direction(ends: Ends) -> None:
    pairs = [ends.connect(), ends.connect()]
    ends.link.shape(Direction.TO_TARGET, rate_bits_per_s=20e6)
    num_bytes = 250_000  # each: together 0.2 s
    start = time.monotonic()
    for client, _ in pairs:
        client.sendall(bytes(num_bytes))
    for _, target in pairs:
        assert len(receive(target, num_bytes)) == num_bytes
    # Only the last moment has a bound that a busy machine cannot break; what it would be at twice the rate is 0.1 s.
    assert time.monotonic() - start >= 2 * num_bytes * 8 / 20e6 - 0.01
    start = time.monotonic()
    for client, target in pairs:
        assert_carries(target, client, bytes(num_bytes))  # the other direction is as fast as before
    ends.link.shape(rate_bits_per_s=math.inf)
    for client, target in pairs:
        assert_carries(client, target)


def send_until_blocked(client: socket.socket, most: int) -> int:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    client.settimeout(SILENCE_S)
    sent = 0
    with suppress(TimeoutError):
        while sent < most:
            sent += client.send(bytes(65536))
    return sent


def test_a_slow_line_pushes_back_on_the_sender(ends: Ends) -> None:
    client, target = ends.connect()
    ends.link.shape(rate_bits_per_s=8e5)  # 100 kB/s: what is sent at once is in buffers
    sent = send_until_blocked(client, 8 << 20)
    assert sent < 2 << 20
    ends.link.shape(rate_bits_per_s=math.inf)
    assert len(receive(target, sent)) == sent


def test_a_reader_that_does_not_read_pushes_back_on_the_sender(ends: Ends) -> None:
    client, target = ends.connect()
    sent = send_until_blocked(client, 2 * LINE_BYTES)
    assert LINE_BYTES < sent < LINE_BYTES + (8 << 20)
    assert len(receive(target, sent)) == sent


def test_a_cut_link_resets_refuses_and_is_healed_at_the_same_port(ends: Ends) -> None:
    client, target = ends.connect()
    ends.link.cut()
    assert_reset(client)
    assert_reset(target)
    with pytest.raises(ConnectionRefusedError):
        ends.connect()
    ends.link.heal()
    assert_carries(*ends.connect())


def test_chosen_connections_are_reset_and_the_others_go_on(ends: Ends) -> None:
    pairs = [ends.connect() for _ in range(3)]
    ends.link.reset_connections(lambda number: number == 0)
    assert_reset(pairs[0][0])
    assert_reset(pairs[0][1])
    for client, target in pairs[1:]:
        assert_carries(client, target)
        assert_carries(target, client)
    ends.link.reset_connections()
    for client, target in pairs[1:]:
        assert_reset(client)
        assert_reset(target)
    assert_carries(*ends.connect())


def test_a_black_hole_says_nothing_until_it_is_healed(ends: Ends) -> None:
    client, target = ends.connect()
    ends.link.black_hole()
    client.sendall(b"lost?")
    assert_silent(client)
    assert_silent(target)
    with socket.socket() as late:
        late.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            late.connect((ends.link.host, ends.link.port))
    assert ends.link.statistics().num_connections == 1
    target.sendall(b"late")
    target.close()  # an end that nobody hears of
    assert_silent(client)
    ends.link.heal()
    assert receive(client, 4) == b"late"


def test_a_dead_peer_behind_a_black_hole_is_not_heard_of(ends: Ends) -> None:
    client, target = ends.connect()
    target.sendall(b"x" * 10)  # unread bytes make closing a reset
    assert receive(client, 10)
    client.sendall(b"unread")
    eventually(lambda: ends.link.statistics().bytes_to_target == 6)
    ends.link.partition(Direction.TO_CLIENT)
    target.close()
    assert_silent(client)
    for _ in range(2):  # more bytes meet a reset; the client may not learn of it either
        client.sendall(b"more")
        assert_silent(client)
    ends.link.heal()
    assert_reset(client)


@pytest.mark.parametrize("direction", BOTH)
def test_a_partition_of_one_direction_leaves_the_other(ends: Ends, direction: Direction) -> None:
    client, target = ends.connect()
    near, far = (client, target) if direction is Direction.TO_TARGET else (target, client)
    ends.link.partition(direction)
    near.sendall(b"stuck")
    assert_silent(far)
    assert_carries(far, near)
    with socket.socket() as late:
        late.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            late.connect((ends.link.host, ends.link.port))
    ends.link.heal()
    assert receive(far, 5) == b"stuck"
    assert_carries(*ends.connect())


def test_only_the_first_connection_can_be_black_holed(ends: Ends) -> None:
    first, second = ends.connect(), ends.connect()
    ends.link.black_hole(lambda number: number == 0)
    first[0].sendall(b"stuck")
    assert_silent(first[1])
    assert_carries(*second)
    assert_carries(*ends.connect())
    ends.link.heal()
    assert receive(first[1], 5) == b"stuck"


def test_connections_that_hung_are_let_in_when_healed(ends: Ends) -> None:
    ends.link.black_hole()
    connected = threading.Event()

    def connect() -> None:
        client, target = ends.connect()
        assert_carries(client, target)
        connected.set()

    thread = threading.Thread(target=connect)
    thread.start()
    assert not connected.wait(SILENCE_S)
    ends.link.heal()
    thread.join(TIMEOUT_S)
    assert connected.is_set()


def test_corruption_reaches_only_its_direction(ends: Ends) -> None:
    client, target = ends.connect()
    ends.link.corrupt(1.0, Direction.TO_TARGET)
    client.sendall(bytes(100))
    assert all(receive(target, 100))
    assert_carries(target, client, bytes(100))
    ends.link.heal()
    assert_carries(client, target, bytes(100))


def test_a_target_that_refuses_resets_whoever_connected() -> None:
    with listening() as server:
        gone = server.getsockname()
    with emulated_link(target=gone) as link:

        def connect_and_read() -> None:
            with socket.create_connection((link.host, link.port), TIMEOUT_S) as client:
                client.recv(1)

        with pytest.raises(ConnectionResetError):
            connect_and_read()
        with listening() as server:
            link.target = server.getsockname()
            with socket.create_connection((link.host, link.port), TIMEOUT_S) as client, server.accept()[0] as target:
                assert_carries(client, target)


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_targets_and_listeners_may_be_ipv6() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(listening("::1"))
        link = stack.enter_context(emulated_link(target=server.getsockname()[:2], listen_host="::1"))
        assert link.address == f"[::1]:{link.port}"
        ends = Ends(link, server, stack)
        assert_carries(*ends.connect())
        link.black_hole()
        link.heal()
        assert_carries(*ends.connect())


def test_a_link_leaves_no_thread_and_no_socket_behind() -> None:
    threads = set(threading.enumerate())
    with ExitStack() as stack:
        server = stack.enter_context(listening())
        with emulated_link(target=server.getsockname()) as link:
            client, target = Ends(link, server, stack).connect()
            link.black_hole()
        assert_reset(client)
        assert_reset(target)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((link.host, link.port), TIMEOUT_S)
    assert set(threading.enumerate()) == threads


def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    with (
        listening() as server,
        pytest.raises(OSError, match="in use"),
        emulated_link(target=server.getsockname(), listen_port=server.getsockname()[1]),
    ):
        pass
