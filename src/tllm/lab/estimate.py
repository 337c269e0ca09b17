"""A model in one form on given machines, as a question, and what its steps take by the planner's arithmetic. Pure.

    one token      the stages' seconds and the hops' one after the other
    many           as many steps in flight as stages, each with a share of the sequences
    a prompt       chunk after chunk through stages and links in a row

This file does not know where shapes and machines come from, what figures are called, nor any formula of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from tllm.core.errors import ConfigError, PlanError
from tllm.planner.cost import (
    Job,
    crossover_tokens,
    cycle_s,
    flow_shop_s,
    free_bytes,
    kv_tokens,
    steps_in_flight,
)
from tllm.planner.formats import WeightFormat
from tllm.planner.hardware import Hardware
from tllm.planner.network import (
    Edge,
    Group,
    Home,
    Path,
    hidden_bytes,
    home_bytes,
    num_hops,
)
from tllm.planner.profile import Load, NodeProfile
from tllm.planner.roofline import Bound, Roofline, StepCost
from tllm.planner.search import place
from tllm.planner.shape import Shape, model_profile

NOT_KNOWN: Final = "not known"
_CHUNKS: Final = (1, 2, 4, 8, 16, 32, 64)
_ALL_MEMORY: Final = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A model in one form, on `num_stages` x `num_ranks` machines of one kind."""

    shape: Shape
    held: WeightFormat
    kv_element_bytes: float
    activation_bytes: float  # of one element on the wire
    hardware: Hardware
    num_stages: int = 1
    num_ranks: int = 1  # machines that share each stage's matrices
    link: Edge | None = None  # between two machines, one way; None: the hardware's own, without latency
    batches: tuple[int, ...] = (1,)
    context: int = 2048  # tokens of each sequence before a decode step
    prompt: int = 512
    answer: int = 128
    drafted: tuple[int, float] | None = None  # tokens per pass, and the share of them that is accepted
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("context", "prompt", "answer"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_stages > self.shape.num_layers:
            raise ConfigError(
                f"{self.shape.name} has {self.shape.num_layers} layers, which are at most as many stages; "
                f"{self.num_stages} given."
            )

        if self.num_ranks > self.shape.num_heads:
            raise ConfigError(
                f"{self.shape.name} has {self.shape.num_heads} query heads, which are at most as many ranks; "
                f"{self.num_ranks} given."
            )
        if self.num_nodes > 1 and self.link is None and self.hardware.link_bytes_per_s is None:
            raise ConfigError(
                f"{self.num_nodes} machines need a link, and that of {self.hardware.name} is not known. Give its rate "
                "and latency, such as --link 1Gb/s,0.2ms."
            )

    @property
    def num_nodes(self) -> int:
        return self.num_stages * self.num_ranks

    @property
    def edge(self) -> Edge:
        """Between two machines; there must be two."""
        return self.link or Edge(latency_s=0.0, bytes_per_s=self.hardware.link, measured=False)

    @property
    def roofline(self) -> Roofline:
        """Of one stage, on one machine or on a group."""
        return Roofline(
            shape=self.shape,
            held=self.held,
            hardware=self.hardware,
            kv_bytes_per_element=self.kv_element_bytes,
            activation_bytes=self.activation_bytes,
            group=None
            if self.num_ranks == 1
            else Group(num_ranks=self.num_ranks, latency_s=self.edge.latency_s, bytes_per_s=self.edge.bytes_per_s),
        )

    @property
    def knows_arithmetic(self) -> bool:
        return self.hardware.flop_per_s is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The stages of a question, and what steps take on them. Seconds come from the planner."""

    question: Question
    stages: tuple[range, ...]  # layers

    @classmethod
    def of(cls, question: Question) -> Answer:
        return cls(question=question, stages=_cut(question))

    def decode_step(self, batch: int) -> StepCost:
        """Of all stages together."""
        return self.question.roofline.decode(batch, self.question.context)

    def decode_stages(self, batch: int) -> tuple[StepCost, ...]:
        return tuple(
            self.question.roofline.decode(batch, self.question.context, layers=layers, head=self.is_last(index))
            for index, layers in enumerate(self.stages)
        )

    def prefill_stages(self) -> tuple[StepCost, ...]:
        return tuple(
            self.question.roofline.prefill(self.question.prompt, layers=layers, head=self.is_last(index))
            for index, layers in enumerate(self.stages)
        )

    def is_last(self, index: int) -> bool:
        return index == len(self.stages) - 1

    def hop_bytes(self, num_tokens: int) -> float:
        question = self.question
        return hidden_bytes(num_tokens, question.shape.hidden_size, bits_per_element=8 * question.activation_bytes)

    def hops_s(self, num_tokens: int, num_sampled: int) -> float:
        """All hops of hidden states, and the ids on their way home."""
        if len(self.stages) == 1:
            return 0.0
        return self.num_hops * self.question.edge.message_s(self.hop_bytes(num_tokens)) + self.home_s(num_sampled)

    def home_s(self, num_sampled: int) -> float:
        shape = self.question.shape
        size = home_bytes(Home.IDS, hidden_size=shape.hidden_size, vocab_size=shape.vocab_size)
        return self.question.edge.message_s(num_sampled * size)

    @property
    def num_hops(self) -> int:
        return num_hops(len(self.stages), Path.ENDS)

    def round_s(self, batch: int) -> float:
        """From one step of a sequence to its next where nothing else is in flight."""
        return sum(stage.seconds for stage in self.decode_stages(batch)) + self.hops_s(batch, batch)

    def num_steps(self, batch: int) -> int:
        """In flight: as many as there are stages, each with a share of the sequences."""
        return steps_in_flight(batch, len(self.stages))

    def tpot_s(self, batch: int) -> float:
        """Between two tokens of each of `batch` sequences."""
        num_steps = self.num_steps(batch)
        rows = math.ceil(batch / num_steps)
        return cycle_s(num_steps, self.slowest_s(rows), self.round_s(rows))

    def slowest_s(self, num_rows: int) -> float:
        """Stage or hop, whichever is busy longest with one step."""
        slowest_s = max(stage.seconds for stage in self.decode_stages(num_rows))
        if len(self.stages) == 1:
            return slowest_s
        return max(slowest_s, self.question.edge.occupied_s(self.hop_bytes(num_rows)))

    def bound(self, batch: int) -> Bound:
        """What most of the time between two tokens is waited for."""
        num_steps = self.num_steps(batch)
        rows = math.ceil(batch / num_steps)
        step = self.decode_step(rows)
        if len(self.stages) == 1:
            return step.bound
        if num_steps * self.slowest_s(rows) > self.round_s(rows):
            slowest_stage_s = max(stage.seconds for stage in self.decode_stages(rows))
            return Bound.LINK if self.slowest_s(rows) > slowest_stage_s else step.bound
        return Bound.LINK if self.hops_s(rows, rows) > step.seconds else step.bound

    def prefill_bound(self) -> Bound:
        """What a prompt in many chunks waits for: the slowest stage or link."""
        slowest = max(self.prefill_stages(), key=lambda stage: stage.seconds)
        if len(self.stages) == 1:
            return slowest.bound
        link_s = self.question.edge.occupied_s(self.hop_bytes(self.question.prompt))
        return Bound.LINK if link_s > slowest.seconds else slowest.bound

    def prefill_s(self, num_chunks: int = 1) -> float:
        """Of the prompt in so many chunks, all of them under way together, to its first token at home."""
        chunks = [self._chunk_jobs(chunk, is_last=chunk.stop == self.question.prompt) for chunk in self.cut(num_chunks)]
        return flow_shop_s(chunks, window=num_chunks) + (self.home_s(1) if len(self.stages) > 1 else 0.0)

    def cut(self, num_chunks: int) -> tuple[range, ...]:
        """The prompt's positions in chunks as even as can be."""
        prompt = self.question.prompt
        ends = [round(prompt * index / num_chunks) for index in range(num_chunks + 1)]
        return tuple(range(*pair) for pair in pairwise(ends))

    @property
    def num_chunks(self) -> tuple[int, ...]:
        """That are tried."""
        most = self.question.prompt if len(self.stages) > 1 else 1
        return tuple(num for num in _CHUNKS if num <= most)

    def _chunk_jobs(self, chunk: range, *, is_last: bool) -> list[Job]:
        """What stages and links do for a chunk, in the order in which it comes to them."""
        num_bytes = self.hop_bytes(len(chunk))
        jobs: list[Job] = []
        for index, layers in enumerate(self.stages):
            if index:
                edge = self.question.edge
                jobs.append(Job(edge.occupied_s(num_bytes), edge.latency_s))
            head = is_last and self.is_last(index)
            cost = self.question.roofline.prefill(len(chunk), cached=chunk.start, layers=layers, head=head)
            jobs.append(Job(cost.seconds))
        return jobs

    def held_bytes(self, index: int) -> int:
        """Weights of one stage, on all its ranks together."""
        layers, profile = self.stages[index], model_profile(self.question.shape, self.question.held)
        return profile.held_bytes(layers.start, layers.stop)

    def free_bytes(self, index: int) -> int:
        """Of one stage's memory, for KV."""
        question = self.question
        rows = max(question.prompt, *question.batches)
        return free_bytes(
            memory_bytes=question.num_ranks * question.hardware.memory,
            weight_bytes=self.held_bytes(index),
            activation_bytes=question.num_ranks * question.shape.activation_bytes(rows, max(question.batches)),
        )

    def stage_kv_tokens(self, index: int) -> int:
        question = self.question
        element = question.shape.layer_kv_elements * question.kv_element_bytes
        copies = question.num_ranks / question.shape.kv_parts(question.num_ranks)
        return kv_tokens(self.free_bytes(index), len(self.stages[index]) * element * copies)

    def num_kv_tokens(self) -> int:
        """That fit: as many as the stage with the least room for them has."""
        return min(self.stage_kv_tokens(index) for index in range(len(self.stages)))


def crossover(question: Question) -> float:
    """Tokens of a step. Raises ConfigError where the figure of arithmetic is unknown."""
    return crossover_tokens(
        flop_per_s=question.hardware.reached_flop_per_s,
        bytes_per_s=question.hardware.reached_bytes_per_s,
        bytes_per_weight=question.held.bytes_per_weight,
    )


def _cut(question: Question) -> tuple[range, ...]:
    """Layers of every stage, as the planner cuts equal machines; where they do not hold the weights, as it would."""
    if question.num_stages == 1:
        return (range(question.shape.num_layers),)
    profile = model_profile(question.shape, question.held, kv_bytes_per_element=question.kv_element_bytes)
    known = question.hardware.memory_bytes
    for memory in (_ALL_MEMORY if known is None else question.num_ranks * known, _ALL_MEMORY):
        nodes = [
            NodeProfile(id=f"{index}", name=f"{index}", machine=f"{index}", host="", memory_bytes=memory, num_threads=1)
            for index in range(question.num_stages)
        ]
        try:
            plan = place(profile, nodes, min_kv_positions=1, load=Load(streams=2), use_all=True)
        except PlanError:
            continue
        if len(plan.stages) == question.num_stages:
            return tuple(stage.shard.layers for stage in plan.stages)
    raise AssertionError("a cut without a limit of memory")
