"""Heads are found by multicast where there is any, told apart by cluster, and gone when they have stopped."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import struct
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import AsyncExitStack

import psutil
import pytest

from tllm import __version__
from tllm.cluster import discovery
from tllm.cluster.discovery import Advertiser, Found, find_heads, reachable_addresses
from tllm.core.errors import TransportError
from tllm.transport.wire import PROTOCOL

LOOPBACK = ["127.0.0.1"]
RUN = secrets.token_hex(8)  # the interface is shared with whoever else runs these tests now
ONE, TWO = f"{RUN}-one", f"{RUN}-two"
PINS = {ONE: f"{RUN}1".ljust(32, "0"), TWO: f"2{RUN}".ljust(32, "0")}
PORTS = {ONE: 25001, TWO: 25002}
ADDRESS = "192.0.2.7"  # of nobody (RFC 5737): it is only said, never connected to


def _multicast_works() -> bool:
    """Whether a datagram to the multicast group comes back on the loopback interface."""
    group = struct.pack("4s4s", socket.inet_aton("224.0.0.251"), socket.inet_aton("127.0.0.1"))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind(("", 0))
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            receiver.settimeout(1)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
                sender.sendto(b"?", ("224.0.0.251", receiver.getsockname()[1]))
            return receiver.recv(1) == b"?"
    except OSError:
        return False


multicast = pytest.mark.skipif(not _multicast_works(), reason="no multicast on this machine's loopback interface")


def advertiser(cluster: str, **options: object) -> Advertiser:
    given = {"host": ADDRESS, "interfaces": LOOPBACK, "port": 25001, "fingerprint": PINS[ONE], **options}
    return Advertiser(cluster=cluster, **given)  # type: ignore[arg-type]


async def found(timeout_s: float = 2, cluster: str | None = None) -> tuple[Found, ...]:
    heads = await find_heads(cluster=cluster, timeout_s=timeout_s, interfaces=LOOPBACK)
    return tuple(head for head in heads if head.cluster.startswith(RUN))


async def found_until(enough: Callable[[tuple[Found, ...]], bool]) -> tuple[Found, ...]:
    """What is found, asked again until it is enough or the deadline has passed."""
    deadline_s = time.monotonic() + 10
    while True:
        heads = await found()
        if enough(heads) or time.monotonic() > deadline_s:
            return heads


@multicast
async def test_two_clusters_are_kept_apart_by_their_names() -> None:
    async with advertiser(ONE), advertiser(TWO, port=25002, fingerprint=PINS[TWO]):
        both = await found_until(lambda heads: len(heads) == 2)
        assert both == tuple(
            Found(
                cluster=name,
                addresses=(ADDRESS,),
                port=PORTS[name],
                fingerprint=PINS[name],
                version=__version__,
                protocol=PROTOCOL,
            )
            for name in (ONE, TWO)
        )
        for index, name in enumerate(PINS):
            assert await found(cluster=name) == (both[index],)
        assert await found(timeout_s=0.5, cluster=f"{RUN}-three") == ()


@multicast
async def test_a_head_is_found_soon_and_gone_when_it_has_stopped() -> None:
    async with advertiser(ONE):
        assert await found_until(bool)
        began_s = time.monotonic()
        assert await found(timeout_s=30)
        assert time.monotonic() - began_s < 5
    assert await found(timeout_s=0.5) == ()


@multicast
async def test_both_families_and_a_long_name_are_said_and_the_token_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "reachable_addresses", lambda host: ("192.0.2.7", "2001:db8::7"))
    name = ONE + 100 * "é"
    async with advertiser(name) as one:
        [head] = await found_until(bool)
        assert head.addresses == ("192.0.2.7", "2001:db8::7")
        assert head.join_addresses == ("192.0.2.7:25001", "[2001:db8::7]:25001")
        assert name.startswith(head.cluster)
        assert len(head.cluster.encode()) in (199, 200)  # as much as a property holds, and no half character
        assert await found(cluster=name) == (head,)
        assert set(one._service().properties) == {b"cluster", b"version", b"protocol", b"fingerprint"}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_a_head_that_only_this_machine_reaches_says_nothing(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    opened: list[object] = []
    monkeypatch.setattr(discovery, "_open", opened.append)
    async with advertiser(ONE, host=host):
        await asyncio.sleep(0)
    assert not opened
    assert reachable_addresses(host) == ()


async def test_a_network_without_multicast_is_logged_once_and_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    with caplog.at_level(logging.INFO):
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(5):
                one = await stack.enter_async_context(advertiser(ONE, interfaces=None))
                assert one._task is not None
                await asyncio.wait({one._task})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "join by address" in caplog.text
    with pytest.raises(TransportError, match="Join by address: tllm join HOST:PORT"):
        await find_heads(timeout_s=5)


def test_the_likeliest_address_of_a_head_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = namedtuple("entry", "family address netmask")
    addresses = {
        "docker0": [entry(socket.AF_INET, "172.17.0.1", "255.255.0.0")],
        "eth0": [entry(socket.AF_INET, "192.168.1.10", "255.255.255.0"), entry(socket.AF_INET6, "fd00::2", "ffff::")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    said = ["fd00::3", "172.17.0.1", "10.0.0.5", "192.168.1.11"]
    assert discovery._near_first(said) == ("192.168.1.11", "10.0.0.5", "fd00::3", "172.17.0.1")


def test_addresses_are_those_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = namedtuple("entry", "family address")
    stats = namedtuple("stats", "isup")
    v4, v6 = socket.AF_INET, socket.AF_INET6
    addresses = {
        "lo": [entry(v4, "127.0.0.1"), entry(v6, "::1")],
        "eth0": [entry(v6, "fd00::2"), entry(v6, "fe80::1%eth0"), entry(v4, "192.168.1.10"), entry(17, "02:fc:00")],
        "eth1": [entry(v4, "10.0.0.1")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: stats(name != "eth1") for name in addresses})
    assert reachable_addresses("0.0.0.0") == ("192.168.1.10",)
    assert reachable_addresses("::") == ("192.168.1.10", "fd00::2")
    assert reachable_addresses("192.168.1.10") == ("192.168.1.10",)
    assert reachable_addresses("fd00::2") == ("fd00::2",)
    assert reachable_addresses("no-such-host.invalid") == ()
    assert discovery._speaking_addresses() == ["fd00::2", "192.168.1.10"]
