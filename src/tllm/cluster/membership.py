"""Who is attached to this head: nodes, and a handle for every worker that one of them runs.

    attached ──stream lost──▶ unreachable ──same agent again──▶ attached
        │                          └── not within `rejoin_s` ──▶ gone
        └── left, or another agent took its place ──▶ gone

A node whose control stream is lost is kept for a while: its workers' data streams do not pass through its agent, and
decide for themselves whether they are alive. It gets no part in a new plan until it is back.

This file does not know models or plans, nor what is to be done when somebody leaves.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tllm import __version__
from tllm.cluster.status import NodeState
from tllm.core.config import Deadlines
from tllm.core.errors import TllmError, TransportError
from tllm.planner.profile import NodeProfile
from tllm.transport import rpc
from tllm.transport import wire_pb2 as pb

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_REST_S = 1.0  # of a node whose worker crashed or could not be reached; doubled every time
_LAST_REST_S = 60.0
_MAX_WORKERS = 256  # of one node

_order_numbers = itertools.count(secrets.randbits(32))  # not those of a head before this one


class WorkerLostError(TllmError):
    """A worker reported a failure, ended, or its node is gone; the message is the reason."""


class WorkerHandle:
    """The head's end of one worker process: orders go out, the events that answer them come back as futures.

    One process may serve several plans, one after the other; `loaded`, `ready` and `lost` belong to its present task.
    """

    def __init__(self, worker_id: str, member: Member) -> None:
        loop = asyncio.get_running_loop()
        self.id = worker_id
        self.member = member
        self.exited: asyncio.Future[None] = loop.create_future()  # its process is gone
        self.holds: pb.Load | None = None  # the shard in its memory, or on the way there; None when nobody knows
        self.engaged = False  # part of a pipeline
        self.stopping = False
        self._number = 0  # of the load order that is waited for; 0: none
        self._traced: dict[int, asyncio.Future[tuple[pb.Traced, float]]] = {}  # by the number of the question
        self._epoch = 0
        self.last_epoch = 0  # that it served, for this head or one before
        self._on_loading: Callable[[pb.Loading], None] = lambda loading: None
        self.engage(self._on_loading)
        self.engaged = False

    def engage(self, on_loading: Callable[[pb.Loading], None]) -> None:
        """A new task; what came of the one before is forgotten."""
        loop = asyncio.get_running_loop()
        self.loaded: asyncio.Future[pb.Loaded] = loop.create_future()
        self.ready: asyncio.Future[pb.Ready] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        self.next_unreachable = False  # whether it was lost because it could not connect to the next stage
        self.engaged = True
        self._number, self._epoch = 0, 0
        self._on_loading = on_loading

    async def load(self, load: pb.Load) -> None:
        """Raises TransportError when the node cannot be reached."""
        self._number = load.number = next(_order_numbers)
        self.holds = load
        await self.order(pb.WorkerOrder(load=load))

    async def start(self, start: pb.Start) -> None:
        """Raises TransportError when the node cannot be reached."""
        self._epoch = self.last_epoch = start.limits.epoch
        await self.order(pb.WorkerOrder(start=start))

    async def order(self, order: pb.WorkerOrder) -> None:
        """Raises TransportError when the node cannot be reached."""
        order.worker_id = self.id
        await self.member.send(pb.HeadMessage(worker=order))

    async def trace(self, question: pb.Trace, timeout_s: float) -> tuple[pb.Traced, float]:
        """What it noted, and when the answer came, on `time.perf_counter`. Raises TransportError when the node cannot
        be reached, WorkerLostError when its process is gone, TimeoutError."""
        question.number = next(_order_numbers)
        answer: asyncio.Future[tuple[pb.Traced, float]] = asyncio.get_running_loop().create_future()
        self._traced[question.number] = answer
        try:
            await self.order(pb.WorkerOrder(trace=question))
            either: set[asyncio.Future[Any]] = {answer, self.exited, self.member.unreachable}
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if self.exited.done():
                raise WorkerLostError("its process is gone")
            if self.member.unreachable.done():
                raise TransportError(f"it cannot be reached: {self.member.reason}")
            raise TimeoutError(f"it did not answer within {timeout_s:g} s")
        finally:
            del self._traced[question.number]

    def take(self, event: pb.WorkerEvent) -> None:
        match event.WhichOneof("event"):
            case "traced":
                if (asked := self._traced.get(event.traced.number)) is not None:
                    _answer(asked, (event.traced, time.perf_counter()))
            case "loading":
                self._on_loading(event.loading)
            case "loaded" if event.loaded.number == self._number:  # others answer an earlier task
                _answer(self.loaded, event.loaded)
            case "ready" if event.ready.epoch == self._epoch:
                _answer(self.ready, event.ready)
            case "failed":  # of an earlier task: no news
                if self.holds is not None and event.failed.number == self.holds.number:
                    self.holds = None
                    self.lose(event.failed.reason)
                elif event.failed.epoch and event.failed.epoch == self._epoch and not self.lost.done():
                    self.next_unreachable = event.failed.next_unreachable
                    self.lose(event.failed.reason)
            case "exited":
                self.end(f"its process ended with code {event.exited.code}. {event.exited.reason}".strip())
                if not self.stopping:
                    self.member.strike()

    def resume(self, state: pb.WorkerState) -> None:
        """What its agent knows of it, after a time in which the head heard nothing and orders may have been lost."""
        self.last_epoch = max(self.last_epoch, state.epoch, state.failed.epoch)
        if self.holds is None or state.load.number != self.holds.number:
            self.holds = state.load if state.HasField("loaded") else None
        if state.HasField("loaded"):
            self.take(pb.WorkerEvent(loaded=state.loaded))
        if state.epoch:
            self.take(pb.WorkerEvent(ready=pb.Ready(epoch=state.epoch)))
        if state.HasField("failed"):
            self.take(pb.WorkerEvent(failed=state.failed))
        starting = self._epoch != 0 and not self.ready.done()
        if starting or self._number not in (0, state.load.number):
            self.lose("its node could not be reached while it was given orders")

    def end(self, reason: str) -> None:
        """Its process is gone."""
        self.holds = None
        self.member.workers.pop(self.id, None)
        _answer(self.exited, None)
        self.lose(reason)

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


def bench_key(number: int) -> str:
    """What the answer to a link benchmark is waited for under: nodes are no numbers."""
    return f"bench {number}"


def _answer(future: asyncio.Future[T], value: T) -> None:
    if not future.done():  # a node that answers twice is not believed twice
        future.set_result(value)


class Member:
    """One node, attached or for a while not."""

    def __init__(self, profile: NodeProfile, instance: str) -> None:
        self.profile = profile
        self.instance = instance
        self.addresses: tuple[str, ...] = ()  # of its agent's own server
        self.token_id = ""
        self.workers: dict[str, WorkerHandle] = {}
        self.draining = False
        self.rtt_s: float | None = None
        self.free_bytes: int | None = None
        self.reason = ""  # why it is not attached, or rests
        self.num_streams = 0  # so far, of its agent
        self._peer: rpc.ControlPeer | None = None
        self.unreachable: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # of its present stream
        self._beat = (0, 0.0)  # the last heartbeat's number, and when it was sent
        self._num_strikes = 0
        self._rests_until_s = 0.0
        self._measured: dict[str, asyncio.Future[pb.AgentMessage]] = {}

    @property
    def attached(self) -> bool:
        return self._peer is not None

    @property
    def state(self) -> NodeState:
        if self._peer is None:
            return NodeState.UNREACHABLE
        if self.draining:
            return NodeState.DRAINING
        return NodeState.RESTING if self.rests_s() > 0 else NodeState.READY

    def rests_s(self) -> float:
        """Seconds until it may have a part in a plan again."""
        return max(0.0, self._rests_until_s - time.monotonic())

    def strike(self, reason: str = "a worker crashed there", *, at_once: bool = False) -> None:
        """Something went wrong on this node: leave it out for a while, the longer the more often that happens.

        A first crash may be chance and costs no rest, unless `at_once`: to find out that a machine cannot be reached
        takes seconds in which requests wait.
        """
        num_rests = self._num_strikes + at_once
        rest_s = min(_FIRST_REST_S * 2 ** (num_rests - 1), _LAST_REST_S) if num_rests else 0.0
        self._num_strikes += 1
        self._rests_until_s = time.monotonic() + rest_s
        self.reason = reason if rest_s else ""

    def forgive(self) -> None:
        """It worked: what went wrong before does not count any more."""
        self._num_strikes, self._rests_until_s = 0, 0.0

    async def send(self, message: pb.HeadMessage) -> None:
        """Raises TransportError when the node cannot be reached."""
        if self._peer is None:
            raise TransportError(f"{self.profile.name} cannot be reached: {self.reason}")
        await self._peer.send(message)

    def new_worker(self) -> WorkerHandle:
        handle = WorkerHandle(f"w-{secrets.token_hex(4)}", self)
        self.workers[handle.id] = handle
        return handle

    async def stop_worker(self, handle: WorkerHandle, deadline_s: float) -> None:
        """Tell it to end, wait until its memory is free, and forget it; a node that is gone has ended it already."""
        handle.stopping = True
        try:
            await handle.order(pb.WorkerOrder(stop=pb.Stop()))
            await asyncio.wait(
                {handle.exited, self.unreachable}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
            )
        except TransportError:
            log.info("%s is gone and took worker %s with it", self.profile.name, handle.id)
        finally:
            self.workers.pop(handle.id, None)

    async def ask(
        self, message: pb.HeadMessage, key: str, timeout_s: float, *, about: Member | None = None
    ) -> pb.AgentMessage:
        """A measurement and its answer, which carries the same key. Raises TimeoutError when none comes in time, and
        at once TransportError when this node, or the one that it is asked `about`, can no longer be reached."""
        lost = {member: member.unreachable for member in (self, about) if member is not None}
        answer: asyncio.Future[pb.AgentMessage] = asyncio.get_running_loop().create_future()
        self._measured[key] = answer
        try:
            await self.send(message)
            either: set[asyncio.Future[Any]] = {answer, *lost.values()}
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            for member, future in lost.items():
                if future.done():
                    raise TransportError(f"{member.profile.name} cannot be reached: {member.reason}")
            raise TimeoutError(f"{self.profile.name} did not measure within {timeout_s:g} s")
        finally:
            self._measured.pop(key, None)

    def take(self, message: pb.AgentMessage) -> None:
        match message.WhichOneof("message"):
            case "worker":
                if (worker := self.workers.get(message.worker.worker_id)) is not None:
                    worker.take(message.worker)
            case "measured":
                self._answer(message.measured.key, message)
            case "measured_link":
                self._answer(message.measured_link.node_id, message)
            case "benched_link":
                self._answer(bench_key(message.benched_link.number), message)
            case "heartbeat":
                self.free_bytes = message.heartbeat.free_bytes
                number, sent_s = self._beat
                if message.heartbeat.id == number:
                    rtt_s = time.perf_counter() - sent_s
                    self.rtt_s = rtt_s if self.rtt_s is None else 0.8 * self.rtt_s + 0.2 * rtt_s

    async def beat(self, peer: rpc.ControlPeer, number: int) -> None:
        self._beat = number, time.perf_counter()
        await peer.send(pb.HeadMessage(heartbeat=pb.Heartbeat(id=number)))

    def _answer(self, key: str, message: pb.AgentMessage) -> None:
        if (asked := self._measured.get(key)) is not None:
            _answer(asked, message)

    def take_stream(self, peer: rpc.ControlPeer, attach: pb.Attach) -> rpc.ControlPeer | None:
        """A stream of its agent, the first or another one; returns the one that it replaces."""
        _answer(self.unreachable, None)  # what was asked over the one before gets no answer
        self.unreachable = asyncio.get_running_loop().create_future()
        self.num_streams += 1
        before, self._peer = self._peer, peer
        self.addresses = tuple(attach.addresses)
        self.reason = ""
        known = {state.worker_id: state for state in attach.workers}
        for worker in list(self.workers.values()):
            if (state := known.pop(worker.id, None)) is None:
                worker.end("its process ended while its node could not be reached")
            else:
                worker.resume(state)
        for state in known.values():  # from before this head
            worker = self.workers[state.worker_id] = WorkerHandle(state.worker_id, self)
            worker.resume(state)
        return before

    def lose_stream(self, peer: rpc.ControlPeer, reason: str) -> bool:
        """Whether the node cannot be reached any more: not so when another stream has taken its place."""
        if self._peer is not peer:
            return False
        self._gone(reason)
        return True

    def end(self, reason: str) -> None:
        """The node is gone, and what it ran with it."""
        self._gone(reason)
        for worker in list(self.workers.values()):
            worker.end(f"its node is gone: {reason}")

    def _gone(self, reason: str) -> None:
        self._peer, self.reason = None, reason
        _answer(self.unreachable, None)

    async def let_go(self, reason: str, *, again: bool) -> None:
        """Tell its agent that the head wants it no longer; `again`: until it comes back."""
        if (peer := self._peer) is None:
            return
        try:
            await peer.send(pb.HeadMessage(shutdown=pb.Shutdown(reason=reason, again=again)))
        except TransportError:
            log.info("%s was gone already", self.profile.name)
        await peer.aclose()


class Membership:
    """All nodes, in the order in which they came."""

    def __init__(
        self,
        *,
        cluster: str,
        deadlines: Deadlines,
        on_joined: Callable[[NodeProfile], None],
        on_left: Callable[[NodeProfile, str], None],
        is_revoked: Callable[[str], bool],
    ) -> None:
        self._cluster = cluster
        self._deadlines = deadlines
        self._on_joined = on_joined
        self._on_left = on_left
        self._is_revoked = is_revoked
        self._members: dict[str, Member] = {}
        self._drained: set[str] = set()  # nodes that were lost and are still to be left out when they are back
        self._forgetting: set[asyncio.Task[None]] = set()
        self._change: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    @property
    def usable(self) -> tuple[Member, ...]:
        """Those that a plan may use now."""
        return tuple(member for member in self.members if member.state is NodeState.READY)

    async def serve(self, peer: rpc.ControlPeer, attach: pb.Attach) -> None:
        """One node's control stream, from its first message to its end."""
        if (reason := self._refusal(peer, attach)) is not None:
            log.warning("refused %s at %s: %s", attach.profile.name, peer.address, reason)
            await peer.send(pb.HeadMessage(refused=pb.Refused(reason=reason)))
            return
        await peer.send(pb.HeadMessage(welcome=pb.Welcome(cluster=self._cluster)))
        member = await self._add(peer, attach)
        beating = asyncio.create_task(self._beat(member, peer), name="heartbeats")
        try:
            async for message in peer:
                member.take(message)
        except TransportError as error:
            if member.lose_stream(peer, str(error)):
                log.warning("%s cannot be reached: %s", member.profile.name, error)
                task = asyncio.create_task(self._forget_unless_back(member, member.num_streams), name="forget node")
                self._forgetting.add(task)
                task.add_done_callback(self._forgetting.discard)
                self.tell()
        else:
            if member.lose_stream(peer, "its agent was ended"):
                self._remove(member, "its agent was ended")
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    def _refusal(self, peer: rpc.ControlPeer, attach: pb.Attach) -> str | None:
        if attach.protocol != rpc.PROTOCOL:
            return (
                f"The node runs tllm {attach.version} (protocol {attach.protocol}) and the head tllm {__version__} "
                f"(protocol {rpc.PROTOCOL}). Install the same version on both."
            )
        if peer.name and peer.name != attach.node_id:
            return f"The node calls itself {attach.node_id}, but its certificate says {peer.name}."
        if peer.token_id and self._is_revoked(peer.token_id):
            return "The join token by which this node came was revoked. Join again with another one."
        if not attach.node_id:
            return "The node has no id. Join with a token."
        if attach.profile.num_workers > _MAX_WORKERS:
            return f"The node offers {attach.profile.num_workers} workers; at most {_MAX_WORKERS} are allowed."
        return None

    async def _add(self, peer: rpc.ControlPeer, attach: pb.Attach) -> Member:
        profile = _profile(attach)
        known = self._members.get(profile.id)
        if known is not None and known.instance == attach.instance:
            member = known
        else:
            member = Member(profile, attach.instance)
            member.draining = profile.id in self._drained
            self._drained.discard(profile.id)
            if known is not None:
                member.draining = known.draining
                await known.let_go("another agent with this node's identity took its place", again=False)
                known.end("its agent was started again")
        member.token_id = peer.token_id
        member.profile = profile
        if (before := member.take_stream(peer, attach)) is not None:
            await before.aclose()
        self._members[profile.id] = member
        log.info("%s %s as %s", profile.name, "is back" if member is known else "joined", profile.id)
        if known is None:
            self._on_joined(profile)
        self.tell()
        return member

    async def _beat(self, member: Member, peer: rpc.ControlPeer) -> None:
        """The round trip, now and then, and whether the node may stay. Whether it is there at all, the transport
        watches more closely."""
        for number in itertools.count(1):
            try:
                if self._is_revoked(member.token_id) and self._members.get(member.profile.id) is member:
                    reason = "the join token by which it came was revoked"
                    self._remove(member, reason)
                    await peer.send(pb.HeadMessage(shutdown=pb.Shutdown(reason=reason, again=False)))
                    await peer.aclose()
                    return
                await member.beat(peer, number)
            except TransportError:
                return
            await asyncio.sleep(2 * self._deadlines.heartbeat_s)

    async def _forget_unless_back(self, member: Member, num_streams: int) -> None:
        """`num_streams`: that it had had when it was lost; with another one its time began anew."""
        await asyncio.sleep(self._deadlines.rejoin_s)
        if member.num_streams == num_streams:
            self.forget(member, f"it could not be reached for {self._deadlines.rejoin_s:g} s")

    def forget(self, member: Member, reason: str) -> None:
        """A node that cannot be reached, and whose workers turned out to be gone."""
        if not member.attached and self._members.get(member.profile.id) is member:
            if member.draining:
                self._drained.add(member.profile.id)
            self._remove(member, reason)

    def _remove(self, member: Member, reason: str) -> None:
        self._members.pop(member.profile.id, None)
        log.info("%s left: %s", member.profile.name, reason)
        member.end(reason)
        self._on_left(member.profile, reason)
        self.tell()

    def tell(self) -> None:
        """Something changed: whoever waits for `next_change` looks again."""
        change, self._change = self._change, asyncio.get_running_loop().create_future()
        change.set_result(None)

    def next_change(self) -> asyncio.Future[None]:
        """Done when somebody joins, leaves, drains or comes back after this call."""
        return self._change

    async def wait_for(self, num_nodes: int) -> None:
        """Until that many nodes are attached. There is no deadline: a person starts the other machines."""
        while sum(member.attached for member in self.members) < num_nodes:
            await asyncio.shield(self._change)  # others wait for the same one

    def find(self, name: str) -> Member | None:
        """By id, or by name where only one has it."""
        if name in self._members:
            return self._members[name]
        named = [member for member in self.members if member.profile.name == name]
        return named[0] if len(named) == 1 else None

    async def aclose(self, reason: str) -> None:
        """Let every node go."""
        self._on_left = lambda node, reason: None  # nobody wonders
        await asyncio.gather(*(member.let_go(reason, again=True) for member in self.members))
        for task in list(self._forgetting):
            task.cancel()
        await asyncio.gather(*self._forgetting, return_exceptions=True)


def _profile(attach: pb.Attach) -> NodeProfile:
    profile = attach.profile
    return NodeProfile(
        id=attach.node_id,
        name=profile.name,
        machine=profile.machine,
        host=profile.host,
        memory_bytes=profile.memory_bytes,
        num_threads=profile.num_threads,
        device=profile.device,
        platform=profile.platform,
        num_workers=max(1, profile.num_workers),
    )
