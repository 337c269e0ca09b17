"""What is expected of a pipeline on the bench: the planner's own arithmetic, fed with what was measured of its parts.

This file does not know how anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tllm.planner.cost import interpolate
from tllm.planner.plan import StagePlan
from tllm.planner.predict import HEAD_STEP_S, Chain, RoundTrip, chain_of
from tllm.planner.profile import LinkProfile, Load, ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What steps cost beside engines and links, by the rows in them: `head_s[i]` at the head and the first stage for
    `rows[i]` rows, and `handover_s` at every other stage. `first_s` is what a first step costs more than that, when
    everybody has slept until a prompt came."""

    rows: tuple[int, ...] = (1,)
    head_s: tuple[float, ...] = (HEAD_STEP_S,)
    handover_s: float = 0.0
    first_s: float = 0.0

    def step_s(self, num_rows: float) -> float:
        """At the head and the first stage. Beyond the last number of rows as much as there."""
        return interpolate(self.rows, self.head_s, min(num_rows, self.rows[-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of stages whose speeds are known; `max_batch_tokens` and `prefill_chunk` are how they are driven."""

    model: ModelProfile
    stages: tuple[StagePlan, ...]
    links: tuple[LinkProfile, ...]
    head_machine: str
    overhead: Overhead
    max_batch_tokens: int
    prefill_chunk: int | None = None

    def round_trip(self, batch: int, context: float, *, num_steps: int | None = None) -> RoundTrip:
        """One token of each of `batch` streams that have `context` positions before it."""
        num_steps = min(batch, num_steps or len(self.stages))
        return self._chain(batch / num_steps).round_trip(batch, context=context, num_steps=num_steps)

    def decode_step_s(self, batch: int, context: float) -> float:
        return self.round_trip(batch, context).cycle_s

    def tokens_per_s(self, batch: int, context: float = 0.0) -> float:
        return batch / self.decode_step_s(batch, context)

    def ttft_s(self, prompt: int, *, chunk: int | None = None) -> float:
        """From its arrival to the first token of a prompt that comes alone, in chunks as it is driven, or of `chunk`
        tokens."""
        size = min(chunk or self.prefill_chunk or self.max_batch_tokens, self.max_batch_tokens)
        return self.overhead.first_s + self._chain(1).prefill_s(prompt, size)

    def best_chunk(self, prompt: int) -> int:
        """Tokens of a chunk with which the prompt's first token is soonest."""
        return self._chain(1).best_chunk(Load(prompt=prompt, max_batch_tokens=self.max_batch_tokens))[0]

    def _chain(self, num_rows: float) -> Chain:
        chain = chain_of(
            self.model,
            [self.stages[0], *_handed_over(self.stages[1:], self.overhead.handover_s)],
            self.links,
            head_machine=self.head_machine,
            head_step_s=self.overhead.step_s(num_rows),
        )
        assert chain is not None, "a stage without a speed"
        return chain


def _handed_over(stages: Sequence[StagePlan], handover_s: float) -> list[StagePlan]:
    slower = []
    for stage in stages:
        assert stage.node.speed is not None, "a stage without a speed"
        speed = replace(stage.node.speed, step_s=stage.node.speed.step_s + handover_s)
        slower.append(replace(stage, node=replace(stage.node, speed=speed)))
    return slower
