"""Intervals are Student's, and they are only called different where nothing is common to them."""

from __future__ import annotations

import math
import random
from statistics import stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tllm.lab.statistics import Interval, differ, mean_interval, median, percentile, student_t

numbers = st.integers(-(10**7), 10**7).map(lambda hundredths: hundredths / 100)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 200])
def test_the_quantile_is_that_of_students_distribution(confidence: float, degrees: int):
    assert student_t(confidence, degrees) == pytest.approx(stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-9)


@given(st.lists(numbers, min_size=2, max_size=12), st.sampled_from([0.8, 0.95, 0.99]))
def test_an_interval_is_the_one_that_scipy_gives(values: list[float], confidence: float):
    interval = mean_interval(values, confidence)
    error = stdev(values) / math.sqrt(len(values))
    reach = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error
    scale = max(map(abs, values))
    assert interval.mean == pytest.approx(sum(values) / len(values), abs=1e-9 * scale)
    assert interval.half_width == pytest.approx(reach, rel=1e-6, abs=1e-9 * scale)
    assert interval.low <= interval.mean <= interval.high


def test_95_of_100_intervals_hold_the_true_mean():
    """Of 2000 samples of five, 1900 ± 10 are expected: 1850 to 1950 is five standard deviations to either side."""
    generator = random.Random(4)
    held = 0
    for _ in range(2000):
        interval = mean_interval([generator.gauss(3, 2) for _ in range(5)])
        held += interval.low <= 3 <= interval.high
    assert 1850 <= held <= 1950


def test_a_bias_larger_than_the_spread_is_found_and_a_smaller_one_is_not():
    generator = random.Random(5)
    plain = [generator.gauss(100, 1) for _ in range(5)]
    assert differ(mean_interval(plain), mean_interval([value + 10 for value in plain]))
    assert not differ(mean_interval(plain), mean_interval([value + 0.2 for value in plain]))


def test_one_value_leaves_everything_open():
    alone = mean_interval([7.0])
    assert (alone.low, alone.mean, alone.high) == (-math.inf, 7.0, math.inf)
    assert not differ(alone, mean_interval([1000.0, 1000.0]))


def test_intervals_that_touch_overlap():
    first, second = Interval(low=1, mean=2, high=3), Interval(low=3, mean=4, high=5)
    assert not differ(first, second)
    assert not differ(second, first)
    assert differ(first, Interval(low=3.001, mean=4, high=5))
    assert differ(Interval(low=3.001, mean=4, high=5), first)


@given(st.lists(numbers, min_size=1, max_size=20), st.floats(0, 100))
def test_a_percentile_is_numpys_linear_one(values: list[float], p: float):
    import numpy as np

    assert percentile(values, p) == pytest.approx(np.percentile(values, p), rel=1e-9, abs=1e-6)
    assert min(values) <= percentile(values, p) <= max(values)


def test_the_median_lies_between_the_middle_two():
    assert median([4.0, 1.0, 3.0]) == 3.0
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 95) == pytest.approx(4.8)
