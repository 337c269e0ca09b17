"""What it costs that a model is served rather than called: the same answer in four ways.

    engine alone    prefill and decode steps, called in a loop in a process of its own
    one worker      + scheduler, driver, messages over a Unix socket to a worker's process
    through HTTP    + API, tokenizer, one event for every token
    two workers     one worker's threads in two stages: half of the layers each, one more handover

All have the same threads in all. Between two neighbours of a column lies what the new parts take, for every token.

This file does not know how a pipeline computes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from tllm.core.errors import UnavailableError
from tllm.core.types import TokenId
from tllm.lab.client import Client, Endpoint
from tllm.lab.experiment import Cell, Column, Conditions, Figure, Parameters, Session
from tllm.lab.experiments.expected import EngineForecast, Possible, measured_forecast, possible, step_bytes
from tllm.lab.experiments.stages import stages_of
from tllm.lab.experiments.stream import (
    STREAM_COLUMNS,
    Stream,
    answer_metrics,
    possible_stream,
    predicted_stream,
    serve_stream,
    stream_metrics,
    take_stream,
)
from tllm.lab.experiments.subject import Subject, random_prompts, take_subject
from tllm.lab.forecast import Forecast, Overhead
from tllm.lab.inspector import ChildInspector, even_stages
from tllm.lab.overhead import measure_overhead
from tllm.lab.rig import Rig, pipeline
from tllm.lab.server import serving
from tllm.lab.statistics import median

ENGINE: Final = "engine alone"
WORKER: Final = "one worker"
HTTP: Final = "through HTTP"
WORKERS: Final = "two workers"

Prompt = tuple[TokenId, ...]
Measure = Callable[[Prompt], Awaitable[dict[str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalVsClusterExperiment:
    """Implements `Experiment`."""

    subject: Subject
    stream: Stream
    name: str = "local-vs-cluster"
    title: str = "One stream: the engine alone, behind the driver, through HTTP, and in two stages"
    columns: tuple[Column, ...] = STREAM_COLUMNS
    figures: tuple[Figure, ...] = ()
    baseline: str = ENGINE

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
        threads = self.subject.num_threads
        lone = "" if threads > 1 else "two workers need a thread each, and there is one"
        settings = {"requests": 1, "tokens": self.stream.tokens}
        return tuple(
            Cell(name=way, settings={"way": way, **settings}, refused=lone if way == WORKERS else "")
            for way in (ENGINE, WORKER, HTTP, WORKERS)
        )

    def opened(self) -> AbstractAsyncContextManager[Session]:
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Session]:
        subject = self.subject
        directory = subject.directory_for(self.stream.prompt_tokens + self.stream.tokens)
        ways: dict[str, Measure] = {}
        predicted: dict[str, Mapping[str, float]] = {}
        async with AsyncExitStack() as stack:
            child = await asyncio.to_thread(
                ChildInspector,
                directory,
                dtype=subject.served_dtype,
                quantization=subject.quantization,
                num_threads=subject.num_threads,
            )
            inspector = stack.enter_context(child)
            ways[ENGINE] = _in_the_engine(inspector, self.stream)
            counts = {WORKER: 1} if subject.num_threads < 2 else {WORKER: 1, WORKERS: 2}
            longest = stages_of(subject.num_threads, max(counts.values()))
            overhead: Overhead | None = None
            rig: Rig | None = None
            for way, num_stages in counts.items():
                stages = stages_of(subject.num_threads, num_stages)
                rig = await stack.enter_async_context(
                    pipeline(directory, stages=stages, dtype=subject.dtype, quantization=subject.quantization)
                )
                overhead = overhead or await measure_overhead(longest, step_bytes=step_bytes(rig))
                chunk = (await measured_forecast(rig, stages, overhead)).best_chunk(self.stream.prompt_tokens)
                await serve_stream(rig, self.stream, prefill_chunk=chunk)
                forecast = rig.forecast(overhead)
                ways[way], predicted[way] = _through(rig, self.stream), predicted_stream(forecast, self.stream)
                if way == WORKER:
                    predicted[ENGINE] = _engine_alone(forecast, self.stream)
                    predicted[HTTP] = predicted_stream(replace(forecast, overhead=Overhead()), self.stream)
            assert rig is not None
            server = await asyncio.to_thread(stack.enter_context, serving(_serve_arguments(subject, str(directory))))
            client = Client(server.url)
            stack.callback(client.close)
            ways[HTTP] = _over_http(client, server.model, self.stream)
            spec = rig.checkpoint.spec
            limit = await possible(
                directory,
                weight_bytes=step_bytes(rig),
                kv_bytes_per_position=spec.kv_bytes_per_position(spec.num_layers, rig.dtype),
                num_threads=subject.num_threads,
            )
            yield _Session(self.stream, vocab_size=spec.vocab_size, ways=ways, predicted=predicted, limit=limit)


class _Session:
    """Implements `Session`."""

    def __init__(
        self,
        stream: Stream,
        *,
        vocab_size: int,
        ways: Mapping[str, Measure],
        predicted: Mapping[str, Mapping[str, float]],
        limit: Possible,
    ) -> None:
        self._stream = stream
        self._vocab_size = vocab_size
        self._ways = ways
        self._predicted = predicted
        self._limit = limit
        self._tpot_s: dict[str, list[float]] = {}

    async def measure(self, cell: Cell, *, seed: int) -> Mapping[str, float]:
        (prompt,) = random_prompts(seed, number=1, num_tokens=self._stream.prompt_tokens, vocab_size=self._vocab_size)
        found = await self._ways[cell.name](prompt)
        self._tpot_s.setdefault(cell.name, []).append(found["tpot_s"])
        return found

    def predicted(self, cell: Cell) -> Mapping[str, float]:
        return self._predicted.get(cell.name, {})

    def limit(self, cell: Cell) -> Mapping[str, float]:
        return {} if cell.refused else possible_stream(self._limit, self._stream)

    def facts(self) -> Mapping[str, float]:
        return {"prompt_tokens": float(self._stream.prompt_tokens)}

    def notes(self, cell: Cell) -> tuple[str, ...]:
        mine, alone = self._tpot_s.get(cell.name), self._tpot_s.get(ENGINE)
        if cell.name == ENGINE or not mine or not alone:
            return ()
        beyond_s = median(mine) - median(alone)
        return (f"{beyond_s * 1e3:+.3f} ms a token beside the engine alone (medians, warm-ups included).",)


def experiment(parameters: Parameters) -> LocalVsClusterExperiment:
    """Raises ConfigError."""
    return LocalVsClusterExperiment(subject=take_subject(parameters), stream=take_stream(parameters))


def _in_the_engine(inspector: ChildInspector, stream: Stream) -> Measure:
    async def measure(prompt: Prompt) -> dict[str, float]:
        answered = await asyncio.to_thread(inspector.answer, prompt, stream.tokens)
        return stream_metrics(
            ttft_s=answered.prefill_s, decode_s=answered.decode_loop_s, num_tokens=answered.num_tokens
        )

    return measure


def _through(rig: Rig, stream: Stream) -> Measure:
    async def measure(prompt: Prompt) -> dict[str, float]:
        return answer_metrics(await rig.answer(prompt, max_tokens=stream.tokens))

    return measure


def _over_http(client: Client, model: str, stream: Stream) -> Measure:
    async def measure(prompt: Prompt) -> dict[str, float]:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": stream.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,  # a frame for every token, also for those that have no text
        }
        reply = await client.ask(Endpoint.COMPLETIONS, json.dumps(body).encode())
        if reply.failure is not None:
            raise UnavailableError(reply.failure.message, state="failed")
        if not reply.frames:
            raise UnavailableError("The server's answer has no tokens.", state="failed")
        return stream_metrics(
            ttft_s=reply.frames[0].at_s - reply.sent_s,
            decode_s=reply.frames[-1].at_s - reply.frames[0].at_s,
            num_tokens=sum(frame.num_tokens or 0 for frame in reply.frames),
        )

    return measure


def _engine_alone(forecast: Forecast, stream: Stream) -> dict[str, float]:
    """By the speeds of the one worker that a pipeline of one stage has."""
    (stage,) = forecast.stages
    assert stage.node.speed is not None
    engine = EngineForecast(speed=stage.node.speed, stages=even_stages(forecast.model.num_layers, 1))
    found = stream_metrics(
        ttft_s=engine.prefill_s(0, stream.prompt_tokens),
        decode_s=(stream.tokens - 1) * engine.step_s(0, stream.context),
        num_tokens=stream.tokens,
    )
    return {name: value for name, value in found.items() if name != "num_tokens"}


def _serve_arguments(subject: Subject, directory: str) -> list[str]:
    dtype = ["--dtype", subject.dtype] if subject.dtype else []
    quantize = ["--quantize", str(subject.quantization)] if subject.quantization else []
    return [directory, *dtype, *quantize, "--threads", str(subject.num_threads)]
