"""Batch size against wait window: what batches gain in throughput and cost in latency, queueing included.

    batch 1, 4, 8 x wait 0, 10 ms   static batches, imposed from outside (batches.py)
    continuous                      none: the scheduler's own batching

The pipeline behind is the product's own in both cases. Answers are of exactly the tokens asked for, and counted one by
one as they come.

This file does not know how a pipeline computes, nor when a batch leaves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tllm.core.errors import ConfigError, EngineError
from tllm.lab.experiment import Cell, Column, Conditions, Figure, Parameters, Session
from tllm.lab.experiments.batches import (
    POISSON,
    Batching,
    Done,
    ServiceTime,
    WallClock,
    arrivals,
    as_they_come,
    in_batches,
    metrics,
    simulated,
)
from tllm.lab.experiments.expected import Possible, measured_forecast, possible, step_bytes
from tllm.lab.experiments.stages import stages_of
from tllm.lab.experiments.subject import Subject, random_prompts, take_subject
from tllm.lab.forecast import Forecast
from tllm.lab.rig import Answer, Rig, pipeline
from tllm.lab.sanity import AT_ONCE

CONTINUOUS: Final = "continuous"

_PREDICTED = ("throughput_tokens_per_s", "mean_latency_s", "p95_latency_s", "mean_ttft_s")
_RATE_PER_S = 20.0  # of random arrivals where no other is given
_NUM_SIMULATED = 32  # seeds that predictions for random arrivals are the mean of
_COLUMNS = (
    Column(metric="total_s", title="Total", unit="s", better="lower"),
    Column(metric="throughput_tokens_per_s", title="Throughput", unit="tokens/s", better="higher"),
    Column(metric="mean_latency_s", title="Mean latency", unit="ms", better="lower", scale=1e3),
    Column(metric="p95_latency_s", title="P95 latency", unit="ms", better="lower", scale=1e3),
    Column(metric="mean_queue_s", title="of it queueing", unit="ms", better="lower", scale=1e3),
    Column(metric="mean_service_s", title="of it service", unit="ms", better="lower", scale=1e3),
    Column(metric="mean_ttft_s", title="Mean TTFT", unit="ms", better="lower", scale=1e3),
    Column(metric="num_tokens", title="Tokens", unit=""),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The same for all cells."""

    requests: int
    prompt_tokens: int
    tokens: int  # of every answer
    arrivals: str
    rate_per_s: float  # of random arrivals; 0 where all come at once

    def arrivals_s(self, seed: int) -> tuple[float, ...]:
        return arrivals(self.arrivals, self.requests, self.rate_per_s, seed)

    @property
    def seeds(self) -> range:
        """That predictions are the mean over."""
        return range(1 if self.arrivals == AT_ONCE else _NUM_SIMULATED)

    @property
    def words(self) -> str:
        if self.arrivals == AT_ONCE:
            return "all requests arrive at once"
        return f"requests arrive at random, {self.rate_per_s:g} a second on average"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingExperiment:
    """Implements `Experiment`."""

    subject: Subject
    workload: Workload
    batches: tuple[int, ...]
    waits_ms: tuple[float, ...]
    num_stages: int
    name: str = "batching"
    title: str = "Batch size and wait window: throughput against latency, queueing included"
    columns: tuple[Column, ...] = _COLUMNS

    @property
    def conditions(self) -> Conditions:
        work, subject = self.workload, self.subject
        return Conditions(
            model=subject.title,
            prompt=f"{work.requests} different ones of {work.prompt_tokens} random tokens; "
            f"exactly {work.tokens} new tokens each, greedy",
            batch_policy=f"static batches of {_listed(self.batches)}, wait window {_listed(self.waits_ms)} ms, and the "
            f"scheduler's own batching; {work.words}",
            settings={
                **subject.settings,
                "stages": self.num_stages,
                "requests": work.requests,
                "prompt_tokens": work.prompt_tokens,
                "tokens": work.tokens,
                "arrivals": work.arrivals,
                "rate_per_s": work.rate_per_s,
            },
        )

    @property
    def cells(self) -> tuple[Cell, ...]:
        static = (
            Cell(name=f"batch {size}, wait {wait_ms:g} ms", settings={"batch": size, "wait_ms": wait_ms})
            for wait_ms in self.waits_ms
            for size in self.batches
        )
        return (*static, Cell(name=CONTINUOUS, settings={"policy": CONTINUOUS}))

    @property
    def figures(self) -> tuple[Figure, ...]:
        return tuple(
            Figure(name=name, title=title, x="batch", metric=metric, lines="wait_ms", x_label="batch size")
            for name, title, metric in (
                ("throughput", "Throughput of static batches", "throughput_tokens_per_s"),
                ("mean-latency", "Mean latency, queueing included", "mean_latency_s"),
            )
        )

    @property
    def baseline(self) -> str:
        return self.cells[0].name

    def opened(self) -> AbstractAsyncContextManager[Session]:
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Session]:
        work = self.workload
        directory = self.subject.directory_for(work.prompt_tokens + work.tokens)
        stages = stages_of(self.subject.num_threads, self.num_stages)
        async with pipeline(
            directory, stages=stages, dtype=self.subject.dtype, quantization=self.subject.quantization
        ) as rig:
            await rig.serve(
                max_sequences=max(work.requests, *self.batches), max_model_len=work.prompt_tokens + work.tokens
            )
            forecast = await measured_forecast(rig, stages)
            limit = await possible(
                directory,
                weight_bytes=step_bytes(rig),
                kv_bytes_per_position=rig.checkpoint.spec.kv_bytes_per_position(rig.model.num_layers, rig.dtype),
                num_threads=self.subject.num_threads,
            )
            yield _Session(experiment=self, rig=rig, forecast=forecast, limit=limit)


class _Session:
    """Implements `Session`."""

    def __init__(self, *, experiment: BatchingExperiment, rig: Rig, forecast: Forecast, limit: Possible) -> None:
        self._work = experiment.workload
        self._rig = rig
        self._forecast = forecast
        self._limit = limit

    async def measure(self, cell: Cell, *, seed: int) -> Mapping[str, float]:
        work = self._work
        prompts = random_prompts(
            seed,
            number=work.requests,
            num_tokens=work.prompt_tokens,
            vocab_size=self._rig.checkpoint.spec.vocab_size,
        )
        arrivals_s = work.arrivals_s(seed)
        clock = WallClock()

        async def serve(request: int) -> Done:
            answer = await self._rig.answer(prompts[request], max_tokens=work.tokens)
            return done_of(answer, clock.began_s)

        batching = _batching_of(cell)
        if batching is None:
            return metrics(await as_they_come(arrivals_s, clock, serve))
        return metrics(await in_batches(arrivals_s, batching, clock, serve))

    def predicted(self, cell: Cell) -> Mapping[str, float]:
        work, batching = self._work, _batching_of(cell)
        if batching is None:
            if work.arrivals != AT_ONCE:
                return {}
            batching = Batching(size=work.requests, window_s=0.0)  # all of them arrive together and are one batch
        found = [metrics(simulated(work.arrivals_s(seed), batching, self._service, work.tokens)) for seed in work.seeds]
        return {name: sum(each[name] for each in found) / len(found) for name in _PREDICTED}

    def limit(self, cell: Cell) -> Mapping[str, float]:
        batching = _batching_of(cell)
        size = self._work.requests if batching is None else batching.size
        tokens_per_s = self._limit.tokens_per_s(size, self._context)
        return {} if tokens_per_s is None else {"throughput_tokens_per_s": tokens_per_s}

    def facts(self) -> Mapping[str, float]:
        return {"load_model_s": sum(self._rig.load_s)}

    def notes(self, cell: Cell) -> tuple[str, ...]:
        work, batching = self._work, _batching_of(cell)
        if batching is None:
            return ("Requests go to the scheduler when they arrive; it batches steps, and nobody waits for a batch.",)
        if work.arrivals == AT_ONCE and work.requests % batching.size == 0 and batching.window_s > 0:
            return (
                "All requests are there at once and every batch is full when it leaves: the window is never waited "
                "for. Whatever differs from the same size without a window is noise.",
            )
        return ()

    @property
    def _context(self) -> float:
        """Positions before a decode step, in the middle of an answer."""
        return self._work.prompt_tokens + self._work.tokens / 2

    def _service(self, size: int) -> ServiceTime:
        """Of a batch whose prompts are computed together, as many tokens a step as fit, and then decoded together."""
        first_s = self._forecast.ttft_s(size * self._work.prompt_tokens)
        step_s = self._forecast.decode_step_s(size, self._context)
        return ServiceTime(first_s=first_s, all_s=first_s + (self._work.tokens - 1) * step_s)


def experiment(parameters: Parameters) -> BatchingExperiment:
    """Raises ConfigError."""
    return BatchingExperiment(
        subject=take_subject(parameters),
        workload=_take_workload(parameters),
        batches=parameters.counts("batch", (1, 4, 8)),
        waits_ms=parameters.numbers("wait_ms", (0.0, 10.0)),
        num_stages=parameters.count("stages", 1),
    )


def _take_workload(parameters: Parameters) -> Workload:
    kind = parameters.choice("arrivals", (AT_ONCE, POISSON), AT_ONCE)
    rate_per_s = parameters.number("rate_per_s", 0.0)
    if kind == AT_ONCE and rate_per_s:
        raise ConfigError(f"rate_per_s is {rate_per_s:g}, but all requests arrive at once. Set arrivals={POISSON}.")
    return Workload(
        requests=parameters.count("requests", 16),
        prompt_tokens=parameters.count("prompt_tokens", 13),
        tokens=parameters.count("tokens", 32, least=2),
        arrivals=kind,
        rate_per_s=rate_per_s or (0.0 if kind == AT_ONCE else _RATE_PER_S),
    )


def done_of(answer: Answer, began_s: float) -> Done:
    """In seconds since `began_s`. Raises EngineError for an answer without tokens."""
    if not answer.token_s:
        raise EngineError("A request ended without a token.")
    return Done(
        began_s=answer.scheduled_s - began_s,
        first_token_s=answer.token_s[0] - began_s,
        done_s=answer.token_s[-1] - began_s,
        num_tokens=len(answer.tokens),
    )


def _batching_of(cell: Cell) -> Batching | None:
    """None: the scheduler's own."""
    if cell.name == CONTINUOUS:
        return None
    return Batching(size=int(cell.settings["batch"]), window_s=float(cell.settings["wait_ms"]) / 1e3)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
