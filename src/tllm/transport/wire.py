"""Messages between stages as bytes, and back. The layout is drawn and explained in wire.proto.

Rules:
    `decode` is total: any bytes give a message within the limits, or FrameError.
    Lengths and the epoch are checked before anything is parsed, numbers of entries before lists are built.
    Hidden states are copied once on the way out and never on the way in.

This file does not know sockets, models, or what a step is for.
"""

from __future__ import annotations

import struct

from google.protobuf.message import DecodeError

from tllm.core.errors import FrameError
from tllm.core.types import Epoch, StepFailed, StepResult
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FRAME_HEADER_BYTES, FrameLimits, StageMessage, StepFrame
from tllm.transport.checks import at_most, check, check_epoch
from tllm.transport.columns import need, parse_dtype
from tllm.transport.results import fill_failed, fill_result, read_failed, read_result
from tllm.transport.steps import fill_step, read_step

PROTOCOL = 4  # of both planes; raised with every change of wire.proto that an older program would misread
FAREWELL = b""  # the last message of a data stream that was not lost

_HEADER = struct.Struct("<QII")
assert _HEADER.size == FRAME_HEADER_BYTES


def encode(message: StageMessage) -> bytes:
    """The message as one frame.

    Reasons of failures are cut to a few thousand characters, and what is not text in them is replaced. Raises
    FrameError when a number has no place on the wire (a negative id, say).
    """
    frame = pb.Frame()
    body: bytes | bytearray | memoryview = b""
    try:
        match message:
            case StepFrame():
                epoch = message.step.epoch
                fill_step(frame.step, message)
                if message.hidden is not None:
                    body = message.hidden.data
            case StepResult():
                epoch = message.epoch
                fill_result(frame.result, message)
            case StepFailed():
                epoch = message.epoch
                fill_failed(frame.failed, message)
        metadata = frame.SerializeToString()
        header = _HEADER.pack(epoch, memoryview(body).nbytes, len(metadata))
    except (ValueError, struct.error) as error:
        raise FrameError(f"a message cannot be encoded: {error}") from error
    return b"".join((header, body, metadata))


def decode(data: bytes, limits: FrameLimits) -> StageMessage:
    """The message in a frame; it satisfies `checks.check`. Its hidden states are a view into `data`.

    Raises FrameError, and nothing else, for bytes that are not a frame within the limits.
    """
    body, metadata, epoch = _split(data, limits)
    try:
        frame = pb.Frame.FromString(metadata)
    except DecodeError as error:
        raise FrameError("a frame's metadata is damaged") from error
    message: StageMessage
    match frame.WhichOneof("message"):
        case "step":
            message = read_step(frame.step, body, epoch, limits)
        case "result":
            need(not body, "a result with hidden states")
            message = read_result(frame.result, epoch, limits)
        case "failed":
            need(not body, "a failure with hidden states")
            message = read_failed(frame.failed, epoch)
        case _:
            raise FrameError("a frame without a message")
    check(message, limits)
    return message


def frame_length(data: bytes, limits: FrameLimits) -> int:
    """The number of bytes of the frame that `data` begins. Raises FrameError when no frame of this epoch and within
    the limits begins so: whoever receives a frame in pieces asks this before it takes memory for the rest."""
    need(len(data) >= FRAME_HEADER_BYTES, "a truncated frame")
    epoch, num_body_bytes, num_metadata_bytes = _HEADER.unpack_from(data)
    check_epoch(epoch, limits)
    at_most("bytes of hidden states", num_body_bytes, limits.max_hidden_bytes)
    at_most("bytes of metadata", num_metadata_bytes, limits.max_metadata_bytes)
    return int(FRAME_HEADER_BYTES + num_body_bytes + num_metadata_bytes)


def encode_hello(limits: FrameLimits) -> bytes:
    """The first message on a data stream."""
    return pb.Hello(protocol=PROTOCOL, limits=pack_limits(limits)).SerializeToString()


def decode_hello(data: bytes) -> FrameLimits:
    """What the peer believes was agreed. Raises FrameError for anything else, and for another protocol."""
    try:
        hello = pb.Hello.FromString(data)
    except DecodeError as error:
        raise FrameError("the first message is not a Hello") from error
    if hello.protocol != PROTOCOL:
        raise FrameError(
            f"the peer speaks protocol {hello.protocol} and this side protocol {PROTOCOL}; "
            "install the same version of tllm on both"
        )
    return unpack_limits(hello.limits)


def pack_limits(limits: FrameLimits) -> pb.Limits:
    return pb.Limits(
        epoch=limits.epoch,
        hidden_size=limits.hidden_size,
        dtype=limits.dtype,
        max_tokens=limits.max_tokens,
        max_chunks=limits.max_chunks,
        max_blocks=limits.max_blocks,
        vocab_size=limits.vocab_size,
    )


def unpack_limits(agreed: pb.Limits) -> FrameLimits:
    """Raises FrameError for a dtype that does not exist."""
    return FrameLimits(
        epoch=Epoch(agreed.epoch),
        hidden_size=agreed.hidden_size,
        dtype=parse_dtype(agreed.dtype),
        max_tokens=agreed.max_tokens,
        max_chunks=agreed.max_chunks,
        max_blocks=agreed.max_blocks,
        vocab_size=agreed.vocab_size,
    )


def _split(data: bytes, limits: FrameLimits) -> tuple[memoryview, bytes, Epoch]:
    """Body, metadata and epoch of a frame whose lengths are within the limits and add up."""
    need(frame_length(data, limits) == len(data), "a frame whose length contradicts its header")
    _, num_body_bytes, _ = _HEADER.unpack_from(data)
    body_end = FRAME_HEADER_BYTES + num_body_bytes
    return memoryview(data)[FRAME_HEADER_BYTES:body_end], data[body_end:], limits.epoch
