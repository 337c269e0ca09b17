"""The arithmetic of inference: how long a step takes on a stage, and how long steps take in a row of stages and links.

    stage of n layers, r rows   step_s + n * layer_s(r), and head_s(rows sampled) on the last
    one token of one stream     the sum of all stages and hops, and what the head itself does for a step
    S streams, K stages         m = min(S, K) steps of S / m rows are in flight:
                                cycle = max(m * slowest stage, link or head; the sum), tokens/s = S / cycle

Between measured numbers of rows everything is a straight line, and beyond the last the line goes on.

Sources: kipply, Transformer Inference Arithmetic (2022); the flow shop of a chunked prefill is exact, job by job.

This file does not know plans, nor where seconds come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tllm.planner.profile import ModelProfile, NodeProfile, Speed

ESTIMATED_STEP_S = 0.5e-3  # that a stage takes for a step whatever is in it


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpeed:
    """Seconds of a worker's parts for one number of rows."""

    step_s: float
    layer_s: float
    head_s: float

    def seconds(self, num_layers: int, *, head: bool) -> float:
        return self.step_s + num_layers * self.layer_s + self.head_s * head


def stage_speed(speed: Speed, num_rows: float, num_sampled: float) -> StageSpeed:
    """`num_sampled`: rows that the last stage projects; of a prompt's chunk at most one."""
    return StageSpeed(
        step_s=speed.step_s,
        layer_s=interpolate(speed.rows, speed.layer_s, num_rows),
        head_s=interpolate(speed.rows, speed.head_s, num_sampled) if num_sampled else 0.0,
    )


def interpolate(rows: Sequence[int], seconds: Sequence[float], num_rows: float) -> float:
    """Piecewise linear; constant below the first, by the last slope beyond the last, and never falling there.

    A single measurement is taken to be proportional beyond its rows.
    """
    if num_rows <= rows[0]:
        return seconds[0]
    for index, (left, right) in enumerate(pairwise(rows)):
        if num_rows <= right:
            share = (num_rows - left) / (right - left)
            return seconds[index] * (1 - share) + seconds[index + 1] * share
    if len(rows) == 1:
        return seconds[0] * num_rows / rows[0]
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2]))
    return seconds[-1] + slope * (num_rows - rows[-1])


def steps_in_flight(num_streams: int, num_stages: int) -> int:
    return min(num_streams, num_stages)


def cycle_s(num_steps: int, slowest_s: float, sum_s: float) -> float:
    """From one step of a stream to its next, with `num_steps` of equal size in flight."""
    return sum_s if num_steps == 1 else max(num_steps * slowest_s, sum_s)


@dataclass(frozen=True, slots=True)
class Job:
    """What one machine of a row does for one chunk: it is busy with it, then the chunk is under way to the next."""

    busy_s: float
    delay_s: float = 0.0


def flow_shop_s(chunks: Sequence[Sequence[Job]], *, window: int) -> float:
    """From the first chunk's arrival at the first machine to the last one's departure from the last.

    `chunks[i][r]` is what machine `r` does for chunk `i`. Every machine takes chunks in order, one at a time; chunk `i`
    does not begin before chunk `i - window` has passed all machines.
    """
    free_s = [0.0] * len(chunks[0])
    home_s: list[float] = []
    for index, jobs in enumerate(chunks):
        now_s = home_s[index - window] if index >= window else 0.0
        for machine, job in enumerate(jobs):
            free_s[machine] = max(now_s, free_s[machine]) + job.busy_s
            now_s = free_s[machine] + job.delay_s
        home_s.append(now_s)
    return home_s[-1]


def crowding(node: NodeProfile) -> float:
    """How much longer a stage takes while all workers of its node compute: they may have more threads than it."""
    return max(1.0, node.num_workers / max(node.num_threads, 1))


def estimated_speed(
    model: ModelProfile, *, bytes_per_s: float, flop_per_s: float, step_s: float = ESTIMATED_STEP_S
) -> Speed:
    """What memory and arithmetic allow at best, where nothing was measured."""
    rows = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    layer_bytes = sum(model.layer_bytes) / model.num_layers

    def seconds(num_bytes: float) -> tuple[float, ...]:
        flop = 2 * num_bytes / model.bytes_per_weight  # a multiplication and an addition for every weight and row
        return tuple(max(num_bytes / bytes_per_s, num_rows * flop / flop_per_s) for num_rows in rows)

    return Speed(rows=rows, layer_s=seconds(layer_bytes), head_s=seconds(model.head_bytes), step_s=step_s)
