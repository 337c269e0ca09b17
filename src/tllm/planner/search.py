"""Find the plan that serves a load best: which nodes, in which order, with which layers.

    slots    A0   A1        B0          in the order in which the pipeline visits them
    layers   0 1 2 | 3 4 5 6 | 7 8 9+head

Where speeds are measured, every single node, and every subset of nodes in every order with every cut are candidates:
exact up to `EXACT_NODES` nodes (exact.py), a stated heuristic beyond (orders.py). A plan says what it predicts, which
nodes it left out and what they would have cost. Before any speed is measured, all nodes are used in the given order,
and a stage costs the bytes that it reads divided by its threads; for one stream, whose tokens pass all stages one after
the other wherever the cuts are, that of a prompt's chunk, which reads the head once.

This file does not know where profiles come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from tllm.core.errors import PlanError
from tllm.core.units import format_bytes
from tllm.models.spec import Shard
from tllm.planner.exact import best_in_order, best_over_subsets, with_most_kv
from tllm.planner.network import Network
from tllm.planner.orders import good_layout, near_first, with_node
from tllm.planner.plan import Alternative, Plan, Prediction, StagePlan, format_rate
from tllm.planner.predict import HEAD_STEP_S, gain, predict
from tllm.planner.problem import Cut, Layout, Problem, activation_bytes
from tllm.planner.profile import LinkProfile, Load, ModelProfile, NodeProfile

EXACT_NODES = 8
_ALTERNATIVES = 8  # shown at most


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    node: NodeProfile
    num_threads: int
    memory_bytes: int


def place(
    model: ModelProfile,
    nodes: Sequence[NodeProfile],
    *,
    min_kv_positions: int,
    links: Sequence[LinkProfile] = (),
    load: Load = Load(),
    head_machine: str = "",
    head_step_s: float = HEAD_STEP_S,
    use_all: bool = False,
) -> Plan:
    """The best plan for `load`: the least time of a token for one stream, the most tokens a second for several.

    A node that is used has `num_workers` stages, one after the other. Every stage must hold its weights, the KV of
    `min_kv_positions` positions and the activations of a step. A node that would make it slower is left out, and so is
    one without a measured speed while others have one and suffice; with `use_all` only nodes that cannot take part are.
    `Plan.dropped` names them. `head_machine` is the `machine` of the head, for links that were not measured.

    While no node has a speed, all are used in the given order; slots beyond the number of layers are left out, and so
    are those with the least memory while no cut over all of them fits.

    Raises PlanError when memory does not suffice.
    """
    if not nodes:
        raise PlanError("There is no node to place the model on. Start one with `tllm join`, or leave out --no-local.")
    measured = [node for node in nodes if node.speed is not None]
    if measured and (len(measured) == len(nodes) or not use_all):
        network = Network(links, head_machine=head_machine)
        search = _Search(model, measured, network, load, min_kv_positions, head_step_s)
        if (best := search.best(use_all=use_all)) is not None:
            unknown = [f"{node.name}: its speed is not measured" for node in nodes if node.speed is None]

            def prediction(stages: Sequence[StagePlan]) -> Prediction:
                known = predict(model, stages, links, load, head_machine=head_machine, head_step_s=head_step_s)
                assert known is not None, "a node without a speed"
                return known

            return _explained(search, best, load, unknown, prediction, use_all=use_all)
    plan = _place_in_order(model, nodes, load, min_kv_positions)
    found = predict(model, plan.stages, links, load, head_machine=head_machine, head_step_s=head_step_s)
    return replace(plan, prediction=found)


class _Search:
    """The layouts of measured nodes: the best of all, and the best with a given node among them."""

    def __init__(
        self,
        model: ModelProfile,
        nodes: Sequence[NodeProfile],
        network: Network,
        load: Load,
        min_kv_positions: int,
        head_step_s: float,
    ) -> None:
        everyone = Problem(
            model=model,
            nodes=nodes,
            network=network,
            load=load,
            min_kv_positions=min_kv_positions,
            head_step_s=head_step_s,
        )
        useful = [index for index in range(len(nodes)) if everyone.can_hold_a_layer(index)]
        self.too_small = [node for index, node in enumerate(nodes) if index not in useful]
        self.problem = everyone.subset(useful)
        self.is_exact = len(useful) <= EXACT_NODES

    def best(self, *, use_all: bool) -> Layout | None:
        """Over any nodes, or over as many as can take part together."""
        problem = self.problem
        everybody = range(len(problem.nodes))
        if not everybody:
            return None
        if use_all:
            return self._largest()
        best = good_layout(problem)
        return best_over_subsets(problem, incumbent=best) if self.is_exact else best

    def alone(self, node: int) -> Layout | None:
        return best_in_order(self.problem, [node])

    def beside(self, layout: Layout, node: int) -> Layout | None:
        """The best layout of the same nodes and one more."""
        if not self.is_exact:
            return with_node(self.problem, layout, node)
        chosen = [*layout.order, node]
        problem = self.problem.subset(chosen)
        good = with_node(problem, _renumbered(layout, range(len(layout.order))), len(layout.order))
        best = best_over_subsets(problem, at_least=len(chosen), incumbent=good)
        return best and _renumbered(best, [chosen[index] for index in best.order])

    def _largest(self) -> Layout | None:
        problem = self.problem
        if self.is_exact:
            for num in range(len(problem.nodes), 0, -1):
                if (best := best_over_subsets(problem, at_least=num)) is not None:
                    return best
            return None
        left = sorted(range(len(problem.nodes)), key=lambda node: -problem.nodes[node].memory_bytes)
        while left:  # the smallest leave until the rest can hold the model
            if (best := best_in_order(problem, near_first(problem, left))) is not None:
                return best
            left.pop()
        return None


def _renumbered(layout: Layout, order: Sequence[int]) -> Layout:
    return Layout(order=tuple(order), cut=layout.cut, cycle_s=layout.cycle_s)


def _explained(
    search: _Search,
    best: Layout,
    load: Load,
    unknown: Sequence[str],
    prediction: Callable[[Sequence[StagePlan]], Prediction],
    *,
    use_all: bool,
) -> Plan:
    """The plan of the best layout, with what the other nodes would have made of it."""
    problem = search.problem
    stages = _stages(problem, with_most_kv(problem, best))
    won = prediction(stages)
    dropped = [
        *unknown,
        *(f"{node.name}: {format_bytes(node.memory_bytes)} are too little for a layer" for node in search.too_small),
    ]
    losers: dict[tuple[int, ...], Layout] = {}
    alternatives: list[Alternative] = []
    for index, node in enumerate(problem.nodes):
        if (layout := search.alone(index)) is not None:
            losers[layout.order] = layout
        else:
            why = "the model does not fit there"
            alternatives.append(Alternative(description=f"{node.name} alone", prediction=None, why=why))
        if index in best.order:
            if node.num_workers > problem.num_stages[index]:
                dropped.append(f"{node.name}: {problem.num_layers} layers leave nothing for {_surplus(problem, index)}")
            continue
        layout = None if use_all else search.beside(best, index)
        if layout is None:
            dropped.append(f"{node.name}: there is no way to use it with the others")
            continue
        losers[layout.order] = layout
        speed = prediction(_stages(problem, layout)).tokens_per_s
        verb = "would slow it" if speed < 0.995 * won.tokens_per_s else "would not speed it up"
        dropped.append(f"{node.name}: {verb}: {format_rate(won.tokens_per_s)} -> {format_rate(speed)} tokens/s")
    losers.pop(best.order, None)
    shown = []
    for layout in sorted(losers.values(), key=lambda layout: layout.cycle_s)[:_ALTERNATIVES]:
        names = [problem.nodes[index].name for index in layout.order]
        lost = prediction(_stages(problem, layout))
        shown.append(
            Alternative(
                description=f"{names[0]} alone" if len(names) == 1 else ", ".join(names),
                prediction=lost,
                why=_verdict(won, lost, load),
            )
        )
    shown += alternatives[: _ALTERNATIVES - len(shown)]
    return Plan(stages=stages, dropped=tuple(dropped), prediction=won, alternatives=tuple(shown))


def _surplus(problem: Problem, node: int) -> str:
    num = problem.nodes[node].num_workers - problem.num_stages[node]
    return f"{num} of its workers"


def _verdict(won: Prediction, lost: Prediction, load: Load) -> str:
    difference = gain(won, lost, load)
    if difference > 0.001:  # only where more nodes are wanted than make it fast
        return f"{difference:.0%} faster, but with fewer nodes than wanted"
    if difference > -0.001:
        return "as fast, and no simpler"
    return f"{-difference:.0%} slower, because of {lost.bound}"


def _stages(problem: Problem, layout: Layout) -> tuple[StagePlan, ...]:
    slots = [slot for index in layout.order for slot in _slots(problem.nodes[index])[: problem.num_stages[index]]]
    return _stage_plans(problem.model, slots, layout.cut)


def _stage_plans(model: ModelProfile, slots: Sequence[_Slot], cut: Cut) -> tuple[StagePlan, ...]:
    return tuple(
        StagePlan(
            node=slot.node,
            shard=Shard(first_layer=first, last_layer=last, embed=first == 0, head=last == model.num_layers),
            num_threads=slot.num_threads,
            held_bytes=model.held_bytes(first, last),
            read_bytes=model.read_bytes(first, last),
            kv_bytes_per_position=model.kv_bytes_per_position * (last - first),
        )
        for slot, (first, last) in zip(slots, cut, strict=True)
    )


def _place_in_order(model: ModelProfile, nodes: Sequence[NodeProfile], load: Load, min_kv_positions: int) -> Plan:
    """All nodes in the given order, as even as they can be while nobody knows how fast they are."""
    slots = [slot for node in nodes for slot in _slots(node)]
    spare_bytes = activation_bytes(model, load)
    used, unused = slots[: model.num_layers], slots[model.num_layers :]
    dropped = [f"{slot.node.name}: {model.num_layers} layers leave nothing for it" for slot in unused]
    while (cut := _best_cut(model, used, load, min_kv_positions)) is None and len(used) > 1:
        smallest = min(used, key=lambda slot: slot.memory_bytes)
        used.remove(smallest)
        dropped.append(f"{smallest.node.name}: {format_bytes(smallest.memory_bytes)} are too little for a layer there")
    if cut is None:
        need = format_bytes(_needed_bytes(model, min_kv_positions))
        spare = f" and activations {format_bytes(spare_bytes)} on every stage" if spare_bytes else ""
        raise PlanError(
            f"{model.name} does not fit: its weights and the smallest KV cache take {need}{spare}, and the "
            f"nodes offer {', '.join(f'{node.name} {format_bytes(node.memory_bytes)}' for node in nodes)}. "
            "Add a node with `tllm join`, or choose a smaller model, dtype or --max-model-len."
        )
    return Plan(stages=_stage_plans(model, used, cut), dropped=tuple(dropped))


def _needed_bytes(model: ModelProfile, min_kv_positions: int) -> int:
    """Weights and the smallest KV cache, wherever they are."""
    kv_bytes = min_kv_positions * model.kv_bytes_per_position * model.num_layers
    return model.held_bytes(0, model.num_layers) + kv_bytes


def _slots(node: NodeProfile) -> list[_Slot]:
    """A node's threads and memory divided among its workers; every worker has a thread."""
    threads, rest = divmod(max(node.num_threads, node.num_workers), node.num_workers)
    return [
        _Slot(node=node, num_threads=threads + (index < rest), memory_bytes=node.memory_bytes // node.num_workers)
        for index in range(node.num_workers)
    ]


def _best_cut(model: ModelProfile, slots: Sequence[_Slot], load: Load, min_kv_positions: int) -> Cut | None:
    """The cut whose greatest stage time is least, by bytes read and threads; None if nothing fits."""
    spare_bytes = activation_bytes(model, load)
    head_bytes = model.head_bytes if load.streams == 1 else 0  # that do not count
    if _needed_bytes(model, min_kv_positions) > sum(max(slot.memory_bytes - spare_bytes, 0) for slot in slots):
        return None

    def stage_cost(slot: _Slot, first: int, last: int) -> float | None:
        memory = model.held_bytes(first, last) + min_kv_positions * model.kv_bytes_per_position * (last - first)
        if memory + spare_bytes > slot.memory_bytes:
            return None
        return (model.read_bytes(first, last) - head_bytes * (last == model.num_layers)) / slot.num_threads

    @cache
    def best(slot: int, first: int) -> tuple[float, Cut] | None:
        """Cheapest way to put layers `first...` on the slots from `slot` on."""
        left = len(slots) - slot - 1
        lasts = [model.num_layers] if left == 0 else range(first + 1, model.num_layers - left + 1)
        options = []
        for last in lasts:
            cost = stage_cost(slots[slot], first, last)
            if cost is None:
                break  # nor will it hold more
            rest: tuple[float, Cut] | None = (0.0, ()) if left == 0 else best(slot + 1, last)
            if rest is not None:
                options.append((max(cost, rest[0]), ((first, last), *rest[1])))
        return min(options, default=None)

    found = best(0, 0)
    return None if found is None else found[1]
