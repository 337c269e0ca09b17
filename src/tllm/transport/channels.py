"""gRPC as all services use it: options, TLS on both sides, finding the first address that answers, and what its errors
mean.

    unix:/path    no TLS: the socket lies in a directory of this user, so whoever comes is this user
    host:port     mutual TLS, always: both sides show certificates of the cluster's authority

This file does not know what is sent, nor what a peer may do once it is in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from tllm.core.config import Deadlines
from tllm.core.errors import TransportError
from tllm.transport.trust import Identity, enrolment_identity

# What gRPC raises, without a common root, when a stream is gone: an RPC that failed, an operation that the core
# refused, and a call that was already over.
STREAM_ERRORS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)

WINDOW_BYTES = 1 << 20  # on its way at a time: 1 GB/s at a round trip of 1 ms
_HEAD_START_S = 0.25  # that an address gets before the next one is tried beside it
_HANDSHAKE_S = 10.0  # for a connection to say who it is
_IDLE_S = 60.0  # that a connection may be open without a call; whoever comes back connects again
_MAX_STREAMS = 64  # of one connection
_MAX_REASON = 400  # characters of what gRPC has to say
_NO_CONNECTION = "failed to connect to all addresses; last error: "
# What a handshake's failure means, by what is in gRPC's words for it.
_HANDSHAKES = {
    "has expired": "its certificate has expired",
    "not yet valid": "its certificate is not valid yet; compare the machines' clocks",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of this cluster",
    "Hostname Verification Check failed": "somebody else answers there: its certificate has another name",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """How a silent peer is noticed: a ping after `ping_interval_s` without traffic, and `ping_timeout_s` for the
    answer, so that together they bound the time to notice a pulled cable. A peer that stops for less than the timeout
    is not lost; one whose process ends is noticed at once. The answer to a ping waits behind what is on its way
    already, so the timeout must exceed the time that a slow network takes for a socket's buffer."""

    ping_interval_s: float = 2.0
    ping_timeout_s: float = 8.0

    @classmethod
    def of(cls, deadlines: Deadlines) -> Liveness:
        """Less than `silence_s` passes between the last answer that came and the first that counts as missing."""
        return cls(ping_interval_s=deadlines.heartbeat_s, ping_timeout_s=max(0.1, deadlines.silence_s - 0.3))


def is_unix(address: str) -> bool:
    """Of addresses to listen on or to connect to, and of what gRPC calls a peer."""
    return address.startswith("unix:")


def grpc_options(*, max_send_bytes: int, max_receive_bytes: int, liveness: Liveness) -> list[tuple[str, int]]:
    """For servers and channels alike."""
    interval_ms = round(liveness.ping_interval_s * 1000)
    return [
        ("grpc.max_send_message_length", max_send_bytes),
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.keepalive_time_ms", interval_ms),
        ("grpc.keepalive_timeout_ms", round(liveness.ping_timeout_s * 1000)),
        # Without this one, a ping that is not answered closes the connection after a minute, whatever keepalive says.
        ("grpc.http2.ping_timeout_ms", round(liveness.ping_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A server that thinks it is pinged too often drops the connection; here whoever is connected may ping.
        ("grpc.http2.min_ping_interval_without_data_ms", interval_ms // 2),
        ("grpc.http2.max_ping_strikes", 0),
        # The window is fixed: gRPC would learn a larger one, and fill a slow network's buffers so far that the pings
        # with which it learns are not answered in time.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        # Two servers on one port would share its connections at random.
        ("grpc.so_reuseport", 0),
        # A proxy of the environment is meant for the web.
        ("grpc.enable_http_proxy", 0),
        # A connection of its own for each channel, so that closing one closes it, and no edge waits behind another.
        ("grpc.use_local_subchannel_pool", 1),
        # A peer that is just starting should not wait for the next attempt longer than it took to start.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def server_options() -> list[tuple[str, int]]:
    """Beside `grpc_options`: what a connection may hold without having said anything."""
    return [
        ("grpc.server_handshake_timeout_ms", round(_HANDSHAKE_S * 1000)),
        ("grpc.max_connection_idle_ms", round(_IDLE_S * 1000)),
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
    ]


def server_credentials(identity: Identity, *, enrols: bool) -> grpc.ServerCredentials:
    """Demands of every caller a certificate of the authority, or, where newcomers `enrols`, the one that proves
    nothing. A caller with either key can get in with whatever it signs, hence `peers.admitted`."""
    roots = identity.authority + (enrolment_identity().certificate if enrols else b"")
    return grpc.ssl_server_credentials([(identity.key, identity.certificate)], roots, require_client_auth=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """How this side makes channels: who it is, and who must answer."""

    identity: Identity | None = None  # None: reaches Unix sockets only
    peer: str = ""  # the name in the certificate that must answer over TCP
    roots: bytes | None = None  # whose certificates are believed, if not the identity's authority's

    def channel(self, address: str, options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
        """Raises TransportError for an address that this caller cannot reach whoever listens there."""
        if is_unix(address):
            return grpc.aio.insecure_channel(address, options=options)
        if self.identity is None or not self.peer:
            raise TransportError(f"{address} is on the network, where both sides must say who they are")
        credentials = grpc.ssl_channel_credentials(
            self.roots or self.identity.authority, self.identity.key, self.identity.certificate
        )
        return grpc.aio.secure_channel(
            address, credentials, options=[*options, ("grpc.ssl_target_name_override", self.peer)]
        )


async def listen(
    server: grpc.aio.Server, addresses: Sequence[str], credentials: grpc.ServerCredentials | None
) -> tuple[str, ...]:
    """Start the server on every address, `unix:/path` or `host:port`; port 0 takes a free one.

    Returns the addresses with their real ports. Raises TransportError naming the one that cannot be had; nothing
    listens then.
    """
    try:
        bound = tuple(_bind(server, address, credentials) for address in addresses)
        await server.start()
    except BaseException:
        await server.stop(None)
        raise
    return bound


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    try:
        if is_unix(address):
            server.add_insecure_port(address)
            return address
        assert credentials is not None, f"{address} needs an identity"
        port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise TransportError(f"cannot listen on {address}: it is taken, or not an address of this machine") from error
    return f"{address.rpartition(':')[0]}:{port}"


def remove_sockets(addresses: Sequence[str]) -> None:
    """Remove the files of Unix sockets that nobody listens on any more."""
    for address in addresses:
        if is_unix(address):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.removeprefix("unix:"))


class Failures:
    """Why addresses did not answer, the last reason of each: what there is to say when time is up."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def note(self, address: str, why: str) -> None:
        self._reasons[address] = why

    def __str__(self) -> str:
        return "; ".join(f"{address}: {why}" for address, why in self._reasons.items())


async def first_ready(
    addresses: Sequence[str],
    options: Sequence[tuple[str, int]],
    caller: Caller,
    failures: Failures | None = None,
) -> tuple[grpc.aio.Channel, str]:
    """A channel to the first address that answers, and that address. Each address gets a head start over the next.

    Waits for ever when none answers, and notes why in `failures`: the deadline is the caller's. Channels that lose are
    closed. Raises TransportError as `Caller.channel` does.
    """
    assert addresses
    failures = Failures() if failures is None else failures
    channels: list[grpc.aio.Channel] = []
    waiting: dict[asyncio.Task[None], int] = {}
    winner: int | None = None
    try:
        for address in addresses:
            channels.append(caller.channel(address, options))
        for index, channel in enumerate(channels):
            waiting[asyncio.create_task(_ready(channel, addresses[index], failures))] = index
            last = index == len(channels) - 1
            done, _ = await asyncio.wait(
                waiting, timeout=None if last else _HEAD_START_S, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                winner = min(waiting[task] for task in done)
                break
        assert winner is not None
        return channels[winner], addresses[winner]
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for index, channel in enumerate(channels):
            if index != winner:
                await channel.close()


async def _ready(channel: grpc.aio.Channel, address: str, failures: Failures) -> None:
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            failures.note(address, await _last_failure(channel))
        await channel.wait_for_state_change(state)


async def _last_failure(channel: grpc.aio.Channel) -> str:
    """Why the last attempt to connect failed: only a call that does not wait is told."""
    try:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/tllm.Nobody/Nothing")
        await call(b"")
    except STREAM_ERRORS as error:
        return reason(error)
    return "it answered"


@contextlib.asynccontextmanager
async def deadline(timeout_s: float, what: str, failures: Failures | None = None) -> AsyncIterator[None]:
    """Raise TransportError, saying what took too long and why it may have, instead of TimeoutError."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        why = str(failures or "")
        raise TransportError(f"{what} within {timeout_s:g} s" + (f" ({why})" if why else "")) from error


def reason(error: BaseException) -> str:
    """Why a stream broke, for a person."""
    if isinstance(error, grpc.aio.AioRpcError):
        details = error.details() or "no reason given"
        for sign, meaning in _HANDSHAKES.items():
            if sign in details:
                return meaning
        return f"{details.removeprefix(_NO_CONNECTION)[:_MAX_REASON]} ({error.code().name.lower()})"
    return str(error) or type(error).__name__
