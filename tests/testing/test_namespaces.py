"""The network of namespaces, with real sockets in its nodes."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tllm.testing import namespaces
from tllm.testing.links import QUEUE_S
from tllm.testing.namespaces import MAX_MTU, Rig, Way, missing, network

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

TIMEOUT_S = 10.0
SILENCE_S = 0.15
PORT = 4000


@pytest.fixture
def rig() -> Iterator[Rig]:
    with network(["a", "b", "c"], seed=1) as rig:
        yield rig


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connected(rig: Rig, stack: ExitStack, one: str = "a", other: str = "b") -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    server = stack.enter_context(rig.call(other, lambda: socket.create_server(("0.0.0.0", 0))))
    server.settimeout(TIMEOUT_S)
    address = (rig.address(other), server.getsockname()[1])
    client = stack.enter_context(rig.call(one, lambda: socket.create_connection(address, TIMEOUT_S)))
    accepted = stack.enter_context(server.accept()[0])
    accepted.settimeout(TIMEOUT_S)
    for each in (client, accepted):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, accepted


def datagrams(rig: Rig, stack: ExitStack, node: str) -> socket.socket:
    sock = stack.enter_context(rig.call(node, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    sock.bind((rig.address(node), PORT))
    sock.settimeout(TIMEOUT_S)
    return sock


def receive(sock: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes and (piece := sock.recv(min(num_bytes - len(data), 65536))):
        data += piece
    return bytes(data)


def echo_s(one: socket.socket, other: socket.socket) -> float:
    start = time.monotonic()
    one.sendall(b"there")
    assert receive(other, 5) == b"there"
    other.sendall(b"back")
    assert receive(one, 4) == b"back"
    return time.monotonic() - start


def assert_silent(sock: socket.socket) -> None:
    readable, _, _ = select.select([sock], [], [], SILENCE_S)
    assert not readable


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def transfer(source: socket.socket, target: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=source.sendall, args=(data,))
    sender.start()
    received = receive(target, len(data))
    sender.join(TIMEOUT_S)
    return received


def test_every_node_reaches_every_other(rig: Rig, stack: ExitStack) -> None:
    for one in rig.nodes:
        for other in rig.nodes:
            if one != other:
                echo_s(*connected(rig, stack, one, other))
    assert rig.way("a", "b").statistics().num_packets > 0
    assert len({rig.address(node) for node in rig.nodes}) == len(rig.nodes)


def test_a_process_in_a_node_has_its_address_its_name_and_its_own_loopback(rig: Rig) -> None:
    program = (
        "import os, socket; s = socket.create_server(('127.0.0.1', 4321));"
        "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.connect(('10.77.0.9', 1));"
        "print(os.getpid(), socket.gethostname(), u.getsockname()[0], flush=True); input()"
    )
    with ExitStack() as stack:
        for node in rig.nodes:  # at the same time, all on the same port of their loopback
            process = stack.enter_context(
                subprocess.Popen(
                    rig.command(node, [sys.executable, "-c", program]),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            assert process.stdout is not None
            assert process.stdout.readline().split() == [str(process.pid), node, rig.address(node)]


def test_delay_counts_once_per_way_and_can_be_changed(rig: Rig, stack: ExitStack) -> None:
    one, other = connected(rig, stack)
    rig.edge("a", "b").set(delay_s=0.05, jitter_s=0.01)
    assert 0.1 <= echo_s(one, other) < TIMEOUT_S
    rig.way("b", "a").set(delay_s=0.0, jitter_s=0.0)
    assert 0.05 <= echo_s(one, other) < TIMEOUT_S
    rig.edge("a", "b").set(delay_s=0.0, jitter_s=0.0)
    assert min(echo_s(one, other) for _ in range(20)) < 0.05
    assert min(echo_s(*connected(rig, stack, "c", "b")) for _ in range(3)) < 0.05


def test_a_way_carries_no_more_than_its_rate(rig: Rig, stack: ExitStack) -> None:
    one, other = connected(rig, stack)
    rig.way("a", "b").set(rate_bits_per_s=20e6)
    start = time.monotonic()
    data = os.urandom(1_000_000)
    assert transfer(one, other, data) == data
    assert time.monotonic() - start >= len(data) * 8 / 20e6 - 0.01
    assert transfer(other, one, data) == data


def test_datagrams_are_lost_and_a_stream_is_not(rig: Rig, stack: ExitStack) -> None:
    one, other = datagrams(rig, stack, "a"), datagrams(rig, stack, "b")
    rig.way("a", "b").set(loss=0.2)
    for _ in range(200):  # as many as fit into the receiver's buffer
        one.sendto(b"x", (rig.address("b"), PORT))
    way = rig.way("a", "b")
    eventually(lambda: (seen := way.statistics()).num_packets + seen.num_lost >= 200)
    num_lost = way.statistics().num_lost
    # Binomial around 40 with a standard deviation of 6: seven of them to either side.
    assert 0 < num_lost < 80
    for _ in range(200 - num_lost):
        assert other.recv(10) == b"x"
    assert_silent(other)
    rig.edge("a", "b").set(loss=0.01, delay_s=0.001)
    data = os.urandom(3_000_000)
    before = way.statistics().num_lost
    assert transfer(*connected(rig, stack), data) == data
    assert way.statistics().num_lost > before


def test_jitter_keeps_the_order(rig: Rig, stack: ExitStack) -> None:
    one, other = datagrams(rig, stack, "a"), datagrams(rig, stack, "b")
    rig.way("a", "b").set(jitter_s=0.05)
    sent = [b"%d" % number for number in range(100)]
    for data in sent:
        one.sendto(data, (rig.address("b"), PORT))
    assert [other.recv(10) for _ in sent] == sent


def test_a_way_that_is_down_takes_nothing_and_a_full_one_not_more() -> None:
    way = Way("seed")
    way.set(up=False)
    assert way.send(0.0, 100) is None
    way.set(up=True, rate_bits_per_s=8e3)  # 1000 bytes per second
    num_taken = sum(way.send(0.0, 10) is not None for _ in range(100))
    assert QUEUE_S * 1000 <= num_taken * 10 <= QUEUE_S * 1000 + 10
    assert way.statistics().num_lost == 1 + 100 - num_taken


def test_packets_under_way_are_lost_when_the_way_goes_down(rig: Rig, stack: ExitStack) -> None:
    one, other = datagrams(rig, stack, "a"), datagrams(rig, stack, "b")
    way = rig.way("a", "b")
    way.set(delay_s=0.1)
    one.sendto(b"lost", (rig.address("b"), PORT))
    eventually(lambda: way.line.last_arrival > 0)
    way.set(up=False)
    eventually(lambda: way.statistics().num_lost == 1)
    rig.heal()
    assert_silent(other)


def test_an_established_connection_in_a_black_hole_hears_nothing_and_goes_on_when_healed(
    rig: Rig, stack: ExitStack
) -> None:
    one, other = connected(rig, stack)
    bystander = connected(rig, stack, "a", "c")
    rig.edge("a", "b").set(up=False)
    one.sendall(b"stuck")
    assert_silent(one)
    assert_silent(other)
    echo_s(*bystander)
    rig.heal()
    assert receive(other, 5) == b"stuck"
    echo_s(one, other)


def test_a_connection_is_half_open_when_its_peer_dies_in_a_black_hole(rig: Rig, stack: ExitStack) -> None:
    one, other = connected(rig, stack)
    rig.edge("a", "b").set(up=False)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    other.close()  # its reset is lost
    assert_silent(one)
    rig.heal()
    assert_silent(one)  # nobody repeats a reset
    one.sendall(b"anybody?")
    with pytest.raises(ConnectionResetError):
        one.recv(1)


def test_one_way_can_be_down_alone(rig: Rig, stack: ExitStack) -> None:
    one, other = datagrams(rig, stack, "a"), datagrams(rig, stack, "b")
    rig.way("a", "b").set(up=False)
    one.sendto(b"lost", (rig.address("b"), PORT))
    other.sendto(b"arrives", (rig.address("a"), PORT))
    assert one.recv(10) == b"arrives"
    assert_silent(other)


def test_a_partition_separates_groups_and_leaves_each_whole(rig: Rig, stack: ExitStack) -> None:
    within, across = connected(rig, stack, "a", "b"), connected(rig, stack, "a", "c")
    rig.partition({"a", "b"})
    echo_s(*within)
    across[0].sendall(b"stuck")
    assert_silent(across[1])
    late = stack.enter_context(rig.call("c", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)))
    late.settimeout(SILENCE_S)
    with pytest.raises(TimeoutError):
        late.connect((rig.address("b"), 1))
    rig.heal()
    assert receive(across[1], 5) == b"stuck"


def test_multicast_reaches_every_node(rig: Rig, stack: ExitStack) -> None:
    listeners = []
    for node in ("b", "c"):
        sock = stack.enter_context(rig.call(node, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        sock.bind(("", PORT))
        group = socket.inet_aton("224.0.0.251") + socket.inet_aton(rig.address(node))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        sock.settimeout(TIMEOUT_S)
        listeners.append(sock)
    rig.call("a", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"here", ("224.0.0.251", PORT)))
    for sock in listeners:
        assert sock.recv(10) == b"here"


def left_behind(pid: int, prefix: str = "tllm-test") -> set[str]:
    """By that process; others may have networks of their own."""
    namespaces = {path.name for path in Path("/run/netns").glob(f"{prefix}-{pid}-*")}
    devices = {path.name for path in Path("/sys/class/net").glob(f"tt{pid}x*")}
    return namespaces | devices | {thread.name for thread in threading.enumerate() if thread.name == "router"}


def test_nothing_is_left_behind_whatever_happens() -> None:
    assert not left_behind(os.getpid())
    with pytest.raises(ZeroDivisionError), network(["x", "y"], mtu=MAX_MTU) as rig:  # noqa: PT012
        child = subprocess.Popen(rig.command("x", ["sleep", "1000"]))
        namespace = rig.command("x")[3]
        eventually(lambda: str(child.pid) in netns_pids(namespace))
        raise ZeroDivisionError
    assert child.wait(TIMEOUT_S) == -signal.SIGKILL
    assert not left_behind(os.getpid())


def netns_pids(namespace: str) -> list[str]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_what_a_killed_process_left_behind_is_removed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = f"tllm-left-{os.getpid()}"  # or the next might be one of somebody else who runs these tests now
    monkeypatch.setattr(namespaces, "_PREFIX", prefix)
    program = (
        f"from tllm.testing import namespaces\nnamespaces._PREFIX = {prefix!r}\n"
        "with namespaces.network(['x', 'y']):\n    print('up', flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.kill()
    assert left_behind(process.pid, prefix)
    with network(["z"]):
        pass
    assert not left_behind(process.pid, prefix)


def test_large_packets_carry_a_stream_whole(stack: ExitStack) -> None:
    with network(["a", "b"], mtu=MAX_MTU) as rig:
        data = os.urandom(1 << 20) * 8
        assert transfer(*connected(rig, stack), data) == data


def test_an_error_in_a_node_is_raised(rig: Rig) -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        rig.call("a", fail)
