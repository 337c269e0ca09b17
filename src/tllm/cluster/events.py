"""What a head tells whoever watches it: one frozen record per event of life.

This file does not know who watches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tllm.planner.plan import Plan, StagePlan
from tllm.planner.profile import Load, ModelProfile, NodeProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Agents can attach at `grpc_address` with `token`."""

    grpc_address: str
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJoined:
    node: NodeProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLeft:
    node: NodeProfile
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """How fast the nodes are, which takes some seconds the first time."""

    num_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """For that many nodes before a plan is made; `reason`: why those there are do not suffice, if they were counted."""

    num_nodes: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    model: ModelProfile
    plan: Plan
    load: Load  # that it is to be best for


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLoading:
    stage: StagePlan
    done_bytes: int
    total_bytes: int
    fetching: bool = False  # from other machines to this one's disk; else from disk to memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLoaded:
    stage: StagePlan
    load_s: float
    fetched_bytes: int = 0  # that came over the network


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanning:
    """The pipeline works and is given up for a better plan."""

    reason: str


HeadEvent = (
    Listening
    | NodeJoined
    | NodeLeft
    | Measuring
    | Waiting
    | Planned
    | ShardLoading
    | ShardLoaded
    | Serving
    | Lost
    | Replanning
)
Observer = Callable[[HeadEvent], None]


def describe(event: HeadEvent) -> str | None:
    """A line for a list of what happened; None for what is only progress."""
    match event:
        case NodeJoined(node=node):
            return f"{node.name} joined as {node.id}"
        case NodeLeft(node=node, reason=reason):
            return f"{node.name} left: {reason}"
        case Planned(plan=plan):
            where = ", ".join(
                f"layers {stage.shard.first_layer}..{stage.shard.last_layer - 1} on {stage.node.name}"
                for stage in plan.stages
            )
            return f"planned {where}"
        case Serving():
            return "serving"
        case Lost(reason=reason):
            return f"lost: {reason}"
        case Replanning(reason=reason):
            return f"another plan: {reason}"
        case _:
            return None
