"""The cut: every layer once and in order, as even as it can be, within memory."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import PlanError
from tllm.planner.plan import UNMEASURED_CHUNK, Plan
from tllm.planner.profile import Load, ModelProfile, NodeProfile
from tllm.planner.search import place

KV = 8


def model(layers: list[int], embed: int = 50, head: int = 50, *, tied: bool = False) -> ModelProfile:
    return ModelProfile(
        name="m", layer_bytes=tuple(layers), embed_bytes=embed, head_bytes=head, tied=tied, kv_bytes_per_position=KV
    )


def node(name: str, *, memory: int = 10**9, threads: int = 1, workers: int = 1) -> NodeProfile:
    return NodeProfile(
        id=name, name=name, machine=name, host="", memory_bytes=memory, num_threads=threads, num_workers=workers
    )


def cuts(plan: Plan) -> list[tuple[int, int]]:
    return [(stage.shard.first_layer, stage.shard.last_layer) for stage in plan.stages]


nodes_of_any_kind = st.lists(
    st.builds(
        node,
        st.sampled_from(["a", "b", "c"]),
        memory=st.integers(100, 5000),
        threads=st.integers(1, 8),
        workers=st.integers(1, 3),
    ),
    min_size=1,
    max_size=4,
)
models_of_any_kind = st.builds(
    model,
    st.lists(st.integers(1, 200), min_size=1, max_size=12),
    embed=st.integers(0, 300),
    head=st.integers(0, 300),
    tied=st.booleans(),
)


@given(models_of_any_kind, nodes_of_any_kind, st.integers(0, 20))
def test_a_plan_covers_every_layer_once_in_order_within_memory(model, nodes, positions):
    try:
        plan = place(model, nodes, min_kv_positions=positions)
    except PlanError:
        return
    ranges = cuts(plan)
    assert [layer for first, last in ranges for layer in range(first, last)] == list(range(model.num_layers))
    assert all(first < last for first, last in ranges)
    assert [stage.shard.embed for stage in plan.stages].index(True) == 0
    assert plan.stages[-1].shard.head
    for stage in plan.stages:
        needed = stage.held_bytes + positions * stage.kv_bytes_per_position
        assert needed <= stage.node.memory_bytes // stage.node.num_workers


@given(models_of_any_kind, nodes_of_any_kind, st.sampled_from([1, 2]))
def test_no_other_cut_has_a_faster_slowest_stage(model, nodes, streams):
    def work(first: int, last: int) -> int:
        """Of a prompt the head projects one row; for several streams' tokens it is read as often as layers."""
        projects = streams == 1 and last == model.num_layers
        return model.read_bytes(first, last) - model.head_bytes * projects

    try:
        plan = place(model, nodes, min_kv_positions=1, load=Load(streams=streams))
    except PlanError:
        plan = None
    slots = [
        (
            max(node.num_threads, node.num_workers) // node.num_workers
            + (index < max(node.num_threads, node.num_workers) % node.num_workers),
            node.memory_bytes // node.num_workers,
        )
        for node in nodes
        for index in range(node.num_workers)
    ][: model.num_layers]
    costs = []
    for inner in itertools.combinations(range(1, model.num_layers), len(slots) - 1):
        ranges = list(itertools.pairwise([0, *inner, model.num_layers]))
        if all(
            model.held_bytes(*cut) + model.kv_bytes_per_position * (cut[1] - cut[0]) <= memory
            for cut, (_, memory) in zip(ranges, slots, strict=True)
        ):
            costs.append(max(work(*cut) / threads for cut, (threads, _) in zip(ranges, slots, strict=True)))
    if plan is None or plan.dropped:
        assert not costs or len(plan.dropped) == sum(node.num_workers for node in nodes) - len(slots)
    if plan is not None and costs:
        stages = [(stage, stage.shard) for stage in plan.stages]
        assert max(work(s.first_layer, s.last_layer) / stage.num_threads for stage, s in stages) == min(costs)


def test_the_projection_counts_as_layers_so_that_the_last_stage_gets_fewer():
    # Llama-3.2-1B: a layer is 60.8 M weights and the tied projection 262.7 M, as much as 4.3 layers.
    made = model([608] * 16, embed=2627, head=2627, tied=True)
    plan = place(made, [node("a", workers=2)], min_kv_positions=1, load=Load(streams=8))
    assert cuts(plan) == [(0, 10), (10, 16)]


def test_for_one_stream_layers_are_even_because_only_its_prompt_can_overlap():
    made = model([608] * 16, embed=2627, head=2627, tied=True)
    plan = place(made, [node("a", workers=2)], min_kv_positions=1)
    assert cuts(plan) == [(0, 8), (8, 16)]
    assert plan.prefill_chunk == UNMEASURED_CHUNK
    alone = place(made, [node("a")], min_kv_positions=1)
    assert alone.prefill_chunk is None, "nothing overlaps"


def test_a_faster_node_gets_more_layers():
    plan = place(model([100] * 12, head=0), [node("slow", threads=1), node("fast", threads=3)], min_kv_positions=1)
    assert cuts(plan) == [(0, 3), (3, 12)]


def test_more_slots_than_layers_leave_the_last_ones_out_and_say_so():
    plan = place(model([1, 1]), [node("a"), node("b"), node("c")], min_kv_positions=1)
    assert cuts(plan) == [(0, 1), (1, 2)]
    assert plan.dropped == ("c: 2 layers leave nothing for it",)


def test_a_node_too_small_for_a_layer_is_left_out_and_said_so():
    nodes = [node("large"), node("small", memory=50), node("other")]
    plan = place(model([100] * 6), nodes, min_kv_positions=1)
    assert [stage.node.name for stage in plan.stages] == ["large", "other"]
    assert plan.dropped == ("small: 50 B are too little for a layer there",)


def test_a_model_that_fits_nowhere_is_refused_with_what_is_needed_and_what_there_is():
    with pytest.raises(PlanError, match=r"take 10.1 KB.*offer a 500 B.*tllm join"):
        place(model([10_000]), [node("a", memory=500)], min_kv_positions=1)


def test_no_node_at_all_is_refused():
    with pytest.raises(PlanError, match="no node"):
        place(model([1]), [], min_kv_positions=1)
