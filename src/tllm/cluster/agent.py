"""An agent: one per machine. It attaches to the head, spawns workers as told, passes their orders and events through,
sees to it that their weights are on this machine, and leaves no process behind.

    head ◀── control stream ──▶ agent ──stdin──▶ worker
                                  │   ◀─stdout──
    peers ◀──── shards ───────────┘

A head that is lost is looked for again. Meanwhile the workers go on: their data streams do not pass through here, and a
head that comes back, or another one that was started in its place, finds their weights in memory. After `rejoin_s` they
are ended.

This file does not know what a plan is, nor what workers say to each other. It never imports torch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import socket
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from tllm import __version__
from tllm.cluster.echoes import glance_at_link, measure_link
from tllm.cluster.enrolled import Place
from tllm.cluster.link_bench import carry_out
from tllm.cluster.machine import (
    free_bytes,
    local_host_towards,
    machine_id,
    num_processors,
    platform_name,
    processors,
)
from tllm.cluster.process import WorkerProcess
from tllm.cluster.shards import ShardStore
from tllm.cluster.speeds import SpeedCache
from tllm.core.config import Deadlines, NodeConfig, join_address, split_address, state_directory
from tllm.core.errors import RefusedError, TllmError, TransportError
from tllm.core.types import HEAD
from tllm.transport import rpc
from tllm.transport import wire_pb2 as pb
from tllm.transport.link_bench import LinkBench

log = logging.getLogger(__name__)

_MEMORY_SHARE = 0.9  # of what is free when the agent starts
_PROGRESS_INTERVAL_S = 0.2
_FIRST_RETRY_S = 0.2
_LAST_RETRY_S = 5.0


class Agent:
    """This machine's part in one head's cluster. `tell` gets a line for a person when the head is lost or back."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        address: str,
        identity: rpc.Identity,
        deadlines: Deadlines,
        tell: Callable[[str], None] = log.info,
    ) -> None:
        self._config = config
        self._address = address
        self._identity = identity
        self._deadlines = deadlines
        self._tell = tell
        self._instance = secrets.token_hex(8)
        self._store = ShardStore(state_directory() / "shards")
        self._speeds = SpeedCache(state_directory() / "speeds")
        self._addresses: tuple[str, ...] = ()  # of this agent's own server
        self._stream: rpc.ControlStream | None = None
        self._unsent: deque[pb.AgentMessage] = deque()  # since the states of the workers were last told
        self._workers: dict[str, WorkerProcess] = {}
        self._orders: dict[str, asyncio.Queue[pb.WorkerOrder]] = {}  # that a worker has not been given yet
        self._giving: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_pinned = 0
        self._measuring = asyncio.Lock()  # one thing at a time, or they would slow each other
        self._measured: dict[str, asyncio.Future[pb.WorkerEvent]] = {}
        self._profile = self._own_profile()  # once: what is free now, before any worker is
        local = address.startswith("unix:")
        self._listen_host = config.listen_host or ("" if local else self._profile.host)
        self._advertised_host = config.advertised_host or self._listen_host

    @asynccontextmanager
    async def attached(self) -> AsyncIterator[asyncio.Task[str]]:
        """Join the head; the task serves its orders and returns why it let go of this machine for good.

        Raises RefusedError when the head does not want this node, TransportError when it cannot be reached. When the
        context is left, the head has been told and every worker is gone.
        """
        async with AsyncExitStack() as stack:
            stack.callback(self._store.close)  # when nobody can ask any more
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="tllm-"))
            addresses = [f"unix:{sockets}/agent.sock"]
            if self._listen_host:
                addresses.append(join_address(self._listen_host, self._port(0)))
            server = rpc.Server(
                [rpc.ShardService(self._store), LinkBench()],
                identity=self._identity,
                liveness=rpc.Liveness.of(self._deadlines),
            )
            self._addresses = await server.start(addresses)
            stack.push_async_callback(server.aclose)
            stream = await self._attach()
            serving = asyncio.create_task(self._serve(stream), name="agent")
            try:
                yield serving
            finally:
                serving.cancel()
                await asyncio.wait({serving})
                await self._stop_workers()
                for task in list(self._tasks):
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                if self._stream is not None:
                    await self._stream.aclose()

    # --------------------------------------------------------------------------------------------- attaching

    async def _attach(self) -> rpc.ControlStream:
        self._unsent.clear()
        attach = pb.Attach(
            protocol=rpc.PROTOCOL,
            version=__version__,
            node_id=self._identity.name,
            instance=self._instance,
            profile=self._profile,
            workers=[worker.state for worker in self._workers.values() if worker.state.HasField("load")],
            addresses=[self._advertised(address) for address in self._addresses],
        )
        return await rpc.attach(
            self._address,
            attach,
            identity=self._identity,
            timeout_s=self._deadlines.join_s,
            liveness=rpc.Liveness.of(self._deadlines),
        )

    async def _serve(self, stream: rpc.ControlStream) -> str:
        """Orders of the head, and of the head that comes after it; returns when one lets this machine go."""
        while True:
            try:
                while self._unsent:
                    await stream.send(self._unsent.popleft())
                self._stream = stream
                if (end := await self._take_messages(stream)) is not None and not end.again:
                    return end.reason
                reason = end.reason if end is not None else "the head closed the connection"
            except TransportError as error:
                reason = str(error)
            finally:
                self._stream = None
                await stream.aclose()
            self._tell(f"The head is gone ({reason}). Looking for it; Ctrl-C leaves.")
            try:
                stream = await self._attach_again()
            except RefusedError as error:
                return str(error)
            self._tell("The head is back.")

    async def _attach_again(self) -> rpc.ControlStream:
        """For as long as it takes. Raises RefusedError when there is a head that does not want this node."""
        freeing = asyncio.create_task(self._free_after(self._deadlines.rejoin_s), name="free workers")
        retry_s = _FIRST_RETRY_S
        try:
            while True:
                try:
                    return await self._attach()
                except RefusedError:
                    raise
                except TransportError as error:
                    log.info("%s", error)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)
        finally:
            freeing.cancel()
            await asyncio.wait({freeing})

    async def _free_after(self, rejoin_s: float) -> None:
        await asyncio.sleep(rejoin_s)
        if self._workers:
            self._tell(f"The head has been gone for {rejoin_s:g} s; this machine's memory is free again.")
        await self._stop_workers()

    async def _take_messages(self, stream: rpc.ControlStream) -> pb.Shutdown | None:
        async for message in stream:
            match message.WhichOneof("message"):
                case "worker":
                    await self._take_order(message.worker)
                case "heartbeat":
                    beat = pb.Heartbeat(id=message.heartbeat.id, free_bytes=free_bytes())
                    await stream.send(pb.AgentMessage(heartbeat=beat))
                case "measure":
                    self._in_background(self._measure(message.measure), "measure")
                case "measure_link":
                    self._in_background(self._measure_link(message.measure_link), "measure link")
                case "bench_link":
                    self._in_background(self._bench_link(message.bench_link), "bench link")
                case "shutdown":
                    await self._stop_workers()
                    return message.shutdown
        return None

    def _in_background(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(self, message: pb.AgentMessage) -> None:
        """To the head, if there is one. What it misses it learns from the states of the workers when it is back; what
        happens after those were told, it hears next."""
        if self._stream is None:
            self._unsent.append(message)
            return
        try:
            await self._stream.send(message)
        except TransportError:
            log.info("the head is gone and does not hear of %s", message.WhichOneof("message"))

    # ----------------------------------------------------------------------------------------------- workers

    async def _take_order(self, order: pb.WorkerOrder) -> None:
        """Orders to one worker are carried out one after the other; those to different workers side by side."""
        if order.WhichOneof("order") == "stop":  # whatever it was doing
            self._in_background(self._stop_worker(order.worker_id), f"stop {order.worker_id}")
            return
        if order.WhichOneof("order") == "trace":  # answered beside whatever it does
            if (known := self._workers.get(order.worker_id)) is not None:
                await known.order(order)
            return
        if order.worker_id not in self._orders:
            if order.WhichOneof("order") != "load":
                return
            if (worker := await self._spawn(order.worker_id, order.load.num_threads)) is None:
                return
            orders: asyncio.Queue[pb.WorkerOrder] = asyncio.Queue()
            self._orders[worker.id] = orders
            giving = self._in_background(self._carry_out(worker, orders), f"orders of {worker.id}")
            giving.add_done_callback(partial(_end_on_bug, worker))
            self._giving[worker.id] = giving
        if order.WhichOneof("order") == "load":
            self._workers[order.worker_id].state.load.CopyFrom(order.load)
        self._orders[order.worker_id].put_nowait(order)

    async def _spawn(self, worker_id: str, num_threads: int) -> WorkerProcess | None:
        try:
            worker = await WorkerProcess.spawn(worker_id, num_threads, self._deadlines)
        except OSError as error:
            exited = pb.Exited(code=-1, reason=f"its process could not be started: {error}")
            await self._emit(pb.WorkerEvent(worker_id=worker_id, exited=exited))
            return None
        self._workers[worker_id] = worker
        self._in_background(self._watch(worker), worker_id)
        return worker

    async def _carry_out(self, worker: WorkerProcess, orders: asyncio.Queue[pb.WorkerOrder]) -> None:
        cpus = self._take_processors() if self._config.pin else []
        while True:
            order = await orders.get()
            match order.WhichOneof("order"):
                case "load":
                    order.load.cpus.extend(cpus[: order.load.num_threads] or cpus)
                    if not await self._provide(order):
                        continue
                case "start" if order.start.next_name == HEAD:
                    order.start.next[:] = [self._address]  # as this machine reaches it
            await worker.order(order)

    async def _provide(self, order: pb.WorkerOrder) -> bool:
        """Put into the order where this machine has the weights, once it has them."""
        load, said_s = order.load, 0.0
        for source in load.sources:
            if source.name == HEAD:
                source.addresses[:] = [self._address]  # as this machine reaches it

        def progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal said_s
            if time.monotonic() - said_s < _PROGRESS_INTERVAL_S:
                return
            said_s = time.monotonic()
            loading = pb.Loading(done_bytes=done_bytes, total_bytes=total_bytes, fetching=True)
            event = pb.WorkerEvent(worker_id=order.worker_id, loading=loading)
            self._in_background(self._emit(event), "progress")

        try:
            load.model, fetched = await self._store.provide(load, self._identity, progress)
        except TllmError as error:
            failed = pb.Failed(reason=str(error), number=load.number)
            self._workers[order.worker_id].state.failed.CopyFrom(failed)
            await self._emit(pb.WorkerEvent(worker_id=order.worker_id, failed=failed))
            return False
        self._workers[order.worker_id].state.load.fetched_bytes = fetched
        load.fetched_bytes = fetched
        load.identity.CopyFrom(self._identity.to_message())
        if load.host:
            load.host = self._listen_host or load.host
            load.port = self._port(self._port_number(self._workers[order.worker_id]))
        return True

    async def _watch(self, worker: WorkerProcess) -> None:
        await worker.watch(self._emit)
        self._workers.pop(worker.id, None)
        self._orders.pop(worker.id, None)
        if (giving := self._giving.pop(worker.id, None)) is not None:
            giving.cancel()

    async def _emit(self, event: pb.WorkerEvent) -> None:
        match event.WhichOneof("event"):
            case "loaded":
                addresses = [self._advertised(address) for address in event.loaded.addresses]
                event.loaded.addresses[:] = addresses
                self._workers[event.worker_id].state.loaded.addresses[:] = addresses
            case "measured":
                if (answer := self._measured.get(event.worker_id)) is not None and not answer.done():
                    answer.set_result(event)
                return
            case "exited" | "failed" if event.worker_id in self._measured:
                if not (answer := self._measured[event.worker_id]).done():
                    answer.set_result(event)
                return
        await self._send(pb.AgentMessage(worker=event))

    async def _stop_worker(self, worker_id: str) -> None:
        if (worker := self._workers.get(worker_id)) is not None:
            await worker.stop(self._deadlines.stop_s)

    async def _stop_workers(self) -> None:
        await asyncio.gather(*(worker.stop(self._deadlines.stop_s) for worker in list(self._workers.values())))

    def _take_processors(self) -> list[int]:
        """The processors of this machine, each time beginning with the next one."""
        known = processors()
        num_threads = max(1, (self._config.num_threads or len(known)) // self._config.num_workers)
        first, self._num_pinned = self._num_pinned % len(known), self._num_pinned + num_threads
        return [*known[first:], *known[:first]]

    def _port(self, number: int) -> int:
        """Of the agent (0) and its workers (1, 2, ...): the person's, while they last, else any free one."""
        ports = self._config.ports
        return ports[number] if ports is not None and number < len(ports) else 0

    def _port_number(self, worker: WorkerProcess) -> int:
        """Its own, and of no other worker, for as long as it lives."""
        if not worker.port_number:
            taken = {other.port_number for other in self._workers.values()}
            worker.port_number = next(number for number in itertools.count(1) if number not in taken)
        return worker.port_number

    def _advertised(self, address: str) -> str:
        """As other machines are to call it."""
        if address.startswith("unix:") or not self._advertised_host:
            return address
        return join_address(self._advertised_host, split_address(address, default_port=0)[1])

    # --------------------------------------------------------------------------------------------- measuring

    async def _measure(self, order: pb.Measure) -> None:
        """This machine's speed for a model's shape: as it was measured before, or now, by a worker of its own."""
        async with self._measuring:
            measured = pb.Measured(key=order.key)
            try:
                if (speed := self._speeds.get(order.key)) is None:
                    speed = await self._speed_of_worker(order)
                    self._speeds.put(order.key, speed)
                measured.speed.CopyFrom(speed)
            except (TllmError, TimeoutError, OSError) as error:
                measured.failed = str(error) or f"it took longer than {self._deadlines.measure_s:g} s"
                log.warning("the speed of this machine could not be measured: %s", measured.failed)
            await self._send(pb.AgentMessage(measured=measured))

    async def _speed_of_worker(self, order: pb.Measure) -> pb.Speed:
        worker_id = f"m-{secrets.token_hex(4)}"
        answer: asyncio.Future[pb.WorkerEvent] = asyncio.get_running_loop().create_future()
        self._measured[worker_id] = answer
        try:
            worker = await WorkerProcess.spawn(worker_id, order.num_threads, self._deadlines)
            self._workers[worker_id] = worker
            self._in_background(self._watch(worker), worker_id)
            await worker.order(pb.WorkerOrder(worker_id=worker_id, measure=order))
            async with asyncio.timeout(self._deadlines.measure_s):
                event = await answer
            if event.WhichOneof("event") != "measured":
                reason = event.exited.reason or event.failed.reason
                raise TransportError(f"The worker that was to measure ended: {reason}")
            if event.measured.failed:
                raise TransportError(event.measured.failed)
            return event.measured.speed
        finally:
            await self._stop_worker(worker_id)
            del self._measured[worker_id]

    async def _measure_link(self, order: pb.MeasureLink) -> None:
        async with self._measuring:
            measured = pb.MeasuredLink(node_id=order.node_id)
            addresses = [self._address] if order.node_id == HEAD else list(order.addresses)
            try:
                async with (
                    asyncio.timeout(self._deadlines.measure_s),
                    rpc.ShardClient(addresses, identity=self._identity, peer=order.node_id) as client,
                ):
                    measure = glance_at_link if order.glance else measure_link
                    measured.rtt_s, measured.bytes_per_s = await measure(client)
            except (TllmError, TimeoutError) as error:
                measured.failed = str(error) or f"no answer within {self._deadlines.measure_s:g} s"
            await self._send(pb.AgentMessage(measured_link=measured))

    async def _bench_link(self, order: pb.BenchLink) -> None:
        """Other measurements take their turns between two matrices: one that waited for all of them would be late."""
        addresses = [self._address] if order.node_id == HEAD else list(order.addresses)
        liveness = rpc.Liveness.of(self._deadlines)
        benched = await carry_out(order, addresses, identity=self._identity, turn=self._measuring, liveness=liveness)
        await self._send(pb.AgentMessage(benched_link=benched))

    def _own_profile(self) -> pb.NodeProfile:
        config = self._config
        return pb.NodeProfile(
            name=config.name or socket.gethostname(),
            machine=machine_id(),
            host=config.advertised_host or config.listen_host or local_host_towards(self._address),
            memory_bytes=config.memory_bytes or int(free_bytes() * _MEMORY_SHARE),
            num_threads=config.num_threads or num_processors(),
            device=config.device,
            platform=platform_name(),
            num_workers=config.num_workers,
        )


def _end_on_bug(worker: WorkerProcess, giving: asyncio.Task[None]) -> None:
    """A worker that gets no more orders ends, so that the head does not wait for it."""
    if not giving.cancelled() and (error := giving.exception()) is not None:
        log.error("%s gets no more orders", worker.id, exc_info=error)
        worker.kill(f"Its orders cannot be carried out: {type(error).__name__}: {error}.")


async def own_identity(
    address: str, *, token: str | None, pin: str, place: Place, deadlines: Deadlines
) -> rpc.Identity:
    """Who this machine is for the head with that pin: as before, or newly enrolled at `address`.

    Without a token only a head on this machine, at a Unix socket, enrols. Raises RefusedError or TransportError.
    """
    token_id = None if token is None else rpc.JoinToken.parse(token).token_id
    if (known := place.find(pin, token_id)) is not None:
        return known
    identity = await rpc.enrol(address, token, timeout_s=deadlines.join_s)
    place.keep(pin, identity)
    return identity
