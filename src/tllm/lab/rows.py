"""What the records of a run come to: one row a cell.

A row is measured, or it is one of: N/A (cannot be measured here), FAILED (began and could not go on), REFUSED (its
figures cannot be true). One repeat that cannot be true refuses the row: whatever counted it counted the others too.
Only measured rows have intervals.

This file does not know how a row is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tllm.lab.description import Description
from tllm.lab.experiment import Cell
from tllm.lab.record import Record, Setting
from tllm.lab.runner import CELL
from tllm.lab.sanity import impossible, impossible_gain
from tllm.lab.statistics import Interval, mean_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell. `verdict` is empty for a measured one, else N/A, FAILED or REFUSED; then `intervals` is empty."""

    cell: Cell
    verdict: str
    reason: str
    num: int  # repeats that were measured
    intervals: Mapping[str, Interval]  # metric -> its mean over the repeats


def rows(description: Description, records: Sequence[Record]) -> tuple[Row, ...]:
    """In the order of the cells."""
    found = [_row(description, cell, records) for cell in description.cells]
    ttft = [(row.cell.settings, row.intervals["ttft_s"].mean) for row in found if "ttft_s" in row.intervals]
    return tuple(_gain_checked(row, ttft) for row in found)


def _row(description: Description, cell: Cell, records: Sequence[Record]) -> Row:
    mine = [record for record in records if record.settings.get(CELL) == cell.name]
    refusals = [reason for record in mine if (reason := impossible(record.settings, record.metrics))]
    if cell.refused:
        verdict, reason = "N/A", cell.refused
    elif cell.name in description.failures:
        verdict, reason = "FAILED", description.failures[cell.name]
    elif refusals:
        verdict, reason = "REFUSED", f"{refusals[0]} ({len(refusals)} of {len(mine)} repeats)"
    elif not mine:
        verdict, reason = "N/A", "the run ended before it was measured"
    else:
        verdict, reason = "", ""
    metrics = set.intersection(*(set(record.metrics) for record in mine)) if mine and not verdict else set()
    return Row(
        cell=cell,
        verdict=verdict,
        reason=reason,
        num=len(mine),
        intervals={name: mean_interval([record.metrics[name] for record in mine]) for name in sorted(metrics)},
    )


def _gain_checked(row: Row, ttft: Sequence[tuple[Mapping[str, Setting], float]]) -> Row:
    if "ttft_s" not in row.intervals:
        return row
    reason = impossible_gain(row.cell.settings, row.intervals["ttft_s"].mean, ttft)
    if not reason:
        return row
    return Row(cell=row.cell, verdict="REFUSED", reason=reason, num=row.num, intervals={})
