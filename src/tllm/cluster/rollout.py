"""Carry out a plan: workers are spawned and load their shards side by side, then the pipeline is joined from its end.

    load    all stages at once
    start   last stage first, each connecting to the next, which already listens
    link    the head connects to the first stage

This file does not know requests, nor what happens when a pipeline breaks.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tllm.cluster.agent import local_host_towards
from tllm.cluster.events import Observer, ShardLoaded, ShardLoading
from tllm.cluster.membership import Member, WorkerHandle, WorkerLostError
from tllm.core.config import Deadlines, ModelConfig, join_address
from tllm.core.errors import PlanError, UnavailableError
from tllm.core.types import DType, Epoch
from tllm.core.units import format_bytes
from tllm.models.checkpoint import Checkpoint
from tllm.planner.plan import Plan, StagePlan
from tllm.planner.profile import NodeProfile
from tllm.transport import rpc, wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FrameLimits, Link

_KV_SHARE = 0.5  # of what is free on a device after loading, when nobody says how much
_KV_SEQUENCES = 8  # contexts of full length that the KV cache need not exceed, when nobody says how much
_KV_MIN_POSITIONS = 65536  # however short the context

_worker_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The one block table that every stage of a pipeline shares."""

    num_blocks: int
    block_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where results come home to: the head's own data server."""

    server: rpc.StageServer
    machine: str
    addresses: tuple[str, ...]

    def addresses_for(self, node: NodeProfile) -> list[str]:
        """Where `node` reaches the head: a Unix socket on the head's machine, else the interface that faces it."""
        if node.machine == self.machine:
            return list(self.addresses)
        ports = [int(address.rpartition(":")[2]) for address in _reachable(self.addresses, same_machine=False)]
        return [join_address(local_host_towards(join_address(node.host, port)), port) for port in ports]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Workers that hold a plan's stages, joined: `link` goes to the first, `inbox` comes from the last."""

    plan: Plan
    epoch: Epoch
    kv: KVShape
    limits: FrameLimits
    workers: tuple[WorkerHandle, ...]
    link: Link
    inbox: rpc.Inbox
    stop_s: float  # that a worker may take to end, before it is ended

    async def lost(self) -> str:
        """Wait for the first worker to be lost; why."""
        done, _ = await asyncio.wait([worker.lost for worker in self.workers], return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()

    async def aclose(self) -> None:
        """Close the links and end the workers; when this returns, their memory is free for the next plan's."""
        await self.link.aclose()
        await self.inbox.aclose()
        await _stop(self.workers, self.stop_s)


async def roll_out(
    *,
    plan: Plan,
    epoch: Epoch,
    checkpoint: Checkpoint,
    dtype: DType,
    config: ModelConfig,
    members: Mapping[str, Member],
    home: Home,
    deadlines: Deadlines,
    observe: Observer,
) -> Pipeline:
    """The plan's pipeline, ready for steps of `epoch`. `members` maps node ids to members.

    Raises UnavailableError when a worker fails or takes longer than its deadline, PlanError when a device has no room
    for KV. Whatever was spawned is stopped then.
    """
    workers = [_new_worker(stage, members[stage.node.id], observe) for stage in plan.stages]
    try:
        async with asyncio.timeout(deadlines.load_s):
            loaded = await _load(plan, workers, home, checkpoint, dtype, config, observe)
        kv = kv_shape(plan, [shard.free_bytes for shard in loaded], checkpoint.spec.max_positions, config)
        limits = FrameLimits(
            epoch=epoch,
            hidden_size=checkpoint.spec.hidden_size,
            dtype=dtype,
            max_tokens=config.max_batch_tokens,
            max_chunks=config.max_sequences,
            max_blocks=-(-kv.max_model_len // kv.block_size),
            vocab_size=checkpoint.spec.vocab_size,
        )
        inbox = home.server.expect(limits)
        async with asyncio.timeout(deadlines.start_s):
            for index in reversed(range(len(workers))):
                here = workers[index]
                machine = here.member.profile.machine
                if index + 1 < len(workers):
                    there = workers[index + 1].member.profile.machine
                    addresses = _reachable(loaded[index + 1].addresses, same_machine=machine == there)
                else:
                    addresses = home.addresses_for(here.member.profile)
                start = pb.Start(
                    limits=wire.pack_limits(limits),
                    num_blocks=kv.num_blocks,
                    block_size=kv.block_size,
                    next=addresses,
                )
                await here.order(pb.WorkerOrder(start=start))
                await here.ready
            first = workers[0].member.profile.machine
            addresses = _reachable(loaded[0].addresses, same_machine=first == home.machine)
            link = await rpc.connect(addresses, limits, timeout_s=deadlines.start_s)
    except BaseException as error:
        await _stop(workers, deadlines.stop_s)
        match error:
            case WorkerLostError():
                raise UnavailableError(str(error), state="degraded") from error
            case TimeoutError():
                waiting = ", ".join(worker.id for worker in workers if not worker.ready.done())
                raise UnavailableError(f"Gave up waiting for {waiting}.", state="degraded") from error
        raise
    return Pipeline(
        plan=plan,
        epoch=epoch,
        kv=kv,
        limits=limits,
        workers=tuple(workers),
        link=link,
        inbox=inbox,
        stop_s=deadlines.stop_s,
    )


async def _stop(workers: Sequence[WorkerHandle], stop_s: float) -> None:
    """The agent kills what does not end within `stop_s`; a little longer, and nobody is waited for any more."""
    await asyncio.gather(*(worker.member.stop_worker(worker, 2 * stop_s) for worker in workers))


def _new_worker(stage: StagePlan, member: Member, observe: Observer) -> WorkerHandle:
    def on_loading(done_bytes: int, total_bytes: int) -> None:
        observe(ShardLoading(stage=stage, done_bytes=done_bytes, total_bytes=total_bytes))

    return member.new_worker(f"w{next(_worker_numbers)}", on_loading)


async def _load(
    plan: Plan,
    workers: Sequence[WorkerHandle],
    home: Home,
    checkpoint: Checkpoint,
    dtype: DType,
    config: ModelConfig,
    observe: Observer,
) -> list[pb.Loaded]:
    crosses_machines = any(stage.node.machine != home.machine for stage in plan.stages)

    async def load(stage: StagePlan, worker: WorkerHandle) -> pb.Loaded:
        order = pb.Load(
            model=config.model,
            fingerprint=checkpoint.fingerprint,
            first_layer=stage.shard.first_layer,
            last_layer=stage.shard.last_layer,
            embed=stage.shard.embed,
            head=stage.shard.head,
            dtype=dtype,
            device=stage.node.device,
            num_threads=stage.num_threads,
            host=stage.node.host if crosses_machines else "",
            engine="torch",
            max_positions=config.max_model_len or 0,
        )
        await worker.order(pb.WorkerOrder(load=order))
        answer = await worker.loaded
        observe(ShardLoaded(stage=stage, load_s=answer.load_s))
        return answer

    loads = [asyncio.create_task(load(stage, worker)) for stage, worker in zip(plan.stages, workers, strict=True)]
    try:
        return await asyncio.gather(*loads)
    finally:
        for task in loads:  # when one failed, nobody waits for the others
            task.cancel()


def _reachable(addresses: Sequence[str], *, same_machine: bool) -> list[str]:
    """Unix sockets are for neighbours on one machine; everybody else takes the other addresses."""
    return [address for address in addresses if same_machine or not address.startswith("unix:")]


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
