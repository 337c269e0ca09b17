"""What a run was, apart from its measurements: all that a report needs besides the records.

It is kept with them, so that a report can be made again when the experiment itself has long changed.

This file does not know how a report looks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from tllm.core.errors import ConfigError
from tllm.lab.experiment import Cell, Column, Conditions, Figure

ByCell = Mapping[str, Mapping[str, float]]  # the cell's name -> metric -> value


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    experiment: str
    run: str
    at: str  # ISO 8601, UTC
    title: str
    repeats: int
    warmups: int
    seed: int
    environment: Mapping[str, str]
    conditions: Conditions
    cells: tuple[Cell, ...]
    columns: tuple[Column, ...]
    figures: tuple[Figure, ...]
    baseline: str | None
    predicted: ByCell
    limit: ByCell
    facts: Mapping[str, float]
    notes: Mapping[str, tuple[str, ...]]
    failures: Mapping[str, str]  # the cell's name -> why it was not measured to the end

    def as_json(self) -> str:
        return json.dumps(self, default=_plain, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Raises ConfigError when it was written by a tllm with other fields."""
        try:
            values: dict[str, Any] = json.loads(text)
            values["conditions"] = Conditions(**values["conditions"])
            values["cells"] = tuple(Cell(**each) for each in values["cells"])
            values["columns"] = tuple(Column(**each) for each in values["columns"])
            values["figures"] = tuple(Figure(**each) for each in values["figures"])
            values["notes"] = {name: tuple(notes) for name, notes in values["notes"].items()}
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError("The description of this run was written by another version of tllm.") from error


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    assert isinstance(value, Mapping), value
    return dict(value)
