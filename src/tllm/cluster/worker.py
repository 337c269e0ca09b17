"""A worker: one process that holds one shard and serves one place of the pipeline, or times what one would take.

    stdin   orders from the agent        load, start, ping, measure, trace, stop
    stdout  events to the agent          loading, loaded, ready, pong, measured, traced, failed
    stage   steps in from the stage before, results out to the next stage or home

The end of stdin is an order to stop: a worker does not outlive its agent. Another load order makes it the worker of
another shard, and it reads only what it has not got.

This file does not know requests, plans or other workers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from tllm.cluster.history import StageHistory
from tllm.cluster.loads import alike
from tllm.cluster.machine import end_with_parent
from tllm.cluster.measure import measure_speed
from tllm.cluster.speeds import to_message
from tllm.cluster.stage import run_stage
from tllm.core.config import Deadlines, join_address
from tllm.core.errors import ConfigError, EngineError, TllmError, TransportError
from tllm.core.types import DType, Epoch, Quantization
from tllm.engines.base import Engine, EngineConfig
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard
from tllm.transport import pipe, rpc, wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import Link

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_PROGRESS_INTERVAL_S = 0.1


class NextUnreachableError(TransportError):
    """The stage after this one, or the head after the last, did not let this worker connect."""


@dataclass(slots=True, kw_only=True)
class _Stage:
    """What exists between a start and the next start, load or stop."""

    inbox: rpc.Inbox
    link: Link
    task: asyncio.Task[None]


class ComputeThread(ThreadPoolExecutor):
    """The one thread that computes, and for how long it has been at what it does."""

    def __init__(self) -> None:
        super().__init__(max_workers=1, thread_name_prefix="compute")
        self._since_s: float | None = None

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def timed() -> T:
            self._since_s = time.monotonic()
            try:
                return work(*args, **kwargs)
            finally:
                self._since_s = None

        return super().submit(timed)

    def busy_s(self) -> float:
        since_s = self._since_s
        return 0.0 if since_s is None else time.monotonic() - since_s


class Worker:
    """Carries out orders until told to stop."""

    def __init__(self, worker_id: str, events: asyncio.StreamWriter, deadlines: Deadlines) -> None:
        self._id = worker_id
        self._events = events
        self._deadlines = deadlines
        self._liveness = rpc.Liveness.of(deadlines)
        self._compute = ComputeThread()
        self._directory = tempfile.TemporaryDirectory(prefix="tllm-")  # mode 0700: only this user's processes
        self._engine: Engine | None = None
        self._loaded: pb.Load | None = None  # what the engine holds
        self._shard: Shard | None = None
        self._stages = rpc.StageServer()
        self._server: rpc.Server | None = None
        self._addresses: tuple[str, ...] = ()
        self._stage: _Stage | None = None
        self._history = StageHistory()
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
                        failed = pb.Failed(
                            reason=str(error),
                            number=order.load.number,
                            epoch=order.start.limits.epoch,
                            next_unreachable=isinstance(error, NextUnreachableError),
                        )
                        await self._emit(pb.WorkerEvent(failed=failed))
            finally:
                await self._aclose()

    async def pong(self) -> None:
        """Answer a ping: the event loop runs."""
        await self._emit(pb.WorkerEvent(pong=pb.Pong(busy_s=self._compute.busy_s())))

    async def say_traced(self, order: pb.Trace) -> None:
        """Answer what was noted of some steps, and what time it is."""
        await self._emit(pb.WorkerEvent(traced=self._history.answer(order)))

    async def _carry_out(self, order: pb.WorkerOrder, tasks: asyncio.TaskGroup) -> None:
        match order.WhichOneof("order"):
            case "load":
                await self._load(order.load)
            case "start":
                await self._start(order.start, tasks)
            case "measure":
                await self._measure(order.measure)

    # ------------------------------------------------------------------------------------------------ load

    async def _load(self, load: pb.Load) -> None:
        began = time.perf_counter()
        await self._end_stage()
        if load.cpus and sys.platform == "linux":
            os.sched_setaffinity(0, load.cpus)
        shard = Shard(first_layer=load.first_layer, last_layer=load.last_layer, embed=load.embed, head=load.head)
        loop = asyncio.get_running_loop()

        def progress(done_bytes: int, total_bytes: int) -> None:
            loop.call_soon_threadsafe(self._report_loading, done_bytes, total_bytes)

        def read(known: Engine | None) -> Engine:
            checkpoint = Checkpoint.open(Path(load.model))
            if checkpoint.fingerprint != load.fingerprint:
                raise ConfigError(
                    f"The checkpoint at {checkpoint.directory} is not the one that the head serves: its config or "
                    "tensors differ. Copy the head's files, or remove these."
                )
            if known is not None:
                known.reload(checkpoint, shard, progress)
                return known
            engine = make_engine(load.engine, engine_config(load, shard))
            engine.load(checkpoint, progress)
            return engine

        known, self._engine = self._engine, None
        if known is not None and (self._loaded is None or not alike(self._loaded, load)):
            await self._on_compute_thread(known.close)
            known = None
        engine = await self._on_compute_thread(lambda: read(known))
        self._engine, self._loaded, self._shard = engine, load, shard
        await self._listen(load)
        loaded = pb.Loaded(
            free_bytes=engine.free_bytes(),
            addresses=self._addresses,
            load_s=time.perf_counter() - began,
            fetched_bytes=load.fetched_bytes,
            number=load.number,
        )
        await self._emit(pb.WorkerEvent(loaded=loaded))

    async def _listen(self, load: pb.Load) -> None:
        """Neighbours of this machine come over a Unix socket, others, once there are any, to the host's interface."""
        have_host = len(self._addresses) > 1
        if self._server is not None and have_host == bool(load.host):
            return
        if self._server is not None:
            await self._server.aclose()
        addresses = [f"unix:{self._directory.name}/stage.sock"]
        if load.host:
            addresses.append(join_address(load.host, load.port))
        self._stages = rpc.StageServer()
        self._server = rpc.Server([self._stages], identity=self._identity(), liveness=self._liveness)
        self._addresses = await self._server.start(addresses)

    def _identity(self) -> rpc.Identity | None:
        assert self._loaded is not None
        return rpc.Identity.from_message(self._loaded.identity) if self._loaded.HasField("identity") else None

    def _report_loading(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._loading_reported_s < _PROGRESS_INTERVAL_S and done_bytes < total_bytes:
            return
        self._loading_reported_s = now
        event = pb.WorkerEvent(worker_id=self._id, loading=pb.Loading(done_bytes=done_bytes, total_bytes=total_bytes))
        pipe.write_message(self._events, event)

    # ----------------------------------------------------------------------------------------------- start

    async def _start(self, start: pb.Start, tasks: asyncio.TaskGroup) -> None:
        engine = self._engine
        if engine is None:
            raise EngineError("This worker was told to start before it had loaded a shard.")
        await self._end_stage()
        limits = wire.unpack_limits(start.limits)
        await self._on_compute_thread(lambda: engine.allocate(start.num_blocks, start.block_size))
        journal = self._history.journal
        inbox = self._stages.expect(limits, sender=start.previous_name, journal=journal)
        try:
            link = await rpc.connect(
                tuple(start.next),
                limits,
                identity=self._identity(),
                peer=start.next_name,
                timeout_s=self._deadlines.connect_s,
                liveness=self._liveness,
                journal=journal,
            )
        except BaseException as error:
            await inbox.aclose()
            if isinstance(error, TransportError):
                raise NextUnreachableError(str(error)) from error
            raise
        task = tasks.create_task(self._serve_stage(engine, inbox, link, limits.epoch), name="stage")
        self._stage = _Stage(inbox=inbox, link=link, task=task)
        await self._emit(pb.WorkerEvent(ready=pb.Ready(epoch=limits.epoch)))

    async def _serve_stage(self, engine: Engine, inbox: rpc.Inbox, link: Link, epoch: int) -> None:
        """Until a neighbour is lost. Both links are closed then, so that the loss travels along the pipeline to the
        head even while nobody hears the agents; it is reported, and the worker waits for the next order."""
        assert self._shard is not None
        self._history.begin(Epoch(epoch), self._shard)
        try:
            await run_stage(engine, self._shard, inbox, link, self._compute, self._history.journal)
        except TransportError as error:
            log.warning("epoch %d ended: %s", epoch, error)
            await self._emit(pb.WorkerEvent(failed=pb.Failed(reason=str(error), epoch=epoch)))
            await asyncio.gather(inbox.aclose(), link.aclose())

    async def _end_stage(self) -> None:
        if (stage := self._stage) is None:
            return
        self._stage = None
        stage.task.cancel()
        await asyncio.wait({stage.task})
        await stage.link.aclose()
        await stage.inbox.aclose()

    # --------------------------------------------------------------------------------------------- measure

    async def _measure(self, order: pb.Measure) -> None:
        """Time a shard of zeros; the engine of a load, if there is one, is not touched."""

        def measure() -> pb.Speed:
            with tempfile.TemporaryDirectory(prefix="tllm-measure-") as directory:
                return to_message(measure_speed(order, make_engine, Path(directory)))

        speed = await self._on_compute_thread(measure)
        await self._emit(pb.WorkerEvent(measured=pb.Measured(key=order.key, speed=speed)))

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


def engine_config(load: pb.Load, shard: Shard) -> EngineConfig:
    return EngineConfig(
        shard=shard,
        dtype=DType(load.dtype),
        quantization=Quantization.parse(load.quantization) if load.quantization else None,
        device=load.device,
        num_threads=load.num_threads or None,
        max_positions=load.max_positions or None,
    )


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


async def _main(worker_id: str, log_level: str, deadlines: Deadlines) -> None:
    loop = asyncio.get_running_loop()
    # Events have stdout to themselves: whatever a library prints goes to stderr instead.
    events_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=log_level, stream=sys.stderr, format=f"{worker_id} %(name)s: %(message)s")

    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(events_fd, "wb"))
    events = asyncio.StreamWriter(transport, protocol, None, loop)

    queue: asyncio.Queue[pb.WorkerOrder | None] = asyncio.Queue()

    async def read_orders() -> None:
        while (order := await pipe.read_message(orders, pb.WorkerOrder)) is not None:
            match order.WhichOneof("order"):  # some are answered whatever else it is at
                case "ping":
                    await worker.pong()
                case "trace":
                    await worker.say_traced(order.trace)
                case _:
                    await queue.put(order)
        await queue.put(None)

    worker = Worker(worker_id, events, deadlines)
    reading = asyncio.create_task(read_orders(), name="orders")
    working = asyncio.create_task(worker.run(queue), name="worker")
    await asyncio.wait({reading, working}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():  # stdin ended, so the agent is gone; the compute thread may be busy for long
        await asyncio.wait({working}, timeout=deadlines.stop_s)
        if not working.done():
            os._exit(1)
    reading.cancel()
    working.result()


def main() -> None:
    """`python -m tllm.cluster.worker ID LOG_LEVEL PARENT DEADLINES`; PARENT is the process id of its agent."""
    worker_id, log_level, parent, deadlines = sys.argv[1:]
    end_with_parent(int(parent))
    asyncio.run(_main(worker_id, log_level, Deadlines(**json.loads(deadlines))))


if __name__ == "__main__":
    main()
