"""The best layout over every subset of nodes in every order, or over one order: exact, by dynamic programming.

    best[set of nodes][its last node][l]    least sum of stages and hops that puts layers 0..l-1 on that set

A stage's time is a line in its number of layers, so the best first layer for every last one is the least of a sliding
window: a stage over all its ends costs O(layers), and all subsets of n nodes O(2^n n^2 layers).

With one step in flight the sum is the cycle. With m in flight the cycle is max(m * slowest, sum), which no sum alone
decides. So the question becomes: is there a layout with slowest < x / m and sum < x? Stages then have a greatest
length, which is the window's, and links that are too slow are closed. Every answer is a better layout, or the proof
that there is none below x; the last question is asked for the best cycle found, so that the result is exact.

This file does not know nodes, links or bytes, only their costs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from tllm.planner.problem import Costs, Cut, Layout, Problem

_EPSILON = 1e-9  # relative; sums of floats in another order differ by less
_KV_BISECTIONS = 10  # to 1/1000 of what memory could hold
_ENOUGH = 0.01  # relative width of the interval from which on bisection gives way to taking what is found

_Row = list[float]  # seconds by number of layers placed
_Probe = Callable[[float, float], Layout | None]  # slowest, sum, below which a layout is wanted


def best_over_subsets(
    problem: Problem, *, at_least: int = 1, required: int = 0, incumbent: Layout | None = None
) -> Layout | None:
    """The best layout over at least so many nodes, those in the bit mask `required` among them; None if none fits.

    An `incumbent` is beaten or returned; a good one saves time.
    """
    num_nodes = len(problem.nodes)
    weights = [sum(problem.num_stages[node] for node in _members(mask)) for mask in range(1 << num_nodes)]
    by_steps: dict[int, list[int]] = {}
    for mask in range(1, 1 << num_nodes):
        fits = weights[mask] <= problem.num_layers
        if fits and mask & required == required and mask.bit_count() >= at_least:
            by_steps.setdefault(problem.steps_in_flight(weights[mask]), []).append(mask)
    best = incumbent
    for num_steps in sorted(by_steps):
        finals = frozenset(by_steps[num_steps])
        most = max(weights[mask] for mask in finals)
        masks = [mask for mask in range(1, 1 << num_nodes) if weights[mask] <= most]

        def probe(slowest_s: float, sum_s: float, finals: frozenset[int] = finals, masks: list[int] = masks,
                  num_steps: int = num_steps) -> Layout | None:  # fmt: skip
            return _Subsets(problem, problem.costs(num_steps), slowest_s, sum_s).best(masks, finals)

        best = _improve(probe, num_steps, best)
    return best


def best_in_order(problem: Problem, order: Sequence[int], *, incumbent: Layout | None = None) -> Layout | None:
    """The best layout that uses all these nodes in this order."""
    stages = problem.stages(order)
    if len(stages) > problem.num_layers:
        return incumbent
    costs = problem.costs(problem.steps_in_flight(len(stages)))

    def probe(slowest_s: float, sum_s: float) -> Layout | None:
        return _Subsets(problem, costs, slowest_s, sum_s).in_order(order)

    return _improve(probe, costs.num_steps, incumbent)


def with_most_kv(problem: Problem, layout: Layout) -> Layout:
    """Among the cuts in the layout's order that are as fast, the one whose stages can all hold most KV."""
    num_steps = problem.steps_in_flight(len(layout.cut))
    sum_s = layout.cycle_s * (1 + _EPSILON)
    fits, too_many = problem.min_kv_positions, problem.subset(layout.order).most_kv_positions + 1
    for _ in range(_KV_BISECTIONS):
        if too_many - fits <= 1:
            break
        positions = (fits + too_many) // 2
        wanting = problem.subset(layout.order, min_kv_positions=positions)
        slowest_s = sum_s / num_steps if num_steps > 1 else math.inf
        costs = wanting.costs(num_steps)
        if (found := _Subsets(wanting, costs, slowest_s, sum_s).in_order(range(len(layout.order)))) is None:
            too_many = positions
        else:
            fits = positions
            layout = Layout(order=layout.order, cut=found.cut, cycle_s=found.cycle_s)
    return layout


def _improve(probe: _Probe, num_steps: int, best: Layout | None) -> Layout | None:
    """The best layout that `probe` can find, or `best` when there is none better."""
    if num_steps == 1:
        return probe(math.inf, best.cycle_s * (1 - _EPSILON) if best else math.inf) or best
    if best is None and (best := probe(math.inf, math.inf)) is None:
        return None
    impossible = 0.0  # no layout has a cycle below that
    bound = target = best.cycle_s * (1 - _EPSILON)
    while True:
        found = probe(target / num_steps, target)
        if found is not None and found.cycle_s < best.cycle_s:
            best = found
            bound = best.cycle_s * (1 - _EPSILON)
        elif target >= bound:
            return best
        else:
            impossible = target
        target = (impossible + bound) / 2 if bound - impossible > _ENOUGH * bound else bound


class _Subsets:
    """Layouts whose stages and links take at most `slowest_s` and whose sum is below `sum_s`."""

    def __init__(self, problem: Problem, costs: Costs, slowest_s: float, sum_s: float) -> None:
        self._problem, self._costs = problem, costs
        self._num_layers = problem.num_layers
        self._sum_s = sum_s
        self._is_possible = costs.head_step_s <= slowest_s
        nodes = range(len(problem.nodes))
        self._first_s = [_open(costs.first_s[j], costs.first_busy_s[j], slowest_s) for j in nodes]
        self._home_s = [_open(costs.home_s[j], costs.home_busy_s[j], slowest_s) for j in nodes]
        self._hop_s = [[_open(costs.hop_s[i][j], costs.hop_busy_s[i][j], slowest_s) for j in nodes] for i in nodes]
        self._lows = [self._window(node, slowest_s) for node in nodes]
        # What the layers that are still missing take at least.
        fastest_s = min((speed.layer_s for speed in costs.speeds), default=0.0)
        self._limits = [sum_s - (self._num_layers - done) * fastest_s for done in range(self._num_layers + 1)]

    def _window(self, node: int, slowest_s: float) -> list[int]:
        """For every last layer the lowest first one that memory and `slowest_s` allow."""
        lows = self._problem.lowest_first[node]
        if slowest_s == math.inf:
            return list(lows)
        inside = self._costs.max_layers(node, slowest_s, head=False)
        window = [max(low, last - inside) for last, low in enumerate(lows)]
        window[-1] = max(lows[-1], self._num_layers - self._costs.max_layers(node, slowest_s, head=True))
        return window

    def best(self, masks: Sequence[int], finals: frozenset[int]) -> Layout | None:
        """Over the sets in `finals`; `masks` are all that lead to them, ascending."""
        if not self._is_possible:
            return None
        rows: dict[tuple[int, int], _Row] = {}  # none: nothing that matters is possible
        found: tuple[float, int, int] | None = None
        for mask in masks:
            for node in _members(mask):
                if (entry := self._entry(rows, mask, node)) is None:
                    continue
                row = rows[mask, node] = self._through(entry, node)[-1]
                sum_s = row[-1] + self._home_s[node]
                if mask in finals and sum_s < (found[0] if found else self._sum_s):
                    found = (sum_s, mask, node)
        if found is None:
            return None
        order: list[int] = []
        cut: list[tuple[int, int]] = []
        _, mask, node = found
        last = self._num_layers
        while mask:
            entry = self._entry(rows, mask, node)
            assert entry is not None
            part = self._cut(entry, node, last)
            cut[:0] = part
            order.insert(0, node)
            last, mask, there = part[0][0], mask ^ (1 << node), node
            sources = [source for source in _members(mask) if (mask, source) in rows]
            node = min(sources, key=lambda source: rows[mask, source][last] + self._hop_s[source][there], default=node)
        return self._problem.layout(order, tuple(cut))

    def in_order(self, order: Sequence[int]) -> Layout | None:
        if not self._is_possible:
            return None
        entries: list[_Row] = []
        row: _Row = []
        for index, node in enumerate(order):
            hop_s = self._first_s[node] if index == 0 else self._hop_s[order[index - 1]][node]
            entry = self._start(node) if index == 0 else [seconds + hop_s for seconds in row]
            entries.append(entry)
            row = self._through(entry, node)[-1]
        if not row[-1] + self._home_s[order[-1]] < self._sum_s:
            return None
        cut: Cut = ()
        last = self._num_layers
        for entry, node in zip(reversed(entries), reversed(order), strict=True):
            part = self._cut(entry, node, last)
            cut = (*part, *cut)
            last = part[0][0]
        return self._problem.layout(order, cut)

    def _start(self, node: int) -> _Row:
        return [self._costs.head_step_s + self._first_s[node]] + [math.inf] * self._num_layers

    def _entry(self, rows: dict[tuple[int, int], _Row], mask: int, node: int) -> _Row | None:
        """Seconds until a step is at `node`, the last of the set `mask`, by layers placed before it."""
        before = mask ^ (1 << node)
        if not before:
            return self._start(node) if self._first_s[node] < math.inf else None
        ways = [
            [seconds + hop_s for seconds in rows[before, source]]
            for source in _members(before)
            if (before, source) in rows and (hop_s := self._hop_s[source][node]) < math.inf
        ]
        if not ways:
            return None
        entry = ways[0] if len(ways) == 1 else list(map(min, *ways))
        pairs = zip(entry, self._limits, strict=True)
        entry = [seconds if seconds < limit else math.inf for seconds, limit in pairs]
        return entry if min(entry[:-1]) < math.inf else None

    def _through(self, entry: _Row, node: int) -> list[_Row]:
        """Seconds by layers placed after each stage of `node`."""
        rows = [entry]
        num_stages = self._problem.num_stages[node]
        for stage in range(num_stages):
            if stage:
                rows[-1] = [seconds + self._hop_s[node][node] for seconds in rows[-1]]
            rows.append(self._stage(rows[-1], node, is_last=stage == num_stages - 1))
        return rows

    def _stage(self, entry: _Row, node: int, *, is_last: bool) -> _Row:
        """One stage more, with one layer or more; all layers are done only after a node's last stage."""
        speed, lows = self._costs.speeds[node], self._lows[node]
        layer_s, step_s = speed.layer_s, speed.step_s
        out = [math.inf] * (self._num_layers + 1)
        window: deque[tuple[float, int]] = deque()  # ascending in both
        for last in range(1, self._num_layers + 1):
            seconds = entry[last - 1] - (last - 1) * layer_s
            if seconds < math.inf:
                while window and window[-1][0] >= seconds:
                    window.pop()
                window.append((seconds, last - 1))
            low = lows[last]
            while window and window[0][1] < low:
                window.popleft()
            if window:
                out[last] = window[0][0] + last * layer_s + step_s
        out[-1] = out[-1] + speed.head_s if is_last else math.inf
        return out

    def _cut(self, entry: _Row, node: int, last: int) -> list[tuple[int, int]]:
        """The layers of the stages of `node` when they end before `last`."""
        rows = self._through(entry, node)
        layer_s = self._costs.speeds[node].layer_s
        part: list[tuple[int, int]] = []
        for row in reversed(rows[:-1]):
            first = min(range(self._lows[node][last], last), key=lambda first: row[first] - first * layer_s)
            part.insert(0, (first, last))
            last = first
        return part


def _open(seconds: float, busy_s: float, slowest_s: float) -> float:
    return seconds if busy_s <= slowest_s else math.inf


def _members(mask: int) -> list[int]:
    return [node for node in range(mask.bit_length()) if mask >> node & 1]
