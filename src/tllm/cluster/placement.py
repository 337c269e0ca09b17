"""Which plan: of the nodes that can be used, by what is known of them; and what another plan would gain.

What is not known is measured first where it can matter, except while requests wait.

This file does not know when a plan is wanted, nor how one is put into force.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

from tllm.cluster.events import Measuring, Observer
from tllm.cluster.machine import machine_id
from tllm.cluster.measurements import Measurements
from tllm.cluster.membership import Member, Membership
from tllm.cluster.status import NodeState
from tllm.core.config import ServeConfig
from tllm.core.errors import PlanError
from tllm.core.types import DType, Quantization
from tllm.models.checkpoint import Checkpoint
from tllm.models.slicing import layer_weights
from tllm.models.spec import Shard
from tllm.planner.plan import Plan, Prediction
from tllm.planner.predict import gain, predict
from tllm.planner.profile import Load, ModelProfile
from tllm.planner.search import place

_WORTH = 0.15  # of speed that a change of plan must gain


class Placement:
    """Plans of one model for the members of a cluster."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: DType, *, name: str, config: ServeConfig, observe: Observer
    ) -> None:
        quantization = config.model.quantization
        self._config = config
        self._observe = observe
        self.model = model_profile(checkpoint, dtype, quantization, name)
        self.load = Load(streams=config.streams, max_batch_tokens=config.model.max_batch_tokens)
        self.measurements = Measurements(checkpoint, dtype, quantization, config.deadlines)
        self._considered: Plan | None = None  # the newest, in force or not

    async def plan(self, membership: Membership) -> Plan:
        """The best for the nodes that can be used now; measures those that it knows nothing of, if that can matter.

        Raises PlanError when they do not suffice.
        """
        self.measurements.keep(membership.members)
        usable = membership.usable
        if len(usable) > 1 and self.measurements.missing(usable):
            self._observe(Measuring(num_nodes=len(usable)))
            await self.measurements.take(usable)
            usable = tuple(member for member in usable if member.state is NodeState.READY)
        plan = await asyncio.to_thread(self.of, usable)  # many nodes and layers take a while, and streams go on
        self._considered = plan
        return plan

    async def plan_at_once(self, membership: Membership, before: Plan | None) -> Plan:
        """The same while requests wait: of the nodes that had a part or were measured before, as long as they suffice.
        The others can be measured when the requests go on."""
        had_part = {stage.node.id for stage in before.stages} if before is not None else set()
        known = [
            member
            for member in membership.usable
            if member.profile.id in had_part or not self.measurements.missing([member])
        ]
        try:
            self._considered = self.of(known)
        except PlanError:
            return await self.plan(membership)
        return self._considered

    def of(self, members: Sequence[Member]) -> Plan:
        """The best for these nodes, by what is known. Raises PlanError when they do not suffice."""
        return place(
            self.model,
            [self.measurements.profile(member) for member in members],
            min_kv_positions=self._config.model.max_model_len or self._config.model.block_size,
            links=self.measurements.links(members),
            load=self.load,
            head_machine=machine_id(),
            use_all=self._config.use_all,
        )

    def why_better(self, plan: Plan, in_force: Plan, members: Sequence[Member]) -> str | None:
        """Why it should take the place of the one in force, whose stages are on `members`; None: it should not."""
        used, wanted = ({stage.node.id for stage in one.stages} for one in (in_force, plan))
        if leaving := [m.profile.name for m in members if m.draining and m.profile.id not in wanted]:
            return f"{', '.join(leaving)} is to go"
        if self._config.use_all:
            return "every node is to have a part" if wanted > used else None
        old, new = self._prediction(in_force, members), plan.prediction
        if old is None or new is None or (gained := gain(old, new, self.load)) <= _WORTH:
            return None
        return f"another plan is {gained:.0%} faster"

    def _prediction(self, plan: Plan, members: Sequence[Member]) -> Prediction | None:
        """Of a plan, whose stages are on `members`, by what is known now."""
        stages = [
            replace(stage, node=self.measurements.profile(member))
            for stage, member in zip(plan.stages, members, strict=True)
        ]
        links = self.measurements.links(members)
        return predict(self.model, stages, links, self.load, head_machine=machine_id())

    def why_left_out(self, name: str) -> str:
        """What the newest plan says of a node that has no part in it; empty when it says nothing."""
        dropped = self._considered.dropped if self._considered is not None else ()
        return next((line.partition(": ")[2] for line in dropped if line.startswith(f"{name}:")), "")


def model_profile(checkpoint: Checkpoint, dtype: DType, quantization: Quantization | None, name: str) -> ModelProfile:
    """What the planner needs of a checkpoint: exact bytes from its headers, in the form it is served in."""
    spec = checkpoint.spec
    num_weights = sum(math.prod(weight.shape) for weight in layer_weights(spec, 0))

    def num_bytes(first_layer: int, last_layer: int, *, embed: bool = False, head: bool = False) -> int:
        shard = Shard(first_layer=first_layer, last_layer=last_layer, embed=embed, head=head)
        return checkpoint.weight_bytes(shard, dtype, quantization)

    return ModelProfile(
        name=name,
        layer_bytes=tuple(num_bytes(layer, layer + 1) for layer in range(spec.num_layers)),
        embed_bytes=num_bytes(0, 0, embed=True),
        head_bytes=num_bytes(0, 0, head=True),
        tied=spec.tied,
        kv_bytes_per_position=spec.kv_bytes_per_position(1, dtype),
        hidden_bytes=spec.hidden_size * dtype.num_bytes,
        bytes_per_weight=num_bytes(0, 1) / num_weights,
    )
