"""The arithmetic of inference: how long a step takes on a stage, and how long steps take in a row of stages and links.

    stage of n layers, r rows   step_s + n * layer_s(r), and head_s(rows sampled) on the last
    one token of one stream     the sum of all stages and hops, and what the head itself does for a step
    S streams, K stages         m = min(S, K) steps of S / m rows are in flight:
                                cycle = max(m * slowest stage, link or head; the sum), tokens/s = S / cycle

Between measured numbers of rows everything is a straight line, and beyond the last the line goes on. Beside that what
follows from bytes and FLOP alone: what bounds an operator, from how many tokens on, and how many tokens fit.

Sources: kipply, Transformer Inference Arithmetic (2022), called the article; the flow shop of a chunked prefill is
exact, job by job.

This file does not know plans, models, nor where seconds come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tllm.planner.profile import ModelProfile, NodeProfile, Speed

ESTIMATED_STEP_S = 0.5e-3  # that a stage takes for a step whatever is in it
FLOP_PER_WEIGHT = 2  # a multiplication and an addition for every weight and row


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpeed:
    """Seconds of a worker's parts for one number of rows."""

    step_s: float
    layer_s: float
    head_s: float

    def seconds(self, num_layers: int, *, head: bool) -> float:
        return self.step_s + num_layers * self.layer_s + self.head_s * head


def stage_speed(speed: Speed, num_rows: float, num_sampled: float, *, attention_s: float = 0.0) -> StageSpeed:
    """`num_sampled`: rows that the last stage projects; of a prompt's chunk at most one. `attention_s`: a layer's."""
    return StageSpeed(
        step_s=speed.step_s,
        layer_s=interpolate(speed.rows, speed.layer_s, num_rows) + attention_s,
        head_s=interpolate(speed.rows, speed.head_s, num_sampled) if num_sampled else 0.0,
    )


def decode_attention_s(speed: Speed, num_rows: float, context: float) -> float:
    """One layer's attention for `num_rows` sequences, each with one new token and `context` positions to look at."""
    return num_rows * context * speed.read_s


def chunk_attention_s(speed: Speed, start: int, num_rows: int) -> float:
    """One layer's attention for rows `start, start + 1, ...` of one prompt: KV is read once, and every row looks at all
    positions up to its own; what takes longer counts."""
    return max((start + num_rows) * speed.read_s, num_pairs(num_rows, start) * speed.pair_s)


def num_pairs(num_tokens: int, cached: int, window: int | None = None) -> int:
    """Pairs of a token and a position it looks at: token `i` of those after `cached` others looks at `cached + i + 1`,
    and never at more than the window."""
    num_full = num_tokens if window is None else min(max(window - cached, 0), num_tokens)
    num_windows = (num_tokens - num_full) * (window or 0)
    return num_full * cached + num_full * (num_full + 1) // 2 + num_windows


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
        flop = FLOP_PER_WEIGHT * num_bytes / model.bytes_per_weight
        return tuple(
            operator_s(num_bytes, num_rows * flop, bytes_per_s=bytes_per_s, flop_per_s=flop_per_s) for num_rows in rows
        )

    return Speed(rows=rows, layer_s=seconds(layer_bytes), head_s=seconds(model.head_bytes), step_s=step_s)


# What bounds an operator


def operator_s(num_bytes: float, flop: float, *, bytes_per_s: float, flop_per_s: float) -> float:
    """Memory and arithmetic work at the same time; what takes longer counts. Of operators after one another each has
    its own maximum: the sum of these is more than the maximum of sums."""
    return max(num_bytes / bytes_per_s, flop / flop_per_s)


def crossover_tokens(*, flop_per_s: float, bytes_per_s: float, bytes_per_weight: float = 2) -> float:
    """Tokens of a step from which on arithmetic takes longer than reading the weights: below it they cost one reading.

    The article's 208 on an A100; both sides gain the same factor, so it holds for every matrix and for all together.
    """
    return flop_per_s * bytes_per_weight / (FLOP_PER_WEIGHT * bytes_per_s)


def least_width_per_chip(*, flop_per_s: float, link_bytes_per_s: float) -> float:
    """Outputs of a matrix at 16 bit from which on computing takes longer than sending its inputs: FLOP per byte, 1040
    on an A100. The article, on batch sizes."""
    return flop_per_s / link_bytes_per_s


def matmul_flop(num_rows: int, num_inputs: int, num_outputs: int) -> int:
    return FLOP_PER_WEIGHT * num_rows * num_inputs * num_outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Intermediates:
    """The time of softmax, norms, activations and residuals, for each second of matrices and of all together."""

    of_matrices: float
    of_total: float


def intermediates(hidden_size: int) -> Intermediates:
    """Scaled from Data Movement Is All You Need (2021): 43 % of the time at a width of 1024. They are bound by memory
    and grow with the width, matrices with its square. A rough figure: how much is fused decides."""
    ratio = hidden_size / 1024
    between, matrices = 0.43 * ratio, 0.57 * ratio**2
    return Intermediates(of_matrices=between / matrices, of_total=between / (between + matrices))


def num_weight_reads(num_tokens: int, *, rows_per_read: int = 4) -> int:
    """How often a kernel for weights of few bits reads them: it blocks so many rows. Up to four tokens cost one
    reading, the fifth a second one."""
    return math.ceil(num_tokens / rows_per_read)


def lora_flop(*, rank: int, num_inputs: int, num_outputs: int) -> int:
    """Of one token and one adapted matrix."""
    return FLOP_PER_WEIGHT * rank * (num_inputs + num_outputs)


def lora_bytes(*, rank: int, num_inputs: int, num_outputs: int, bytes_per_element: float = 2) -> float:
    """Of one adapter of one matrix, read by a step that has it in its batch."""
    return rank * (num_inputs + num_outputs) * bytes_per_element


# What fits


def free_bytes(*, memory_bytes: int, weight_bytes: int, activation_bytes: int = 0, reserve_bytes: int = 0) -> int:
    """What is left for KV; nothing where the rest does not fit."""
    return max(0, memory_bytes - weight_bytes - activation_bytes - reserve_bytes)


def kv_tokens(num_free_bytes: float, kv_bytes_per_token: float) -> int:
    """Positions that fit, of all sequences together. Never rounded up: a part of a position is none."""
    return math.floor(num_free_bytes / kv_bytes_per_token)


def kv_blocks(num_free_bytes: float, *, block_size: int, kv_bytes_per_token: float) -> int:
    """Blocks that fit on a stage, whose layers' bytes are given. Of a pipeline the least of its stages counts."""
    return math.floor(num_free_bytes / (block_size * kv_bytes_per_token))


def num_sequences(num_tokens: int, context: int) -> int:
    """Sequences of so many positions that fit into `num_tokens`."""
    return num_tokens // context


def tokens_of_equal_bytes(weight_bytes: float, kv_bytes_per_token: float) -> int:
    """Positions in cache that take as long to read as all weights."""
    return math.floor(weight_bytes / kv_bytes_per_token)


# What was measured, taken apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """y = intercept + slope * x; `residual` is the root of the mean square of what is left, in the unit of y."""

    intercept: float
    slope: float
    residual: float

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """By least squares. Two different x at least."""
    assert len(set(xs)) > 1, "a line needs two points"
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    pairs = list(zip(xs, ys, strict=True))
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in pairs) / math.fsum((x - mean_x) ** 2 for x in xs)
    intercept = mean_y - slope * mean_x
    left = math.fsum((y - intercept - slope * x) ** 2 for x, y in pairs)
    return Line(intercept=intercept, slope=slope, residual=math.sqrt(left / len(pairs)))


def first_token_s(num_tokens: int, *, tokens_per_s: float, decode_tokens_per_s: float) -> float:
    """Until the first of an answer's tokens, where only two rates are known: that of the whole request, and that of
    the tokens after the first."""
    return num_tokens / tokens_per_s - (num_tokens - 1) / decode_tokens_per_s


def mean_batch_latency_s(total_s: float, num_batches: int) -> float:
    """Of requests that all arrive at 0 and are served in equal batches one after another: batch i of n is done after
    i / n of the time. Service time alone would hide that the others wait."""
    return total_s * (num_batches + 1) / (2 * num_batches)
