"""What a step costs beside computing it, measured: a model so small that nearly all of its steps' time is everything
else, through one stage and through two.

    one stage    head + handover + 2 hops + engine        what is left without engine and hops is the head's
    two stages   head + 2 handovers + 3 hops + engines    and what the second stage adds is a handover

This file does not know what the figures are used for.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tllm.lab.forecast import Overhead
from tllm.lab.rig import Answer, Rig, Stage, decode_rate, pipeline
from tllm.testing.checkpoints import tiny_checkpoint

_ROWS = (1, 4, 16)
_PROMPT = tuple(range(3, 11))
_NUM_TOKENS = 48
_NUM_TURNS = 5


async def measure_overhead(stages: Sequence[Stage]) -> Overhead:
    """For workers with those threads and processors; takes some ten seconds."""
    with tempfile.TemporaryDirectory(prefix="tllm-overhead-") as directory:
        tiny = Path(directory)
        tiny_checkpoint(tiny, "llama")
        one_s = await _outside_s(tiny, stages[:1])
        two_s = await _outside_s(tiny, stages[:2]) if len(stages) > 1 else None
    handover_s = 0.0 if two_s is None else max(0.0, statistics.median(b - a for a, b in zip(one_s, two_s, strict=True)))
    return Overhead(rows=_ROWS, head_s=tuple(max(0.0, each - handover_s) for each in one_s), handover_s=handover_s)


async def _outside_s(tiny: Path, stages: Sequence[Stage]) -> list[float]:
    """Seconds of a step that are neither the engines' nor the hops', for each number of rows."""
    async with pipeline(tiny, stages=stages) as rig:
        await rig.measure_speeds()
        found = []
        for rows in _ROWS:
            await rig.serve(max_sequences=rows, max_model_len=128, max_steps_in_flight=1)
            cycles_s = [rows / decode_rate(await _answers(rig, rows)) for _ in range(1 + _NUM_TURNS)][1:]
            expected_s = rig.chain(head_step_s=0.0).round_trip(rows, context=_NUM_TOKENS, num_steps=1).cycle_s
            found.append(statistics.median(cycles_s) - expected_s)
        return found


async def _answers(rig: Rig, num: int) -> tuple[Answer, ...]:
    return await rig.answers([_PROMPT] * num, max_tokens=_NUM_TOKENS)
