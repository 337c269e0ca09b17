"""What was measured, what it is compared with and what was asked of it, and how that is told.

    int8 decode, batch 1                     24.1 tokens/s   (23.8 .. 24.6, 5 turns)
        the bandwidth limit                  28.7               0.84   asked 0.80   met
        llama.cpp Q8_0                       14.2               1.70   asked 1.80   missed

Ratios are medians over the turns of what both did in the same turn.
This file does not know what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tllm.lab.latency import Series

LIMIT = "the bandwidth limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """At least so many times the fastest of the others."""

    of: tuple[str, ...]
    at_least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`asked` is None where a ratio is shown only to be known."""

    name: str
    rate: float
    ratio: float
    asked: float | None

    @property
    def met(self) -> bool:
        return self.asked is None or self.ratio >= self.asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row of the table: what is measured comes first in `series`."""

    name: str
    unit: str
    series: tuple[Series, ...]
    asked: tuple[Asked, ...] = ()
    note: str = ""

    @property
    def measured(self) -> Series:
        return self.series[0]

    def comparisons(self) -> Iterator[Comparison]:
        """With every system once; where one was asked for as the fastest of several, that once more."""
        others = {other.name: other for other in self.series[1:]}
        alone = {asked.of[0]: asked.at_least for asked in self.asked if len(asked.of) == 1}
        for name, other in others.items():
            yield self._comparison(name, other, alone.get(name))
        for asked in self.asked:
            if len(asked.of) > 1:
                best = max((others[name] for name in asked.of), key=lambda other: other.median)
                yield self._comparison(f"the best of these, {best.name}", best, asked.at_least)

    def _comparison(self, name: str, other: Series, asked: float | None) -> Comparison:
        return Comparison(name=name, rate=other.median, ratio=self.measured.ratio_to(other), asked=asked)


def lines(figure: Figure) -> Iterator[str]:
    measured = figure.measured
    spread = f"({_number(min(measured.rates))} .. {_number(max(measured.rates))}, {len(measured.rates)} turns)"
    yield f"{figure.name:<46} {_number(measured.median):>8} {figure.unit}   {spread}"
    for comparison in figure.comparisons():
        line = f"    {comparison.name:<42} {_number(comparison.rate):>8}   {comparison.ratio:6.2f}"
        if comparison.asked is not None:
            line += f"   asked {comparison.asked:<5g} {'met' if comparison.met else 'missed'}"
        yield line
    if figure.note:
        yield f"    {figure.note}"


def summary(figures: Sequence[Figure]) -> str:
    judged = [(figure, each) for figure in figures for each in figure.comparisons() if each.asked is not None]
    missed = [
        f"{figure.name} ({each.name} {each.ratio:.2f} of {each.asked:g})" for figure, each in judged if not each.met
    ]
    met = f"{len(judged) - len(missed)} of {len(judged)} met"
    return f"{met}; missed: {', '.join(missed)}" if missed else met


def as_json(figure: Figure) -> dict[str, object]:
    return {
        "figure": figure.name,
        "unit": figure.unit,
        "rates": {series.name: series.rates for series in figure.series},
        "ratios": {each.name: {"ratio": each.ratio, "asked": each.asked} for each in figure.comparisons()},
        "note": figure.note,
    }


def _number(rate: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
