"""What the commands of `tllm estimate` share: flags, how they are read, and how a sheet is shown.

This file does not know what is estimated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.core.errors import ConfigError

if TYPE_CHECKING:
    from tllm.lab.sheet import Section
    from tllm.planner.network import Edge

Explain = Annotated[bool, typer.Option("--explain", help="Each figure's formula with the numbers put in.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: plain numbers with their units.")]
Report = Annotated[
    Path | None, typer.Option(help="Write report.md with every formula, and pictures, into this directory.")
]
LinkText = Annotated[
    str | None, typer.Option("--link", help="Between two nodes, one way: rate and latency, such as 1Gb/s,0.2ms.")
]


def tell(
    sections: tuple[Section, ...],
    *,
    explain: bool,
    as_json: bool,
    report: Path | None,
    pictures: Callable[[Path], tuple[str, ...]],
) -> None:
    """Print the sheet, and write the report where one is asked for."""
    from tllm.lab import sheet
    from tllm.lab.estimate_report import write_report

    if as_json:
        print(json.dumps(sheet.as_json(sections), indent=2, allow_nan=False))
    else:
        print("\n".join(sheet.text_lines(sections, explain=explain)))
    if report is not None:
        path = write_report(report, sections, pictures)
        if not as_json:
            print(f"\nThe report is {path}.")


def parse_link(text: str) -> Edge:
    """`1Gb/s,0.2ms`; a rate alone has no latency. Raises ConfigError."""
    from tllm.core.units import parse_bytes_per_s, parse_seconds
    from tllm.planner.network import Edge

    rate, _, latency = text.partition(",")
    latency_s = parse_seconds(latency) if latency else 0.0
    return Edge(latency_s=latency_s, bytes_per_s=parse_bytes_per_s(rate), measured=False)


def counts(flag: str, text: str) -> tuple[int, ...]:
    """`1,4,16`, ascending. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{flag} is {text!r}; give numbers above 0 such as 1,4,16.")
    return tuple(sorted({int(part) for part in parts}))
