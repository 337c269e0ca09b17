"""The report of a run: Markdown with pictures, made from nothing but what was kept of it.

    # Experiment: NAME      the head, one line a thing, as in a laboratory book
    Results                 means with their 95 % intervals; cells that were refused or failed with the reason
    Predicted, measured, possible
    Compared with BASELINE  only where the intervals say so
    Notes, Environment

A row is one cell. It is measured, or it is one of: N/A (cannot be measured here), FAILED (began and could not go on),
REFUSED (its figures cannot be true). Only measured rows are averaged and compared.

This file does not know how anything was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tllm.lab.curves import draw
from tllm.lab.description import Description
from tllm.lab.experiment import Column
from tllm.lab.record import Record
from tllm.lab.rows import Row, rows
from tllm.lab.statistics import Interval, differ, median

_TOO_MUCH = 1.05  # of what is possible
MIN_REPEATS = 5  # with fewer nothing is concluded
REPORT = "report.md"
NO_CONCLUSION = "no conclusion: the intervals overlap"

_HEAD = (
    ("load_model", ("load_model_s",)),
    ("load_tokenizer", ("load_tokenizer_s",)),
    ("prefill", ("prefill_s",)),
    ("decode_loop", ("decode_loop_s",)),
    ("token/s", ("tokens_per_s", "throughput_tokens_per_s")),
    ("GPU Utilization", ("gpu_utilization",)),
)
_UNMEASURED = "N/A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of one cell with the baseline in one column."""

    cell: str
    column: str
    change: str  # such as "+98 % (better)"; empty where nothing is concluded
    why_not: str  # then the reason


def comparisons(description: Description, found: Sequence[Row]) -> Iterator[Comparison]:
    """Of every measured cell but the baseline, in every column that has a better side."""
    baseline = next((row for row in found if row.cell.name == description.baseline and not row.verdict), None)
    if baseline is None:
        return
    for row in found:
        if row is baseline or row.verdict:
            continue
        for column in description.columns:
            if column.better and column.metric in row.intervals and column.metric in baseline.intervals:
                why_not = _why_not(row, baseline, column)
                change = "" if why_not else _change(row, baseline, column)
                yield Comparison(cell=row.cell.name, column=column.title, change=change, why_not=why_not)


def markdown(description: Description, found: Sequence[Row], pictures: Sequence[str]) -> str:
    """`pictures`: names of files that lie beside the report, with their titles' order that of the figures."""
    parts = [
        _head(description, found),
        "## Results\n\n" + _results(description, found),
        *_section("Predicted, measured, possible", _beside(description, found)),
        *_section(f"Compared with {description.baseline}", _compared(description, found)),
        *_section("Pictures", "\n\n".join(_embedded(description, pictures))),
        *_section("Notes", _notes(description, found)),
        "## Environment\n\n" + _environment(description),
    ]
    return "\n\n".join(parts) + "\n"


def summary(description: Description, found: Sequence[Row]) -> str:
    """The report's tables for a terminal."""
    compared = _compared(description, found)
    parts = (
        _results(description, found),
        _beside(description, found),
        f"Compared with {description.baseline}:\n{compared}" if compared else "",
    )
    return "\n\n".join(part for part in parts if part)


def write(description: Description, records: Sequence[Record], directory: Path, *, drawn: bool = True) -> Path:
    """Make `report.md` and, where `drawn`, a PNG for every figure in `directory`, which is made when missing; the
    report's path.

    Raises ConfigError where pictures are wanted and matplotlib is not installed; then there is no report either.
    """
    found = rows(description, records)
    directory.mkdir(parents=True, exist_ok=True)
    names = [figure.name for figure in description.figures if drawn and draw(description, found, figure, directory)]
    path = directory / REPORT
    path.write_text(markdown(description, found, names), encoding="utf-8")
    return path


def shown(value: float, scale: float = 1.0) -> str:
    """Four significant digits, or all before the point."""
    value *= scale
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def shown_interval(interval: Interval, scale: float = 1.0) -> str:
    """The mean, give or take: the spread with two digits, the mean to the same place."""
    mean, reach = interval.mean * scale, interval.half_width * scale
    if not math.isfinite(reach):
        return f"{shown(mean)} (once)"
    if reach <= abs(mean) * 1e-6:
        return f"{shown(mean)} ± 0"
    places = max(0, 1 - math.floor(math.log10(reach)))
    return f"{mean:.{places}f} ± {reach:.{places}f}"


def _percent(share: float, *, signed: bool = False) -> str:
    """`+98 %`, `-3.4 %`: two digits at least."""
    return f"{share * 100:{'+' if signed else ''}.{0 if abs(share) >= 0.1 else 1}f} %"


def _why_not(row: Row, baseline: Row, column: Column) -> str:
    """Why nothing is concluded; empty where something is."""
    least = min(row.num, baseline.num)
    if least < MIN_REPEATS:
        return f"no conclusion: {least} repeats, and at least {MIN_REPEATS} are needed"
    return "" if differ(row.intervals[column.metric], baseline.intervals[column.metric]) else NO_CONCLUSION


def _change(row: Row, baseline: Row, column: Column) -> str:
    mine, theirs = row.intervals[column.metric].mean, baseline.intervals[column.metric].mean
    better = "better" if (mine > theirs) == (column.better == "higher") else "worse"
    change = _percent(mine / theirs - 1, signed=True) if theirs > 0 else f"{shown(mine, column.scale)} instead of 0"
    return f"{change} ({better})"


def _head(description: Description, found: Sequence[Row]) -> str:
    conditions, seen = description.conditions, description.environment
    row = _leading(description, found)
    metrics = [f"{name:<18}: {_head_value(names, row, description)}" for name, names in _HEAD]
    of_cell = f"of the cell {row.cell.name}, n = {row.num}" if row else "no cell was measured"
    return "\n".join(
        (
            f"# Experiment: {description.experiment}",
            "",
            f"{description.title}",
            "",
            "```text",
            f"Run: {description.run}",
            f"Date: {description.at[:10]}",
            f"Hardware: {seen.get('processor')}, {seen.get('cores')} cores, {seen.get('memory')}, {seen.get('os')}",
            f"Model: {conditions.model}",
            f"Prompt: {json.dumps(conditions.prompt, ensure_ascii=False)}",
            f"Batch policy: {conditions.batch_policy}",
            f"KV Cache: {conditions.kv_cache}",
            "",
            "Metrics",
            "-------",
            *metrics,
            f"{'Notes':<18}: {of_cell}",
            "```",
        )
    )


def _leading(description: Description, found: Sequence[Row]) -> Row | None:
    """The baseline where it was measured, else the first row that was."""
    measured = [row for row in found if not row.verdict]
    return next((row for row in measured if row.cell.name == description.baseline), next(iter(measured), None))


def _head_value(names: Sequence[str], row: Row | None, description: Description) -> str:
    for name in names:
        interval = row.intervals.get(name) if row else None
        text = shown_interval(interval) if interval else None
        if text is None and name in description.facts:
            text = shown(description.facts[name])
        if text is not None:
            return f"{text} {'s' if name.endswith('_s') and not name.endswith('_per_s') else ''}".rstrip()
    return _UNMEASURED


def _results(description: Description, found: Sequence[Row]) -> str:
    columns = [column for column in description.columns if any(column.metric in row.intervals for row in found)]
    lines = [["cell", "n", *(column.heading for column in columns)]]
    for row in found:
        means = (row.intervals.get(column.metric) for column in columns)
        texts = [
            shown_interval(mean, column.scale) if mean else row.verdict
            for mean, column in zip(means, columns, strict=True)
        ]
        lines.append([row.cell.name, str(row.num), *texts])
    counts = f"{description.warmups} uncounted and {description.repeats} counted repeats of every cell"
    reasons = "\n".join(f"* {row.cell.name}: **{row.verdict}**: {row.reason}." for row in found if row.verdict)
    parts = (
        f"Means with 95 % intervals (Student's t); {counts}, the counted ones in one shuffled order.",
        _table(lines),
        reasons,
    )
    return "\n\n".join(part for part in parts if part)


def _beside(description: Description, found: Sequence[Row]) -> str:
    """A line for every cell and column of which anything is predicted or limited."""
    lines = [["cell", "", "predicted", "measured", "error of the prediction", "possible", "reached"]]
    errors = []
    for row in found:
        for column in description.columns:
            predicted = description.predicted.get(row.cell.name, {}).get(column.metric)
            limit = description.limit.get(row.cell.name, {}).get(column.metric)
            measured = row.intervals.get(column.metric)
            if predicted is None and limit is None:
                continue
            error = reached = ""
            if predicted is not None and measured and measured.mean:
                errors.append(abs(predicted / measured.mean - 1))
                error = _percent(predicted / measured.mean - 1, signed=True)
            if limit and measured and measured.mean:
                share = limit / measured.mean if column.better == "lower" else measured.mean / limit
                reached = _percent(share) + (", so one of the two is wrong" if share > _TOO_MUCH else "")
            lines.append(
                [
                    row.cell.name,
                    column.heading,
                    "" if predicted is None else shown(predicted, column.scale),
                    shown_interval(measured, column.scale) if measured else row.verdict,
                    error,
                    "" if limit is None else shown(limit, column.scale),
                    reached,
                ]
            )
    if len(lines) == 1:
        return ""
    text = _table(lines)
    if errors:
        middle, worst = _percent(median(errors)), _percent(max(errors))
        text += f"\n\nErrors of {len(errors)} predictions: median {middle}, worst {worst}."
    return text


def _compared(description: Description, found: Sequence[Row]) -> str:
    """A line for every cell: what changed, then what nothing is concluded of."""
    cells: dict[str, list[Comparison]] = {}
    for comparison in comparisons(description, found):
        cells.setdefault(comparison.cell, []).append(comparison)
    return "\n".join(f"* {cell}: {'; '.join(_said(compared))}" for cell, compared in cells.items())


def _said(compared: Sequence[Comparison]) -> Iterator[str]:
    yield from (f"{each.column} {each.change}" for each in compared if each.change)
    for why_not in dict.fromkeys(each.why_not for each in compared if each.why_not):
        yield f"{why_not} ({', '.join(each.column for each in compared if each.why_not == why_not)})"


def _embedded(description: Description, pictures: Sequence[str]) -> Iterator[str]:
    for figure in description.figures:
        if figure.name in pictures:
            yield f"![{figure.title}]({figure.name}.png)"


def _notes(description: Description, found: Sequence[Row]) -> str:
    """A note that several cells have stands once."""
    owners: dict[str, list[str]] = {}
    for name, notes in description.notes.items():
        for note in notes:
            owners.setdefault(note, []).append(name)
    return "\n".join(
        f"* {note}" if len(names) == len(description.cells) else f"* {', '.join(names)}: {note}"
        for note, names in owners.items()
    )


def _environment(description: Description) -> str:
    settings = {**description.conditions.settings, "seed": description.seed}
    return _table([["", ""], *([name, str(value)] for name, value in {**description.environment, **settings}.items())])


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}\n\n{text}"] if text else []


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    rules = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *body))
