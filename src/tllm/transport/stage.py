"""The data plane: one long-lived stream per edge of the pipeline, from a stage to the next one or home.

    RpcLink ── Hello ─▶ StageServer           what the two were told about the edge must be the same
            ◀─ Accepted ──
            ── frame, frame, ... ─▶ Inbox     while the inbox is full the server does not read, so gRPC's flow
            ── farewell ─▶                    control fills up and `send` waits
            ◀─ status ──                      OK after a farewell; anything else says why the edge is gone

A stream that ends without a farewell was lost. One stream per edge and epoch: a second peer is refused while there is
a first, and after it; a lost edge comes back with the next epoch.

This file does not know what a step is for, nor who is told when an edge is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from tllm.core.errors import FrameError, TransportError
from tllm.transport import wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FrameLimits, StageMessage
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
from tllm.transport.checks import check
from tllm.transport.journal import Journal, Point
from tllm.transport.mailbox import Inbox
from tllm.transport.peers import peer_of, refuse
from tllm.transport.trust import Identity

if TYPE_CHECKING:  # generic in the stubs alone
    Context = grpc.aio.ServicerContext[bytes, bytes]
    Handler = grpc.RpcMethodHandler[bytes, bytes]
    Call = grpc.aio.StreamStreamCall[bytes, bytes]

log = logging.getLogger(__name__)

# Frames travel in messages of at most this size. A receiver sees the header of a frame before it takes memory for the
# rest, and what is on its way at a time is little enough for a slow network to carry a ping's answer in time.
_PIECE_BYTES = 256 << 10
_MAX_FLOW_BYTES = 65536  # of a message from the receiver to the sender
_MAX_HELLO_BYTES = 4096
_HELLO_S = 10.0  # from the opening of a stream to its Hello
_EPOCH_S = 60.0  # that a peer which was told of an epoch earlier than we may wait for us
_WRITE_FAILED = "Internal error from Core"  # gRPC's words for a write that found the stream ended
_MAX_OPEN = 64  # streams at a time, refused and waiting ones included


class StageServer:
    """The service where frames from the stage before arrive; a `Server` hosts it.

    `capacity` is how many decoded messages wait in an inbox.
    """

    name = "tllm.Stage"
    max_message_bytes = _PIECE_BYTES

    def __init__(self, *, capacity: int = 8) -> None:
        self._capacity = capacity
        self._edge: _Edge | None = None
        self._edge_changed = asyncio.Event()
        self._num_open = 0
        self._closed = False

    def handlers(self) -> Mapping[str, Handler]:
        return {"Stream": grpc.stream_stream_rpc_method_handler(self._stream)}

    def expect(self, limits: FrameLimits, *, sender: str | None = None, journal: Journal | None = None) -> Inbox:
        """Take the one stream of this epoch; it may have been waiting. Over the network only the member named `sender`
        may open it; None: any member. The inbox of an earlier epoch is closed and its stream ended. `journal` is told
        when frames arrive."""
        if self._edge is not None:
            self._edge.inbox.close()
        self._edge = _Edge(limits, Inbox(self._capacity), sender, journal or Journal(1))
        self._tell()
        return self._edge.inbox

    async def aclose(self) -> None:
        """End every stream and close the inbox. Idempotent."""
        self._closed = True
        if self._edge is not None:
            self._edge.inbox.close()
        self._tell()

    def _tell(self) -> None:
        """Those who wait for another epoch, or the end."""
        self._edge_changed.set()
        self._edge_changed = asyncio.Event()

    async def _stream(self, _requests: AsyncIterator[bytes], context: Context) -> None:
        if self._num_open >= _MAX_OPEN:
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MAX_OPEN} streams are open already")
        self._num_open += 1
        try:
            await self._serve(context, await self._greet(context))
        finally:
            self._num_open -= 1

    async def _serve(self, context: Context, edge: _Edge) -> None:
        edge.taken = True
        log.debug("epoch %d: %s is connected", edge.limits.epoch, context.peer())
        receiving = asyncio.create_task(_receive(context, edge), name="receive frames")
        closing = asyncio.create_task(edge.inbox.wait_closed(), name="wait for close")
        try:
            await context.write(pb.Flow(accepted=pb.Accepted()).SerializeToString())
            await asyncio.wait({receiving, closing}, return_when=asyncio.FIRST_COMPLETED)
            if closing.done():
                await context.abort(grpc.StatusCode.CANCELLED, "the receiver closed the link")
            match receiving.exception():
                case None:
                    edge.inbox.finish()
                case FrameError() as error:
                    edge.inbox.finish(error)
                    await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
                case TransportError() as error:
                    edge.inbox.finish(error)
                case bug if bug is not None:
                    raise bug
        finally:  # gRPC cancels this when the peer is gone
            edge.inbox.finish(TransportError("the sender is gone"))
            receiving.cancel()
            closing.cancel()
            await asyncio.gather(receiving, closing, return_exceptions=True)

    async def _greet(self, context: Context) -> _Edge:
        """The edge that this peer may take. Every refusal ends the stream with its reason."""
        try:
            async with asyncio.timeout(_HELLO_S):
                hello = await context.read()
            async with asyncio.timeout(_EPOCH_S):
                agreed = wire.decode_hello(_bounded(hello, _MAX_HELLO_BYTES) if isinstance(hello, bytes) else b"")
                while not self._closed and ((edge := self._edge) is None or edge.limits.epoch < agreed.epoch):
                    await self._edge_changed.wait()
        except FrameError as error:
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TimeoutError:
            await refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, "nothing was agreed with this peer in time")
        if self._closed or edge is None:
            await context.abort(grpc.StatusCode.CANCELLED, "the receiver is closed")
        if edge.sender is not None and (name := peer_of(context).name) not in ("", edge.sender):
            await refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"epoch {agreed.epoch} is sent by {edge.sender} here, and not by {name}",
            )
        if difference := _difference(edge.limits, agreed):
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, difference)
        if edge.taken:
            await refuse(context, grpc.StatusCode.ALREADY_EXISTS, f"epoch {agreed.epoch} has, or had, another sender")
        return edge


class _Edge:
    """One epoch's stream, expected or there."""

    def __init__(self, limits: FrameLimits, inbox: Inbox, sender: str | None, journal: Journal) -> None:
        self.limits = limits
        self.inbox = inbox
        self.sender = sender
        self.journal = journal
        self.taken = False


async def _receive(context: Context, edge: _Edge) -> None:
    """Until the farewell. Raises TransportError when the stream ends without one."""
    journal = edge.journal
    while True:
        data = await _read(context)
        if data == wire.FAREWELL:
            return
        num_bytes = wire.frame_length(data, edge.limits)
        data = await _receive_rest(context, data, num_bytes)
        arrived_s = journal.now_s()
        message = wire.decode(data, edge.limits)
        journal.mark_message(message, Point.ARRIVED, arrived_s)
        journal.mark_message(message, Point.DECODED)
        await edge.inbox.put(message)


async def _receive_rest(context: Context, first: bytes, num_bytes: int) -> bytes:
    """The frame of which `first` is the first piece. Every piece but the last is full: many small ones would take
    many times the memory that the frame says it needs."""
    pieces, num_missing = [first], num_bytes - len(first)
    while len(pieces[-1]) == _PIECE_BYTES and num_missing > 0:
        pieces.append(await _read(context))
        num_missing -= len(pieces[-1])
    if num_missing:
        raise FrameError("a frame whose pieces do not make up its length")
    return first if len(pieces) == 1 else b"".join(pieces)


async def _read(context: Context) -> bytes:
    """The next message. Raises TransportError when there is none."""
    try:
        data = await context.read()
    except STREAM_ERRORS as error:
        raise TransportError(f"the sender is gone: {reason(error)}") from error
    if not isinstance(data, bytes):
        raise TransportError("the sender is gone")
    return _bounded(data, _PIECE_BYTES)


def _bounded(data: bytes, max_bytes: int) -> bytes:
    """Other services of the same server may take larger messages than this one."""
    if len(data) > max_bytes:
        raise FrameError(f"a message of {len(data)} bytes, where at most {max_bytes} are allowed")
    return data


def _difference(ours: FrameLimits, theirs: FrameLimits) -> str:
    """What the two sides were told differently; empty when nothing."""
    if theirs.epoch < ours.epoch:
        return f"epoch {theirs.epoch} is over; epoch {ours.epoch} is in force"
    differing = [
        f"{field.name} is {getattr(ours, field.name)} here and {getattr(theirs, field.name)} there"
        for field in fields(FrameLimits)
        if getattr(ours, field.name) != getattr(theirs, field.name)
    ]
    return "; ".join(differing)


class RpcLink:
    """The sending end of an edge; made by `connect`."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        call: Call,
        address: str,
        limits: FrameLimits,
        close_timeout_s: float,
        journal: Journal,
    ) -> None:
        self.address = address
        self._journal = journal
        self._channel = channel
        self._call = call
        self._limits = limits
        self._close_timeout_s = close_timeout_s
        self._sending = asyncio.Lock()  # gRPC takes one write at a time
        self._closing = asyncio.Lock()
        self._broken: str | None = None

    async def send(self, message: StageMessage) -> None:
        """As in `Link`. Cancelling a send that had begun breaks the link: nobody could say what the peer got of it."""
        self._journal.mark_message(message, Point.ENCODING)
        check(message, self._limits)
        data = wire.encode(message)
        wire.frame_length(data, self._limits)
        self._journal.mark_message(message, Point.ENCODED)
        async with self._sending:
            if self._broken is not None:
                raise TransportError(self._broken)
            try:
                for start in range(0, len(data), _PIECE_BYTES):
                    await self._call.write(data[start : start + _PIECE_BYTES])
            except STREAM_ERRORS as error:
                self._broken = f"the link to {self.address} is gone: {await self._why(error)}"
                raise TransportError(self._broken) from error
            except asyncio.CancelledError:
                self._broken = f"the link to {self.address} is gone: a message was cut off"
                raise
        self._journal.mark_message(message, Point.WRITTEN)

    async def wait_lost(self) -> str:
        """Until the edge is gone, even while nothing is sent; why. It is also gone once this side closed it."""
        code = await self._call.code()
        return f"the link to {self.address} is gone: {await self._call.details() or code.name.lower()}"

    async def _why(self, error: BaseException) -> str:
        """The receiver's own words where they came before the failure."""
        if not self._call.done():
            return reason(error)
        details = await self._call.details()
        if not details or details == _WRITE_FAILED:
            return "the receiver is gone"
        return f"{details} ({(await self._call.code()).name.lower()})"

    async def aclose(self) -> None:
        """As in `Link`; returns when the receiver has everything, or after the deadline."""
        async with self._closing:
            try:
                if self._broken is None:
                    self._broken = "the link is closed"
                    await self._say_farewell()
            finally:
                self._call.cancel()
                await self._channel.close()

    async def _say_farewell(self) -> None:
        try:
            async with asyncio.timeout(self._close_timeout_s), self._sending:
                await self._call.write(wire.FAREWELL)
                await self._call.done_writing()
                await self._call.code()
        except TimeoutError:
            log.warning("%s did not take everything within %g s", self.address, self._close_timeout_s)
        except STREAM_ERRORS as error:
            log.debug("%s was gone before the farewell: %s", self.address, reason(error))


async def connect(
    addresses: Sequence[str],
    limits: FrameLimits,
    *,
    identity: Identity | None,
    peer: str = "",
    timeout_s: float,
    close_timeout_s: float = 5.0,
    liveness: Liveness | None = None,
    journal: Journal | None = None,
) -> RpcLink:
    """A link to the server at the first address that answers, which has agreed to `limits`. On the network that must
    be the member named `peer`, and `identity` is shown to it; Unix sockets need neither. `journal` is told when frames
    leave.

    A server that is not up yet, or not yet told of the epoch, is waited for until `timeout_s` is over. Raises
    TransportError then, and at once when the server refuses, with its reason.
    """
    options = grpc_options(
        max_send_bytes=_PIECE_BYTES, max_receive_bytes=_MAX_FLOW_BYTES, liveness=liveness or Liveness()
    )
    failures = Failures()
    async with deadline(timeout_s, f"no stage answered at {', '.join(addresses)}", failures):
        channel, address = await first_ready(addresses, options, Caller(identity=identity, peer=peer), failures)
        try:
            call: Call = channel.stream_stream("/tllm.Stage/Stream")()
            await call.write(wire.encode_hello(limits))
            answer = await call.read()
            if not isinstance(answer, bytes):
                raise TransportError(f"{address} ended the stream instead of accepting it")
        except BaseException as error:
            await channel.close()
            if isinstance(error, STREAM_ERRORS):
                raise TransportError(f"{address} refused the link: {reason(error)}") from error
            raise
    return RpcLink(channel, call, address, limits, close_timeout_s, journal or Journal(1))
