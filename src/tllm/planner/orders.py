"""A good layout over many nodes, where trying every order would take too long. A heuristic, and this is all of it:

    1. Nodes are sorted twice, fastest first and largest first. Every prefix of both is put into the order of nearest
       neighbours, from the head on, and given layers: one to every stage, the rest to the fastest stages up to what
       their memory and the slowest time aimed at allow.
    2. The best of these, or the best layout over the few fastest nodes if that is better, is improved while a move
       improves it: leave a node out, take another in, put a node elsewhere, turn a run of nodes around. The moves
       tried are limited, not timed, so that the answer is always the same.
    3. Its cut is made exact.

Layers count as equal and as large as the largest while orders are compared; the cut in the end is exact again.

This file does not know nodes, links or bytes, only their costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from tllm.planner.exact import best_in_order, best_over_subsets
from tllm.planner.problem import Cut, Layout, Problem

_BISECTIONS = 12  # of the cycle aimed at
_CORE_NODES = 5  # the fastest, over which every layout is tried
_DETOURS = 3  # places for one node more that are tried
_MOVED_STAGES = 6_000  # stages of all layouts that moves may try


def good_layout(problem: Problem) -> Layout | None:
    """Much better than chance, and never worse than the best single node. None when it found none that fits."""
    nodes = range(len(problem.nodes))
    solo_s = [_solo_s(problem, node) for node in nodes]
    fastest = sorted(nodes, key=lambda node: solo_s[node])
    largest = sorted(nodes, key=lambda node: -problem.nodes[node].memory_bytes)
    best: Layout | None = None
    for ranked in (fastest, largest):
        for num in range(1, len(ranked) + 1):
            best = _better(best, filled(problem, near_first(problem, ranked[:num])))
    for node in nodes:
        best = _better(best, filled(problem, [node]))
    if best is None:  # all layers as large as the largest fit nowhere; as they are, they may
        return best_in_order(problem, near_first(problem, nodes))
    core = problem.subset(fastest[:_CORE_NODES])
    if (few := best_over_subsets(core)) is not None:
        order = [fastest[index] for index in few.order]
        best = _better(best, Layout(order=tuple(order), cut=few.cut, cycle_s=few.cycle_s))
        assert best is not None
    best = _improved(problem, best)
    return best_in_order(problem, best.order, incumbent=best)


def near_first(problem: Problem, nodes: Sequence[int]) -> list[int]:
    """From the head to the nearest node, from there to the nearest of the rest, and so on."""
    costs = problem.costs(1)
    left, order = list(nodes), [min(nodes, key=lambda node: costs.first_s[node])]
    left.remove(order[0])
    while left:
        hop_s = costs.hop_s[order[-1]]
        order.append(min(left, key=lambda node: hop_s[node]))
        left.remove(order[-1])
    return order


def with_node(problem: Problem, layout: Layout, node: int) -> Layout | None:
    """The layout with one node more: last, or where the way to it is shortest. None when it fits nowhere there."""
    order = layout.order
    costs = problem.costs(1)

    def detour_s(place: int) -> float:
        to_s = costs.hop_s[order[place - 1]][node] if place else costs.first_s[node]
        from_s = costs.hop_s[node][order[place]] if place < len(order) else costs.home_s[node]
        return to_s + from_s

    places = sorted(range(len(order)), key=detour_s)[:_DETOURS]
    best: Layout | None = None
    for place in (*places, len(order)):
        best = _better(best, filled(problem, [*order[:place], node, *order[place:]]))
    return best


def filled(problem: Problem, order: Sequence[int]) -> Layout | None:
    """Layers for the stages of that order. Exact where all layers are equal."""
    stages = problem.stages(order)
    if len(stages) > problem.num_layers:
        return None
    costs = problem.costs(problem.steps_in_flight(len(stages)))
    end = len(stages) - 1
    room = [
        problem.max_layers(node, embed=index == 0, head=index == end) if index in (0, end) else 0
        for index, node in enumerate(stages)
    ]
    for index, node in enumerate(stages[1:end], start=1):
        room[index] = problem.max_layers(node, embed=False, head=False)
    by_speed = sorted(range(len(stages)), key=lambda index: costs.speeds[stages[index]].layer_s)

    def attempt(limits: Sequence[int]) -> Layout | None:
        counts, left = [1] * len(stages), problem.num_layers - len(stages)
        if min(limits) < 1:
            return None
        for index in by_speed:
            more = min(left, limits[index] - 1)
            counts[index] += more
            left -= more
        if left:
            return None
        cut: Cut = tuple(pairwise(accumulate(counts, initial=0)))
        return problem.layout(order, cut)

    best = attempt(room)
    if best is None or costs.num_steps == 1:
        return best
    impossible, possible = 0.0, best.cycle_s
    for _ in range(_BISECTIONS):
        aim_s = (impossible + possible) / 2
        slowest_s = aim_s / costs.num_steps
        limits = [
            min(most, costs.max_layers(node, slowest_s, head=index == end))
            for index, (node, most) in enumerate(zip(stages, room, strict=True))
        ]
        found = attempt(limits)
        if found is not None and found.cycle_s < best.cycle_s:
            best = found
        if found is not None and found.cycle_s <= aim_s:
            possible = aim_s
        else:
            impossible = aim_s
    return best


def _solo_s(problem: Problem, node: int) -> float:
    """One step through the whole model on that node, memory aside."""
    costs = problem.costs(1)
    speed = costs.speeds[node]
    return speed.seconds(problem.num_layers, head=True) + costs.first_s[node] + costs.home_s[node]


def _better(best: Layout | None, other: Layout | None) -> Layout | None:
    if best is None or other is None:
        return best or other
    return other if other.cycle_s < best.cycle_s else best


def _improved(problem: Problem, best: Layout) -> Layout:
    budget = _MOVED_STAGES
    while True:
        for order in _moves(len(problem.nodes), best.order):
            budget -= len(order)
            if budget < 0:
                return best
            found = filled(problem, order)
            if found is not None and found.cycle_s < best.cycle_s * (1 - 1e-9):
                best = found
                break
        else:
            return best


def _moves(num_nodes: int, order: tuple[int, ...]) -> Iterator[list[int]]:
    """Neighbours of an order: one node less, one more, one elsewhere, a run of them turned around."""
    for index in range(len(order) if len(order) > 1 else 0):
        yield [*order[:index], *order[index + 1 :]]
    for node in range(num_nodes):
        if node not in order:
            yield [*order, node]
            yield [node, *order]
    for index, node in enumerate(order):
        rest = [*order[:index], *order[index + 1 :]]
        for place in range(len(rest), -1, -1):
            if place != index:
                yield [*rest[:place], node, *rest[place:]]
    for first in range(len(order)):
        for last in range(first + 2, len(order) + 1):
            yield [*order[:first], *reversed(order[first:last]), *order[last:]]
