"""Edges of a pipeline over gRPC: agreement, loss, epochs, and what is left when they are closed."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tllm.core.errors import FrameError, TransportError
from tllm.core.types import Activation, BlockId, Chunk, DType, Epoch, SequenceId, Step, StepId, StepResult, TokenId
from tllm.testing.identities import members
from tllm.transport import rpc, wire
from tllm.transport.base import FrameLimits, StepFrame
from tllm.transport.channels import Caller, Liveness

LIMITS = FrameLimits(
    epoch=Epoch(3), hidden_size=8, dtype=DType.FLOAT32, max_tokens=16, max_chunks=8, max_blocks=4, vocab_size=100
)
RESULT = StepResult(step=StepId(1), epoch=Epoch(3))
DEADLINE_S = 10.0
pytestmark = pytest.mark.timeout(30)


class Cluster:
    """Two neighbours: `there` listens and `here` sends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.here, self.there = members(directory, "n-here", "n-there")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("cluster"))


class Stage:
    """A stage's service with a server of its own."""

    def __init__(self, cluster: Cluster, liveness: Liveness | None = None) -> None:
        self._service = rpc.StageServer()
        self._server = rpc.Server([self._service], identity=cluster.there, liveness=liveness)
        self.expect = self._service.expect
        self.start = self._server.start
        self.aclose = self._server.aclose


@pytest.fixture
async def server(cluster: Cluster) -> AsyncIterator[Stage]:
    server = Stage(cluster)
    yield server
    await server.aclose()


@pytest.fixture
def connect(cluster: Cluster) -> Connect:
    async def connect(address: str, limits: FrameLimits = LIMITS, timeout_s: float = DEADLINE_S) -> rpc.RpcLink:
        return await rpc.connect(
            [address], limits, identity=cluster.here, peer="n-there", timeout_s=timeout_s, close_timeout_s=1.0
        )

    return connect


Connect = Callable[..., Coroutine[Any, Any, rpc.RpcLink]]
RawStream = Callable[..., Coroutine[Any, Any, grpc.aio.AioRpcError | None]]


@pytest.fixture
def raw_stream(cluster: Cluster) -> RawStream:
    async def raw_stream(address: str, *messages: bytes) -> grpc.aio.AioRpcError | None:
        return await _raw_stream(Caller(identity=cluster.here, peer="n-there"), address, *messages)

    return raw_stream


async def _raw_stream(caller: Caller, address: str, *messages: bytes) -> grpc.aio.AioRpcError | None:
    """What a member gets who sends these bytes and reads to the end."""
    async with caller.channel(address, ()) as channel:
        call: Any = channel.stream_stream("/tllm.Stage/Stream")()
        try:
            for message in messages:
                await call.write(message)
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error
        return None


async def test_one_server_listens_on_a_unix_socket_and_on_tcp(server: Stage, tmp_path: Path, connect: Connect) -> None:
    unix, tcp = await server.start([f"unix:{tmp_path}/stage.sock", "127.0.0.1:0"])
    assert unix == f"unix:{tmp_path}/stage.sock"
    assert not tcp.endswith(":0")
    for epoch, address in enumerate((unix, tcp), start=1):
        limits = replace(LIMITS, epoch=Epoch(epoch))
        inbox = server.expect(limits)
        link = await connect(address, limits)
        await link.send(replace(RESULT, epoch=Epoch(epoch)))
        assert await anext(inbox) == replace(RESULT, epoch=Epoch(epoch))
        await link.aclose()


async def test_an_address_that_is_taken_is_refused_by_name(server: Stage, cluster: Cluster) -> None:
    (taken,) = await server.start(["127.0.0.1:0"])
    with pytest.raises(TransportError, match=taken):
        await Stage(cluster).start([taken])


async def test_a_link_is_made_to_the_first_address_that_answers(
    server: Stage, tmp_path: Path, cluster: Cluster
) -> None:
    unix, tcp = await server.start([f"unix:{tmp_path}/stage.sock", "127.0.0.1:0"])
    server.expect(LIMITS)
    addresses = [f"unix:{tmp_path}/nobody.sock", tcp, unix]
    link = await rpc.connect(addresses, LIMITS, identity=cluster.here, peer="n-there", timeout_s=DEADLINE_S)
    assert link.address == tcp
    await link.aclose()


async def test_a_server_that_starts_later_is_waited_for(server: Stage, tmp_path: Path, connect: Connect) -> None:
    address = f"unix:{tmp_path}/stage.sock"
    connecting = asyncio.create_task(connect(address))
    await asyncio.wait({connecting}, timeout=0.05)
    await server.start([address])
    await asyncio.wait({connecting}, timeout=0.05)
    server.expect(LIMITS)
    await (await connecting).aclose()


async def test_nobody_there_is_an_error_after_the_deadline(tmp_path: Path, connect: Connect) -> None:
    with pytest.raises(TransportError, match=r"nobody\.sock within 0\.2 s"):
        await connect(f"unix:{tmp_path}/nobody.sock", timeout_s=0.2)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (replace(LIMITS, epoch=Epoch(2)), "epoch 2 is over; epoch 3 is in force"),
        (replace(LIMITS, hidden_size=9), "hidden_size is 8 here and 9 there"),
        (replace(LIMITS, dtype=DType.BFLOAT16), "dtype is float32 here and bfloat16 there"),
        (replace(LIMITS, vocab_size=99), "vocab_size is 100 here and 99 there"),
    ],
)
async def test_a_peer_that_was_told_otherwise_is_refused_with_the_difference(
    server: Stage, theirs: FrameLimits, reason: str, connect: Connect
) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    server.expect(LIMITS)
    with pytest.raises(TransportError, match=reason):
        await connect(address, theirs)
    await (await connect(address)).aclose()  # and the place is still free


async def test_another_protocol_is_refused(
    server: Stage, monkeypatch: pytest.MonkeyPatch, raw_stream: RawStream
) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    server.expect(LIMITS)
    hello = wire.encode_hello(LIMITS)
    before = wire.PROTOCOL
    monkeypatch.setattr(wire, "PROTOCOL", 99)
    error = await raw_stream(address, hello)
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"speaks protocol {before} and this side protocol 99" in (error.details() or "")


async def test_a_second_peer_is_refused_while_the_first_lives_and_after_it(server: Stage, connect: Connect) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    inbox = server.expect(LIMITS)
    first = await connect(address)
    for _ in range(2):
        with pytest.raises(TransportError, match="another sender"):
            await connect(address)
    await first.send(RESULT)
    assert await anext(inbox) == RESULT
    await first.aclose()
    with pytest.raises(TransportError, match="another sender"):
        await connect(address)


async def test_a_new_epoch_ends_the_stream_of_the_old_one(server: Stage, connect: Connect) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    old_inbox = server.expect(LIMITS)
    old = await connect(address)
    new_limits = replace(LIMITS, epoch=Epoch(4))
    new_inbox = server.expect(new_limits)
    assert [message async for message in old_inbox] == []
    await old.wait_lost()
    with pytest.raises(TransportError):
        await old.send(RESULT)
    new = await connect(address, new_limits)
    await new.send(replace(RESULT, epoch=Epoch(4)))
    assert await anext(new_inbox) == replace(RESULT, epoch=Epoch(4))
    await old.aclose()
    await new.aclose()


@pytest.mark.parametrize("hello", [b"", b"\xff\xff", b"GET / HTTP/1.1\r\n"])
async def test_a_stranger_is_refused(server: Stage, hello: bytes, raw_stream: RawStream) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    server.expect(LIMITS)
    error = await raw_stream(address, hello)
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_frame_that_is_nonsense_ends_the_stream_on_both_sides(server: Stage, raw_stream: RawStream) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    inbox = server.expect(LIMITS)
    error = await raw_stream(address, wire.encode_hello(LIMITS), wire.encode(RESULT), b"nonsense")
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await anext(inbox) == RESULT
    with pytest.raises(FrameError, match="truncated"):
        await anext(inbox)


@pytest.mark.parametrize(
    ("num_body_bytes", "num_metadata_bytes", "epoch", "reason"),
    [
        (LIMITS.max_hidden_bytes + 1, 0, 3, "bytes of hidden states"),
        (0, LIMITS.max_metadata_bytes + 1, 3, "bytes of metadata"),
        (100, 100, 2, "epoch 2"),
    ],
)
async def test_a_frame_beyond_the_limits_is_refused_by_its_first_piece(
    server: Stage, num_body_bytes: int, num_metadata_bytes: int, epoch: int, reason: str, raw_stream: RawStream
) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    inbox = server.expect(LIMITS)
    header = struct.pack("<QII", epoch, num_body_bytes, num_metadata_bytes)
    error = await raw_stream(address, wire.encode_hello(LIMITS), header)
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(FrameError, match=reason):
        await anext(inbox)


@pytest.mark.parametrize("piece_bytes", [1, 1000, (256 << 10) - 1])
async def test_a_frame_in_smaller_pieces_than_it_needs_is_refused(
    server: Stage, piece_bytes: int, raw_stream: RawStream
) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    limits = replace(LIMITS, hidden_size=65536)
    inbox = server.expect(limits)
    frame = struct.pack("<QII", limits.epoch, limits.max_hidden_bytes, 0) + bytes(2 * (256 << 10))
    await raw_stream(address, wire.encode_hello(limits), frame[: max(16, piece_bytes)], frame[:piece_bytes])
    with pytest.raises(FrameError, match="pieces"):
        await anext(inbox)


async def test_a_message_above_the_size_of_a_piece_never_reaches_python(server: Stage, raw_stream: RawStream) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    inbox = server.expect(LIMITS)
    error = await raw_stream(address, wire.encode_hello(LIMITS), bytes((256 << 10) + 1))
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(TransportError):
        await anext(inbox)


SENDER = """
import asyncio, sys
from tllm.core.types import DType, Epoch, StepId, StepResult
from tllm.transport import rpc
from tllm.transport.base import FrameLimits

from pathlib import Path
from tllm.testing.identities import members

(identity,) = members(Path(sys.argv[2]), "n-here")
names = ("epoch", "hidden_size", "max_tokens", "max_chunks", "max_blocks", "vocab_size")
limits = FrameLimits(dtype=DType.FLOAT32, **dict(zip(names, map(int, sys.argv[3:]))))

async def main():
    link = await rpc.connect([sys.argv[1]], limits, identity=identity, peer="n-there", timeout_s=10)
    await link.send(StepResult(step=StepId(1), epoch=limits.epoch))
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_sender_is_an_error_at_once(server: Stage, cluster: Cluster) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    inbox = server.expect(LIMITS)
    numbers = (LIMITS.epoch, LIMITS.hidden_size, LIMITS.max_tokens, LIMITS.max_chunks, LIMITS.max_blocks)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SENDER, address, str(cluster.directory), *map(str, (*numbers, LIMITS.vocab_size))
    )
    try:
        assert await anext(inbox) == RESULT
        process.kill()
        async with asyncio.timeout(1.5):
            with pytest.raises(TransportError):
                await anext(inbox)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Relay:
    """A TCP relay that can stop moving bytes without closing anything: a pulled cable."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._moving = asyncio.Event()
        self._moving.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self._moving.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._move(source, sink))
            self._tasks.add(task)

    async def _move(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._moving.wait()
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()

    async def aclose(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_a_peer_behind_a_pulled_cable_is_noticed_on_both_sides(cluster: Cluster) -> None:
    liveness = Liveness(ping_interval_s=0.3, ping_timeout_s=0.3)
    server = Stage(cluster, liveness)
    (address,) = await server.start(["127.0.0.1:0"])
    relay = Relay(address)
    inbox = server.expect(LIMITS)
    link = await rpc.connect(
        [await relay.start()],
        LIMITS,
        identity=cluster.here,
        peer="n-there",
        timeout_s=DEADLINE_S,
        close_timeout_s=0.5,
        liveness=liveness,
    )
    await link.send(RESULT)
    assert await anext(inbox) == RESULT
    relay.cut()
    async with asyncio.timeout(5):
        with pytest.raises(TransportError):
            await anext(inbox)
        await link.wait_lost()
    with pytest.raises(TransportError):
        await link.send(RESULT)
    await link.aclose()
    await server.aclose()
    await relay.aclose()


async def test_a_send_that_was_cut_off_breaks_the_link(server: Stage, connect: Connect) -> None:
    (address,) = await server.start(["127.0.0.1:0"])
    server.expect(replace(LIMITS, hidden_size=65536))
    limits = replace(LIMITS, hidden_size=65536)
    link = await connect(address, limits)
    flooding = asyncio.create_task(_flood(link))
    await asyncio.wait({flooding}, timeout=0.5)
    flooding.cancel()
    await asyncio.wait({flooding})
    with pytest.raises(TransportError, match="cut off"):
        await link.send(RESULT)
    await link.aclose()


async def _flood(link: rpc.RpcLink) -> None:
    chunk = Chunk(seq=SequenceId(1), start=0, tokens=(TokenId(1),) * 16, blocks=(BlockId(0),))
    hidden = Activation(data=bytes(16 * 65536 * 4), dtype=DType.FLOAT32, shape=(16, 65536))
    frame = StepFrame(step=Step(id=StepId(1), epoch=Epoch(3), chunks=(chunk,)), hidden=hidden)
    while True:
        await link.send(frame)


async def test_closing_leaves_no_task_file_or_thread(tmp_path: Path, connect: Connect, cluster: Cluster) -> None:
    async def once(number: int) -> None:
        server = Stage(cluster)
        addresses = await server.start([f"unix:{tmp_path}/stage.sock", "127.0.0.1:0"])
        inbox = server.expect(replace(LIMITS, epoch=Epoch(number)))
        link = await connect(addresses[number % 2], replace(LIMITS, epoch=Epoch(number)))
        await link.send(replace(RESULT, epoch=Epoch(number)))
        await anext(inbox)
        if number % 3:
            await link.aclose()
            await server.aclose()
        else:
            await server.aclose()
            await link.aclose()

    def left() -> tuple[int, int, int]:
        return len(asyncio.all_tasks()), threading.active_count(), len(os.listdir("/proc/self/fd"))

    for number in range(1, 4):
        await once(number)
    before = left()
    for number in range(4, 24):
        await once(number)
    async with asyncio.timeout(5):  # gRPC's own threads close its sockets
        while any(now > then for now, then in zip(left(), before, strict=True)):
            await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=0.02)
    assert not os.listdir(tmp_path)


def test_the_library_without_a_stream_needs_no_grpc() -> None:
    program = "import sys, tllm.transport.wire, tllm.transport.local, tllm.transport.pipe; print('grpc' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert output.stdout.strip() == "False"


async def test_an_address_that_is_not_ours_cannot_be_listened_on(cluster: Cluster) -> None:
    with pytest.raises(TransportError, match=r"192\.0\.2\.1"):
        await Stage(cluster).start(["192.0.2.1:0"])
