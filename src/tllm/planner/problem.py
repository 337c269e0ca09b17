"""The question that a search answers: these nodes, this model, this load; what would a layout cost?

A layout is an order of nodes and a cut: a node takes as many consecutive stages as it has workers (no more than the
model has layers), each with an equal share of its memory. Its cycle, the seconds from one token of a stream to the
next, is what all searches make least: for one stream that is its speed, for several the speed of all together.

This file does not know how a good layout is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from tllm.planner.cost import StageSpeed, crowding, cycle_s, decode_attention_s, stage_speed, steps_in_flight
from tllm.planner.network import Network, hidden_message_bytes, token_message_bytes
from tllm.planner.profile import Load, ModelProfile, NodeProfile

Cut = tuple[tuple[int, int], ...]  # half-open layer ranges, one for every stage

# Of activations a stage needs, in rows of hidden states for every row of a step: 4 of width d and 3 of an MLP's 4 d.
_ACTIVATION_ROWS = 16


def activation_bytes(model: ModelProfile, load: Load) -> int:
    """What a stage needs beside weights and KV while it computes the largest step."""
    return _ACTIVATION_ROWS * load.max_batch_tokens * model.hidden_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Indices of nodes in the order of their stages, the cut over these, and what it costs."""

    order: tuple[int, ...]
    cut: Cut
    cycle_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of everything for one number of steps in flight. Node `i` is `speeds[i]`; `hop_s[i][j]` leads from node
    `i` to node `j`, on the diagonal between two stages of one node. `busy` is how long a message occupies a link.
    """

    num_steps: int
    head_step_s: float
    speeds: tuple[StageSpeed, ...]
    crowding: tuple[float, ...]
    hop_s: tuple[tuple[float, ...], ...]
    hop_busy_s: tuple[tuple[float, ...], ...]
    first_s: tuple[float, ...]  # from the head
    first_busy_s: tuple[float, ...]
    home_s: tuple[float, ...]
    home_busy_s: tuple[float, ...]

    def max_layers(self, node: int, slowest_s: float, *, head: bool) -> int:
        """The most layers with which a stage takes no more than `slowest_s` while its node's other workers compute."""
        speed, crowd = self.speeds[node], self.crowding[node]
        rest = slowest_s / crowd - speed.seconds(0, head=head)
        num = int(rest / speed.layer_s) if speed.layer_s > 0 else 1 << 30 if rest >= 0 else 0
        num = max(num, 0)
        while num and speed.seconds(num, head=head) * crowd > slowest_s:
            num -= 1
        return num


class Problem:
    """Nodes with measured speeds, and what it takes to let them hold a model."""

    def __init__(
        self,
        *,
        model: ModelProfile,
        nodes: Sequence[NodeProfile],
        network: Network,
        load: Load,
        min_kv_positions: int,
        head_step_s: float,
    ) -> None:
        self.model = model
        self.nodes = tuple(nodes)
        self.num_layers = model.num_layers
        self.num_stages = tuple(min(node.num_workers, model.num_layers) for node in nodes)
        self._network = network
        self._load = load
        self._head_step_s = head_step_s
        self.min_kv_positions = min_kv_positions
        self._kv_bytes = min_kv_positions * model.kv_bytes_per_position
        spare = activation_bytes(model, load)
        self._room = tuple(node.memory_bytes // node.num_workers - spare for node in nodes)  # of each stage
        self._costs: dict[int, Costs] = {}

    def subset(self, chosen: Sequence[int], *, min_kv_positions: int | None = None) -> Problem:
        """The same question for some of the nodes, which are counted anew, and perhaps for more KV."""
        return Problem(
            model=self.model,
            nodes=[self.nodes[index] for index in chosen],
            network=self._network,
            load=self._load,
            min_kv_positions=self.min_kv_positions if min_kv_positions is None else min_kv_positions,
            head_step_s=self._head_step_s,
        )

    def steps_in_flight(self, num_stages: int) -> int:
        return steps_in_flight(self._load.streams, num_stages)

    @property
    def most_kv_positions(self) -> int:
        """More than that no layout over these nodes can hold; `min_kv_positions` where KV takes nothing."""
        rooms = sum(room * num for room, num in zip(self._room, self.num_stages, strict=True))
        room = rooms - self.model.held_bytes(0, self.num_layers)
        each = self.model.kv_bytes_per_position * self.num_layers
        return max(room // each, self.min_kv_positions) if each else self.min_kv_positions

    def can_hold_a_layer(self, node: int) -> bool:
        return self._room[node] >= min(self.model.layer_bytes) + self._kv_bytes

    @cached_property
    def lowest_first(self) -> tuple[tuple[int, ...], ...]:
        """`[node][last]`: the lowest first layer of a stage that ends before `last` and fits; `last` if none does.

        It never falls as `last` grows, because a stage never needs less for having more.
        """
        return tuple(tuple(self._lowest_first(room)) for room in self._room)

    def _lowest_first(self, room: int) -> Iterator[int]:
        first = 0
        for last in range(self.num_layers + 1):
            while first < last and self._need(first, last) > room:
                first += 1
            yield first

    def _need(self, first: int, last: int) -> int:
        return self.model.held_bytes(first, last) + self._kv_bytes * (last - first)

    def max_layers(self, node: int, *, embed: bool, head: bool) -> int:
        """Layers for which a stage has memory wherever in the model they are, as if all were the largest."""
        model = self.model
        ends = model.embed_bytes * embed + model.head_bytes * head
        if model.tied and embed and head:
            ends = max(model.embed_bytes, model.head_bytes)
        layer = max(model.layer_bytes) + self._kv_bytes
        return min(max(self._room[node] - ends, 0) // max(layer, 1), self.num_layers)

    def costs(self, num_steps: int) -> Costs:
        """Of a pipeline with that many steps in flight, among which the streams are divided."""
        if num_steps not in self._costs:
            self._costs[num_steps] = self._make_costs(num_steps)
        return self._costs[num_steps]

    def _make_costs(self, num_steps: int) -> Costs:
        num_rows = self._load.streams / num_steps
        hidden, tokens = hidden_message_bytes(self.model, num_rows), token_message_bytes(num_rows)
        edges = [[self._network.edge(source, target) for target in self.nodes] for source in self.nodes]
        first = [self._network.edge(None, node) for node in self.nodes]
        home = [self._network.edge(node, None) for node in self.nodes]
        speeds = [node.speed for node in self.nodes if node.speed is not None]
        assert len(speeds) == len(self.nodes), "a node without a speed"
        return Costs(
            num_steps=num_steps,
            head_step_s=self._head_step_s,
            speeds=tuple(
                stage_speed(
                    speed,
                    num_rows,
                    num_rows,
                    attention_s=decode_attention_s(speed, num_rows, self._load.context),
                )
                for speed in speeds
            ),
            crowding=tuple(crowding(node) for node in self.nodes),
            hop_s=tuple(tuple(edge.message_s(hidden) for edge in row) for row in edges),
            hop_busy_s=tuple(tuple(edge.occupied_s(hidden) for edge in row) for row in edges),
            first_s=tuple(edge.message_s(tokens) for edge in first),
            first_busy_s=tuple(edge.occupied_s(tokens) for edge in first),
            home_s=tuple(edge.message_s(tokens) for edge in home),
            home_busy_s=tuple(edge.occupied_s(tokens) for edge in home),
        )

    def stages(self, order: Sequence[int]) -> list[int]:
        """The node of every stage."""
        return [node for node in order for _ in range(self.num_stages[node])]

    def layout(self, order: Sequence[int], cut: Cut) -> Layout:
        """That order and cut with its cycle, as a prediction would have it."""
        stages = self.stages(order)
        costs = self.costs(self.steps_in_flight(len(stages)))
        sum_s = costs.head_step_s + costs.first_s[stages[0]] + costs.home_s[stages[-1]]
        slowest_s = max(costs.head_step_s, costs.first_busy_s[stages[0]], costs.home_busy_s[stages[-1]])
        for source, target in pairwise(stages):
            sum_s += costs.hop_s[source][target]
            slowest_s = max(slowest_s, costs.hop_busy_s[source][target])
        for node, (first, last) in zip(stages, cut, strict=True):
            seconds = costs.speeds[node].seconds(last - first, head=last == self.num_layers)
            sum_s += seconds
            slowest_s = max(slowest_s, seconds * costs.crowding[node])
        return Layout(order=tuple(order), cut=cut, cycle_s=cycle_s(costs.num_steps, slowest_s, sum_s))
