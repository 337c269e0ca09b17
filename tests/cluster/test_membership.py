"""Who is attached, and what becomes of orders and questions when a control stream is lost and comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tllm.cluster.measurements import Measurements
from tllm.cluster.membership import Member, Membership, WorkerHandle, WorkerLostError
from tllm.cluster.status import NodeState
from tllm.core.config import Deadlines
from tllm.core.errors import RefusedError, TransportError
from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.models.repository import resolve_model
from tllm.planner.profile import NodeProfile
from tllm.transport import rpc
from tllm.transport import wire_pb2 as pb

DEADLINE_S = 5.0
NODE, OTHER = "n-00000001", "n-00000002"
pytestmark = pytest.mark.timeout(30)


class Cluster:
    """A membership behind a real server, and what it told."""

    def __init__(self, directory: Path, deadlines: Deadlines) -> None:
        self.left: list[tuple[str, str, float]] = []
        self.membership = Membership(
            cluster="test",
            deadlines=deadlines,
            on_joined=lambda node: None,
            on_left=lambda node, reason: self.left.append((node.id, reason, time.monotonic())),
            is_revoked=lambda token_id: False,
        )
        self.address = f"unix:{directory}/head.sock"
        self.server = rpc.Server([rpc.ControlServer(self.membership.serve)], identity=None)

    async def attach(self, node_id: str = NODE, *, instance: str = "a", **fields: Any) -> rpc.ControlStream:
        attach = pb.Attach(
            protocol=rpc.PROTOCOL,
            node_id=node_id,
            instance=instance,
            profile=pb.NodeProfile(name=node_id, num_workers=1, num_threads=1),
        )
        attach.MergeFrom(pb.Attach(**fields))
        before = self.membership.find(node_id)
        num_streams = before.num_streams if before is not None else 0
        stream = await rpc.attach(self.address, attach, identity=None, timeout_s=DEADLINE_S)
        await until(
            lambda: (
                (m := self.membership.find(node_id)) is not None and (m is not before or m.num_streams > num_streams)
            )
        )
        return stream

    def member(self, node_id: str = NODE) -> Member:
        member = self.membership.find(node_id)
        assert member is not None
        return member

    async def lose(self, stream: rpc.ControlStream, node_id: str = NODE) -> None:
        """Its machine is gone without a word."""
        stream._call.cancel()
        await until(lambda: not self.member(node_id).attached)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def within(waiting: Awaitable[Any], deadline_s: float = DEADLINE_S) -> Any:
    return await asyncio.wait_for(waiting, deadline_s)


async def rest_of(stream: rpc.ControlStream) -> list[pb.HeadMessage]:
    """Until it ends, in order."""
    return [message async for message in stream]


@pytest.fixture
def deadlines() -> Deadlines:
    return Deadlines(rejoin_s=20.0)


@pytest.fixture
async def cluster(tmp_path: Path, deadlines: Deadlines) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path, deadlines)
    await cluster.server.start([cluster.address])
    yield cluster
    await cluster.membership.aclose("the test is over")
    await cluster.server.aclose()


def known_as(worker: WorkerHandle, load: pb.Load, **fields: Any) -> pb.WorkerState:
    """What its agent says of a worker that has loaded that."""
    loaded = pb.Loaded(number=load.number, free_bytes=7)
    return pb.WorkerState(worker_id=worker.id, load=load, loaded=loaded, **fields)


async def loaded_worker(member: Member) -> tuple[WorkerHandle, pb.Load]:
    worker = member.new_worker()
    worker.engage(lambda loading: None)
    load = pb.Load(first_layer=0, last_layer=4)
    await worker.load(load)
    worker.take(pb.WorkerEvent(loaded=pb.Loaded(number=load.number)))
    assert worker.loaded.done()
    return worker, load


# ------------------------------------------------------------------------------------------------- orders


async def test_what_a_worker_loaded_before_does_not_answer_a_load_order_that_was_lost(cluster: Cluster):
    stream = await cluster.attach()
    worker, old = await loaded_worker(cluster.member())
    worker.engage(lambda loading: None)
    await worker.load(pb.Load(first_layer=4, last_layer=8))  # the agent never hears of it
    await cluster.lose(stream)
    again = await cluster.attach(workers=[known_as(worker, old)])
    with pytest.raises(WorkerLostError, match="while it was given orders"):
        await within(worker.loaded)
    assert worker.holds is not None
    assert worker.holds.last_layer == 4  # it can be used for what it has
    await again.aclose()


async def test_what_a_worker_loaded_before_does_not_answer_a_task_that_has_ordered_nothing_yet(cluster: Cluster):
    stream = await cluster.attach()
    worker, old = await loaded_worker(cluster.member())
    worker.engage(lambda loading: None)
    await cluster.lose(stream)
    again = await cluster.attach(workers=[known_as(worker, old)])
    assert not worker.loaded.done()
    assert not worker.lost.done()
    await again.aclose()


async def test_a_load_goes_on_while_the_head_is_not_heard(cluster: Cluster):
    stream = await cluster.attach()
    worker = cluster.member().new_worker()
    worker.engage(lambda loading: None)
    load = pb.Load(last_layer=4)
    await worker.load(load)
    await cluster.lose(stream)
    again = await cluster.attach(workers=[known_as(worker, load)])
    assert (await within(worker.loaded)).free_bytes == 7
    await again.aclose()


@pytest.mark.parametrize("ready_epoch", [0, 3])
async def test_a_start_order_that_was_not_answered_in_time_for_a_lost_stream_is_not_waited_for(
    cluster: Cluster, ready_epoch: int
):
    stream = await cluster.attach()
    worker, load = await loaded_worker(cluster.member())
    await worker.start(pb.Start(limits=pb.Limits(epoch=3)))
    await cluster.lose(stream)
    again = await cluster.attach(workers=[known_as(worker, load, epoch=ready_epoch)])
    if ready_epoch == 3:
        assert (await within(worker.ready)).epoch == 3
        assert not worker.lost.done()
    else:
        with pytest.raises(WorkerLostError):
            await within(worker.ready)
    await again.aclose()


async def test_stopping_a_worker_of_a_node_that_is_lost_meanwhile_does_not_take_its_deadline(cluster: Cluster):
    stream = await cluster.attach()
    member = cluster.member()
    worker, _ = await loaded_worker(member)
    stopping = asyncio.create_task(member.stop_worker(worker, deadline_s=600.0))
    await until(lambda: worker.stopping)
    await cluster.lose(stream)
    await within(stopping)
    assert worker.id not in member.workers


# ---------------------------------------------------------------------------------------------- questions


async def test_a_question_ends_when_the_node_is_lost_and_not_at_its_deadline(cluster: Cluster):
    stream = await cluster.attach()
    asking = asyncio.create_task(cluster.member().ask(pb.HeadMessage(measure=pb.Measure(key="k")), "k", 600.0))
    await asyncio.sleep(0)
    await cluster.lose(stream)
    with pytest.raises(TransportError, match="cannot be reached"):
        await within(asking)


async def test_a_question_about_a_node_that_is_lost_ends_at_once(cluster: Cluster):
    stream, other = await cluster.attach(), await cluster.attach(OTHER)
    message = pb.HeadMessage(measure_link=pb.MeasureLink(node_id=OTHER))
    asking = asyncio.create_task(cluster.member().ask(message, OTHER, 600.0, about=cluster.member(OTHER)))
    await asyncio.sleep(0)
    await cluster.lose(other, OTHER)
    with pytest.raises(TransportError, match=OTHER):
        await within(asking)
    await stream.aclose()


async def test_a_question_that_is_not_answered_ends_at_its_deadline(cluster: Cluster):
    stream = await cluster.attach()
    with pytest.raises(TimeoutError, match=r"did not measure within 0.05 s"):
        await within(cluster.member().ask(pb.HeadMessage(measure=pb.Measure(key="k")), "k", 0.05))
    await stream.aclose()


# ------------------------------------------------------------------------------------------- coming, going


@pytest.mark.parametrize("deadlines", [Deadlines(rejoin_s=0.3)])
async def test_the_time_to_come_back_begins_anew_with_every_loss(cluster: Cluster):
    await cluster.lose(await cluster.attach())
    stream = await cluster.attach()
    lost_s = time.monotonic()
    await cluster.lose(stream)
    await until(lambda: bool(cluster.left))
    assert cluster.left[0][2] - lost_s >= 0.3


@pytest.mark.parametrize("deadlines", [Deadlines(rejoin_s=0.05)])
async def test_a_drained_node_that_was_lost_for_good_is_drained_when_it_is_back(cluster: Cluster):
    stream = await cluster.attach()
    cluster.member().draining = True
    await cluster.lose(stream)
    await until(lambda: cluster.membership.find(NODE) is None)
    stream = await cluster.attach(instance="b")
    assert cluster.member().state is NodeState.DRAINING
    cluster.member().draining = False
    await stream.aclose()
    await until(lambda: cluster.membership.find(NODE) is None)
    stream = await cluster.attach(instance="c")
    assert cluster.member().state is NodeState.READY
    await stream.aclose()


async def test_another_agent_of_the_same_node_takes_the_place_of_the_first_which_lets_go(cluster: Cluster):
    first = await cluster.attach(instance="a")
    before = cluster.member()
    worker, _ = await loaded_worker(before)
    second = await cluster.attach(instance="b")
    assert cluster.member() is not before
    heard = await within(rest_of(first))
    assert heard[-1].WhichOneof("message") == "shutdown"
    assert not heard[-1].shutdown.again
    assert worker.lost.done()
    await first.aclose()
    question = asyncio.create_task(cluster.member().ask(pb.HeadMessage(measure=pb.Measure(key="k")), "k", DEADLINE_S))
    await second.send(pb.AgentMessage(measured=pb.Measured(key="k")))
    await within(question)
    assert [member.attached for member in cluster.membership.members] == [True]
    await second.aclose()


async def test_a_node_with_more_workers_than_anybody_can_plan_for_is_refused(cluster: Cluster):
    with pytest.raises(RefusedError, match="at most 256"):
        await cluster.attach(profile=pb.NodeProfile(num_workers=10**9))
    assert cluster.membership.members == ()


# ------------------------------------------------------------------------------------------- measurements


class Asked(Member):
    """A node that answers as it is told to: a message, or an error to raise."""

    def __init__(self, number: int) -> None:
        name = f"n-{number}"
        profile = NodeProfile(id=name, name=name, machine=name, host="h", memory_bytes=1, num_threads=1)
        super().__init__(profile, f"instance {number}")
        self.num_asked = 0
        self.link: pb.MeasuredLink | Exception = pb.MeasuredLink(rtt_s=0.001, bytes_per_s=1e8)
        self.speed: pb.Measured | Exception = pb.Measured(
            speed=pb.Speed(rows=[1], layer_s=[0.1], head_s=[0.1], step_s=0.1)
        )
        self.num_streams = 1

    @property
    def attached(self) -> bool:
        return True

    async def ask(
        self, message: pb.HeadMessage, key: str, timeout_s: float, *, about: Member | None = None
    ) -> pb.AgentMessage:
        self.num_asked += 1
        answer = self.speed if message.HasField("measure") else self.link
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, pb.Measured):
            return pb.AgentMessage(measured=answer)
        return pb.AgentMessage(measured_link=answer)


def measurements() -> Measurements:
    return Measurements(Checkpoint.open(resolve_model("embedded")), DType.FLOAT32, None, Deadlines())


async def test_a_node_that_was_lost_while_it_was_measured_is_asked_again_and_one_that_is_silent_is_not():
    lost, silent, known = Asked(1), Asked(2), measurements()
    lost.speed, silent.speed = TransportError("gone"), TimeoutError("silent")
    await known.take([lost, silent])
    assert known.missing([lost])
    assert not known.missing([silent])
    assert known.profile(silent).speed is None


@pytest.mark.parametrize(
    "answer", [pb.MeasuredLink(failed="refused"), pb.MeasuredLink(rtt_s=0.001, bytes_per_s=0), TimeoutError("silent")]
)
async def test_a_link_that_was_asked_for_in_vain_is_avoided_until_one_of_the_two_is_back(
    answer: pb.MeasuredLink | Exception,
):
    one, other, known = Asked(1), Asked(2), measurements()
    one.link = answer
    await known.take([one, other])
    assert not known.missing([one, other])
    assert all(link.bytes_per_s < 1e6 for link in known.links([one, other]) if "n-1" in (link.source, link.target))
    one.link = other.link
    other.num_streams += 1
    assert known.missing([one, other])
    await known.take([one, other])
    assert [link.bytes_per_s for link in known.links([one, other]) if {link.source, link.target} == {"n-1", "n-2"}] == [
        1e8,
        1e8,
    ]


async def test_what_a_link_looks_like_once_does_not_count_also_where_one_node_is_first_and_last():
    one, known = Asked(1), measurements()
    await known.take([one])
    one.link = pb.MeasuredLink(rtt_s=1.0, bytes_per_s=1e8)
    await known.look_again([one])
    assert not known.missing([one])
    await known.look_again([one])
    assert known.missing([one])


async def test_nothing_is_remembered_of_agents_that_are_gone():
    one, other, known = Asked(1), Asked(2), measurements()
    await known.take([one, other])
    known.keep([one])
    assert not known.missing([one])
    assert known.missing([other])
    assert {link.source for link in known.links([one, other])} == {"n-1", "head"}
