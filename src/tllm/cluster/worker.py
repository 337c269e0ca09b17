"""A worker: one process that holds one shard and serves one place of the pipeline.

    stdin   orders from the agent        load, start, stop
    stdout  events to the agent          loading, loaded, ready, failed
    stage   steps in from the stage before, results out to the next stage or home

The end of stdin is an order to stop: a worker does not outlive its agent.

This file does not know requests, plans or other workers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from tllm.cluster.stage import run_stage
from tllm.core.config import Deadlines, join_address
from tllm.core.errors import ConfigError, EngineError, TllmError, TransportError
from tllm.core.types import DType
from tllm.engines.base import Engine, EngineConfig
from tllm.models.checkpoint import Checkpoint
from tllm.models.repository import resolve_model
from tllm.models.spec import Shard
from tllm.transport import pipe, rpc, wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import Link

log = logging.getLogger(__name__)

T = TypeVar("T")

_PROGRESS_INTERVAL_S = 0.1


@dataclass(slots=True, kw_only=True)
class _Stage:
    """What exists between a start and the next start or stop."""

    inbox: rpc.Inbox
    link: Link
    task: asyncio.Task[None]


class Worker:
    """Carries out orders until told to stop."""

    def __init__(self, worker_id: str, events: asyncio.StreamWriter, deadlines: Deadlines) -> None:
        self._id = worker_id
        self._events = events
        self._deadlines = deadlines
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._directory = tempfile.TemporaryDirectory(prefix="tllm-")  # mode 0700: only this user's processes
        self._engine: Engine | None = None
        self._shard: Shard | None = None
        self._server: rpc.StageServer | None = None
        self._stage: _Stage | None = None
        self._loading_reported_s = 0.0

    async def run(self, orders: asyncio.Queue[pb.WorkerOrder | None]) -> None:
        """Return when told to stop or when orders end. A failed order is reported and leaves the worker; a bug in what
        an order started ends it."""
        async with asyncio.TaskGroup() as tasks:
            try:
                while (order := await orders.get()) is not None and order.WhichOneof("order") != "stop":
                    try:
                        await self._carry_out(order, tasks)
                    except TllmError as error:
                        log.error("%s", error)
                        await self._emit(pb.WorkerEvent(failed=pb.Failed(reason=str(error))))
            finally:
                await self._aclose()

    async def _carry_out(self, order: pb.WorkerOrder, tasks: asyncio.TaskGroup) -> None:
        match order.WhichOneof("order"):
            case "load":
                await self._load(order.load)
            case "start":
                await self._start(order.start, tasks)

    # ------------------------------------------------------------------------------------------------ load

    async def _load(self, load: pb.Load) -> None:
        began = time.perf_counter()
        if load.cpus and sys.platform == "linux":
            os.sched_setaffinity(0, load.cpus)
        shard = Shard(first_layer=load.first_layer, last_layer=load.last_layer, embed=load.embed, head=load.head)
        loop = asyncio.get_running_loop()

        def progress(done_bytes: int, total_bytes: int) -> None:
            loop.call_soon_threadsafe(self._report_loading, done_bytes, total_bytes)

        def read() -> Engine:
            checkpoint = Checkpoint.open(resolve_model(load.model))
            if checkpoint.fingerprint != load.fingerprint:
                raise ConfigError(
                    f"The checkpoint at {checkpoint.directory} is not the one that the head serves: its config or "
                    "tensors differ. Copy the head's files, or remove these."
                )
            config = EngineConfig(
                shard=shard,
                dtype=DType(load.dtype),
                device=load.device,
                num_threads=load.num_threads or None,
                max_positions=load.max_positions or None,
            )
            engine = make_engine(load.engine, config)
            engine.load(checkpoint, progress)
            return engine

        self._engine = engine = await self._on_compute_thread(read)
        self._shard = shard
        self._server = rpc.StageServer()
        addresses = [f"unix:{self._directory.name}/stage.sock"]
        if load.host:
            addresses.append(join_address(load.host, 0))
        bound = await self._server.start(addresses)
        loaded = pb.Loaded(
            free_bytes=engine.free_bytes(),
            weight_bytes=engine.statistics().weight_bytes,
            addresses=bound,
            load_s=time.perf_counter() - began,
            pid=os.getpid(),
        )
        await self._emit(pb.WorkerEvent(loaded=loaded))

    def _report_loading(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._loading_reported_s < _PROGRESS_INTERVAL_S and done_bytes < total_bytes:
            return
        self._loading_reported_s = now
        event = pb.WorkerEvent(worker_id=self._id, loading=pb.Loading(done_bytes=done_bytes, total_bytes=total_bytes))
        pipe.write_message(self._events, event)

    # ----------------------------------------------------------------------------------------------- start

    async def _start(self, start: pb.Start, tasks: asyncio.TaskGroup) -> None:
        engine, server = self._engine, self._server
        if engine is None or server is None:
            raise EngineError("This worker was told to start before it had loaded a shard.")
        await self._end_stage()
        limits = wire.unpack_limits(start.limits)
        await self._on_compute_thread(lambda: engine.allocate(start.num_blocks, start.block_size))
        inbox = server.expect(limits)
        link = await rpc.connect(tuple(start.next), limits, timeout_s=self._deadlines.start_s)
        task = tasks.create_task(self._serve_stage(engine, inbox, link, limits.epoch), name="stage")
        self._stage = _Stage(inbox=inbox, link=link, task=task)
        await self._emit(pb.WorkerEvent(ready=pb.Ready(epoch=limits.epoch)))

    async def _serve_stage(self, engine: Engine, inbox: rpc.Inbox, link: Link, epoch: int) -> None:
        """Until a neighbour is lost; the loss is reported, and the worker waits for the next order."""
        assert self._shard is not None
        try:
            await run_stage(engine, self._shard, inbox, link, self._compute)
        except TransportError as error:
            log.warning("epoch %d ended: %s", epoch, error)
            await self._emit(pb.WorkerEvent(failed=pb.Failed(reason=str(error))))

    async def _end_stage(self) -> None:
        if (stage := self._stage) is None:
            return
        self._stage = None
        stage.task.cancel()
        await asyncio.wait({stage.task})
        await stage.link.aclose()
        await stage.inbox.aclose()

    # ------------------------------------------------------------------------------------------------ rest

    async def _on_compute_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._compute, work)

    async def _emit(self, event: pb.WorkerEvent) -> None:
        event.worker_id = self._id
        pipe.write_message(self._events, event)
        await self._events.drain()

    async def _aclose(self) -> None:
        await self._end_stage()
        if self._server is not None:
            await self._server.aclose()
        if (engine := self._engine) is not None:
            await self._on_compute_thread(engine.close)
        self._compute.shutdown()
        self._directory.cleanup()


def make_engine(name: str, config: EngineConfig) -> Engine:
    """The engine of that name; its framework is imported here and not before. Raises ConfigError."""
    match name:
        case "torch":
            try:
                from tllm.engines.torch.engine import TorchEngine
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"This node has no {error.name}. Install it with: pip install 'tllm[torch]'"
                ) from error
            return TorchEngine(config)
        case _:
            raise ConfigError(f"There is no engine {name!r}; there is: torch.")


async def _main(worker_id: str, log_level: str) -> None:
    loop = asyncio.get_running_loop()
    # Events have stdout to themselves: whatever a library prints goes to stderr instead.
    events_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=log_level, stream=sys.stderr, format=f"{worker_id} %(name)s: %(message)s")

    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(events_fd, "wb"))
    events = asyncio.StreamWriter(transport, protocol, None, loop)

    deadlines = Deadlines()
    queue: asyncio.Queue[pb.WorkerOrder | None] = asyncio.Queue()

    async def read_orders() -> None:
        while (order := await pipe.read_message(orders, pb.WorkerOrder)) is not None:
            await queue.put(order)
        await queue.put(None)

    reading = asyncio.create_task(read_orders(), name="orders")
    worker = asyncio.create_task(Worker(worker_id, events, deadlines).run(queue), name="worker")
    await asyncio.wait({reading, worker}, return_when=asyncio.FIRST_COMPLETED)
    if not worker.done():  # stdin ended, so the agent is gone; the compute thread may be busy for long
        await asyncio.wait({worker}, timeout=deadlines.stop_s)
        if not worker.done():
            os._exit(1)
    reading.cancel()
    worker.result()


def main() -> None:
    """`python -m tllm.cluster.worker ID LOG_LEVEL`, spawned by an agent."""
    worker_id, log_level = sys.argv[1:]
    asyncio.run(_main(worker_id, log_level))


if __name__ == "__main__":
    main()
