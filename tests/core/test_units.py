"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import ConfigError
from tllm.core.units import format_bytes, format_seconds, parse_bytes


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
