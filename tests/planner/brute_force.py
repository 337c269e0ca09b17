"""The best cycle by trying everything: every subset in every order with every cut. Slow, and obviously right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tllm.models.spec import Shard
from tllm.planner.plan import StagePlan
from tllm.planner.predict import predict
from tllm.planner.profile import LinkProfile, Load, ModelProfile, NodeProfile


def layouts(model: ModelProfile, nodes: Sequence[NodeProfile], *, positions: int) -> Iterator[tuple[StagePlan, ...]]:
    """Every layout that fits in memory."""
    for num in range(1, len(nodes) + 1):
        for order in itertools.permutations(nodes, num):
            slots = [node for node in order for _ in range(min(node.num_workers, model.num_layers))]
            for inner in itertools.combinations(range(1, model.num_layers), len(slots) - 1):
                stages = tuple(
                    stage(model, node, first, last)
                    for node, (first, last) in zip(
                        slots, itertools.pairwise((0, *inner, model.num_layers)), strict=True
                    )
                )
                if all(fits(each, positions) for each in stages):
                    yield stages


def stage(model: ModelProfile, node: NodeProfile, first: int, last: int) -> StagePlan:
    return StagePlan(
        node=node,
        shard=Shard(first_layer=first, last_layer=last, embed=first == 0, head=last == model.num_layers),
        num_threads=1,
        held_bytes=model.held_bytes(first, last),
        read_bytes=model.read_bytes(first, last),
        kv_bytes_per_position=model.kv_bytes_per_position * (last - first),
    )


def fits(stage: StagePlan, positions: int) -> bool:
    needed = stage.held_bytes + positions * stage.kv_bytes_per_position
    return needed <= stage.node.memory_bytes // stage.node.num_workers


def best_cycle_s(
    model: ModelProfile, nodes: Sequence[NodeProfile], links: Sequence[LinkProfile], load: Load, *, positions: int
) -> float | None:
    """Of one stream from token to token; None when nothing fits."""
    cycles = []
    for stages in layouts(model, nodes, positions=positions):
        prediction = predict(model, stages, links, load)
        assert prediction is not None
        cycles.append(prediction.tpot_s)
    return min(cycles, default=None)
