"""Figures that cannot be true, whatever the machine: they are refused, never averaged in.

    tokens        more than all requests together may have
    throughput    not the tokens by the time
    latency       of batches one after another: no longer than one of them takes; or not queue and service together
    gain          of tensor parallelism: more than the ranks that were added

Each rule looks only at records that have what it needs, by the names that experiment.py lists.

This file does not know experiments, nor how a refusal is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

from tllm.lab.record import Setting
from tllm.planner.cost import mean_batch_latency_s

AT_ONCE = "at-once"  # the setting `arrivals` of requests that all come at the beginning

_ROUNDING = 0.02  # that a throughput and its parts may differ by
_ALONE = 1.1  # times what one batch takes: a mean latency that has waiting in it is longer
_CACHES = 0.05  # a smaller part of a model fits a cache better


def impossible(settings: Mapping[str, Setting], metrics: Mapping[str, float]) -> str:
    """Why this one measurement cannot be true; empty where nothing speaks against it."""
    rules = (_too_many_tokens, _contradicting_throughput, _latency_without_queue, _contradicting_latency)
    return next((reason for rule in rules if (reason := rule(settings, metrics))), "")


def impossible_gain(
    cell: Mapping[str, Setting], ttft_s: float, others: Sequence[tuple[Mapping[str, Setting], float]]
) -> str:
    """Why a cell's mean `ttft_s` cannot be true beside those of the same experiment with fewer ranks."""
    ranks = cell.get("tp")
    if not _is_count(ranks):
        return ""
    for other, other_ttft_s in others:
        fewer = other.get("tp")
        if not _is_count(fewer) or fewer >= ranks or not _alike(cell, other):
            continue
        gain, most = other_ttft_s / ttft_s, ranks / fewer
        if gain > most * (1 + _CACHES):
            return f"TTFT gains {gain:.2f} times from TP {fewer} to {ranks}, which can give at most {most:g}"
    return ""


def _too_many_tokens(settings: Mapping[str, Setting], metrics: Mapping[str, float]) -> str:
    requests, tokens, counted = settings.get("requests"), settings.get("tokens"), metrics.get("num_tokens")
    if not _is_count(requests) or not _is_count(tokens) or counted is None or counted <= requests * tokens:
        return ""
    return f"{counted:.0f} tokens were counted where {requests} requests have at most {requests * tokens}"


def _contradicting_throughput(settings: Mapping[str, Setting], metrics: Mapping[str, float]) -> str:
    names = ("num_tokens", "total_s", "throughput_tokens_per_s")
    if not all(name in metrics for name in names):
        return ""
    counted, total_s, throughput = (metrics[name] for name in names)
    if abs(throughput * total_s - counted) <= _ROUNDING * counted:
        return ""
    return f"{throughput:.1f} tokens/s for {total_s:.3f} s are {throughput * total_s:.0f} tokens, not {counted:.0f}"


def _latency_without_queue(settings: Mapping[str, Setting], metrics: Mapping[str, float]) -> str:
    requests, batch = settings.get("requests"), settings.get("batch")
    if (
        settings.get("arrivals") != AT_ONCE
        or not _is_count(requests)
        or not _is_count(batch)
        or requests % batch
        or not metrics.keys() >= {"mean_latency_s", "total_s"}
    ):
        return ""
    num_batches, total_s, mean_s = requests // batch, metrics["total_s"], metrics["mean_latency_s"]
    # Equal batches give the mean that is told. A late one that takes longer lowers it, down to what one batch takes.
    if num_batches == 1 or mean_s > _ALONE * total_s / num_batches:
        return ""
    return (
        f"a mean latency of {mean_s * 1e3:.0f} ms leaves out the queue: {num_batches} batches one after another in "
        f"{total_s:.3f} s give {mean_batch_latency_s(total_s, num_batches) * 1e3:.0f} ms"
    )


def _contradicting_latency(settings: Mapping[str, Setting], metrics: Mapping[str, float]) -> str:
    names = ("mean_latency_s", "mean_queue_s", "mean_service_s")
    if not all(name in metrics for name in names):
        return ""
    latency_s, queue_s, service_s = (metrics[name] for name in names)
    if abs(queue_s + service_s - latency_s) <= _ROUNDING * latency_s:
        return ""
    return (
        f"a mean latency of {latency_s * 1e3:.1f} ms is not {queue_s * 1e3:.1f} ms of queueing and "
        f"{service_s * 1e3:.1f} ms of service"
    )


def _alike(cell: Mapping[str, Setting], other: Mapping[str, Setting]) -> bool:
    """Whether they differ in their ranks alone."""
    return {**cell, "tp": 0} == {**other, "tp": 0}


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
