"""A trace in the Trace Event Format of Chrome, which Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

    process    one for the head, one for every worker, one for each choice of a traced request
    track      compute, serialize, schedule ...; two parts at once on one track get tracks of their own
    arrows     follow a step from process to process

The format: "Trace Event Format", Nat Duca and Dan Sinclair, 2016. Times are in microseconds from the trace's beginning.

This file does not know how parts come about.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from tllm.cluster.tracing import Kind, Part, Place, SequenceRecord, Summary, Timeline, summarize

Event = dict[str, object]

_TRACKS = 10_000  # of a process at most; viewers differ in whether two processes may have tracks of one number
_ON_ARROWS = (Kind.SCHEDULE, Kind.COMPUTE)
_ORDER = {kind: number for number, kind in enumerate(Kind)}


def chrome_trace(timeline: Timeline) -> str:
    """The file's text. Beside `traceEvents`, `tllm` holds a Summary for programs."""
    content = {
        "traceEvents": list(_events(timeline)),
        "displayTimeUnit": "ms",
        "tllm": asdict(summarize(timeline)),
    }
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _events(timeline: Timeline) -> Iterator[Event]:
    trace, summary = timeline.trace, summarize(timeline)
    origin_s = min([trace.began_s, *(parts[0].began_s for parts in timeline.steps.values() if parts)])
    tokens = {step.step: sum(number for _, number in step.chunks) for step in trace.steps}
    sequences = {step.step: [seq for seq, _ in step.chunks] for step in trace.steps}
    places = [trace.head, *dict.fromkeys(stage.place for stage in trace.stages)]
    processes = {place: number for number, place in enumerate(places, 1)}
    process = 0
    for place, process in processes.items():
        yield from _process(process, _title(place, summary), place.worker and "worker")
        parts = [part for each in timeline.steps.values() for part in each if part.place == place]
        for track, name, part in _tracks(parts, process * _TRACKS):
            about: dict[str, object] = {"step": part.step}
            if part.step is not None:
                about |= {"sequences": sequences[part.step], "tokens": tokens[part.step]}
            yield from _slice(process, track, name, part, origin_s, about)
            if part.step is not None and part.kind in _ON_ARROWS:
                yield from _arrow(process, track, part, timeline.steps[part.step], origin_s)
    for sequence in trace.sequences:
        process += 1
        yield from _process(process, _request_title(sequence), "request")
        yield _named(process, process * _TRACKS, "thread_name", "its path")
        for part in timeline.sequence_parts(sequence):
            about = {"at": str(part.place)} | ({} if part.step is None else {"step": part.step})
            yield from _slice(process, process * _TRACKS, None, part, origin_s, about)


def _title(place: Place, summary: Summary) -> str:
    clock = next((clock for clock in summary.clocks if clock.place == str(place)), None)
    if clock is None:
        return str(place)
    known = "the head's clock" if clock.is_shared else f"clock \N{PLUS-MINUS SIGN} {clock.error_s * 1e3:.3g} ms"
    return f"{place} ({known})"


def _request_title(sequence: SequenceRecord) -> str:
    return f"request {sequence.request}, choice {sequence.choice} (sequence {sequence.seq})"


def _process(process: int, title: str, label: str) -> Iterator[Event]:
    yield _named(process, 0, "process_name", title)
    if label:
        yield {"ph": "M", "pid": process, "tid": 0, "name": "process_labels", "args": {"labels": label}}
    yield {"ph": "M", "pid": process, "tid": 0, "name": "process_sort_index", "args": {"sort_index": process}}


def _named(process: int, track: int, what: str, name: str) -> Event:
    return {"ph": "M", "pid": process, "tid": track, "name": what, "args": {"name": name}}


def _tracks(parts: Sequence[Part], track: int) -> Iterator[tuple[int, str | None, Part]]:
    """Every part with its track, numbered after `track`, and with its name where the part is the first one there."""
    by_kind: dict[Kind, list[Part]] = defaultdict(list)
    for part in parts:
        by_kind[part.kind].append(part)
    for kind in sorted(by_kind, key=_ORDER.__getitem__):
        lanes = cut_into_lanes(by_kind[kind])
        for number, lane in enumerate(lanes, 1):
            track += 1
            name: str | None = kind.value if len(lanes) == 1 else f"{kind.value} {number}"
            for part in lane:
                yield track, name, part
                name = None


def cut_into_lanes(parts: Sequence[Part]) -> list[list[Part]]:
    """As few lists as possible in which no part begins before the one before has ended."""
    lanes: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: (part.began_s, part.ended_s)):
        free = next((lane for lane in lanes if lane[-1].ended_s <= part.began_s), None)
        if free is None:
            lanes.append(free := [])
        free.append(part)
    return lanes


def _slice(
    process: int, track: int, track_name: str | None, part: Part, origin_s: float, about: dict[str, object]
) -> Iterator[Event]:
    if track_name is not None:
        yield _named(process, track, "thread_name", track_name)
    yield {
        "ph": "X",
        "pid": process,
        "tid": track,
        "name": part.kind.value,
        "cat": part.kind.value,
        "ts": _us(part.began_s - origin_s),
        "dur": _us(part.duration_s),
        "args": about,
    }


def _arrow(process: int, track: int, part: Part, step: Sequence[Part], origin_s: float) -> Iterator[Event]:
    """A step's way: from its scheduling over every computation to the taking of its result."""
    chain = [each for each in step if each.kind in _ON_ARROWS]
    if len(chain) < 2:
        return
    phase = "s" if part == chain[0] else "f" if part == chain[-1] else "t"
    event: Event = {
        "ph": phase,
        "pid": process,
        "tid": track,
        "name": "step",
        "cat": "step",
        "id": part.step,
        "ts": _us(part.began_s - origin_s),
    }
    yield event | ({"bp": "e"} if phase == "f" else {})


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
