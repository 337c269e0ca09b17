"""Prefill and decode taken apart, in one piece and cut into stages: what each step computes, keeps and chooses.

Every step is timed, stage by stage. The report shows one answer in full: logits, the KV and its growth, the best
candidates and the token that was chosen; the model is small enough to read that for, or the tokens are few.

Stages are called one after the other in one process: their seconds are computing alone. What links and messages add,
pp-tp and local-vs-cluster measure.

This file does not know how an engine is looked into.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from tllm.core.types import TokenId
from tllm.lab.experiment import Cell, Column, Conditions, Figure, Parameters, Session
from tllm.lab.experiments.baseline import (
    Answering,
    possible_rates,
    predicted_rates,
    rates,
    take_answering,
)
from tllm.lab.experiments.expected import EngineForecast, Possible, possible
from tllm.lab.experiments.subject import Subject, take_subject
from tllm.lab.inspection import Answered, kv_formula, stage_table, step_table
from tllm.lab.inspector import ChildInspector, even_stages
from tllm.models.checkpoint import Checkpoint

_COLUMNS = (
    Column(metric="prefill_s", title="Prefill", unit="ms", better="lower", scale=1e3),
    Column(metric="decode_loop_s", title="Decode loop", unit="ms", better="lower", scale=1e3),
    Column(metric="step_s", title="Decode step", unit="ms", better="lower", scale=1e3),
    Column(metric="tokens_per_s", title="With the first token", unit="tokens/s", better="higher"),
    Column(metric="decode_tokens_per_s", title="Without the first token", unit="tokens/s", better="higher"),
    Column(metric="num_tokens", title="Tokens", unit=""),
)


def stage_seconds(answered: Answered) -> dict[str, float]:
    """Of every stage: the prefill, and the median of its decode steps."""
    found: dict[str, float] = {}
    for stage, prefill_s in enumerate(answered.steps_s[0]):
        found[f"stage_{stage}_prefill_s"] = prefill_s
        found[f"stage_{stage}_step_s"] = statistics.median(step[stage] for step in answered.steps_s[1:])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasesExperiment:
    """Implements `Experiment`."""

    subject: Subject
    answering: Answering
    num_stages: tuple[int, ...]
    num_candidates: int
    name: str = "phases"
    title: str = "Prefill and decode, step by step and stage by stage"
    figures: tuple[Figure, ...] = ()

    @property
    def conditions(self) -> Conditions:
        return Conditions(
            model=self.subject.title,
            prompt=self.answering.prompt,
            batch_policy=self.answering.words,
            settings=self.subject.settings,
        )

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(
            Cell(
                name="1 stage" if number == 1 else f"{number} stages",
                settings={"requests": 1, "tokens": self.answering.tokens, "stages": number},
            )
            for number in self.num_stages
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        stages = range(max(self.num_stages)) if max(self.num_stages) > 1 else range(0)
        parts = (
            Column(metric=f"stage_{stage}_{metric}", title=f"Stage {stage} {title}", unit="ms", scale=1e3)
            for stage in stages
            for metric, title in (("prefill_s", "prefill"), ("step_s", "step"))
        )
        return (*_COLUMNS, *parts)

    @property
    def baseline(self) -> str:
        return self.cells[0].name

    def opened(self) -> AbstractAsyncContextManager[Session]:
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Session]:
        subject, directory = self.subject, self.subject.directory()
        num_layers = Checkpoint.open(directory).spec.num_layers
        async with AsyncExitStack() as stack:
            inspectors = {}
            for cell, number in zip(self.cells, self.num_stages, strict=True):
                even_stages(num_layers, number)  # refused before anything is loaded
                child = await asyncio.to_thread(
                    ChildInspector,
                    directory,
                    dtype=subject.served_dtype,
                    quantization=subject.quantization,
                    num_threads=subject.num_threads,
                    num_stages=number,
                )
                inspectors[cell.name] = stack.enter_context(child)
            any_of_them = next(iter(inspectors.values()))
            speed = await asyncio.to_thread(any_of_them.speed)
            limit = await possible(
                directory,
                weight_bytes=any_of_them.step_bytes(),
                kv_bytes_per_position=any_of_them.kv_bytes_per_position(),
                num_threads=subject.num_threads,
            )
            forecasts = {
                cell.name: EngineForecast(speed=speed, stages=even_stages(num_layers, number))
                for cell, number in zip(self.cells, self.num_stages, strict=True)
            }
            ids = any_of_them.prompt_ids(self.answering.prompt)
            yield _Session(
                self,
                num_layers=num_layers,
                ids=ids,
                inspectors=inspectors,
                forecasts=forecasts,
                limit=limit,
            )


class _Session:
    """Implements `Session`."""

    def __init__(
        self,
        experiment: PhasesExperiment,
        *,
        num_layers: int,
        ids: tuple[TokenId, ...],
        inspectors: Mapping[str, ChildInspector],
        forecasts: Mapping[str, EngineForecast],
        limit: Possible,
    ) -> None:
        self._experiment = experiment
        self._num_layers = num_layers
        self._ids = ids
        self._sizes = {"prompt_tokens": len(ids), "tokens": experiment.answering.tokens}
        self._inspectors = inspectors
        self._forecasts = forecasts
        self._limit = limit

    async def measure(self, cell: Cell, *, seed: int) -> Mapping[str, float]:
        inspector, num_tokens = self._inspectors[cell.name], self._experiment.answering.tokens
        answered = await asyncio.to_thread(inspector.answer, self._ids, num_tokens)
        return {**rates(answered), **stage_seconds(answered)}

    def predicted(self, cell: Cell) -> Mapping[str, float]:
        forecast = self._forecasts[cell.name]
        found = predicted_rates(forecast, **self._sizes)
        context = self._sizes["prompt_tokens"] + self._sizes["tokens"] / 2
        for stage in range(len(forecast.stages)):
            found[f"stage_{stage}_prefill_s"] = forecast.prefill_s(stage, self._sizes["prompt_tokens"])
            found[f"stage_{stage}_step_s"] = forecast.step_s(stage, context)
        return found

    def limit(self, cell: Cell) -> Mapping[str, float]:
        return possible_rates(self._limit, **self._sizes)

    def facts(self) -> Mapping[str, float]:
        return {name: float(size) for name, size in self._sizes.items()}

    def notes(self, cell: Cell) -> tuple[str, ...]:
        """One answer in full, looked into after everything was timed."""
        experiment = self._experiment
        views = self._inspectors[cell.name].inspect(
            self._ids, experiment.answering.tokens, num_candidates=experiment.num_candidates
        )
        formula = kv_formula(views, num_layers=self._num_layers, dtype=experiment.subject.served_dtype)
        projected = f"Of a prompt's {views[0].num_rows} rows only the last is projected to logits."
        if len(views[0].stages) > 1:
            return (_block("Its stages:", stage_table(views)),)
        return (f"KV at the end: {formula}.", projected, _block("Its steps:", step_table(views)))


def experiment(parameters: Parameters) -> PhasesExperiment:
    """Raises ConfigError."""
    return PhasesExperiment(
        subject=take_subject(parameters),
        answering=take_answering(parameters),
        num_stages=parameters.counts("stages", (1, 2)),
        num_candidates=parameters.count("candidates", 5),
    )


def _block(title: str, lines: Iterable[str]) -> str:
    """A table within an item of a Markdown list."""
    return "\n".join((title, "", *(f"  {line}" for line in lines)))
