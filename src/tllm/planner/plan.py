"""A plan: which node holds which stage. The stages cover every layer once, in order; the first embeds, the last has
the head.

This file does not know how a plan is found or carried out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tllm.models.spec import Shard
from tllm.planner.profile import NodeProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage on one node."""

    node: NodeProfile
    shard: Shard
    num_threads: int
    held_bytes: int  # weights in memory
    read_bytes: int  # weights read by a decode step
    kv_bytes_per_position: int  # of all its layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Stages in the order in which hidden states pass them."""

    stages: tuple[StagePlan, ...]
    dropped: tuple[str, ...] = ()  # a line for every node that is not used, with the reason

    def __post_init__(self) -> None:
        shards = [stage.shard for stage in self.stages]
        assert shards, "a plan without stages"
        assert shards[0].first_layer == 0
        assert all(left.last_layer == right.first_layer for left, right in itertools.pairwise(shards))
        assert all(shard.first_layer < shard.last_layer for shard in shards)
        assert [shard.embed for shard in shards] == [True] + [False] * (len(shards) - 1)
        assert [shard.head for shard in shards] == [False] * (len(shards) - 1) + [True]
