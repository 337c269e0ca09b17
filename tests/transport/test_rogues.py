"""Strangers, impostors and liars at a server's network port: nobody of them reaches a service, and nothing is kept."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import psutil
import pytest

from tllm.core.errors import FrameError, TransportError
from tllm.core.types import Activation, BlockId, Chunk, DType, Epoch, SequenceId, Step, StepId, StepResult, TokenId
from tllm.testing.identities import expired, forged, members
from tllm.transport import rpc, trust, wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FrameLimits, StepFrame
from tllm.transport.channels import Caller
from tllm.transport.peers import Gate, host_of
from tllm.transport.trust import enrolment_identity

LIMITS = FrameLimits(
    epoch=Epoch(3), hidden_size=256, dtype=DType.FLOAT32, max_tokens=64, max_chunks=8, max_blocks=4, vocab_size=100
)
RESULT = StepResult(step=StepId(1), epoch=Epoch(3))
NODE = "n-00000001"
DEADLINE_S = 10.0
pytestmark = pytest.mark.timeout(60)


class Nothing:
    """A provider of no weights that counts who asks."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def manifest(self, fingerprint: str) -> pb.Manifest | None:
        self.num_asked += 1
        return None

    async def hashes(self, fingerprint: str, names: Sequence[str]) -> Sequence[str]:
        self.num_asked += 1
        return [""] * len(names)

    async def locate(self, fingerprint: str, name: str) -> None:
        self.num_asked += 1


class Site:
    """A head that offers everything there is on one port, and those who heard of a call."""

    def __init__(self, directory: Path, server_identity: Callable[[Site], rpc.Identity] | None = None) -> None:
        self.directory = directory / "cluster"
        self.authority = rpc.Authority.open(self.directory)
        self.head = self.authority.identity("head")
        self.node = self.authority.identity(NODE)
        self.tokens = rpc.TokenStore(self.authority)
        self.attached: list[str] = []
        self.stage = rpc.StageServer()
        self.provider = Nothing()
        self.enrolment = rpc.Enrolment(self.authority, self.tokens)
        control = rpc.ControlServer(self.on_attach)
        self.server = rpc.Server(
            [control, self.stage, rpc.ShardService(self.provider), self.enrolment],
            identity=server_identity(self) if server_identity else self.head,
            enrols=True,
        )
        self.inbox = self.stage.expect(LIMITS, sender=NODE)
        self.address = ""

    async def on_attach(self, peer: rpc.ControlPeer, _attach: pb.Attach) -> None:
        self.attached.append(peer.name)
        await peer.send(pb.HeadMessage(welcome=pb.Welcome(cluster="home")))
        async for _ in peer:
            pass

    async def start(self) -> Site:
        (self.address,) = await self.server.start(["127.0.0.1:0"])
        return self

    async def expect_untouched(self) -> None:
        """Nobody got through, and the one who may does."""
        assert self.attached == []
        assert self.provider.num_asked == 0
        link = await rpc.connect([self.address], LIMITS, identity=self.node, peer="head", timeout_s=DEADLINE_S)
        await link.send(RESULT)
        assert await anext(self.inbox) == RESULT
        await link.aclose()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = await Site(tmp_path).start()
    yield site
    await site.server.aclose()


CALLS = {
    "Control/Attach": pb.AgentMessage(attach=pb.Attach(protocol=rpc.PROTOCOL, node_id=NODE)).SerializeToString(),
    "Stage/Stream": wire.encode_hello(LIMITS),
    "Shards/Describe": pb.DescribeRequest(fingerprint="f").SerializeToString(),
    "Shards/Hashes": pb.HashesRequest(fingerprint="f", names=["w"]).SerializeToString(),
    "Shards/Read": pb.ReadRequest(fingerprint="f", name="w").SerializeToString(),
    "Shards/Echo": pb.EchoRequest(data=b"hello").SerializeToString(),
}
IMPOSTORS: dict[str, Callable[[Site], rpc.Identity]] = {
    "of another cluster": lambda site: replace(
        members(site.directory.parent / "other", NODE)[0], authority=site.node.authority
    ),
    "signed by the public key": lambda site: forged(NODE, site.node),
    "signed by the public key for the head": lambda site: forged("head", site.node),
    "expired": lambda site: expired(site.directory, NODE),
    "enrolment": lambda site: replace(enrolment_identity(), authority=site.node.authority),
}


async def knock(channel: grpc.aio.Channel, call: str, message: bytes) -> tuple[grpc.StatusCode, str]:
    """How the call ends. A stream of one message is what a unary call is on the wire."""
    stream: Any = channel.stream_stream(f"/tllm.{call}")()
    try:
        await stream.write(message)
        await stream.done_writing()
        while isinstance(await stream.read(), bytes):
            pass
    except (grpc.RpcError, asyncio.InvalidStateError):
        pass
    return await asyncio.wait_for(stream.code(), DEADLINE_S), await stream.details()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impostor", IMPOSTORS)
async def test_an_impostor_reaches_no_service(site: Site, impostor: str, call: str) -> None:
    identity = IMPOSTORS[impostor](site)
    async with Caller(identity=identity, peer="head").channel(site.address, ()) as channel:
        code, details = await knock(channel, call, CALLS[call])
    if impostor in ("of another cluster", "expired"):  # TLS itself refuses
        assert code is grpc.StatusCode.UNAVAILABLE
    else:
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "not issued by this cluster" in details
    await site.expect_untouched()


@pytest.mark.parametrize("call", CALLS)
async def test_who_shows_no_certificate_reaches_no_service(site: Site, call: str) -> None:
    options = [("grpc.ssl_target_name_override", "head")]
    for credentials in (None, grpc.ssl_channel_credentials(site.head.authority)):
        channel = (
            grpc.aio.insecure_channel(site.address)
            if credentials is None
            else grpc.aio.secure_channel(site.address, credentials, options)
        )
        async with channel:
            code, _ = await knock(channel, call, CALLS[call])
        assert code is grpc.StatusCode.UNAVAILABLE
    await site.expect_untouched()


async def test_a_server_without_enrolment_lets_the_public_key_not_even_in(tmp_path: Path) -> None:
    head, node = members(tmp_path / "cluster", "head", NODE)
    server = rpc.Server([rpc.StageServer()], identity=head)
    (address,) = await server.start(["127.0.0.1:0"])
    for impostor in (forged(NODE, node), enrolment_identity()):
        identity = replace(impostor, authority=node.authority)
        async with Caller(identity=identity, peer="head").channel(address, ()) as channel:
            code, _ = await knock(channel, "Stage/Stream", CALLS["Stage/Stream"])
        assert code is grpc.StatusCode.UNAVAILABLE
    await server.aclose()


async def test_members_reach_every_service(site: Site) -> None:
    """What is refused above is refused for who asks, not for what is asked."""
    async with Caller(identity=site.node, peer="head").channel(site.address, ()) as channel:
        for call, message in CALLS.items():
            code, _ = await knock(channel, call, message)
            assert code not in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE), call
    assert site.attached == [NODE]
    assert site.provider.num_asked == 3


async def test_a_member_that_is_not_the_sender_is_refused_and_the_sender_still_gets_through(site: Site) -> None:
    (other,) = members(site.directory, "n-00000002")
    with pytest.raises(TransportError, match=f"sent by {NODE} here, and not by n-00000002"):
        await rpc.connect([site.address], LIMITS, identity=other, peer="head", timeout_s=DEADLINE_S)
    await site.expect_untouched()


async def test_a_member_cannot_attach_as_another(site: Site) -> None:
    (other,) = members(site.directory, "n-00000002")
    with pytest.raises(TransportError, match=f"n-00000002's, and the Attach is '{NODE}'"):
        await rpc.attach(site.address, pb.Attach(node_id=NODE), identity=other, timeout_s=DEADLINE_S)
    await site.expect_untouched()


SERVERS: dict[str, tuple[Callable[[Site], rpc.Identity], str]] = {
    "another name": (lambda site: site.node, "somebody else"),
    "another cluster": (lambda site: members(site.directory.parent / "other", "head")[0], "not of this cluster"),
    "signed by the public key": (lambda site: forged("head", site.node), "not of this cluster"),
    "expired": (lambda site: expired(site.directory, "head"), "expired"),
}


@pytest.mark.parametrize("server", SERVERS)
async def test_whoever_connects_refuses_an_impostor_with_the_reason(tmp_path: Path, server: str) -> None:
    identity, why = SERVERS[server]
    site = await Site(tmp_path, identity).start()
    with pytest.raises(TransportError, match=f"within 0.3 s .*{why}"):
        await rpc.connect([site.address], LIMITS, identity=site.node, peer="head", timeout_s=0.3)
    with pytest.raises(TransportError, match=f"within 0.3 s .*{why}"):
        await rpc.attach(site.address, pb.Attach(node_id=NODE), identity=site.node, timeout_s=0.3)
    await site.server.aclose()


async def test_a_member_cannot_stand_in_for_the_member_that_is_wanted(site: Site) -> None:
    with pytest.raises(TransportError, match=r"within 0\.3 s .*somebody else"):
        await rpc.connect([site.address], LIMITS, identity=site.node, peer="n-00000002", timeout_s=0.3)
    await site.expect_untouched()


class StillThere:
    """What a handler sees of a connection that was made long ago."""

    def __init__(self, identity: rpc.Identity) -> None:
        self._certificate = identity.certificate

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._certificate]}


def test_a_certificate_that_expires_during_a_connection_opens_no_more_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, node = members(tmp_path, "head", NODE)
    gate, context = Gate(head), cast("Any", StillThere(node))
    assert gate.peer(context).name == NODE

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            return cls.fromtimestamp(datetime.now(tz).timestamp() + 1100 * 86400, tz)

    monkeypatch.setattr(trust, "datetime", Later)
    with pytest.raises(TransportError, match=f"{NODE} expired"):
        gate.peer(context)


async def test_the_network_needs_an_identity_and_a_name(site: Site) -> None:
    for identity, peer in ((None, "head"), (site.node, "")):
        with pytest.raises(TransportError, match="must say who they are"):
            await rpc.connect([site.address], LIMITS, identity=identity, peer=peer, timeout_s=DEADLINE_S)


@pytest.mark.parametrize("num_bytes", [(256 << 10) + 1, 2 << 20])
async def test_a_message_that_only_a_neighbour_service_may_get_is_refused(site: Site, num_bytes: int) -> None:
    leave = pb.AgentMessage(leave=pb.Leave(reason="x" * (2 << 20))).SerializeToString()
    messages = {"Stage/Stream": bytes(num_bytes), "Control/Attach": leave}
    async with Caller(identity=site.node, peer="head").channel(site.address, ()) as channel:
        for call, message in messages.items():
            stream: Any = channel.stream_stream(f"/tllm.{call}")()
            await stream.write(CALLS[call])
            await stream.read()
            await stream.write(message)
            assert await asyncio.wait_for(stream.code(), DEADLINE_S) is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(FrameError, match="at most"):
        await anext(site.inbox)


async def test_two_hundred_refused_attempts_leave_nothing_behind(site: Site) -> None:
    process = psutil.Process()
    impostors = [make(site) for make in IMPOSTORS.values()]
    garbage = pb.EnrolRequest(hello=pb.EnrolHello(protocol=rpc.PROTOCOL, token_id="ff" * 500)).SerializeToString()

    async def attempts(count: int) -> None:
        for number in range(count):
            identity = impostors[number % len(impostors)]
            call = list(CALLS)[number % len(CALLS)]
            async with Caller(identity=identity, peer="head").channel(site.address, ()) as channel:
                await knock(channel, call, CALLS[call])
                if number % 4 == 0:
                    await knock(channel, "Enrolment/Enrol", garbage)

    def kept() -> tuple[int, int]:
        gc.collect()
        return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))

    await attempts(60)
    before, rss_bytes = kept(), process.memory_info().rss
    await attempts(200)
    async with asyncio.timeout(5):  # gRPC's own threads close its sockets
        while any(now > then for now, then in zip(kept(), before, strict=True)):
            await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=0.02)
    # 200 connections that were kept would be tens of megabytes.
    assert process.memory_info().rss - rss_bytes < 8 << 20
    assert site.enrolment.statistics()["num_open"] == 0
    assert site.enrolment.statistics()["num_failing"] <= 1
    await site.expect_untouched()


class Tap:
    """A wire between two ends that keeps a copy of what passes."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._tasks: set[asyncio.Task[None]] = set()
        self.seen = bytearray()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._move(source, sink)))

    async def _move(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                self.seen += data
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass
        finally:
            sink.close()

    async def aclose(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_who_listens_on_the_wire_sees_neither_hidden_states_nor_the_secret(site: Site) -> None:
    tap = Tap(site.address)
    address = await tap.start()
    token = site.tokens.new("a label")
    identity = await rpc.enrol(address, token, timeout_s=DEADLINE_S)
    marker = b"a hidden state that nobody may read"
    data = (marker * 2000)[: 64 * 256 * 4]
    chunk = Chunk(seq=SequenceId(1), start=0, tokens=(TokenId(1),) * 64, blocks=(BlockId(0),))
    frame = StepFrame(
        step=Step(id=StepId(1), epoch=Epoch(3), chunks=(chunk,)),
        hidden=Activation(data=data, dtype=DType.FLOAT32, shape=(64, 256)),
    )
    inbox = site.stage.expect(LIMITS, sender=identity.name)
    link = await rpc.connect([address], LIMITS, identity=identity, peer="head", timeout_s=DEADLINE_S)
    await link.send(frame)
    assert await anext(inbox) == frame
    await link.aclose()
    await tap.aclose()
    assert len(tap.seen) > len(data)  # it all went by here
    parsed = rpc.JoinToken.parse(token)
    for secret in (marker, parsed.secret, parsed.secret.hex().encode(), token.encode(), identity.key[40:80]):
        assert secret not in tap.seen


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("ipv4:192.168.1.7:40000", "192.168.1.7"),
        ("ipv6:%5B2001:db8::1%5D:40000", "2001:db8::/64"),
        ("ipv6:[2001:db8::ffff:2]:40001", "2001:db8::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:40000", "fe80::/64"),
    ],
)
def test_a_machine_is_known_by_its_address_or_its_ipv6_network(address: str, host: str) -> None:
    assert host_of(address) == host
