"""Clocks that are compared over a network: the truth is never outside what is stated."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.cluster.clocks import DRIFT, SAME_CLOCK, ClockOffset, Exchange, align, on_one_machine

DELAYS = st.floats(0.0, 2.0)
EPSILON = 1e-9  # of sums of such numbers


def exchange(at_s: float, offset_s: float, there_s: float, busy_s: float, back_s: float) -> Exchange:
    arrived_s = at_s + there_s + offset_s
    return Exchange(
        asked_s=at_s,
        arrived_s=arrived_s,
        answered_s=arrived_s + busy_s,
        heard_s=at_s + there_s + busy_s + back_s,
    )


@given(
    offset_s=st.floats(-1000.0, 1000.0),
    delays=st.lists(st.tuples(DELAYS, DELAYS, DELAYS), min_size=1, max_size=8),
)
def test_the_true_offset_is_within_the_error_however_lopsided_the_network(offset_s, delays):
    exchanges = [exchange(10.0 * number, offset_s, *each) for number, each in enumerate(delays)]
    found = align(exchanges)
    assert abs(found.offset_s - offset_s) <= found.error_s + EPSILON
    least_round_trip_s = min(there_s + back_s for there_s, _, back_s in delays)
    assert found.error_s <= least_round_trip_s / 2 + EPSILON


def test_one_exchange_gives_the_middle_and_half_of_the_round_trip():
    found = align([Exchange(asked_s=100.0, arrived_s=5.25, answered_s=5.5, heard_s=101.25)])
    assert found == ClockOffset(offset_s=-95.25, error_s=0.5, at_s=101.25)
    assert found.here_s(5.25) == 100.5


def test_two_exchanges_that_are_slow_in_opposite_directions_know_more_than_either():
    there, back = exchange(0.0, 3.0, 0.010, 0.0, 0.001), exchange(1.0, 3.0, 0.001, 0.0, 0.010)
    both = align([there, back])
    assert both.offset_s == pytest.approx(3.0)
    assert both.error_s == pytest.approx(0.001)
    assert align([there]).error_s == pytest.approx(0.0055)


def test_the_error_grows_with_the_time_since_the_clocks_were_compared():
    known = ClockOffset(offset_s=1.0, error_s=0.001, at_s=50.0)
    assert known.error_at(50.0) == 0.001
    assert known.error_at(30.0) == known.error_at(70.0) == pytest.approx(0.001 + 20 * DRIFT)
    assert SAME_CLOCK.error_at(1e6) == 0.0


@pytest.mark.parametrize(("offset_s", "is_shared"), [(0.0002, True), (-0.0002, True), (0.0011, False)])
def test_processes_of_one_machine_share_a_clock_unless_it_shows_that_they_do_not(offset_s, is_shared):
    measured = ClockOffset(offset_s=offset_s, error_s=0.001, at_s=0.0)
    assert on_one_machine(measured) == (SAME_CLOCK if is_shared else measured)


async def test_threads_that_answer_each_other_find_that_they_have_one_clock():
    """The truth is known here: the offset is zero."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as there:
        exchanges = []
        for _ in range(8):
            asked_s = time.perf_counter()
            arrived_s, answered_s = await loop.run_in_executor(
                there, lambda: (time.perf_counter(), time.perf_counter())
            )
            heard_s = time.perf_counter()
            exchanges.append(Exchange(asked_s=asked_s, arrived_s=arrived_s, answered_s=answered_s, heard_s=heard_s))
    found = align(exchanges)
    assert abs(found.offset_s) <= found.error_s
