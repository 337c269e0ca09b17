"""One place of the pipeline at work: steps in, an engine on its one compute thread, results out.

    receive ──▶ compute (one thread) ──▶ send         three tasks, bounded queues between them

The event loop never computes and the compute thread never waits for the network. Steps are computed in the order in
which they arrive. A step that fails is answered with `StepFailed`, and failures of earlier stages are passed on.

This file does not know processes, orders or requests.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from tllm.core.errors import TransportError
from tllm.core.types import Activation, StepFailed
from tllm.engines.base import Engine
from tllm.models.spec import Shard
from tllm.transport.base import Link, StageMessage, StepFrame
from tllm.transport.journal import Journal, Point
from tllm.transport.rpc import Inbox

log = logging.getLogger(__name__)

_QUEUE_STEPS = 64  # received or computed and not yet passed on; the head keeps far fewer in flight


async def run_stage(
    engine: Engine, shard: Shard, inbox: Inbox, link: Link, compute_thread: Executor, journal: Journal | None = None
) -> None:
    """Until cancelled. Raises TransportError when a neighbour is lost; the engine is then between two steps. `journal`
    is told when a step is computed."""
    journal = journal or Journal(1)
    received: asyncio.Queue[StageMessage] = asyncio.Queue(_QUEUE_STEPS)
    computed: asyncio.Queue[StageMessage] = asyncio.Queue(_QUEUE_STEPS)
    loop = asyncio.get_running_loop()

    async def receive() -> None:
        async for message in inbox:
            await received.put(message)
        raise TransportError("the stage before this one closed its stream")

    async def compute() -> None:
        while True:
            message = await received.get()
            if isinstance(message, StepFrame):
                message = await loop.run_in_executor(compute_thread, _step, engine, shard, message, journal)
            await computed.put(message)

    async def send() -> None:
        while True:
            await link.send(await computed.get())

    try:
        async with asyncio.TaskGroup() as tasks:
            for work in (receive, compute, send):
                tasks.create_task(work(), name=work.__name__)
    except ExceptionGroup as group:
        _, bugs = group.split(TransportError)
        if bugs is not None:
            raise
        raise TransportError("; ".join(str(error) for error in group.exceptions)) from group


def _step(engine: Engine, shard: Shard, frame: StepFrame, journal: Journal) -> StageMessage:
    """One of the two places that catch everything: whatever a step raises becomes its answer."""
    step = frame.step
    journal.mark(step.epoch, step.id, Point.BEGAN)
    try:
        outcome = engine.forward(step, frame.hidden)
    except Exception as error:
        log.exception("step %d failed", step.id)
        layers = (shard.first_layer, shard.last_layer)
        return StepFailed(step=step.id, epoch=step.epoch, layers=layers, reason=f"{type(error).__name__}: {error}")
    finally:
        journal.mark(step.epoch, step.id, Point.ENDED)
    return StepFrame(step=step, hidden=outcome) if isinstance(outcome, Activation) else outcome
