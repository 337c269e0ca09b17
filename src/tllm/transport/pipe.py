"""Protobuf messages over the pipes between an agent and its workers.

    | length u32, little-endian | message |

This file does not know which messages there are.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from tllm.core.errors import FrameError

MAX_MESSAGE_BYTES = 1 << 20

_LENGTH = struct.Struct("<I")

M = TypeVar("M", bound=Message)


def write_message(stream: asyncio.StreamWriter, message: Message) -> None:
    """Queue the message on the stream; the caller decides when to `drain`.

    Raises FrameError, writing nothing, for a message above MAX_MESSAGE_BYTES.
    """
    data = message.SerializeToString()
    if len(data) > MAX_MESSAGE_BYTES:
        raise FrameError(f"a message of {len(data)} bytes, where at most {MAX_MESSAGE_BYTES} may cross a pipe")
    stream.write(_LENGTH.pack(len(data)) + data)


async def read_message(stream: asyncio.StreamReader, kind: type[M]) -> M | None:
    """The next message, or None when the stream ended between two messages.

    Raises FrameError for a stream that ends within a message, for a length above MAX_MESSAGE_BYTES (before reading on)
    and for bytes that are not a `kind`; the stream is of no use then.
    """
    try:
        prefix = await stream.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise FrameError("a pipe ended within a message") from error
    (num_bytes,) = _LENGTH.unpack(prefix)
    if num_bytes > MAX_MESSAGE_BYTES:
        raise FrameError(f"a message of {num_bytes} bytes, where at most {MAX_MESSAGE_BYTES} may cross a pipe")
    try:
        data = await stream.readexactly(num_bytes)
    except asyncio.IncompleteReadError as error:
        raise FrameError("a pipe ended within a message") from error
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise FrameError(f"a pipe carried something that is not a {kind.__name__}") from error
