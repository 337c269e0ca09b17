"""`/tllm/v1/trace` and `/tllm/v1/traces/ID`: where the time went, as a file that Perfetto opens.

A request that is sent with `X-Tllm-Trace: 1` can be asked for afterwards; a window needs nothing but the question.
Traces hold times, counts and ids, and nothing of what was said.

This file does not know how times are noted, nor the file's format.
"""

from __future__ import annotations

import asyncio
import math
import time

from starlette.requests import Request
from starlette.responses import Response

from tllm.api.errors import NEVER_HEALS, ErrorReply, RefusedError, not_found
from tllm.api.sse import while_connected
from tllm.api.state import ApiState
from tllm.api.traced import TracedRequest
from tllm.cluster.chrome_trace import chrome_trace
from tllm.cluster.status import Cluster
from tllm.cluster.tracing import SequenceRecord, Timeline, Trace
from tllm.core.errors import RequestError

MAX_WINDOW_S = 60.0


async def trace_window(request: Request, state: ApiState) -> Response:
    """Everything from now on, for as many seconds as are asked for."""
    cluster = _cluster(state)
    seconds = _seconds(request.query_params.get("seconds", "5"))

    async def window() -> Trace:
        began_s = time.perf_counter()
        await asyncio.sleep(seconds)
        return await cluster.trace(began_s, time.perf_counter())

    return await _file(await while_connected(request.receive, window()))


async def trace_request(request: Request, state: ApiState) -> Response:
    """One request that has ended."""
    cluster = _cluster(state)
    name = str(request.path_params["request_id"])
    if (traced := state.traced.find(name)) is None:
        raise RefusedError(
            not_found(
                f"No traced request has the id {name[:200]!r}. Send the header X-Tllm-Trace: 1 with a request, and ask "
                "soon: the last few hundred are remembered.",
                param="request_id",
                code="trace_not_found",
            )
        )
    sequences = _sequences(traced)
    trace = await cluster.trace(traced.arrived_s, max(each.ended_s for each in sequences), sequences)
    oldest = trace.oldest_step
    if oldest is not None and any(each.first_step is not None and each.first_step < oldest for each in sequences):
        raise RefusedError(
            not_found(
                f"What was noted of request {name[:200]!r} has been overwritten by later steps. Ask sooner.",
                param="request_id",
                code="trace_overwritten",
            )
        )
    return await _file(trace)


def _sequences(traced: TracedRequest) -> tuple[SequenceRecord, ...]:
    if traced.is_running:
        raise RefusedError(
            ErrorReply(
                status=409,
                message=f"Request {traced.id} is still being answered. Ask for its trace when it has ended.",
                type="invalid_request_error",
                param="request_id",
                code="request_running",
                headers=NEVER_HEALS,
            )
        )
    return tuple(
        SequenceRecord(
            request=traced.id,
            choice=choice.index,
            seq=choice.generation.seq,
            arrived_s=traced.arrived_s,
            submitted_s=choice.generation.arrived_s,
            ended_s=choice.ended_s or 0.0,
            first_step=choice.generation.first_step,
        )
        for choice in traced.choices
    )


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_WINDOW_S:
        raise RequestError(
            f"'seconds' is {given[:50]!r}; it must be a number above 0 and at most {MAX_WINDOW_S:g}.", param="seconds"
        )
    return seconds


def _cluster(state: ApiState) -> Cluster:
    if state.cluster is None:
        raise RefusedError(not_found("This server has no cluster behind it.", code="no_cluster"))
    return state.cluster


async def _file(trace: Trace) -> Response:
    """Written beside the event loop: a minute of steps is megabytes."""
    text = await asyncio.to_thread(lambda: chrome_trace(Timeline(trace)))
    return Response(text.encode(), media_type="application/json")
