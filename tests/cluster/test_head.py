"""The head with nodes that answer, or do not: what it waits for, and how soon it ends."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tllm.cluster import placement
from tllm.cluster.events import HeadEvent, NodeJoined, Planned, Serving
from tllm.cluster.head import Head
from tllm.cluster.local import local_heads
from tllm.cluster.machine import machine_id
from tllm.cluster.shards import ShardStore
from tllm.core.config import Deadlines, ServeConfig
from tllm.core.errors import PlanError, RequestError, TransportError, UnavailableError
from tllm.core.types import HEAD
from tllm.planner.plan import Plan
from tllm.transport import rpc, wire
from tllm.transport import wire_pb2 as pb

DEADLINE_S = 8.0
GB = 10**9
SPEED = pb.Speed(rows=[1, 64], layer_s=[0.001, 0.002], head_s=[0.001, 0.002], step_s=0.0001)
pytestmark = pytest.mark.timeout(60)


class FakeNode:
    """An agent and its workers in one: it says that shards are loaded, joins pipelines and computes nothing.

    `silent` names the orders that it does not answer: measure, load, start. `cannot_start` is what becomes of a start
    where another node follows.
    """

    def __init__(
        self,
        node_id: str,
        directory: Path,
        address: str,
        *,
        silent: str = "",
        machine: str | None = None,
        cannot_start: pb.Failed | None = None,
    ) -> None:
        self.id = node_id
        self._machine = machine or machine_id()
        self.silent = silent
        self._cannot_start = cannot_start
        self.orders: list[str] = []
        self._directory = directory
        self._address = address
        self._numbers = itertools.count()
        self._stages: dict[str, rpc.StageServer] = {}
        self._addresses: dict[str, str] = {}
        self._open = AsyncExitStack()

    async def __aenter__(self) -> FakeNode:
        attach = pb.Attach(
            protocol=rpc.PROTOCOL,
            node_id=self.id,
            instance=self.id,
            profile=pb.NodeProfile(
                name=self.id, machine=self._machine, memory_bytes=8 * GB, num_threads=1, num_workers=1, device="cpu"
            ),
        )
        self.stream = await rpc.attach(self._address, attach, identity=None, timeout_s=DEADLINE_S)
        self._serving = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._serving.cancel()
        await asyncio.wait({self._serving})
        await self.stream.aclose()
        await self._open.aclose()

    def vanish(self) -> None:
        self.stream._call.cancel()

    async def crash_workers(self) -> None:
        for worker_id in list(self._stages):
            del self._stages[worker_id]
            await self._say(worker_id, exited=pb.Exited(code=-9))

    async def _serve(self) -> None:
        try:
            async for message in self.stream:
                kind = message.WhichOneof("message")
                if kind == "heartbeat":
                    await self.stream.send(pb.AgentMessage(heartbeat=pb.Heartbeat(id=message.heartbeat.id)))
                elif kind == "measure" and self._heard("measure"):
                    measured = pb.Measured(key=message.measure.key, speed=SPEED)
                    await self.stream.send(pb.AgentMessage(measured=measured))
                elif kind == "worker" and self._heard(message.worker.WhichOneof("order") or ""):
                    await self._carry_out(message.worker)
        except TransportError:
            pass

    def _heard(self, order: str) -> bool:
        self.orders.append(order)
        return order != self.silent

    async def _carry_out(self, order: pb.WorkerOrder) -> None:
        worker_id = order.worker_id
        match order.WhichOneof("order"):
            case "load":
                if worker_id not in self._stages:
                    self._stages[worker_id] = rpc.StageServer()
                    server = rpc.Server([self._stages[worker_id]], identity=None)
                    address = f"unix:{self._directory}/{self.id}-{next(self._numbers)}.sock"
                    (self._addresses[worker_id],) = await server.start([address])
                    self._open.push_async_callback(server.aclose)
                loaded = pb.Loaded(number=order.load.number, free_bytes=GB, addresses=[self._addresses[worker_id]])
                await self._say(worker_id, loaded=loaded)
            case "start":
                limits = wire.unpack_limits(order.start.limits)
                if self._cannot_start is not None and order.start.next_name != HEAD:
                    self._cannot_start.epoch = limits.epoch
                    await self._say(worker_id, failed=self._cannot_start)
                    return
                self._stages[worker_id].expect(limits)
                addresses = list(order.start.next) or [self._address]
                link = await rpc.connect(addresses, limits, identity=None, timeout_s=DEADLINE_S, close_timeout_s=0.1)
                self._open.push_async_callback(link.aclose)
                await self._say(worker_id, ready=pb.Ready(epoch=limits.epoch))
            case "stop":
                self._stages.pop(worker_id, None)
                await self._say(worker_id, exited=pb.Exited())

    async def _say(self, worker_id: str, **event: Any) -> None:
        await self.stream.send(pb.AgentMessage(worker=pb.WorkerEvent(worker_id=worker_id, **event)))


class Running:
    """A head, what it told, and nodes for it."""

    def __init__(self, head: Head, events: list[HeadEvent], task: asyncio.Task[None], directory: Path) -> None:
        self.head = head
        self.events = events
        self.task = task
        self._directory = directory
        self._nodes: list[FakeNode] = []

    def node(self, node_id: str, **options: Any) -> FakeNode:
        (local,) = local_heads()
        self._nodes.append(FakeNode(node_id, self._directory, local.control, **options))
        return self._nodes[-1]

    @property
    def orders(self) -> list[str]:
        """That nodes were given."""
        return [order for node in self._nodes for order in node.orders]

    def told(self, kind: type[HeadEvent]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def plans(self) -> list[Plan]:
        """In the order in which they were tried."""
        return [event.plan for event in self.events if isinstance(event, Planned)]

    def serving_on(self) -> list[str]:
        """The nodes of the plan in force; none while there is none."""
        return [node.id for node in self.head.status().nodes if node.stages]

    async def until(self, condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        async with asyncio.timeout(deadline_s):
            while not condition():
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(directory: Path, **config: Any) -> AsyncIterator[Running]:
    events: list[HeadEvent] = []
    head = Head(ServeConfig(local_node=None, grpc_port=0, **config), events.append)
    async with head.running() as task:
        yield Running(head, events, task, directory)


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.parametrize("silent", ["measure", "load", "start"])
async def test_a_head_that_waits_for_an_answer_ends_at_once(tmp_path: Path, silent: str):
    async with AsyncExitStack() as nodes, AsyncExitStack() as head:
        run = await head.enter_async_context(running(tmp_path, num_nodes=2))
        for number in range(2):
            await nodes.enter_async_context(run.node(f"n-{number}", silent=silent))
        await run.until(lambda: silent in run.orders)
        began_s = time.monotonic()
        await head.aclose()  # and the nodes are still there
        assert time.monotonic() - began_s < 2.0
        assert run.task.cancelled()


async def test_what_is_built_again_does_not_wait_for_a_newcomer_to_be_measured(tmp_path: Path):
    async with running(tmp_path) as run, run.node("n-old") as old:
        await run.until(lambda: run.told(Serving) == 1)
        async with run.node("n-new", silent="measure"):
            await run.until(lambda: run.told(NodeJoined) == 2)
            await old.crash_workers()
            await run.until(lambda: run.told(Serving) == 2, deadline_s=4.0)
            assert run.serving_on() == ["n-old"]


async def test_a_node_that_is_lost_while_it_loads_is_not_waited_for(tmp_path: Path):
    async with running(tmp_path) as run, run.node("n-old") as old:
        await run.until(lambda: run.told(Serving) == 1)
        async with run.node("n-new"):
            await run.until(lambda: run.told(NodeJoined) == 2)
            old.silent = "load"
            await old.crash_workers()
            await run.until(lambda: old.orders.count("load") == 2)
            old.vanish()
            await run.until(lambda: run.serving_on() == ["n-new"], deadline_s=4.0)


async def test_a_drain_that_is_undone_ends(tmp_path: Path):
    async with running(tmp_path) as run, run.node("n-old"):
        await run.until(lambda: run.told(Serving) == 1)
        async with run.node("n-new", silent="load") as new:
            await run.until(lambda: run.told(NodeJoined) == 2)
            draining = asyncio.create_task(run.head.drain("n-old"))
            await run.until(lambda: "load" in new.orders)
            await run.head.undrain("n-old")
            with pytest.raises(UnavailableError, match="n-old is to stay"):
                await asyncio.wait_for(draining, DEADLINE_S)
            assert run.serving_on() == ["n-old"]


async def test_a_drain_moves_the_model_and_the_node_holds_nothing_then(tmp_path: Path):
    async with running(tmp_path) as run, run.node("n-old") as old:
        await run.until(lambda: run.told(Serving) == 1)
        async with run.node("n-new"):
            await run.until(lambda: run.told(NodeJoined) == 2)
            await asyncio.wait_for(run.head.drain("n-old"), DEADLINE_S)
            assert run.serving_on() == ["n-new"]
            assert old._stages == {}


async def test_the_last_node_cannot_be_drained(tmp_path: Path):
    async with running(tmp_path) as run, run.node("n-only"):
        await run.until(lambda: run.told(Serving) == 1)
        with pytest.raises(PlanError, match="only node"):
            await run.head.drain("n-only")
        with pytest.raises(RequestError, match=r"There is no node 'n-other'; there is: n-only"):
            await run.head.drain("n-other")
        assert [node.state for node in run.head.status().nodes] == ["ready"]


async def test_the_first_plan_does_not_wait_for_the_speed_of_a_node_that_is_lost(tmp_path: Path):
    deadlines = Deadlines(measure_s=600.0)
    async with (
        running(tmp_path, num_nodes=2, deadlines=deadlines) as run,
        run.node("n-1"),
        run.node("n-2", silent="measure") as silent,
    ):
        await run.until(lambda: "measure" in silent.orders)
        silent.vanish()
        await run.until(lambda: run.serving_on() == ["n-1"])


async def test_a_node_whose_worker_nobody_can_reach_is_an_error_with_its_name(tmp_path: Path):
    async with running(tmp_path) as run, run.node("n-far", machine="another"):
        await asyncio.wait({run.task}, timeout=DEADLINE_S)
        with pytest.raises(UnavailableError, match="n-far told no address at which the head could reach its worker"):
            run.task.result()


async def test_nodes_that_are_lost_before_the_first_plan_are_waited_for_again(tmp_path: Path):
    async with running(tmp_path, num_nodes=2) as run:
        async with run.node("n-1", silent="measure") as one, run.node("n-2", silent="measure") as two:
            await run.until(lambda: "measure" in run.orders)
            one.vanish()
            two.vanish()
            await run.until(lambda: not any(node.state == "ready" for node in run.head.status().nodes))
        async with run.node("n-3"):
            await run.until(lambda: run.serving_on() == ["n-3"])


@pytest.mark.parametrize("next_unreachable", [False, True])
async def test_who_rests_after_a_start_that_failed_is_who_is_to_blame(tmp_path: Path, next_unreachable: bool):
    failed = pb.Failed(reason="why", next_unreachable=next_unreachable)
    async with (
        running(tmp_path, num_nodes=2, use_all=True) as run,
        run.node("n-1", cannot_start=failed),
        run.node("n-2", cannot_start=failed),
    ):
        await run.until(lambda: run.told(Serving) == 1)
        first, second = (stage.node.id for stage in run.plans()[0].stages)
        assert [stage.node.id for stage in run.plans()[1].stages] == [first if next_unreachable else second]


async def test_why_a_node_has_no_part_is_what_the_plan_in_force_says(tmp_path: Path):
    async with running(tmp_path) as run, run.node("n-1") as one:
        await run.until(lambda: run.told(Serving) == 1)
        async with run.node("n-2", silent="measure"):
            await run.until(lambda: run.told(NodeJoined) == 2)
            run.head._placement._considered = Plan(stages=run.plans()[0].stages, dropped=("n-2: of long ago",))
            await one.crash_workers()
            await run.until(lambda: run.told(Serving) == 2)
            assert [node.reason for node in run.head.status().nodes] == ["", ""]


async def test_a_node_that_leaves_while_the_plan_is_made_is_planned_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planning, gone = threading.Event(), threading.Event()
    place = placement.place

    def slow_place(*arguments: Any, **options: Any) -> Plan:
        found = place(*arguments, **options)
        if not planning.is_set():
            planning.set()
            gone.wait(DEADLINE_S)
        return found

    monkeypatch.setattr(placement, "place", slow_place)
    async with running(tmp_path) as run:
        async with run.node("n-1"):
            await run.until(planning.is_set)
        await run.until(lambda: not run.head.status().nodes)
        async with run.node("n-2"):
            gone.set()
            await run.until(lambda: run.serving_on() == ["n-2"])


async def test_a_head_that_ends_hashes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    closed = []
    monkeypatch.setattr(ShardStore, "close", lambda store: closed.append(store))
    async with running(tmp_path):
        assert not closed
    assert len(closed) == 1
