"""How fast nodes and links are for one model, as they have told: asked once, remembered while they are attached.

Nodes on one machine are measured one after the other, or they would slow each other; machines side by side. Links are
measured in pairs, and what one direction takes stands for the other.

This file does not know how anything is timed (`measure.py` does, on the nodes).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from tllm.cluster.measure import from_message, speed_key
from tllm.cluster.membership import Member
from tllm.core.config import Deadlines
from tllm.core.errors import TransportError
from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.planner.profile import HEAD, LinkProfile, NodeProfile, Speed
from tllm.transport import wire_pb2 as pb

log = logging.getLogger(__name__)

_ENGINE = "torch"
_MAX_MEASURED_NODES = 16  # whose links to each other are measured; beyond it only those to the head


class Measurements:
    """What is known of the nodes for one model in one dtype."""

    def __init__(self, checkpoint: Checkpoint, dtype: DType, deadlines: Deadlines) -> None:
        self._config = checkpoint.config
        self._num_layers = checkpoint.spec.num_layers
        self._dtype = dtype
        self._deadlines = deadlines
        self._speeds: dict[tuple[str, str], Speed | None] = {}  # (node, its agent's process); None: it could not say
        self._links: dict[tuple[str, str], LinkProfile] = {}  # by instances of agents

    def missing(self, members: Sequence[Member]) -> bool:
        """Whether there is anything to ask."""
        return any(_who(member) not in self._speeds for member in members) or bool(self._unknown_pairs(members))

    async def take(self, members: Sequence[Member]) -> None:
        """Ask whoever has not been asked. A node that does not answer is planned without a measured speed."""
        by_machine: dict[str, list[Member]] = defaultdict(list)
        for member in members:
            if _who(member) not in self._speeds:
                by_machine[member.profile.machine].append(member)
        await asyncio.gather(*(self._measure_machine(machine) for machine in by_machine.values()))
        for pair in self._unknown_pairs(members):  # one at a time: two that share a cable would halve it
            await self._measure_link(*pair)

    def profile(self, member: Member) -> NodeProfile:
        return replace(member.profile, speed=self._speeds.get(_who(member)))

    def links(self, members: Sequence[Member]) -> tuple[LinkProfile, ...]:
        """Both directions of every link that was measured between these nodes, and between them and the head."""
        there = {member.instance for member in members} | {HEAD}
        known = [link for pair, link in self._links.items() if set(pair) <= there]
        return (*known, *(replace(link, source=link.target, target=link.source) for link in known))

    def alone_tokens_per_s(self, member: Member) -> float | None:
        """One stream's speed if this node's worker held the whole model."""
        if (speed := self._speeds.get(_who(member))) is None:
            return None
        return 1.0 / (speed.step_s + self._num_layers * speed.layer_s[0] + speed.head_s[0])

    async def _measure_machine(self, members: Sequence[Member]) -> None:
        for member in members:
            self._speeds[_who(member)] = await self._measure(member)

    async def _measure(self, member: Member) -> Speed | None:
        profile = member.profile
        num_threads = max(1, profile.num_threads // profile.num_workers)
        order = pb.Measure(
            config=json.dumps(self._config),
            dtype=self._dtype,
            device=profile.device,
            num_threads=num_threads,
            engine=_ENGINE,
            key=speed_key(self._config, self._dtype, profile.device, num_threads, _ENGINE),
        )
        try:
            answer = await member.ask(pb.HeadMessage(measure=order), order.key, self._deadlines.measure_s)
            if answer.measured.failed:
                raise TransportError(answer.measured.failed)
            return from_message(answer.measured.speed)
        except TransportError as error:
            log.warning("%s has no measured speed: %s", profile.name, error)
            return None

    def _unknown_pairs(self, members: Sequence[Member]) -> list[tuple[Member, Member | None]]:
        pairs: list[tuple[Member, Member | None]] = [(member, None) for member in members if member.profile.host]
        if len(members) <= _MAX_MEASURED_NODES:
            pairs += [
                (one, other)
                for one, other in itertools.combinations(members, 2)
                if one.profile.machine != other.profile.machine
            ]
        return [pair for pair in pairs if _instances(*pair) not in self._links]

    async def _measure_link(self, member: Member, other: Member | None) -> None:
        target = HEAD if other is None else other.profile.id
        addresses = [] if other is None else [a for a in other.addresses if not a.startswith("unix:")]
        order = pb.MeasureLink(node_id=target, addresses=addresses)
        link = LinkProfile(source=member.profile.id, target=target, rtt_s=_UNKNOWN_RTT_S, bytes_per_s=_UNKNOWN_RATE)
        try:
            answer = await member.ask(pb.HeadMessage(measure_link=order), target, self._deadlines.measure_s)
            found = answer.measured_link
            if found.failed:
                raise TransportError(found.failed)
            link = replace(link, rtt_s=found.rtt_s, bytes_per_s=found.bytes_per_s)
        except TransportError as error:
            log.warning("the link %s -> %s could not be measured: %s", link.source, target, error)
        self._links[_instances(member, other)] = link


# Of a link that answers no measurement: nobody should be sent over it while there is another way.
_UNKNOWN_RTT_S = 10.0
_UNKNOWN_RATE = 1e5


def _who(member: Member) -> tuple[str, str]:
    return member.profile.id, member.instance


def _instances(member: Member, other: Member | None) -> tuple[str, str]:
    return member.instance, HEAD if other is None else other.instance
