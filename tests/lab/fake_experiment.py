"""An experiment without a model: its figures are drawn from each measurement's seed, its cells do as they are told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from tllm.core.errors import EngineError
from tllm.lab.experiment import Cell, Column, Conditions, Figure, Session

COLUMNS = (
    Column(metric="throughput_tokens_per_s", title="Throughput", unit="tokens/s", better="higher"),
    Column(metric="mean_latency_s", title="Mean latency", unit="ms", better="lower", scale=1e3),
    Column(metric="num_tokens", title="Tokens", unit=""),
)
FIGURES = (Figure(name="throughput", title="Throughput", x="batch", metric="throughput_tokens_per_s", x_log=True),)
CONDITIONS = Conditions(
    model="fake @ float32",
    prompt='Q: "why"?\nA:',
    batch_policy="static",
    settings={"requests": 16, "tokens": 32, "arrivals": "at-once"},
)
ROOM = 0.05  # what a cell's figures spread by, of their mean


def cell(batch: int, **others: str) -> Cell:
    return Cell(name=f"batch={batch}", settings={"batch": batch}, **others)


@dataclass
class FakeExperiment:
    """`tokens_per_s` of each cell; `failing` cells fail at their so manieth measurement, `hanging` ones never end."""

    cells: tuple[Cell, ...] = (cell(1), cell(4), cell(8, refused="there is no room"))
    tokens_per_s: Mapping[str, float] = field(default_factory=lambda: {"batch=1": 100.0, "batch=4": 300.0})
    failing: Mapping[str, int] = field(default_factory=dict)
    hanging: frozenset[str] = frozenset()
    extra: Mapping[str, float] = field(default_factory=dict)  # further metrics of every measurement
    name: str = "fake"
    title: str = "Nothing is computed."
    conditions: Conditions = CONDITIONS
    columns: tuple[Column, ...] = COLUMNS
    figures: tuple[Figure, ...] = FIGURES
    baseline: str | None = "batch=1"
    seen: list[tuple[str, int]] = field(default_factory=list)  # cell and seed of every measurement
    is_open: bool = False

    def opened(self) -> AbstractAsyncContextManager[Session]:
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Session]:
        self.is_open = True
        try:
            yield _Session(self)
        finally:
            self.is_open = False


class _Session:
    def __init__(self, experiment: FakeExperiment) -> None:
        self._experiment = experiment

    async def measure(self, cell: Cell, *, seed: int) -> Mapping[str, float]:
        experiment = self._experiment
        experiment.seen.append((cell.name, seed))
        if cell.name in experiment.hanging:
            await asyncio.Event().wait()
        if experiment.failing.get(cell.name) == sum(name == cell.name for name, _ in experiment.seen):
            raise EngineError("out of memory")
        throughput = experiment.tokens_per_s[cell.name] * (1 + ROOM * random.Random(seed).uniform(-1, 1))
        total_s = 512 / throughput
        return {
            "num_tokens": 512,
            "total_s": total_s,
            "throughput_tokens_per_s": throughput,
            "mean_latency_s": total_s,
            **experiment.extra,
        }

    def predicted(self, cell: Cell) -> Mapping[str, float]:
        return {"throughput_tokens_per_s": 110.0 * int(cell.settings["batch"])}

    def limit(self, cell: Cell) -> Mapping[str, float]:
        return {"throughput_tokens_per_s": 200.0 * int(cell.settings["batch"])}

    def facts(self) -> Mapping[str, float]:
        return {"load_model_s": 0.125}

    def notes(self, cell: Cell) -> tuple[str, ...]:
        return ("of all", *(("of the first",) if cell.name == "batch=1" else ()))
