"""How fast a plan is: the arithmetic of cost.py and network.py, applied to stages and the links between them.

    one token of one stream     the sum of all stages and hops, and what the head itself does for a step
    several streams             as many steps in flight as stages; see cost.py
    prompt                      its chunks follow one another through stages and links in a row, as many in flight as
                                stages; of all sizes by halves, those with which the first token is soonest

What is left out: that stages of one machine share its memory bus when they compute at the same time.

This file does not know how a plan is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tllm.planner.cost import (
    Job,
    chunk_attention_s,
    crowding,
    cycle_s,
    decode_attention_s,
    flow_shop_s,
    stage_speed,
    steps_in_flight,
)
from tllm.planner.network import Edge, Network, hidden_message_bytes, token_message_bytes
from tllm.planner.plan import Prediction, StagePlan
from tllm.planner.profile import LinkProfile, Load, ModelProfile, Speed

HEAD_STEP_S = 1.0e-3  # that the head takes for a token: scheduling, packing, detokenizing, one event over HTTP
_LEAST_CHUNK = 32  # with fewer rows most stages only read weights
_ARITHMETIC = 1.5  # times the seconds of one row, from which on rows and not weights are what a step waits for


def predict(
    model: ModelProfile,
    stages: Sequence[StagePlan],
    links: Sequence[LinkProfile],
    load: Load,
    *,
    head_machine: str = "",
    head_step_s: float = HEAD_STEP_S,
) -> Prediction | None:
    """How fast any plan is, a handmade one too; None when a node in it has no measured speed."""
    chain = chain_of(model, stages, links, head_machine=head_machine, head_step_s=head_step_s)
    if chain is None:
        return None
    round_trip = chain.round_trip(load.streams, context=load.context)
    chunk, ttft_s = chain.best_chunk(load)
    return Prediction(
        ttft_s=ttft_s,
        tpot_s=round_trip.cycle_s,
        tokens_per_s=load.streams / round_trip.cycle_s,
        bound=round_trip.bound,
        stage_s=round_trip.stage_s,
        hop_s=round_trip.hop_s,
        note=chain.note(),
        prefill_chunk=chunk,
    )


def gain(old: Prediction, new: Prediction, load: Load) -> float:
    """How much better `new` is at what `load` asks for, as a fraction of `old`; negative when it is worse."""
    if load.streams == 1:
        return old.tpot_s / new.tpot_s - 1
    return new.tokens_per_s / old.tokens_per_s - 1


def chain_of(
    model: ModelProfile,
    stages: Sequence[StagePlan],
    links: Sequence[LinkProfile],
    *,
    head_machine: str = "",
    head_step_s: float = HEAD_STEP_S,
) -> Chain | None:
    """None when a node has no measured speed."""
    network = Network(links, head_machine=head_machine)
    speeds = [stage.node.speed for stage in stages if stage.node.speed is not None]
    if len(speeds) < len(stages):
        return None
    nodes = [None, *(stage.node for stage in stages), None]
    return Chain(
        model=model,
        stages=tuple(stages),
        speeds=tuple(speeds),
        edges=tuple(network.edge(source, target) for source, target in pairwise(nodes)),
        head_step_s=head_step_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """One token of every stream: from a stream's step to its next."""

    cycle_s: float
    stage_s: tuple[float, ...]
    hop_s: tuple[float, ...]  # one more than stages
    bound: str  # what it waits for, in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Stages in a row, and the edges before, between and after them: what a plan's seconds are made of."""

    model: ModelProfile
    stages: tuple[StagePlan, ...]
    speeds: tuple[Speed, ...]
    edges: tuple[Edge, ...]
    head_step_s: float

    def round_trip(self, num_streams: int, *, context: float, num_steps: int | None = None) -> RoundTrip:
        """All streams decode, each with `context` positions before it, in `num_steps` steps at a time; as many as
        stages by default, and never more than streams."""
        num_steps = min(num_streams, num_steps) if num_steps else steps_in_flight(num_streams, len(self.stages))
        num_rows = num_streams / num_steps
        attention_s = [decode_attention_s(speed, num_rows, context) for speed in self.speeds]
        stage_s = self._stage_s(num_rows, num_rows, attention_s)
        num_bytes = self._message_bytes(num_rows, num_rows)
        hop_s = tuple(edge.message_s(size) for edge, size in zip(self.edges, num_bytes, strict=True))
        occupied_s = [edge.occupied_s(size) for edge, size in zip(self.edges, num_bytes, strict=True)]
        crowded_s = [seconds * crowding(stage.node) for seconds, stage in zip(stage_s, self.stages, strict=True)]
        sum_s = self.head_step_s + sum(stage_s) + sum(hop_s)
        cycle = cycle_s(num_steps, max(*crowded_s, *occupied_s, self.head_step_s), sum_s)
        if cycle > sum_s:
            bound = self._slowest(crowded_s, occupied_s, num_rows)
        else:
            bound = self._slowest(stage_s, hop_s, num_rows)
            if num_steps > 1:
                bound = f"the round trip of a step, most of it {bound}"
        return RoundTrip(cycle_s=cycle, stage_s=stage_s, hop_s=hop_s, bound=bound)

    def best_chunk(self, load: Load) -> tuple[int, float]:
        """Tokens of a prompt's chunk, and the seconds to the prompt's first token with it.

        Small chunks fill the pipeline sooner; large ones read weights, and cost each stage and hop, less often.
        """
        chunks = [load.max_batch_tokens]
        while len(self.stages) > 1 and chunks[-1] // 2 >= _LEAST_CHUNK:
            chunks.append(chunks[-1] // 2)
        seconds = {chunk: self.prefill_s(load.prompt, chunk) for chunk in chunks}
        best = min(chunks, key=lambda chunk: seconds[chunk])
        return best, seconds[best]

    def prefill_s(self, prompt: int, chunk: int) -> float:
        """From the prompt to its first token at home. Every stage and every link takes chunk after chunk in order."""
        starts = range(0, prompt, chunk)
        crowd = [crowding(stage.node) if len(starts) > 1 else 1.0 for stage in self.stages]

        def jobs(start: int) -> list[Job]:
            size = min(chunk, prompt - start)
            num_sampled = 1 if start + size == prompt else 0
            num_bytes = self._message_bytes(size, num_sampled)
            links = [
                Job(edge.occupied_s(each), edge.latency_s) for edge, each in zip(self.edges, num_bytes, strict=True)
            ]
            attention_s = [chunk_attention_s(speed, start, size) for speed in self.speeds]
            stage_s = self._stage_s(size, num_sampled, attention_s)
            work = [Job(seconds * factor) for seconds, factor in zip(stage_s, crowd, strict=True)]
            return [Job(self.head_step_s), *(job for pair in zip(links, work, strict=False) for job in pair), links[-1]]

        return flow_shop_s([jobs(start) for start in starts], window=len(self.stages))

    def _stage_s(self, num_rows: float, num_sampled: float, attention_s: Sequence[float]) -> tuple[float, ...]:
        return tuple(
            stage_speed(speed, num_rows, num_sampled, attention_s=each).seconds(
                stage.shard.last_layer - stage.shard.first_layer, head=stage.shard.head
            )
            for stage, speed, each in zip(self.stages, self.speeds, attention_s, strict=True)
        )

    def _message_bytes(self, num_rows: float, num_sampled: float) -> list[float]:
        hidden = hidden_message_bytes(self.model, num_rows)
        return [token_message_bytes(num_rows), *[hidden] * (len(self.stages) - 1), token_message_bytes(num_sampled)]

    def _slowest(self, stage_s: Sequence[float], hop_s: Sequence[float], num_rows: float) -> str:
        """What takes longest, in words."""
        names = ["the head", *(stage.node.name for stage in self.stages), "the head"]
        parts = [(seconds, f"the link {names[hop]} -> {names[hop + 1]}") for hop, seconds in enumerate(hop_s)]
        parts += [(seconds, self._work(index, num_rows)) for index, seconds in enumerate(stage_s)]
        parts += [(self.head_step_s, "the head's own work")]
        return max(parts, key=lambda part: part[0])[1]

    def _work(self, index: int, num_rows: float) -> str:
        stage, speed = self.stages[index], self.speeds[index]
        num_layers = stage.shard.last_layer - stage.shard.first_layer
        at_rows, at_one = stage_speed(speed, num_rows, num_rows), stage_speed(speed, 1, 1)
        work_s = at_rows.seconds(num_layers, head=stage.shard.head) - speed.step_s
        if speed.step_s > work_s:
            return f"what every step costs on {stage.node.name}"
        if work_s > _ARITHMETIC * (at_one.seconds(num_layers, head=stage.shard.head) - speed.step_s):
            return f"arithmetic on {stage.node.name}"
        return f"reading weights on {stage.node.name}"

    def note(self) -> str:
        nodes = ["head", *(stage.node.name for stage in self.stages), "head"]
        ids = [None, *(stage.node.id for stage in self.stages), None]
        assumed = [
            f"{nodes[hop]} -> {nodes[hop + 1]}"
            for hop, edge in enumerate(self.edges)
            if not edge.measured and ids[hop] != ids[hop + 1]
        ]
        return f"not measured, taken for a usual link: {', '.join(assumed)}" if assumed else ""
