"""Links as their echoes tell: exact on a clock of their own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.cluster.echoes import MAX_BYTES_PER_S, measure_link
from tllm.core.errors import TransportError
from tllm.transport.rpc import WINDOW_BYTES


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Link:
    """A peer at the end of a line of known length and width; the first answers take longer."""

    def __init__(
        self,
        rtt_s: float,
        bytes_per_s: float,
        *,
        first_s: float = 0.0,
        limit_s: float = math.inf,
        window_bytes: float = math.inf,
    ) -> None:
        self.clock = Clock()
        self._window_bytes = window_bytes
        self.sizes: list[int] = []
        self._rtt_s, self._bytes_per_s, self._first_s, self._limit_s = rtt_s, bytes_per_s, first_s, limit_s

    async def echo(self, data: bytes) -> None:
        elapsed_s = self._rtt_s + len(data) / self._bytes_per_s + self._first_s * (not self.sizes)
        elapsed_s += self._rtt_s * (len(data) // self._window_bytes)  # until there is word that more may come
        self.sizes.append(len(data))
        if elapsed_s > self._limit_s:
            raise TransportError("the peer is gone")
        self.clock.now_s += elapsed_s


@settings(max_examples=50, deadline=None)
@given(rtt_s=st.floats(1e-5, 0.5), bytes_per_s=st.floats(1e5, 9e9))
async def test_a_link_is_as_it_is(rtt_s: float, bytes_per_s: float) -> None:
    link = Link(rtt_s, bytes_per_s, first_s=0.3)
    found_s, found = await measure_link(link, clock=link.clock)
    assert found_s == pytest.approx(rtt_s)
    assert found == pytest.approx(bytes_per_s, rel=1e-3)
    assert link.sizes.count(0) > 20


async def test_a_link_too_fast_to_tell_reports_the_most_there_is() -> None:
    link = Link(1e-4, 1e13)
    assert (await measure_link(link, clock=link.clock))[1] == MAX_BYTES_PER_S
    link = Link(1e-4, math.inf)
    assert (await measure_link(link, clock=link.clock))[1] == MAX_BYTES_PER_S


async def test_a_slow_link_is_not_kept_busy() -> None:
    link = Link(0.01, 1e5)
    began = link.clock()
    await measure_link(link, clock=link.clock)
    assert link.clock() - began < 21 * 0.01 + 0.5 + 0.7
    assert max(link.sizes) == 64 << 10
    fast = Link(0.001, 1e9)
    await measure_link(fast, clock=fast.clock)
    assert max(fast.sizes) == 4 << 20


@pytest.mark.parametrize("rtt_s", [0.01, 0.05])
async def test_the_window_of_a_stream_is_not_taken_for_the_rate_of_a_long_link(rtt_s: float) -> None:
    link = Link(rtt_s, 125e6, window_bytes=WINDOW_BYTES)
    assert (await measure_link(link, clock=link.clock))[1] == pytest.approx(125e6, rel=1e-3)


async def test_a_peer_that_is_gone_is_an_error() -> None:
    link = Link(0.01, 1e6, limit_s=0.02)
    with pytest.raises(TransportError, match="gone"):
        await measure_link(link, clock=link.clock)
