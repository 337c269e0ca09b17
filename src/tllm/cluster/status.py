"""A cluster as its users see it: frozen records of one moment, for the command line, the API and pages.

This file does not know how they are gathered or shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from tllm.cluster.tracing import SequenceRecord, Trace
from tllm.core.errors import ConfigError
from tllm.transport.link_sweep import MAX_SAMPLE_BYTES, LinkSample, Sweep, SweepSettings


class NodeState(StrEnum):
    READY = "ready"
    UNREACHABLE = "unreachable"  # its control stream is gone; its part of the pipeline may still work
    RESTING = "resting"  # its workers crashed; left out for a while
    DRAINING = "draining"  # a person wants it out of every plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """A stage of the plan in force."""

    first_layer: int
    last_layer: int  # exclusive
    embed: bool
    head: bool
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    id: str
    name: str
    host: str  # empty: this machine, over Unix sockets
    state: NodeState
    reason: str  # for its state, or for not being in the plan; may be empty
    platform: str
    device: str
    num_threads: int
    memory_bytes: int  # offered to workers
    free_bytes: int | None  # of the machine, at the last heartbeat
    decode_tokens_per_s: float | None  # one stream, if it held the whole model; measured, None until then
    rtt_s: float | None  # of the control stream
    stages: tuple[StageStatus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    cluster: str
    model: str
    state: str  # of the deployment: loading, serving, replanning, degraded, draining
    epoch: int
    nodes: tuple[NodeStatus, ...]
    predicted_ttft_s: float | None
    predicted_tokens_per_s: float | None
    bound_by: str  # what bounds the prediction, in words; may be empty
    events: tuple[str, ...]  # the last few, oldest first, with time of day


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """What a machine may know before it has proved anything: where to join, and whom to expect there. No secrets."""

    cluster: str
    grpc_port: int
    fingerprint: str  # hex, of the head's public key, as join tokens pin it


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOrder:
    """A link to be measured, between two nodes by id or name, or `head`. Raises ConfigError for too large a sample."""

    source: str
    target: str
    settings: SweepSettings
    sample: LinkSample | None  # None: random numbers only

    def __post_init__(self) -> None:
        if self.sample is not None and len(self.sample.data) > MAX_SAMPLE_BYTES:
            raise ConfigError(
                f"The sample has {len(self.sample.data)} bytes; at most {MAX_SAMPLE_BYTES} may be sent to a node."
            )


class Cluster(Protocol):
    """What the edges ask of a head. A node is meant by its id; `drain` and `undrain` may be repeated."""

    def status(self) -> ClusterStatus: ...

    def joining(self) -> Joining: ...

    async def drain(self, node: str) -> None:
        """Take the node out of every plan until `undrain`; afterwards it holds nothing that requests need.

        Raises RequestError for an unknown node, PlanError when the model does not fit without it; then nothing changed.
        UnavailableError when it was undone meanwhile, or no other plan comes about.
        """

    async def undrain(self, node: str) -> None:
        """Let plans use the node again. Raises RequestError for an unknown node."""

    async def trace(self, began_s: float, ended_s: float, sequences: tuple[SequenceRecord, ...] = ()) -> Trace:
        """What was noted of the steps that were scheduled between these times of `time.perf_counter`, as far as nothing
        has taken its place since."""

    async def bench_link(self, order: LinkOrder) -> Sweep:
        """What matrices take from one node to the other. Raises RequestError for an unknown node or twice the same one,
        UnavailableError when one cannot be reached, or not from the other."""
