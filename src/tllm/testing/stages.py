"""Engines in a row, driven by hand: what tests of engines need instead of a scheduler, links and workers.

This file does not know what the engines are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tllm.core.types import (
    Activation,
    BlockCopy,
    BlockId,
    Chunk,
    Epoch,
    SamplingParams,
    SamplingState,
    Scoring,
    SequenceId,
    Step,
    StepId,
    StepResult,
    TokenId,
)
from tllm.engines.base import Engine
from tllm.models.spec import Shard

GREEDY = SamplingParams(temperature=0.0)


def cut(num_layers: int, sizes: Sequence[int]) -> tuple[Shard, ...]:
    """Consecutive stages of these many layers, the first of which embeds and the last of which has the head."""
    assert sum(sizes) == num_layers, (num_layers, sizes)
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(
        Shard(first_layer=stop - size, last_layer=stop, embed=stop == size, head=stop == num_layers)
        for size, stop in zip(sizes, stops, strict=True)
    )


def chunk(
    seq: int,
    start: int,
    tokens: Iterable[int],
    blocks: Iterable[int],
    *,
    sample: SamplingParams | None = None,
    targets: Iterable[int] | None = None,
    top: int = 0,
) -> Chunk:
    """A chunk from plain numbers; with `sample`, its last row is sampled; with `targets`, its rows are scored."""
    ids = tuple(TokenId(token) for token in tokens)
    return Chunk(
        seq=SequenceId(seq),
        start=start,
        tokens=ids,
        blocks=tuple(BlockId(block) for block in blocks),
        sampling=None if sample is None else SamplingState(params=sample, position=start + len(ids)),
        scoring=None if targets is None else Scoring(targets=tuple(TokenId(t) for t in targets), top=top),
    )


class Stages:
    """The engines of one pipeline, loaded and allocated alike, run one step at a time."""

    def __init__(self, engines: Sequence[Engine], *, num_blocks: int, block_size: int) -> None:
        self.engines = tuple(engines)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_steps = 0
        for engine in self.engines:
            engine.allocate(num_blocks, block_size)

    def run(
        self,
        chunks: Sequence[Chunk],
        copies: Sequence[BlockCopy] = (),
        *,
        tap: Callable[[Activation], None] = lambda hidden: None,
    ) -> StepResult:
        """One step through all stages; `tap` sees every activation between them."""
        step = Step(id=StepId(self._num_steps), epoch=Epoch(1), copies=tuple(copies), chunks=tuple(chunks))
        self._num_steps += 1
        hidden: Activation | None = None
        for engine in self.engines:
            answer = engine.forward(step, hidden)
            if isinstance(answer, StepResult):
                assert engine is self.engines[-1]
                return answer
            hidden = answer
            tap(hidden)
        raise AssertionError("the last stage has no head")

    def generate(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        *,
        blocks: Sequence[int] | None = None,
        chunk_size: int | None = None,
        params: SamplingParams = GREEDY,
        seq: int = 1,
    ) -> tuple[TokenId, ...]:
        """Prefill in chunks, then decode one by one; the tokens chosen."""
        blocks = range(self.num_blocks) if blocks is None else blocks
        prompt = [*prompt]
        sampled: list[TokenId] = []
        size = chunk_size or len(prompt)
        for start in range(0, len(prompt), size):
            last = start + size >= len(prompt)
            part = chunk(seq, start, prompt[start : start + size], blocks, sample=params if last else None)
            sampled += [s.token for s in self.run([part]).sampled]
        while len(sampled) < num_tokens:
            start = len(prompt) + len(sampled) - 1
            sampled += [s.token for s in self.run([chunk(seq, start, sampled[-1:], blocks, sample=params)]).sampled]
        return tuple(sampled)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
