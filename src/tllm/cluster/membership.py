"""Who is attached to this head: nodes, and a handle for every worker that one of them runs.

This file does not know models or plans, nor what is to be done when somebody leaves.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

from tllm import __version__
from tllm.core.errors import TllmError, TransportError
from tllm.planner.profile import NodeProfile
from tllm.transport import rpc
from tllm.transport import wire_pb2 as pb

log = logging.getLogger(__name__)

T = TypeVar("T")


class WorkerLostError(TllmError):
    """A worker reported a failure, ended, or its node is gone; the message is the reason."""


class WorkerHandle:
    """The head's end of one worker: orders go out, the events that answer them come back as futures."""

    def __init__(self, worker_id: str, member: Member, on_loading: Callable[[int, int], None]) -> None:
        loop = asyncio.get_running_loop()
        self.id = worker_id
        self.member = member
        self.loaded: asyncio.Future[pb.Loaded] = loop.create_future()
        self.ready: asyncio.Future[pb.Ready] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        self.exited: asyncio.Future[None] = loop.create_future()  # its process is gone
        self._on_loading = on_loading

    async def order(self, order: pb.WorkerOrder) -> None:
        """Raises TransportError when the node is gone."""
        order.worker_id = self.id
        await self.member.peer.send(pb.HeadMessage(worker=order))

    def take(self, event: pb.WorkerEvent) -> None:
        match event.WhichOneof("event"):
            case "loading":
                self._on_loading(event.loading.done_bytes, event.loading.total_bytes)
            case "loaded":
                _answer(self.loaded, event.loaded)
            case "ready":
                _answer(self.ready, event.ready)
            case "failed":
                self.lose(event.failed.reason)
            case "exited":
                _answer(self.exited, None)
                self.lose(f"its process ended with code {event.exited.code}. {event.exited.reason}".strip())

    def lose(self, reason: str) -> None:
        """Whoever waits for this worker hears of it; the first reason is kept."""
        if self.lost.done():
            return
        reason = f"worker {self.id} on {self.member.profile.name}: {reason}"
        self.lost.set_result(reason)
        for future in (self.loaded, self.ready):
            if not future.done():
                future.set_exception(WorkerLostError(reason))
                future.exception()  # seen: nobody may be waiting any more


def _answer(future: asyncio.Future[T], value: T) -> None:
    if not future.done():  # a node that answers twice is not believed twice
        future.set_result(value)


class Member:
    """One attached node."""

    def __init__(self, profile: NodeProfile, peer: rpc.ControlPeer) -> None:
        self.profile = profile
        self.peer = peer
        self.workers: dict[str, WorkerHandle] = {}

    def new_worker(self, worker_id: str, on_loading: Callable[[int, int], None]) -> WorkerHandle:
        handle = WorkerHandle(worker_id, self, on_loading)
        self.workers[worker_id] = handle
        return handle

    async def stop_worker(self, handle: WorkerHandle, deadline_s: float) -> None:
        """Tell it to end, wait until its memory is free, and forget it; a node that is gone has ended it already."""
        try:
            await handle.order(pb.WorkerOrder(stop=pb.Stop()))
            await asyncio.wait({handle.exited}, timeout=deadline_s)
        except TransportError:
            log.info("%s is gone and took worker %s with it", self.profile.name, handle.id)
        finally:
            self.workers.pop(handle.id, None)


class Membership:
    """All attached nodes, in the order in which they came."""

    def __init__(self, *, cluster: str, token: str, on_joined: Callable[[NodeProfile], None]) -> None:
        self._cluster = cluster
        self._token = token
        self._on_joined = on_joined
        self._members: dict[str, Member] = {}
        self._numbers = itertools.count(1)
        self._change: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    async def serve(self, peer: rpc.ControlPeer, attach: pb.Attach) -> None:
        """One node's control stream, from its first message to its end."""
        if (reason := self._refusal(attach)) is not None:
            log.warning("refused %s at %s: %s", attach.profile.name, peer.address, reason)
            await peer.send(pb.HeadMessage(refused=pb.Refused(reason=reason)))
            return
        member = Member(_profile(f"node{next(self._numbers)}", attach.profile), peer)
        await peer.send(pb.HeadMessage(welcome=pb.Welcome(node_id=member.profile.id, cluster=self._cluster)))
        reason = "its agent closed the connection"
        try:
            self._add(member)
            async for message in peer:
                if message.WhichOneof("message") != "worker":
                    continue
                if (worker := member.workers.get(message.worker.worker_id)) is not None:
                    worker.take(message.worker)
        except TransportError as error:
            reason = str(error)
        finally:
            self._remove(member, reason)

    def _refusal(self, attach: pb.Attach) -> str | None:
        if not hmac.compare_digest(attach.token.encode(), self._token.encode()):
            return "The join token is wrong. The head prints the right one when it starts."
        if attach.protocol != rpc.PROTOCOL:
            return (
                f"The node runs tllm {attach.version} (protocol {attach.protocol}) and the head tllm {__version__} "
                f"(protocol {rpc.PROTOCOL}). Install the same version on both."
            )
        return None

    def _add(self, member: Member) -> None:
        self._members[member.profile.id] = member
        log.info("%s joined as %s", member.profile.name, member.profile.id)
        self._on_joined(member.profile)
        self._tell()

    def _remove(self, member: Member, reason: str) -> None:
        del self._members[member.profile.id]
        log.info("%s left: %s", member.profile.name, reason)
        for worker in list(member.workers.values()):
            worker.lose(f"its node is gone: {reason}")
            _answer(worker.exited, None)
        self._tell()

    def _tell(self) -> None:
        change, self._change = self._change, asyncio.get_running_loop().create_future()
        change.set_result(None)

    def next_change(self) -> asyncio.Future[None]:
        """Done when somebody joins or leaves after this call."""
        return self._change

    async def wait_for(self, num_nodes: int) -> tuple[Member, ...]:
        """Until that many nodes are attached. There is no deadline: a person starts the other machines."""
        while len(self._members) < num_nodes:
            await asyncio.shield(self._change)  # others wait for the same one
        return self.members

    async def aclose(self, reason: str) -> None:
        """Tell every node that the head lets it go."""
        for member in self.members:
            try:
                await member.peer.send(pb.HeadMessage(shutdown=pb.Shutdown(reason=reason)))
            except TransportError:
                log.info("%s was gone already", member.profile.name)
            await member.peer.aclose()


def _profile(node_id: str, profile: pb.NodeProfile) -> NodeProfile:
    return NodeProfile(
        id=node_id,
        name=profile.name,
        machine=profile.machine,
        host=profile.host,
        memory_bytes=profile.memory_bytes,
        num_threads=profile.num_threads,
        device=profile.device,
        platform=profile.platform,
        num_workers=max(1, profile.num_workers),
    )
