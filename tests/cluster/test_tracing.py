"""Where time went: delays that are put into a pipeline are found where they were put, and parts add up."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.cluster.chrome_trace import chrome_trace, cut_into_lanes
from tllm.cluster.clocks import SAME_CLOCK, ClockOffset
from tllm.cluster.collecting import collect
from tllm.cluster.driver import Driver, Generation
from tllm.cluster.history import StageHistory
from tllm.cluster.membership import WorkerHandle, WorkerLostError
from tllm.cluster.stage import run_stage
from tllm.cluster.tracing import (
    Kind,
    Part,
    Place,
    SequenceRecord,
    StageRecord,
    StepRecord,
    Summary,
    Timeline,
    Trace,
    summarize,
)
from tllm.core.errors import TransportError
from tllm.core.types import DType, Epoch, SamplingParams, SequenceId, Step, StepId, StepResult, TokenId
from tllm.engines.base import EngineConfig
from tllm.models.spec import Shard
from tllm.scheduler.scheduler import Scheduler, SchedulerConfig, SequenceRequest, Update
from tllm.testing.fake_engine import FAKE_SPEC, FakeBehaviour, FakeEngine, fake_checkpoint
from tllm.testing.identities import members
from tllm.testing.links import Direction, emulated_link
from tllm.testing.stages import cut
from tllm.transport import rpc, wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FrameLimits, StageMessage, StepFrame
from tllm.transport.journal import NUM_STAGE_POINTS, UNKNOWN, Journal, Point

DEADLINE_S = 20.0
DELAY_S = 0.03
NUM_TOKENS = 4  # as many steps: the prompt, then one for each token but the last
NUM_BLOCKS, BLOCK_SIZE = 64, 4
LIMITS = FrameLimits(
    epoch=Epoch(1),
    hidden_size=FAKE_SPEC.hidden_size,
    dtype=DType.FLOAT32,
    max_tokens=32,
    max_chunks=64,
    max_blocks=NUM_BLOCKS,
    vocab_size=FAKE_SPEC.vocab_size,
)
HEAD = Place(node="head")
EPOCH = Epoch(1)
pytestmark = pytest.mark.timeout(60)


# ---------------------------------------------------------------------------------------------- a real pipeline


@dataclass(kw_only=True)
class Delays:
    """What is slow."""

    compute_s: tuple[float, float] = (0.0, 0.0)  # by stage
    thread_s: tuple[float, float] = (0.0, 0.0)  # the compute thread does something else first
    schedule_s: float = 0.0
    wire_s: float = 0.0  # from the first stage to the second
    clocks_s: tuple[float, float] = (0.0, 0.0)  # that the stages' clocks show when the head's shows 0
    scheduler: dict[str, int] = field(default_factory=dict)


class SlowThread(ThreadPoolExecutor):
    """Sleeps before it does what it is given."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(max_workers=1)
        self._delay_s = delay_s

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def late() -> Any:
            time.sleep(self._delay_s)
            return work(*args, **kwargs)

        return super().submit(late)


class SlowScheduler(Scheduler):
    delay_s = 0.0

    def schedule(self) -> Step | None:
        if (step := super().schedule()) is not None:
            time.sleep(self.delay_s)
        return step


class Noted:
    """A worker as the head asks it."""

    def __init__(self, index: int, history: StageHistory) -> None:
        profile = type("Profile", (), {"name": f"node{index}", "machine": "this one"})
        self.id = f"w-{index}"
        self.member = type("Member", (), {"profile": profile})
        self._history = history

    async def trace(self, question: pb.Trace, _timeout_s: float) -> tuple[pb.Traced, float]:
        return self._history.answer(question), time.perf_counter()


@dataclass(kw_only=True)
class Rig:
    driver: Driver
    journal: Journal
    workers: list[Any]

    def ask(self, *prompt: int, max_tokens: int = NUM_TOKENS) -> Generation:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        return self.driver.submit(SequenceRequest(prompt=tuple(map(TokenId, prompt)), params=params))

    async def trace(self, *sequences: SequenceRecord, began_s: float = 0.0, machine: str = "this one") -> Trace:
        return await collect(
            self.journal,
            self.workers,
            machine=machine,
            node="head",
            num_layers=FAKE_SPEC.num_layers,
            began_s=began_s,
            ended_s=time.perf_counter(),
            sequences=sequences,
        )


@asynccontextmanager
async def pipeline(directory: Path, delays: Delays) -> AsyncIterator[Rig]:
    """A driver and two stages joined by gRPC over TCP, all in this process; the two stages over an emulated link."""
    identities = members(directory / "cluster", "head", "n-0", "n-1")
    shards = cut(FAKE_SPEC.num_layers, [1, FAKE_SPEC.num_layers - 1])
    journal = Journal()
    histories = [
        StageHistory(clock=lambda shift_s=shift_s: time.perf_counter() + shift_s) for shift_s in delays.clocks_s
    ]
    async with AsyncExitStack() as stack:
        inboxes, addresses = [], []
        for index, identity in enumerate(identities):
            server = rpc.StageServer()
            hosting = rpc.Server([server], identity=identity)
            (address,) = await hosting.start(["127.0.0.1:0"])
            stack.push_async_callback(hosting.aclose)
            noting = journal if index == 0 else histories[index - 1].journal
            inboxes.append(server.expect(LIMITS, sender=identities[index - 1].name, journal=noting))
            addresses.append(address)
        host, port = addresses[2].rsplit(":", 1)
        link = stack.enter_context(emulated_link(target=(host, int(port))))
        link.shape(Direction.TO_TARGET, delay_s=delays.wire_s)
        addresses[2] = link.address
        links = []
        for index, identity in enumerate(identities):
            after = (index + 1) % 3
            noting = journal if index == 0 else histories[index - 1].journal
            links.append(
                await rpc.connect(
                    [addresses[after]],
                    LIMITS,
                    identity=identity,
                    peer=identities[after].name,
                    timeout_s=DEADLINE_S,
                    close_timeout_s=0.5,
                    journal=noting,
                )
            )
        tasks = []
        for index, (shard, history) in enumerate(zip(shards, histories, strict=True)):
            behaviour = FakeBehaviour(seconds_per_step=delays.compute_s[index])
            engine = FakeEngine(EngineConfig(shard=shard, dtype=DType.FLOAT32), behaviour)
            engine.load(fake_checkpoint(), lambda done, total: None)
            engine.allocate(NUM_BLOCKS, BLOCK_SIZE)
            history.begin(LIMITS.epoch, shard)
            thread = stack.enter_context(SlowThread(delays.thread_s[index]))
            work = run_stage(engine, shard, inboxes[index + 1], links[index + 1], thread, history.journal)
            tasks.append(asyncio.create_task(work))
        config = SchedulerConfig(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_model_len=NUM_BLOCKS * BLOCK_SIZE,
            **{"max_batch_tokens": 32, "max_steps_in_flight": 2, **delays.scheduler},
        )
        scheduler = SlowScheduler(config, epoch=LIMITS.epoch)
        scheduler.delay_s = delays.schedule_s
        driver = Driver(scheduler, journal=journal)
        tasks.append(asyncio.create_task(driver.run(links[0], inboxes[0])))
        try:
            yield Rig(
                driver=driver,
                journal=journal,
                workers=[Noted(index, history) for index, history in enumerate(histories)],
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(each.aclose() for each in (*inboxes, *links)))


async def read_to_end(generation: Generation) -> None:
    async for _ in generation:
        pass


def record(generation: Generation, arrived_s: float, ended_s: float, choice: int = 0) -> SequenceRecord:
    return SequenceRecord(
        request="r",
        choice=choice,
        seq=generation.seq,
        arrived_s=arrived_s,
        submitted_s=generation.arrived_s,
        ended_s=ended_s,
        first_step=generation.first_step,
    )


async def traced(directory: Path, delays: Delays) -> tuple[Summary, Timeline, float]:
    """One request's trace, and the wall time that the test took for it."""
    async with asyncio.timeout(DEADLINE_S), pipeline(directory, delays) as rig:
        arrived_s = time.perf_counter()
        generation = rig.ask(1, 2, 3)
        await read_to_end(generation)
        ended_s = time.perf_counter()
        await until_delivered(rig)
        timeline = Timeline(await rig.trace(record(generation, arrived_s, ended_s)))
        return summarize(timeline), timeline, ended_s - arrived_s


async def until_delivered(rig: Rig) -> None:
    """The last step is marked as delivered after its tokens were."""
    while any(math.isnan(row.times_s[Point.DELIVERED]) for row in rig.journal.rows()):  # noqa: ASYNC110
        await asyncio.sleep(0)


def seconds(summary: Summary, kind: Kind, node: str) -> float:
    """Of one kind at one place of the first sequence."""
    return sum(
        share.seconds
        for share in summary.accounts[0].shares
        if share.kind is kind and share.place.split(" ")[0] == node
    )


def least_of_a_step(timeline: Timeline, kind: Kind, node: str) -> float:
    return min(
        sum(part.duration_s for part in parts if part.kind is kind and part.place.node == node)
        for parts in timeline.steps.values()
    )


def delay_in_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = wire.encode

    def slow(message: StageMessage) -> bytes:
        if isinstance(message, StepFrame) and message.hidden is not None:  # from the first stage to the second
            time.sleep(DELAY_S)
        return encode(message)

    monkeypatch.setattr(wire, "encode", slow)


def delay_in_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = wire.decode

    def slow(data: bytes, limits: FrameLimits) -> StageMessage:
        message = decode(data, limits)
        if isinstance(message, StepFrame) and message.hidden is not None:
            time.sleep(DELAY_S)
        return message

    monkeypatch.setattr(wire, "decode", slow)


def delay_in_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = Scheduler.complete

    def slow(self: Scheduler, result: StepResult) -> tuple[Update, ...]:
        time.sleep(DELAY_S)
        return complete(self, result)

    monkeypatch.setattr(Scheduler, "complete", slow)


def nothing(_: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("delays", "patch", "kind", "node"),
    [
        pytest.param(Delays(compute_s=(DELAY_S, 0.0)), nothing, Kind.COMPUTE, "node0", id="compute of the first"),
        pytest.param(Delays(compute_s=(0.0, DELAY_S)), nothing, Kind.COMPUTE, "node1", id="compute of the second"),
        pytest.param(Delays(thread_s=(0.0, DELAY_S)), nothing, Kind.WAIT, "node1", id="wait"),
        pytest.param(Delays(schedule_s=DELAY_S), nothing, Kind.SCHEDULE, "head", id="schedule"),
        pytest.param(Delays(), delay_in_complete, Kind.SCHEDULE, "head", id="complete"),
        pytest.param(Delays(wire_s=DELAY_S), nothing, Kind.WIRE, "node1", id="wire"),
        pytest.param(Delays(), delay_in_encode, Kind.SERIALIZE, "node0", id="encode"),
        pytest.param(Delays(), delay_in_decode, Kind.SERIALIZE, "node1", id="decode"),
    ],
)
async def test_a_delay_is_found_in_its_part_and_nowhere_else(tmp_path, monkeypatch, delays, patch, kind, node):
    """A sleep is never shorter than asked for. Whatever else happens in a step takes a few milliseconds, unless the
    machine is busy; that may disturb some steps at any place, but not every step at the same one."""
    patch(monkeypatch)
    summary, timeline, wall_s = await traced(tmp_path, delays)
    assert seconds(summary, kind, node) >= NUM_TOKENS * DELAY_S
    for share in summary.accounts[0].shares:
        where = share.place.split(" ")[0]
        if share.kind not in (Kind.PREPARE, Kind.QUEUE, Kind.IDLE, Kind.REPLY):  # those are in no step
            assert (least_of_a_step(timeline, share.kind, where) >= DELAY_S) == ((share.kind, where) == (kind, node))
    assert_adds_up(summary, wall_s)
    assert summary.num_steps == NUM_TOKENS
    assert summary.moved_s == 0.0
    assert not summary.missing


def assert_adds_up(summary: Summary, wall_s: float) -> None:
    account = summary.accounts[0]
    assert account.wall_s == pytest.approx(wall_s, rel=0.02)
    assert account.recorded_s == pytest.approx(wall_s, rel=0.02)


async def test_a_full_scheduler_is_found_in_the_queue(tmp_path):
    delays = Delays(compute_s=(DELAY_S, 0.0), scheduler={"max_sequences": 1})
    async with asyncio.timeout(DEADLINE_S), pipeline(tmp_path, delays) as rig:
        first = asyncio.create_task(read_to_end(rig.ask(1, 2, 3)))
        arrived_s = time.perf_counter()
        second = rig.ask(4, 5, 6)
        await first
        waited_s = time.perf_counter() - arrived_s
        await read_to_end(second)
        ended_s = time.perf_counter()
        await until_delivered(rig)
        summary = summarize(Timeline(await rig.trace(record(second, arrived_s, ended_s))))
    assert NUM_TOKENS * DELAY_S <= seconds(summary, Kind.QUEUE, "head") <= waited_s
    assert_adds_up(summary, ended_s - arrived_s)


async def test_a_scheduler_that_gives_others_their_turn_is_found_in_idle(tmp_path, monkeypatch):
    schedule, complete = Scheduler.schedule, Scheduler.complete
    rests_until_s = 0.0

    def resting(self: Scheduler) -> Step | None:
        return None if time.perf_counter() < rests_until_s else schedule(self)

    def tiring(self: Scheduler, result: StepResult) -> tuple[Update, ...]:
        nonlocal rests_until_s
        rests_until_s = time.perf_counter() + DELAY_S
        asyncio.get_running_loop().call_later(DELAY_S + 0.001, rig.driver._work.set)
        return complete(self, result)

    monkeypatch.setattr(Scheduler, "schedule", resting)
    monkeypatch.setattr(Scheduler, "complete", tiring)
    async with asyncio.timeout(DEADLINE_S), pipeline(tmp_path, Delays()) as rig:
        arrived_s = time.perf_counter()
        generation = rig.ask(1, 2, 3)
        await read_to_end(generation)
        ended_s = time.perf_counter()
        await until_delivered(rig)
        summary = summarize(Timeline(await rig.trace(record(generation, arrived_s, ended_s))))
    injected_s = (NUM_TOKENS - 1) * DELAY_S
    assert seconds(summary, Kind.IDLE, "head") >= 0.8 * injected_s  # it rests from before the step is completed
    assert_adds_up(summary, ended_s - arrived_s)


async def test_chunks_that_overlap_are_not_counted_twice(tmp_path):
    """A prompt in four chunks of two steps in flight: the path is what the last one waited for."""
    delays = Delays(compute_s=(0.0, DELAY_S), scheduler={"prefill_chunk": 2})
    async with asyncio.timeout(DEADLINE_S), pipeline(tmp_path, delays) as rig:
        arrived_s = time.perf_counter()
        generation = rig.ask(*range(8), max_tokens=1)
        await read_to_end(generation)
        ended_s = time.perf_counter()
        await until_delivered(rig)
        timeline = Timeline(await rig.trace(record(generation, arrived_s, ended_s)))
    assert len(timeline.steps) == 4
    summary = summarize(timeline)
    assert seconds(summary, Kind.COMPUTE, "node1") >= 4 * DELAY_S
    assert_adds_up(summary, ended_s - arrived_s)


async def test_a_window_shows_all_steps_that_were_scheduled_in_it(tmp_path):
    async with asyncio.timeout(DEADLINE_S), pipeline(tmp_path, Delays()) as rig:
        await read_to_end(rig.ask(1, 2, 3))
        began_s = time.perf_counter()
        await asyncio.gather(*(read_to_end(rig.ask(number, 1, 2)) for number in range(6)))
        await until_delivered(rig)
        before, after = await rig.trace(), await rig.trace(began_s=began_s)
    assert len(before.steps) == len(after.steps) + NUM_TOKENS
    summary = summarize(Timeline(after))
    assert summary.accounts[0].recorded_s == pytest.approx(summary.accounts[0].wall_s)
    assert {share.kind for share in summary.accounts[0].shares} == {
        Kind.SCHEDULE,
        Kind.SERIALIZE,
        Kind.WIRE,
        Kind.WAIT,
        Kind.COMPUTE,
        Kind.DELIVER,
    }


async def test_clocks_that_have_nothing_to_do_with_each_other_change_nothing(tmp_path):
    """Both ends of an exchange are in this process, so the true offsets are known."""
    delays = Delays(wire_s=DELAY_S, clocks_s=(1000.0, -2000.0))
    async with asyncio.timeout(DEADLINE_S), pipeline(tmp_path, delays) as rig:
        arrived_s = time.perf_counter()
        generation = rig.ask(1, 2, 3)
        await read_to_end(generation)
        ended_s = time.perf_counter()
        await until_delivered(rig)
        trace = await rig.trace(record(generation, arrived_s, ended_s), machine="another one")
    for stage, true_s in zip(trace.stages, delays.clocks_s, strict=True):
        assert abs(stage.clock.offset_s - true_s) <= stage.clock.error_s
        assert 0 < stage.clock.error_s < DELAY_S / 4
    summary = summarize(Timeline(trace))
    assert [clock.is_shared for clock in summary.clocks] == [False, False]
    assert seconds(summary, Kind.WIRE, "node1") >= NUM_TOKENS * (DELAY_S - 2 * max(c.error_s for c in summary.clocks))
    assert summary.moved_s <= 2 * max(clock.error_s for clock in summary.clocks)
    assert_adds_up(summary, ended_s - arrived_s)


async def test_a_worker_that_does_not_answer_leaves_a_hole_that_is_stated(tmp_path):
    class Gone(Noted):
        async def trace(self, question: pb.Trace, _timeout_s: float) -> tuple[pb.Traced, float]:
            raise TransportError("it cannot be reached")

    async with asyncio.timeout(DEADLINE_S), pipeline(tmp_path, Delays(compute_s=(0.0, DELAY_S))) as rig:
        rig.workers[1] = Gone(1, StageHistory())
        arrived_s = time.perf_counter()
        generation = rig.ask(1, 2, 3)
        await read_to_end(generation)
        ended_s = time.perf_counter()
        await until_delivered(rig)
        summary = summarize(Timeline(await rig.trace(record(generation, arrived_s, ended_s))))
    assert summary.missing == ("node1, worker w-1: it cannot be reached",)
    assert seconds(summary, Kind.UNRECORDED, "head") >= NUM_TOKENS * DELAY_S
    account = summary.accounts[0]
    assert account.recorded_s + seconds(summary, Kind.UNRECORDED, "head") == pytest.approx(account.wall_s)


async def test_a_window_of_more_steps_than_are_kept_says_that_its_beginning_is_gone():
    journal = Journal(2)
    for step in (1, 2, 3):
        for point in (Point.SCHEDULING, Point.DELIVERED):
            journal.mark(EPOCH, StepId(step), point, float(step))
    options = {"machine": "", "node": "head", "num_layers": 4, "ended_s": 9.0}
    whole = await collect(journal, [], began_s=0.5, **options)
    assert [step.step for step in whole.steps] == [2, 3]
    assert whole.oldest_step == 2
    assert whole.missing == ("1.5 s at the beginning: later steps have overwritten what was noted",)
    assert not (await collect(journal, [], began_s=2.0, **options)).missing


@pytest.mark.parametrize(
    "damaged",
    [
        pb.TracedStage(epoch=1, steps=[1], times_s=[0.0] * (NUM_STAGE_POINTS - 1)),
        pb.TracedStage(epoch=1, steps=[1], times_s=[math.inf] * NUM_STAGE_POINTS),
        pb.TracedStage(epoch=1, steps=range(5000), times_s=[0.0] * NUM_STAGE_POINTS * 5000),
    ],
)
async def test_an_answer_that_contradicts_itself_is_left_out_and_stated(damaged):
    class Confused(Noted):
        async def trace(self, question: pb.Trace, _timeout_s: float) -> tuple[pb.Traced, float]:
            now_s = time.perf_counter()
            return pb.Traced(arrived_s=now_s, answered_s=now_s, stages=[damaged]), time.perf_counter()

    worker: Any = Confused(0, StageHistory())
    trace = await collect(Journal(1), [worker], machine="", node="head", num_layers=4, began_s=0.0, ended_s=1.0)
    assert trace.stages == ()
    assert trace.missing == ("node0, worker w-0: what it noted contradicts itself",)


# ------------------------------------------------------------------------------------------------- made-up times


def step_record(step: int, times: dict[Point, float], *, seqs: tuple[int, ...] = (7,)) -> StepRecord:
    return StepRecord(
        epoch=EPOCH,
        step=StepId(step),
        chunks=tuple((seq, 1) for seq in seqs),
        times_s=tuple(times.get(point, UNKNOWN) for point in Point),
    )


def stage_record(
    layers: tuple[int, int], times: dict[int, dict[Point, float]], clock: ClockOffset = SAME_CLOCK
) -> StageRecord:
    return StageRecord(
        place=Place(node="node", worker=f"w-{layers[0]}", first_layer=layers[0], last_layer=layers[1]),
        epoch=EPOCH,
        clock=clock,
        times_s={
            StepId(step): tuple(each.get(Point(point), UNKNOWN) for point in range(NUM_STAGE_POINTS))
            for step, each in times.items()
        },
    )


DOWN = (Point.SCHEDULING, Point.SCHEDULED, Point.ENCODING, Point.ENCODED)
STAGE = (Point.ARRIVED, Point.DECODED, Point.BEGAN, Point.ENDED, Point.ENCODING, Point.ENCODED)
HOME = (Point.ARRIVED, Point.DECODED, Point.COMPLETING, Point.COMPLETED, Point.DELIVERED)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Steps of one sequence through up to three stages, some of them overlapping, by clocks that are wrong by up to
    their error, with some of the notes missing."""
    num_stages = draw(st.integers(1, 3))
    clocks = [
        ClockOffset(offset_s=draw(st.floats(-100, 100)), error_s=draw(st.floats(0.0, 0.5)), at_s=0.0)
        for _ in range(num_stages)
    ]
    wrong = [draw(st.floats(-1.0, 1.0)) * clock.error_s for clock in clocks]
    steps, stages = [], [dict[int, dict[Point, float]]() for _ in range(num_stages)]
    begins_s = 0.0
    for number in range(1, draw(st.integers(1, 5)) + 1):
        at_s = begins_s
        head: dict[Point, float] = {}

        def passed(point: Point, row: dict[Point, float], shift_s: float = 0.0) -> None:
            nonlocal at_s
            at_s += draw(st.floats(0.0, 1.0))
            row[point] = at_s + shift_s

        for point in DOWN:
            passed(point, head)
        next_s = at_s
        for index in range(num_stages):
            row: dict[Point, float] = {}
            for point in STAGE:
                passed(point, row, clocks[index].offset_s + wrong[index])
            for point in draw(st.sets(st.sampled_from(STAGE), max_size=2)):
                del row[point]
            if draw(st.integers(0, 9)):
                stages[index][number] = row
        home: dict[Point, float] = {}
        for point in HOME:
            passed(point, home)
        steps.append(step_record(number, head | home))
        begins_s = draw(st.sampled_from([next_s, home[Point.COMPLETED], at_s])) + draw(st.floats(0.0, 1.0))
    ended_s = max(step.times_s[Point.DELIVERED] for step in steps)
    sequence = SequenceRecord(
        request="r",
        choice=0,
        seq=SequenceId(7),
        arrived_s=-2.0,
        submitted_s=-1.0,
        ended_s=ended_s + 1.0,
        first_step=StepId(1),
    )
    return Trace(
        began_s=-2.0,
        ended_s=ended_s + 1.0,
        num_layers=num_stages,
        head=HEAD,
        steps=tuple(steps),
        stages=tuple(stage_record((index, index + 1), stages[index], clocks[index]) for index in range(num_stages)),
        sequences=(sequence,),
    )


@settings(max_examples=50)
@given(traces())
def test_parts_have_neither_gap_nor_overlap_whatever_is_missing_and_however_wrong_the_clocks(trace):
    timeline = Timeline(trace)
    for step in trace.steps:
        parts = timeline.steps[step.step]
        assert parts[0].began_s == step.times_s[Point.SCHEDULING]
        assert parts[-1].ended_s == step.times_s[Point.DELIVERED]
        assert_telescopes(parts)
    [sequence] = trace.sequences
    path = timeline.sequence_parts(sequence)
    assert (path[0].began_s, path[-1].ended_s) == (sequence.arrived_s, sequence.ended_s)
    assert_telescopes(path)
    [account] = summarize(timeline).accounts
    total_s = math.fsum(share.seconds for share in account.shares)
    assert total_s == pytest.approx(account.wall_s)
    json.loads(chrome_trace(timeline))


def assert_telescopes(parts: tuple[Part, ...]) -> None:
    for part in parts:
        assert part.began_s <= part.ended_s
    for left, right in pairwise(parts):
        assert left.ended_s == right.began_s


def whole_step(step: int, began_s: float, *, length_s: float = 16.0) -> tuple[StepRecord, dict[Point, float]]:
    """A step over one stage of two layers, with as much time between all of its points."""
    gap_s = length_s / 14
    at_s = [began_s + number * gap_s for number in range(15)]
    head = dict(zip(DOWN, at_s[:4], strict=True)) | dict(zip(HOME, at_s[10:], strict=True))
    return step_record(step, head), dict(zip(STAGE, at_s[4:10], strict=True))


def test_every_part_of_a_step_has_its_name_and_place():
    step, stage = whole_step(1, 0.0, length_s=14.0)
    trace = Trace(
        began_s=0.0,
        ended_s=14.0,
        num_layers=2,
        head=HEAD,
        steps=(step,),
        stages=(stage_record((0, 2), {1: stage}),),
    )
    parts = Timeline(trace).steps[StepId(1)]
    assert [(part.kind.value, part.place.node) for part in parts] == [
        ("schedule", "head"),
        ("wait", "head"),
        ("serialize", "head"),
        ("wire", "node"),
        ("serialize", "node"),
        ("wait", "node"),
        ("compute", "node"),
        ("wait", "node"),
        ("serialize", "node"),
        ("wire", "head"),
        ("serialize", "head"),
        ("wait", "head"),
        ("schedule", "head"),
        ("deliver", "head"),
    ]
    assert {round(part.duration_s, 9) for part in parts} == {1.0}


def test_a_clock_that_puts_an_arrival_before_its_sending_costs_the_wire_and_is_stated():
    step, stage = whole_step(1, 0.0, length_s=14.0)
    clock = ClockOffset(offset_s=1.5, error_s=1.5, at_s=0.0)  # in truth 0: all of it seems 1.5 s too early
    trace = Trace(
        began_s=0.0,
        ended_s=14.0,
        num_layers=2,
        head=HEAD,
        steps=(step,),
        stages=(stage_record((0, 2), {1: stage}, clock),),
    )
    timeline = Timeline(trace)
    parts = timeline.steps[StepId(1)]
    assert_telescopes(parts)
    assert (parts[3].kind, parts[3].duration_s) == (Kind.WIRE, 0.0)
    assert (parts[9].kind, parts[9].duration_s) == (Kind.WIRE, pytest.approx(2.5))
    assert timeline.moved_s == pytest.approx(0.5)
    assert summarize(timeline).clocks[0].error_s == pytest.approx(1.5, rel=0.01)


def test_the_path_follows_an_earlier_chunk_where_a_later_one_waited_for_the_engine():
    """The second chunk arrives while the first is computed: what it waits for is the first one's computing."""
    first, second = {}, {}
    for points, at_s in ((first, 0.0), (second, 2.0)):
        points |= dict(zip(DOWN, (at_s, at_s + 0.25, at_s + 0.5, at_s + 0.75), strict=True))
    stages = {
        1: dict(zip(STAGE, (1.0, 1.5, 2.0, 6.0, 6.0, 6.5), strict=True)),
        2: dict(zip(STAGE, (3.0, 3.5, 6.5, 10.5, 10.5, 11.0), strict=True)),
    }
    first |= dict(zip(HOME, (7.0, 7.25, 7.5, 7.75, 8.0), strict=True))
    second |= dict(zip(HOME, (11.5, 11.75, 12.0, 12.25, 12.5), strict=True))
    trace = Trace(
        began_s=0.0,
        ended_s=12.5,
        num_layers=2,
        head=HEAD,
        steps=(step_record(1, first), step_record(2, second)),
        stages=(stage_record((0, 2), stages),),
    )
    sequence = SequenceRecord(
        request="r", choice=0, seq=SequenceId(7), arrived_s=0.0, submitted_s=0.0, ended_s=12.5, first_step=StepId(1)
    )
    path = Timeline(trace).sequence_parts(sequence)
    assert_telescopes(path)
    computing = [(part.step, part.began_s, part.ended_s) for part in path if part.kind is Kind.COMPUTE]
    assert computing == [(1, 2.0, 6.0), (2, 6.5, 10.5)]
    assert next(part.duration_s for part in path if part.kind is Kind.WAIT and part.step == 2) == 0.5


def test_what_lies_between_two_steps_is_idle_although_the_first_is_delivered_after_the_second_has_left():
    (first, stage), (second, next_stage) = whole_step(1, 0.0, length_s=14.0), whole_step(2, 13.5, length_s=14.0)
    trace = Trace(
        began_s=0.0,
        ended_s=27.5,
        num_layers=2,
        head=HEAD,
        steps=(first, second),
        stages=(stage_record((0, 2), {1: stage, 2: next_stage}),),
    )
    sequence = SequenceRecord(
        request="r", choice=0, seq=SequenceId(7), arrived_s=0.0, submitted_s=0.0, ended_s=27.5, first_step=StepId(1)
    )
    path = Timeline(trace).sequence_parts(sequence)
    assert_telescopes(path)
    assert [(part.began_s, part.ended_s) for part in path if part.kind is Kind.IDLE] == [(13.0, 13.5)]
    assert [part.step for part in path if part.kind is Kind.DELIVER] == [2]
    other = replace(trace, steps=(first, replace(second, epoch=Epoch(2))))  # another pipeline
    kinds = [part.kind for part in Timeline(other).sequence_parts(sequence)]
    assert (kinds.count(Kind.REPLAN), kinds.count(Kind.IDLE)) == (1, 0)


def test_a_step_of_a_stage_that_nobody_heard_of_is_not_called_wire():
    step, stage = whole_step(1, 0.0)
    trace = Trace(
        began_s=0.0, ended_s=16.0, num_layers=4, head=HEAD, steps=(step,), stages=(stage_record((2, 4), {1: stage}),)
    )
    parts = Timeline(trace).steps[StepId(1)]
    assert [part.kind for part in parts].count(Kind.UNRECORDED) == 1
    assert [part.kind for part in parts].count(Kind.WIRE) == 1  # home


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), max_size=30))
def test_lanes_hold_everything_once_and_nothing_at_once(spans):
    parts = [Part(kind=Kind.WAIT, place=HEAD, began_s=at, ended_s=at + length) for at, length in spans]
    lanes = cut_into_lanes(parts)
    assert sorted((part for lane in lanes for part in lane), key=id) == sorted(parts, key=id)
    for lane in lanes:
        assert all(left.ended_s <= right.began_s for left, right in pairwise(lane))


def test_the_file_is_what_perfetto_reads():
    step, stage = whole_step(1, 5.0)
    clock = ClockOffset(offset_s=0.0, error_s=0.00012, at_s=21.0)
    sequence = SequenceRecord(
        request="r", choice=0, seq=SequenceId(7), arrived_s=4.0, submitted_s=4.5, ended_s=22.0, first_step=StepId(1)
    )
    trace = Trace(
        began_s=4.0,
        ended_s=22.0,
        num_layers=2,
        head=HEAD,
        steps=(step,),
        stages=(stage_record((0, 2), {1: stage}, replace(clock, at_s=13.0)),),
        sequences=(sequence,),
    )
    content = json.loads(chrome_trace(Timeline(trace)))
    events = content["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert list(names.values()) == [
        "head",
        "node layers 0..1 (clock ± 0.57 ms)",
        "request r, choice 0 (sequence 7)",
    ]
    slices = [event for event in events if event["ph"] == "X"]
    assert min(event["ts"] for event in slices) == 0.0
    assert all(event["dur"] >= 0 for event in slices)
    path = [event for event in slices if event["pid"] == 3]
    assert sum(event["dur"] for event in path) == pytest.approx(18e6)
    assert [event["ph"] for event in events if event["ph"] in "stf"] == ["s", "f", "t"]
    assert content["tllm"]["accounts"][0]["wall_s"] == 18.0


# ------------------------------------------------------------------------------------------------------ journals


def test_a_new_step_takes_the_place_of_the_oldest():
    journal = Journal(4)
    for step in range(1, 11):
        journal.mark(EPOCH, StepId(step), Point.ARRIVED, float(step))
    assert [row.step for row in journal.rows()] == [7, 8, 9, 10]
    journal.mark(EPOCH, StepId(6), Point.DECODED, 0.0)  # too late: 10 has its place
    assert [row.step for row in journal.rows()] == [7, 8, 9, 10]
    assert math.isnan(next(row for row in journal.rows() if row.step == 10).times_s[Point.DECODED])


def test_steps_of_a_new_epoch_are_not_those_of_the_old_one_with_the_same_number():
    journal = Journal(4)
    journal.mark(Epoch(1), StepId(3), Point.ARRIVED, 1.0)
    journal.mark(Epoch(2), StepId(3), Point.DECODED, 2.0)
    journal.mark(Epoch(1), StepId(3), Point.ENDED, 3.0)
    [row] = journal.rows()
    assert row.epoch == 2
    assert [time_s for time_s in row.times_s if not math.isnan(time_s)] == [2.0]


# ------------------------------------------------------------------------------------- questions and their answers


class Node:
    """A node that takes orders and says nothing by itself."""

    def __init__(self) -> None:
        self.profile = type("Profile", (), {"name": "node", "machine": "another one"})
        self.orders: asyncio.Queue[pb.WorkerOrder] = asyncio.Queue()
        self.unreachable = asyncio.get_running_loop().create_future()
        self.reason = "its cable was pulled"
        self.workers: dict[str, WorkerHandle] = {}

    async def send(self, message: pb.HeadMessage) -> None:
        self.orders.put_nowait(message.worker)

    def strike(self) -> None:
        pass


async def asked(timeout_s: float = DEADLINE_S) -> tuple[Any, WorkerHandle, asyncio.Task[Any], pb.Trace]:
    node: Any = Node()
    worker = WorkerHandle("w-1", node)
    asking = asyncio.create_task(worker.trace(pb.Trace(first_step=3, last_step=4), timeout_s))
    return node, worker, asking, (await node.orders.get()).trace


async def test_only_the_answer_to_a_question_answers_it():
    _, worker, asking, question = await asked()
    assert (question.first_step, question.last_step) == (3, 4)
    worker.take(pb.WorkerEvent(traced=pb.Traced(number=question.number + 1, arrived_s=1.0)))
    worker.take(pb.WorkerEvent(traced=pb.Traced(number=question.number, arrived_s=2.0)))
    traced, heard_s = await asking
    assert traced.arrived_s == 2.0
    assert heard_s <= time.perf_counter()


async def test_a_question_ends_with_its_worker_its_node_or_its_deadline():
    _, worker, asking, _ = await asked()
    worker.take(pb.WorkerEvent(exited=pb.Exited(code=-9)))
    with pytest.raises(WorkerLostError, match="gone"):
        await asking
    node, _, asking, _ = await asked()
    node.unreachable.set_result(None)
    with pytest.raises(TransportError, match="cable"):
        await asking
    _, _, asking, _ = await asked(timeout_s=0.01)
    with pytest.raises(TimeoutError, match="did not answer"):
        await asking


def test_a_worker_answers_with_the_layers_it_had_in_each_epoch():
    history = StageHistory()
    for epoch, layers in ((1, (0, 4)), (2, (2, 4)), (3, (0, 0))):
        history.begin(Epoch(epoch), Shard(first_layer=layers[0], last_layer=layers[1], embed=False, head=True))
        for step in (2 * epoch, 2 * epoch + 1):
            history.journal.mark(Epoch(epoch), StepId(step), Point.ARRIVED, float(step))
    traced = history.answer(pb.Trace(number=9, first_epoch=2, first_step=2, last_step=6))
    assert traced.number == 9
    assert traced.arrived_s <= traced.answered_s
    assert [(each.epoch, each.first_layer, each.last_layer, [*each.steps]) for each in traced.stages] == [
        (2, 2, 4, [4, 5]),
        (3, 0, 0, [6]),
    ]
    assert traced.stages[0].times_s[::NUM_STAGE_POINTS] == [4.0, 5.0]
    assert not history.answer(pb.Trace()).stages
