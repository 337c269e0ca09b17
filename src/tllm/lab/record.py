"""What is kept of every measurement: rows of an sqlite file, and the same as one JSON object a line beside it.

    records.sqlite   table `records`, one row a record, mappings as JSON   to ask questions of; found by experiment, run
                     table `descriptions`, one row a run                   what its report needs besides the records
    records.jsonl    {"experiment": "batching", "run": "...", ...}         to read, to keep, to send

A record is one repeat of one cell. It is complete or it is refused: a figure without its settings, its environment or
its seed cannot be repeated.

This file does not know which experiments there are, nor what is concluded from them.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tllm.core.config import state_directory
from tllm.core.errors import ConfigError

if TYPE_CHECKING:
    from types import TracebackType

Setting = str | int | float | bool

_MAX_INTEGER = 2**63 - 1  # of an sqlite column
_BUSY_S = 30.0  # that another process may take to write
_VERSION = 1
_MAPPINGS = ("environment", "settings", "metrics")  # kept as JSON
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY,
    experiment TEXT NOT NULL, run TEXT NOT NULL, at TEXT NOT NULL,
    environment TEXT NOT NULL, settings TEXT NOT NULL,
    repeat INTEGER NOT NULL, seed INTEGER NOT NULL,
    metrics TEXT NOT NULL, notes TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS records_by_run ON records (experiment, run);
CREATE TABLE IF NOT EXISTS descriptions (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL UNIQUE, experiment TEXT NOT NULL, description TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured repeat of one cell of an experiment. Raises ConfigError when a field has no possible value."""

    experiment: str
    run: str  # the same for all records of one start of the experiment
    at: str  # ISO 8601, UTC
    environment: Mapping[str, str]
    settings: Mapping[str, Setting]
    repeat: int  # from 0
    seed: int
    metrics: Mapping[str, float]  # names carry the unit: `ttft_s`
    notes: str = ""

    def __post_init__(self) -> None:
        for name in ("experiment", "run"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"A record's {name} is {value!r}; it must be a text.")
        if not isinstance(self.notes, str):
            raise ConfigError(f"A record's notes are {self.notes!r}; they must be a text.")
        if not _is_utc(self.at):
            raise ConfigError(f"A record's at is {self.at!r}; it must be a time of UTC such as 2026-01-31T12:00:00Z.")
        for name in ("repeat", "seed"):
            value = getattr(self, name)
            if not _is_whole(value) or not 0 <= value <= _MAX_INTEGER:
                raise ConfigError(f"A record's {name} is {value!r}; it must be a whole number from 0 on.")
        _check_mapping("environment", self.environment, str)
        _check_mapping("settings", self.settings, str | int | float)
        _check_mapping("metrics", self.metrics, int | float)
        if booleans := [name for name, value in self.metrics.items() if isinstance(value, bool)]:
            raise ConfigError(f"A record's metrics {', '.join(booleans)} are true or false; they must be numbers.")

    def as_json(self) -> str:
        """One line."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(values, default=dict, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Raises ConfigError naming what is missing, unknown or impossible."""
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"A record is not JSON: {error}") from error
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise ConfigError(f"A record is {line[:80]!r}; it must be an object with {', '.join(names)}.")
        missing, unknown = [name for name in names if name not in values], sorted(values.keys() - set(names))
        if missing or unknown:
            wrong = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(unknown)}"] * bool(unknown)
            raise ConfigError(f"A record {' and '.join(wrong)}; it must have exactly {', '.join(names)}.")
        return cls(**values)


class Records:
    """A file of records and its lines of JSON. Several processes may add to it at the same time."""

    def __init__(self, path: Path) -> None:
        """Both files are made when missing. Raises ConfigError when `path` is not such a file."""
        self.path = path
        self.lines_path = path.with_suffix(".jsonl")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path} cannot be opened to keep records: {error}") from error
        try:
            self._set_up()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def add(self, record: Record) -> None:
        """Kept when this returns."""
        line = record.as_json()
        row = {field.name: getattr(record, field.name) for field in fields(record)}
        row |= {name: json.dumps(row[name], default=dict) for name in _MAPPINGS}
        places = ", ".join(f":{name}" for name in row)
        with self._connection:  # undone when the line cannot be written
            self._connection.execute(f"INSERT INTO records ({', '.join(row)}) VALUES ({places})", row)
            with self.lines_path.open("a", encoding="ascii") as lines:
                lines.write(line + "\n")

    def find(self, experiment: str | None = None, run: str | None = None) -> tuple[Record, ...]:
        """In the order in which they were added; all where nothing is asked for."""
        names = [field.name for field in fields(Record)]
        rows = self._connection.execute(
            f"SELECT {', '.join(names)} FROM records "
            "WHERE (:experiment IS NULL OR experiment = :experiment) AND (:run IS NULL OR run = :run) ORDER BY id",
            {"experiment": experiment, "run": run},
        )
        return tuple(_from_row(dict(zip(names, row, strict=True))) for row in rows)

    def describe(self, run: str, experiment: str, description: str) -> None:
        """Keep what a run's report needs besides its records, in place of what was kept before."""
        with self._connection:
            self._connection.execute(
                "INSERT INTO descriptions (run, experiment, description) VALUES (?, ?, ?) "
                "ON CONFLICT (run) DO UPDATE SET description = excluded.description",
                (run, experiment, description),
            )

    def description(self, run: str) -> str:
        """Raises ConfigError when the run has none."""
        row = self._connection.execute("SELECT description FROM descriptions WHERE run = ?", (run,)).fetchone()
        if row is None:
            raise ConfigError(f"{self.path} has no run {run!r}; it has {', '.join(self.runs()) or 'none'}.")
        return str(row[0])

    def runs(self, experiment: str | None = None) -> tuple[str, ...]:
        """Those that have a description, the oldest first."""
        rows = self._connection.execute(
            "SELECT run FROM descriptions WHERE :experiment IS NULL OR experiment = :experiment ORDER BY id",
            {"experiment": experiment},
        )
        return tuple(str(run) for (run,) in rows)

    def _set_up(self) -> None:
        try:
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise ConfigError(
                    f"{self.path} is of version {version}; this tllm reads {_VERSION}. Move the file away."
                )
            self._connection.executescript(_SCHEMA + f"PRAGMA user_version = {_VERSION};")
        except sqlite3.Error as error:
            raise ConfigError(f"{self.path} is not a file of records: {error}. Move it away.") from error


def records_path() -> Path:
    """Where this user's records are."""
    return state_directory() / "lab" / "records.sqlite"


def utc_now() -> str:
    """The present moment as a record's `at`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _from_row(row: dict[str, object]) -> Record:
    for name in _MAPPINGS:
        row[name] = json.loads(str(row[name]))
    return Record.from_json(json.dumps(row))


def _check_mapping(name: str, values: object, kind: object) -> None:
    """Raises ConfigError unless `values` maps texts to finite values of that kind."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"A record's {name} is {values!r}; it must be a mapping.")
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, kind):  # type: ignore[arg-type]
            raise ConfigError(f"A record's {name} has {key!r}: {value!r}, which cannot be kept.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"A record's {name} has {key} = {value}; it must be a finite number.")


def _is_utc(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        return datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
