"""What repeated measurements say, and what they do not say.

An interval is Student's: the mean of so few values, give or take what their own spread leaves open. Two means differ
where their intervals have no value in common; where they overlap nothing is concluded.

This file does not know what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_BISECTIONS = 60  # halvings of an angle below pi/2: to the last bit of a float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where the mean lies, with the confidence that was asked for. One value alone leaves it open: from -inf to inf."""

    low: float
    mean: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def percentile(values: Sequence[float], p: float) -> float:
    """The value that `p` percent lie below, linear between neighbours: 0 is the least, 100 the greatest."""
    assert values, "no values"
    assert 0 <= p <= 100, f"percentile {p}"
    ordered = sorted(values)
    place = (len(ordered) - 1) * p / 100
    lower = math.floor(place)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (place - lower)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent values of a near-normal kind, and what their spread leaves open."""
    assert values, "no values"
    assert 0 < confidence < 1, f"confidence {confidence}"
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(low=-math.inf, mean=mean, high=math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    reach = student_t(confidence, len(values) - 1) * math.sqrt(variance / len(values))
    return Interval(low=mean - reach, mean=mean, high=mean + reach)


def differ(a: Interval, b: Interval) -> bool:
    """Whether they have no value in common. False says nothing: neither that they differ nor that they are equal."""
    return a.high < b.low or b.high < a.low


def student_t(confidence: float, degrees: int) -> float:
    """The t with that share of Student's distribution between -t and t; `degrees` of freedom are a whole number."""
    low, high = 0.0, math.pi / 2
    for _ in range(_BISECTIONS):
        angle = (low + high) / 2
        if _share_within(angle, degrees) < confidence:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _share_within(angle: float, degrees: int) -> float:
    """Of the distribution, between -t and t where t = sqrt(degrees)·tan(angle).

    Abramowitz and Stegun, 26.7.3 and 26.7.4: finite sums of powers of the cosine, for odd and for even degrees.
    """
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= square * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
