"""The seam of the lab: what an experiment is, and what one offers while it is open.

    Parameters ──find──▶ Experiment ──opened──▶ Session
                           cells, columns,        measure(cell)             one repeat, as numbers
                           figures, conditions    predicted, limit, notes   what stands beside them

The same things carry the same names everywhere, so that what is impossible can be seen (sanity.py): the settings
`requests`, `tokens` (at most for each request), `batch` (of batches served one after another), `arrivals`, `pp`, `tp`;
the metrics `num_tokens`, `total_s`, `throughput_tokens_per_s`, `mean_latency_s`, `ttft_s`.

This file does not know which experiments there are, nor in which order and how often their cells are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tllm.core.errors import ConfigError
from tllm.lab.record import Setting

Parameter = Setting | tuple[Setting, ...]  # one value or a list of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One combination that is measured, such as batch = 4, wait_ms = 10."""

    name: str  # unique in its experiment
    settings: Mapping[str, Setting]
    refused: str = ""  # why it cannot be measured here; shown as N/A with whatever is predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A metric as it is shown: value · scale, in `unit`."""

    metric: str  # such as `mean_latency_s`
    title: str
    unit: str
    better: Literal["higher", "lower"] | None = None  # None: never called a gain or a loss
    scale: float = 1.0  # 1e3 shows seconds as ms

    @property
    def heading(self) -> str:
        return f"{self.title} [{self.unit}]" if self.unit else self.title


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture: `metric` over the setting `x`, one line for each value of the setting `lines`; predictions dashed,
    limits dotted. Cells without the setting `x` are drawn as level lines of their own."""

    name: str  # of the file, without .png
    title: str
    x: str
    metric: str  # one of the experiment's columns
    lines: str | None = None
    x_label: str = ""  # the setting's name where empty
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What is the same for all cells, in the words of a report's head."""

    model: str  # such as "distilgpt2 @ float32"
    prompt: str
    batch_policy: str
    kv_cache: str = "on"
    settings: Mapping[str, Setting] = field(default_factory=dict)  # kept in every record, such as requests and tokens


class Session(Protocol):
    """An experiment with everything loaded. One call at a time."""

    async def measure(self, cell: Cell, *, seed: int) -> Mapping[str, float]:
        """One repeat. Raises a TllmError when it cannot be done; the session then serves other cells."""
        ...

    def predicted(self, cell: Cell) -> Mapping[str, float]:
        """Of the metrics that are predicted, under the same names; also for refused cells."""
        ...

    def limit(self, cell: Cell) -> Mapping[str, float]:
        """What the hardware allows at best, where it is known, under the same names."""
        ...

    def facts(self) -> Mapping[str, float]:
        """Measured once, while opening, such as `load_model_s`; read after all cells were measured."""
        ...

    def notes(self, cell: Cell) -> tuple[str, ...]:
        """Sentences for the report; read after all cells were measured."""
        ...


class Experiment(Protocol):
    """What can be measured, before anything is loaded."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def conditions(self) -> Conditions: ...

    @property
    def cells(self) -> tuple[Cell, ...]: ...

    @property
    def columns(self) -> tuple[Column, ...]: ...

    @property
    def figures(self) -> tuple[Figure, ...]: ...

    @property
    def baseline(self) -> str | None:
        """The cell that the others are compared with."""
        ...

    def opened(self) -> AbstractAsyncContextManager[Session]: ...


class Parameters:
    """An experiment's own parameters, checked as they are taken. `done` refuses those that nobody took."""

    def __init__(self, kind: str, values: Mapping[str, Parameter]) -> None:
        self._kind = kind
        self._values = dict(values)
        self._taken: list[str] = []

    def text(self, name: str, default: str) -> str:
        value = self._take(name, default)
        if not isinstance(value, str) or not value:
            raise self._wrong(name, value, "a text")
        return value

    def optional_text(self, name: str) -> str | None:
        """None where it is not given."""
        if name in self._values:
            return self.text(name, "")
        self._taken.append(name)
        return None

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        value = self._take(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise self._wrong(name, value, f"one of {', '.join(allowed)}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def count(self, name: str, default: int, *, least: int = 1) -> int:
        value = self._take(name, default)
        if not _is_count(value, least):
            raise self._wrong(name, value, f"a whole number from {least} on")
        return int(value)  # type: ignore[arg-type]

    def counts(self, name: str, default: tuple[int, ...], *, least: int = 1) -> tuple[int, ...]:
        """Given as a list or as one number."""
        values = _as_tuple(self._take(name, default))
        if not values or not all(_is_count(value, least) for value in values) or len(set(values)) < len(values):
            raise self._wrong(name, values, f"different whole numbers from {least} on")
        return tuple(int(value) for value in values)

    def number(self, name: str, default: float, *, least: float = 0.0) -> float:
        value = self._take(name, default)
        if not _is_number(value, least):
            raise self._wrong(name, value, f"a number from {least:g} on")
        return float(value)  # type: ignore[arg-type]

    def numbers(self, name: str, default: tuple[float, ...], *, least: float = 0.0) -> tuple[float, ...]:
        """Given as a list or as one number."""
        values = _as_tuple(self._take(name, default))
        if not values or not all(_is_number(value, least) for value in values) or len(set(values)) < len(values):
            raise self._wrong(name, values, f"different numbers from {least:g} on")
        return tuple(float(value) for value in values)

    def done(self) -> None:
        """Raises ConfigError when anything else was given."""
        if unknown := sorted(self._values.keys() - set(self._taken)):
            raise ConfigError(
                f"The experiment {self._kind} has no parameter {', '.join(unknown)}; it has {', '.join(self._taken)}."
            )

    def _take(self, name: str, default: Parameter) -> Parameter:
        self._taken.append(name)
        return self._values.get(name, default)

    def _wrong(self, name: str, value: object, allowed: str) -> ConfigError:
        shown = list(value) if isinstance(value, tuple) else value
        return ConfigError(f"The experiment {self._kind}: {name} is {shown!r}; it must be {allowed}.")


def _as_tuple(value: Parameter) -> tuple[Setting, ...]:
    return value if isinstance(value, tuple) else (value,)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < float("inf")
