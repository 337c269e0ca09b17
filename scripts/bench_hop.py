#!/usr/bin/env python
"""How long one hop of the pipeline takes: encode, send, receive, decode, between two processes of this machine.

    this process ── StepFrame ─▶ echo process         one way: the echo's clock on arrival minus the clock in the frame
                 ◀─ StepFrame ──                      (CLOCK_MONOTONIC, which the processes of one machine share)

Half of the round trip is printed beside it. Over TCP both ends speak TLS, as between machines. Times are those of an
idle pipeline: one frame is under way at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tllm.core.types import (
    Activation,
    BlockId,
    Chunk,
    DType,
    Epoch,
    SamplingParams,
    SamplingState,
    SequenceId,
    Step,
    StepId,
    TokenId,
)
from tllm.testing.identities import members
from tllm.transport import rpc
from tllm.transport.base import FrameLimits, StepFrame

T = TypeVar("T")

HIDDEN_SIZE = 2048
ROW_BYTES = HIDDEN_SIZE * DType.BFLOAT16.num_bytes
SIZES = (ROW_BYTES, 64 << 10, 1 << 20)
NUM_BLOCKS = 16
WARM_UP = 50
TIMEOUT_S = 30.0

LIMITS = FrameLimits(
    epoch=Epoch(1),
    hidden_size=HIDDEN_SIZE,
    dtype=DType.BFLOAT16,
    max_tokens=512,
    max_chunks=256,
    max_blocks=64,
    vocab_size=128256,
)


def frame(num_bytes: int) -> StepFrame:
    """A chunk of as many tokens as fill `num_bytes` of hidden states: one for 4 KB, which is a decode."""
    num_tokens = num_bytes // ROW_BYTES
    chunk = Chunk(
        seq=SequenceId(1),
        start=1000,
        tokens=tuple(TokenId(token) for token in range(num_tokens)),
        blocks=tuple(BlockId(block) for block in range(NUM_BLOCKS)),
        sampling=SamplingState(params=SamplingParams(temperature=0.7, top_p=0.9, seed=7), position=1000 + num_tokens),
    )
    return StepFrame(
        step=Step(id=StepId(1), epoch=LIMITS.epoch, chunks=(chunk,)),
        hidden=Activation(data=os.urandom(num_bytes), dtype=DType.BFLOAT16, shape=(num_tokens, HIDDEN_SIZE)),
    )


def numbered(message: StepFrame, number: int) -> StepFrame:
    """The frame with a time in nanoseconds for its step's id."""
    return replace(message, step=replace(message.step, id=StepId(number)))


async def echo(listen: str, answer: str, directory: str) -> None:
    """Send every frame back, with the time it took to come here."""
    stage = rpc.StageServer()
    (identity,) = members(Path(directory), "there")
    server = rpc.Server([stage], identity=identity)
    await server.start([listen])
    inbox = stage.expect(LIMITS)
    link = await rpc.connect([answer], LIMITS, identity=identity, peer="here", timeout_s=TIMEOUT_S)
    async for message in inbox:
        assert isinstance(message, StepFrame)
        one_way_ns = time.monotonic_ns() - message.step.id
        await link.send(numbered(message, one_way_ns))
    await link.aclose()
    await server.aclose()


async def measure(
    listen: str, peer: str, directory: str, num_frames: int
) -> dict[int, tuple[list[float], list[float]]]:
    """For every size, one-way times and halves of round trips in seconds."""
    stage = rpc.StageServer()
    (identity,) = members(Path(directory), "here")
    server = rpc.Server([stage], identity=identity)
    await server.start([listen])
    inbox = stage.expect(LIMITS)
    link = await rpc.connect([peer], LIMITS, identity=identity, peer="there", timeout_s=TIMEOUT_S)
    figures = {}
    for num_bytes in SIZES:
        message, one_ways, halves = frame(num_bytes), [], []
        for round_ in range(WARM_UP + num_frames):
            sent_ns = time.monotonic_ns()
            await link.send(numbered(message, sent_ns))
            answer = await anext(inbox)
            assert isinstance(answer, StepFrame)
            if round_ >= WARM_UP:
                halves.append((time.monotonic_ns() - sent_ns) / 2e9)
                one_ways.append(answer.step.id / 1e9)
        figures[num_bytes] = (one_ways, halves)
    await link.aclose()
    await server.aclose()
    return figures


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(main: Coroutine[None, None, T], loop: str) -> T:
    if loop == "uvloop":
        import uvloop

        return uvloop.run(main)
    return asyncio.run(main)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500, help="frames of every size and run")
    parser.add_argument("--runs", type=int, default=5, help="runs; the one with the best median is printed")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--echo", nargs=3, metavar=("LISTEN", "ANSWER", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        run(echo(*arguments.echo), arguments.loop)
        return
    print(f"{'':4} {'bytes':>8}  {'one way, us':^27}  {'half a round trip, us':^27}")
    print(f"{'':4} {'':>8}  {'p50':>8} {'p95':>8} {'p99':>8}   {'p50':>8} {'p95':>8} {'p99':>8}")
    for kind in ("unix", "tcp"):
        best: dict[int, tuple[list[float], list[float]]] = {}
        for _ in range(arguments.runs):
            with tempfile.TemporaryDirectory() as directory:
                if kind == "unix":
                    here, there = f"unix:{directory}/here", f"unix:{directory}/there"
                else:
                    here, there = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
                child = subprocess.Popen(
                    [sys.executable, __file__, "--loop", arguments.loop, "--echo", there, here, directory]
                )
                try:
                    figures = run(measure(here, there, directory, arguments.frames), arguments.loop)
                    child.wait(TIMEOUT_S)
                finally:
                    child.kill()
                    child.wait()
            for num_bytes, pair in figures.items():
                if num_bytes not in best or statistics.median(pair[0]) < statistics.median(best[num_bytes][0]):
                    best[num_bytes] = pair
        for num_bytes, pair in best.items():
            columns = [[f"{percentile(times, p) * 1e6:8.0f}" for p in (0.5, 0.95, 0.99)] for times in pair]
            print(f"{kind:4} {num_bytes:>8}  {' '.join(columns[0])}   {' '.join(columns[1])}")


if __name__ == "__main__":
    main()
