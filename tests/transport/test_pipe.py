"""Messages over pipes."""

from __future__ import annotations

import asyncio
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import FrameError
from tllm.transport import pipe
from tllm.transport import wire_pb2 as pb

pytestmark = pytest.mark.timeout(30)
EVENT = pb.WorkerEvent(worker_id="w1", loaded=pb.Loaded(free_bytes=1 << 40, addresses=["unix:/tmp/stage.sock"]))
ENCODED = struct.pack("<I", EVENT.ByteSize()) + EVENT.SerializeToString()


class Collector:
    """The part of a StreamWriter that `write_message` uses."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


async def read_all(data: bytes) -> list[pb.WorkerEvent]:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    stream.feed_eof()
    messages = []
    while (message := await pipe.read_message(stream, pb.WorkerEvent)) is not None:
        messages.append(message)
    return messages


@given(st.lists(st.text(max_size=100), max_size=5))
def test_messages_are_read_as_they_were_written(names: list[str]) -> None:
    collector = Collector()
    sent = [pb.WorkerEvent(worker_id=name) for name in names]
    for message in sent:
        pipe.write_message(collector, message)  # type: ignore[arg-type]
    assert asyncio.run(read_all(collector.data)) == sent


@pytest.mark.parametrize("length", range(1, len(ENCODED)))
async def test_a_stream_that_ends_within_a_message_is_an_error(length: int) -> None:
    with pytest.raises(FrameError):
        await read_all(ENCODED + ENCODED[:length])


async def test_a_stream_that_ends_between_messages_just_ends() -> None:
    assert await read_all(b"") == []
    assert await read_all(ENCODED) == [EVENT]


async def test_a_length_above_the_limit_is_refused_before_anything_is_read() -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(struct.pack("<I", pipe.MAX_MESSAGE_BYTES + 1))  # and no end: reading on would wait
    with pytest.raises(FrameError, match="at most"):
        await asyncio.wait_for(pipe.read_message(stream, pb.WorkerEvent), 5)


async def test_a_message_above_the_limit_is_not_written() -> None:
    collector = Collector()
    with pytest.raises(FrameError):
        pipe.write_message(collector, pb.WorkerEvent(worker_id="w" * pipe.MAX_MESSAGE_BYTES))  # type: ignore[arg-type]
    assert collector.data == b""


@given(st.binary(max_size=60))
def test_garbage_is_messages_or_an_error(data: bytes) -> None:
    try:
        asyncio.run(read_all(struct.pack("<I", len(data)) + data))
        asyncio.run(read_all(data))
    except FrameError:
        pass
