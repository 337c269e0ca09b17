"""A worker that cannot start says whose fault it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tllm.cluster.worker import Worker
from tllm.core.config import Deadlines
from tllm.core.errors import EngineError
from tllm.core.types import DType, Epoch
from tllm.transport import pipe, wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FrameLimits

DEADLINE_S = 10.0
LIMITS = FrameLimits(
    epoch=Epoch(7), hidden_size=8, dtype=DType.FLOAT32, max_tokens=4, max_chunks=4, max_blocks=4, vocab_size=16
)
pytestmark = pytest.mark.timeout(30)


class Events:
    """What a worker writes, read back."""

    def __init__(self) -> None:
        self._read = asyncio.StreamReader()
        self.write = self._read.feed_data

    async def drain(self) -> None:
        pass

    async def next(self) -> pb.WorkerEvent:
        event = await asyncio.wait_for(pipe.read_message(self._read, pb.WorkerEvent), DEADLINE_S)
        assert event is not None
        return event


class Loaded:
    """An engine with weights."""

    def __init__(self, allocate: Callable[[int, int], None]) -> None:
        self.allocate = allocate

    def close(self) -> None:
        pass


def has_room(_num_blocks: int, _block_size: int) -> None:
    pass


def has_no_room(_num_blocks: int, _block_size: int) -> None:
    raise EngineError("no memory for the KV cache")


@pytest.mark.parametrize(
    ("allocate", "next_unreachable", "reason"), [(has_room, True, "no stage answered"), (has_no_room, False, "memory")]
)
async def test_a_start_that_fails_says_whether_the_next_stage_is_why(
    tmp_path: Path, allocate: Callable[[int, int], None], next_unreachable: bool, reason: str
) -> None:
    events: Any = Events()
    engine: Any = Loaded(allocate)
    worker = Worker("w-1", events, Deadlines(connect_s=0.2))
    worker._engine, worker._loaded = engine, pb.Load()
    orders: asyncio.Queue[pb.WorkerOrder | None] = asyncio.Queue()
    start = pb.Start(limits=wire.pack_limits(LIMITS), num_blocks=1, block_size=1, next=[f"unix:{tmp_path}/none"])
    orders.put_nowait(pb.WorkerOrder(start=start))
    orders.put_nowait(None)
    await asyncio.wait_for(worker.run(orders), DEADLINE_S)
    failed = (await events.next()).failed
    assert reason in failed.reason
    assert failed.epoch == LIMITS.epoch
    assert failed.next_unreachable == next_unreachable
