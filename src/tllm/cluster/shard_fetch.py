"""Tensors from several sources into a store at once.

    feeder ──jobs──▶ queue ──▶ streams of source 0 (the head)
      ▲                   ├──▶ streams of source 1 (a peer)      part ─▶ hash ─▶ blob
      └ hashes, from the  └──▶ ...
        head alone

Rules:
    A hash is the head's word, or was its word before; whoever delivers the bytes is trusted with nothing.
    The feeder asks for hashes a little ahead of the streams, because the head may have to read the tensors for them.
    A source that is lost is tried again while it makes progress; one that delivers other bytes than their hash says
    is asked no more. Its tensor goes back to the queue, and what was written of it is kept, unless it was wrong.

This file does not know gRPC, shards of models, or what the store is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, TypeVar

from tllm.cluster.shard_files import POLL_S, StoreFiles, disk_error
from tllm.core.errors import EngineError, TllmError, TransportError
from tllm.transport.shards import NotHeldError

log = logging.getLogger(__name__)

T = TypeVar("T")

_STREAMS: Final = 4  # per source: small tensors wait for a round trip each, and one stream has one window
_WRITE_BYTES: Final = 1 << 20  # hashed and written at a time: a visit to a thread is not worth less
_TRIES: Final = 3  # of a source that delivers nothing in between
_PATIENCE_S: Final = 30.0  # with another process that fetches the same tensor and gets no further
_BATCH_BYTES: Final = 64 << 20  # of tensors whose hashes are asked for at a time
_BATCH_NAMES: Final = 256


class Reader(Protocol):
    """A connection to somebody who has tensors."""

    def read(self, name: str, offset: int) -> AsyncGenerator[bytes]:
        """The tensor's bytes from `offset` on. Raises NotHeldError, or TransportError when the source is lost."""
        ...


class Asker(Protocol):
    async def hashes(self, names: Sequence[str]) -> Sequence[str]:
        """In the order asked; empty where they cannot be told. Raises TransportError."""
        ...


Connect = Callable[[], contextlib.AbstractAsyncContextManager[Reader]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSource:
    """Somebody who may have tensors: what to call it, and how to reach it."""

    name: str
    connect: Connect


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One tensor to be fetched. `sha256` is empty where only its length can be checked."""

    name: str
    num_bytes: int
    sha256: str
    lacking: set[str] = field(default_factory=set)  # sources that do not have it


class CorruptError(TransportError):
    """A source delivered other bytes than their hash says."""


class JobQueue:
    """Jobs that any source may take. Ends for a source when there is nothing that could still come its way."""

    def __init__(self) -> None:
        self.pending: deque[Job] = deque()
        self._num_active = 0
        self._fed = False
        self._changed = asyncio.Event()

    def put(self, job: Job) -> None:
        self.pending.append(job)
        self._notify()

    def end(self) -> None:
        """Nothing more is put, except for what goes back."""
        self._fed = True
        self._notify()

    async def take(self, source: str) -> Job | None:
        """A job that the source does not lack; the caller gives it back with `done` or `put_back`."""
        while True:
            for job in self.pending:
                if source not in job.lacking:
                    self.pending.remove(job)
                    self._num_active += 1
                    return job
            if self._fed and not self._num_active:
                return None
            changed = self._changed
            await changed.wait()

    def done(self) -> None:
        self._num_active -= 1
        self._notify()

    def put_back(self, job: Job) -> None:
        self._num_active -= 1
        self.pending.appendleft(job)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Fetch:
    """One run of fetching. `hashes` and `fetched_bytes` are right at any time, also after it failed."""

    def __init__(self, files: StoreFiles, fingerprint: str, total_bytes: int, progress: Callable[[int, int], None]):
        self.hashes: dict[str, str] = {}  # name -> sha256, of all that was learned
        self.unhashed: list[Job] = []  # of which nobody could tell the hash
        self.fetched_bytes = 0
        self.reasons: dict[str, str] = {}  # source -> why it is out
        self._files = files
        self._fingerprint = fingerprint
        self._done_bytes = 0
        self._had: dict[str, int] = {}
        self._total_bytes = total_bytes
        self._progress = progress

    async def from_peers(
        self, missing: Iterable[Job], sources: Sequence[FetchSource], asker: Asker | None
    ) -> list[Job]:
        """Fetch what peers have; returns what they had not. Raises EngineError when the disk refuses."""
        queue = JobQueue()
        async with _unwrapped(), asyncio.TaskGroup() as tasks:
            tasks.create_task(self._feed(list(missing), asker, queue), name="fetch hashes")
            for source in sources:
                tasks.create_task(self.draw(source, queue), name=f"fetch from {source.name}")
        return list(queue.pending)

    async def from_one(self, jobs: Iterable[Job], source: FetchSource) -> list[Job]:
        """Fetch from one source, hashes or not; returns what it did not deliver."""
        queue = JobQueue()
        for job in jobs:
            queue.put(job)
        queue.end()
        async with _unwrapped():
            await self.draw(source, queue)
        return list(queue.pending)

    async def _feed(self, missing: list[Job], asker: Asker | None, queue: JobQueue) -> None:
        """Jobs into the queue, those with a known hash first; each hash once, however many tensors have it."""
        queued: set[str] = set()

        def feed(job: Job, sha256: str) -> None:
            job.sha256 = self.hashes[job.name] = sha256
            if sha256 in queued or self._files.holds(sha256, job.num_bytes):
                self._have(job, job.num_bytes)
                return
            queued.add(sha256)
            queue.put(job)

        try:
            for job in missing:
                if job.sha256:
                    feed(job, job.sha256)
            unknown = deque(job for job in missing if not job.sha256)
            while unknown:
                batch = _batch(unknown)
                sha256 = await self._ask(asker, [job.name for job in batch])
                for job, found in zip(batch, sha256, strict=True):
                    if found:
                        feed(job, found)
                    else:
                        self.unhashed.append(job)
        finally:
            queue.end()

    async def _ask(self, asker: Asker | None, names: list[str]) -> Sequence[str]:
        if asker is None or "hashes" in self.reasons:
            return [""] * len(names)
        try:
            return await asker.hashes(names)
        except TransportError as error:
            self.reasons["hashes"] = str(error)
            return [""] * len(names)

    async def draw(self, source: FetchSource, queue: JobQueue) -> None:
        """Fetch from one source until nothing is left for it or it is out."""
        tries = 0
        while True:
            before = self.fetched_bytes
            connected = False
            try:
                async with source.connect() as reader:
                    connected = True
                    async with asyncio.TaskGroup() as tasks:
                        for _ in range(_STREAMS):
                            tasks.create_task(self._stream(source.name, reader, queue))
                return
            except TransportError as error:
                problem: TransportError = error
            except BaseExceptionGroup as group:
                problem = _only_transport(group)
            tries = 1 if self.fetched_bytes > before else tries + 1
            log.info("fetching from %s: %s", source.name, problem)
            if isinstance(problem, CorruptError) or not connected or tries >= _TRIES:
                self.reasons[source.name] = str(problem)
                return

    async def _stream(self, source: str, reader: Reader, queue: JobQueue) -> None:
        while (job := await queue.take(source)) is not None:
            try:
                await self._fetch(job, source, reader)
            except NotHeldError:
                job.lacking.add(source)
                queue.put_back(job)
            except BaseException:
                queue.put_back(job)
                raise
            else:
                queue.done()

    async def _fetch(self, job: Job, source: str, reader: Reader) -> None:
        """The blob is there afterwards, or an error says why not; then the part is kept unless it was wrong."""
        while not await self._attempt(job, source, reader):
            log.info("what was kept of %s was wrong; it is fetched from its start", job.name)

    async def _attempt(self, job: Job, source: str, reader: Reader) -> bool:
        """False when what was there before turned out to be wrong; it is gone now."""
        # Without a hash to be named by, a part is named after what it is part of.
        label = job.sha256 or hashlib.sha256(f"{self._fingerprint}\0{job.name}".encode()).hexdigest()
        descriptor = await self._open_part(label, job)
        if descriptor is None:
            self._have(job, job.num_bytes)
            return True
        try:
            writer = _PartWriter(descriptor)
            resumed = await _in_thread(lambda: writer.resume(job.num_bytes))
            self._have(job, resumed)
            if resumed < job.num_bytes:
                await self._receive(job, source, reader, writer)
            part, found = self._files.part(label), writer.hexdigest()
            if found == (job.sha256 or found):
                os.replace(part, self._files.blob(found))
                self.hashes[job.name] = found
                return True
            part.unlink(missing_ok=True)
            self._have(job, 0)
            if resumed:  # the first bytes were another's, or the disk's: not the fault of this source
                return False
            raise CorruptError(f"{source} sent other bytes of {job.name} than their hash says")
        except OSError as error:
            raise disk_error(self._files.directory, error) from error
        finally:
            os.close(descriptor)

    async def _receive(self, job: Job, source: str, reader: Reader, writer: _PartWriter) -> None:
        """Append until the tensor is whole; whatever came before an error is written."""
        unwritten = bytearray()
        try:
            async with contextlib.aclosing(reader.read(job.name, writer.num_bytes)) as pieces:
                async for piece in pieces:
                    num_bytes = writer.num_bytes + len(unwritten) + len(piece)
                    self.fetched_bytes += len(piece)
                    if num_bytes > job.num_bytes:
                        raise CorruptError(f"{source} sent more than the {job.num_bytes} bytes of {job.name}")
                    unwritten += piece
                    self._have(job, num_bytes)
                    if len(unwritten) >= _WRITE_BYTES:
                        full, unwritten = unwritten, bytearray()
                        await _in_thread(partial(writer.write, full))
        finally:
            await _in_thread(partial(writer.write, unwritten))
        if writer.num_bytes < job.num_bytes:
            raise TransportError(f"{source} sent {writer.num_bytes} of the {job.num_bytes} bytes of {job.name}")

    async def _open_part(self, label: str, job: Job) -> int | None:
        """The locked part; None when somebody else has fetched the blob meanwhile."""
        part = self._files.part(label)
        last_size, waited_s = -1, 0.0
        while True:
            if self._files.holds(job.sha256, job.num_bytes):
                return None
            if (descriptor := self._files.open_part(part)) is not None:
                if not self._files.holds(job.sha256, job.num_bytes):
                    return descriptor
                part.unlink(missing_ok=True)
                os.close(descriptor)
                return None
            size = part.stat().st_size if part.exists() else -1
            waited_s = 0.0 if size != last_size else waited_s + POLL_S
            last_size = size
            if waited_s > _PATIENCE_S:
                raise EngineError(f"Another process fetches {job.name} and gets no further; end it and start again.")
            await asyncio.sleep(POLL_S)

    def _have(self, job: Job, num_bytes: int) -> None:
        """So much of the job's tensor is on this machine."""
        self._done_bytes += num_bytes - self._had.get(job.name, 0)
        self._had[job.name] = num_bytes
        self._progress(self._done_bytes, self._total_bytes)


class _PartWriter:
    """Appends to a part and hashes along. Blocking."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def resume(self, most: int) -> int:
        """Hash what is there, and return how many bytes that is; a part that is too long is begun anew."""
        if os.fstat(self._descriptor).st_size > most:
            os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        while data := os.read(self._descriptor, _WRITE_BYTES):
            self._hash.update(data)
            self.num_bytes += len(data)
        return self.num_bytes

    def write(self, data: bytearray) -> None:
        view = memoryview(data)
        while view:
            written = os.write(self._descriptor, view)
            self._hash.update(view[:written])
            self.num_bytes += written
            view = view[written:]

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


async def _in_thread(work: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, but not even a cancelled caller goes on before the work has ended: it would close the
    file that the thread writes to, and another would get its number."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        raise


@contextlib.asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """The first of our errors, instead of the group that a TaskGroup makes of it."""
    try:
        yield
    except BaseExceptionGroup as group:
        for error in _leaves(group):
            if isinstance(error, TllmError):
                raise error from None
        raise


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def _only_transport(group: BaseExceptionGroup[BaseException]) -> TransportError:
    """The error by which a source was lost; anything that is no such error is raised."""
    leaves = _leaves(group)
    lost = [error for error in leaves if isinstance(error, TransportError)]
    if len(lost) < len(leaves):
        raise group
    return next((error for error in lost if isinstance(error, CorruptError)), lost[0])


def _batch(jobs: deque[Job]) -> list[Job]:
    """Taken from the front."""
    batch = [jobs.popleft()]
    num_bytes = batch[0].num_bytes
    while jobs and len(batch) < _BATCH_NAMES and num_bytes + jobs[0].num_bytes <= _BATCH_BYTES:
        batch.append(jobs.popleft())
        num_bytes += batch[-1].num_bytes
    return batch
