"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import ConfigError
from tllm.core.units import (
    Quantity,
    Unit,
    format_bits_per_s,
    format_bytes,
    format_bytes_per_s,
    format_seconds,
    parse_bytes,
    parse_bytes_per_s,
    parse_flop_per_s,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1", 1), ("4GiB", 4 * 2**30), ("500 MB", 500_000_000), ("1.5kib", 1536), ("2TB", 2 * 10**12), (" 7 B ", 7)],
)
def test_a_size_has_a_number_and_a_unit(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "4 GBit", "-1GB", "4,5GB", "four"])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="4GiB"):
        parse_bytes(text)


@given(st.integers(0, 10**15))
def test_a_formatted_size_parses_back_to_within_its_three_digits(num_bytes):
    assert abs(parse_bytes(_plain(format_bytes(num_bytes))) - num_bytes) <= 0.006 * num_bytes


def _plain(text: str) -> str:
    number, unit = text.split()
    return f"{float(number):f} {unit}"


def test_seconds_are_shown_in_the_unit_in_which_they_read_best():
    assert [format_seconds(s) for s in (12.34, 0.0123, 0.0000123)] == ["12.3 s", "12.3 ms", "12.3 µs"]
    assert [format_seconds(s) for s in (4321.0, -0.246, 0.0)] == ["4,321 s", "-246 ms", "0 µs"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("1.5 s", 1.5), ("8us", 8e-6), ("8µs", 8e-6), ("0s", 0.0), ("1e3ns", 1e-6)]
)
def test_a_time_has_a_unit(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "50", "ms", "-1s", "50 MS", "5min"])
def test_any_other_time_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="50ms"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("100Mb/s", 12.5e6),
        ("100 Mbps", 12.5e6),
        ("100Mbit/s", 12.5e6),
        ("1Gb/s", 125e6),
        ("125MB/s", 125e6),
        ("1.5TB/s", 1.5e12),
        ("8 b/s", 1),
        ("1KiB/s", 1024),
        ("2kB/s", 2000),
    ],
)
def test_a_rate_says_bits_or_bytes(text, bytes_per_s):
    assert parse_bytes_per_s(text) == bytes_per_s


@pytest.mark.parametrize("text", ["", "100", "100M", "1GbE", "100MB", "100mb/s", "0Mb/s", "-1Mb/s", "1 Gigabit/s"])
def test_a_rate_that_leaves_it_open_is_refused_with_examples(text):
    with pytest.raises(ConfigError, match="100Mb/s, 1Gb/s or 125MB/s"):
        parse_bytes_per_s(text)


@pytest.mark.parametrize(("text", "flop_per_s"), [("312T", 312e12), ("312e12", 312e12), ("4.5 TFLOP/s", 4.5e12)])
def test_a_rate_of_arithmetic_may_have_a_prefix(text, flop_per_s):
    assert parse_flop_per_s(text) == pytest.approx(flop_per_s)


@pytest.mark.parametrize("text", ["", "T", "0", "312 Tb/s", "fast"])
def test_any_other_arithmetic_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="312T"):
        parse_flop_per_s(text)


@given(st.floats(1, 1e15))
def test_a_rate_in_bits_and_the_same_in_bytes_parse_to_one(bytes_per_s):
    for told in (format_bits_per_s(bytes_per_s), format_bytes_per_s(bytes_per_s)):
        number, unit = told.replace(",", "").split()
        assert parse_bytes_per_s(f"{number}{unit}") == pytest.approx(bytes_per_s, rel=1e-3)


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        (Quantity(131_072, Unit.BYTES), "131,072 B"),
        (Quantity(16_060_522_496, Unit.BYTES), "16.06 GB"),
        (Quantity(0, Unit.BYTES), "0 B"),
        (Quantity(8704.0, Unit.BYTES), "8.704 kB"),
        (Quantity(13_107_200.0, Unit.BYTES_PER_S), "13.11 MB/s"),
        (Quantity(104_857_600.0, Unit.BITS_PER_S), "104.9 Mb/s"),
        (Quantity(999_960_000.0, Unit.BITS_PER_S), "1 Gb/s"),
        (Quantity(14_222_100_529_152, Unit.FLOP), "14.22 TFLOP"),
        (Quantity(312e12, Unit.FLOP_PER_S), "312 TFLOP/s"),
        (Quantity(0.12508, Unit.SECONDS), "125.1 ms"),
        (Quantity(26_702, Unit.TOKENS), "26,702 tokens"),
        (Quantity(53.9234, Unit.TOKENS_PER_S), "53.92 tokens/s"),
        (Quantity(20_833.34, Unit.TOKENS_PER_S), "20,833 tokens/s"),
        (Quantity(1_235_814_400, Unit.PARAMETERS), "1,235,814,400 parameters"),
        (Quantity(0.0417, Unit.RATIO), "4.17 %"),
        (Quantity(8, Unit.COUNT), "8"),
        (Quantity(4.5, Unit.BITS), "4.5 bits"),
    ],
)
def test_a_quantity_is_told_with_its_unit(quantity, text):
    assert quantity.text() == text


def test_whole_numbers_can_be_told_to_the_last_digit():
    assert Quantity(16_060_522_496, Unit.BYTES).exact_text() == "16,060,522,496 B"
    assert Quantity(0.5, Unit.SECONDS).exact_text() == "500 ms"


def test_gib_are_told_only_when_asked_for():
    assert Quantity(2**30, Unit.BYTES).text() == "1.074 GB"
    assert Quantity(2**30, Unit.BYTES).binary_text() == "1 GiB"
    with pytest.raises(TypeError, match="no bytes"):
        Quantity(1, Unit.SECONDS).binary_text()


def test_quantities_of_one_unit_are_added_and_compared():
    small, large = Quantity(1, Unit.BYTES), Quantity(2, Unit.BYTES)
    assert small + large == Quantity(3, Unit.BYTES)
    assert large - small == small < large
    assert max(small, large) is large


@given(st.sampled_from(Unit), st.sampled_from(Unit))
def test_quantities_of_different_units_are_not(unit, other):
    for join in (Quantity.__add__, Quantity.__sub__, Quantity.__lt__):
        if unit is not other:
            with pytest.raises(TypeError, match="cannot be added or compared"):
                join(Quantity(1, unit), Quantity(1, other))
            assert Quantity(1, unit) != Quantity(1, other)
