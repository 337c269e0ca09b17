"""A sheet of figures: sections of lines and tables, every number with its unit, and how it was come by.

    weights and KV
      KV per token              131,072 B
          2 (k, v) x 32 layers x 8 KV heads x 128 x 2 B      shown where somebody asks for explanations

The same sheet is told as text for a terminal, as Markdown, and as plain JSON, where numbers stay numbers.

This file does not know what is calculated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tllm.core.units import Quantity, Unit

Cell = Quantity | str  # a string says what has no number: a name, or that something cannot be

_GAP = "   "


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One figure. `formula` has the numbers put in, each followed by what it is."""

    label: str
    value: Cell
    note: str = ""
    formula: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of as many cells as there are columns. The first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    formula: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Lines first, then tables, then what is to be said of them."""

    title: str
    lines: tuple[Line, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def in_parameters(value: int) -> Quantity:
    return Quantity(value, Unit.PARAMETERS)


def in_bytes(value: float) -> Quantity:
    """Whole ones exactly."""
    return Quantity(int(value) if value == int(value) else value, Unit.BYTES)


def in_seconds(value: float) -> Quantity:
    return Quantity(value, Unit.SECONDS)


def in_tokens_per_s(value: float) -> Quantity:
    return Quantity(value, Unit.TOKENS_PER_S)


def text_lines(sections: Sequence[Section], *, explain: bool = False) -> Iterator[str]:
    """For a terminal. Values of one section stand under each other, numbers to the right and units to the left."""
    for index, section in enumerate(sections):
        if index:
            yield ""
        yield section.title
        yield from _aligned(section.lines, explain=explain)
        for table in section.tables:
            if section.lines or table is not section.tables[0]:
                yield ""
            yield from _columns(table)
            if explain and table.formula:
                yield from _formula(table.formula)
        for note in section.notes:
            yield f"  {note}"


def markdown_lines(sections: Sequence[Section], *, level: int = 2) -> Iterator[str]:
    """With every formula."""
    for section in sections:
        yield f"{'#' * level} {_escaped(section.title)}"
        yield ""
        if section.lines:
            yield "| | | |"
            yield "|---|--:|---|"
            for line in section.lines:
                about = "; ".join(part for part in (line.note, f"`{line.formula}`" if line.formula else "") if part)
                yield f"| {_escaped(line.label)} | {_told(line.value)} | {_escaped(about)} |"
            yield ""
        for table in section.tables:
            yield f"| {' | '.join(map(_escaped, table.columns))} |"
            yield f"|---|{'--:|' * (len(table.columns) - 1)}"
            for row in table.rows:
                yield f"| {' | '.join(_escaped(_told(cell)) for cell in row)} |"
            yield ""
            if table.formula:
                yield f"`{table.formula}`"
                yield ""
        for note in section.notes:
            yield _escaped(note)
            yield ""


def as_json(sections: Sequence[Section]) -> list[dict[str, object]]:
    """Plain values: a quantity is its number in its unit, a word has no unit."""
    return [
        {
            "title": section.title,
            "lines": [
                {"label": line.label, **_plain(line.value), "note": line.note, "formula": line.formula}
                for line in section.lines
            ],
            "tables": [
                {
                    "columns": list(table.columns),
                    "rows": [[_plain(cell) for cell in row] for row in table.rows],
                    "formula": table.formula,
                }
                for table in section.tables
            ],
            "notes": list(section.notes),
        }
        for section in sections
    ]


def _aligned(lines: Sequence[Line], *, explain: bool) -> Iterator[str]:
    split = [_split(line.value) for line in lines]
    label_width = max((len(line.label) for line in lines), default=0)
    number_width = max((len(number) for number, _ in split), default=0)
    unit_width = max((len(unit) for (_, unit), line in zip(split, lines, strict=True) if line.note), default=0)
    for line, (number, unit) in zip(lines, split, strict=True):
        value = f"{number:>{number_width}} {unit:<{unit_width}}"
        yield f"  {line.label:<{label_width}}{_GAP}{value}{_GAP}{line.note}".rstrip()
        if explain and line.formula:
            yield from _formula(line.formula)


def _formula(formula: str) -> Iterator[str]:
    for part in formula.splitlines():
        yield f"      {part}"


def _columns(table: Table) -> Iterator[str]:
    rows = [table.columns, *([_told(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        yield f"  {first[0]:<{first[1]}}{''.join(f'{_GAP}{cell:>{width}}' for cell, width in rest)}".rstrip()


def _told(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.text()


def _split(cell: Cell) -> tuple[str, str]:
    """The number and its unit; a word stands where units do."""
    if isinstance(cell, str):
        return "", cell
    number, _, unit = cell.text().partition(" ")
    return number, unit


def _plain(cell: Cell) -> dict[str, object]:
    return {"value": cell} if isinstance(cell, str) else {"value": cell.value, "unit": cell.unit.value}


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
