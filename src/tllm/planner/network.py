"""What it takes to send a step from one node to another.

    time of a message = rtt / 2 + bytes / rate        its delay
    occupied by it    =           bytes / rate        what the next message waits for: latency overlaps, bytes do not
    hop of a budget   needs a rate of bytes / (budget - latency), and cannot be where latency alone takes as long
    ring all-reduce   2 (N - 1) messages, with which each of N ranks sends 2 (N - 1) / N of what is reduced

Links that nobody measured are given figures of their kind, and who uses one says so. Rates are bytes a second, in one
direction.

Source of what a group sends: kipply, Transformer Inference Arithmetic (2022), called the article.

This file does not know what stages compute, nor how links are measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from tllm.core.types import HEAD
from tllm.planner.cost import Line
from tllm.planner.profile import LinkProfile, ModelProfile, NodeProfile, Speed

MESSAGE_BYTES = 200  # of a step or a result, whatever is in it
ROW_BYTES = 8  # of a row beside its hidden state: a token on its way out or home, what a chunk carries

# Where nothing was measured: a Unix socket between two processes; gigabit Ethernet through a switch.
SAME_MACHINE_RTT_S, SAME_MACHINE_BYTES_PER_S = 0.4e-3, 1e9
OTHER_MACHINE_RTT_S, OTHER_MACHINE_BYTES_PER_S = 1e-3, 100e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One direction between two nodes, or between a node and the head."""

    latency_s: float
    bytes_per_s: float
    measured: bool

    def occupied_s(self, num_bytes: float) -> float:
        return num_bytes / self.bytes_per_s if self.bytes_per_s > 0 else math.inf

    def message_s(self, num_bytes: float) -> float:
        return self.latency_s + self.occupied_s(num_bytes)


class Network:
    """The edges between nodes. What was measured in the other direction only is taken for both."""

    def __init__(self, links: Sequence[LinkProfile], *, head_machine: str = "") -> None:
        self._links = {(link.source, link.target): link for link in links}
        self._head_machine = head_machine

    def edge(self, source: NodeProfile | None, target: NodeProfile | None) -> Edge:
        """None stands for the head. Between two stages of one node nothing is measured."""
        ids = (source.id if source else HEAD, target.id if target else HEAD)
        if link := self._links.get(ids) or self._links.get(ids[::-1]):
            return Edge(latency_s=link.rtt_s / 2, bytes_per_s=link.bytes_per_s, measured=True)
        if self._machine(source, target) == self._machine(target, source):
            return Edge(latency_s=SAME_MACHINE_RTT_S / 2, bytes_per_s=SAME_MACHINE_BYTES_PER_S, measured=False)
        return Edge(latency_s=OTHER_MACHINE_RTT_S / 2, bytes_per_s=OTHER_MACHINE_BYTES_PER_S, measured=False)

    def _machine(self, node: NodeProfile | None, peer: NodeProfile | None) -> str:
        if node is not None:
            return node.machine
        # A node that can be reached from its own machine only is on the head's.
        return peer.machine if peer is not None and not peer.host and not self._head_machine else self._head_machine


def hidden_message_bytes(model: ModelProfile, num_rows: float) -> float:
    """Of a step with its hidden states, from one stage to the next."""
    return MESSAGE_BYTES + num_rows * (ROW_BYTES + model.hidden_bytes)


def token_message_bytes(num_rows: float) -> float:
    """Of a step from the head, and of a result home."""
    return MESSAGE_BYTES + num_rows * ROW_BYTES


def fitted_edge(line: Line) -> Edge:
    """The link of a line through seconds over bytes."""
    return Edge(latency_s=line.intercept, bytes_per_s=1 / line.slope if line.slope > 0 else math.inf, measured=True)


# Pipelines


class Path(StrEnum):
    """How hidden states get from stage to stage."""

    ENDS = "ends"  # the first stage embeds, the last one projects and samples: only ids leave and come home
    RING = "ring"  # the head embeds and projects: one hop more at either end
    STAR = "star"  # every stage answers to the head, which sends on what it got


def num_hops(num_stages: int, path: Path) -> int:
    """Of hidden states, for one step."""
    match path:
        case Path.ENDS:
            return num_stages - 1
        case Path.RING:
            return num_stages + 1
        case Path.STAR:
            return 2 * num_stages


def hidden_bytes(num_rows: float, hidden_size: int, *, bits_per_element: float = 16) -> float:
    """Of the hidden states of so many rows, as a codec leaves them."""
    return num_rows * hidden_size * bits_per_element / 8


class Home(StrEnum):
    """What the last stage sends home of a sequence."""

    IDS = "ids"
    HIDDEN = "hidden"
    LOGITS = "logits"


def home_bytes(home: Home, *, hidden_size: int, vocab_size: int) -> int:
    """Of one sequence in a step: an id of 4 bytes, hidden states of 16 bit, or logits of 32."""
    match home:
        case Home.IDS:
            return 4
        case Home.HIDDEN:
            return 2 * hidden_size
        case Home.LOGITS:
            return 4 * vocab_size


def required_bytes_per_s(num_bytes: float, budget_s: float, *, latency_s: float = 0.0) -> float | None:
    """The rate with which a message arrives in time; None where no rate is enough because latency takes as long."""
    return num_bytes / (budget_s - latency_s) if latency_s < budget_s else None


# Tensor parallelism

ALL_REDUCES_PER_LAYER = 2
MESSAGE_S = 8e-6  # between two accelerators of one machine; the article's figure
_MESSAGES_PER_LAYER = 4  # the article's count


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks that share every layer, on links of one kind in a ring."""

    num_ranks: int
    latency_s: float
    bytes_per_s: float

    def all_reduce_s(self, num_bytes: float) -> float:
        """Of `num_bytes` on every rank."""
        sent = all_reduce_bytes(num_bytes, self.num_ranks)
        return 2 * (self.num_ranks - 1) * self.latency_s + sent / self.bytes_per_s

    def layer_s(self, num_bytes: float) -> float:
        """Two all-reduces: behind the attention's output projection and behind the MLP's."""
        return ALL_REDUCES_PER_LAYER * self.all_reduce_s(num_bytes)

    def speed(self, alone: Speed, hidden_bytes: float) -> Speed:
        """Of ranks that are each as fast as one is `alone`: layers, head and attention are divided evenly. A row of
        hidden states takes `hidden_bytes`."""
        return replace(
            alone,
            layer_s=tuple(
                seconds / self.num_ranks + self.layer_s(num_rows * hidden_bytes)
                for num_rows, seconds in zip(alone.rows, alone.layer_s, strict=True)
            ),
            head_s=tuple(seconds / self.num_ranks for seconds in alone.head_s),
            read_s=alone.read_s / self.num_ranks,
            pair_s=alone.pair_s / self.num_ranks,
        )


def all_reduce_bytes(num_bytes: float, num_ranks: int) -> float:
    """What one rank sends in a ring: its part is summed up on the way round, then the sum goes round."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes


def group_bytes(num_layers: int, num_bytes: float, num_ranks: int) -> float:
    """What one rank sends for a step whose hidden states take `num_bytes`: 4 (N - 1) / N of them a layer. The article
    has 4, and counts elements as bytes."""
    return num_layers * ALL_REDUCES_PER_LAYER * all_reduce_bytes(num_bytes, num_ranks)


def group_messages_s(num_layers: int, *, message_s: float = MESSAGE_S) -> float:
    """The article's latency of a step that a group computes, however many ranks."""
    return num_layers * _MESSAGES_PER_LAYER * message_s


def break_even_all_reduce_s(weight_bytes: float, *, num_ranks: int, num_layers: int, bytes_per_s: float) -> float:
    """A group pays while one all-reduce takes less. `weight_bytes` are those of a step; `bytes_per_s` the memory's."""
    saved_s = weight_bytes * (1 - 1 / num_ranks) / bytes_per_s
    return saved_s / (ALL_REDUCES_PER_LAYER * num_layers)
