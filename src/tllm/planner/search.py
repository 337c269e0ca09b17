"""Find the cut of a model's layers over slots (a node, or a part of one) that keeps the slowest stage fastest.

    slots    A0   A1        B0          in the order in which the pipeline visits them
    layers   0 1 2 | 3 4 5 6 | 7 8 9+head

A decode step costs a stage the bytes it reads divided by its slot's speed; threads stand for speed until nodes bring
measured ones. The cut is exact: dynamic programming over (slot, layers placed), O(slots x layers^2).

This file does not know where profiles come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tllm.core.errors import PlanError
from tllm.core.units import format_bytes
from tllm.models.spec import Shard
from tllm.planner.plan import Plan, StagePlan
from tllm.planner.profile import ModelProfile, NodeProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    node: NodeProfile
    num_threads: int
    memory_bytes: int


def place(model: ModelProfile, nodes: Sequence[NodeProfile], *, min_kv_positions: int) -> Plan:
    """The best plan that uses the nodes in the given order, each for `num_workers` stages.

    Every stage must hold its weights and the KV of `min_kv_positions` positions. Slots beyond the number of layers are
    left out, and so are those with the least memory while no cut over all of them fits; `Plan.dropped` names them.
    Raises PlanError when memory does not suffice.
    """
    if not nodes:
        raise PlanError("There is no node to place the model on. Start one with `tllm join`, or leave out --no-local.")
    slots = [slot for node in nodes for slot in _slots(node)]
    used, unused = slots[: model.num_layers], slots[model.num_layers :]
    dropped = [f"{slot.node.name}: {model.num_layers} layers leave nothing for it" for slot in unused]
    while (cut := best_cut(model, used, min_kv_positions)) is None and len(used) > 1:
        smallest = min(used, key=lambda slot: slot.memory_bytes)
        used.remove(smallest)
        dropped.append(f"{smallest.node.name}: {format_bytes(smallest.memory_bytes)} are too little for a layer there")
    if cut is None:
        need = model.held_bytes(0, model.num_layers) + min_kv_positions * model.kv_bytes_per_position * model.num_layers
        raise PlanError(
            f"{model.name} does not fit: its weights and the smallest KV cache take {format_bytes(need)}, and the "
            f"nodes offer {', '.join(f'{node.name} {format_bytes(node.memory_bytes)}' for node in nodes)}. "
            "Add a node with `tllm join`, or choose a smaller model, dtype or --max-model-len."
        )
    stages = tuple(
        StagePlan(
            node=slot.node,
            shard=Shard(first_layer=first, last_layer=last, embed=first == 0, head=last == model.num_layers),
            num_threads=slot.num_threads,
            held_bytes=model.held_bytes(first, last),
            read_bytes=model.read_bytes(first, last),
            kv_bytes_per_position=model.kv_bytes_per_position * (last - first),
        )
        for slot, (first, last) in zip(used, cut, strict=True)
    )
    return Plan(stages=stages, dropped=tuple(dropped))


def _slots(node: NodeProfile) -> list[_Slot]:
    """A node's threads and memory divided among its workers; every worker has a thread."""
    threads, rest = divmod(max(node.num_threads, node.num_workers), node.num_workers)
    return [
        _Slot(node=node, num_threads=threads + (index < rest), memory_bytes=node.memory_bytes // node.num_workers)
        for index in range(node.num_workers)
    ]


def best_cut(model: ModelProfile, slots: Sequence[_Slot], min_kv_positions: int) -> list[tuple[int, int]] | None:
    """Half-open layer ranges, one per slot, none empty, whose greatest stage time is least; None if nothing fits."""

    def stage_cost(slot: _Slot, first: int, last: int) -> float | None:
        memory = model.held_bytes(first, last) + min_kv_positions * model.kv_bytes_per_position * (last - first)
        return model.read_bytes(first, last) / slot.num_threads if memory <= slot.memory_bytes else None

    @cache
    def best(slot: int, first: int) -> tuple[float, tuple[tuple[int, int], ...]] | None:
        """Cheapest way to put layers `first...` on the slots from `slot` on."""
        left = len(slots) - slot - 1
        lasts = [model.num_layers] if left == 0 else range(first + 1, model.num_layers - left + 1)
        options = []
        for last in lasts:
            cost = stage_cost(slots[slot], first, last)
            rest = (0.0, ()) if left == 0 else best(slot + 1, last)
            if cost is not None and rest is not None:
                options.append((max(cost, rest[0]), ((first, last), *rest[1])))
        return min(options, default=None)

    found = best(0, 0)
    return None if found is None else list(found[1])
