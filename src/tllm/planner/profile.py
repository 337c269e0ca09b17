"""What the planner knows of machines and of a model: numbers, however they came about.

This file does not know how anything is measured or read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProfile:
    """One machine as its agent describes it."""

    id: str
    name: str
    machine: str  # nodes with the same value share one machine and speak over Unix sockets
    host: str  # where its workers can be reached; empty: only from its own machine
    memory_bytes: int  # that its workers may take together
    num_threads: int  # of all its workers together
    device: str = "cpu"
    platform: str = ""
    num_workers: int = 1  # stages it is to be cut into


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """Bytes of one model in the dtype it will be served in.

    `layer_bytes[i]` are held and, in a decode step, read by whoever has layer `i`. The embedding is held by the first
    stage, which reads a row of it a token. The head (final norm and output projection) is held and read by the last;
    a tied pair on one stage is held once.
    """

    name: str
    layer_bytes: tuple[int, ...]
    embed_bytes: int
    head_bytes: int
    tied: bool
    kv_bytes_per_position: int  # of one layer

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    def held_bytes(self, first_layer: int, last_layer: int) -> int:
        """Weights in the memory of a stage with layers `[first_layer, last_layer)`."""
        embeds, heads = first_layer == 0, last_layer == self.num_layers
        ends = self.embed_bytes * embeds + self.head_bytes * heads
        if self.tied and embeds and heads:
            ends = max(self.embed_bytes, self.head_bytes)
        return sum(self.layer_bytes[first_layer:last_layer]) + ends

    def read_bytes(self, first_layer: int, last_layer: int) -> int:
        """Weights that one decode step reads on that stage."""
        return sum(self.layer_bytes[first_layer:last_layer]) + self.head_bytes * (last_layer == self.num_layers)
