"""Prints what the scheduler costs per step: `python scripts/bench_scheduler.py` at 256 running sequences.

Only `schedule()` and `complete()` are timed; the results they are fed are made outside the clock. The requirement is at
most 1 ms for both together when every sequence decodes. The clock is this process's own CPU time, so that a busy
machine does not count.

This file does not know engines: it answers every step at once with an arbitrary token.
"""

from __future__ import annotations

import argparse
import statistics
import time

from tllm.core.types import Sampled, SamplingParams, Step, StepResult, TokenId
from tllm.scheduler.scheduler import Scheduler, SchedulerConfig, SequenceRequest

BLOCK_SIZE = 32
REQUIREMENT_MS = 1.0

clock = time.process_time


def answer(step: Step) -> StepResult:
    return StepResult(
        step=step.id,
        epoch=step.epoch,
        sampled=tuple(Sampled(seq=chunk.seq, token=TokenId(7)) for chunk in step.chunks if chunk.sampling is not None),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512, help="tokens per prompt, all different")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--penalties", action="store_true", help="give every request a frequency penalty")
    arguments = parser.parse_args()

    length = arguments.prompt + arguments.steps + arguments.sequences  # the first decode while the last prefill
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=arguments.sequences * (length // BLOCK_SIZE + 2),
            block_size=BLOCK_SIZE,
            max_model_len=length + 1,
            max_batch_tokens=8192,
            mixed_prefill_tokens=8192,
            max_sequences=arguments.sequences,
        )
    )
    params = SamplingParams(max_tokens=length, frequency_penalty=0.5 if arguments.penalties else 0.0)
    for index in range(arguments.sequences):
        prompt = tuple(TokenId(index * arguments.prompt + offset) for offset in range(arguments.prompt))
        scheduler.add(SequenceRequest(prompt=prompt, params=params))

    prefill_s, decode_s = [], []
    while len(decode_s) < arguments.steps:
        begin = clock()
        step = scheduler.schedule()
        scheduled = clock()
        assert step is not None
        result = answer(step)
        answered = clock()
        scheduler.complete(result)
        elapsed_s = (scheduled - begin) + (clock() - answered)
        is_decode = len(step.chunks) == arguments.sequences == step.num_tokens
        (decode_s if is_decode else prefill_s).append(elapsed_s)

    median_ms = statistics.median(decode_s) * 1e3
    p99_ms = statistics.quantiles(decode_s, n=100)[98] * 1e3
    print(f"decode   {median_ms:.3f} ms per step (median), {p99_ms:.3f} ms (99th percentile), {arguments.steps} steps")
    per_sequence_us = median_ms * 1e3 / arguments.sequences
    print(f"         {per_sequence_us:.2f} us per sequence; required: at most {REQUIREMENT_MS} ms per step of 256")
    print(f"prefill  {statistics.mean(prefill_s) * 1e3:.3f} ms per step (mean), {len(prefill_s)} steps of 8192 tokens")


if __name__ == "__main__":
    main()
