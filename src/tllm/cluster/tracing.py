"""Where time went: what the head and the workers noted of their last steps, put together into parts that add up.

A step's parts follow each other without a gap, from the moment in which the scheduler is asked for it to that in which
its tokens are delivered:

    head      schedule  wait  serialize                                       serialize  wait  schedule  deliver
    stage 0                            wire  serialize wait compute wait serialize
    stage 1                                                             wire  ...        wire

A sequence's parts are the path that its last token waited for, from the arrival of its request to the end of its
answer: prepare, queue, the parts of its steps, idle where it was in none, deliver, reply. Chunks of one prompt overlap;
where a later one waited for the engine to be done with an earlier one, the path goes on with the earlier one.

Rules:
    Parts telescope: each begins where the one before ended.
    A stage's clock is known give or take its error. Where that puts its times before the head sent the step, after
    the head had the answer, or before the stage that sent it, they are moved to the nearest time that can be; the
    wire beside them takes the difference.
    What was not noted, because it was overwritten or a worker is gone, is `unrecorded` and nothing else.

This file does not know how the records were gathered, nor in which format they are shown.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from tllm.cluster.clocks import ClockOffset
from tllm.core.types import Epoch, SequenceId, StepId
from tllm.transport.journal import Chunks, Point


class Kind(StrEnum):
    """What a part was spent on."""

    PREPARE = "prepare"  # the request: parsed, rendered, encoded into tokens
    QUEUE = "queue"  # until it is first scheduled
    IDLE = "idle"  # in no step: others had their turn
    REPLAN = "replan"  # the same, until another pipeline took the place of one that was lost or bettered
    SCHEDULE = "schedule"  # the head decides what is computed, or takes in what was
    SERIALIZE = "serialize"  # messages become bytes, or bytes messages
    WIRE = "wire"  # from the end of encoding until the receiver has the last byte in hand
    WAIT = "wait"  # for the compute thread, for the link, or for the event loop
    COMPUTE = "compute"
    DELIVER = "deliver"  # the next steps are sent, then tokens given to their readers
    REPLY = "reply"  # tokens become text, text a response
    UNRECORDED = "unrecorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A process that notes: the head, or a worker with its stage."""

    node: str
    worker: str = ""  # empty: the head
    first_layer: int = 0
    last_layer: int = 0  # exclusive

    def __str__(self) -> str:
        if not self.worker:
            return "head"
        layers = f"{self.first_layer}..{self.last_layer - 1}" if self.first_layer < self.last_layer else "ends"
        return f"{self.node} layers {layers}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """What one worker noted in one epoch, by its own clock."""

    place: Place
    epoch: Epoch
    clock: ClockOffset  # of the worker, beside the head's
    times_s: Mapping[StepId, tuple[float, ...]]  # by Point, up to WRITTEN


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What the head noted of one step."""

    epoch: Epoch
    step: StepId
    chunks: Chunks
    times_s: tuple[float, ...]  # by Point


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRecord:
    """One choice of a request, by the head's clock."""

    request: str  # its id
    choice: int
    seq: SequenceId
    arrived_s: float
    submitted_s: float
    ended_s: float
    first_step: StepId | None  # that it was in


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Everything noted between two moments of the head's clock, `perf_counter`."""

    began_s: float
    ended_s: float
    num_layers: int
    head: Place
    steps: tuple[StepRecord, ...]  # that were delivered, in their order
    stages: tuple[StageRecord, ...]
    sequences: tuple[SequenceRecord, ...] = ()
    missing: tuple[str, ...] = ()  # why somebody's record is not here
    oldest_step: StepId | None = None  # that the head still knew of, in the trace or before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    kind: Kind
    place: Place
    began_s: float
    ended_s: float
    step: StepId | None = None

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.began_s


# Which part lies between two points that follow each other.
_KINDS = {
    (Point.SCHEDULING, Point.SCHEDULED): Kind.SCHEDULE,
    (Point.SCHEDULED, Point.ENCODING): Kind.WAIT,
    (Point.ENCODING, Point.ENCODED): Kind.SERIALIZE,
    (Point.ENCODED, Point.ARRIVED): Kind.WIRE,
    (Point.ARRIVED, Point.DECODED): Kind.SERIALIZE,
    (Point.DECODED, Point.BEGAN): Kind.WAIT,
    (Point.BEGAN, Point.ENDED): Kind.COMPUTE,
    (Point.ENDED, Point.ENCODING): Kind.WAIT,
    (Point.DECODED, Point.ENCODING): Kind.WAIT,  # a failure of an earlier stage, passed on
    (Point.DECODED, Point.COMPLETING): Kind.WAIT,
    (Point.COMPLETING, Point.COMPLETED): Kind.SCHEDULE,
    (Point.COMPLETED, Point.DELIVERED): Kind.DELIVER,
}
_DOWN = (Point.SCHEDULING, Point.SCHEDULED, Point.ENCODING, Point.ENCODED)
_STAGE = (Point.ARRIVED, Point.DECODED, Point.BEGAN, Point.ENDED, Point.ENCODING, Point.ENCODED)
_HOME = (Point.ARRIVED, Point.DECODED, Point.COMPLETING, Point.COMPLETED, Point.DELIVERED)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passing:
    """A step passed a point."""

    place: Place
    point: Point
    at_s: float
    joined: bool = True  # nothing that is not recorded came before it


class Timeline:
    """The parts of every step and sequence of a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.moved_s = 0.0  # the most by which a time was moved, see the rules
        self._stages: dict[Epoch, list[StageRecord]] = defaultdict(list)
        for stage in sorted(trace.stages, key=lambda stage: (stage.place.first_layer, stage.place.last_layer)):
            self._stages[stage.epoch].append(stage)
        self.steps = {step.step: self._step_parts(step) for step in trace.steps}
        self._epochs = {step.step: step.epoch for step in trace.steps}
        self._steps_of: dict[SequenceId, list[StepId]] = defaultdict(list)
        for step in trace.steps:
            for seq, _ in step.chunks:
                self._steps_of[SequenceId(seq)].append(step.step)

    def _step_parts(self, step: StepRecord) -> tuple[Part, ...]:
        parts: list[Part] = []
        before: _Passing | None = None
        for passing in self._passings(step):
            if before is not None:
                kind = _KINDS.get((before.point, passing.point)) if passing.joined else None
                # A wire belongs to the place that it leads to.
                parts.append(
                    Part(
                        kind=kind or Kind.UNRECORDED,
                        place=passing.place,
                        began_s=before.at_s,
                        ended_s=passing.at_s,
                        step=step.step,
                    )
                )
            before = passing
        return tuple(parts)

    def _passings(self, step: StepRecord) -> Iterator[_Passing]:
        """All that is known of a step, in its order and never backwards in time."""
        head, times_s = self.trace.head, step.times_s
        last_s = times_s[_DOWN[0]]
        for point in _DOWN:
            if not math.isnan(times_s[point]):
                last_s = max(last_s, times_s[point])
                yield _Passing(place=head, point=point, at_s=last_s)
        home_s = next((times_s[point] for point in _HOME if not math.isnan(times_s[point])), math.inf)
        layer = 0
        for stage in self._stages[step.epoch]:
            if (noted := stage.times_s.get(step.step)) is None:
                continue
            joined = stage.place.first_layer == layer
            layer = stage.place.last_layer
            for point in _STAGE:
                if not math.isnan(noted[point]):
                    meant_s = stage.clock.here_s(noted[point])
                    at_s = max(last_s, min(meant_s, home_s))
                    self.moved_s = max(self.moved_s, abs(at_s - meant_s))
                    last_s = at_s
                    yield _Passing(place=stage.place, point=point, at_s=at_s, joined=joined)
                    joined = True
        joined = layer == self.trace.num_layers
        for point in _HOME:
            if not math.isnan(times_s[point]):
                last_s = max(last_s, times_s[point])
                yield _Passing(place=head, point=point, at_s=last_s, joined=joined)
                joined = True

    def sequence_parts(self, sequence: SequenceRecord) -> tuple[Part, ...]:
        """From the arrival of the request to the end of the answer, without gap or overlap; parts that took no time
        are left out."""
        head = self.trace.head
        chains = [self.steps[step] for step in self._steps_of[sequence.seq] if self.steps[step]]
        path: list[Part] = []
        limit_s = sequence.ended_s
        if chains:
            last = max(chains[-1][-1].ended_s, chains[-1][0].began_s)
            path.append(Part(kind=Kind.REPLY, place=head, began_s=min(last, limit_s), ended_s=limit_s))
            limit_s = min(last, limit_s)
            limit_s = self._walk_back(chains, path, limit_s)
        queued_s = min(max(sequence.submitted_s, sequence.arrived_s), limit_s)
        kind = Kind.QUEUE if chains or sequence.first_step is None else Kind.UNRECORDED
        path.append(Part(kind=kind, place=head, began_s=queued_s, ended_s=limit_s))
        path.append(Part(kind=Kind.PREPARE, place=head, began_s=sequence.arrived_s, ended_s=queued_s))
        return tuple(part for part in reversed(path) if part.ended_s > part.began_s)

    def _walk_back(self, chains: Sequence[tuple[Part, ...]], path: list[Part], limit_s: float) -> float:
        """The path through the steps, last part first, up to the beginning of the first step."""
        index, place = len(chains) - 1, len(chains[-1]) - 1
        while True:
            part = chains[index][place]
            earlier = _earlier_compute(chains[index - 1], part) if index and part.kind is Kind.WAIT else None
            if earlier is not None and part.began_s < (done_s := chains[index - 1][earlier].ended_s) <= limit_s:
                path.append(_clipped(part, done_s, limit_s))
                index, place, limit_s = index - 1, earlier, done_s
                continue
            path.append(_clipped(part, part.began_s, limit_s))
            limit_s = min(limit_s, part.began_s)
            place -= 1
            if place < 0:
                if index == 0:
                    return limit_s
                index, before_s = index - 1, limit_s
                # The next step may leave before this one's tokens are delivered.
                place = max(
                    (number for number, each in enumerate(chains[index]) if _is_open(each, before_s)), default=0
                )
                done_s = min(chains[index][place].ended_s, before_s)
                kind = Kind.IDLE if self._epoch_of(chains[index]) == self._epoch_of(chains[index + 1]) else Kind.REPLAN
                path.append(Part(kind=kind, place=self.trace.head, began_s=done_s, ended_s=before_s))
                limit_s = done_s

    def _epoch_of(self, chain: Sequence[Part]) -> Epoch | None:
        step = chain[0].step
        return None if step is None else self._epochs[step]


def _is_open(part: Part, at_s: float) -> bool:
    return part.kind is not Kind.DELIVER and part.began_s < at_s


def _earlier_compute(chain: Sequence[Part], wait: Part) -> int | None:
    """Where in an earlier step's chain the engine is busy for which a part waits."""
    return next(
        (number for number, part in enumerate(chain) if part.kind is Kind.COMPUTE and part.place == wait.place), None
    )


def _clipped(part: Part, began_s: float, ended_s: float) -> Part:
    return replace(part, began_s=min(began_s, ended_s), ended_s=ended_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """All parts of one kind at one place."""

    kind: Kind
    place: str
    num_parts: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What adds up to what. `recorded_s` is the sum of all shares but those that are unrecorded."""

    title: str
    wall_s: float
    recorded_s: float
    shares: tuple[Share, ...]  # the largest first


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockStatement:
    """How well a stage's clock is known."""

    place: str
    is_shared: bool  # the head's own clock
    offset_s: float
    error_s: float  # at the trace's beginning or end, whichever is further from when the clocks were compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A trace in figures."""

    began_s: float
    ended_s: float
    num_steps: int
    accounts: tuple[Account, ...]  # of every sequence; of all steps together where the trace is of none
    computing: tuple[Share, ...]  # of every stage, all steps between the trace's beginning and end
    clocks: tuple[ClockStatement, ...]
    moved_s: float
    missing: tuple[str, ...]


def summarize(timeline: Timeline) -> Summary:
    trace = timeline.trace
    steps = [part for parts in timeline.steps.values() for part in parts]
    accounts = [
        account(
            f"request {sequence.request}, choice {sequence.choice}",
            sequence.ended_s - sequence.arrived_s,
            timeline.sequence_parts(sequence),
        )
        for sequence in trace.sequences
    ]
    if not accounts:
        wall_s = math.fsum(parts[-1].ended_s - parts[0].began_s for parts in timeline.steps.values() if parts)
        title = f"{len(timeline.steps)} steps, one after the other"
        accounts = [account(title, wall_s, steps)]
    return Summary(
        began_s=trace.began_s,
        ended_s=trace.ended_s,
        num_steps=len(trace.steps),
        accounts=tuple(accounts),
        computing=account("", 0.0, [part for part in steps if part.kind is Kind.COMPUTE]).shares,
        clocks=tuple(
            ClockStatement(
                place=str(stage.place),
                is_shared=stage.clock.error_s == 0.0,
                offset_s=stage.clock.offset_s,
                error_s=max(stage.clock.error_at(trace.began_s), stage.clock.error_at(trace.ended_s)),
            )
            for stage in trace.stages
        ),
        moved_s=timeline.moved_s,
        missing=trace.missing,
    )


def account(title: str, wall_s: float, parts: Sequence[Part]) -> Account:
    """The parts by kind and place."""
    seconds: dict[tuple[Kind, str], list[float]] = defaultdict(list)
    for part in parts:
        seconds[part.kind, str(part.place)].append(part.duration_s)
    shares = [
        Share(kind=kind, place=place, num_parts=len(each), seconds=math.fsum(each))
        for (kind, place), each in seconds.items()
    ]
    return Account(
        title=title,
        wall_s=wall_s,
        recorded_s=math.fsum(share.seconds for share in shares if share.kind is not Kind.UNRECORDED),
        shares=tuple(sorted(shares, key=lambda share: -share.seconds)),
    )
