"""Weights between machines, and something to time links with: what agents and the head serve to each other.

    Describe   everything of a checkpoint but its weights, as pieces of one Manifest
    Hashes     SHA-256 of tensors, empty where this peer does not know it
    Read       a tensor's bytes from an offset on
    Echo       bytes there, zeros back

Peers name checkpoints by fingerprint and tensors by name; no path ever crosses. What they send is bounded here, and is
checked against hashes by whoever keeps it. Only members of the cluster get as far as here (transport/peers.py).

This file does not know where tensors are kept, nor who needs which.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from tllm.core.errors import FrameError, TransportError
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
from tllm.transport.trust import Identity

MAX_PIECE_BYTES: Final = 256 << 10
MAX_ECHO_BYTES: Final = 4 << 20
MAX_MANIFEST_BYTES: Final = 64 << 20
MAX_NAMES: Final = 1024  # in one question for hashes

_SLACK_BYTES: Final = 64 << 10  # what protobuf adds to a piece or an echo, generously
_MAX_MESSAGE_BYTES: Final = MAX_ECHO_BYTES + _SLACK_BYTES
_MAX_NAME_CHARACTERS: Final = 1024
_READ_BYTES: Final = 1 << 20  # from disk at a time: a visit to a thread is not worth less
_SILENCE_S: Final = 30.0  # between two pieces, then the peer is as good as gone

M = TypeVar("M", bound=Message)

if TYPE_CHECKING:  # generic in the stubs alone
    Context = grpc.aio.ServicerContext[bytes, bytes]
    Handler = grpc.RpcMethodHandler[bytes, bytes]


class NotHeldError(TransportError):
    """This peer does not have what was asked for; it is well otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Where a tensor's bytes lie on this machine."""

    file: Path
    offset: int
    num_bytes: int


class ShardProvider(Protocol):
    """What a machine can give. Called on the event loop; whatever may take long is awaited."""

    async def manifest(self, fingerprint: str) -> pb.Manifest | None:
        """None: this machine knows no such checkpoint. Hashes that it has at hand are filled in."""
        ...

    async def hashes(self, fingerprint: str, names: Sequence[str]) -> Sequence[str]:
        """In the order asked; empty for what it cannot tell."""
        ...

    async def locate(self, fingerprint: str, name: str) -> Extent | None:
        """None: the tensor's bytes are not all here."""
        ...


class ShardService:
    """The serving side, over whatever the provider has. One of the services of a `Server`."""

    name = "tllm.Shards"
    max_message_bytes = _MAX_MESSAGE_BYTES

    def __init__(self, provider: ShardProvider) -> None:
        self._provider = provider

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "Describe": grpc.unary_stream_rpc_method_handler(self._describe),
            "Hashes": grpc.unary_unary_rpc_method_handler(self._hashes),
            "Read": grpc.unary_stream_rpc_method_handler(self._read),
            "Echo": grpc.unary_unary_rpc_method_handler(self._echo),
        }

    async def aclose(self) -> None:
        """Nothing outlives a call."""

    async def _describe(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        request = await self._parse(data, pb.DescribeRequest, context)
        manifest = await self._provider.manifest(request.fingerprint)
        if manifest is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this peer has no checkpoint of that fingerprint")
        encoded = manifest.SerializeToString()
        for start in range(0, len(encoded), MAX_PIECE_BYTES):
            yield _piece(encoded[start : start + MAX_PIECE_BYTES])

    async def _hashes(self, data: bytes, context: Context) -> bytes:
        request = await self._parse(data, pb.HashesRequest, context)
        if len(request.names) > MAX_NAMES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than {MAX_NAMES} tensors at a time")
        sha256 = await self._provider.hashes(request.fingerprint, tuple(request.names))
        return pb.HashesAnswer(sha256=sha256).SerializeToString()

    async def _read(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        """gRPC takes the next piece only when the window has room for it, so a slow reader holds at most two."""
        request = await self._parse(data, pb.ReadRequest, context)
        extent = await self._provider.locate(request.fingerprint, request.name)
        if extent is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this peer does not have that tensor")
        if request.offset > extent.num_bytes:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"the tensor has only {extent.num_bytes} bytes")
        position, end = extent.offset + request.offset, extent.offset + extent.num_bytes
        try:
            while position < end:
                block = await asyncio.to_thread(_read_block, extent.file, position, min(_READ_BYTES, end - position))
                if not block:
                    await context.abort(grpc.StatusCode.DATA_LOSS, "the tensor's file has become shorter")
                for start in range(0, len(block), MAX_PIECE_BYTES):
                    yield _piece(block[start : start + MAX_PIECE_BYTES])
                position += len(block)
        except OSError as error:
            await context.abort(grpc.StatusCode.DATA_LOSS, f"the tensor cannot be read: {error.strerror}")

    async def _echo(self, data: bytes, context: Context) -> bytes:
        await self._parse(data, pb.EchoRequest, context)
        return pb.EchoAnswer().SerializeToString()

    async def _parse(self, data: bytes, kind: type[M], context: Context) -> M:
        """The request; the call is aborted for everything else."""
        try:
            return kind.FromString(data)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"that is not a {kind.__name__}")
            raise AssertionError("abort raises") from None


class ShardClient:
    """The asking side: one connection to one peer, a context. Any number of calls may run at once.

    Every method raises TransportError when the peer is gone, silent, or answers beyond what was asked, and its
    subclass NotHeldError when it does not have the thing.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        identity: Identity | None,
        peer: str = "",
        timeout_s: float = 10.0,
        liveness: Liveness | None = None,
    ) -> None:
        """`peer` is who must answer on TCP, as in its certificate."""
        self._addresses = tuple(addresses)
        self._identity = identity
        self._peer = peer
        self._timeout_s = timeout_s
        self._liveness = liveness or Liveness()
        self._channel: grpc.aio.Channel | None = None
        self.address = ""  # that answered

    async def __aenter__(self) -> ShardClient:
        who = self._peer or "the peer"
        if not self._addresses:
            raise TransportError(f"{who} has no address to fetch from")
        options = grpc_options(
            max_send_bytes=_MAX_MESSAGE_BYTES, max_receive_bytes=_MAX_MESSAGE_BYTES, liveness=self._liveness
        )
        failures = Failures()
        caller = Caller(identity=self._identity, peer=self._peer)
        async with deadline(self._timeout_s, f"{who} did not answer at {', '.join(self._addresses)}", failures):
            self._channel, self.address = await first_ready(self._addresses, options, caller, failures)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    async def describe(self, fingerprint: str) -> pb.Manifest:
        """The manifest; its fingerprint is the one asked for, everything else is the peer's word."""
        pieces: list[bytes] = []
        num_bytes = 0
        async for piece in self._pieces("Describe", pb.DescribeRequest(fingerprint=fingerprint)):
            num_bytes += len(piece)
            if num_bytes > MAX_MANIFEST_BYTES:
                raise FrameError(f"a manifest of more than {MAX_MANIFEST_BYTES} bytes")
            pieces.append(piece)
        manifest = _decode(b"".join(pieces), pb.Manifest)
        if manifest.fingerprint != fingerprint:
            raise FrameError("a manifest of another checkpoint than was asked for")
        return manifest

    async def hashes(self, fingerprint: str, names: Sequence[str], *, timeout_s: float = 600.0) -> tuple[str, ...]:
        """In the order asked; empty for what the peer cannot tell. It may have to read the tensors first."""
        request = pb.HashesRequest(fingerprint=fingerprint, names=names)
        answer = await self._ask("Hashes", request, pb.HashesAnswer, timeout_s)
        if len(answer.sha256) != len(names):
            raise FrameError(f"{len(answer.sha256)} hashes where {len(names)} were asked for")
        return tuple(answer.sha256)

    def read(self, fingerprint: str, name: str, offset: int = 0) -> AsyncGenerator[bytes]:
        """The tensor's bytes from `offset` on, in pieces of at most `MAX_PIECE_BYTES`. How many come is the peer's
        doing: the caller knows how many there should be, and ends the iteration when there are more."""
        return self._pieces(
            "Read", pb.ReadRequest(fingerprint=fingerprint, name=name[:_MAX_NAME_CHARACTERS], offset=offset)
        )

    async def echo(self, data: bytes, *, timeout_s: float = 10.0) -> None:
        """Send `data`, at most `MAX_ECHO_BYTES`; returns when the peer has said that all of it is there."""
        await self._ask("Echo", pb.EchoRequest(data=data), pb.EchoAnswer, timeout_s)

    async def _ask(self, method: str, request: Message, kind: type[M], timeout_s: float) -> M:
        assert self._channel is not None
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/tllm.Shards/{method}")
        try:
            data = await call(request.SerializeToString(), timeout=timeout_s)
        except STREAM_ERRORS as error:
            raise self._lost(error) from error
        return _decode(data, kind)

    async def _pieces(self, method: str, request: Message) -> AsyncGenerator[bytes]:
        assert self._channel is not None
        calls: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(f"/tllm.Shards/{method}")
        call = calls(request.SerializeToString())
        try:
            while True:
                async with deadline(_SILENCE_S, f"{self._peer or self.address} sent nothing"):
                    data = await call.read()
                if not isinstance(data, bytes):
                    return
                piece = _decode(data, pb.Piece).data
                if len(piece) > MAX_PIECE_BYTES:
                    raise FrameError(f"a piece of {len(piece)} bytes, where at most {MAX_PIECE_BYTES} are allowed")
                yield piece
        except STREAM_ERRORS as error:
            raise self._lost(error) from error
        finally:
            call.cancel()

    def _lost(self, error: BaseException) -> TransportError:
        who = self._peer or self.address
        if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.NOT_FOUND:
            return NotHeldError(f"{who}: {error.details()}")
        return TransportError(f"{who} is gone: {reason(error)}")


def _piece(data: bytes) -> bytes:
    return pb.Piece(data=data).SerializeToString()


def _decode(data: bytes, kind: type[M]) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise FrameError(f"an answer that is not a {kind.__name__}") from error


def _read_block(path: Path, offset: int, num_bytes: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), num_bytes, offset)
