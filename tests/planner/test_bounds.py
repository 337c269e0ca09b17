"""What fits, what bounds and what is left of measured figures: the small functions beside the golden numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.planner.cost import (
    fit_line,
    free_bytes,
    kv_blocks,
    kv_tokens,
    lora_bytes,
    lora_flop,
    num_sequences,
    num_weight_reads,
)
from tllm.planner.network import fitted_edge
from tllm.planner.presets import SHAPES


@given(st.integers(0, 10**12), st.integers(1, 64), st.integers(1, 10**7))
def test_what_fits_fits_and_one_more_does_not(num_free_bytes, block_size, kv_bytes):
    fit = kv_tokens(num_free_bytes, kv_bytes)
    assert fit * kv_bytes <= num_free_bytes < (fit + 1) * kv_bytes
    blocks = kv_blocks(num_free_bytes, block_size=block_size, kv_bytes_per_token=kv_bytes)
    assert blocks == fit // block_size
    assert num_sequences(fit, block_size) == blocks


def test_nothing_is_free_where_weights_do_not_fit():
    assert free_bytes(memory_bytes=10, weight_bytes=8, activation_bytes=2, reserve_bytes=1) == 0
    assert free_bytes(memory_bytes=10, weight_bytes=5, activation_bytes=2, reserve_bytes=1) == 2


def test_a_step_of_many_rows_needs_room_for_its_widest_tensors_and_its_logits():
    shape = SHAPES["llama-3.1-8b"]
    assert shape.activation_bytes(512, 4) == 512 * (4 * 4096 + 3 * 14336) * 2 + 4 * 128256 * 4


def test_the_fifth_row_reads_weights_again():
    assert [num_weight_reads(rows) for rows in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_an_adapter_is_two_thin_matrices():
    assert lora_flop(rank=16, num_inputs=4096, num_outputs=1024) == 2 * 16 * (4096 + 1024)
    assert lora_bytes(rank=16, num_inputs=4096, num_outputs=1024) == 2 * 16 * (4096 + 1024)


@given(
    st.floats(-10, 10),
    st.floats(-10, 10),
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=10, unique=True),
)
def test_a_line_through_its_own_points_is_found(intercept, slope, xs):
    line = fit_line(xs, [intercept + slope * x for x in xs])
    assert line.intercept == pytest.approx(intercept, abs=1e-6)
    assert line.slope == pytest.approx(slope, abs=1e-8)
    assert line.residual == pytest.approx(0, abs=1e-6)
    assert line.at(7) == pytest.approx(intercept + 7 * slope, abs=1e-6)


def test_what_a_line_leaves_is_its_residual():
    line = fit_line([0, 1, 2], [0.0, 3.0, 0.0])
    assert (line.intercept, line.slope) == (1, 0)
    assert line.residual == pytest.approx(2**0.5)


def test_a_fitted_link_has_the_lines_latency_and_rate():
    edge = fitted_edge(fit_line([1000, 2000, 3000], [0.6, 0.7, 0.8]))
    assert edge.latency_s == pytest.approx(0.5)
    assert edge.bytes_per_s == pytest.approx(10_000)
    assert edge.message_s(5000) == pytest.approx(1.0)
