"""The agent between a head that is played here and workers that are real processes, when things go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tllm.cluster.agent import Agent, own_identity
from tllm.cluster.enrolled import Place
from tllm.cluster.process import WorkerProcess
from tllm.cluster.shards import ShardStore
from tllm.core.config import Deadlines, NodeConfig
from tllm.core.errors import TransportError
from tllm.testing.identities import members
from tllm.transport import rpc
from tllm.transport import wire_pb2 as pb

DEADLINE_S = 10.0
NODE = "n-00000001"
pytestmark = pytest.mark.timeout(60)


class PlayedHead:
    """Welcomes the agent, says what it is told to say, and keeps what it hears."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.attached: list[pb.Attach] = []
        self.events: list[pb.WorkerEvent] = []
        self.peer: rpc.ControlPeer | None = None
        self._server = rpc.Server([rpc.ControlServer(self._serve)], identity=None)

    async def __aenter__(self) -> PlayedHead:
        await self._server.start([self.address])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.aclose()

    async def order(self, worker_id: str, **order: Any) -> None:
        assert self.peer is not None
        await self.peer.send(pb.HeadMessage(worker=pb.WorkerOrder(worker_id=worker_id, **order)))

    async def event(self, kind: str) -> Any:
        """The first of its kind, once it is heard."""
        await until(lambda: any(event.WhichOneof("event") == kind for event in self.events))
        return next(getattr(event, kind) for event in self.events if event.WhichOneof("event") == kind)

    async def _serve(self, peer: rpc.ControlPeer, attach: pb.Attach) -> None:
        await peer.send(pb.HeadMessage(welcome=pb.Welcome(cluster="test")))
        self.attached.append(attach)
        self.peer = peer
        try:
            async for message in peer:
                if message.WhichOneof("message") == "worker":
                    self.events.append(message.worker)
        except TransportError:
            pass


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "tllm.cluster.worker" in " ".join(child.cmdline())]


@pytest.fixture
def identity(tmp_path: Path) -> rpc.Identity:
    (identity,) = members(tmp_path / "cluster", NODE)
    return identity


@asynccontextmanager
async def played(
    directory: Path, identity: rpc.Identity, deadlines: Deadlines | None = None
) -> AsyncIterator[tuple[PlayedHead, asyncio.Task[str]]]:
    address = f"unix:{directory}/head.sock"
    agent = Agent(NodeConfig(), address=address, identity=identity, deadlines=deadlines or Deadlines())
    async with PlayedHead(address) as head, agent.attached() as serving:
        await until(lambda: bool(head.attached))
        yield head, serving


LOAD = pb.Load(model="embedded", engine="torch", device="cpu", dtype="float32", num_threads=1, last_layer=1, number=1)


async def test_a_bug_while_weights_are_fetched_ends_the_worker_with_a_reason(
    tmp_path: Path, identity: rpc.Identity, monkeypatch: pytest.MonkeyPatch
):
    async def provide(*_: object) -> tuple[str, int]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(ShardStore, "provide", provide)
    async with played(tmp_path, identity) as (head, _):
        await head.order("w-1", load=LOAD)
        exited = await head.event("exited")
        assert "Its orders cannot be carried out: ZeroDivisionError: a bug" in exited.reason


async def test_a_worker_that_is_stopped_while_its_weights_are_fetched_ends_at_once(
    tmp_path: Path, identity: rpc.Identity, monkeypatch: pytest.MonkeyPatch
):
    fetching, ended = asyncio.Event(), asyncio.Event()

    async def provide(*_: object) -> tuple[str, int]:
        fetching.set()
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    monkeypatch.setattr(ShardStore, "provide", provide)
    async with played(tmp_path, identity) as (head, _):
        await head.order("w-1", load=LOAD)
        await asyncio.wait_for(fetching.wait(), DEADLINE_S)
        await head.order("w-1", stop=pb.Stop())
        assert (await head.event("exited")).code == 0
        await asyncio.wait_for(ended.wait(), DEADLINE_S)
        assert workers() == []


async def test_an_agent_that_ends_while_weights_are_fetched_leaves_no_process(
    tmp_path: Path, identity: rpc.Identity, monkeypatch: pytest.MonkeyPatch
):
    fetching = asyncio.Event()

    async def provide(*_: object) -> tuple[str, int]:
        fetching.set()
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(ShardStore, "provide", provide)
    async with played(tmp_path, identity) as (head, _):
        await head.order("w-1", load=LOAD)
        await asyncio.wait_for(fetching.wait(), DEADLINE_S)
        await until(lambda: len(workers()) == 1)
    await until(lambda: workers() == [])


async def test_an_agent_that_ends_hashes_nothing_more(
    tmp_path: Path, identity: rpc.Identity, monkeypatch: pytest.MonkeyPatch
):
    closed = []
    monkeypatch.setattr(ShardStore, "close", lambda store: closed.append(store))
    async with played(tmp_path, identity):
        assert not closed
    assert len(closed) == 1


async def test_the_head_is_told_of_a_worker_that_ended_while_it_was_not_there(
    tmp_path: Path, identity: rpc.Identity, monkeypatch: pytest.MonkeyPatch
):
    async def provide(*_: object) -> tuple[str, int]:
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(ShardStore, "provide", provide)
    async with played(tmp_path, identity) as (head, _):
        await head.order("w-1", load=LOAD)
        await until(lambda: len(workers()) == 1)
        assert head.peer is not None
        await head.peer.aclose()
        await until(lambda: len(head.attached) == 2)
        assert [state.worker_id for state in head.attached[1].workers] == ["w-1"]
        assert head.attached[0].instance == head.attached[1].instance
        workers()[0].kill()
        assert (await head.event("exited")).code == -9


async def test_the_head_is_told_of_a_worker_that_ended_while_its_agent_came_back(
    tmp_path: Path, identity: rpc.Identity, monkeypatch: pytest.MonkeyPatch
):
    async def provide(*_: object) -> tuple[str, int]:
        return await asyncio.get_running_loop().create_future()

    attach = Agent._attach

    async def slow_attach(agent: Agent) -> rpc.ControlStream:
        stream = await attach(agent)
        for worker in workers():
            worker.kill()
            await until(lambda: not agent._workers)
        return stream

    monkeypatch.setattr(ShardStore, "provide", provide)
    monkeypatch.setattr(Agent, "_attach", slow_attach)
    async with played(tmp_path, identity) as (head, _):
        await head.order("w-1", load=LOAD)
        await until(lambda: len(workers()) == 1)
        assert head.peer is not None
        await head.peer.aclose()
        assert (await head.event("exited")).code == -9
        assert [state.worker_id for state in head.attached[1].workers] == ["w-1"]


def test_a_port_belongs_to_one_worker_for_as_long_as_it_lives(tmp_path: Path, identity: rpc.Identity):
    agent = Agent(
        NodeConfig(ports=range(7000, 7003)), address="unix:/head.sock", identity=identity, deadlines=Deadlines()
    )

    def spawned(worker_id: str) -> WorkerProcess:
        worker = WorkerProcess(worker_id, None, Deadlines())  # type: ignore[arg-type]
        agent._workers[worker_id] = worker
        return worker

    one, two = spawned("w-1"), spawned("w-2")
    assert [agent._port_number(worker) for worker in (one, two)] == [1, 2]
    del agent._workers["w-1"]
    three, four = spawned("w-3"), spawned("w-4")
    assert [agent._port_number(worker) for worker in (two, three, four)] == [2, 1, 3]
    assert [agent._port(number) for number in (0, 1, 2, 3)] == [7000, 7001, 7002, 0]


async def test_an_identity_that_is_damaged_is_as_good_as_none(tmp_path: Path, identity: rpc.Identity):
    place = Place(tmp_path)
    place.keep("pin", identity)
    assert place.find("pin") == identity
    whole = (tmp_path / "pin").read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole.replace(b"n-00000001", b"n-00000009")):
        (tmp_path / "pin").write_bytes(damaged)
        assert place.find("pin") is None, damaged


async def test_another_token_than_the_one_it_came_by_enrols_a_node_anew(tmp_path: Path):
    authority = rpc.Authority.open(tmp_path / "head")
    tokens = rpc.TokenStore(authority)
    server = rpc.Server([rpc.Enrolment(authority, tokens)], identity=authority.identity("head"), enrols=True)
    (address,) = await server.start(["127.0.0.1:0"])
    place, pin = Place(tmp_path), authority.pin.hex()
    first, second = tokens.new(), tokens.new()
    try:
        one, same, other = [
            await own_identity(address, token=token, pin=pin, place=place, deadlines=Deadlines())
            for token in (first, first, second)
        ]
    finally:
        await server.aclose()
    assert one == same
    assert other.name != one.name
