"""The control stream between an agent and its head: greeting, order, loss, and what is left afterwards."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tllm.core.errors import FrameError, TransportError
from tllm.testing.identities import members
from tllm.transport import rpc
from tllm.transport import wire_pb2 as pb
from tllm.transport.channels import Caller, Liveness

DEADLINE_S = 10.0
NODE = "n-00000001"
ATTACH = pb.Attach(protocol=rpc.PROTOCOL, node_id=NODE, version="1", profile=pb.NodeProfile(name="desk"))
pytestmark = pytest.mark.timeout(30)


class Head:
    """Welcomes everybody of the right version, repeats what they say, and keeps how they left."""

    def __init__(self) -> None:
        self.peers: asyncio.Queue[rpc.ControlPeer] = asyncio.Queue()
        self.endings: asyncio.Queue[str] = asyncio.Queue()

    async def serve(self, peer: rpc.ControlPeer, attach: pb.Attach) -> None:
        if attach.version != "1":
            await peer.send(pb.HeadMessage(refused=pb.Refused(reason="the version is wrong")))
            return
        await peer.send(pb.HeadMessage(welcome=pb.Welcome(cluster=f"the cluster of {attach.profile.name}")))
        await self.peers.put(peer)
        try:
            async for message in peer:
                answer = pb.WorkerOrder(worker_id=message.worker.worker_id)
                await peer.send(pb.HeadMessage(worker=answer))
        except TransportError as error:
            await self.endings.put(f"{type(error).__name__}: {error}")
        else:
            await self.endings.put("left")


IDENTITIES: dict[str, rpc.Identity] = {}


@pytest.fixture(scope="module", autouse=True)
def identities(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("cluster")
    IDENTITIES.update({identity.name: identity for identity in members(directory, "head", NODE)})


@pytest.fixture
def head() -> Head:
    return Head()


@pytest.fixture
async def address(head: Head) -> AsyncIterator[str]:
    server = serving(head)
    (bound,) = await server.start(["127.0.0.1:0"])
    yield bound
    await server.aclose()


def event(name: str) -> pb.AgentMessage:
    return pb.AgentMessage(worker=pb.WorkerEvent(worker_id=name))


async def within(waiting: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(waiting, DEADLINE_S)


async def attach(address: str, message: pb.Attach = ATTACH) -> rpc.ControlStream:
    return await rpc.attach(address, message, identity=IDENTITIES[NODE], timeout_s=DEADLINE_S)


def raw_channel(address: str) -> grpc.aio.Channel:
    """For a member that says what it likes."""
    return Caller(identity=IDENTITIES[NODE], peer="head").channel(address, ())


def serving(head: Head) -> rpc.Server:
    return rpc.Server([rpc.ControlServer(head.serve)], identity=IDENTITIES["head"])


async def test_an_agent_is_welcomed_and_messages_pass_both_ways_in_order(head: Head, address: str) -> None:
    stream = await attach(address)
    assert stream.welcome.cluster == "the cluster of desk"
    names = [f"w{number}" for number in range(300)]
    received = []

    async def receive() -> None:
        async for message in stream:
            received.append(message.worker.worker_id)
            if len(received) == len(names):
                return

    receiving = asyncio.create_task(receive())
    for name in names:
        await stream.send(event(name))
    await within(receiving)
    assert received == names
    await stream.aclose()
    assert await within(head.endings.get()) == "left"


async def test_the_head_listens_on_a_unix_socket_and_on_tcp(head: Head, tmp_path: Path) -> None:
    server = serving(head)
    bound = await server.start([f"unix:{tmp_path}/control.sock", "127.0.0.1:0"])
    for one in bound:
        await (await attach(one)).aclose()
    await server.aclose()
    assert not os.listdir(tmp_path)


async def test_a_refusal_is_an_error_with_its_reason(address: str) -> None:
    with pytest.raises(TransportError, match="the version is wrong"):
        await attach(address, pb.Attach(node_id=NODE, version="2"))


async def test_no_head_is_an_error_after_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"within 0\.2 s"):
        await rpc.attach(f"unix:{tmp_path}/nobody.sock", ATTACH, identity=None, timeout_s=0.2)


async def test_an_agent_that_vanishes_is_an_error_at_the_head(head: Head, address: str) -> None:
    async with raw_channel(address) as channel:
        call: Any = channel.stream_stream("/tllm.Control/Attach")()
        await call.write(pb.AgentMessage(attach=ATTACH).SerializeToString())
        await within(call.read())
        call.cancel()
    assert (await within(head.endings.get())).startswith("TransportError")
    peer = await within(head.peers.get())
    with pytest.raises(TransportError):
        await peer.send(pb.HeadMessage(heartbeat=pb.Heartbeat()))


async def test_an_agent_that_only_stops_writing_is_an_error_at_the_head(head: Head, address: str) -> None:
    async with raw_channel(address) as channel:
        call: Any = channel.stream_stream("/tllm.Control/Attach")()
        await call.write(pb.AgentMessage(attach=ATTACH).SerializeToString())
        await call.done_writing()
        assert (await within(head.endings.get())).startswith("TransportError")


@pytest.mark.parametrize("message", [b"\xff\xff\xff", b""])
async def test_nonsense_ends_the_stream_on_both_sides(head: Head, address: str, message: bytes) -> None:
    async with raw_channel(address) as channel:
        call: Any = channel.stream_stream("/tllm.Control/Attach")()
        await call.write(pb.AgentMessage(attach=ATTACH).SerializeToString())
        await within(call.read())
        await call.write(message)
        assert (await within(head.endings.get())).startswith("FrameError")
        assert await within(call.code()) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("first", [b"\xff", b"", event("w1").SerializeToString()])
async def test_a_stranger_never_reaches_the_head(head: Head, address: str, first: bytes) -> None:
    async with raw_channel(address) as channel:
        call: Any = channel.stream_stream("/tllm.Control/Attach")()
        await call.write(first)
        assert await within(call.code()) is grpc.StatusCode.INVALID_ARGUMENT
    assert head.peers.empty()


async def test_a_message_above_a_megabyte_is_refused_and_the_stream_goes_on(head: Head, address: str) -> None:
    stream = await attach(address)
    with pytest.raises(FrameError):
        await stream.send(event("w" * (1 << 20)))
    await stream.send(event("w1"))
    assert (await within(anext(aiter(stream)))).worker.worker_id == "w1"
    await stream.aclose()


async def close_peer(head: Head, _server: rpc.Server) -> None:
    peer = await head.peers.get()
    await peer.send(pb.HeadMessage(shutdown=pb.Shutdown(reason="the head stopped")))
    await peer.aclose()


async def close_server(_head: Head, server: rpc.Server) -> None:
    await server.aclose()


@pytest.mark.parametrize("close", [close_peer, close_server])
async def test_a_head_that_closes_ends_the_agents_iteration_after_what_it_sent(
    head: Head, close: Callable[[Head, rpc.Server], Awaitable[None]]
) -> None:
    server = serving(head)
    (address,) = await server.start(["127.0.0.1:0"])
    stream = await attach(address)
    await within(close(head, server))

    async def read() -> list[pb.HeadMessage]:
        return [message async for message in stream]

    kinds = [message.WhichOneof("message") for message in await within(read())]
    assert kinds == (["shutdown"] if close is close_peer else [])
    with pytest.raises(TransportError):
        await stream.send(event("w1"))
    await stream.aclose()
    await server.aclose()


async def test_a_send_that_is_cancelled_leaves_the_stream_usable(head: Head, address: str) -> None:
    stream = await attach(address)
    sending = asyncio.create_task(stream.send(event("w1")))
    await asyncio.wait({sending}, timeout=0)
    sending.cancel()
    await stream.send(event("w2"))
    names = []
    async for message in stream:
        names.append(message.worker.worker_id)
        if names[-1] == "w2":
            break
    await stream.aclose()
    assert await within(head.endings.get()) == "left"


async def test_a_head_that_falls_silent_is_noticed(head: Head) -> None:
    """Its process stands still (as with SIGSTOP): the socket is open and nothing comes."""
    silent = await asyncio.start_server(_swallow, "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    with pytest.raises(TransportError):
        await rpc.attach(
            address,
            ATTACH,
            identity=IDENTITIES[NODE],
            timeout_s=1.0,
            liveness=Liveness(ping_interval_s=0.2, ping_timeout_s=0.2),
        )
    silent.close()


async def _swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        pass
    writer.close()


async def test_closing_leaves_no_task_or_file(head: Head, tmp_path: Path) -> None:
    async def once(number: int) -> None:
        server = serving(head)
        addresses = await server.start([f"unix:{tmp_path}/control.sock", "127.0.0.1:0"])
        stream = await attach(addresses[number % 2])
        await stream.send(event("w1"))
        closing = [stream.aclose, server.aclose]
        for close in closing if number % 3 else closing[::-1]:
            await within(close())

    def num_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    for number in range(3):
        await once(number)
    tasks, files = len(asyncio.all_tasks()), num_files()
    for number in range(20):
        await once(number)
    async with asyncio.timeout(5):  # sockets are closed by gRPC's own threads
        while num_files() > files:
            await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=0.02)
    assert len(asyncio.all_tasks()) == tasks
