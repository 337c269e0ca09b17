"""Closed forms of pipelines: equal to the flow shop, job by job, and to figures worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.planner.cost import flow_shop_s
from tllm.planner.network import Edge, Group, Home, Path, all_reduce_bytes, group_bytes, home_bytes, num_hops
from tllm.planner.pipelines import (
    best_num_chunks,
    bubble,
    chunk_jobs,
    chunk_of_equal_time,
    chunked_prefill_s,
    chunks_of_equal_time,
    codec_pays,
    codec_share,
    compressed,
    least_codec_bytes_per_s,
    prefill_bytes_per_s,
    saturating_steps,
    speculative_tpot_s,
    steps_per_s,
    tokens_per_pass,
)

SOME_SECONDS = st.lists(st.floats(0.001, 10), min_size=1, max_size=6)
SOME_EDGES = st.lists(
    st.builds(lambda latency_s, rate: edge(rate, latency_s), st.floats(0, 1), st.floats(1e3, 1e9)), max_size=6
)


def edge(bytes_per_s: float, latency_s: float = 0.0) -> Edge:
    return Edge(latency_s=latency_s, bytes_per_s=bytes_per_s, measured=True)


@given(SOME_SECONDS, SOME_EDGES, st.floats(0, 1e7), st.integers(1, 20), st.floats(0, 0.1))
def test_the_closed_form_is_the_flow_shop(stage_s, edges, num_bytes, num_chunks, step_s):
    jobs = chunk_jobs(stage_s, edges, num_bytes=num_bytes, num_chunks=num_chunks, step_s=step_s)
    closed = chunked_prefill_s(stage_s, edges, num_bytes=num_bytes, num_chunks=num_chunks, step_s=step_s)
    assert closed == pytest.approx(flow_shop_s(jobs, window=num_chunks), rel=1e-9)


def test_one_chunk_pays_everything_one_after_the_other():
    assert chunked_prefill_s([1, 2], [edge(10, 0.5)], num_bytes=30, num_chunks=1, step_s=0.1) == pytest.approx(6.7)


def test_chunks_pay_the_slowest_again_and_again():
    # Jobs of 0.25, 0.5 and 0.75 s, and three more of the slowest, which is the link.
    assert chunked_prefill_s([1, 2], [edge(10, 0.5)], num_bytes=30, num_chunks=4) == pytest.approx(0.5 + 1.5 + 3 * 0.75)


@given(SOME_SECONDS, SOME_EDGES, st.floats(0, 1e7), st.floats(0, 0.5))
def test_no_number_of_chunks_is_better_than_the_best(stage_s, edges, num_bytes, step_s):
    def takes_s(num_chunks: int) -> float:
        return chunked_prefill_s(stage_s, edges, num_bytes=num_bytes, num_chunks=num_chunks, step_s=step_s)

    best = best_num_chunks(stage_s, edges, num_bytes=num_bytes, max_chunks=20, step_s=step_s)
    assert takes_s(best) == min(map(takes_s, range(1, 21)))


@given(SOME_SECONDS, st.integers(1, 8), st.integers(1, 20), st.floats(0, 0.2), st.floats(1.001, 20))
def test_the_required_rate_is_the_slowest_that_is_enough(stage_s, num_hops, num_chunks, latency_s, factor):
    num_bytes = 1e6
    least_s = chunked_prefill_s(stage_s, [edge(math.inf, latency_s)] * num_hops, num_bytes=0, num_chunks=num_chunks)
    asked = {"num_bytes": num_bytes, "num_hops": num_hops, "num_chunks": num_chunks, "latency_s": latency_s}
    assert prefill_bytes_per_s(stage_s, target_s=least_s, **asked) is None
    found = prefill_bytes_per_s(stage_s, target_s=factor * least_s, **asked)
    assert found is not None
    for rate, enough in ((found, True), (found * 0.999, False)):
        edges = [edge(rate, latency_s)] * num_hops
        takes_s = chunked_prefill_s(stage_s, edges, num_bytes=num_bytes, num_chunks=num_chunks)
        assert (takes_s <= factor * least_s) is enough


def test_a_bubble_is_what_equal_stages_wait():
    total_s = chunked_prefill_s([1.0] * 4, [], num_bytes=0, num_chunks=12)
    assert bubble(4, 12) == pytest.approx(1 - 1.0 / total_s) == pytest.approx(3 / 15)


@given(st.integers(1, 500), st.integers(0, 5000), st.floats(0, 1e-6), st.floats(1e-9, 1e-3))
def test_a_later_chunk_takes_as_long_as_the_first(first, cached, quadratic, linear):
    def takes_s(start: float, stop: float) -> float:
        return quadratic * (stop**2 - start**2) + linear * (stop - start)

    size = chunk_of_equal_time(first, cached, quadratic=quadratic, linear=linear)
    assert 0 < size <= first * (1 + 1e-9)
    assert takes_s(cached, cached + size) == pytest.approx(takes_s(0, first), rel=1e-3)


@given(st.integers(1, 3000), st.integers(1, 700), st.floats(0, 1e-4), st.floats(1e-6, 1e-3))
def test_chunks_of_equal_time_are_the_prompt_and_never_grow(num_tokens, first, quadratic, linear):
    sizes = chunks_of_equal_time(num_tokens, first, quadratic=quadratic, linear=linear)
    assert sum(sizes) == num_tokens
    assert min(sizes) >= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(st.floats(0.001, 1), st.lists(st.floats(0, 1), max_size=8))
def test_more_steps_in_flight_than_saturate_gain_nothing(slowest_s, others_s):
    round_s = slowest_s + sum(min(other, slowest_s) for other in others_s)
    enough = saturating_steps(slowest_s=slowest_s, round_s=round_s)
    assert steps_per_s(enough, slowest_s=slowest_s, round_s=round_s) == pytest.approx(1 / slowest_s)
    assert steps_per_s(1, slowest_s=slowest_s, round_s=round_s) == pytest.approx(1 / round_s)
    if enough > 2:
        assert steps_per_s(enough - 1, slowest_s=slowest_s, round_s=round_s) < 1 / slowest_s * (1 + 1e-9)


@given(st.floats(1e3, 1e9), st.floats(1.01, 20), st.floats(0.1, 10))
def test_a_codec_pays_exactly_where_messages_arrive_sooner(link_bytes_per_s, ratio, factor):
    codec = factor * least_codec_bytes_per_s(link_bytes_per_s, ratio)
    if abs(factor - 1) > 1e-6:
        plain, coded = edge(link_bytes_per_s), compressed(edge(link_bytes_per_s), ratio=ratio, codec_bytes_per_s=codec)
        assert codec_pays(codec, link_bytes_per_s, ratio) is (coded.message_s(1e6) < plain.message_s(1e6))


def test_a_codec_that_makes_nothing_smaller_never_pays():
    assert not codec_pays(1e30, 1.0, 1.0)


def test_a_codec_saves_none_of_the_latency():
    assert codec_share(edge(1e6, 1.0), 1e6, 2) == pytest.approx(0.25)
    assert codec_share(edge(math.inf, 1.0), 1e6, 2) == 0


@given(st.integers(0, 8))
def test_a_draft_that_is_always_right_is_all_used(num_drafted):
    assert tokens_per_pass(1, num_drafted) == num_drafted + 1
    assert tokens_per_pass(1 - 1e-9, num_drafted) == pytest.approx(num_drafted + 1, rel=1e-6)
    assert tokens_per_pass(0, num_drafted) == 1


def test_a_draft_costs_what_it_takes():
    assert speculative_tpot_s(0.10, draft_s=0.05, acceptance=1, num_drafted=2) == pytest.approx(0.05)


@given(st.integers(1, 64))
def test_a_ring_sends_every_rank_its_share_of_the_messages(num_ranks):
    # Each of 2 (N - 1) messages is an Nth of what is reduced.
    group = Group(num_ranks=num_ranks, latency_s=1e-3, bytes_per_s=1e6)
    num_messages = 2 * (num_ranks - 1)
    assert all_reduce_bytes(1e6, num_ranks) == pytest.approx(num_messages * 1e6 / num_ranks)
    assert group.all_reduce_s(1e6) == pytest.approx(num_messages * (1e-3 + 1 / num_ranks))
    assert group.layer_s(1e6) == pytest.approx(2 * group.all_reduce_s(1e6))
    assert group_bytes(3, 1e6, num_ranks) == pytest.approx(6 * all_reduce_bytes(1e6, num_ranks))


def test_what_comes_home_is_least_as_ids():
    sizes = {home: home_bytes(home, hidden_size=8192, vocab_size=128256) for home in Home}
    assert sizes == {Home.IDS: 4, Home.HIDDEN: 16_384, Home.LOGITS: 513_024}


def test_one_stage_has_no_hop_of_its_own():
    assert {path: num_hops(1, path) for path in Path} == {Path.ENDS: 0, Path.RING: 2, Path.STAR: 2}
