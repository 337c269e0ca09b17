"""How the cells of an experiment are measured.

    warm-ups   a a b b c c                 every cell, in its order, uncounted
    repeats    b₀ a₂ c₁ a₀ b₁ ...          all pairs of cell and repeat, in one order drawn from the seed

Rules:
* What the machine does meanwhile falls on all cells alike: hence one shuffled order.
* Repeat r of every cell gets the same seed: cells are compared on the same work.
* A cell that fails, fails alone: it is not tried again, and its reason is kept.
* A measurement that takes longer than its limit has failed. The limit is known before the first one starts.
* Every repeat is a record as soon as it is measured; what is known of the run is described before. A run that is
  interrupted has a report.

This file does not know what is measured, nor how progress is shown.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tllm.core.errors import TllmError
from tllm.lab.description import Description
from tllm.lab.experiment import Cell, Experiment, Session
from tllm.lab.record import Record, Records, utc_now
from tllm.lab.spec import Spec

CELL = "cell"  # the setting of a record that holds its cell's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """After each measurement. `left_s` is what the rest takes if every cell takes what it took last; None while some
    cell was not measured yet."""

    phase: Literal["warm-up", "repeat"]
    cell: str
    num_done: int
    num_total: int
    left_s: float | None
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measurement:
    phase: Literal["warm-up", "repeat"]
    cell: Cell
    number: int  # of the warm-up or of the repeat


async def run(
    experiment: Experiment,
    spec: Spec,
    records: Records,
    *,
    name: str,
    environment: Mapping[str, str],
    on_progress: Callable[[Progress], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Description:
    """Measure all cells but those that are refused. `name` is the run's; records and description bear it.

    Raises what opening the experiment raises. Bugs of a measurement pass through; what was kept before stays.
    """
    cells = [cell for cell in experiment.cells if not cell.refused]
    names = [cell.name for cell in experiment.cells]
    assert len(set(names)) == len(names), f"cells of one name: {names}"
    at = utc_now()
    async with experiment.opened() as session:
        description = Description(
            experiment=experiment.name,
            run=name,
            at=at,
            title=experiment.title,
            repeats=spec.repeats,
            warmups=spec.warmups,
            seed=spec.seed,
            environment=environment,
            conditions=experiment.conditions,
            cells=experiment.cells,
            columns=experiment.columns,
            figures=experiment.figures,
            baseline=experiment.baseline,
            predicted={cell.name: session.predicted(cell) for cell in experiment.cells},
            limit={cell.name: session.limit(cell) for cell in experiment.cells},
            facts={},
            notes={},
            failures={},
        )
        records.describe(name, experiment.name, description.as_json())
        keeper = _Keeper(experiment=experiment, name=name, environment=environment, records=records)
        failures = await _measured(session, _order(cells, spec), spec, keeper, on_progress, clock)
        description = dataclasses.replace(
            description,
            facts=session.facts(),
            notes={cell.name: session.notes(cell) for cell in experiment.cells},
            failures=failures,
        )
    records.describe(name, experiment.name, description.as_json())
    return description


def _order(cells: Sequence[Cell], spec: Spec) -> list[_Measurement]:
    warm_ups = [
        _Measurement(phase="warm-up", cell=cell, number=number) for cell in cells for number in range(spec.warmups)
    ]
    repeats = [
        _Measurement(phase="repeat", cell=cell, number=number) for cell in cells for number in range(spec.repeats)
    ]
    random.Random(spec.seed).shuffle(repeats)
    return warm_ups + repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keeper:
    experiment: Experiment
    name: str
    environment: Mapping[str, str]
    records: Records

    def keep(self, measurement: _Measurement, seed: int, metrics: Mapping[str, float]) -> None:
        cell = measurement.cell
        self.records.add(
            Record(
                experiment=self.experiment.name,
                run=self.name,
                at=utc_now(),
                environment=self.environment,
                settings={**self.experiment.conditions.settings, **cell.settings, CELL: cell.name},
                repeat=measurement.number,
                seed=seed,
                metrics=metrics,
            )
        )


async def _measured(
    session: Session,
    order: Sequence[_Measurement],
    spec: Spec,
    keeper: _Keeper,
    on_progress: Callable[[Progress], None],
    clock: Callable[[], float],
) -> dict[str, str]:
    """The cells that failed, and why."""
    failures: dict[str, str] = {}
    took_s: dict[str, float] = {}  # the latest of each cell
    for done, measurement in enumerate(order):
        cell = measurement.cell
        if cell.name not in failures:
            seed = spec.seed + measurement.number
            began_s = clock()
            try:
                async with asyncio.timeout(spec.limit_s) as deadline:
                    metrics = await session.measure(cell, seed=seed)
                if measurement.phase == "repeat":
                    keeper.keep(measurement, seed, metrics)
            except (TllmError, OSError) as error:  # TimeoutError is an OSError
                late = f"took longer than {spec.limit_s:g} s"
                failures[cell.name] = late if deadline.expired() else str(error) or type(error).__name__
            took_s[cell.name] = clock() - began_s
        on_progress(
            Progress(
                phase=measurement.phase,
                cell=cell.name,
                num_done=done + 1,
                num_total=len(order),
                left_s=_left_s(order[done + 1 :], took_s, failures),
                failure=failures.get(cell.name, ""),
            )
        )
    return failures


def _left_s(order: Sequence[_Measurement], took_s: Mapping[str, float], failures: Mapping[str, str]) -> float | None:
    """None while one of the cells that are still to be measured never was."""
    left = [measurement.cell.name for measurement in order if measurement.cell.name not in failures]
    return sum(took_s[name] for name in left) if all(name in took_s for name in left) else None
