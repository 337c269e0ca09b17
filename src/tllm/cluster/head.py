"""The head: it lets nodes join, makes the plan, rolls it out and keeps the deployment served.

    listen ─▶ (own node joins) ─▶ wait for nodes ─▶ measure ─▶ plan ─▶ roll out ─▶ serve ─▶ drain ─▶ stop
                                                       ▲                              │
                                                       └── lost, or a better plan ────┘

This file does not know HTTP or terminals; whoever watches gets events. It never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tllm.cluster import link_bench
from tllm.cluster.agent import Agent
from tllm.cluster.collecting import collect
from tllm.cluster.deployment import Deployment
from tllm.cluster.discovery import Advertiser
from tllm.cluster.events import (
    HeadEvent,
    Listening,
    Lost,
    NodeJoined,
    NodeLeft,
    Observer,
    Planned,
    Replanning,
    Serving,
    Waiting,
    describe,
)
from tllm.cluster.local import LocalHead, announced
from tllm.cluster.machine import machine_id
from tllm.cluster.membership import Member, Membership
from tllm.cluster.placement import Placement
from tllm.cluster.rollout import Home, Pipeline, Rollout
from tllm.cluster.shards import ShardStore
from tllm.cluster.status import ClusterStatus, Joining, LinkOrder, NodeStatus, StageStatus
from tllm.cluster.tracing import SequenceRecord, Trace
from tllm.core.config import (
    EMBEDDED_MODEL,
    ModelConfig,
    ServeConfig,
    is_loopback,
    join_address,
    split_address,
    state_directory,
)
from tllm.core.errors import ConfigError, PlanError, RequestError, TransportError, UnavailableError
from tllm.core.types import HEAD, Epoch
from tllm.models.checkpoint import Checkpoint
from tllm.models.repository import resolve_headers, resolve_model
from tllm.planner.plan import Plan
from tllm.transport import rpc
from tllm.transport.link_bench import LinkBench
from tllm.transport.link_sweep import Sweep

log = logging.getLogger(__name__)

_EMBEDDED_NAME = "tllm-demo"
_OWN_NODE = "n-local"  # the id of the head's own node
_SETTLE_S = 0.5  # after a change of the nodes, for others that come with it
_MAX_FAILED = 8  # attempts in a row to build a pipeline, then the open requests end
_MAX_FIRST = 2  # the same before there was one, then the head gives up
_NEWS_S = 0.1  # after a loss, for what else was lost with it to be heard of
_COOL_DOWN_S = 10.0  # between two changes that nothing but speed asks for
_PROBE_S = 15.0  # between looks at the links of the plan in force
_NUM_EVENTS = 20  # kept for people who look later


class Head:
    """One served model and the nodes that compute it. Implements `status.Cluster`."""

    def __init__(self, config: ServeConfig, observe: Observer) -> None:
        self._config = config
        self._observer = observe
        self._authority = rpc.Authority.open(state_directory() / "cluster")
        self._tokens = rpc.TokenStore(self._authority)
        computes = config.local_node is not None  # else the weights need not be on this machine
        self.checkpoint = Checkpoint.open((resolve_model if computes else resolve_headers)(config.model.model))
        self.dtype = config.model.dtype or self.checkpoint.dtype
        if config.model.quantization is not None:
            self.checkpoint.check_quantization(config.model.quantization)
        _require_positions(config.model.max_model_len, self.checkpoint.spec.max_positions)
        self.deployment = Deployment(self.checkpoint, config.model, names=served_names(config.model))
        self.grpc_address = ""
        self._placement = Placement(
            self.checkpoint, self.dtype, name=self.deployment.names[0], config=config, observe=self._observe
        )
        self._epoch = 0  # of the last plan that was rolled out, or tried
        self._events: deque[str] = deque(maxlen=_NUM_EVENTS)
        self._membership: Membership | None = None
        self._pipeline: Pipeline | None = None
        self.url = ""  # of the HTTP side, once there is one

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """Everything up; the task serves the model and ends only with the error that kept it from being served at all.

        When the context is left, requests have been drained, nodes told and every process of this machine is gone.
        """
        config, deadlines = self._config, self._config.deadlines
        async with AsyncExitStack() as stack:
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="tllm-"))
            self._membership = membership = Membership(
                cluster=config.cluster,
                deadlines=deadlines,
                on_joined=lambda node: self._observe(NodeJoined(node=node)),
                on_left=lambda node, reason: self._observe(NodeLeft(node=node, reason=reason)),
                is_revoked=self._tokens.is_revoked,
            )
            stages = rpc.StageServer()
            identity = self._authority.identity(HEAD)
            store = ShardStore()
            stack.callback(store.close)  # when nobody can ask any more
            store.offer(self.checkpoint)
            server = rpc.Server(
                [
                    rpc.ControlServer(membership.serve),
                    stages,
                    rpc.Enrolment(self._authority, self._tokens),
                    rpc.ShardService(store),
                    LinkBench(),
                ],
                identity=identity,
                liveness=rpc.Liveness.of(deadlines),
                enrols=True,
            )
            local = f"unix:{sockets}/head.sock"
            _, self.grpc_address = await server.start([local, join_address(config.host, config.grpc_port)])
            stack.push_async_callback(server.aclose)
            pin = self._authority.pin.hex()
            stack.enter_context(
                announced(
                    LocalHead(
                        cluster=config.cluster,
                        control=local,
                        pin=pin,
                        grpc_address=self.grpc_address,
                        url=self.url,
                    )
                )
            )
            self._observe(Listening(grpc_address=self.grpc_address, token=self._tokens.default()))
            if not is_loopback(config.host):
                port = split_address(self.grpc_address, default_port=0)[1]
                advertiser = Advertiser(cluster=config.cluster, host=config.host, port=port, fingerprint=pin)
                await stack.enter_async_context(advertiser)

            if config.local_node is not None:
                agent = Agent(
                    config.local_node,
                    address=local,
                    identity=self._authority.identity(_OWN_NODE),
                    deadlines=deadlines,
                )
                await stack.enter_async_context(agent.attached())
            stack.push_async_callback(membership.aclose, "the head stopped")

            rollout = Rollout(
                checkpoint=self.checkpoint,
                dtype=self.dtype,
                config=config.model,
                home=Home(
                    stages=stages,
                    identity=identity,
                    machine=machine_id(),
                    host=config.host,
                    journal=self.deployment.journal,
                ),
                deadlines=deadlines,
                observe=self._observe,
            )
            serving = asyncio.create_task(self._serve(membership, rollout), name="head")
            stack.push_async_callback(_cancelled, serving)
            stack.push_async_callback(self.deployment.drain, deadlines.drain_s)
            yield serving

    def _observe(self, event: HeadEvent) -> None:
        if (line := describe(event)) is not None:
            self._events.append(f"{time.strftime('%H:%M:%S')} {line}")
        self._observer(event)

    # ------------------------------------------------------------------------------------------------- serve

    async def _serve(self, membership: Membership, rollout: Rollout) -> None:
        """Plan, roll out, serve; when the pipeline breaks, or there is a better plan, again in a new epoch.

        What keeps the first pipeline from being built is raised. Later on it ends the open requests with an error, and
        the next try is made when a node joins or leaves, or after a while.
        """
        num_nodes = self._config.num_nodes or 1
        if sum(member.attached for member in membership.members) < num_nodes:
            self._observe(Waiting(num_nodes=num_nodes))
        await membership.wait_for(num_nodes)
        pipeline = await self._first_pipeline(membership, rollout)
        while True:
            kv = pipeline.kv
            self._observe(Serving(num_blocks=kv.num_blocks, block_size=kv.block_size, max_model_len=kv.max_model_len))
            self._pipeline = pipeline
            num_tokens = self.deployment.statistics().num_output_tokens
            try:
                reason = await self._serve_until_lost_or_bettered(pipeline, membership, rollout)
            finally:
                self._pipeline = None
                await pipeline.aclose()
            if self.deployment.statistics().num_output_tokens > num_tokens:  # they worked
                for worker in pipeline.workers:
                    worker.member.forgive()
            if reason is not None:
                self._observe(Lost(reason=reason))
                self.deployment.pipeline_lost()
                for member in membership.members:  # their data streams are gone like their control streams
                    membership.forget(member, "its part of the pipeline broke while it could not be reached")
            pipeline = await self._rebuilt(membership, rollout)

    async def _serve_until_lost_or_bettered(
        self, pipeline: Pipeline, membership: Membership, rollout: Rollout
    ) -> str | None:
        """Why the pipeline broke, or None when it is to be given up for a better one, for which all is prepared."""
        serving = asyncio.create_task(self.deployment.serve(pipeline), name="serve pipeline")
        bettering = asyncio.create_task(self._better_plan(pipeline, membership, rollout), name="better plan")
        try:
            await asyncio.wait({serving, bettering}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                return serving.result()
            self._observe(Replanning(reason=bettering.result()))
            return None
        finally:
            for task in (serving, bettering):
                task.cancel()
            await asyncio.wait({serving, bettering})

    async def _better_plan(self, pipeline: Pipeline, membership: Membership, rollout: Rollout) -> str:
        """Watch the nodes until a plan without one that is to go, or a plan that is much faster, is prepared; why."""
        not_before_s = time.monotonic() + (0.0 if self._config.use_all else _COOL_DOWN_S)
        members = [worker.member for worker in pipeline.workers]
        is_news, seen = True, set[str]()
        while True:
            changed = membership.next_change()
            leaving = [member.profile.name for member in members if member.draining]
            delay_s = 0.0 if leaving else max(0.0, not_before_s - time.monotonic())
            if is_news and delay_s == 0:
                seen = {member.profile.id for member in membership.usable}  # one that rests comes back silently
                if (reason := await self._prepared(pipeline, membership, rollout)) is not None:
                    return reason
                is_news = False
            await asyncio.wait({changed}, timeout=delay_s or _PROBE_S)
            if changed.done():
                is_news = True
                await asyncio.sleep(_SETTLE_S)
            elif delay_s == 0:
                is_slower = await self._placement.measurements.look_again(members)
                is_news = is_slower or bool(leaving) or {member.profile.id for member in membership.usable} != seen

    async def _prepared(self, pipeline: Pipeline, membership: Membership, rollout: Rollout) -> str | None:
        """Why another plan should take the place of this one, once its new workers have loaded; None: it should not."""
        try:
            plan = await self._placement.plan(membership)
            members = [worker.member for worker in pipeline.workers]
            if (reason := self._placement.why_better(plan, pipeline.plan, members)) is None:
                return None
            log.info("preparing another plan: %s", reason)
            await rollout.prepare(plan, {member.profile.id: member for member in membership.members})
            return reason
        except (PlanError, TransportError, UnavailableError) as error:
            log.warning("the plan in force stays: %s", error)
            return None

    async def _first_pipeline(self, membership: Membership, rollout: Rollout) -> Pipeline:
        """A model too large for the nodes there are waits for others, where others can join. What goes wrong twice, or
        leaves no node to try with, is raised."""
        num_failed = 0
        while True:
            changed = membership.next_change()
            try:
                return await self._new_pipeline(await self._placement.plan(membership), membership, rollout)
            except PlanError as error:
                rests = [member.rests_s() for member in membership.members if member.rests_s() > 0]
                num_attached = sum(member.attached for member in membership.members)
                if is_loopback(self._config.host) and not rests and num_attached >= (self._config.num_nodes or 1):
                    raise
                self._observe(Waiting(num_nodes=num_attached + 1, reason=str(error)))
                await asyncio.wait({changed}, timeout=min(rests, default=None))
                await asyncio.sleep(_SETTLE_S)
            except UnavailableError as error:
                num_failed += 1
                if not changed.done() and (num_failed == _MAX_FIRST or not membership.usable):
                    raise
                log.warning("trying again: %s", error)

    async def _rebuilt(self, membership: Membership, rollout: Rollout) -> Pipeline:
        """A pipeline of whoever is left, tried until there is one.

        Workers that turn out to be gone while it is built say nothing of those that are left. A node that cannot be
        reached just now may be back in a moment, and one that rests will be: a little of that is waited for before the
        open requests end.
        """
        deadlines = self._config.deadlines
        await asyncio.sleep(_NEWS_S)
        give_up_s = time.monotonic() + deadlines.patience_s
        num_failed = 0
        while True:
            changed = membership.next_change()
            rests = [member.rests_s() for member in membership.members if member.rests_s() > 0]
            try:
                plan = await self._placement.plan_at_once(membership, self.deployment.plan)
                return await self._new_pipeline(plan, membership, rollout)
            except (UnavailableError, TransportError) as error:
                log.warning("could not serve: %s", error)
                num_failed += 1
                if num_failed < _MAX_FAILED:
                    continue
                reason = str(error)
            except PlanError as error:
                log.warning("cannot serve with the nodes there are: %s", error)
                waits = rests or any(not member.attached for member in membership.members)
                if waits and (left_s := give_up_s - time.monotonic()) > 0:
                    await asyncio.wait({changed}, timeout=min([left_s, *rests]))
                    continue
                reason = str(error)
            if not changed.done():
                self._observe(Lost(reason=reason))
                self.deployment.give_up()
            await asyncio.wait({changed}, timeout=min([deadlines.retry_s, *rests]))

    async def _new_pipeline(self, plan: Plan, membership: Membership, rollout: Rollout) -> Pipeline:
        self._observe(Planned(model=self._placement.model, plan=plan, load=self._placement.load))
        # A new epoch for every attempt: what is left of one cannot enter the next, nor what served another head before.
        served = [worker.last_epoch for member in membership.members for worker in member.workers.values()]
        self._epoch = max(self._epoch, *served, 0) + 1
        members = {member.profile.id: member for member in membership.members}
        return await rollout.roll_out(plan, Epoch(self._epoch), members)

    # ------------------------------------------------------------------------------------------------ status

    def status(self) -> ClusterStatus:
        plan = self.deployment.plan
        prediction = plan.prediction if plan is not None else None
        members = self._membership.members if self._membership is not None else ()
        return ClusterStatus(
            cluster=self._config.cluster,
            model=self.deployment.names[0],
            state=self.deployment.state,
            epoch=self.deployment.statistics().epoch,
            nodes=tuple(self._node_status(member) for member in members),
            predicted_ttft_s=prediction.ttft_s if prediction else None,
            predicted_tokens_per_s=prediction.tokens_per_s if prediction else None,
            bound_by=prediction.bound if prediction else "",
            events=tuple(self._events),
        )

    def _node_status(self, member: Member) -> NodeStatus:
        profile = member.profile
        pipeline = self._pipeline
        kv = pipeline.kv if pipeline is not None else None
        stages = [stage for stage in pipeline.plan.stages if stage.node.id == profile.id] if pipeline else []
        return NodeStatus(
            id=profile.id,
            name=profile.name,
            host=profile.host,
            state=member.state,
            reason=member.reason or ("" if stages else self._placement.why_left_out(profile.name)),
            platform=profile.platform,
            device=profile.device,
            num_threads=profile.num_threads,
            memory_bytes=profile.memory_bytes,
            free_bytes=member.free_bytes,
            decode_tokens_per_s=self._placement.measurements.alone_tokens_per_s(member),
            rtt_s=member.rtt_s,
            stages=tuple(
                StageStatus(
                    first_layer=stage.shard.first_layer,
                    last_layer=stage.shard.last_layer,
                    embed=stage.shard.embed,
                    head=stage.shard.head,
                    weight_bytes=stage.held_bytes,
                    kv_bytes=kv.num_blocks * kv.block_size * stage.kv_bytes_per_position if kv else 0,
                )
                for stage in stages
            ),
        )

    def joining(self) -> Joining:
        port = split_address(self.grpc_address, default_port=0)[1]
        return Joining(cluster=self._config.cluster, grpc_port=port, fingerprint=self._authority.pin.hex())

    async def drain(self, node: str) -> None:
        """As in `status.Cluster`. Returns when the plan in force does without the node. Raises UnavailableError when
        somebody wants it back meanwhile, or no other plan comes about; the node is left out of plans then, too."""
        member, membership = self._find(node)
        give_up_s = time.monotonic() + self._config.deadlines.load_s
        others = [other for other in membership.usable if other is not member]
        if not others:
            raise PlanError(f"{member.profile.name} is the only node that can hold the model. Join another one first.")
        self._placement.of(others)  # PlanError: the model does not fit without it
        member.draining = True
        membership.tell()
        while self._pipeline is None or any(worker.member is member for worker in self._pipeline.workers):
            if not member.draining:
                raise UnavailableError(f"{member.profile.name} is to stay: its drain was undone.", state="draining")
            if time.monotonic() > give_up_s:
                raise UnavailableError(
                    f"No plan without {member.profile.name} came about within {self._config.deadlines.load_s:g} s; "
                    "see the head's log.",
                    state="draining",
                )
            await asyncio.wait({membership.next_change()}, timeout=0.1)
        for worker in list(member.workers.values()):
            await member.stop_worker(worker, 2 * self._config.deadlines.stop_s)

    async def undrain(self, node: str) -> None:
        """As in `status.Cluster`."""
        member, membership = self._find(node)
        member.draining = False
        membership.tell()

    async def trace(self, began_s: float, ended_s: float, sequences: tuple[SequenceRecord, ...] = ()) -> Trace:
        """As in `status.Cluster`."""
        members = self._membership.members if self._membership is not None else ()
        return await collect(
            self.deployment.journal,
            [worker for member in members if member.attached for worker in member.workers.values()],
            machine=machine_id(),
            node=HEAD,
            num_layers=self.checkpoint.spec.num_layers,
            began_s=began_s,
            ended_s=ended_s,
            sequences=sequences,
        )

    async def bench_link(self, order: LinkOrder) -> Sweep:
        """As in `status.Cluster`."""
        source, target = (None if node == HEAD else self._find(node)[0] for node in (order.source, order.target))
        if source is target:
            raise RequestError("A link has two different ends.", param="target")
        try:
            if source is None:
                assert target is not None
                return await link_bench.run(
                    order.settings,
                    order.sample,
                    target.addresses,
                    identity=self._authority.identity(HEAD),
                    peer=target.profile.id,
                    liveness=rpc.Liveness.of(self._config.deadlines),
                )
            return await link_bench.ask(source, target, order)
        except (TransportError, TimeoutError) as error:
            why = str(error) or "it is too slow to measure"
            raise UnavailableError(f"The link was not measured: {why}.", state="degraded") from error

    def _find(self, node: str) -> tuple[Member, Membership]:
        membership = self._membership
        member = membership.find(node) if membership is not None else None
        if membership is None or member is None:
            names = (
                [f"{member.profile.id} ({member.profile.name})" for member in membership.members] if membership else []
            )
            raise RequestError(
                f"There is no node {node!r}; there is: {', '.join(names) or 'none yet'}.", code="not_found"
            )
        return member, membership


def _require_positions(max_model_len: int | None, max_positions: int) -> None:
    if max_model_len is not None and max_model_len > max_positions:
        raise ConfigError(
            f"--max-model-len is {max_model_len}, but the model knows only {max_positions} positions. "
            "Choose at most that many."
        )


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def served_names(config: ModelConfig) -> tuple[str, ...]:
    """The names under which clients ask for the model."""
    if config.served_names:
        return config.served_names
    return (_EMBEDDED_NAME,) if config.model == EMBEDDED_MODEL else (config.model.rstrip("/"),)
