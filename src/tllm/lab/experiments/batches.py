"""Static batches imposed on requests, and what becomes of every request: the policy, its clock, its figures.

    arrivals     0 1 2 3     4 5 ...               all at once, or at random moments of a given rate
    batch of 4   [0 1 2 3]──served──▶[4 5 ..]──▶   leaves when it is full, or `window` after its first request came, but
                                                   never before the batch in front of it is done
    continuous   every request leaves when it arrives, and the scheduler batches steps, not requests

    latency = queue + service       queue: from arrival until its batch leaves (continuous: until its first step)

This file does not know what serves a request, nor any clock but the one it is given.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from tllm.lab.statistics import percentile

POISSON: Final = "poisson"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """When requests leave together. Both fields are known before anything arrives."""

    size: int
    window_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """Requests `first` to `stop - 1`, in order of arrival, leave at this moment."""

    at_s: float
    first: int
    stop: int


def departure(arrivals_s: Sequence[float], first: int, free_s: float, batching: Batching) -> Departure:
    """The next batch: `first` is the request that has waited longest, `free_s` when the batch before is done.

    Nobody knows that no more requests will come: the last, unfilled batch waits for its window as well.
    """
    full = first + batching.size - 1
    due_s = arrivals_s[first] + batching.window_s
    if full < len(arrivals_s):
        due_s = min(due_s, arrivals_s[full])
    at_s = max(due_s, free_s)
    stop = first + 1
    while stop < len(arrivals_s) and stop - first < batching.size and arrivals_s[stop] <= at_s:
        stop += 1
    return Departure(at_s=at_s, first=first, stop=stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request, in seconds of one clock."""

    arrived_s: float
    left_s: float  # for the pipeline
    first_token_s: float
    done_s: float
    num_tokens: int


class Clock(Protocol):
    def now_s(self) -> float: ...

    async def until(self, at_s: float) -> None: ...


class WallClock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self.began_s

    async def until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.now_s()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of one request that was let go, in seconds of the same clock."""

    began_s: float  # its first step
    first_token_s: float
    done_s: float
    num_tokens: int


Serve = Callable[[int], Awaitable[Done]]  # of the request with this number


async def in_batches(arrivals_s: Sequence[float], batching: Batching, clock: Clock, serve: Serve) -> tuple[Served, ...]:
    """All requests, a batch at a time. `arrivals_s` ascend."""
    served: list[Served] = []
    while len(served) < len(arrivals_s):
        leaving = departure(arrivals_s, len(served), clock.now_s(), batching)
        await clock.until(leaving.at_s)
        done = await asyncio.gather(*(serve(request) for request in range(leaving.first, leaving.stop)))
        served += [
            Served(
                arrived_s=arrivals_s[request],
                left_s=leaving.at_s,
                first_token_s=each.first_token_s,
                done_s=each.done_s,
                num_tokens=each.num_tokens,
            )
            for request, each in zip(range(leaving.first, leaving.stop), done, strict=True)
        ]
    return tuple(served)


async def as_they_come(arrivals_s: Sequence[float], clock: Clock, serve: Serve) -> tuple[Served, ...]:
    """All requests, each at its moment."""

    async def one(request: int) -> Served:
        await clock.until(arrivals_s[request])
        done = await serve(request)
        return Served(
            arrived_s=arrivals_s[request],
            left_s=done.began_s,
            first_token_s=done.first_token_s,
            done_s=done.done_s,
            num_tokens=done.num_tokens,
        )

    return tuple(await asyncio.gather(*(one(request) for request in range(len(arrivals_s)))))


def arrivals(kind: str, number: int, rate_per_s: float, seed: int) -> tuple[float, ...]:
    """Seconds from the first one on; Poisson: intervals between them are exponential with mean 1 / rate."""
    generator = random.Random(seed)
    now_s, moments = 0.0, []
    for _ in range(number):
        moments.append(now_s)
        now_s += generator.expovariate(rate_per_s) if kind == POISSON else 0.0
    return tuple(moments)


def metrics(served: Sequence[Served]) -> dict[str, float]:
    """Tokens are counted; total is from the first arrival to the last token; latency is from arrival."""
    total_s = max(each.done_s for each in served) - min(each.arrived_s for each in served)
    latencies_s = [each.done_s - each.arrived_s for each in served]
    num_tokens = sum(each.num_tokens for each in served)
    number = len(served)
    return {
        "total_s": total_s,
        "throughput_tokens_per_s": num_tokens / total_s,
        "mean_latency_s": sum(latencies_s) / number,
        "p95_latency_s": percentile(latencies_s, 95),
        "mean_queue_s": sum(each.left_s - each.arrived_s for each in served) / number,
        "mean_service_s": sum(each.done_s - each.left_s for each in served) / number,
        "mean_ttft_s": sum(each.first_token_s - each.arrived_s for each in served) / number,
        "num_tokens": num_tokens,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTime:
    """Of a batch, as predicted: seconds to its first tokens, and to all of them."""

    first_s: float
    all_s: float


def simulated(
    arrivals_s: Sequence[float], batching: Batching, service: Callable[[int], ServiceTime], num_tokens: int
) -> tuple[Served, ...]:
    """What `in_batches` would see if a batch of so many requests took so long, without waiting for it."""
    served: list[Served] = []
    free_s = 0.0
    while len(served) < len(arrivals_s):
        leaving = departure(arrivals_s, len(served), free_s, batching)
        taken = service(leaving.stop - leaving.first)
        free_s = leaving.at_s + taken.all_s
        served += [
            Served(
                arrived_s=arrivals_s[request],
                left_s=leaving.at_s,
                first_token_s=leaving.at_s + taken.first_s,
                done_s=free_s,
                num_tokens=num_tokens,
            )
            for request in range(leaving.first, leaving.stop)
        ]
    return tuple(served)
