"""Matrices over a link, to measure what it and the codecs take: the same kind of stream that steps use, one at a time.

    MatrixClient ── matrix, in pieces ─▶ LinkBench     the receiver decodes it
                 ◀──── MatrixReceived ──               and says how long that took
                 ── nothing ─▶                          an empty message: the round trip

    | rows u32 | columns u32 | encoded length u32 | codec u16 | dtype u16 | the encoded matrix |

Codec and dtype are places in `CodecName` and `DType`. A matrix of no rows is the empty message. As on the data plane,
one long-lived stream carries everything, in messages of at most 256 KiB; over the network it is mutual TLS, and only
members of the cluster get as far as here (transport/peers.py).

One-way times would need clocks that agree, so what is measured goes there and back: from the first write to the
arrival of the receiver's answer, less the time that the receiver says it spent decoding.

This file does not know which matrices are worth sending, nor what the times mean.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from tllm.core.errors import ConfigError, FrameError, TransportError
from tllm.core.types import DType
from tllm.transport import wire_pb2 as pb
from tllm.transport.channels import (
    STREAM_ERRORS,
    WINDOW_BYTES,
    Caller,
    Failures,
    Liveness,
    deadline,
    first_ready,
    grpc_options,
    reason,
)
from tllm.transport.codecs import CodecName, MatrixCodec, MatrixShape, make_codec, max_encoded_bytes
from tllm.transport.peers import refuse
from tllm.transport.trust import Identity

if TYPE_CHECKING:  # generic in the stubs alone
    Context = grpc.aio.ServicerContext[bytes, bytes]
    Handler = grpc.RpcMethodHandler[bytes, bytes]
    Call = grpc.aio.StreamStreamCall[bytes, bytes]

log = logging.getLogger(__name__)

Clock = Callable[[], float]
D = TypeVar("D")
T = TypeVar("T")

MAX_MATRIX_BYTES: Final = 64 << 20  # before it is encoded: 4096 rows of 8192 numbers of 16 bits
STREAM_BYTES: Final = WINDOW_BYTES  # that one stream keeps under way

_PIECE_BYTES: Final = 256 << 10  # as on the data plane
_MAX_ANSWER_BYTES: Final = 4096
_INLINE_BYTES: Final = 256 << 10  # coded on the event loop; more would hold up everything else that runs there
_MAX_OPEN: Final = 2  # streams at a time: each may hold a matrix, its encoded form and its pieces
_SILENCE_S: Final = 60.0  # between two matrices, or two pieces of one
_HEADER: Final = struct.Struct("<IIIHH")
_EMPTY: Final = _HEADER.pack(0, 0, 0, 0, 0)
_CODECS: Final = tuple(CodecName)
_DTYPES: Final = tuple(DType)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one matrix took."""

    encoded_bytes: int
    compress_s: float
    carry_s: float  # there, and the answer back; without what the receiver took to decode
    decompress_s: float


class CodecUnusableError(ConfigError):
    """One of the two ends cannot use a codec, or not for these numbers; all others still work."""


class LinkBench:
    """The receiving side. One of the services of a `Server`."""

    name = "tllm.LinkBench"
    max_message_bytes = _PIECE_BYTES

    def __init__(self) -> None:
        self._num_open = 0
        self._closing = asyncio.Event()
        self._opened = asyncio.Event()
        self._served = asyncio.Event()

    def handlers(self) -> Mapping[str, Handler]:
        return {"Stream": grpc.stream_stream_rpc_method_handler(self._stream)}

    async def aclose(self) -> None:
        """End what is open."""
        self._closing.set()

    async def wait_opened(self) -> None:
        """Until a first stream has been opened."""
        await self._opened.wait()

    async def wait_served(self) -> None:
        """Until a first stream has been opened and has ended."""
        await self._served.wait()

    async def _stream(self, _requests: AsyncIterator[bytes], context: Context) -> None:
        if self._num_open >= _MAX_OPEN:
            why = f"{_MAX_OPEN} link benchmarks run here already; try again when they are done"
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        self._num_open += 1
        self._opened.set()
        serving = asyncio.create_task(_serve(context), name="receive matrices")
        closing = asyncio.create_task(self._closing.wait(), name="wait for close")
        try:
            await asyncio.wait({serving, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await context.abort(grpc.StatusCode.CANCELLED, "the receiver is closed")
            serving.result()
        except FrameError as error:
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TimeoutError:
            await refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing came for {_SILENCE_S:g} s")
        except STREAM_ERRORS as error:
            log.debug("the sender of matrices is gone: %s", reason(error))
        finally:
            self._num_open -= 1
            for task in (serving, closing):  # gRPC cancels this when the sender is gone
                task.cancel()
            await asyncio.gather(serving, closing, return_exceptions=True)
            self._served.set()


async def _serve(context: Context) -> None:
    codecs: dict[CodecName, MatrixCodec] = {}
    while (first := await _read(context)) is not None:
        if first == _EMPTY:
            await context.write(pb.MatrixReceived().SerializeToString())
            continue
        shape, name, num_bytes = _parse_header(first)
        encoded = await _receive_rest(context, first, num_bytes)
        answer = pb.MatrixReceived()
        began = time.perf_counter()
        try:
            if name not in codecs:
                codecs[name] = make_codec(name)
        except ConfigError as error:
            answer.failed = str(error)
        else:
            await _coded(codecs[name].decode, encoded, shape, name)
            answer.decode_s = time.perf_counter() - began
        await context.write(answer.SerializeToString())


async def _coded(code: Callable[[D, MatrixShape], T], data: D, shape: MatrixShape, name: CodecName) -> T:
    if shape.num_bytes <= _INLINE_BYTES or name is CodecName.NONE:
        return code(data, shape)
    return await asyncio.to_thread(code, data, shape)


async def _read(context: Context) -> bytes | None:
    """The next message; None at the end of the stream."""
    async with asyncio.timeout(_SILENCE_S):
        data = await context.read()
    if not isinstance(data, bytes):
        return None
    if len(data) > _PIECE_BYTES:  # other services of the same server may take larger ones
        raise FrameError(f"a message of {len(data)} bytes, where at most {_PIECE_BYTES} are allowed")
    return data


def _parse_header(data: bytes) -> tuple[MatrixShape, CodecName, int]:
    """Shape, codec and encoded length, all within bounds: before memory is taken for any of it."""
    if len(data) < _HEADER.size:
        raise FrameError("a matrix without a header")
    rows, columns, num_bytes, codec, dtype = _HEADER.unpack_from(data)
    if codec >= len(_CODECS) or dtype >= len(_DTYPES):
        raise FrameError("a matrix of an unknown codec or dtype")
    if not rows or not columns:
        raise FrameError("a matrix without rows or columns")
    shape = MatrixShape(rows=rows, columns=columns, dtype=_DTYPES[dtype])
    if shape.num_bytes > MAX_MATRIX_BYTES:
        raise FrameError(f"a matrix of {shape.num_bytes} bytes, where at most {MAX_MATRIX_BYTES} are allowed")
    if num_bytes > max_encoded_bytes(shape):
        raise FrameError(f"{num_bytes} bytes for a matrix that no codec makes larger than {max_encoded_bytes(shape)}")
    return shape, _CODECS[codec], num_bytes


async def _receive_rest(context: Context, first: bytes, num_bytes: int) -> memoryview:
    """Without its header. Every piece but the last is full, and the whole is copied once, as on the data plane."""
    pieces, num_missing = [first], _HEADER.size + num_bytes - len(first)
    while len(pieces[-1]) == _PIECE_BYTES and num_missing > 0:
        if (piece := await _read(context)) is None:
            raise FrameError("the stream ended within a matrix")
        pieces.append(piece)
        num_missing -= len(piece)
    if num_missing:
        raise FrameError("a matrix whose pieces do not make up its length")
    return memoryview(first if len(pieces) == 1 else b"".join(pieces))[_HEADER.size :]


def _parse_answer(data: bytes) -> pb.MatrixReceived:
    try:
        return pb.MatrixReceived.FromString(data)
    except DecodeError as error:
        raise FrameError("an answer that is not a MatrixReceived") from error


class MatrixClient:
    """The sending side: one stream to one peer, a context. Calls come one at a time."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        identity: Identity | None,
        peer: str = "",
        timeout_s: float = 10.0,
        liveness: Liveness | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """`peer` is who must answer on TCP, as in its certificate."""
        self._addresses = tuple(addresses)
        self._caller = Caller(identity=identity, peer=peer)
        self._who = peer or "the peer"
        self._timeout_s = timeout_s
        self._liveness = liveness or Liveness()
        self._clock = clock
        self._codecs: dict[CodecName, MatrixCodec] = {}
        self._channel: grpc.aio.Channel | None = None
        self._call: Call
        self.address = ""  # that answered

    async def __aenter__(self) -> MatrixClient:
        """Raises TransportError when nobody answers in time."""
        if not self._addresses:
            raise TransportError(f"{self._who} has no address that can be reached from here")
        options = grpc_options(
            max_send_bytes=_PIECE_BYTES, max_receive_bytes=_MAX_ANSWER_BYTES, liveness=self._liveness
        )
        failures = Failures()
        async with deadline(self._timeout_s, f"{self._who} did not answer at {', '.join(self._addresses)}", failures):
            self._channel, self.address = await first_ready(self._addresses, options, self._caller, failures)
        self._call = self._channel.stream_stream(f"/{LinkBench.name}/Stream")()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            self._call.cancel()
            await channel.close()

    async def round_trip_s(self) -> float:
        """Of an empty message. Raises TransportError."""
        began = self._clock()
        await self._exchange(_EMPTY)
        return self._clock() - began

    def codec(self, name: CodecName) -> MatrixCodec:
        """This side's. Raises CodecUnusableError where its library is not installed here."""
        if name not in self._codecs:
            try:
                self._codecs[name] = make_codec(name)
            except ConfigError as error:
                raise CodecUnusableError(str(error)) from error
        return self._codecs[name]

    async def send(self, data: bytes, shape: MatrixShape, name: CodecName) -> Timing:
        """Encode and send one matrix; returns when the receiver has decoded it.

        Raises TransportError when the peer is gone or refuses. CodecUnusableError when one side has not the codec, or
        the codec cannot carry these numbers; the stream goes on then.
        """
        codec = self.codec(name)
        began = self._clock()
        try:
            encoded = await _coded(codec.encode, data, shape, name)
        except FrameError as error:
            raise CodecUnusableError(str(error)) from error
        compress_s = self._clock() - began
        header = _HEADER.pack(shape.rows, shape.columns, len(encoded), _CODECS.index(name), _DTYPES.index(shape.dtype))
        message = header + encoded
        began = self._clock()
        answer = await self._exchange(message)
        elapsed_s = self._clock() - began
        if answer.failed:
            raise CodecUnusableError(f"{self._who}: {answer.failed}")
        return Timing(
            encoded_bytes=len(encoded),
            compress_s=compress_s,
            # The receiver's clock may run a little faster than ours, and a loopback takes next to nothing.
            carry_s=max(0.0, elapsed_s - answer.decode_s),
            decompress_s=answer.decode_s,
        )

    async def _exchange(self, message: bytes) -> pb.MatrixReceived:
        try:
            for start in range(0, len(message), _PIECE_BYTES):
                await self._call.write(message[start : start + _PIECE_BYTES])
            data = await self._call.read()
        except STREAM_ERRORS as error:
            raise TransportError(f"{self._who} is gone: {await self._why(error)}") from error
        if not isinstance(data, bytes):
            raise TransportError(f"{self._who} ended the stream: {await self._call.details() or 'without a reason'}")
        return _parse_answer(data)

    async def _why(self, error: BaseException) -> str:
        """The receiver's own words where they came before the failure."""
        return (await self._call.details() if self._call.done() else "") or reason(error)
