"""Carry out a plan: stages are given to workers that hold most of them already, or to new ones, which load what they
lack side by side; then the pipeline is joined from its end.

    assign  stages to workers; the others end, and their memory is free
    load    all stages at once
    start   last stage first, each connecting to the next, which already listens
    link    the head connects to the first stage

This file does not know requests, nor what happens when a pipeline breaks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tllm.cluster.events import Observer, ShardLoaded, ShardLoading
from tllm.cluster.loads import ENGINE, alike
from tllm.cluster.machine import local_host_towards
from tllm.cluster.membership import Member, WorkerHandle, WorkerLostError
from tllm.core.config import Deadlines, ModelConfig, is_unspecified, join_address, split_address
from tllm.core.errors import PlanError, TransportError, UnavailableError
from tllm.core.types import HEAD, DType, Epoch
from tllm.core.units import format_bytes
from tllm.models.checkpoint import Checkpoint
from tllm.planner.plan import Plan, StagePlan
from tllm.planner.profile import NodeProfile
from tllm.transport import rpc, wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FrameLimits
from tllm.transport.journal import Journal

T = TypeVar("T")

_KV_SHARE = 0.5  # of what is free on a device after loading, when nobody says how much
_KV_SEQUENCES = 8  # contexts of full length that the KV cache need not exceed, when nobody says how much
_KV_MIN_POSITIONS = 65536  # however short the context


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The one block table that every stage of a pipeline shares."""

    num_blocks: int
    block_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """The head as the ends of a pipeline see it: results come to its data server, steps leave with its identity."""

    stages: rpc.StageServer
    identity: rpc.Identity
    machine: str
    host: str  # that it listens on, which other machines reach; loopback when none can
    journal: Journal | None = None  # told when frames leave and arrive


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Workers that hold a plan's stages, joined: `link` goes to the first, `inbox` comes from the last."""

    plan: Plan
    epoch: Epoch
    kv: KVShape
    limits: FrameLimits
    workers: tuple[WorkerHandle, ...]
    link: rpc.RpcLink
    inbox: rpc.Inbox

    async def lost(self) -> str:
        """Wait for the first worker, or the link to the first, to be lost; why."""
        link = asyncio.create_task(self.link.wait_lost(), name="first link lost")
        try:
            done, _ = await asyncio.wait(
                [*(worker.lost for worker in self.workers), link], return_when=asyncio.FIRST_COMPLETED
            )
            return min(done, key=lambda future: future is link).result()  # a worker's own words say more
        finally:
            link.cancel()
            await asyncio.wait({link})

    async def aclose(self) -> None:
        """Close the links. The workers keep their weights, for the next plan."""
        for worker in self.workers:
            worker.engaged = False
        await asyncio.gather(self.link.aclose(), self.inbox.aclose())


class Rollout:
    """Puts plans of one model into force on the members of a cluster."""

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        dtype: DType,
        config: ModelConfig,
        home: Home,
        deadlines: Deadlines,
        observe: Observer,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._config = config
        self._home = home
        self._deadlines = deadlines
        self._observe = observe

    async def prepare(self, plan: Plan, members: Mapping[str, Member]) -> None:
        """Load ahead what no worker has any part of, while another plan is in force, so that the change is short.

        Raises UnavailableError when a worker fails; nothing that serves was touched.
        """
        assigned = self._assign(plan, members)
        new = [(stage, worker) for stage, worker in zip(plan.stages, assigned, strict=True) if worker.holds is None]
        if not new:
            return
        for stage, worker in new:
            worker.engage(partial(self._say_loading, stage))
        try:
            async with asyncio.timeout(self._deadlines.load_s):
                await self._load(plan, new, members)
        except (TransportError, WorkerLostError, TimeoutError) as error:
            await self._stop([worker for _, worker in new])
            raise UnavailableError(f"could not prepare: {error}", state="degraded") from error
        finally:
            for _, worker in new:
                worker.engaged = False

    async def roll_out(self, plan: Plan, epoch: Epoch, members: Mapping[str, Member]) -> Pipeline:
        """The plan's pipeline, ready for steps of `epoch`. `members` maps ids to all nodes; no pipeline is in force.

        Raises UnavailableError when a worker fails or takes longer than its deadline, PlanError when a device has no
        room for KV. Workers that failed are ended, the others keep what they loaded; the node to blame is left out of
        plans for a while.
        """
        workers = self._assign(plan, members)
        for stage, worker in zip(plan.stages, workers, strict=True):
            worker.engage(partial(self._say_loading, stage))
        try:
            await self._stop(
                [
                    worker
                    for member in members.values()
                    if member.attached and not member.rests_s()  # those may be wanted again in a moment
                    for worker in member.workers.values()
                    if not worker.engaged
                ]
            )
            async with asyncio.timeout(self._deadlines.load_s):
                loaded = await self._load(plan, list(zip(plan.stages, workers, strict=True)), members)
            kv = kv_shape(plan, [shard.free_bytes for shard in loaded], self._max_positions, self._config)
            async with asyncio.timeout(self._deadlines.start_s):
                return await self._join(plan, epoch, workers, loaded, kv)
        except BaseException as error:
            for worker in workers:
                worker.engaged = False
            await self._stop([worker for worker in workers if worker.lost.done() and worker.holds is None])
            match error:
                case WorkerLostError() | TransportError():
                    raise UnavailableError(str(error), state="degraded") from error
                case TimeoutError():
                    late = [worker for worker in workers if not worker.loaded.done()]
                    late = late or [worker for worker in workers if not worker.ready.done()]
                    for worker in late[-1:]:  # the others wait for it
                        worker.member.strike("its worker did not get ready in time")
                    await self._stop(late)
                    waiting = ", ".join(f"{worker.id} on {worker.member.profile.name}" for worker in late)
                    raise UnavailableError(f"Gave up waiting for {waiting}.", state="degraded") from error
            raise

    @property
    def _max_positions(self) -> int:
        return self._checkpoint.spec.max_positions

    # ------------------------------------------------------------------------------------------------ assign

    def _assign(self, plan: Plan, members: Mapping[str, Member]) -> list[WorkerHandle]:
        """A worker for every stage: of those on its node that hold the same model, a pipeline in force or not, the one
        with the most of its layers; a new one where there is none. Raises UnavailableError when a node is gone."""
        taken: set[str] = set()
        assigned = []
        for stage in plan.stages:
            if (member := members.get(stage.node.id)) is None:
                raise UnavailableError(f"{stage.node.name} left while the plan was made.", state="degraded")
            options = [
                (self._common_bytes(stage, worker.holds), worker)
                for worker in member.workers.values()
                if worker.id not in taken and worker.holds is not None and self._can_become(stage, worker.holds)
            ]
            best = max(options, key=lambda option: option[0], default=None)
            worker = best[1] if best is not None else member.new_worker()
            taken.add(worker.id)
            assigned.append(worker)
        return assigned

    def _can_become(self, stage: StagePlan, held: pb.Load) -> bool:
        return alike(held, self._load_order(stage, (), listens=False))

    def _common_bytes(self, stage: StagePlan, held: pb.Load) -> int:
        """Layers that need not be read again; of two workers with as many, rather the one that has the same ends."""
        first = max(stage.shard.first_layer, held.first_layer)
        last = min(stage.shard.last_layer, held.last_layer)
        ends = (stage.shard.embed == held.embed) + (stage.shard.head == held.head)
        return 4 * max(0, last - first) + ends

    # -------------------------------------------------------------------------------------------------- load

    def _load_order(self, stage: StagePlan, sources: Sequence[pb.Source], *, listens: bool) -> pb.Load:
        node = stage.node
        host = self._home.host if node.machine == self._home.machine else node.host
        return pb.Load(
            model=self._config.model,
            fingerprint=self._checkpoint.fingerprint,
            first_layer=stage.shard.first_layer,
            last_layer=stage.shard.last_layer,
            embed=stage.shard.embed,
            head=stage.shard.head,
            dtype=self._dtype,
            device=node.device,
            num_threads=stage.num_threads,
            host=host if listens else "",
            engine=ENGINE,
            max_positions=self._config.max_model_len or 0,
            quantization=str(self._config.quantization or ""),
            sources=sources,
        )

    async def _load(
        self, plan: Plan, stages: Sequence[tuple[StagePlan, WorkerHandle]], members: Mapping[str, Member]
    ) -> list[pb.Loaded]:
        crosses_machines = any(stage.node.machine != self._home.machine for stage in plan.stages)

        async def load(stage: StagePlan, worker: WorkerHandle) -> pb.Loaded:
            sources = self._sources(stage.node, members)
            await worker.load(self._load_order(stage, sources, listens=crosses_machines))
            answer = await _answer(worker, worker.loaded)
            self._observe(ShardLoaded(stage=stage, load_s=answer.load_s, fetched_bytes=answer.fetched_bytes))
            return answer

        loads = [asyncio.create_task(load(stage, worker)) for stage, worker in stages]
        try:
            return await asyncio.gather(*loads)
        finally:
            for task in loads:  # when one failed, nobody waits for the others
                task.cancel()

    def _sources(self, node: NodeProfile, members: Mapping[str, Member]) -> list[pb.Source]:
        """Who has weights: the head, whose address the node's agent knows, and agents whose workers hold some."""
        peers = [
            pb.Source(name=member.profile.id, addresses=_reachable(member.addresses, member.profile, node))
            for member in members.values()
            if member.attached and member.profile.id != node.id and any(w.holds for w in member.workers.values())
        ]
        return [pb.Source(name=HEAD), *peers]

    def _say_loading(self, stage: StagePlan, loading: pb.Loading) -> None:
        self._observe(
            ShardLoading(
                stage=stage,
                done_bytes=loading.done_bytes,
                total_bytes=loading.total_bytes,
                fetching=loading.fetching,
            )
        )

    # -------------------------------------------------------------------------------------------------- join

    async def _join(
        self, plan: Plan, epoch: Epoch, workers: Sequence[WorkerHandle], loaded: Sequence[pb.Loaded], kv: KVShape
    ) -> Pipeline:
        spec = self._checkpoint.spec
        limits = FrameLimits(
            epoch=epoch,
            hidden_size=spec.hidden_size,
            dtype=self._dtype,
            max_tokens=self._config.max_batch_tokens,
            max_chunks=self._config.max_sequences,
            max_blocks=-(-kv.max_model_len // kv.block_size),
            vocab_size=spec.vocab_size,
        )
        nodes = [stage.node for stage in plan.stages]
        inbox = self._home.stages.expect(limits, sender=nodes[-1].id, journal=self._home.journal)
        for index in reversed(range(len(workers))):
            start = pb.Start(
                limits=wire.pack_limits(limits),
                num_blocks=kv.num_blocks,
                block_size=kv.block_size,
                previous_name=nodes[index - 1].id if index else HEAD,
                next_name=HEAD,  # its agent knows by which address
            )
            if index + 1 < len(workers):
                start.next_name = nodes[index + 1].id
                start.next.extend(self._addresses(loaded[index + 1], nodes[index + 1], nodes[index]))
            try:
                await workers[index].start(start)
                await _answer(workers[index], workers[index].ready)
            except WorkerLostError:
                self._blame(workers, index)
                raise
        try:
            first = self._addresses(loaded[0], nodes[0], None)
            link = await rpc.connect(
                first,
                limits,
                identity=self._home.identity,
                peer=nodes[0].id,
                timeout_s=self._deadlines.connect_s,
                liveness=rpc.Liveness.of(self._deadlines),
                journal=self._home.journal,
            )
        except TransportError:
            workers[0].member.strike("the head could not connect to its worker", at_once=True)
            raise
        return Pipeline(plan=plan, epoch=epoch, kv=kv, limits=limits, workers=tuple(workers), link=link, inbox=inbox)

    def _blame(self, workers: Sequence[WorkerHandle], index: int) -> None:
        """A worker that lives could not start by its own fault, or because it did not reach the next stage: then one of
        the two nodes is to blame, and it is more often the one that does not answer; never the head. A worker that
        crashed has its strike already."""
        worker = workers[index]
        if worker.exited.done():
            return
        if not worker.next_unreachable:
            worker.member.strike("its worker could not start", at_once=True)
        elif index + 1 == len(workers):
            worker.member.strike("its worker could not connect to the head", at_once=True)
        else:
            reason = f"{worker.member.profile.name} could not connect to its worker"
            workers[index + 1].member.strike(reason, at_once=True)

    def _addresses(self, loaded: pb.Loaded, node: NodeProfile, seen_from: NodeProfile | None) -> list[str]:
        """Raises TransportError when there is none: a node that joined over a Unix socket and is another machine."""
        found = _reachable(loaded.addresses, node, seen_from, home=self._home)
        if not found:
            other = "the head" if seen_from is None else seen_from.name
            raise TransportError(f"{node.name} told no address at which {other} could reach its worker.")
        return found

    async def _stop(self, workers: Sequence[WorkerHandle]) -> None:
        """The agent kills what does not end within `stop_s`; a little longer, and nobody is waited for any more."""
        await asyncio.gather(*(worker.member.stop_worker(worker, 2 * self._deadlines.stop_s) for worker in workers))


async def _answer(worker: WorkerHandle, future: asyncio.Future[T]) -> T:
    """What comes of an order. Raises WorkerLostError, and TransportError as soon as its node cannot be reached: it may
    be back later, with a worker that has gone on; others have plans to make without it meanwhile."""
    member = worker.member
    either: set[asyncio.Future[Any]] = {future, member.unreachable}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not future.done():
        raise TransportError(f"{member.profile.name} cannot be reached: {member.reason}")
    return await future


def _reachable(
    addresses: Sequence[str], node: NodeProfile, seen_from: NodeProfile | None, *, home: Home | None = None
) -> list[str]:
    """Where `node` is reached from another one (None: the head). Unix sockets are for neighbours on one machine. One
    that listens on every interface is called by the interface that faces the other."""
    machine = home.machine if seen_from is None and home is not None else seen_from.machine if seen_from else ""
    found = []
    for address in addresses:
        if address.startswith("unix:"):
            if machine == node.machine:
                found.append(address)
            continue
        host, port = split_address(address, default_port=0)
        if is_unspecified(host):
            other = seen_from.host if seen_from is not None else ""
            host = local_host_towards(join_address(other, port)) if other else "127.0.0.1"
        found.append(join_address(host, port))
    return found


def kv_shape(plan: Plan, free_bytes: Sequence[int], max_positions: int, config: ModelConfig) -> KVShape:
    """How many blocks every stage can hold: the least over the stages, since all share one table.

    A stage's blocks take `num_blocks x block_size x kv_bytes_per_position` bytes. Without --kv-memory a stage takes at
    most half of what is free on its device (shared with the other stages there), no more than its node offers beside
    the weights, and no more than several contexts need. Raises PlanError when one context of --max-model-len does not
    fit; when nobody asked for a length, the context is what fits.
    """
    sharing = Counter(_device(stage) for stage in plan.stages)
    wanted = max(_KV_SEQUENCES * (config.max_model_len or max_positions), _KV_MIN_POSITIONS)
    blocks = -(-wanted // config.block_size) if config.kv_bytes is None else None
    for stage, free in zip(plan.stages, free_bytes, strict=True):
        share = free // sharing[_device(stage)]
        offered = stage.node.memory_bytes // stage.node.num_workers - stage.held_bytes
        budget = config.kv_bytes or min(int(share * _KV_SHARE), offered)
        if budget > min(share, offered):
            raise PlanError(
                f"--kv-memory asks for {format_bytes(budget)} on {stage.node.name}, where a stage can have "
                f"{format_bytes(max(0, min(share, offered)))} beside its weights."
            )
        fits = max(0, budget) // (config.block_size * stage.kv_bytes_per_position)
        blocks = fits if blocks is None else min(blocks, fits)
    assert blocks is not None
    positions = blocks * config.block_size
    length = config.max_model_len or min(max_positions, positions)
    if positions < length or length < 2:
        raise PlanError(
            f"The KV cache holds {positions} positions, fewer than the {length} of one context. "
            "Lower --max-model-len or --block-size, raise --kv-memory, or add a node."
        )
    return KVShape(num_blocks=blocks, block_size=config.block_size, max_model_len=length)


def _device(stage: StagePlan) -> tuple[str, str]:
    """What a stage shares its memory with: whatever else is on that device of that machine."""
    return stage.node.machine, stage.node.device
