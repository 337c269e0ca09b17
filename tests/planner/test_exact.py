"""With measured speeds the plan is the best there is, and never slower than one node."""

from __future__ import annotations

import time
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.brute_force import best_cycle_s
from tllm.core.errors import PlanError
from tllm.core.types import HEAD
from tllm.planner.exact import best_over_subsets
from tllm.planner.network import Network
from tllm.planner.plan import Plan
from tllm.planner.predict import HEAD_STEP_S, predict
from tllm.planner.problem import Layout, Problem
from tllm.planner.profile import LinkProfile, Load, ModelProfile, NodeProfile, Speed
from tllm.planner.search import place

POSITIONS = 2
CLOSE = 1e-6  # relative


def model(layers: list[int], *, embed: int = 50, head: int = 50, tied: bool = False, hidden: int = 0) -> ModelProfile:
    return ModelProfile(
        name="m",
        layer_bytes=tuple(layers),
        embed_bytes=embed,
        head_bytes=head,
        tied=tied,
        kv_bytes_per_position=8,
        hidden_bytes=hidden,
    )


def speed(layer_ms: float, *, head_ms: float = 0.0, step_ms: float = 0.0, slope: float = 0.1) -> Speed:
    """`slope`: what a row more adds, as a fraction of one row."""
    rows = (1, 4, 16, 64)
    return Speed(
        rows=rows,
        layer_s=tuple(layer_ms / 1e3 * (1 + slope * (row - 1)) for row in rows),
        head_s=tuple(head_ms / 1e3 * (1 + slope * (row - 1)) for row in rows),
        step_s=step_ms / 1e3,
    )


def node(
    name: str, speed: Speed | None, *, memory: int = 10**9, workers: int = 1, threads: int = 4, host: str = "host"
) -> NodeProfile:
    return NodeProfile(
        id=name,
        name=name,
        machine=name,
        host=host,
        memory_bytes=memory,
        num_threads=threads,
        num_workers=workers,
        speed=speed,
    )


def cuts(plan: Plan) -> list[tuple[str, int, int]]:
    return [(stage.node.name, stage.shard.first_layer, stage.shard.last_layer) for stage in plan.stages]


def cycle_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.tpot_s


@st.composite
def clusters(draw, *, most_nodes=4, most_layers=6, most_memory=2000):
    """A model, nodes with speeds and tight memory, and links between many of them and the head.

    Drawn by a seed: of independent draws most are small, and in small clusters there is little to get wrong.
    """
    random = draw(st.randoms(use_true_random=False)) if draw(st.booleans()) else Random(draw(st.integers(0, 10**9)))
    is_even = random.random() < 0.5
    made = model(
        [100 if is_even else random.randint(1, 200) for _ in range(random.randint(1, most_layers))],
        embed=random.randint(0, 300),
        head=random.randint(0, 300),
        tied=random.random() < 0.5,
    )
    nodes = [
        node(
            name,
            speed(
                random.uniform(0.1, 10),
                head_ms=random.uniform(0, 20),
                step_ms=random.uniform(0, 2),
                slope=random.choice([0.0, 0.05, 1.0]),
            ),
            memory=random.randint(50, most_memory),
            workers=random.choice([1, 1, 2]),
            threads=random.randint(1, 2),
        )
        for name in "abcdefgh"[: random.randint(1, most_nodes)]
    ]
    ids = [HEAD, *(each.id for each in nodes)]
    links = [
        LinkProfile(
            source=source, target=target, rtt_s=10 ** random.uniform(-4, -1.5), bytes_per_s=10 ** random.uniform(4, 8)
        )
        for source in ids
        for target in ids
        if source != target and random.random() < 0.8
    ]
    return made, nodes, links


loads = st.builds(Load, streams=st.integers(1, 6))


@settings(max_examples=150, deadline=None)
@given(clusters(), loads)
def test_no_other_plan_is_faster(cluster, load):
    made, nodes, links = cluster
    best_s = best_cycle_s(made, nodes, links, load, positions=POSITIONS)
    try:
        plan = place(made, nodes, min_kv_positions=POSITIONS, links=links, load=load)
    except PlanError:
        assert best_s is None
        return
    if best_s is None:  # only with fewer stages than the nodes' workers
        assert plan.dropped
        return
    assert plan.prediction is not None
    assert cycle_s(plan) == pytest.approx(best_s, rel=CLOSE)
    by_hand = predict(made, plan.stages, links, load)
    assert plan.prediction == by_hand


@settings(max_examples=150, deadline=None)
@given(clusters(), loads)
def test_the_exact_search_needs_no_help_from_a_heuristic(cluster, load):
    made, nodes, links = cluster
    problem = Problem(
        model=made, nodes=nodes, network=Network(links), load=load, min_kv_positions=POSITIONS, head_step_s=HEAD_STEP_S
    )
    found = best_over_subsets(problem)
    best_s = best_cycle_s(made, nodes, links, load, positions=POSITIONS)
    assert (found is None) == (best_s is None)
    if found is not None:
        assert found.cycle_s == pytest.approx(best_s, rel=CLOSE)
        assert found == problem.layout(found.order, found.cut)
        # Nor is anything lost by what a nearly perfect incumbent allows it to leave out; a perfect one stays.
        worse = Layout(order=(), cut=(), cycle_s=found.cycle_s * 1.0001)
        again = best_over_subsets(problem, incumbent=worse)
        assert again is not None
        assert again.cycle_s == pytest.approx(best_s, rel=CLOSE)
        assert best_over_subsets(problem, incumbent=found) == found


@settings(max_examples=50, deadline=None)
@given(clusters(most_nodes=3, most_layers=5), loads)
def test_a_plan_fits_in_memory_and_covers_every_layer_once(cluster, load):
    made, nodes, links = cluster
    try:
        plan = place(made, nodes, min_kv_positions=POSITIONS, links=links, load=load)
    except PlanError:
        return
    assert [layer for _, first, last in cuts(plan) for layer in range(first, last)] == list(range(made.num_layers))
    for stage in plan.stages:
        needed = stage.held_bytes + POSITIONS * stage.kv_bytes_per_position
        assert needed <= stage.node.memory_bytes // stage.node.num_workers
    used = {stage.node.id for stage in plan.stages}
    assert {line.partition(":")[0] for line in plan.dropped} >= {each.name for each in nodes if each.id not in used}


@settings(max_examples=50, deadline=None)
@given(clusters(most_nodes=8, most_layers=12, most_memory=5000), loads)
def test_a_plan_is_never_slower_than_any_node_alone(cluster, load):
    made, nodes, links = cluster
    try:
        plan = place(made, nodes, min_kv_positions=POSITIONS, links=links, load=load)
    except PlanError:
        return
    for each in nodes:
        try:
            alone = place(made, [each], min_kv_positions=POSITIONS, links=links, load=load)
        except PlanError:
            continue
        if len(alone.stages) == min(each.num_workers, made.num_layers):
            assert cycle_s(plan) <= cycle_s(alone) * (1 + CLOSE)


@settings(max_examples=50, deadline=None)
@given(clusters(most_nodes=3, most_layers=6), loads)
def test_with_use_all_only_nodes_that_cannot_take_part_are_left_out(cluster, load):
    made, nodes, links = cluster
    try:
        plan = place(made, nodes, min_kv_positions=POSITIONS, links=links, load=load, use_all=True)
    except PlanError:
        return
    used = [each for each in nodes if each.id in {stage.node.id for stage in plan.stages}]
    for left_out in nodes:
        if left_out not in used:
            with pytest.raises(PlanError):
                _all_of(made, [*used, left_out], links, load)


def _all_of(made, nodes, links, load):
    """A plan over these very nodes with all their workers; PlanError where there is none."""
    plan = place(made, nodes, min_kv_positions=POSITIONS, links=links, load=load, use_all=True)
    wanted = sum(min(each.num_workers, made.num_layers) for each in nodes)
    if len(plan.stages) < wanted or {stage.node.id for stage in plan.stages} != {each.id for each in nodes}:
        raise PlanError("not all of them")


@pytest.mark.parametrize(("num_layers", "num_nodes"), [(28, 3), (16, 3), (32, 5), (3, 5)])
def test_layers_that_do_not_divide_leave_no_stage_longer_than_it_must_be(num_layers, num_nodes):
    nodes = [node(name, speed(1.0)) for name in "abcde"[:num_nodes]]
    plan = place(
        model([1] * num_layers, head=0),
        nodes,
        min_kv_positions=1,
        load=Load(streams=64),
        use_all=True,
    )
    lengths = [last - first for _, first, last in cuts(plan)]
    assert len(lengths) == min(num_nodes, num_layers)
    assert max(lengths) == -(-num_layers // len(lengths))


def test_of_plans_that_are_as_fast_the_one_with_most_room_for_kv_is_taken():
    nodes = [node("small", speed(1.0), memory=2_000), node("large", speed(1.0), memory=8_000)]
    plan = place(model([10] * 10, embed=0, head=0), nodes, min_kv_positions=1, use_all=True)
    assert {name: last - first for name, first, last in cuts(plan)} == {"small": 2, "large": 8}


def test_one_stream_goes_to_the_fastest_node_alone():
    nodes = [node("slow", speed(2.0)), node("fast", speed(1.0))]
    plan = place(model([1] * 10), nodes, min_kv_positions=1)
    assert cuts(plan) == [("fast", 0, 10)]
    assert plan.dropped == ("slow: would slow it: 83.3 -> 74 tokens/s",)


def test_many_streams_use_both_nodes_by_their_speed():
    nodes = [node("slow", speed(2.0)), node("fast", speed(1.0))]
    plan = place(model([1] * 12), nodes, min_kv_positions=1, load=Load(streams=32))
    assert {name: last - first for name, first, last in cuts(plan)} == {"slow": 4, "fast": 8}
    assert plan.dropped == ()


def test_the_head_goes_where_it_is_computed_fastest():
    nodes = [node("a", speed(1.0, head_ms=50), memory=12), node("b", speed(1.0, head_ms=1), memory=12)]
    plan = place(model([1] * 4, embed=0, head=0), nodes, min_kv_positions=0, load=Load(), use_all=True)
    assert plan.stages[-1].node.name == "b"


def test_the_order_of_nodes_follows_fast_links():
    nodes = [node(name, speed(1.0), memory=5) for name in "abc"]
    fast = {("a", "c"), ("c", "b"), (HEAD, "a"), ("b", HEAD)}
    links = [
        LinkProfile(source=s, target=t, rtt_s=1e-4 if (s, t) in fast else 0.1, bytes_per_s=1e9)
        for s in (HEAD, "a", "b", "c")
        for t in (HEAD, "a", "b", "c")
        if s != t
    ]
    made = ModelProfile(
        name="m", layer_bytes=(1,) * 12, embed_bytes=0, head_bytes=0, tied=False, kv_bytes_per_position=0
    )
    plan = place(made, nodes, min_kv_positions=0, links=links)
    assert [stage.node.name for stage in plan.stages] == ["a", "c", "b"]


def test_a_node_behind_a_slow_link_is_left_out_and_the_cost_said():
    nodes = [node("a", speed(1.0)), node("far", speed(1.0))]
    links = [
        LinkProfile(source=source, target=target, rtt_s=0.4, bytes_per_s=1e6)
        for source, target in (("a", "far"), ("far", "a"), (HEAD, "far"), ("far", HEAD))
    ]
    plan = place(model([1] * 10), nodes, min_kv_positions=1, links=links, load=Load(streams=4))
    assert [stage.node.name for stage in plan.stages] == ["a"]
    assert plan.dropped[0].startswith("far: would slow it: ")
    losers = {each.description: each for each in plan.alternatives}
    assert set(losers) == {"far alone", "a, far"} or set(losers) == {"far alone", "far, a"}
    assert all("slower, because of" in each.why for each in losers.values())


def test_a_node_with_workers_gives_all_of_its_stages_one_after_the_other():
    nodes = [node("a", speed(1.0), workers=2, memory=20), node("b", speed(1.0), memory=10)]
    made = model([1] * 24, embed=0, head=0)
    plan = place(made, nodes, min_kv_positions=0, load=Load(streams=8))
    names = [stage.node.name for stage in plan.stages]
    assert names in (["a", "a", "b"], ["b", "a", "a"])


def test_a_node_without_a_speed_waits_for_its_measurement_where_it_is_not_needed():
    nodes = [node("new", None), node("known", speed(1.0))]
    plan = place(model([1] * 4), nodes, min_kv_positions=1)
    assert cuts(plan) == [("known", 0, 4)]
    assert plan.dropped == ("new: its speed is not measured",)
    both = place(model([1] * 4), nodes, min_kv_positions=1, use_all=True)
    assert [stage.node.name for stage in both.stages] == ["new", "known"]
    assert both.prediction is None


def test_a_node_without_a_speed_is_used_where_it_is_needed():
    nodes = [node("new", None, memory=170), node("known", speed(1.0), memory=170)]
    plan = place(model([20] * 8), nodes, min_kv_positions=1)
    assert {stage.node.name for stage in plan.stages} == {"new", "known"}


def test_activations_of_a_step_must_fit():
    nodes = [node("a", speed(1.0), memory=100_000)]
    with pytest.raises(PlanError, match="does not fit"):
        place(model([1], hidden=16), nodes, min_kv_positions=1, load=Load(max_batch_tokens=512))
    place(model([1], hidden=16), nodes, min_kv_positions=1, load=Load(max_batch_tokens=64))


def test_a_model_that_fits_nowhere_is_one_line():
    with pytest.raises(PlanError) as refused:
        place(model([10_000]), [node("a", speed(1.0), memory=500)], min_kv_positions=1)
    assert "\n" not in str(refused.value)


def _many(num: int, *, memory: int) -> tuple[list[NodeProfile], list[LinkProfile]]:
    """Nodes of several speeds, all joined, with nothing left to chance."""
    nodes = [
        node(f"n{index}", speed(1 + index * 37 % 11 / 3, head_ms=3, step_ms=0.3), memory=memory) for index in range(num)
    ]
    links = [
        LinkProfile(
            source=a.id,
            target=b.id,
            rtt_s=2e-4 * (1 + (i * 13 + j * 7) % 17),
            bytes_per_s=1e7 * (1 + (i * 5 + j) % 9),
        )
        for i, a in enumerate(nodes)
        for j, b in enumerate(nodes)
        if a is not b
    ]
    return nodes, links


@pytest.mark.parametrize(("num", "num_layers", "limit_s"), [(8, 80, 2.0), (64, 128, 1.0)])
@pytest.mark.parametrize("streams", [1, 16])
@pytest.mark.parametrize("memory", [10**9, 5000])
def test_large_clusters_are_planned_in_time(num, num_layers, limit_s, streams, memory):
    nodes, links = _many(num, memory=memory * (2 if num == 8 else 1))
    made = model([600] * num_layers, embed=2000, head=2000, hidden=0)
    taken_s = []
    while not taken_s or (taken_s[-1] > limit_s and len(taken_s) < 3):  # a busy machine is slower than the planner
        began_s = time.process_time()
        plan = place(made, nodes, min_kv_positions=1, links=links, load=Load(streams=streams))
        taken_s.append(time.process_time() - began_s)
    assert taken_s[-1] < limit_s
    assert sum(last - first for _, first, last in cuts(plan)) == num_layers
    assert plan.prediction is not None
    for each in nodes:
        if memory == 10**9:
            alone = place(made, [each], min_kv_positions=1, links=links, load=Load(streams=streams))
            assert cycle_s(plan) <= cycle_s(alone) * (1 + CLOSE)


@pytest.mark.parametrize("streams", [1, 4, 32])
def test_beyond_the_exact_search_a_plan_is_no_slower_than_the_best_of_a_few_fast_nodes(streams):
    nodes, links = _many(12, memory=40_000)
    made = model([600] * 24, embed=2000, head=2000)
    plan = place(made, nodes, min_kv_positions=1, links=links, load=Load(streams=streams))
    few = sorted(nodes, key=lambda each: each.speed.layer_s[0])[:5]
    exact = place(made, few, min_kv_positions=1, links=links, load=Load(streams=streams))
    assert cycle_s(plan) <= cycle_s(exact) * (1 + CLOSE)


def test_beyond_the_exact_search_every_node_takes_part_where_all_are_needed():
    nodes, links = _many(20, memory=3200)
    plan = place(model([600] * 60, embed=600, head=600), nodes, min_kv_positions=1, links=links)
    assert len(plan.stages) > 60 * 608 // 3200
    with pytest.raises(PlanError):
        place(model([600] * 130, embed=600, head=600), nodes, min_kv_positions=1, links=links)
    everyone = place(model([600] * 60), nodes, min_kv_positions=1, links=links, use_all=True)
    assert len(everyone.stages) == 20
