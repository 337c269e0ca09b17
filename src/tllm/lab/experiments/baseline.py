"""One request alone, from the files on disk to its last token: the figures that everything else is compared with.

    load_model ─▶ load_tokenizer ─▶ tokenize ─▶ prefill ─▶ decode_loop
                                                first token   the others

Everything is done anew in every repeat, after uncounted ones: the first prefill of a process pays for what later ones
find ready, and says nothing of prefills.

This file does not know how an engine is looked into.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tllm.lab.experiment import Cell, Column, Conditions, Figure, Parameters, Session
from tllm.lab.experiments.expected import EngineForecast, Possible, possible
from tllm.lab.experiments.subject import Subject, take_subject
from tllm.lab.inspection import Answered
from tllm.lab.inspector import ChildInspector, even_stages
from tllm.models.checkpoint import Checkpoint

PROMPT: Final = "Q: Explain why batching improves GPU utilization.\nA:"

_COLUMNS = (
    Column(metric="load_model_s", title="Load model", unit="s", better="lower"),
    Column(metric="load_tokenizer_s", title="Load tokenizer", unit="ms", better="lower", scale=1e3),
    Column(metric="tokenize_s", title="Tokenize", unit="ms", better="lower", scale=1e3),
    Column(metric="prefill_s", title="Prefill", unit="ms", better="lower", scale=1e3),
    Column(metric="decode_loop_s", title="Decode loop", unit="ms", better="lower", scale=1e3),
    Column(metric="step_s", title="Decode step", unit="ms", better="lower", scale=1e3),
    Column(metric="tokens_per_s", title="With the first token", unit="tokens/s", better="higher"),
    Column(metric="decode_tokens_per_s", title="Without the first token", unit="tokens/s", better="higher"),
    Column(metric="num_tokens", title="Tokens", unit=""),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """One prompt, and how long its answer is."""

    prompt: str
    tokens: int

    @property
    def words(self) -> str:
        return f"single request, exactly {self.tokens} new tokens, greedy"


def take_answering(parameters: Parameters) -> Answering:
    """`prompt` and `tokens` of an experiment with one request."""
    return Answering(prompt=parameters.text("prompt", PROMPT), tokens=parameters.count("tokens", 10, least=2))


def rates(answered: Answered) -> dict[str, float]:
    """Tokens are those that came. The first one belongs to the prefill, the others to the decode loop."""
    num_steps = answered.num_tokens - 1
    return {
        "prefill_s": answered.prefill_s,
        "decode_loop_s": answered.decode_loop_s,
        "step_s": answered.decode_loop_s / num_steps,
        "tokens_per_s": answered.num_tokens / (answered.prefill_s + answered.decode_loop_s),
        "decode_tokens_per_s": num_steps / answered.decode_loop_s,
        "num_tokens": answered.num_tokens,
    }


def predicted_rates(forecast: EngineForecast, *, prompt_tokens: int, tokens: int) -> dict[str, float]:
    """The same, of stages called one after the other."""
    num_steps = tokens - 1
    stages = range(len(forecast.stages))
    prefill_s = sum(forecast.prefill_s(stage, prompt_tokens) for stage in stages)
    step_s = sum(forecast.step_s(stage, prompt_tokens + tokens / 2) for stage in stages)
    return {
        "prefill_s": prefill_s,
        "decode_loop_s": num_steps * step_s,
        "step_s": step_s,
        "tokens_per_s": tokens / (prefill_s + num_steps * step_s),
        "decode_tokens_per_s": 1 / step_s,
    }


def possible_rates(limit: Possible, *, prompt_tokens: int, tokens: int) -> dict[str, float]:
    """What memory allows a decode step; nothing where that is no limit."""
    tokens_per_s = limit.tokens_per_s(1, prompt_tokens + tokens / 2)
    return {} if tokens_per_s is None else {"decode_tokens_per_s": tokens_per_s, "step_s": 1 / tokens_per_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineExperiment:
    """Implements `Experiment`."""

    subject: Subject
    answering: Answering
    name: str = "baseline"
    title: str = "One request alone: phases of an answer, and tokens per second with and without the first one"
    cells: tuple[Cell, ...]
    columns: tuple[Column, ...] = _COLUMNS
    figures: tuple[Figure, ...] = ()
    baseline: str | None = None

    @property
    def conditions(self) -> Conditions:
        return Conditions(
            model=self.subject.title,
            prompt=self.answering.prompt,
            batch_policy=self.answering.words,
            settings=self.subject.settings,
        )

    def opened(self) -> AbstractAsyncContextManager[Session]:
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Session]:
        directory = self.subject.directory()
        with await asyncio.to_thread(
            ChildInspector,
            directory,
            dtype=self.subject.served_dtype,
            quantization=self.subject.quantization,
            num_threads=self.subject.num_threads,
        ) as inspector:
            num_layers = Checkpoint.open(directory).spec.num_layers
            forecast = EngineForecast(speed=await asyncio.to_thread(inspector.speed), stages=even_stages(num_layers, 1))
            limit = await possible(
                directory,
                weight_bytes=inspector.step_bytes(),
                kv_bytes_per_position=inspector.kv_bytes_per_position(),
                num_threads=self.subject.num_threads,
            )
            prompt_tokens = len(inspector.prompt_ids(self.answering.prompt))
            yield _Session(self.answering, inspector, forecast, limit, prompt_tokens)


class _Session:
    """Implements `Session`."""

    def __init__(
        self,
        answering: Answering,
        inspector: ChildInspector,
        forecast: EngineForecast,
        limit: Possible,
        prompt_tokens: int,
    ) -> None:
        self._answering = answering
        self._inspector = inspector
        self._sizes = {"prompt_tokens": prompt_tokens, "tokens": answering.tokens}
        self._forecast = forecast
        self._limit = limit
        self._text = ""

    async def measure(self, cell: Cell, *, seed: int) -> Mapping[str, float]:
        phases = await asyncio.to_thread(self._inspector.phases, self._answering.prompt, self._answering.tokens)
        self._text = phases.text
        return {
            "load_model_s": phases.load_model_s,
            "load_tokenizer_s": phases.load_tokenizer_s,
            "tokenize_s": phases.tokenize_s,
            **rates(phases.answered),
        }

    def predicted(self, cell: Cell) -> Mapping[str, float]:
        return predicted_rates(self._forecast, **self._sizes)

    def limit(self, cell: Cell) -> Mapping[str, float]:
        return possible_rates(self._limit, **self._sizes)

    def facts(self) -> Mapping[str, float]:
        return {name: float(size) for name, size in self._sizes.items()}

    def notes(self, cell: Cell) -> tuple[str, ...]:
        return (
            f"The prompt has {self._sizes['prompt_tokens']} tokens. The answer: {self._text!r}",
            "Files come from the system's cache, weights go into memory of their own.",
            "GPU utilization is N/A: the processor computes.",
        )


def experiment(parameters: Parameters) -> BaselineExperiment:
    """Raises ConfigError."""
    subject, answering = take_subject(parameters), take_answering(parameters)
    settings = {"requests": 1, "tokens": answering.tokens}
    return BaselineExperiment(
        subject=subject, answering=answering, cells=(Cell(name="one request", settings=settings),)
    )
