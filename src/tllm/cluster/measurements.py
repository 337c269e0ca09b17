"""How fast nodes and links are for one model, as they have told: asked once, remembered while they are attached.

Nodes on one machine are measured one after the other, or they would slow each other; machines side by side. Links are
measured in pairs, and what one direction takes stands for the other.

This file does not know how anything is timed (`measure.py` and `echoes.py` do, on the nodes).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from tllm.cluster.loads import ENGINE
from tllm.cluster.membership import Member
from tllm.cluster.speeds import from_message, speed_key
from tllm.core.config import Deadlines
from tllm.core.errors import FrameError, TransportError
from tllm.core.types import HEAD, DType, Quantization
from tllm.models.checkpoint import Checkpoint
from tllm.planner.profile import LinkProfile, NodeProfile, Speed
from tllm.transport import wire_pb2 as pb

log = logging.getLogger(__name__)

_MAX_MEASURED_NODES = 16  # whose links to each other are measured; beyond it only those to the head


class Measurements:
    """What is known of the nodes for one model in one form."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: DType, quantization: Quantization | None, deadlines: Deadlines
    ) -> None:
        self._config = checkpoint.config
        self._num_layers = checkpoint.spec.num_layers
        self._dtype = dtype
        self._quantization = quantization or _stored_quantization(checkpoint)
        self._deadlines = deadlines
        self._speeds: dict[tuple[str, str], Speed | None] = {}  # (node, its agent's process); None: it could not say
        self._links: dict[tuple[str, str], LinkProfile] = {}  # by instances of agents
        self._in_vain: dict[tuple[str, str], tuple[int, int]] = {}  # links that could not be measured; see `_streams`
        self._suspects: set[tuple[str, str]] = set()  # links that looked different once

    def missing(self, members: Sequence[Member]) -> bool:
        """Whether there is anything to ask."""
        return any(_who(member) not in self._speeds for member in members) or bool(self._unknown_pairs(members))

    def keep(self, members: Sequence[Member]) -> None:
        """Forget what was measured of agents that are none of these and do not come back."""
        whos, instances = {_who(member) for member in members}, {member.instance for member in members} | {HEAD}
        self._speeds = {who: speed for who, speed in self._speeds.items() if who in whos}
        self._links = {pair: link for pair, link in self._links.items() if set(pair) <= instances}
        self._in_vain = {pair: streams for pair, streams in self._in_vain.items() if pair in self._links}
        self._suspects = {pair for pair in self._suspects if set(pair) <= instances}

    async def take(self, members: Sequence[Member]) -> None:
        """Ask whoever has not been asked. A node that does not answer in time is planned without a measured speed; one
        that cannot be reached is asked again when it is back."""
        by_machine: dict[str, list[Member]] = defaultdict(list)
        for member in members:
            if _who(member) not in self._speeds:
                by_machine[member.profile.machine].append(member)
        await asyncio.gather(*(self._measure_machine(machine) for machine in by_machine.values()))
        for pair in self._unknown_pairs(members):  # one at a time: two that share a cable would halve it
            if all(member is None or member.attached for member in pair):
                await self._measure_link(*pair)

    def profile(self, member: Member) -> NodeProfile:
        speed = self._speeds.get(_who(member))
        if speed is not None:
            speed = replace(speed, step_s=speed.step_s + _HANDOVER_S)
        return replace(member.profile, speed=speed)

    def links(self, members: Sequence[Member]) -> tuple[LinkProfile, ...]:
        """Both directions of every link that was measured between these nodes, and between them and the head."""
        there = {member.instance for member in members} | {HEAD}
        known = [link for pair, link in self._links.items() if set(pair) <= there]
        return (*known, *(replace(link, source=link.target, target=link.source) for link in known))

    def alone_tokens_per_s(self, member: Member) -> float | None:
        """One stream's speed if this node's worker held the whole model."""
        if (speed := self._speeds.get(_who(member))) is None:
            return None
        token_s = speed.step_s + self._num_layers * speed.layer_s[0] + speed.head_s[0]
        return 1.0 / token_s if token_s > 0 else None

    async def _measure_machine(self, members: Sequence[Member]) -> None:
        for member in members:
            await self._measure(member)

    async def _measure(self, member: Member) -> None:
        profile = member.profile
        num_threads = max(1, profile.num_threads // profile.num_workers)
        order = pb.Measure(
            config=json.dumps(self._config),
            dtype=self._dtype,
            quantization=str(self._quantization or ""),
            device=profile.device,
            num_threads=num_threads,
            engine=ENGINE,
            key=speed_key(self._config, self._dtype, self._quantization, profile.device, num_threads, ENGINE),
        )
        speed = None
        try:
            answer = await member.ask(pb.HeadMessage(measure=order), order.key, self._deadlines.measure_s)
            if not (why := answer.measured.failed):
                speed = from_message(answer.measured.speed)
        except (FrameError, TimeoutError) as error:
            why = str(error)
        except TransportError as error:
            log.info("%s was not measured: %s", profile.name, error)
            return
        if why:
            log.warning("%s has no measured speed: %s", profile.name, why)
        self._speeds[_who(member)] = speed

    def _unknown_pairs(self, members: Sequence[Member]) -> list[tuple[Member, Member | None]]:
        pairs: list[tuple[Member, Member | None]] = [(member, None) for member in members if member.profile.host]
        if len(members) <= _MAX_MEASURED_NODES:
            pairs += [
                (one, other)
                for one, other in itertools.combinations(members, 2)
                if one.profile.machine != other.profile.machine
            ]
        return [pair for pair in pairs if self._is_unknown(*pair)]

    def _is_unknown(self, member: Member, other: Member | None) -> bool:
        """Never asked, or asked in vain and one of the two was lost since: then they may hear each other now."""
        key, streams = _instances(member, other), _streams(member, other)
        return key not in self._links or self._in_vain.get(key, streams) != streams

    async def look_again(self, members: Sequence[Member]) -> bool:
        """Forget what was measured of a link between these nodes, or between them and the head, that has become much
        slower or faster and stays so: it is measured anew for the next plan. Whether there is such a link.

        One look alone does not count: a long prompt on its way makes a link look slow for a moment.
        """
        is_changed = False
        pairs: list[tuple[Member, Member | None]] = [(members[0], None), (members[-1], None)]
        pairs += list(itertools.pairwise(members))
        for one, next_one in dict.fromkeys(pairs):
            member, other = one, next_one
            if next_one is not None and _instances(one, next_one) not in self._links:
                member, other = next_one, one  # as it was measured: the head's own node has no address for others
            key = _instances(member, other)
            known = self._links.get(key)
            if known is None or not member.attached:
                continue
            try:
                now = await self._asked_link(member, other, glance=True)
            except TransportError as error:
                log.info("the link to %s was not looked at: %s", member.profile.name, error)
                continue
            before_s, now_s = (link.rtt_s + _LOOK_BYTES / link.bytes_per_s for link in (known, now))
            if max(before_s, now_s) < _CHANGED * min(before_s, now_s) + _UNSEEN_S:
                self._suspects.discard(key)
            elif key in self._suspects:
                log.warning("the link %s -> %s is not what it was: %.1f ms", now.source, now.target, 1000 * now_s)
                self._suspects.discard(key)
                self._links.pop(key, None)
                self._links.pop(key[::-1], None)
                is_changed = True
            else:
                self._suspects.add(key)
        return is_changed

    async def _measure_link(self, member: Member, other: Member | None) -> None:
        key = _instances(member, other)
        try:
            link = self._links[key] = await self._asked_link(member, other)
        except TransportError as error:
            log.info("the link from %s was not measured: %s", member.profile.name, error)
            return
        self._in_vain.pop(key, None)
        if link.rtt_s == _UNKNOWN_RTT_S:
            self._in_vain[key] = _streams(member, other)

    async def _asked_link(self, member: Member, other: Member | None, *, glance: bool = False) -> LinkProfile:
        """A link that does not answer looks like one that nobody would choose. Raises TransportError when one of the
        two nodes cannot be reached by the head: that says nothing of the link."""
        target = HEAD if other is None else other.profile.id
        addresses = [] if other is None else [a for a in other.addresses if not a.startswith("unix:")]
        order = pb.MeasureLink(node_id=target, addresses=addresses, glance=glance)
        link = LinkProfile(source=member.profile.id, target=target, rtt_s=_UNKNOWN_RTT_S, bytes_per_s=_UNKNOWN_RATE)
        try:
            message = pb.HeadMessage(measure_link=order)
            found = (await member.ask(message, target, self._deadlines.measure_s, about=other)).measured_link
        except TimeoutError as error:
            why = str(error)
        else:
            if not (why := found.failed) and 0 <= found.rtt_s < math.inf and 0 < found.bytes_per_s < math.inf:
                return replace(link, rtt_s=found.rtt_s, bytes_per_s=found.bytes_per_s)
        log.warning("the link %s -> %s could not be measured: %s", link.source, target, why or "nonsense was answered")
        return link


# What a worker takes to hand a step from its link to its compute thread and the answer back, beside the engine's own
# time: the difference between predicted and measured of short steps (docs/lab/LOG.md, 2026-11-21).
_HANDOVER_S = 0.7e-3

_LOOK_BYTES = 16 << 10  # of the message whose time is compared
_CHANGED = 3.0
_UNSEEN_S = 0.002  # noise that is no change, however fast a link is

# Of a link that answers no measurement: nobody should be sent over it while there is another way.
_UNKNOWN_RTT_S = 10.0
_UNKNOWN_RATE = 1e5


def _who(member: Member) -> tuple[str, str]:
    return member.profile.id, member.instance


def _instances(member: Member, other: Member | None) -> tuple[str, str]:
    return member.instance, HEAD if other is None else other.instance


def _streams(member: Member, other: Member | None) -> tuple[int, int]:
    """Another one whenever one of the two was lost and is back."""
    return member.num_streams, 0 if other is None else other.num_streams


def _stored_quantization(checkpoint: Checkpoint) -> Quantization | None:
    """The one of ours that is as fast as how the checkpoint's layers are stored."""
    stored = checkpoint.quantized("layers.0.down.weight")
    if stored is None:
        return None
    if stored.bits == 8:
        return Quantization.parse("int8")
    return Quantization(bits=4, group=min((32, 64, 128), key=lambda group: abs(group - stored.group)))
