"""How fast a machine is for a model, measured: seconds of its parts through the real engine.

A speed is timed on shards of a model of zeros (`models/synthetic.py`), each become the next by `Engine.reload`:

    no layer, no head      what every step costs          r = 1, 4, 16 decodes; 64, 256 rows of a prompt
    n layers, no head      a layer: what is more, by n    the same steps
    n layers, no head      attention: what a long context    4 decodes, 256 rows of a prompt; less the same in turns
                           takes beyond a short one          after few positions
    k layers and head      the head: a step that samples r rows, less the same step that samples none, in turns

n and k are so many that the weights do not stay in the processor's cache where the whole model's would not. Of a large
vocabulary a part stands for the whole. Times are medians after a warm-up. All of it is bounded in time: a slow machine
gets fewer repetitions, then fewer rows.

This file does not know which nodes there are, nor what is planned by these numbers.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tllm.core.errors import EngineError, ModelError
from tllm.core.types import (
    Activation,
    BlockCopy,
    BlockId,
    Chunk,
    DType,
    Epoch,
    Quantization,
    SamplingParams,
    SamplingState,
    SequenceId,
    Step,
    StepId,
    TokenId,
)
from tllm.engines.base import Engine, EngineConfig
from tllm.models.checkpoint import Checkpoint
from tllm.models.config import Config
from tllm.models.families import find_family, read_spec
from tllm.models.slicing import held_bytes, layer_weights
from tllm.models.spec import ModelSpec, Shard
from tllm.models.synthetic import shortened, write_zeros
from tllm.planner.cost import chunk_attention_s, decode_attention_s
from tllm.planner.profile import Speed
from tllm.transport import wire_pb2 as pb

log = logging.getLogger(__name__)

Clock = Callable[[], float]

BUDGET_S: Final = 8.0

_DECODES: Final = (1, 4, 16)
_PREFILLS: Final = (64, 256)
_ROWS: Final = (*_DECODES, *_PREFILLS)
_CONTEXT: Final = 128  # positions before a decode
_LONG_CONTEXT: Final = 2048  # where attention is measured; less for models that do not take so long a one
_LONG_DECODES: Final = 4
_LEAST_PROMPTS: Final = 5  # that there must be time for: two to warm up, two that count, and one that is longer
_BLOCK_SIZE: Final = 16
_UNCACHED_BYTES: Final = 512 << 20  # more than most processors keep
_HEAD_BYTES: Final = 256 << 20  # of a head that are measured at most

_LAYERS_SHARE: Final = 0.5  # of the budget: until then layers are timed, after that attention,
_ATTENTION_SHARE: Final = 0.7  # after that the head,
_LEAST_SHARE: Final = 0.15  # each for as long as that however long loading took
_MIN_TURNS: Final = 5
_MAX_TURNS: Final = 100
_ENOUGH_S: Final = 0.8  # beyond the least number, repeat for so long

_GREEDY: Final = SamplingParams(temperature=0.0)


def measure_speed(
    order: pb.Measure,
    make_engine: Callable[[str, EngineConfig], Engine],
    directory: Path,
    *,
    clock: Clock = time.perf_counter,
    budget_s: float = BUDGET_S,
) -> Speed:
    """Time the order's model; blocks for about `budget_s`, and longer only where loading takes most of that.

    `directory` is made if need be, and is left as it was. Raises ModelError for a config or dtype that is no model's,
    ConfigError for an unknown quantization, EngineError when memory suffices not even for one layer, and whatever
    `make_engine` raises.
    """
    began = clock()
    config = _read_config(order.config)
    dtype = _read_dtype(order.dtype)
    quantization = Quantization.parse(order.quantization) if order.quantization else None
    full = read_spec(config, find_family(config))
    layer_bytes = _layer_bytes(full, dtype, quantization)
    num_layers = min(full.num_layers, math.ceil(_UNCACHED_BYTES / layer_bytes))
    vocab_size = min(full.vocab_size, math.ceil(_HEAD_BYTES / (full.hidden_size * dtype.num_bytes)))
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="measure-", dir=directory) as zeros:
        try:
            write_zeros(Path(zeros), shortened(config, num_layers, vocab_size), dtype)
        except OSError as error:
            raise EngineError(f"{directory} cannot hold a model to measure with: {error.strerror}") from error
        checkpoint = Checkpoint.open(Path(zeros))
        engine = make_engine(
            order.engine,
            EngineConfig(
                shard=_part(0),
                dtype=dtype,
                quantization=quantization,
                device=order.device,
                num_threads=order.num_threads or None,
            ),
        )
        try:
            bench = _Bench(engine, checkpoint, dtype, quantization, clock)
            return _measure(bench, full, num_layers, began, budget_s)
        finally:
            engine.close()


def _measure(bench: _Bench, full: ModelSpec, num_layers: int, began: float, budget_s: float) -> Speed:
    def until(share: float) -> float:
        return max(began + share * budget_s, bench.clock() + _LEAST_SHARE * budget_s)

    steps_s = bench.plain_s(_ROWS, bench.clock() + budget_s / 10)
    spare = bench.engine.free_bytes() // 2  # others may want some too
    num_layers = max(1, min(num_layers, spare // bench.layer_bytes))
    bench.become(_part(num_layers))
    stages_s = bench.plain_s(_ROWS[: len(steps_s)], until(_LAYERS_SHARE))
    prompt_s = stages_s[-1] if len(stages_s) == len(_ROWS) else math.inf
    read_s, pair_s = (seconds / num_layers for seconds in bench.attention_s(prompt_s, until(_ATTENTION_SHARE)))
    # What a step of many rows costs beyond one of a single row is in the layers too, so that the whole model is right.
    layers_s = [
        max(0.0, (stage_s - step_s) / num_layers + (step_s - steps_s[0]) / full.num_layers - attention_s)
        for stage_s, step_s, attention_s in zip(stages_s, steps_s, bench.contexts_s(read_s, pair_s), strict=False)
    ]
    uncached = math.ceil((_UNCACHED_BYTES - bench.head_bytes) / bench.layer_bytes)
    affordable = max(0, spare - bench.head_bytes) // bench.layer_bytes
    bench.become(_part(max(0, min(num_layers, uncached, affordable)), head=True))
    heads_s = bench.heads_s(_DECODES, until((1 + _ATTENTION_SHARE) / 2))
    if len(heads_s) == len(_DECODES):
        bench.become(_part(0, head=True))  # many rows: arithmetic takes longer than the weights' way from memory
        heads_s += bench.heads_s(_PREFILLS, until(1.0))
    # The difference of two steps can drown in the noise of a busy machine; but a head is not free.
    guess_s = layers_s[0] * min(1.0, bench.head_bytes / bench.layer_bytes)
    heads_s = [seconds or guess_s for seconds in heads_s]
    num_rows = min(len(layers_s), len(heads_s))
    return Speed(
        rows=_ROWS[:num_rows],
        layer_s=tuple(layers_s[:num_rows]),
        head_s=tuple(seconds * full.vocab_size / bench.vocab_size for seconds in heads_s[:num_rows]),
        step_s=max(0.0, steps_s[0]),
        read_s=read_s,
        pair_s=pair_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Steps of so many rows each, to be timed in turns."""

    rows: int
    steps: tuple[tuple[Step, Activation], ...]


class _Bench:
    """One engine, the shards it becomes, and the steps it is timed with.

    Blocks: nine for each of the decoding sequences, eight of them its context, then those of prompts; or as many for
    each of fewer sequences with a long context.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoint: Checkpoint,
        dtype: DType,
        quantization: Quantization | None,
        clock: Clock,
    ) -> None:
        self.engine = engine
        self.clock = clock
        self._checkpoint = checkpoint
        self._dtype = dtype
        spec = checkpoint.spec
        self._num_context_blocks = min(_CONTEXT, spec.max_positions - 1) // _BLOCK_SIZE
        self._stride = self._num_context_blocks + 1
        self._prompt_length = min(max(_PREFILLS), spec.max_positions)
        num_prompts = math.ceil(max(_PREFILLS) / self._prompt_length)
        prompt_blocks = num_prompts * math.ceil(self._prompt_length / _BLOCK_SIZE)
        self._num_blocks = max(max(_DECODES) * self._stride + prompt_blocks, max(_PREFILLS))
        longest = min(_LONG_CONTEXT, spec.max_positions - self._prompt_length)
        self._num_long_blocks = max(0, longest // _BLOCK_SIZE)
        self.vocab_size = spec.vocab_size
        self.layer_bytes = _layer_bytes(spec, dtype, quantization)
        self.head_bytes = checkpoint.weight_bytes(_part(0, head=True), dtype, quantization)
        engine.load(checkpoint, _ignore)
        self._prepare()

    def become(self, shard: Shard) -> None:
        self.engine.reload(self._checkpoint, shard, _ignore)
        self._prepare()

    def plain_s(self, every: Sequence[int], until: float) -> list[float]:
        """Seconds of a step of so many rows, decodes if they are few, else a prompt; of the last ones only in time."""
        cases = [
            _Case(rows=rows, steps=(self._step(self._decodes(rows) if rows in _DECODES else self._prompts(rows)),))
            for rows in every
        ]
        return [statistics.median(seconds for (seconds,) in turns) for turns in self._turns(cases, until)]

    def attention_s(self, prompt_s: float, until: float) -> tuple[float, float]:
        """Seconds of all the shard's layers for one position of KV in decodes, and for a row and a position in a
        prompt; 0 and 0 where there is no time, no memory or no long context. `prompt_s`: of the longest prompt."""
        num_rows, num_positions = self._prompt_length, self._num_long_blocks * _BLOCK_SIZE
        num_more = num_positions - self._num_context_blocks * _BLOCK_SIZE
        if num_more < num_positions // 2 or self._num_prompt_blocks < _LONG_DECODES:
            return 0.0, 0.0
        if _LEAST_PROMPTS * prompt_s > until - self.clock() or not self._grow():
            return 0.0, 0.0
        cases = [
            _Case(rows=num_rows, steps=(self._step(self._short_prompt()), self._step(self._long_prompt()))),
            _Case(rows=_LONG_DECODES, steps=(self._step(self._short_decodes()), self._step(self._long_decodes()))),
        ]
        more_s = [max(0.0, statistics.median(b - a for a, b in turns)) for turns in self._turns(cases, until)]
        if len(more_s) < len(cases):
            return 0.0, 0.0
        self._prepare()
        return more_s[1] / (_LONG_DECODES * num_positions), more_s[0] / (num_rows * num_positions)

    def contexts_s(self, read_s: float, pair_s: float) -> list[float]:
        """A layer's attention in the steps of `plain_s`."""
        attention = Speed(rows=(1,), layer_s=(0.0,), head_s=(0.0,), step_s=0.0, read_s=read_s, pair_s=pair_s)
        context = self._num_context_blocks * _BLOCK_SIZE
        decodes = [decode_attention_s(attention, rows, context) for rows in _DECODES]
        prompts = [
            sum(chunk_attention_s(attention, 0, len(chunk.tokens)) for chunk in self._prompts(rows))
            for rows in _PREFILLS
        ]
        return [*decodes, *prompts]

    def heads_s(self, every: Sequence[int], until: float) -> list[float]:
        """Seconds that a step of so many rows takes longer when all of them are sampled; as far as there is time."""
        cases = [
            _Case(rows=rows, steps=(self._step(_rows(rows, sampled=False)), self._step(_rows(rows, sampled=True))))
            for rows in every
        ]
        return [max(0.0, statistics.median(b - a for a, b in turns)) for turns in self._turns(cases, until)]

    def _turns(self, cases: Sequence[_Case], until: float) -> list[list[tuple[float, ...]]]:
        """For every case that there is time for, a tuple of its steps' seconds a turn.

        The cases take turns, so that what disturbs the machine for a moment spoils no case's median. A warm-up counts
        only where there is no time for more.
        """
        last: list[tuple[float, ...]] = []
        for case in cases:
            rows, seconds = self._last
            if case.rows > 1 and seconds * case.rows / rows > (until - self.clock()) / 2:
                break
            warm_up = self._turn(case)
            cheap = sum(warm_up) < (until - self.clock()) / 10
            last.append(self._turn(case) if cheap else warm_up)  # the very first may be no measure of those to come
        turns: list[list[tuple[float, ...]]] = [[] for _ in last]
        began = self.clock()
        for number in range(_MAX_TURNS):
            if number >= _MIN_TURNS and self.clock() - began >= _ENOUGH_S:
                break
            for index, case in enumerate(cases[: len(last)]):
                if self.clock() + sum(last[index]) <= until:
                    last[index] = self._turn(case)
                    turns[index].append(last[index])
        return [some or [warm_up] for some, warm_up in zip(turns, last, strict=True)]

    def _turn(self, case: _Case) -> tuple[float, ...]:
        seconds = tuple(self._forward(*step) for step in case.steps)
        self._last = (case.rows, sum(seconds))
        return seconds

    def _prepare(self) -> None:
        """KV for the context of every decoding sequence: one block computed, the rest copies of it."""
        self._last = (1, 0.0)  # rows and seconds of the last turn with this shard
        self.engine.allocate(self._num_blocks, _BLOCK_SIZE)
        if self._num_context_blocks:
            self._forward(*self._step((_chunk(0, 0, _BLOCK_SIZE, range(1), sampled=False),)))
            blocks = range(1, max(_DECODES) * self._stride)
            targets = [BlockId(i) for i in blocks if i % self._stride < self._num_context_blocks]
            copies = tuple(BlockCopy(source=BlockId(0), target=target, length=_BLOCK_SIZE) for target in targets)
            self._forward(*self._step((), copies))

    def _grow(self) -> bool:
        """Long contexts, all of them copies of the first block, in place of what there was; whether they fit. Behind
        them is room for a prompt that has no context."""
        num_blocks = _LONG_DECODES * self._long_stride + self._num_prompt_blocks
        try:
            self.engine.allocate(num_blocks, _BLOCK_SIZE)
        except EngineError:
            self._prepare()
            return False
        self._forward(*self._step((_chunk(0, 0, _BLOCK_SIZE, range(1), sampled=False),)))
        targets = [BlockId(i) for i in range(1, num_blocks)]
        copies = tuple(BlockCopy(source=BlockId(0), target=target, length=_BLOCK_SIZE) for target in targets)
        self._forward(*self._step((), copies))
        return True

    @property
    def _num_prompt_blocks(self) -> int:
        return math.ceil(self._prompt_length / _BLOCK_SIZE)

    @property
    def _long_stride(self) -> int:
        return self._num_long_blocks + self._num_prompt_blocks

    def _long_decodes(self) -> tuple[Chunk, ...]:
        start = self._num_long_blocks * _BLOCK_SIZE
        firsts = range(0, _LONG_DECODES * self._long_stride, self._long_stride)
        return tuple(
            _chunk(i, start, 1, range(first, first + self._num_long_blocks + 1), sampled=False)
            for i, first in enumerate(firsts)
        )

    def _long_prompt(self) -> tuple[Chunk, ...]:
        start, blocks = self._num_long_blocks * _BLOCK_SIZE, range(self._long_stride)
        return (_chunk(0, start, self._prompt_length, blocks, sampled=False),)

    def _short_decodes(self) -> tuple[Chunk, ...]:
        first = _LONG_DECODES * self._long_stride
        return tuple(_chunk(i, 0, 1, range(first + i, first + i + 1), sampled=False) for i in range(_LONG_DECODES))

    def _short_prompt(self) -> tuple[Chunk, ...]:
        first = _LONG_DECODES * self._long_stride
        return (_chunk(0, 0, self._prompt_length, range(first, first + self._num_prompt_blocks), sampled=False),)

    def _forward(self, step: Step, hidden: Activation) -> float:
        began = self.clock()
        self.engine.forward(step, hidden)
        return self.clock() - began

    def _step(self, chunks: tuple[Chunk, ...], copies: tuple[BlockCopy, ...] = ()) -> tuple[Step, Activation]:
        step = Step(id=StepId(0), epoch=Epoch(1), chunks=chunks, copies=copies)
        shape = (step.num_tokens, self._checkpoint.spec.hidden_size)
        zeros = bytes(shape[0] * shape[1] * self._dtype.num_bytes)
        return step, Activation(data=zeros, dtype=self._dtype, shape=shape)

    def _decodes(self, rows: int) -> tuple[Chunk, ...]:
        start = self._num_context_blocks * _BLOCK_SIZE
        blocks = (range(i * self._stride, (i + 1) * self._stride) for i in range(rows))
        return tuple(_chunk(i, start, 1, own, sampled=False) for i, own in enumerate(blocks))

    def _prompts(self, rows: int) -> tuple[Chunk, ...]:
        """One sequence, or a few where the model does not take so long a one."""
        chunks: list[Chunk] = []
        block = max(_DECODES) * self._stride
        for first in range(0, rows, self._prompt_length):
            length = min(self._prompt_length, rows - first)
            num_blocks = math.ceil(length / _BLOCK_SIZE)
            chunks.append(_chunk(len(chunks), 0, length, range(block, block + num_blocks), sampled=False))
            block += num_blocks
        return tuple(chunks)


def _chunk(seq: int, start: int, length: int, blocks: range, *, sampled: bool) -> Chunk:
    return Chunk(
        seq=SequenceId(seq),
        start=start,
        tokens=(TokenId(0),) * length,
        blocks=tuple(BlockId(block) for block in blocks),
        sampling=SamplingState(params=_GREEDY, position=start + length) if sampled else None,
    )


def _rows(num_rows: int, *, sampled: bool) -> tuple[Chunk, ...]:
    """The first rows of as many sequences."""
    return tuple(_chunk(i, 0, 1, range(i, i + 1), sampled=sampled) for i in range(num_rows))


def _part(num_layers: int, *, head: bool = False) -> Shard:
    """It never embeds: that is a row of a table."""
    return Shard(first_layer=0, last_layer=num_layers, embed=False, head=head)


def _layer_bytes(spec: ModelSpec, dtype: DType, quantization: Quantization | None) -> int:
    return sum(held_bytes(weight.target, weight.shape, dtype, quantization) for weight in layer_weights(spec, 0))


def _ignore(done_bytes: int, total_bytes: int) -> None:
    pass


def _read_config(text: str) -> Config:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"The config to be measured is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ModelError("The config to be measured is not a JSON object.")
    return Config(path="the config to be measured", fields=fields)


def _read_dtype(name: str) -> DType:
    try:
        return DType(name)
    except ValueError as error:
        raise ModelError(f"{name!r} is no type of weights; there are {', '.join(DType)}.") from error
