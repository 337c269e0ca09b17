"""What a machine's data sheet allows: seconds of a step, operator by operator, and what bounds each.

    operator   max( bytes / (efficiency * memory's rate), FLOP / (efficiency * arithmetic's rate) )
    step       a fixed cost + the sum of its operators: projections, attention, MLP, head; and with tensor parallelism
               two all-reduces a layer

    bytes      weights that the step reads, KV that its tokens look at, KV that they write
    FLOP       2 a weight and token, attention's pairs

Left out is what lies between operators (norms, activations, residuals): it is as much as kernels leave unfused; see
`cost.intermediates`, and fold what was measured into the efficiencies.

This file does not know measured speeds: those are cost.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tllm.planner.cost import FLOP_PER_WEIGHT, crossover_tokens, num_pairs, operator_s
from tllm.planner.formats import WeightFormat
from tllm.planner.hardware import Hardware
from tllm.planner.network import Group, group_bytes, hidden_bytes
from tllm.planner.profile import Speed
from tllm.planner.shape import Shape

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Kind(StrEnum):
    """Of operators."""

    PROJECTIONS = "projections"
    ATTENTION = "attention"
    MLP = "MLP"
    HEAD = "head"
    ALL_REDUCE = "all-reduces"


class Bound(StrEnum):
    """What a part of a step waits for."""

    MEMORY = "memory"
    COMPUTE = "compute"
    LINK = "link"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """All operators of one kind in a step on one rank."""

    kind: Kind
    num_bytes: float  # from and to memory; of all-reduces, sent
    flop: float
    seconds: float
    bound: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """A step on one stage."""

    parts: tuple[Part, ...]
    step_s: float  # whatever is in it

    @property
    def seconds(self) -> float:
        return self.step_s + sum(part.seconds for part in self.parts)

    @property
    def bound(self) -> Bound:
        """What most of the time is spent waiting for."""
        return max(Bound, key=lambda bound: sum(part.seconds for part in self.parts if part.bound is bound))

    def part_s(self, kind: Kind) -> float:
        return sum(part.seconds for part in self.parts if part.kind is kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A model on hardware: on one machine, or on the ranks of a group of equal ones.

    Where the figure of arithmetic is unknown only steps of one token can be told: those wait for memory on every
    machine. Others raise ConfigError.
    """

    shape: Shape
    held: WeightFormat
    hardware: Hardware
    kv_bytes_per_element: float = 2
    activation_bytes: float = 2  # of one element on the wire
    step_s: float = 0.0
    group: Group | None = None

    def decode(self, batch: int, context: int, *, layers: range | None = None, head: bool = True) -> StepCost:
        """One new token for each of `batch` sequences, which look at `context` positions each, their own included."""
        works = []
        for layer in self._layers(layers):
            positions = batch * _within(context, self.shape.window(layer))
            works.append(_Work(layer=layer, num_tokens=batch, positions=positions, pairs=positions))
        return self._cost(works, num_tokens=batch, num_sampled=batch if head else 0)

    def prefill(self, num_tokens: int, *, cached: int = 0, layers: range | None = None, head: bool = True) -> StepCost:
        """A run of one prompt's tokens after `cached` others; with `head` its last row is sampled."""
        works = [
            _Work(
                layer=layer,
                num_tokens=num_tokens,
                positions=num_tokens + _within(cached, self.shape.window(layer)),
                pairs=num_pairs(num_tokens, cached, self.shape.window(layer)),
            )
            for layer in self._layers(layers)
        ]
        return self._cost(works, num_tokens=num_tokens, num_sampled=1 if head else 0)

    def speed(self) -> Speed:
        """As the planner knows workers: a layer without attention, and attention for each position. Layers are taken to
        be alike, and windows to be open. Raises ConfigError where the figure of arithmetic is unknown."""
        flop_per_s = self.hardware.reached_flop_per_s
        crossover = crossover_tokens(
            flop_per_s=flop_per_s,
            bytes_per_s=self.hardware.reached_bytes_per_s,
            bytes_per_weight=self.held.bytes_per_weight,
        )
        rows = tuple(sorted({*_ROWS, max(1, math.floor(crossover)), math.ceil(crossover)}))
        steps = [self.decode(num_rows, 0) for num_rows in rows]
        heads_s = tuple(step.part_s(Kind.HEAD) for step in steps)
        return Speed(
            rows=rows,
            layer_s=tuple(
                (step.seconds - step.step_s - head_s) / self.shape.num_layers
                for step, head_s in zip(steps, heads_s, strict=True)
            ),
            head_s=heads_s,
            step_s=self.step_s,
            read_s=self._kv_bytes / self.hardware.reached_bytes_per_s,
            pair_s=self.shape.pair_flop / self._num_ranks / flop_per_s,
        )

    @property
    def _num_ranks(self) -> int:
        return self.group.num_ranks if self.group else 1

    @property
    def _kv_bytes(self) -> float:
        """Of one position in one layer on one rank."""
        return self.shape.layer_kv_elements * self.kv_bytes_per_element / self.shape.kv_parts(self._num_ranks)

    def _layers(self, layers: range | None) -> range:
        return range(self.shape.num_layers) if layers is None else layers

    def _cost(self, works: list[_Work], *, num_tokens: int, num_sampled: int) -> StepCost:
        operators = [each for work in works for each in self._operators(work)]
        if num_sampled:
            flop = num_sampled * self.shape.head_flop / self._num_ranks
            operators.append(
                self._part(Kind.HEAD, self.shape.head_bytes(self.held) / self._num_ranks, flop, num_tokens)
            )
        if self.group is not None:
            sent = hidden_bytes(num_tokens, self.shape.hidden_size, bits_per_element=8 * self.activation_bytes)
            operators.append(
                Part(
                    kind=Kind.ALL_REDUCE,
                    num_bytes=group_bytes(len(works), sent, self.group.num_ranks),
                    flop=0.0,
                    seconds=len(works) * self.group.layer_s(sent),
                    bound=Bound.LINK,
                )
            )
        kinds = [kind for kind in Kind if any(each.kind is kind for each in operators)]
        parts = tuple(_joined([each for each in operators if each.kind is kind]) for kind in kinds)
        return StepCost(parts=parts, step_s=self.step_s)

    def _operators(self, work: _Work) -> Iterator[Part]:
        shape, held, num_ranks, num_tokens = self.shape, self.held, self._num_ranks, work.num_tokens
        projection_bytes = held.num_bytes(matrices=shape.attention_params)
        projection_flop = FLOP_PER_WEIGHT * shape.attention_params
        mlp_bytes = shape.layer_step_bytes(held, work.layer, num_tokens) - projection_bytes
        mlp_flop = shape.matrix_flop(work.layer) - projection_flop
        kv_bytes = (work.positions + num_tokens) * self._kv_bytes
        attention_flop = work.pairs * shape.pair_flop / num_ranks
        yield self._part(
            Kind.PROJECTIONS, projection_bytes / num_ranks, num_tokens * projection_flop / num_ranks, num_tokens
        )
        yield self._part(Kind.ATTENTION, kv_bytes, attention_flop, num_tokens)
        yield self._part(Kind.MLP, mlp_bytes / num_ranks, num_tokens * mlp_flop / num_ranks, num_tokens)

    def _part(self, kind: Kind, num_bytes: float, flop: float, num_tokens: int) -> Part:
        known = self.hardware.flop_per_s is not None or num_tokens > 1
        flop_per_s = self.hardware.reached_flop_per_s if known else math.inf
        bytes_per_s = self.hardware.reached_bytes_per_s
        seconds = operator_s(num_bytes, flop, bytes_per_s=bytes_per_s, flop_per_s=flop_per_s)
        bound = Bound.COMPUTE if seconds > num_bytes / bytes_per_s else Bound.MEMORY
        return Part(kind=kind, num_bytes=num_bytes, flop=flop, seconds=seconds, bound=bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A step's in one layer: positions whose KV is read, and pairs of a token and a position."""

    layer: int
    num_tokens: int
    positions: int
    pairs: int


def _within(context: int, window: int | None) -> int:
    return context if window is None else min(context, window)


def _joined(operators: list[Part]) -> Part:
    """Operators of one kind; bound by what most of them are, in seconds."""
    seconds = sum(each.seconds for each in operators)
    bound = max(Bound, key=lambda bound: sum(each.seconds for each in operators if each.bound is bound))
    return Part(
        kind=operators[0].kind,
        num_bytes=sum(each.num_bytes for each in operators),
        flop=sum(each.flop for each in operators),
        seconds=seconds,
        bound=bound,
    )
