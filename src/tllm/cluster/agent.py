"""An agent: one per machine. It attaches to the head, spawns workers as told, passes their orders and events through
unchanged, and leaves no process behind.

    head ◀── control stream ──▶ agent ──stdin──▶ worker
                                      ◀─stdout──

This file does not know what a plan is, nor what workers say to each other. It never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from tllm import __version__
from tllm.core.config import Deadlines, NodeConfig
from tllm.core.errors import FrameError, TransportError
from tllm.transport import pipe, rpc
from tllm.transport import wire_pb2 as pb

log = logging.getLogger(__name__)

_STDERR_BYTES = 4096  # kept of every worker, to say why it died
_SPIN_COUNT = 10_000
_MEMORY_SHARE = 0.9  # of what is free when the agent starts


class WorkerProcess:
    """One child process, from spawn to reaping."""

    def __init__(self, worker_id: str, process: asyncio.subprocess.Process) -> None:
        self.id = worker_id
        self._process = process
        self._stderr = b""  # its last words

    @classmethod
    async def spawn(cls, worker_id: str, num_threads: int) -> WorkerProcess:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tllm.cluster.worker", worker_id, logging.getLevelName(log.getEffectiveLevel())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=worker_environment(num_threads),
            start_new_session=True,  # a Ctrl-C in the terminal is the agent's to handle
        )
        return cls(worker_id, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def order(self, order: pb.WorkerOrder) -> None:
        """Hand an order over. A worker that is gone does not take it; its end is reported by `watch`."""
        assert self._process.stdin is not None
        pipe.write_message(self._process.stdin, order)
        try:
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            log.info("%s ended before it took an order", self.id)

    async def watch(self, emit: Callable[[pb.WorkerEvent], Awaitable[None]]) -> None:
        """Pass its events on until it ends, then say how it ended."""
        assert self._process.stdout is not None
        errors = asyncio.create_task(self._read_stderr())
        reason = ""
        try:
            while (event := await pipe.read_message(self._process.stdout, pb.WorkerEvent)) is not None:
                await emit(event)
        except FrameError as error:
            reason = f"its events cannot be read: {error}"
            self._process.kill()
        code = await self._process.wait()
        await errors
        exited = pb.Exited(code=code, reason=reason or self._stderr.decode(errors="replace").strip())
        await emit(pb.WorkerEvent(worker_id=self.id, exited=exited))

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(_STDERR_BYTES):
            log.debug("%s", data.decode(errors="replace").rstrip())
            self._stderr = (self._stderr + data)[-_STDERR_BYTES:]

    async def stop(self, deadline_s: float) -> None:
        """Ask it to end, and end it if it has not by then. Returns when it is reaped."""
        if self._process.returncode is not None:
            return
        await self.order(pb.WorkerOrder(worker_id=self.id, stop=pb.Stop()))
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(deadline_s):
                await self._process.wait()
        except TimeoutError:
            log.warning("%s did not stop within %g s and is killed", self.id, deadline_s)
            self._process.kill()
            await self._process.wait()


def worker_environment(num_threads: int) -> dict[str, str]:
    """What a process that computes with `num_threads` threads (0: all) should find set, beside what a person has set.

    OpenMP reads it when the framework is imported, which is before any order could say it. Its threads wait for each
    other by spinning, by default for milliseconds; when anything else wants one of their cores, all of them then wait
    for one that does not run, and a step takes ten times as long. About 20 us of spinning costs nothing when the
    machine is quiet and halves the speed, no worse, when it is not (docs/lab/LOG.md, 2026-11-21).
    """
    environment = dict(os.environ)
    if num_threads:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(_SPIN_COUNT))
    return environment


class Agent:
    """This machine's part in one head's cluster."""

    def __init__(self, config: NodeConfig, *, token: str, deadlines: Deadlines) -> None:
        self._config = config
        self._token = token
        self._deadlines = deadlines
        self._workers: dict[str, WorkerProcess] = {}
        self._num_pinned = 0

    @asynccontextmanager
    async def attached(self, address: str) -> AsyncIterator[asyncio.Task[str]]:
        """Join the head at `address`; the task serves its orders and returns why it let go of this machine.

        Raises TransportError when the head cannot be reached or refuses. When the context is left, the head has been
        told and every worker is gone.
        """
        attach = pb.Attach(
            protocol=rpc.PROTOCOL, version=__version__, token=self._token, profile=self._profile(address)
        )
        stream = await rpc.attach(address, attach, timeout_s=self._deadlines.join_s)
        serving = asyncio.create_task(self._serve(stream), name="agent")
        try:
            yield serving
        finally:
            serving.cancel()
            await asyncio.wait({serving})
            await self._stop_workers()
            await stream.aclose()

    async def _serve(self, stream: rpc.ControlStream) -> str:
        async def emit(event: pb.WorkerEvent) -> None:
            await stream.send(pb.AgentMessage(worker=event))

        watching: set[asyncio.Task[None]] = set()
        try:
            async for message in stream:
                match message.WhichOneof("message"):
                    case "worker":
                        await self._take_order(message.worker, emit, watching)
                    case "shutdown":
                        return str(message.shutdown.reason)
            return "the head closed the connection"
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await stream.aclose()  # however this ends, the head hears of it

    async def _take_order(
        self,
        order: pb.WorkerOrder,
        emit: Callable[[pb.WorkerEvent], Awaitable[None]],
        watching: set[asyncio.Task[None]],
    ) -> None:
        def in_background(work: Coroutine[None, None, None]) -> None:
            task = asyncio.create_task(work, name=f"worker {order.worker_id}")
            watching.add(task)
            task.add_done_callback(watching.discard)

        if order.WhichOneof("order") == "load":
            if self._config.pin:
                order.load.cpus.extend(self._take_processors(order.load.num_threads))
            try:
                worker = await WorkerProcess.spawn(order.worker_id, order.load.num_threads)
            except OSError as error:
                exited = pb.Exited(code=-1, reason=f"its process could not be started: {error}")
                await emit(pb.WorkerEvent(worker_id=order.worker_id, exited=exited))
                return
            self._workers[worker.id] = worker
            in_background(self._watch(worker, emit))
        if (known := self._workers.get(order.worker_id)) is None:
            return
        if order.WhichOneof("order") == "stop":
            in_background(known.stop(self._deadlines.stop_s))  # orders to other workers do not wait for it
        else:
            await known.order(order)

    def _take_processors(self, num_threads: int) -> list[int]:
        """The next processors of this machine, round and round."""
        processors = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(num_processors()))
        first, self._num_pinned = self._num_pinned, self._num_pinned + num_threads
        return [processors[(first + index) % len(processors)] for index in range(num_threads)]

    async def _watch(self, worker: WorkerProcess, emit: Callable[[pb.WorkerEvent], Awaitable[None]]) -> None:
        try:
            await worker.watch(emit)
        except TransportError:
            log.info("the head is gone; %s has nobody to report to", worker.id)
        else:
            self._workers.pop(worker.id, None)

    async def _stop_workers(self) -> None:
        workers, self._workers = list(self._workers.values()), {}
        await asyncio.gather(*(worker.stop(self._deadlines.stop_s) for worker in workers))

    def _profile(self, address: str) -> pb.NodeProfile:
        config = self._config
        return pb.NodeProfile(
            name=config.name or socket.gethostname(),
            machine=machine_id(),
            host=local_host_towards(address),
            memory_bytes=config.memory_bytes or int(psutil.virtual_memory().available * _MEMORY_SHARE),
            num_threads=config.num_threads or num_processors(),
            device=config.device,
            platform=f"{platform.system()} {platform.machine()}",
            num_workers=config.num_workers,
        )


def num_processors() -> int:
    """Processors that this process may use; physical cores where the system does not tell."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count(logical=False) or 1


def machine_id() -> str:
    """The same for all processes of one machine since it started, and for no other machine's."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}-{boot.read_text().strip()}" if boot.exists() else socket.gethostname()


def local_host_towards(address: str) -> str:
    """The address of this machine's interface that faces `address`; empty when it is a Unix socket."""
    if address.startswith("unix:"):
        return ""
    host, _, port = address.rpartition(":")
    family = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family[0], socket.SOCK_DGRAM) as probe:
        probe.connect(family[4])  # a datagram socket sends nothing; it only chooses the interface
        return str(probe.getsockname()[0])
