"""The head: it lets nodes join, makes the plan, rolls it out and keeps the deployment served.

    listen ─▶ (own node joins) ─▶ wait for nodes ─▶ plan ─▶ roll out ─▶ serve ─▶ drain ─▶ stop

This file does not know HTTP or terminals; whoever watches gets events. It never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tllm.cluster.agent import Agent, machine_id
from tllm.cluster.deployment import Deployment
from tllm.cluster.events import Listening, Lost, NodeJoined, Observer, Planned, Serving, Waiting
from tllm.cluster.membership import Membership
from tllm.cluster.rollout import Home, Pipeline, roll_out
from tllm.core.config import EMBEDDED_MODEL, ModelConfig, ServeConfig, join_address, state_directory
from tllm.core.errors import ConfigError, PlanError, TransportError, UnavailableError
from tllm.core.types import DType, Epoch
from tllm.models.checkpoint import Checkpoint
from tllm.models.repository import resolve_model
from tllm.models.spec import Shard
from tllm.planner.profile import ModelProfile
from tllm.planner.search import place
from tllm.transport import rpc

log = logging.getLogger(__name__)

_EMBEDDED_NAME = "tllm-demo"


class Head:
    """One served model and the nodes that compute it."""

    def __init__(self, config: ServeConfig, observe: Observer) -> None:
        self._config = config
        self._observe = observe
        self._token = join_token()
        self.checkpoint = Checkpoint.open(resolve_model(config.model.model))
        self.dtype = config.model.dtype or self.checkpoint.dtype
        _require_positions(config.model.max_model_len, self.checkpoint.spec.max_positions)
        self.deployment = Deployment(self.checkpoint, config.model, names=served_names(config.model))
        self.grpc_address = ""
        self._epochs = itertools.count(1)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """Everything up; the task serves the model and ends only with the error that kept it from being served at all.

        When the context is left, requests have been drained, nodes told and every process of this machine is gone.
        """
        deadlines = self._config.deadlines
        async with AsyncExitStack() as stack:
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="tllm-"))
            membership = Membership(
                cluster=self.deployment.names[0],
                token=self._token,
                on_joined=lambda node: self._observe(NodeJoined(node=node)),
            )
            control = rpc.ControlServer(membership.serve)
            local = f"unix:{sockets}/control.sock"
            _, self.grpc_address = await control.start([local, join_address(self._config.host, self._config.grpc_port)])
            stack.push_async_callback(control.aclose)
            self._observe(Listening(grpc_address=self.grpc_address, token=self._token))

            server = rpc.StageServer()
            addresses = await server.start([f"unix:{sockets}/home.sock", join_address(self._config.host, 0)])
            stack.push_async_callback(server.aclose)
            home = Home(server=server, machine=machine_id(), addresses=tuple(addresses))

            if self._config.local_node is not None:
                agent = Agent(self._config.local_node, token=self._token, deadlines=deadlines)
                await stack.enter_async_context(agent.attached(local))
            stack.push_async_callback(membership.aclose, "the head stopped")

            serving = asyncio.create_task(self._serve(membership, home), name="head")
            stack.push_async_callback(_cancelled, serving)
            stack.push_async_callback(self.deployment.drain, deadlines.drain_s)
            yield serving

    async def _serve(self, membership: Membership, home: Home) -> None:
        """Plan, roll out, serve; when the pipeline breaks, again with whoever is left, in a new epoch.

        What keeps the first pipeline from being built is raised. Later on it ends the open requests with an error, and
        the next try is made when a node joins or leaves, or after a while.
        """
        num_nodes = self._config.num_nodes or 1
        if len(membership.members) < num_nodes:
            self._observe(Waiting(num_nodes=num_nodes))
        await membership.wait_for(num_nodes)
        pipeline = await self._pipeline(membership, home)
        while True:
            kv = pipeline.kv
            self._observe(Serving(num_blocks=kv.num_blocks, block_size=kv.block_size, max_model_len=kv.max_model_len))
            try:
                reason = await self.deployment.serve(pipeline)
            finally:
                await pipeline.aclose()
            self._observe(Lost(reason=reason))
            pipeline = await self._rebuilt(membership, home)

    async def _rebuilt(self, membership: Membership, home: Home) -> Pipeline:
        while True:
            changed = membership.next_change()
            try:
                return await self._pipeline(membership, home)
            except (PlanError, UnavailableError, TransportError) as error:
                # A plan for a node that turned out to be gone says nothing of those that are left.
                if not changed.done():
                    log.warning("cannot serve with the nodes there are: %s", error)
                    self._observe(Lost(reason=str(error)))
                    self.deployment.give_up()
            await asyncio.wait({changed}, timeout=self._config.deadlines.retry_s)

    async def _pipeline(self, membership: Membership, home: Home) -> Pipeline:
        members = {member.profile.id: member for member in membership.members}
        model = model_profile(self.checkpoint, self.dtype, self.deployment.names[0])
        plan = place(
            model,
            [member.profile for member in members.values()],
            min_kv_positions=self._config.model.max_model_len or self._config.model.block_size,
        )
        self._observe(Planned(model=model, plan=plan))
        return await roll_out(
            plan=plan,
            epoch=Epoch(next(self._epochs)),  # a new one for every attempt: what is left of one cannot enter the next
            checkpoint=self.checkpoint,
            dtype=self.dtype,
            config=self._config.model,
            members=members,
            home=home,
            deadlines=self._config.deadlines,
            observe=self._observe,
        )


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


def model_profile(checkpoint: Checkpoint, dtype: DType, name: str) -> ModelProfile:
    """What the planner needs of a checkpoint: exact bytes from its headers, in the dtype it is served in."""
    spec = checkpoint.spec

    def num_bytes(first_layer: int, last_layer: int, *, embed: bool = False, head: bool = False) -> int:
        shard = Shard(first_layer=first_layer, last_layer=last_layer, embed=embed, head=head)
        return checkpoint.weight_bytes(shard, dtype)

    return ModelProfile(
        name=name,
        layer_bytes=tuple(num_bytes(layer, layer + 1) for layer in range(spec.num_layers)),
        embed_bytes=num_bytes(0, 0, embed=True),
        head_bytes=num_bytes(0, 0, head=True),
        tied=spec.tied,
        kv_bytes_per_position=spec.kv_bytes_per_position(1, dtype),
    )


def join_token() -> str:
    """The secret that nodes show to join heads of this machine; made once, readable by this user alone."""
    path = state_directory() / "token"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        # Complete before it has its name: nobody can read half a token, and of two who write at once the first wins.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="token-") as file:  # mode 0600
            file.write(secrets.token_urlsafe(24))
            file.flush()
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    token = path.read_text().strip()
    if not token:
        raise ConfigError(f"The join token in {path} is empty. Remove the file; a new one is made at the next start.")
    return token
