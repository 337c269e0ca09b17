"""One worker process, from spawn to reaping, as its agent keeps it: orders in, events out, and killed when it hangs.

A worker's event loop answers every ping at once, whatever its compute thread does; as many unanswered pings as fit into
the silence that is allowed mean that it hangs. Pings are counted, not seconds: an agent that was itself stopped for a
minute must not find all its workers guilty.

This file does not know heads, plans, or where orders come from.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict

import psutil

from tllm.core.config import Deadlines
from tllm.core.errors import FrameError
from tllm.transport import pipe
from tllm.transport import wire_pb2 as pb

log = logging.getLogger(__name__)

Emit = Callable[[pb.WorkerEvent], Awaitable[None]]

_STDERR_BYTES = 4096  # kept of every worker, to say why it died
_SPIN_COUNT = 10_000


class WorkerProcess:
    """A child process. `state` is what a head that has just come would want to know of it."""

    def __init__(self, worker_id: str, process: asyncio.subprocess.Process, deadlines: Deadlines) -> None:
        self.id = worker_id
        self.state = pb.WorkerState(worker_id=worker_id)
        self.port_number = 0  # which of its agent's ports it listens on; 0: none yet
        self._process = process
        self._deadlines = deadlines
        self._stderr = b""  # its last words
        self._num_unanswered = 0
        self._has_loaded = False
        self._killed_because = ""

    @classmethod
    async def spawn(cls, worker_id: str, num_threads: int, deadlines: Deadlines) -> WorkerProcess:
        """Raises OSError when the system has no room for another process."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tllm.cluster.worker"),
            *(worker_id, logging.getLevelName(log.getEffectiveLevel())),
            *(str(os.getpid()), json.dumps(asdict(deadlines))),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=worker_environment(num_threads),
            start_new_session=True,  # a Ctrl-C in the terminal is the agent's to handle
        )
        return cls(worker_id, process, deadlines)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def order(self, order: pb.WorkerOrder) -> None:
        """Hand an order over. A worker that is gone does not take it; its end is reported by `watch`."""
        match order.WhichOneof("order"):
            case "load":
                self.state.ClearField("loaded")
                self.state.ClearField("failed")
                self.state.epoch = 0
            case "start":
                self.state.ClearField("failed")
                self.state.epoch = 0
        assert self._process.stdin is not None
        try:
            pipe.write_message(self._process.stdin, order)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            log.info("%s ended before it took an order", self.id)

    async def watch(self, emit: Emit) -> None:
        """Pass its events on until it ends, then say how it ended."""
        assert self._process.stdout is not None
        errors = asyncio.create_task(self._read_stderr(), name=f"{self.id} stderr")
        pinging = asyncio.create_task(self._ping(), name=f"{self.id} pings")
        try:
            while (event := await pipe.read_message(self._process.stdout, pb.WorkerEvent)) is not None:
                self._num_unanswered = 0
                if self._take(event):
                    await emit(event)
        except FrameError as error:
            self.kill(f"Its events cannot be read: {error}.")
        finally:
            pinging.cancel()
        code = await self._process.wait()
        await errors
        reason = self._killed_because or self._stderr.decode(errors="replace").strip()
        await emit(pb.WorkerEvent(worker_id=self.id, exited=pb.Exited(code=code, reason=reason)))

    def _take(self, event: pb.WorkerEvent) -> bool:
        """Note what it says; whether others should hear of it."""
        match event.WhichOneof("event"):
            case "pong":
                if event.pong.busy_s > self._deadlines.hang_s and self.state.HasField("loaded"):
                    self.kill(f"It has been computing one step for {event.pong.busy_s:.0f} s.")
                return False
            case "loaded":
                self._has_loaded = True
                self.state.loaded.CopyFrom(event.loaded)
            case "ready":
                self.state.epoch = event.ready.epoch
            case "failed":
                self.state.failed.CopyFrom(event.failed)
                self.state.epoch = 0
        return True

    async def _ping(self) -> None:
        interval_s = self._deadlines.heartbeat_s / 2
        num_stopped = 0
        assert self._process.stdin is not None
        while True:
            await asyncio.sleep(interval_s)
            if self._process.stdin.is_closing():  # whoever stops it waits for its end
                return
            num_silent, allowed_s = self._num_unanswered, self._deadlines.silence_s
            if not self._has_loaded:
                # Importing a framework holds up the event loop of a worker that loads for the first time; but one that
                # the system has stopped imports nothing.
                num_stopped = num_stopped + 1 if self._is_stopped() else 0
                num_silent, allowed_s = (
                    (num_stopped, allowed_s) if num_stopped else (num_silent, self._deadlines.import_s)
                )
            if (num_silent + 1) * interval_s > allowed_s:
                self.kill(f"It has been silent for {allowed_s:g} s.")
                return
            self._num_unanswered += 1
            await self.order(pb.WorkerOrder(worker_id=self.id, ping=pb.Ping()))

    def _is_stopped(self) -> bool:
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(_STDERR_BYTES):
            log.debug("%s", data.decode(errors="replace").rstrip())
            self._stderr = (self._stderr + data)[-_STDERR_BYTES:]

    def kill(self, why: str) -> None:
        """End it at once; `watch` reports it with the reason."""
        if self._process.returncode is None:
            log.warning("%s is killed: %s", self.id, why)
            self._killed_because = why
            self._process.kill()

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
            self.kill(f"It did not stop within {deadline_s:g} s.")
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
