"""What cannot be true is refused, what overlaps is not concluded, and a report needs nothing but what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.lab.fake_experiment import COLUMNS, CONDITIONS, FIGURES, cell
from tllm.core.errors import ConfigError
from tllm.lab.curves import curves, draw
from tllm.lab.description import Description
from tllm.lab.experiment import Cell, Column, Figure
from tllm.lab.record import Record
from tllm.lab.report import NO_CONCLUSION, Comparison, comparisons, markdown, shown, shown_interval, summary, write
from tllm.lab.rows import rows
from tllm.lab.runner import CELL
from tllm.lab.sanity import impossible
from tllm.lab.statistics import Interval, mean_interval

AT = "2026-01-31T12:00:00+00:00"
STEADY = (0.99, 1.0, 1.0, 1.0, 1.01)  # five repeats' figures, of their mean
PNG = b"\x89PNG\r\n\x1a\n"


def described(cells: Sequence[Cell], **others: object) -> Description:
    values: dict[str, object] = {
        "experiment": "fake",
        "run": "fake-1",
        "at": AT,
        "title": "Nothing is computed.",
        "repeats": 5,
        "warmups": 1,
        "seed": 0,
        "environment": {"processor": "Abacus", "cores": "2", "memory": "8 GB", "os": "Linux x86_64"},
        "conditions": CONDITIONS,
        "cells": tuple(cells),
        "columns": COLUMNS,
        "figures": FIGURES,
        "baseline": cells[0].name,
        "predicted": {},
        "limit": {},
        "facts": {},
        "notes": {},
        "failures": {},
    }
    return Description(**{**values, **others})  # type: ignore[arg-type]


def kept(cell: Cell, repeats: Sequence[Mapping[str, float]]) -> list[Record]:
    return [
        Record(
            experiment="fake",
            run="fake-1",
            at=AT,
            environment={"cores": "2"},
            settings={**CONDITIONS.settings, **cell.settings, CELL: cell.name},
            repeat=number,
            seed=number,
            metrics=metrics,
        )
        for number, metrics in enumerate(repeats)
    ]


def throughputs(cell: Cell, mean: float, shares: Sequence[float] = STEADY) -> list[Record]:
    return kept(cell, [{"throughput_tokens_per_s": mean * share} for share in shares])


# ---- figures that cannot be true: those of the old tables that these experiments replace -----------------------------


@pytest.mark.parametrize("counted", [526, 513])
def test_more_tokens_than_all_requests_may_have_are_refused(counted: int):
    reason = impossible({"requests": 16, "tokens": 32}, {"num_tokens": counted})
    assert reason == f"{counted} tokens were counted where 16 requests have at most 512"


def test_fewer_tokens_are_possible_an_answer_may_end_early():
    assert impossible({"requests": 16, "tokens": 32}, {"num_tokens": 511}) == ""


@pytest.mark.parametrize(
    ("total_s", "throughput", "right"),
    [(2.509, 204.0, True), (1.269, 403.5, True), (1.269, 414.4, False), (0.614, 856.9, False), (0.747, 703.7, False)],
)
def test_a_throughput_that_is_not_the_tokens_by_the_time_is_refused(total_s: float, throughput: float, right: bool):
    metrics = {"num_tokens": 512, "total_s": total_s, "throughput_tokens_per_s": throughput}
    assert (impossible({}, metrics) == "") == right


@pytest.mark.parametrize(
    ("batch", "total_s", "service_s", "least_s"),
    [(1, 2.509, 0.1567, 1.3329), (4, 1.269, 0.3172, 0.7931), (8, 0.614, 0.3067, 0.4605)],
)
def test_a_latency_of_batches_that_omits_waiting_for_those_before_is_refused(
    batch: int, total_s: float, service_s: float, least_s: float
):
    settings = {"requests": 16, "batch": batch, "arrivals": "at-once"}
    reason = impossible(settings, {"total_s": total_s, "mean_latency_s": service_s})
    assert f"{16 // batch} batches one after another" in reason
    assert f"give {least_s * 1e3:.0f} ms" in reason
    assert impossible(settings, {"total_s": total_s, "mean_latency_s": least_s}) == ""
    assert impossible({**settings, "arrivals": "poisson"}, {"total_s": total_s, "mean_latency_s": service_s}) == ""
    assert impossible({"requests": 16}, {"total_s": total_s, "mean_latency_s": service_s}) == ""


def test_a_late_batch_that_is_slow_lowers_the_mean_and_is_possible():
    """Eight batches, the last of which takes as long as three: (1 + ... + 7 + 10) / 8 of 10."""
    metrics = {"total_s": 10.0, "mean_latency_s": 38 / 8}
    assert impossible({"requests": 8, "batch": 1, "arrivals": "at-once"}, metrics) == ""


def test_one_batch_has_no_queue():
    metrics = {"total_s": 1.0, "mean_latency_s": 1.0}
    assert impossible({"requests": 8, "batch": 8, "arrivals": "at-once"}, metrics) == ""


@pytest.mark.parametrize(("latency_s", "right"), [(0.5, True), (0.49, False), (0.3, False)])
def test_a_latency_that_is_not_queue_and_service_together_is_refused(latency_s: float, right: bool):
    metrics = {"mean_latency_s": latency_s, "mean_queue_s": 0.2, "mean_service_s": 0.3}
    assert (impossible({}, metrics) == "") == right


@pytest.mark.parametrize(("ttft_s", "possible"), [((1.28, 0.96), True), ((1.95, 0.56), False)])
def test_a_gain_beyond_the_ranks_that_were_added_is_refused(ttft_s: tuple[float, float], possible: bool):
    cells = [Cell(name=f"tp={ranks}", settings={"pp": 2, "tp": ranks}) for ranks in (1, 2)]
    records = [record for cell, mean in zip(cells, ttft_s, strict=True) for record in kept(cell, [{"ttft_s": mean}])]
    one, two = rows(described(cells), records)
    assert one.verdict == ""
    assert two.verdict == ("" if possible else "REFUSED")
    if not possible:
        assert two.reason == "TTFT gains 3.48 times from TP 1 to 2, which can give at most 2"
        assert not two.intervals


def test_one_refused_repeat_refuses_its_row_and_no_other():
    good, bad = cell(1), cell(4)
    counts = [512, 512, 526, 512, 512]
    records = kept(bad, [{"num_tokens": count} for count in counts]) + kept(good, [{"num_tokens": 512}] * 5)
    description = described([good, bad])
    found = rows(description, records)
    assert [row.verdict for row in found] == ["", "REFUSED"]
    assert found[1].reason.endswith("(1 of 5 repeats)")
    assert found[1].intervals == {}
    text = markdown(description, found, [])
    assert "**REFUSED**: 526 tokens were counted" in text
    assert "| batch=4 | 5 | REFUSED |" in text
    assert list(comparisons(description, found)) == []


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_a_difference_is_told_only_where_the_intervals_do_not_overlap():
    base, clear, noisy = cell(1), cell(4), cell(8)
    records = [
        *throughputs(base, 204.1),
        *throughputs(clear, 403.5),
        *throughputs(noisy, 210.0, (0.6, 0.8, 1.0, 1.2, 1.4)),
    ]
    description = described([base, clear, noisy])
    found = rows(description, records)
    assert list(comparisons(description, found)) == [
        Comparison(cell="batch=4", column="Throughput", change="+98 % (better)", why_not=""),
        Comparison(cell="batch=8", column="Throughput", change="", why_not=NO_CONCLUSION),
    ]
    text = markdown(description, found, [])
    assert "## Compared with batch=1\n\n* batch=4: Throughput +98 % (better)\n" in text
    assert "* batch=8: no conclusion: the intervals overlap (Throughput)\n" in text


def test_a_longer_latency_is_worse():
    cells = [cell(1), cell(4)]
    records = [
        record
        for each, mean in zip(cells, (0.157, 0.317), strict=True)
        for record in kept(each, [{"mean_latency_s": mean * share} for share in STEADY])
    ]
    description = described(cells)
    (compared,) = comparisons(description, rows(description, records))
    assert (compared.column, compared.change) == ("Mean latency", "+102 % (worse)")


def test_fewer_than_five_repeats_conclude_nothing():
    cells = [cell(1), cell(4)]
    records = [*throughputs(cells[0], 100, STEADY[:4]), *throughputs(cells[1], 900)]
    description = described(cells)
    (compared,) = comparisons(description, rows(description, records))
    assert compared.change == ""
    assert compared.why_not == "no conclusion: 4 repeats, and at least 5 are needed"


def test_a_change_from_nothing_has_no_percentage():
    cells = [cell(1), cell(4)]
    records = [
        record
        for each, mean in zip(cells, (0.0, 0.25), strict=True)
        for record in kept(each, [{"mean_latency_s": mean}] * 5)
    ]
    description = described(cells)
    (compared,) = comparisons(description, rows(description, records))
    assert compared.change == "250 instead of 0 (worse)"


def test_nothing_is_compared_with_a_baseline_that_was_not_measured():
    cells = [cell(1), cell(4)]
    description = described(cells, failures={"batch=1": "out of memory"})
    found = rows(description, throughputs(cells[1], 300))
    assert list(comparisons(description, found)) == []
    assert "Compared with" not in markdown(description, found, [])


def test_every_cell_has_its_row_whatever_became_of_it():
    cells = [cell(1), cell(2), cell(4, refused="there are no ranks"), cell(8)]
    description = described(
        cells, failures={"batch=2": "out of memory"}, predicted={"batch=4": {"throughput_tokens_per_s": 440.0}}
    )
    records = [*throughputs(cells[0], 100), *throughputs(cells[1], 100, STEADY[:2])]
    text = markdown(description, rows(description, records), [])
    assert "| batch=1 | 5 | 100.00 ± 0.88 |" in text
    assert "| batch=2 | 2 | FAILED |" in text
    assert "* batch=2: **FAILED**: out of memory." in text
    assert "* batch=4: **N/A**: there are no ranks." in text
    assert "* batch=8: **N/A**: the run ended before it was measured." in text
    assert "| batch=4 | Throughput [tokens/s] | 440 | N/A |" in text


def test_prediction_error_and_the_share_of_what_is_possible_stand_beside_what_was_measured():
    cells = [cell(1), cell(4)]
    description = described(
        cells,
        predicted={"batch=1": {"throughput_tokens_per_s": 110.0}, "batch=4": {"throughput_tokens_per_s": 240.0}},
        limit={"batch=1": {"throughput_tokens_per_s": 200.0}, "batch=4": {"throughput_tokens_per_s": 250.0}},
    )
    found = rows(description, [*throughputs(cells[0], 100), *throughputs(cells[1], 300)])
    text = summary(description, found)
    assert "| batch=1 | Throughput [tokens/s] | 110 | 100.00 ± 0.88 | +10 % | 200 | 50 % |" in text
    assert "| -20 % | 250 | 120 %, so one of the two is wrong |" in text
    assert "Errors of 2 predictions: median 15 %, worst 20 %." in text


def test_a_time_reaches_of_the_possible_what_the_possible_time_is_of_it():
    each = cell(1)
    description = described([each], limit={"batch=1": {"mean_latency_s": 0.1}})
    found = rows(description, kept(each, [{"mean_latency_s": 0.125}] * 5))
    assert "| batch=1 | Mean latency [ms] |  | 125 ± 0 |  | 100 | 80 % |" in markdown(description, found, [])


def test_the_head_is_that_of_a_laboratory_book():
    each = cell(1)
    metrics = {"load_model_s": 0.5, "prefill_s": 0.434, "throughput_tokens_per_s": 21.0}
    description = described([each], facts={"load_model_s": 9.0, "load_tokenizer_s": 0.25})
    text = markdown(description, rows(description, kept(each, [metrics] * 5)), [])
    head = text.split("```")[1]
    assert head.splitlines()[1:] == [
        "Run: fake-1",
        "Date: 2026-01-31",
        "Hardware: Abacus, 2 cores, 8 GB, Linux x86_64",
        "Model: fake @ float32",
        r'Prompt: "Q: \"why\"?\nA:"',
        "Batch policy: static",
        "KV Cache: on",
        "",
        "Metrics",
        "-------",
        "load_model        : 0.5 ± 0 s",
        "load_tokenizer    : 0.25 s",
        "prefill           : 0.434 ± 0 s",
        "decode_loop       : N/A",
        "token/s           : 21 ± 0",
        "GPU Utilization   : N/A",
        "Notes             : of the cell batch=1, n = 5",
    ]


def test_a_note_stands_once_with_the_cells_that_it_is_of():
    cells = [cell(1), cell(4)]
    description = described(cells, notes={"batch=1": ("of all", "of one"), "batch=4": ("of all",)})
    text = markdown(description, rows(description, []), [])
    assert "## Notes\n\n* of all\n* batch=1: of one\n" in text


@pytest.mark.parametrize(
    ("values", "scale", "text"),
    [
        ([414.0, 415.0, 414.5], 1.0, "414.5 ± 1.2"),
        ([0.31, 0.32, 0.33], 1e3, "320 ± 25"),
        ([512.0, 512.0], 1.0, "512 ± 0"),
        ([7.0], 1.0, "7 (once)"),
        ([0.0, 0.0], 1.0, "0 ± 0"),
        ([10000.0, 20000.0, 30000.0], 1.0, "20000 ± 24841"),
    ],
)
def test_a_mean_is_shown_to_the_place_that_its_interval_leaves_open(values: list[float], scale: float, text: str):
    assert shown_interval(mean_interval(values), scale) == text


def test_numbers_keep_four_digits():
    assert [shown(value) for value in (0.001234567, 123.456, 65536.0)] == ["0.001235", "123.5", "65536"]
    assert shown_interval(Interval(low=0.001188, mean=0.0012, high=0.001212)) == "0.001200 ± 0.000012"


def test_bars_in_names_do_not_break_the_table():
    each = Cell(name="a|b", settings={})
    description = described([each])
    text = markdown(description, rows(description, throughputs(each, 100)), [])
    assert r"| a\|b | 5 |" in text


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_curve_has_numbers_in_order_and_every_setting_of_lines_its_own():
    cells = [
        Cell(name=f"{batch},{wait}", settings={"batch": batch, "wait_ms": wait})
        for batch in (8, 1)
        for wait in (0.0, 10.0)
    ]
    level = Cell(name="continuous", settings={})
    records = [record for each in (*cells, level) for record in throughputs(each, 100)]
    figure = Figure(name="f", title="F", x="batch", metric="throughput_tokens_per_s", lines="wait_ms")
    description = described([*cells, level], predicted={"1,0.0": {"throughput_tokens_per_s": 90.0}})
    found = curves(description, rows(description, records), figure)
    assert [curve.label for curve in found] == ["wait_ms = 0", "wait_ms = 10", "continuous"]
    assert [[point.x for point in curve.measured] for curve in found] == [[1, 8], [1, 8], [None]]
    assert [[point.y for point in curve.predicted] for curve in found] == [[90.0], [], []]
    assert found[0].measured[0].reach == pytest.approx(0.878, abs=0.001)


def test_a_picture_is_in_the_unit_of_its_column():
    each = cell(1)
    figure = Figure(name="latency", title="Latency", x="batch", metric="mean_latency_s")
    description = described([each])
    ((curve),) = curves(description, rows(description, kept(each, [{"mean_latency_s": 0.25}])), figure)
    assert (curve.measured[0].y, curve.measured[0].reach) == (250.0, 0.0)


def test_a_report_lies_beside_its_pictures(tmp_path: Path):
    pytest.importorskip("matplotlib")
    cells = [
        *(Cell(name=f"{kind}", settings={"kind": kind, "batch": 1}) for kind in ("engine", "worker")),
        Cell(name="limit of it", settings={}),
    ]
    figures = (
        Figure(name="by-kind", title="By kind", x="kind", metric="throughput_tokens_per_s"),
        Figure(name="nothing", title="Nothing of it is known", x="batch", metric="num_tokens"),
    )
    description = described(
        cells,
        figures=figures,
        predicted={cells[0].name: {"throughput_tokens_per_s": 90.0}},
        limit={each.name: {"throughput_tokens_per_s": 120.0} for each in cells},
    )
    records = [record for each in cells for record in throughputs(each, 100)]
    path = write(description, records, tmp_path / "new" / "out")
    assert sorted(each.name for each in path.parent.iterdir()) == ["by-kind.png", "report.md"]
    assert (path.parent / "by-kind.png").read_bytes().startswith(PNG)
    assert "![By kind](by-kind.png)" in path.read_text()
    assert "nothing.png" not in path.read_text()
    bare = write(description, records, tmp_path / "bare", drawn=False)
    assert [each.name for each in bare.parent.iterdir()] == ["report.md"]
    assert ".png" not in bare.read_text()


def test_a_figure_without_points_is_not_drawn(tmp_path: Path):
    description = described([cell(1)])
    assert not draw(description, rows(description, []), FIGURES[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_without_matplotlib_is_refused_unless_without_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    description, records = described([cell(1)]), throughputs(cell(1), 100)
    with pytest.raises(ConfigError, match="matplotlib"):
        write(description, records, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert write(description, records, tmp_path, drawn=False).exists()


def test_columns_are_headed_with_their_unit_where_they_have_one():
    assert Column(metric="total_s", title="Total", unit="s").heading == "Total [s]"
    assert Column(metric="num_tokens", title="Tokens", unit="").heading == "Tokens"
