"""Ratios are taken turn by turn, and each thing that was asked is judged once."""

from __future__ import annotations

import pytest

from tllm.lab.latency import Series, in_turns
from tllm.lab.table import LIMIT, Asked, Figure, as_json, lines, summary


def series(name: str, *rates: float) -> Series:
    return Series(name=name, rates=list(rates))


def figure(*others: Series, measured: Series, asked: tuple[Asked, ...]) -> Figure:
    return Figure(name="decode", unit="tokens/s", series=(measured, *others), asked=asked)


def test_systems_are_measured_alternately_after_one_uncounted_turn():
    order: list[str] = []

    def system(name: str) -> float:
        order.append(name)
        return float(len(order))

    measured = in_turns([("a", lambda: system("a")), ("b", lambda: system("b"))], num_turns=2)
    assert order == ["a", "b"] * 3
    assert [line.rates for line in measured] == [[3.0, 5.0], [4.0, 6.0]]


def test_a_ratio_is_the_median_of_the_turns_ratios_whatever_the_machine_did_between_them():
    ours, theirs = series("tllm", 10, 20, 40), series("peer", 5, 10, 40)
    (comparison,) = figure(theirs, measured=ours, asked=(Asked(of=("peer",), at_least=2.0),)).comparisons()
    assert comparison.ratio == 2.0
    assert comparison.met


@pytest.mark.parametrize(("at_least", "met"), [(0.8, True), (0.81, False)])
def test_what_is_asked_is_met_from_exactly_that_on(at_least: float, met: bool):
    judged = figure(series(LIMIT, 10), measured=series("tllm", 8), asked=(Asked(of=(LIMIT,), at_least=at_least),))
    assert [each.met for each in judged.comparisons()] == [met]
    assert summary([judged]).startswith("1 of 1 met" if met else "0 of 1 met; missed: decode (")


def test_the_fastest_of_several_is_the_one_that_counts():
    judged = figure(
        series("slow", 1, 1, 1),
        series("fast", 4, 4, 4),
        measured=series("tllm", 8, 8, 8),
        asked=(Asked(of=("slow",), at_least=4.0), Asked(of=("slow", "fast"), at_least=2.5)),
    )
    assert [(each.name, each.ratio, each.met) for each in judged.comparisons()] == [
        ("slow", 8.0, True),
        ("fast", 2.0, True),  # shown, not asked for
        ("the best of these, fast", 2.0, False),
    ]
    assert summary([judged]) == "1 of 2 met; missed: decode (the best of these, fast 2.00 of 2.5)"


def test_all_that_is_judged_is_printed_and_written():
    judged = figure(series(LIMIT, 100, 100), measured=series("tllm", 50, 70), asked=(Asked(of=(LIMIT,), at_least=0.5),))
    first, second = lines(judged)
    assert first.split() == ["decode", "60", "tokens/s", "(50", "..", "70,", "2", "turns)"]
    assert second.split()[-4:] == ["0.60", "asked", "0.5", "met"]
    assert as_json(judged)["rates"] == {"tllm": [50, 70], LIMIT: [100, 100]}
