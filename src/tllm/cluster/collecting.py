"""How the head comes to know what its workers noted, and what their clocks show.

    head ── Trace ─▶ agent ─▶ worker        a few questions without steps, for the clocks (see clocks.py),
         ◀─ Traced ─                        then one with steps, for what was noted

Nothing of it touches the data path. A worker whose answer does not come, or contradicts itself, is left out with the
reason.

This file does not know what the times mean, nor who wants them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence

from tllm.cluster.clocks import ClockOffset, Exchange, align, on_one_machine
from tllm.cluster.membership import WorkerHandle, WorkerLostError
from tllm.cluster.tracing import Place, SequenceRecord, StageRecord, StepRecord, Trace
from tllm.core.errors import FrameError, TransportError
from tllm.core.types import Epoch, StepId
from tllm.core.units import format_seconds
from tllm.transport import wire_pb2 as pb
from tllm.transport.journal import CAPACITY, NUM_STAGE_POINTS, Journal, Point

_NUM_EXCHANGES = 8
_ANSWER_S = 2.0


async def measure_clock(worker: WorkerHandle) -> ClockOffset:
    """The worker's clock beside this one. Raises TransportError, WorkerLostError, TimeoutError."""
    exchanges = [(await _ask(worker, pb.Trace()))[1] for _ in range(_NUM_EXCHANGES)]
    return align(exchanges)


async def collect(
    journal: Journal,
    workers: Iterable[WorkerHandle],
    *,
    machine: str,
    node: str,
    num_layers: int,
    began_s: float,
    ended_s: float,
    sequences: tuple[SequenceRecord, ...] = (),
) -> Trace:
    """What happened between these times: the head's journal, with what the workers noted of the same steps. `machine`
    and `node` are those that this runs on."""
    rows = list(journal.rows())
    steps = tuple(
        StepRecord(epoch=row.epoch, step=row.step, chunks=row.chunks, times_s=tuple(row.times_s))
        for row in rows
        if began_s <= row.times_s[Point.SCHEDULING] <= ended_s and not math.isnan(row.times_s[Point.DELIVERED])
    )
    question = pb.Trace()
    if steps:
        question.first_epoch = steps[0].epoch
        question.first_step = min(step.step for step in steps)
        question.last_step = max(step.step for step in steps)
    missing = []
    if journal.is_full and (lost_s := rows[0].times_s[Point.SCHEDULING] - began_s) > 0:
        missing.append(f"{format_seconds(lost_s)} at the beginning: later steps have overwritten what was noted")
    answers = await asyncio.gather(*(_noted(worker, question, machine) for worker in workers))
    return Trace(
        began_s=began_s,
        ended_s=ended_s,
        num_layers=num_layers,
        head=Place(node=node),
        steps=steps,
        stages=tuple(record for answer in answers if not isinstance(answer, str) for record in answer),
        sequences=sequences,
        oldest_step=rows[0].step if rows else None,
        missing=(*missing, *(answer for answer in answers if isinstance(answer, str))),
    )


async def _noted(worker: WorkerHandle, question: pb.Trace, machine: str) -> tuple[StageRecord, ...] | str:
    """Its records, or why there are none."""
    node = worker.member.profile
    try:
        clock = await measure_clock(worker)
        if node.machine == machine:
            clock = on_one_machine(clock)
        own = pb.Trace()
        own.CopyFrom(question)
        traced, _ = await _ask(worker, own)
        return tuple(_record(worker, clock, stage) for stage in traced.stages)
    except (TransportError, WorkerLostError, TimeoutError) as error:
        return f"{node.name}, worker {worker.id}: {error}"


async def _ask(worker: WorkerHandle, question: pb.Trace) -> tuple[pb.Traced, Exchange]:
    asked_s = time.perf_counter()
    traced, heard_s = await worker.trace(question, _ANSWER_S)
    exchange = Exchange(asked_s=asked_s, arrived_s=traced.arrived_s, answered_s=traced.answered_s, heard_s=heard_s)
    return traced, exchange


def _record(worker: WorkerHandle, clock: ClockOffset, stage: pb.TracedStage) -> StageRecord:
    num_steps = len(stage.steps)
    times_s: Sequence[float] = stage.times_s
    if num_steps > CAPACITY or len(times_s) != num_steps * NUM_STAGE_POINTS or any(map(math.isinf, times_s)):
        raise FrameError("what it noted contradicts itself")
    rows = [tuple(times_s[start : start + NUM_STAGE_POINTS]) for start in range(0, len(times_s), NUM_STAGE_POINTS)]
    return StageRecord(
        place=Place(
            node=worker.member.profile.name,
            worker=worker.id,
            first_layer=stage.first_layer,
            last_layer=stage.last_layer,
        ),
        epoch=Epoch(stage.epoch),
        clock=clock,
        times_s={StepId(step): row for step, row in zip(stage.steps, rows, strict=True)},
    )
