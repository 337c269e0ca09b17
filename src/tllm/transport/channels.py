"""gRPC as both planes use it: options, binding, finding the first address that answers, and what its errors mean.

This file does not know what is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from tllm.core.errors import TransportError

# What gRPC raises, without a common root, when a stream is gone: an RPC that failed, an operation that the core
# refused, and a call that was already over.
STREAM_ERRORS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)

_WINDOW_BYTES = 1 << 20  # on its way at a time: 1 GB/s at a round trip of 1 ms
_HEAD_START_S = 0.25  # that an address gets before the next one is tried beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """How a silent peer is noticed: a ping after `ping_interval_s` without traffic, and `ping_timeout_s` for the
    answer, so that together they bound the time to notice a pulled cable. A peer that stops for less than the timeout
    is not lost; one whose process ends is noticed at once. The answer to a ping waits behind what is on its way
    already, so the timeout must exceed the time that a slow network takes for a socket's buffer."""

    ping_interval_s: float = 2.0
    ping_timeout_s: float = 8.0


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
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
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


async def listen(server: grpc.aio.Server, addresses: Sequence[str]) -> tuple[str, ...]:
    """Start the server on every address, `unix:/path` or `host:port`; port 0 takes a free one.

    Returns the addresses with their real ports. Raises TransportError naming the one that cannot be had; nothing
    listens then.
    """
    try:
        bound = tuple(_bind(server, address) for address in addresses)
        await server.start()
    except BaseException:
        await server.stop(None)
        raise
    return bound


def _bind(server: grpc.aio.Server, address: str) -> str:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise TransportError(f"cannot listen on {address}: it is taken, or not an address of this machine") from error
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def remove_sockets(addresses: Sequence[str]) -> None:
    """Remove the files of Unix sockets that nobody listens on any more."""
    for address in addresses:
        if address.startswith("unix:"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.removeprefix("unix:"))


async def first_ready(addresses: Sequence[str], options: Sequence[tuple[str, int]]) -> tuple[grpc.aio.Channel, str]:
    """A channel to the first address that answers, and that address. Each address gets a head start over the next.

    Waits for ever when none answers: the deadline is the caller's. Channels that lose are closed.
    """
    assert addresses
    channels = [grpc.aio.insecure_channel(address, options=options) for address in addresses]
    waiting: dict[asyncio.Task[None], int] = {}
    winner: int | None = None
    try:
        for index, channel in enumerate(channels):
            waiting[asyncio.create_task(channel.channel_ready())] = index
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


@contextlib.asynccontextmanager
async def deadline(timeout_s: float, what: str) -> AsyncIterator[None]:
    """Raise TransportError, saying what took too long, instead of TimeoutError."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise TransportError(f"{what} within {timeout_s:g} s") from error


def reason(error: BaseException) -> str:
    """Why a stream broke, for a person."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.details() or 'no reason given'} ({error.code().name.lower()})"
    return str(error) or type(error).__name__
