"""Pipelines and tensor parallel groups of few cores: one stream, by (PP, TP).

    PP 1, TP 1          one stage, one core
    PP 1, all cores     one stage, as many cores as the largest pipeline has
    PP 2, TP 1          two stages, one core each
    PP n, TP 2          two ranks a stage: not in the engine yet, so only predicted

Every rank is pinned to cores of its own, `cores_per_rank` of them, so a cell with more ranks also has more cores; the
cell with all cores shows what they are worth without a cut. Stages are processes of this machine that speak gRPC over
Unix sockets. Tokens are counted.

This file does not know how a pipeline computes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from tllm.cluster.machine import num_processors
from tllm.lab.experiment import Cell, Column, Conditions, Figure, Parameters, Session
from tllm.lab.experiments.expected import Possible, measured_forecast, possible, step_bytes, with_ranks
from tllm.lab.experiments.stages import pinned_stages
from tllm.lab.experiments.stream import (
    STREAM_COLUMNS,
    Stream,
    answer_metrics,
    possible_stream,
    predicted_stream,
    serve_stream,
    take_stream,
)
from tllm.lab.experiments.subject import Subject, random_prompts, take_subject
from tllm.lab.forecast import Forecast, Overhead
from tllm.lab.overhead import measure_overhead
from tllm.lab.rig import Rig, Stage, pipeline

NO_RANKS = "the engine has no ranks yet: a stage is one process"


@dataclass(frozen=True, slots=True, kw_only=True)
class PpTpExperiment:
    """Implements `Experiment`."""

    subject: Subject  # its threads are those of a rank
    stream: Stream
    pipelines: tuple[int, ...]
    groups: tuple[int, ...]
    num_processors: int
    name: str = "pp-tp"
    title: str = "One stream through pipelines and tensor parallel groups, every rank on cores of its own"
    columns: tuple[Column, ...] = STREAM_COLUMNS
    figures: tuple[Figure, ...] = ()

    @property
    def conditions(self) -> Conditions:
        return Conditions(
            model=self.subject.title,
            prompt=f"{self.stream.prompt_tokens} random tokens, others in every repeat",
            batch_policy=self.stream.words,
            settings=self.subject.settings,
        )

    @property
    def cells(self) -> tuple[Cell, ...]:
        each = self.subject.num_threads
        cells = [self._cell(pp, tp, each) for tp in self.groups for pp in self.pipelines]
        most = max((pp for pp in self.pipelines if pp * each <= self.num_processors), default=1)
        if most > 1:
            cells.insert(1, self._cell(1, 1, most * each))
        return tuple(cells)

    @property
    def baseline(self) -> str:
        return self.cells[0].name

    def opened(self) -> AbstractAsyncContextManager[Session]:
        return self._opened()

    def _cell(self, pp: int, tp: int, cores: int) -> Cell:
        settings = {"pp": pp, "tp": tp, "cores_per_rank": cores, "requests": 1, "tokens": self.stream.tokens}
        needed = pp * tp * cores
        refused = ""
        if tp > 1:
            refused = NO_RANKS
        elif needed > self.num_processors:
            refused = f"it needs {needed} processors, and this machine gives {self.num_processors}"
        return Cell(name=f"PP {pp}, TP {tp}, {_cores(cores)} a rank", settings=settings, refused=refused)

    def _without_ranks(self, cell: Cell) -> str:
        """The cell that differs in its ranks alone."""
        pp, cores = int(cell.settings["pp"]), int(cell.settings["cores_per_rank"])
        return self._cell(pp, 1, cores).name

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Session]:
        subject = self.subject
        directory = subject.directory_for(self.stream.prompt_tokens + self.stream.tokens)
        measured = [cell for cell in self.cells if not cell.refused]
        async with AsyncExitStack() as stack:
            rigs: dict[str, Rig] = {}
            forecasts: dict[str, Forecast] = {}
            longest = max((_stages_of(cell) for cell in measured), key=len)
            overhead: Overhead | None = None
            for cell in measured:
                stages = _stages_of(cell)
                rig = await stack.enter_async_context(
                    pipeline(directory, stages=stages, dtype=subject.dtype, quantization=subject.quantization)
                )
                overhead = overhead or await measure_overhead(longest, step_bytes=step_bytes(rig))
                chunk = (await measured_forecast(rig, stages, overhead)).best_chunk(self.stream.prompt_tokens)
                await serve_stream(rig, self.stream, prefill_chunk=chunk)
                rigs[cell.name], forecasts[cell.name] = rig, rig.forecast(overhead)
            for cell in self.cells:
                if (alike := self._without_ranks(cell)) in forecasts and cell.refused:
                    forecasts[cell.name] = with_ranks(forecasts[alike], int(cell.settings["tp"]))
            any_rig = next(iter(rigs.values()))
            spec = any_rig.checkpoint.spec
            limits = {
                num_cores: await possible(
                    directory,
                    weight_bytes=step_bytes(any_rig),
                    kv_bytes_per_position=spec.kv_bytes_per_position(spec.num_layers, any_rig.dtype),
                    num_threads=num_cores,
                )
                for num_cores in {int(cell.settings["cores_per_rank"]) for cell in measured}
            }
            yield _Session(self.stream, rigs, forecasts, limits)


class _Session:
    """Implements `Session`."""

    def __init__(
        self,
        stream: Stream,
        rigs: Mapping[str, Rig],
        forecasts: Mapping[str, Forecast],
        limits: Mapping[int, Possible],
    ) -> None:
        self._stream = stream
        self._rigs = rigs
        self._forecasts = forecasts
        self._limits = limits

    async def measure(self, cell: Cell, *, seed: int) -> Mapping[str, float]:
        rig = self._rigs[cell.name]
        (prompt,) = random_prompts(
            seed, number=1, num_tokens=self._stream.prompt_tokens, vocab_size=rig.checkpoint.spec.vocab_size
        )
        return answer_metrics(await rig.answer(prompt, max_tokens=self._stream.tokens))

    def predicted(self, cell: Cell) -> Mapping[str, float]:
        forecast = self._forecasts.get(cell.name)
        return {} if forecast is None else predicted_stream(forecast, self._stream)

    def limit(self, cell: Cell) -> Mapping[str, float]:
        """Of one stream's step one stage at a time reads its part: the memory's speed is that of a rank's cores."""
        limit = self._limits.get(int(cell.settings["cores_per_rank"]))
        return {} if limit is None or cell.refused else possible_stream(limit, self._stream)

    def facts(self) -> Mapping[str, float]:
        return {"prompt_tokens": float(self._stream.prompt_tokens)}

    def notes(self, cell: Cell) -> tuple[str, ...]:
        if cell.refused:
            return (
                "Predicted are ranks that divide every layer and the head evenly, and sum up twice a layer over "
                "messages such as stages of one machine send each other.",
            )
        rig, forecast = self._rigs[cell.name], self._forecasts[cell.name]
        if len(rig.stages) == 1:
            return ()
        layers = ", ".join(f"{stage.shard.first_layer}..{stage.shard.last_layer - 1}" for stage in rig.stages)
        return (
            f"Layers {layers}; the prompt is cut into chunks of {forecast.prefill_chunk} tokens, as the planner "
            "chooses. One stream's tokens pass all stages one after the other: more stages make it no faster, but for "
            "the prompt, whose chunks overlap.",
        )


def experiment(parameters: Parameters) -> PpTpExperiment:
    """Raises ConfigError."""
    return PpTpExperiment(
        subject=take_subject(parameters, num_threads=1),
        stream=take_stream(parameters),
        pipelines=parameters.counts("pp", (1, 2)),
        groups=parameters.counts("tp", (1, 2)),
        num_processors=num_processors(),
    )


def _stages_of(cell: Cell) -> tuple[Stage, ...]:
    return pinned_stages(int(cell.settings["cores_per_rank"]), int(cell.settings["pp"]))


def _cores(number: int) -> str:
    return f"{number} core{'s' * (number != 1)}"
