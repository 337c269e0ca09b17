"""What a step costs beside computing it, measured: a small model alone in a process, through one stage and through two.

    alone        engine
    one stage    engine + head + 2 hops
    two stages   engine + head + 3 hops + handover     the engine's time is the same, in two parts

The model is small, but its steps last some milliseconds. While they do, whoever waits for them falls asleep, and who
reads the last one's tokens takes a core away from them: both are a part of what a step costs, and with steps of next to
nothing neither would show. For a model that is itself next to nothing, another such one is taken.

This file does not know what the figures are used for.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tllm.core.types import DType
from tllm.lab.forecast import Overhead
from tllm.lab.rig import Answer, Rig, Stage, decode_rate, pipeline
from tllm.lab.system import ChildSystem, Decode, Prefill
from tllm.models.config import Config
from tllm.models.synthetic import write_zeros
from tllm.planner.network import SAME_MACHINE_RTT_S
from tllm.testing.checkpoints import tiny_config

_MODEL = tiny_config(
    "llama", layers=8, hidden_size=512, intermediate_size=2048, heads=8, kv_heads=4, vocab_size=32000, max_positions=512
)
_TINY = tiny_config("llama", layers=8, hidden_size=192, heads=8, kv_heads=4, vocab_size=1024, max_positions=512)
_TINY_STEP_BYTES = 20e6  # read in much less than a millisecond
_ROWS = (1, 4, 16)
_PROMPT = tuple(range(3, 11))
_NUM_TOKENS = 48
_SHORT_PROMPT = 32
_PAUSE_S = 0.01
_NUM_TURNS = 5
_HOP_S = SAME_MACHINE_RTT_S / 2  # as predictions have it


async def measure_overhead(stages: Sequence[Stage], *, step_bytes: int | None = None) -> Overhead:
    """For workers with those threads and processors; takes some ten seconds. `step_bytes`: that a step of the model in
    question reads."""
    model = _TINY if step_bytes is not None and step_bytes < _TINY_STEP_BYTES else _MODEL
    with tempfile.TemporaryDirectory(prefix="tllm-overhead-") as directory:
        small = Path(directory)
        write_zeros(small, Config(path="the small model", fields=model), DType.BFLOAT16)
        with ChildSystem("tllm", small, DType.BFLOAT16, stages[0].num_threads, cpus=stages[0].cpus) as alone:
            async with pipeline(small, stages=stages[:1]) as one:
                alone_s, one_s = await _in_turns(alone, one)
                outside_s = await _first_s(alone, one)
        head_s = tuple(max(0.0, b - a - 2 * _HOP_S) for a, b in zip(alone_s, one_s, strict=True))
        first_s = max(0.0, outside_s - 2 * _HOP_S - head_s[0])
        if len(stages) == 1:
            return Overhead(rows=_ROWS, head_s=head_s, first_s=first_s)
        async with pipeline(small, stages=stages[:1]) as one, pipeline(small, stages=stages[:2]) as two:
            more_s = [b - a for a, b in zip(await _cycles_s(one), await _cycles_s(two), strict=True)]
    handover_s = max(0.0, statistics.median(more_s) - _HOP_S)
    return Overhead(rows=_ROWS, head_s=head_s, handover_s=handover_s, first_s=first_s)


async def _in_turns(alone: ChildSystem, one: Rig) -> tuple[list[float], list[float]]:
    """Seconds of a step for each number of rows."""
    alone_s, one_s = [], []
    for rows in _ROWS:
        request = Decode(batch=rows, context=_NUM_TOKENS // 2, num_steps=_NUM_TOKENS)
        await one.serve(max_sequences=rows, max_model_len=128, max_steps_in_flight=1)
        turns = [(alone.decode(request) / _NUM_TOKENS, await _cycle_s(one, rows)) for _ in range(1 + _NUM_TURNS)][1:]
        alone_s.append(statistics.median(a for a, _ in turns))
        one_s.append(statistics.median(b for _, b in turns))
    return alone_s, one_s


async def _first_s(alone: ChildSystem, one: Rig) -> float:
    """Seconds to the first token of a short prompt, after a pause, beyond what the engine takes that has had none."""
    await one.serve(max_sequences=1, max_model_len=128)
    outside_s = []
    for turn in range(1 + 2 * _NUM_TURNS):
        prompt = range(3 + turn, 3 + turn + _SHORT_PROMPT)
        alone_s = min(alone.prefill(Prefill(num_tokens=_SHORT_PROMPT)) for _ in range(3))
        await asyncio.sleep(_PAUSE_S)
        outside_s.append((await one.answer(prompt, max_tokens=1)).ttft_s - alone_s)
    return statistics.median(outside_s[1:])


async def _cycles_s(rig: Rig) -> list[float]:
    found = []
    for rows in _ROWS:
        await rig.serve(max_sequences=rows, max_model_len=128, max_steps_in_flight=1)
        found.append(statistics.median([await _cycle_s(rig, rows) for _ in range(1 + _NUM_TURNS)][1:]))
    return found


async def _cycle_s(rig: Rig, rows: int) -> float:
    return rows / decode_rate(await _answers(rig, rows))


async def _answers(rig: Rig, num: int) -> tuple[Answer, ...]:
    return await rig.answers([_PROMPT] * num, max_tokens=_NUM_TOKENS)
