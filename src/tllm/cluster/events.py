"""What a head tells whoever watches it: one frozen record per event of life.

This file does not know who watches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tllm.planner.plan import Plan, StagePlan
from tllm.planner.profile import ModelProfile, NodeProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Agents can attach at `grpc_address` with `token`."""

    grpc_address: str
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJoined:
    node: NodeProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """For that many nodes before a plan is made."""

    num_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    model: ModelProfile
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLoading:
    stage: StagePlan
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLoaded:
    stage: StagePlan
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The pipeline is joined and takes requests."""

    num_blocks: int
    block_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The pipeline cannot compute any more."""

    reason: str


HeadEvent = Listening | NodeJoined | Waiting | Planned | ShardLoading | ShardLoaded | Serving | Lost
Observer = Callable[[HeadEvent], None]
