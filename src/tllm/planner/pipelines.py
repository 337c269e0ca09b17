"""Pipelines in closed form: chunks that overlap, steps in flight, codecs, drafts.

    T(K) = sum of t_r + (K - 1) * max of t_r + sum of latencies       t_r: of one chunk, at each stage and on each link
           K chunks of equal work go through stages and links in a row; K = 1 is one after the other

The same as `cost.flow_shop_s` where all chunks are alike and as many may be under way as there are. Stages do chunk by
chunk 1/K of their work, and what every step costs; links carry 1/K of the bytes.

This file does not know models, nor what stages are made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tllm.planner.cost import Job, cycle_s
from tllm.planner.network import Edge

_DOUBLINGS = 200  # of a rate, until no faster link is tried
_HALVINGS = 200


def chunked_prefill_s(
    stage_s: Sequence[float], edges: Sequence[Edge], *, num_bytes: float, num_chunks: int, step_s: float = 0.0
) -> float:
    """From the prompt to its last chunk at the end of the row. `stage_s`: of the whole prompt on each stage, without
    `step_s`, which each chunk costs each stage; `num_bytes`: of the whole prompt's hidden states on each edge."""
    busy_s = [seconds / num_chunks + step_s for seconds in stage_s]
    busy_s += [edge.occupied_s(num_bytes / num_chunks) for edge in edges]
    latency_s = math.fsum(edge.latency_s for edge in edges)
    return math.fsum(busy_s) + (num_chunks - 1) * max(busy_s) + latency_s


def chunk_jobs(
    stage_s: Sequence[float], edges: Sequence[Edge], *, num_bytes: float, num_chunks: int, step_s: float = 0.0
) -> list[list[Job]]:
    """The same chunks for `cost.flow_shop_s`, which can also limit how many are under way: stages first, then edges;
    the order of machines in a row does not matter to equal chunks."""
    jobs = [Job(seconds / num_chunks + step_s) for seconds in stage_s]
    jobs += [Job(edge.occupied_s(num_bytes / num_chunks), edge.latency_s) for edge in edges]
    return [jobs] * num_chunks


def best_num_chunks(
    stage_s: Sequence[float], edges: Sequence[Edge], *, num_bytes: float, max_chunks: int, step_s: float = 0.0
) -> int:
    """With which the prompt is through soonest; the fewest of equals."""
    return min(
        range(1, max_chunks + 1),
        key=lambda num: chunked_prefill_s(stage_s, edges, num_bytes=num_bytes, num_chunks=num, step_s=step_s),
    )


def prefill_bytes_per_s(
    stage_s: Sequence[float],
    *,
    num_bytes: float,
    num_hops: int,
    num_chunks: int,
    target_s: float,
    latency_s: float = 0.0,
    step_s: float = 0.0,
) -> float | None:
    """The slowest links with which the prompt is through within `target_s`; None where no link is fast enough. Found by
    halving: a faster link never takes longer."""

    def takes_s(bytes_per_s: float) -> float:
        edges = [Edge(latency_s=latency_s, bytes_per_s=bytes_per_s, measured=False)] * num_hops
        return chunked_prefill_s(stage_s, edges, num_bytes=num_bytes, num_chunks=num_chunks, step_s=step_s)

    if takes_s(math.inf) >= target_s:
        return None
    too_slow, enough = 0.0, 1.0
    for _ in range(_DOUBLINGS):
        if takes_s(enough) <= target_s:
            break
        too_slow, enough = enough, 2 * enough
    for _ in range(_HALVINGS):
        middle = (too_slow + enough) / 2
        if middle in (too_slow, enough):
            break
        too_slow, enough = (too_slow, middle) if takes_s(middle) <= target_s else (middle, enough)
    return enough


def bubble(num_stages: int, num_chunks: int) -> float:
    """The part of the time that a stage has nothing to do, where all stages are equal and links take nothing."""
    return (num_stages - 1) / (num_chunks + num_stages - 1)


def chunk_of_equal_time(first: float, cached: float, *, quadratic: float, linear: float) -> float:
    """Tokens after `cached` others that take as long as the prompt's first `first` tokens, where n tokens from the
    start take quadratic * n**2 + linear * n and a constant: later tokens have more to look at, so chunks shrink."""
    slope = 2 * quadratic * cached + linear
    first_s = quadratic * first**2 + linear * first
    # The positive root of quadratic * n**2 + slope * n = first_s, in the form that loses no digits.
    return 2 * first_s / (slope + math.sqrt(slope**2 + 4 * quadratic * first_s))


def chunks_of_equal_time(num_tokens: int, first: int, *, quadratic: float, linear: float) -> tuple[int, ...]:
    """A prompt in chunks that take about as long as its first one; the last has what is left."""
    sizes: list[int] = []
    cached = 0
    while cached < num_tokens:
        wanted = chunk_of_equal_time(first, cached, quadratic=quadratic, linear=linear)
        sizes.append(min(max(1, math.floor(wanted)), num_tokens - cached))
        cached += sizes[-1]
    return tuple(sizes)


# Steps in flight


def steps_per_s(num_steps: int, *, slowest_s: float, round_s: float) -> float:
    """Of a pipeline with `num_steps` under way: min(n / round, 1 / slowest). Stages and links count alike."""
    return num_steps / cycle_s(num_steps, slowest_s, round_s)


def saturating_steps(*, slowest_s: float, round_s: float) -> int:
    """As many in flight keep the slowest stage or link busy all the time; more only wait."""
    return math.ceil(round_s / slowest_s)


# Codecs


def least_codec_bytes_per_s(link_bytes_per_s: float, ratio: float) -> float:
    """What a codec must do, encoding and decoding together, to pay on a link of that rate. `ratio`: how many times
    smaller messages become; one that makes nothing smaller never pays."""
    return link_bytes_per_s / (1 - 1 / ratio) if ratio > 1 else math.inf


def codec_pays(codec_bytes_per_s: float, link_bytes_per_s: float, ratio: float) -> bool:
    return codec_bytes_per_s > least_codec_bytes_per_s(link_bytes_per_s, ratio)


def codec_share(edge: Edge, num_bytes: float, ratio: float) -> float:
    """The part of a message's time that a codec without a cost would save: bytes shrink, latency does not."""
    return 1 - edge.message_s(num_bytes / ratio) / edge.message_s(num_bytes)


def compressed(edge: Edge, *, ratio: float, codec_bytes_per_s: float = math.inf) -> Edge:
    """The edge as messages of the old size see it when each is encoded before and decoded behind it."""
    seconds_per_byte = 1 / (edge.bytes_per_s * ratio) + 1 / codec_bytes_per_s
    return replace(edge, bytes_per_s=1 / seconds_per_byte)


# Drafts


def tokens_per_pass(acceptance: float, num_drafted: int) -> float:
    """Expected tokens of one pass over a draft, each of whose tokens is accepted with the same chance if all before it
    were: those accepted and the one that the pass itself gives."""
    if acceptance == 1:
        return num_drafted + 1
    return float((1 - acceptance ** (num_drafted + 1)) / (1 - acceptance))


def speculative_tpot_s(pass_s: float, *, draft_s: float = 0.0, acceptance: float, num_drafted: int) -> float:
    """`pass_s`: of a step with the draft's rows and one more through all stages, hops and home."""
    return (pass_s + draft_s) / tokens_per_pass(acceptance, num_drafted)
