"""The control plane: one long-lived stream per agent, both ways.

    agent: attach ── Attach ─▶ ControlServer ─▶ on_attach(peer, attach)     once per agent, for as long as it is there
                  ◀─ Welcome or Refused ──
    ControlStream ◀═ messages both ways, in order ═▶ ControlPeer
                  ── Leave ─▶                                               the agent's farewell
                  ◀─ status ──                                              the head's: OK when on_attach returned

A stream that ends otherwise was lost, and whoever iterates gets a TransportError. Sending never breaks a stream by
being cancelled: messages are queued and one task writes them.

This file does not know what orders mean, who may join, or how a cluster is made of peers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from tllm.core.errors import FrameError, RefusedError, TransportError
from tllm.core.types import HEAD
from tllm.transport import wire_pb2 as pb
from tllm.transport.channels import (
    STREAM_ERRORS,
    Caller,
    Failures,
    Liveness,
    deadline,
    first_ready,
    grpc_options,
    reason,
)
from tllm.transport.mailbox import Mailbox
from tllm.transport.peers import Peer, peer_of, refuse
from tllm.transport.trust import Identity

if TYPE_CHECKING:  # generic in the stubs alone
    Context = grpc.aio.ServicerContext[bytes, bytes]
    Call = grpc.aio.StreamStreamCall[bytes, bytes]
    Handler = grpc.RpcMethodHandler[bytes, bytes]

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 20
_OUTGOING = 64  # messages that wait to be written
_INCOMING = 64  # messages that wait to be read by this side
_ATTACH_S = 10.0  # from the opening of a stream to its Attach
_FLUSH_S = 5.0  # for what was sent last to leave when a stream ends
_MAX_PEERS = 512

M = TypeVar("M", pb.AgentMessage, pb.HeadMessage)


class ControlPeer:
    """The head's end of one agent's stream: iterate what the agent says after its Attach.

    The iteration ends when the agent left in order or this side closed, and raises TransportError when it was lost.
    `name` is the one in its certificate, and `token_id` names the join token by which it got that; both are empty over
    a Unix socket, where the agent is this machine's user.
    """

    def __init__(self, peer: Peer) -> None:
        self.address = peer.address
        self.name = peer.name
        self.token_id = peer.token_id
        self._incoming: Mailbox[pb.AgentMessage] = Mailbox(_INCOMING)
        self._outgoing: Mailbox[bytes] = Mailbox(_OUTGOING)

    async def send(self, message: pb.HeadMessage) -> None:
        """Hand over; waits while the agent is slow. Raises TransportError when it is gone, FrameError when the message
        is too large."""
        await self._outgoing.put(_encode(message))

    def __aiter__(self) -> AsyncIterator[pb.AgentMessage]:
        return aiter(self._incoming)

    async def aclose(self) -> None:
        """End the stream, in order, once what was sent is written. Idempotent."""
        self._incoming.close()
        self._outgoing.finish()

    async def serve(self, context: Context, serving: Awaitable[None]) -> None:
        """The server's side: move messages until `serving`, which uses this peer, is done, then end the stream."""
        using = asyncio.ensure_future(serving)
        reading = asyncio.create_task(self._read(context), name="control read")
        writing = asyncio.create_task(self._write(context), name="control write")
        try:
            await asyncio.wait({using})
            self._outgoing.finish()
            await asyncio.wait({writing}, timeout=_FLUSH_S)
            if isinstance(error := reading.exception() if reading.done() else None, FrameError):
                await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            using.result()
        finally:  # gRPC cancels this when the agent is gone
            self._lose("the agent is gone")
            if not using.done():
                await asyncio.wait({using}, timeout=_FLUSH_S)
            for task in (using, reading, writing):
                task.cancel()
            await asyncio.gather(using, reading, writing, return_exceptions=True)

    async def _read(self, context: Context) -> None:
        try:
            while isinstance(data := await context.read(), bytes):
                message = _decode(data, pb.AgentMessage)
                if message.WhichOneof("message") == "leave":
                    self._incoming.finish()
                    return
                await _deliver(self._incoming, message)
        except FrameError as error:
            self._incoming.finish(error)
            self._outgoing.close()
            raise
        except STREAM_ERRORS as error:
            self._lose(f"the agent is gone: {reason(error)}")
        else:
            self._lose("the agent is gone")

    async def _write(self, context: Context) -> None:
        try:
            async for data in self._outgoing:
                await context.write(data)
        except STREAM_ERRORS as error:
            self._lose(f"the agent is gone: {reason(error)}")

    def _lose(self, why: str) -> None:
        self._incoming.finish(TransportError(why))
        self._outgoing.close()


class ControlServer:
    """The service where agents attach; a `Server` hosts it. `on_attach(peer, attach)` runs once per agent; when it
    returns, the stream ends in order."""

    name = "tllm.Control"
    max_message_bytes = MAX_MESSAGE_BYTES

    def __init__(self, on_attach: Callable[[ControlPeer, pb.Attach], Awaitable[None]]) -> None:
        self._on_attach = on_attach
        self._peers: set[ControlPeer] = set()
        self._num_open = 0
        self._closed = False

    def handlers(self) -> Mapping[str, Handler]:
        return {"Attach": grpc.stream_stream_rpc_method_handler(self._attach)}

    async def aclose(self) -> None:
        """End every stream in order, and take no more. Idempotent."""
        self._closed = True
        for peer in list(self._peers):
            await peer.aclose()

    async def _attach(self, _requests: AsyncIterator[bytes], context: Context) -> None:
        if self._num_open >= _MAX_PEERS:
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MAX_PEERS} agents are here already")
        self._num_open += 1
        try:
            peer, attach = await self._greet(context)
            self._peers.add(peer)
            try:
                await peer.serve(context, self._on_attach(peer, attach))
            finally:
                self._peers.discard(peer)
        finally:
            self._num_open -= 1

    async def _greet(self, context: Context) -> tuple[ControlPeer, pb.Attach]:
        """Every refusal ends the stream with its reason."""
        try:
            async with asyncio.timeout(_ATTACH_S):
                data = await context.read()
            first = _decode(data if isinstance(data, bytes) else b"", pb.AgentMessage)
            if first.WhichOneof("message") != "attach":
                raise FrameError("the first message is not an Attach")
        except FrameError as error:
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TimeoutError:
            await refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, "no Attach came")
        if self._closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the head is closing")
        peer = ControlPeer(peer_of(context))
        if peer.name and first.attach.node_id != peer.name:
            why = f"the certificate is {peer.name}'s, and the Attach is {first.attach.node_id[:64]!r}'s"
            await refuse(context, grpc.StatusCode.PERMISSION_DENIED, why)
        return peer, first.attach


class ControlStream:
    """The agent's end: iterate what the head says after its Welcome.

    The iteration ends when the head ended the stream in order, and raises TransportError when the head was lost.
    """

    def __init__(self, channel: grpc.aio.Channel, call: Call, address: str, welcome: pb.Welcome) -> None:
        self.address = address
        self.welcome = welcome
        self._channel = channel
        self._call = call
        self._incoming: Mailbox[pb.HeadMessage] = Mailbox(_INCOMING)
        self._outgoing: Mailbox[bytes] = Mailbox(_OUTGOING)
        self._closing = asyncio.Lock()
        self._reading = asyncio.create_task(self._read(), name="control read")
        self._writing = asyncio.create_task(self._write(), name="control write")

    async def send(self, message: pb.AgentMessage) -> None:
        """Hand over; waits while the head is slow. Raises TransportError when it is gone, FrameError when the message
        is too large."""
        await self._outgoing.put(_encode(message))

    def __aiter__(self) -> AsyncIterator[pb.HeadMessage]:
        return aiter(self._incoming)

    async def aclose(self, why: str = "") -> None:
        """Leave: what was sent and the farewell are written, within a deadline. Idempotent, never raises."""
        async with self._closing:
            try:
                await self._say_farewell(why)
            finally:
                self._outgoing.close()
                self._call.cancel()
                for task in (self._reading, self._writing):
                    task.cancel()
                await asyncio.gather(self._reading, self._writing, return_exceptions=True)
                await self._channel.close()

    async def _say_farewell(self, why: str) -> None:
        self._incoming.close()
        try:
            async with asyncio.timeout(_FLUSH_S):
                await self.send(pb.AgentMessage(leave=pb.Leave(reason=why)))
                self._outgoing.finish()
                await asyncio.wait({self._writing})
                await self._call.done_writing()
                await self._call.code()
        except (TimeoutError, TransportError, *STREAM_ERRORS) as error:
            log.debug("%s was gone before the farewell: %s", self.address, reason(error))

    async def _read(self) -> None:
        try:
            while isinstance(data := await self._call.read(), bytes):
                await _deliver(self._incoming, _decode(data, pb.HeadMessage))
        except STREAM_ERRORS as error:
            self._lose(TransportError(f"the head is gone: {reason(error)}"))
        except FrameError as error:
            self._lose(error)
        else:
            self._incoming.finish()
            self._outgoing.close()

    async def _write(self) -> None:
        try:
            async for data in self._outgoing:
                await self._call.write(data)
        except STREAM_ERRORS as error:
            self._lose(TransportError(f"the head is gone: {reason(error)}"))

    def _lose(self, error: TransportError) -> None:
        self._incoming.finish(error)
        self._outgoing.close()


async def attach(
    address: str,
    attach: pb.Attach,
    *,
    identity: Identity | None,
    timeout_s: float,
    liveness: Liveness | None = None,
) -> ControlStream:
    """Attach to the head at `address`, which said Welcome. On the network `identity` is shown to it, and it must be
    the head of that cluster; a Unix socket needs none.

    Raises TransportError when nobody answers within `timeout_s`, and RefusedError at once when the head refuses.
    """
    caller, failures = Caller(identity=identity, peer=HEAD), Failures()
    async with deadline(timeout_s, f"no head answered at {address}", failures):
        channel, _ = await first_ready([address], _options(liveness or Liveness()), caller, failures)
        try:
            call: Call = channel.stream_stream("/tllm.Control/Attach")()
            await call.write(_encode(pb.AgentMessage(attach=attach)))
            data = await call.read()
            answer = _decode(data if isinstance(data, bytes) else b"", pb.HeadMessage)
            match answer.WhichOneof("message"):
                case "welcome":
                    return ControlStream(channel, call, address, answer.welcome)
                case "refused":
                    raise RefusedError(f"The head at {address} refused: {answer.refused.reason}")
                case _:
                    raise FrameError(f"{address} answered with neither Welcome nor Refused")
        except BaseException as error:
            await channel.close()
            if isinstance(error, STREAM_ERRORS):
                raise TransportError(f"{address} ended the stream: {reason(error)}") from error
            raise


def _options(liveness: Liveness) -> list[tuple[str, int]]:
    return grpc_options(max_send_bytes=MAX_MESSAGE_BYTES, max_receive_bytes=MAX_MESSAGE_BYTES, liveness=liveness)


async def _deliver(mailbox: Mailbox[M], message: M) -> None:
    try:
        await mailbox.put(message)
    except TransportError:
        pass  # this side wants no more; the rest is read because gRPC tells how a stream ended only after its messages


def _encode(message: Message) -> bytes:
    data = message.SerializeToString()
    if len(data) > MAX_MESSAGE_BYTES:
        raise FrameError(f"a control message of {len(data)} bytes, where at most {MAX_MESSAGE_BYTES} are allowed")
    return data


def _decode(data: bytes, kind: type[M]) -> M:
    if len(data) > MAX_MESSAGE_BYTES:
        raise FrameError(f"a control message of {len(data)} bytes, where at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        message = kind.FromString(data)
    except DecodeError as error:
        raise FrameError(f"a control message is not a {kind.__name__}") from error
    if message.WhichOneof("message") is None:
        raise FrameError(f"a {kind.__name__} without a message")
    return message
