"""Finding heads in the local network by multicast (mDNS, DNS-SD; RFC 6762 and 6763): a convenience, never needed.

Rules:
    What is said is public: name and fingerprint of the cluster, where its head listens. Never the token.
    What is heard proves nothing: whoever is joined must still match the token's fingerprint.
    A network without multicast stops nobody. It is logged once, and nodes join by address.

This file does not know how a node joins.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import psutil
from zeroconf import Error as MulticastError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from tllm import __version__
from tllm.core.config import is_loopback, join_address
from tllm.core.errors import TransportError
from tllm.transport.wire import PROTOCOL

log = logging.getLogger(__name__)

SERVICE_TYPE = "_tllm._tcp.local."
_MAX_VALUE_BYTES = 200  # of a property; the whole of `name=value` has room for 255
_SETTLE_S = 0.4  # after the first answer; the others of a network come within 0.12 s (RFC 6762 §6)
_RESOLVE_S = 1.0
_GOODBYE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A head that says it is there."""

    cluster: str
    addresses: tuple[str, ...]  # likeliest to be reached first
    port: int
    fingerprint: str
    version: str
    protocol: int

    @property
    def join_addresses(self) -> tuple[str, ...]:
        """HOST:PORT of each address."""
        return tuple(join_address(address, self.port) for address in self.addresses)


def reachable_addresses(host: str) -> tuple[str, ...]:
    """Where other machines reach what listens on `host` here, IPv4 first; empty when they do not.

    A name stands for the addresses that this machine knows for it. Addresses that mean something else on every
    interface (IPv6 link-local) are left out.
    """
    if is_loopback(host):
        return ()
    try:
        is_any = ipaddress.ip_address(host).is_unspecified
        wanted = {socket.AF_INET} if host == "0.0.0.0" else {socket.AF_INET, socket.AF_INET6}
        found = _own_addresses(wanted) if is_any else [host]
    except ValueError:  # a name
        try:
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            found = []
    return tuple(sorted(dict.fromkeys(filter(_is_useful, found)), key=lambda address: ":" in address))


def _own_addresses(families: set[socket.AddressFamily]) -> list[str]:
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return [
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family in families
    ]


def _is_useful(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # with a zone
        return False
    return not (parsed.is_loopback or parsed.is_unspecified or (parsed.version == 6 and parsed.is_link_local))


class Advertiser:
    """Says that a head is there for as long as the context lasts; entering never waits and never fails.

    `host` and `port` are where the head listens for nodes: where others cannot reach it, nothing is said.
    `fingerprint` is the hex of its public key's, as join tokens pin it.
    """

    def __init__(
        self, *, cluster: str, port: int, fingerprint: str, host: str = "::", interfaces: Sequence[str] | None = None
    ) -> None:
        self._cluster = cluster
        self._port = port
        self._fingerprint = fingerprint
        self._addresses = reachable_addresses(host)
        self._interfaces = interfaces  # addresses of those to speak on; None: all that are up
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Advertiser:
        if self._addresses:
            self._task = asyncio.create_task(self._advertise(), name="advertise")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _advertise(self) -> None:
        try:
            multicast = _open(self._interfaces)
            try:
                await multicast.async_register_service(self._service(), allow_name_change=True)
                await asyncio.Event().wait()
            finally:
                await _closed(multicast)
        except (OSError, MulticastError) as error:
            log.warning(
                "nodes cannot find this head by multicast (%s: %s); they join by address", type(error).__name__, error
            )

    def _service(self) -> AsyncServiceInfo:
        # The name tells heads apart, also two of one machine; it is no name of the machine's own, which others may use.
        name = f"{self._fingerprint[:16]}-{self._port}"
        properties = {
            "cluster": _value(self._cluster),
            "version": __version__,
            "protocol": str(PROTOCOL),
            "fingerprint": self._fingerprint,
        }
        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{name}.{SERVICE_TYPE}",
            port=self._port,
            properties=properties,
            server=f"tllm-{name}.local.",
            parsed_addresses=list(self._addresses),
        )


async def find_heads(
    *, cluster: str | None = None, timeout_s: float, interfaces: Sequence[str] | None = None
) -> tuple[Found, ...]:
    """The heads of `cluster`, or of all, that answer within `timeout_s`; soon after the first one has.

    Raises TransportError when this machine cannot ask at all.
    """
    found: dict[str, Found] = {}
    first = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        try:
            multicast = _open(interfaces)
        except (OSError, MulticastError) as error:
            raise TransportError(
                "This machine cannot ask its network for heads by multicast. Join by address: tllm join HOST:PORT"
            ) from error
        stack.push_async_callback(_closed, multicast)
        names: asyncio.Queue[str] = asyncio.Queue()

        # zeroconf calls it by these names
        def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
            if state_change is not ServiceStateChange.Removed:
                names.put_nowait(name)

        async def resolve(name: str) -> None:
            service = AsyncServiceInfo(SERVICE_TYPE, name)
            if await service.async_request(multicast.zeroconf, _RESOLVE_S * 1000):
                head = _read(service)
                if head is not None and (cluster is None or _value(cluster) == head.cluster):
                    found[name] = head
                    first.set()

        async def listen() -> None:
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(resolve(await names.get()))

        browser = AsyncServiceBrowser(multicast.zeroconf, SERVICE_TYPE, handlers=[changed])
        stack.push_async_callback(browser.async_cancel)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                listening = asyncio.create_task(listen(), name="listen")
                stack.push_async_callback(_cancelled, listening)
                await first.wait()
                await asyncio.wait({listening}, timeout=_SETTLE_S)
    return tuple(sorted(found.values(), key=lambda head: (head.cluster, head.port, head.addresses)))


def _open(interfaces: Sequence[str] | None) -> AsyncZeroconf:
    # It logs a traceback for every interface that a packet cannot leave by; what matters is said here.
    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
    chosen = list(_speaking_addresses() if interfaces is None else interfaces)
    if not chosen:
        raise OSError("no network interface but the loopback is up")
    has_v6 = any(":" in address for address in chosen)
    try:
        return AsyncZeroconf(interfaces=chosen, ip_version=IPVersion.All if has_v6 else IPVersion.V4Only)
    except OSError:
        only_v4 = [address for address in chosen if ":" not in address]
        if not (has_v6 and only_v4):
            raise
        return AsyncZeroconf(interfaces=only_v4, ip_version=IPVersion.V4Only)


def _speaking_addresses() -> list[str]:
    """One IPv4 and one IPv6 address of every interface that leads to other machines."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    chosen: dict[tuple[str, int], str] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries if name in up else ():
            address = entry.address.partition("%")[0]
            if entry.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address).is_loopback:
                chosen.setdefault((name, entry.family), address)
    return list(chosen.values())


def _value(text: str) -> str:
    """As much of it as a property can hold."""
    return text.encode()[:_MAX_VALUE_BYTES].decode(errors="ignore")


def _read(service: AsyncServiceInfo) -> Found | None:
    """None for what is no head of ours, or makes no sense."""
    try:
        texts = {key.decode(): (value or b"").decode() for key, value in service.properties.items()}
        protocol = int(texts["protocol"])
        cluster, fingerprint, version = texts["cluster"], texts["fingerprint"], texts["version"]
    except (KeyError, ValueError):
        return None
    addresses = _near_first(service.parsed_scoped_addresses(IPVersion.All))
    if not addresses or not service.port:
        return None
    return Found(
        cluster=cluster,
        addresses=addresses,
        port=service.port,
        fingerprint=fingerprint,
        version=version,
        protocol=protocol,
    )


def _near_first(addresses: Iterable[str]) -> tuple[str, ...]:
    """IPv4 first; of those, the ones in a network of this machine. What this machine is called as well comes last.

    Many machines have the same address on a bridge of their own, for containers: there, one meets oneself.
    """
    own, networks = set(), []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family == socket.AF_INET and entry.netmask:
                own.add(entry.address)
                networks.append(ipaddress.ip_network(f"{entry.address}/{entry.netmask}", strict=False))

    def distance(address: str) -> tuple[bool, bool, bool]:
        is_v6 = ":" in address
        near = not is_v6 and any(ipaddress.ip_address(address) in network for network in networks)
        return address in own, is_v6, not near

    return tuple(sorted(dict.fromkeys(addresses), key=distance))


async def _closed(multicast: AsyncZeroconf) -> None:
    """Says goodbye, so that nobody finds what is gone; not for longer than a moment."""
    with contextlib.suppress(TimeoutError, OSError, MulticastError):
        async with asyncio.timeout(_GOODBYE_S):
            await multicast.async_close()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
