"""What it takes to send a step from one node to another.

    time of a message = rtt / 2 + bytes / rate        its delay
    occupied by it    =           bytes / rate        what the next message waits for: latency overlaps, bytes do not

Links that nobody measured are given figures of their kind, and who uses one says so.

This file does not know stages, engines or how links are measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tllm.core.types import HEAD
from tllm.planner.profile import LinkProfile, ModelProfile, NodeProfile

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
