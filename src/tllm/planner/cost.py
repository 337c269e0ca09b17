"""The arithmetic of inference: how long a step takes on a stage, and how fast a pipeline of stages is.

    stage of n layers, r rows   step_s + n * layer_s(r), and head_s(rows sampled) on the last
    one token of one stream     the sum of all stages and hops, and what the head itself does for a step
    S streams, K stages         m = min(S, K) steps of S / m rows are in flight:
                                cycle = max(m * slowest stage, link or head; the sum), tokens/s = S / cycle
    prompt                      its chunks follow one another through stages and links in a row, K in flight; of all
                                sizes by halves, those with which the first token is soonest

Between measured numbers of rows everything is a straight line, and beyond the last the line goes on. What is left out:
attention over long contexts (speeds are measured at short ones), and that stages of one machine share its memory bus
when they compute at the same time.

Sources: kipply, Transformer Inference Arithmetic (2022); the flow shop of a chunked prefill is exact, job by job.

This file does not know how a plan is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tllm.planner.network import Edge, Network, hidden_message_bytes, token_message_bytes
from tllm.planner.plan import Prediction, StagePlan
from tllm.planner.profile import LinkProfile, Load, ModelProfile, NodeProfile, Speed

HEAD_STEP_S = 1.0e-3  # that the head takes for a token: scheduling, packing, detokenizing, one event over HTTP
ESTIMATED_STEP_S = 0.5e-3  # that a stage takes for a step whatever is in it
_LEAST_CHUNK = 32  # with fewer rows most stages only read weights
_ARITHMETIC = 1.5  # times the seconds of one row, from which on rows and not weights are what a step waits for


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


def crowding(node: NodeProfile) -> float:
    """How much longer a stage takes while all workers of its node compute: they may have more threads than it."""
    return max(1.0, node.num_workers / max(node.num_threads, 1))


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
    chain = _chain(model, stages, Network(links, head_machine=head_machine), head_step_s)
    if chain is None:
        return None
    num_steps = steps_in_flight(load.streams, len(stages))
    num_rows = load.streams / num_steps
    stage_s = tuple(chain.stage_s(num_rows, num_rows))
    num_bytes = chain.message_bytes(num_rows, num_rows)
    hop_s = tuple(edge.message_s(size) for edge, size in zip(chain.edges, num_bytes, strict=True))
    occupied_s = [edge.occupied_s(size) for edge, size in zip(chain.edges, num_bytes, strict=True)]
    crowded_s = [seconds * crowding(stage.node) for seconds, stage in zip(stage_s, stages, strict=True)]
    sum_s = head_step_s + sum(stage_s) + sum(hop_s)
    cycle = cycle_s(num_steps, max(*crowded_s, *occupied_s, head_step_s), sum_s)
    if cycle > sum_s:
        bound = chain.slowest(crowded_s, occupied_s, num_rows)
    else:
        bound = chain.slowest(stage_s, hop_s, num_rows)
        if num_steps > 1:
            bound = f"the round trip of a step, most of it {bound}"
    chunk, ttft_s = chain.best_chunk(load)
    return Prediction(
        ttft_s=ttft_s,
        tpot_s=cycle,
        tokens_per_s=load.streams / cycle,
        bound=bound,
        stage_s=stage_s,
        hop_s=hop_s,
        note=chain.note(),
        prefill_chunk=chunk,
    )


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


def gain(old: Prediction, new: Prediction, load: Load) -> float:
    """How much better `new` is at what `load` asks for, as a fraction of `old`; negative when it is worse."""
    if load.streams == 1:
        return old.tpot_s / new.tpot_s - 1
    return new.tokens_per_s / old.tokens_per_s - 1


def _chain(model: ModelProfile, stages: Sequence[StagePlan], network: Network, head_step_s: float) -> _Chain | None:
    speeds = [stage.node.speed for stage in stages if stage.node.speed is not None]
    if len(speeds) < len(stages):
        return None
    nodes = [None, *(stage.node for stage in stages), None]
    return _Chain(
        model=model,
        stages=tuple(stages),
        speeds=tuple(speeds),
        edges=tuple(network.edge(source, target) for source, target in pairwise(nodes)),
        head_step_s=head_step_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chain:
    """Stages in a row, and the edges before, between and after them."""

    model: ModelProfile
    stages: tuple[StagePlan, ...]
    speeds: tuple[Speed, ...]
    edges: tuple[Edge, ...]
    head_step_s: float

    def stage_s(self, num_rows: float, num_sampled: float) -> list[float]:
        return [
            stage_speed(speed, num_rows, num_sampled).seconds(
                stage.shard.last_layer - stage.shard.first_layer, head=stage.shard.head
            )
            for stage, speed in zip(self.stages, self.speeds, strict=True)
        ]

    def message_bytes(self, num_rows: float, num_sampled: float) -> list[float]:
        hidden = hidden_message_bytes(self.model, num_rows)
        return [token_message_bytes(num_rows), *[hidden] * (len(self.stages) - 1), token_message_bytes(num_sampled)]

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
        whole, rest = divmod(prompt, chunk)
        sizes = [chunk] * whole + [rest] * (rest > 0)
        crowd = [crowding(stage.node) if len(sizes) > 1 else 1.0 for stage in self.stages]
        head_free_s = 0.0
        stage_free_s, edge_free_s = [0.0] * len(self.stages), [0.0] * len(self.edges)
        home_s: list[float] = []
        for index, size in enumerate(sizes):
            num_sampled = 1 if index == len(sizes) - 1 else 0
            num_bytes = self.message_bytes(size, num_sampled)
            stage_s = self.stage_s(size, num_sampled)
            before = index - len(self.stages)  # the chunk that must be home before this one leaves
            now_s = max(head_free_s, home_s[before] if before >= 0 else 0.0) + self.head_step_s
            head_free_s = now_s
            for hop, edge in enumerate(self.edges):
                begin_s = max(now_s, edge_free_s[hop])
                edge_free_s[hop] = begin_s + edge.occupied_s(num_bytes[hop])
                now_s = edge_free_s[hop] + edge.latency_s
                if hop < len(self.stages):
                    now_s = max(now_s, stage_free_s[hop]) + stage_s[hop] * crowd[hop]
                    stage_free_s[hop] = now_s
            home_s.append(now_s)
        return home_s[-1]

    def slowest(self, stage_s: Sequence[float], hop_s: Sequence[float], num_rows: float) -> str:
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
