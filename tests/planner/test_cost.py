"""The arithmetic: against a simulation of the pipeline, and against figures worked out by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planner.brute_force import stage
from tests.planner.test_exact import model, node, speed
from tllm.core.errors import ConfigError
from tllm.core.types import HEAD
from tllm.planner.cost import crowding, cycle_s, estimated_speed, interpolate
from tllm.planner.network import MESSAGE_BYTES, ROW_BYTES
from tllm.planner.predict import gain, predict
from tllm.planner.profile import LinkProfile, Load, ModelProfile, Speed


def simulated_cycle_s(jobs: list[tuple[float, float]], num_steps: int) -> float:
    """Steps go round through (busy, delay) jobs in a row, each of which takes one step at a time, in order; the mean
    time of a round once the pipeline has filled."""
    free = [0.0] * len(jobs)
    at = [0.0] * num_steps
    finished = []
    for _ in range(200):
        for step in range(num_steps):
            now = at[step]
            for index, (busy, delay) in enumerate(jobs):
                begin = max(now, free[index])
                free[index] = begin + busy
                now = begin + busy + delay
            at[step] = now
        finished.append(at[0])
    return (finished[-1] - finished[99]) / 100


@given(
    st.lists(st.tuples(st.floats(0.001, 1), st.floats(0, 1)), min_size=1, max_size=9),
    st.integers(1, 6),
)
def test_a_full_pipeline_is_as_fast_as_a_simulation_of_it(jobs, num_steps):
    slowest = max(busy for busy, _ in jobs)
    expected = cycle_s(num_steps, slowest, sum(busy + delay for busy, delay in jobs))
    assert simulated_cycle_s(jobs, num_steps) == pytest.approx(expected, rel=0.02)


def plan_of(*cut: int, **speeds: Speed):
    made = model([10] * cut[-1], hidden=1000)
    nodes = [node(name, each) for name, each in speeds.items()]
    stages = [
        stage(made, each, first, last) for each, (first, last) in zip(nodes, itertools.pairwise((0, *cut)), strict=True)
    ]
    return made, stages


def links(*pairs: tuple[str, str], rtt_s: float = 2e-3, bytes_per_s: float = 1e6) -> list[LinkProfile]:
    return [LinkProfile(source=a, target=b, rtt_s=rtt_s, bytes_per_s=bytes_per_s) for a, b in pairs]


ALL = ((HEAD, "a"), ("a", "b"), ("b", HEAD))


def test_one_stream_pays_every_stage_every_hop_and_the_head():
    made, stages = plan_of(3, 5, a=speed(1.0, step_ms=0.1), b=speed(2.0, head_ms=5, step_ms=0.2))
    found = predict(made, stages, links(*ALL), Load(), head_step_s=3e-4)
    assert found is not None
    assert found.stage_s == pytest.approx((0.0031, 0.0092))
    ends, between = MESSAGE_BYTES + ROW_BYTES, MESSAGE_BYTES + ROW_BYTES + 1000
    assert found.hop_s == pytest.approx((1e-3 + ends / 1e6, 1e-3 + between / 1e6, 1e-3 + ends / 1e6))
    assert found.tpot_s == pytest.approx(3e-4 + sum(found.stage_s) + sum(found.hop_s))
    assert found.tokens_per_s == pytest.approx(1 / found.tpot_s)
    assert found.bound == "reading weights on b"
    assert found.note == ""


def test_many_streams_pay_the_slowest_stage_once_a_step():
    made, stages = plan_of(3, 5, a=speed(1.0, slope=0), b=speed(4.0, slope=0))
    found = predict(made, stages, links(*ALL, bytes_per_s=1e9), Load(streams=16), head_step_s=0)
    assert found is not None
    assert found.tpot_s == pytest.approx(2 * 0.008)  # two steps in flight, more than 3 + 8 ms and three hops
    assert found.tokens_per_s == pytest.approx(16 / found.tpot_s)


def test_a_slow_link_is_what_bounds_many_streams():
    made, stages = plan_of(3, 5, a=speed(0.1), b=speed(0.1))
    found = predict(made, stages, links(*ALL, bytes_per_s=1e5), Load(streams=16))
    assert found is not None
    assert found.bound == "the link a -> b"
    assert found.tpot_s == pytest.approx(2 * (MESSAGE_BYTES + 8 * (ROW_BYTES + 1000)) / 1e5)


def test_rows_that_cost_more_than_weights_are_called_arithmetic():
    made, stages = plan_of(5, a=speed(1.0, slope=1.0))
    found = predict(made, stages, [], Load(streams=8))
    assert found is not None
    assert found.bound == "arithmetic on a"


def test_chunks_of_a_prompt_overlap_along_the_pipeline():
    # Two equal stages, four chunks: five slots of time instead of eight, and one of the head's projection.
    made, stages = plan_of(5, 10, a=speed(1.0, slope=0), b=speed(1.0, slope=0))
    fast = links(*ALL, rtt_s=0, bytes_per_s=1e12)
    load = Load(prompt=2048, max_batch_tokens=512)
    found = predict(made, stages, fast, load, head_step_s=0)
    assert found is not None
    assert found.ttft_s == pytest.approx(5 * 0.005, rel=1e-3)
    alone, sole = plan_of(10, a=speed(1.0, slope=0))
    one = predict(alone, sole, links((HEAD, "a"), ("a", HEAD), rtt_s=0, bytes_per_s=1e12), load, head_step_s=0)
    assert one is not None
    assert one.ttft_s == pytest.approx(4 * 0.010, rel=1e-3)


def test_no_more_chunks_are_in_flight_than_stages():
    made, stages = plan_of(5, a=speed(1.0, slope=0))
    there_and_back = links((HEAD, "a"), ("a", HEAD), rtt_s=0.2, bytes_per_s=1e12)
    found = predict(made, stages, there_and_back, Load(prompt=1024, max_batch_tokens=512), head_step_s=0)
    assert found is not None
    assert found.ttft_s == pytest.approx(2 * (0.2 + 0.005), rel=1e-3)


def test_only_the_chunk_that_ends_the_prompt_is_projected():
    made, stages = plan_of(1, a=speed(0.0, head_ms=100, slope=0))
    found = predict(made, stages, [], Load(prompt=512 * 9, max_batch_tokens=512), head_machine="a", head_step_s=0)
    assert found is not None
    assert 0.1 < found.ttft_s < 0.2


def test_what_was_not_measured_is_said():
    made, stages = plan_of(3, 5, a=speed(1.0), b=speed(1.0))
    found = predict(made, stages, links(("b", "a")), Load())
    assert found is not None
    assert found.note == "not measured, taken for a usual link: head -> a, b -> head"


def test_without_a_speed_nothing_is_predicted():
    made = model([1])
    assert predict(made, [stage(made, node("a", None), 0, 1)], [], Load()) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 500))
def test_interpolation_goes_through_what_was_measured_and_never_beyond_its_neighbours(seconds, num_rows):
    rows = [1, 4, 16, 64, 256][: len(seconds)]
    for row, second in zip(rows, seconds, strict=True):
        assert interpolate(rows, seconds, row) == pytest.approx(second)
    found = interpolate(rows, seconds, num_rows)
    if num_rows <= rows[-1]:
        assert min(seconds) - 1e-9 <= found <= max(seconds) + 1e-9
    else:
        assert found >= seconds[-1]


def test_beyond_the_last_measurement_the_last_slope_goes_on():
    assert interpolate([1, 4, 16], [1.0, 2.0, 8.0], 32) == pytest.approx(16.0)


def test_gain_is_relative_to_the_old_plan():
    made, stages = plan_of(10, a=speed(1.0, step_ms=10))
    twice, faster = plan_of(10, a=speed(0.5, step_ms=5))
    load = Load()
    old, new = predict(made, stages, [], load, head_step_s=0), predict(twice, faster, [], load, head_step_s=0)
    assert old is not None
    assert new is not None
    assert gain(old, new, load) == pytest.approx(old.tpot_s / new.tpot_s - 1)
    assert gain(old, old, load) == 0
    assert gain(new, old, load) < 0


def test_more_workers_than_threads_get_in_each_others_way():
    assert crowding(node("a", None, workers=4, threads=2)) == 2
    assert crowding(node("a", None, workers=2, threads=2)) == 1


def test_an_estimate_is_what_bandwidth_and_arithmetic_allow():
    # Llama-3.1-8B in bf16 at 120e9 B/s: 125.1 ms for a token.
    layer = 218_112_000 * 2
    made = ModelProfile(
        name="8b",
        layer_bytes=(layer,) * 32,
        embed_bytes=128256 * 4096 * 2,
        head_bytes=128256 * 4096 * 2 + 4096 * 2,
        tied=False,
        kv_bytes_per_position=4096,
    )
    estimate = estimated_speed(made, bytes_per_s=120e9, flop_per_s=5e12, step_s=0)
    assert estimate.layer_s[0] * 32 + estimate.head_s[0] == pytest.approx(0.1251, abs=1e-4)
    rows = estimate.rows[-1]
    assert estimate.layer_s[-1] == pytest.approx(rows * layer / 5e12)  # 2 FLOP for each of layer / 2 weights


def test_a_pipeline_cuts_prompts_as_small_as_pays():
    fast = Speed(rows=(1, 512), layer_s=(0.001, 0.512), head_s=(0.0, 0.0), step_s=0.0)  # in proportion to rows
    near = links(*ALL, rtt_s=0, bytes_per_s=1e12)

    def chunk(made, stages, head_step_s: float):
        found = predict(made, stages, near, Load(prompt=512), head_step_s=head_step_s)
        assert found is not None
        return found.prefill_chunk

    two = plan_of(4, 8, a=fast, b=fast)
    assert chunk(*two, 0.0) == 32
    assert chunk(*two, 10.0) == 512, "every step costs ten seconds"
    assert chunk(*plan_of(8, a=fast), 0.0) == 512, "nothing overlaps"


@pytest.mark.parametrize("name", ["streams", "prompt", "answer", "max_batch_tokens"])
def test_a_load_of_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=name):
        Load(**{name: 0})
