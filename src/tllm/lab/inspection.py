"""One greedy answer taken apart: what every step computed, what it added to the KV, what it could have said and chose.

    prefill        13 rows   logits (1, V)   KV (2, K, 13, D) a layer    candidates ─▶ token
    decode 1        1 row    logits (1, V)   KV (2, K, 14, D) a layer    candidates ─▶ token
    ...

This file does not know where any of it comes from.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tllm.core.types import DType
from tllm.core.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A token that could come next, and how probable the model holds it."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePart:
    """What one stage did for a step: layers `first_layer` to `last_layer - 1`."""

    first_layer: int
    last_layer: int
    seconds: float
    kv_bytes: int  # of the sequence, on this stage's layers, after the step
    sent_bytes: int  # hidden states for the next stage; 0 of the last


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """One step: the prefill is the first, the others compute one row each."""

    num_rows: int
    num_positions: int  # in the KV of every layer, after the step
    kv_shape: tuple[int, int, int, int]  # of a layer: keys and values, kv heads, positions, head size
    kv_bytes: int  # of all layers
    logits_shape: tuple[int, int]  # rows that were projected, vocabulary
    candidates: tuple[Candidate, ...]  # the most probable first
    chosen: Candidate
    stages: tuple[StagePart, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One answer, and the seconds of all its steps. The prefill chose the first token, every further step another."""

    tokens: tuple[int, ...]
    steps_s: tuple[tuple[float, ...], ...]  # of every step, stage by stage

    @property
    def prefill_s(self) -> float:
        return sum(self.steps_s[0])

    @property
    def decode_loop_s(self) -> float:
        return sum(sum(stages) for stages in self.steps_s[1:])

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Seconds of the parts of one answer, from the files on disk to its last token."""

    load_model_s: float
    load_tokenizer_s: float
    tokenize_s: float
    num_prompt_tokens: int
    answered: Answered
    text: str


def step_table(views: Sequence[StepView]) -> Iterator[str]:
    """Markdown: one row a step, as the phases of an answer are usually shown."""
    yield "| Step | Rows | ms | KV positions | KV | Logits | Chosen | Candidates |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | --- | --- |"
    for number, view in enumerate(views):
        name = f"decode {number}" if number else "prefill"
        candidates = ", ".join(f"{_cell(each)} {each.probability:.1%}" for each in view.candidates)
        yield (
            f"| {name} | {view.num_rows} | {view.seconds * 1e3:.2f} | {view.num_positions} "
            f"| {format_bytes(view.kv_bytes)} | {view.logits_shape} | {_cell(view.chosen)} "
            f"| {candidates} |"
        )


def stage_table(views: Sequence[StepView]) -> Iterator[str]:
    """Markdown: one row a stage, for the prefill and for the median decode step."""
    yield "| Stage | Layers | Prefill ms | Step ms | KV | Prefill sends | Step sends |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for number, first in enumerate(views[0].stages):
        steps = [view.stages[number] for view in views[1:]]
        step = f"{statistics.median(part.seconds for part in steps) * 1e3:.2f}" if steps else "N/A"
        sent = [format_bytes(part.sent_bytes) if part.sent_bytes else "" for part in (first, *steps[-1:])]
        yield (
            f"| {number} | {first.first_layer}..{first.last_layer - 1} | {first.seconds * 1e3:.2f} | {step} "
            f"| {format_bytes(views[-1].stages[number].kv_bytes)} | {sent[0]} | {sent[-1]} |"
        )


def kv_formula(views: Sequence[StepView], *, num_layers: int, dtype: DType) -> str:
    """How the bytes of the last step's KV come about, and by how much every decode step lets them grow."""
    last = views[-1]
    two, heads, positions, size = last.kv_shape
    line = (
        f"{two} (keys, values) x {num_layers} layers x {heads} KV heads x {size} x {dtype.num_bytes} B ({dtype}) "
        f"x {positions} positions = {last.kv_bytes:,} B"
    )
    growth = {later.kv_bytes - earlier.kv_bytes for earlier, later in pairwise(views)}
    return line + "".join(f"; every step adds one position, {each:,} B" for each in sorted(growth))


def _cell(candidate: Candidate) -> str:
    """A token's text so that a cell shows all of it, spaces and line ends included; its id where it has none."""
    if not candidate.text:
        return f"#{candidate.token}"
    return f"`{json.dumps(candidate.text, ensure_ascii=False)}`".replace("|", "\\|")
