"""What a pipeline on the bench is expected to do, and what its machine allows at best.

    expected    the forecast: the model's parts timed on the pipeline's own workers, the head's and the handovers' cost
    possible    every step reads all weights and its sequences' KV once, at the speed of the memory

A limit is only stated for a model that no cache holds.

This file does not know experiments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tllm.lab.experiments.subject import exceeds_caches, memory_reader
from tllm.lab.forecast import Forecast, Overhead
from tllm.lab.overhead import measure_overhead
from tllm.lab.rig import Rig, Stage
from tllm.models.spec import Shard
from tllm.planner.cost import chunk_attention_s, decode_attention_s, stage_speed
from tllm.planner.network import SAME_MACHINE_BYTES_PER_S, SAME_MACHINE_RTT_S, Group
from tllm.planner.profile import Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Possible:
    """A machine's memory and a model's bytes; `bytes_per_s` is None where memory's speed is no limit."""

    bytes_per_s: float | None
    weight_bytes: int  # that a step reads
    kv_bytes_per_position: int

    def tokens_per_s(self, batch: int, context: float) -> float | None:
        """Of `batch` sequences that decode together with so many positions before each."""
        if self.bytes_per_s is None:
            return None
        return batch * self.bytes_per_s / (self.weight_bytes + batch * context * self.kv_bytes_per_position)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineForecast:
    """Of engines that one process calls one after the other, without a head, links or messages."""

    speed: Speed
    stages: tuple[Shard, ...]

    def prefill_s(self, stage: int, prompt: int) -> float:
        """Of a prompt in one step, and its first token."""
        return self._stage_s(stage, prompt, chunk_attention_s(self.speed, 0, prompt))

    def step_s(self, stage: int, context: float) -> float:
        """Of one more token, with so many positions before it."""
        return self._stage_s(stage, 1, decode_attention_s(self.speed, 1, context))

    def _stage_s(self, stage: int, num_rows: int, attention_s: float) -> float:
        shard = self.stages[stage]
        parts = stage_speed(self.speed, num_rows, 1, attention_s=attention_s)
        return parts.seconds(len(shard.layers), head=shard.head)


async def measured_forecast(rig: Rig, stages: Sequence[Stage], overhead: Overhead | None = None) -> Forecast:
    """Times the model's parts on every worker, and the overhead unless it is given. Takes some ten seconds."""
    await rig.measure_speeds()
    return rig.forecast(overhead or await measure_overhead(stages, step_bytes=step_bytes(rig)))


def with_ranks(forecast: Forecast, num_ranks: int) -> Forecast:
    """The same stages, each on so many ranks as fast as it was on one, over what the planner takes for a link within a
    machine."""
    group = Group(num_ranks=num_ranks, latency_s=SAME_MACHINE_RTT_S / 2, bytes_per_s=SAME_MACHINE_BYTES_PER_S)
    stages = []
    for stage in forecast.stages:
        speed = stage.node.speed
        assert speed is not None, "a stage without a speed"
        shared = group.speed(speed, forecast.model.hidden_bytes)
        stages.append(replace(stage, node=replace(stage.node, speed=shared)))
    return replace(forecast, stages=tuple(stages))


async def possible(directory: Path, *, weight_bytes: int, kv_bytes_per_position: int, num_threads: int) -> Possible:
    """With memory's speed measured now, where it counts."""
    bytes_per_s = None
    if exceeds_caches(weight_bytes):
        bytes_per_s = await asyncio.to_thread(_bandwidth, directory, num_threads)
    return Possible(bytes_per_s=bytes_per_s, weight_bytes=weight_bytes, kv_bytes_per_position=kv_bytes_per_position)


def step_bytes(rig: Rig) -> int:
    """Weights that all stages together read for one step."""
    return sum(rig.model.layer_bytes) + rig.model.head_bytes


def _bandwidth(directory: Path, num_threads: int) -> float:
    with memory_reader(directory, num_threads) as reader:
        return reader.bandwidth(num_threads)
