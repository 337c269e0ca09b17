"""The pictures of a report: a metric over a setting, measured with its intervals, predicted dashed, the limit dotted.

This file does not know how anything was measured, nor where the pictures are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tllm.lab import pictures
from tllm.lab.description import ByCell, Description
from tllm.lab.experiment import Column, Figure
from tllm.lab.record import Setting
from tllm.lab.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADROOM = 1.3  # for the legend
_MAX_TICKS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    x: Setting | None  # None: of a level line, which has one point
    y: float
    reach: float = 0.0  # of the interval, to either side


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The points are in the order in which they are joined: numbers ascend, texts are as the cells have them."""

    label: str
    measured: tuple[Point, ...]
    predicted: tuple[Point, ...]
    limit: tuple[Point, ...]


def curves(description: Description, rows: Sequence[Row], figure: Figure) -> tuple[Curve, ...]:
    """Those of which anything was measured or predicted."""
    column = _column(description, figure)
    found = (
        Curve(
            label=label,
            measured=_measured(members, figure, column),
            predicted=_known(description.predicted, members, figure, column),
            limit=_known(description.limit, members, figure, column),
        )
        for label, members in _members(rows, figure)
    )
    return tuple(curve for curve in found if curve.measured or curve.predicted)


def draw(description: Description, rows: Sequence[Row], figure: Figure, directory: Path) -> bool:
    """Make `directory`/NAME.png. False, and no picture, where nothing of it was measured or predicted.

    Raises ConfigError where matplotlib is not installed.
    """
    found = curves(description, rows, figure)
    if not found:
        return False
    places = _places(found)
    with pictures.figure(
        directory / f"{figure.name}.png",
        title=figure.title,
        x_label=figure.x_label or figure.x,
        y_label=_column(description, figure).heading,
        x_log=figure.x_log and not places,
        y_log=figure.y_log,
    ) as axes:
        for number, curve in enumerate(found):
            _draw_curve(axes, curve, pictures.COLOURS[number % len(pictures.COLOURS)], places)
        _explain_styles(axes, found)
        _set_ticks(axes, found, places)
        if not figure.y_log:
            axes.set_ylim(0, _HEADROOM * axes.get_ylim()[1])
    return True


def _column(description: Description, figure: Figure) -> Column:
    return next(column for column in description.columns if column.metric == figure.metric)


def _members(rows: Sequence[Row], figure: Figure) -> Iterator[tuple[str, list[Row]]]:
    """A label and the cells on its curve. Cells without the setting x are level lines of their own."""
    groups: dict[Setting | None, list[Row]] = {}
    for row in rows:
        if figure.x in row.cell.settings:
            groups.setdefault(row.cell.settings.get(figure.lines) if figure.lines else None, []).append(row)
    for value, members in groups.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        yield f"{figure.lines} = {shown}" if figure.lines else "", members
    for row in rows:
        if figure.x not in row.cell.settings:
            yield row.cell.name, [row]


def _measured(rows: Sequence[Row], figure: Figure, column: Column) -> tuple[Point, ...]:
    points = []
    for row in rows:
        if column.metric in row.intervals:
            interval = row.intervals[column.metric]
            reach = interval.half_width if math.isfinite(interval.half_width) else 0.0
            x = row.cell.settings.get(figure.x)
            points.append(Point(x=x, y=interval.mean * column.scale, reach=reach * column.scale))
    return _in_order(points)


def _known(values: ByCell, rows: Sequence[Row], figure: Figure, column: Column) -> tuple[Point, ...]:
    return _in_order(
        [
            Point(x=row.cell.settings.get(figure.x), y=values[row.cell.name][column.metric] * column.scale)
            for row in rows
            if column.metric in values.get(row.cell.name, {})
        ]
    )


def _in_order(points: Sequence[Point]) -> tuple[Point, ...]:
    numbers = [(float(point.x), point) for point in points if isinstance(point.x, int | float)]
    if len(numbers) < len(points):
        return tuple(points)
    return tuple(point for _, point in sorted(numbers, key=lambda pair: pair[0]))


def _places(found: Sequence[Curve]) -> dict[str, int]:
    """Where on the axis each x stands when some are texts; empty when all are numbers."""
    every = [point.x for curve in found for point in (*curve.measured, *curve.predicted) if point.x is not None]
    if all(isinstance(x, int | float) for x in every):
        return {}
    return {text: place for place, text in enumerate(dict.fromkeys(map(str, every)))}


def _set_ticks(axes: Axes, found: Sequence[Curve], places: Mapping[str, int]) -> None:
    """Where something was measured, unless that is too much for the axis."""
    if places:
        axes.set_xticks(list(places.values()), list(places))
        return
    xs = sorted({float(point.x) for curve in found for point in curve.measured if isinstance(point.x, int | float)})
    if 0 < len(xs) <= _MAX_TICKS:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()


def _draw_curve(axes: Axes, curve: Curve, colour: str, places: Mapping[str, int]) -> None:
    """One entry of the legend, whatever it has of the three."""
    named, label = {"label": curve.label or "measured"}, {"label": "_"}  # matplotlib leaves out what starts with _
    _draw_points(axes, curve.limit, places, {**pictures.LIMIT, **label})
    _draw_points(
        axes,
        curve.predicted,
        places,
        {**pictures.PREDICTED, "color": colour, **(label if curve.measured or not curve.label else named)},
    )
    _draw_points(axes, curve.measured, places, {**pictures.MEASURED, "color": colour, **named})


def _explain_styles(axes: Axes, found: Sequence[Curve]) -> None:
    """Two more entries, for all curves together."""
    if any(curve.predicted for curve in found):
        axes.plot([], [], label="predicted", color=pictures.COLOURS[-1], **_any(pictures.PREDICTED))
    if any(curve.limit for curve in found):
        axes.plot([], [], label="possible", **_any(pictures.LIMIT))


def _any(style: Mapping[str, object]) -> dict[str, Any]:
    return dict(style)


def _draw_points(axes: Axes, points: Sequence[Point], places: Mapping[str, int], style: Mapping[str, Any]) -> None:
    if not points:
        return
    if points[0].x is None:
        (point,) = points
        axes.axhline(point.y, **{name: value for name, value in style.items() if not name.startswith("marker")})
        if point.reach:
            axes.axhspan(point.y - point.reach, point.y + point.reach, color=style["color"], alpha=0.12, linewidth=0)
        return
    xs = [places[str(point.x)] if places else float(point.x or 0) for point in points]
    axes.plot(xs, [point.y for point in points], **style)
    if any(point.reach for point in points):
        axes.errorbar(
            xs,
            [point.y for point in points],
            yerr=[point.reach for point in points],
            fmt="none",
            ecolor=style["color"],
            capsize=3,
        )
