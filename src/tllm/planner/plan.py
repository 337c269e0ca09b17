"""A plan: which node holds which stage. The stages cover every layer once, in order; the first embeds, the last has
the head. With it come a prediction of how fast it is, and the plans that lost against it.

This file does not know how a plan is found, predicted or carried out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tllm.models.spec import Shard
from tllm.planner.profile import NodeProfile

UNMEASURED_CHUNK = 128  # enough rows to compute nearly as fast as many, few enough to fill a pipeline soon


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage on one node."""

    node: NodeProfile
    shard: Shard
    num_threads: int
    held_bytes: int  # weights in memory
    read_bytes: int  # weights read by a decode step
    kv_bytes_per_position: int  # of all its layers


def format_rate(per_s: float) -> str:
    """Three significant digits, or all before the point: `14.2`, `1620`."""
    return f"{per_s:.3g}" if per_s < 999.5 else f"{per_s:.0f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How fast a plan is under a load, and what keeps it from being faster.

    `stage_s` and `hop_s` are of one decode step as it is under that load: a hop into every stage, the first from the
    head, and one from the last stage home.
    """

    ttft_s: float  # of one prompt while nothing else runs
    tpot_s: float  # between two tokens of one stream, while all streams decode
    tokens_per_s: float  # of all streams together
    bound: str  # "reading weights on A", "the link A -> B", ...
    stage_s: tuple[float, ...]
    hop_s: tuple[float, ...]  # one more than stages
    note: str = ""  # what was assumed instead of measured; may be empty
    prefill_chunk: int | None = None  # tokens of a prompt at a time with which `ttft_s` is least; None: not asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A plan that was not chosen."""

    description: str
    prediction: Prediction | None  # None: it does not fit
    why: str  # it lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Stages in the order in which hidden states pass them."""

    stages: tuple[StagePlan, ...]
    dropped: tuple[str, ...] = ()  # a line for every node that is not used, with the reason
    prediction: Prediction | None = None  # None: a node that is used has no measured speed
    alternatives: tuple[Alternative, ...] = ()  # best first

    @property
    def prefill_chunk(self) -> int | None:
        """Tokens of a prompt at a time; None: as many as a step takes."""
        if self.prediction is not None:
            return self.prediction.prefill_chunk
        return UNMEASURED_CHUNK if len(self.stages) > 1 else None

    def __post_init__(self) -> None:
        shards = [stage.shard for stage in self.stages]
        assert shards, "a plan without stages"
        assert shards[0].first_layer == 0
        assert all(left.last_layer == right.first_layer for left, right in itertools.pairwise(shards))
        assert all(shard.first_layer < shard.last_layer for shard in shards)
        assert [shard.embed for shard in shards] == [True] + [False] * (len(shards) - 1)
        assert [shard.head for shard in shards] == [False] * (len(shards) - 1) + [True]
