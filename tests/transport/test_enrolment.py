"""Becoming a member: who may, who may not and learns why, and what is kept of them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import ConfigError, TransportError
from tllm.transport import enrolment, rpc
from tllm.transport import wire_pb2 as pb
from tllm.transport.channels import STREAM_ERRORS, Caller
from tllm.transport.enrolment import FailureLimiter
from tllm.transport.trust import enrolment_identity, new_key, new_signing_request, read_certificate, read_member

DEADLINE_S = 10.0
pytestmark = pytest.mark.timeout(30)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Head:
    """A cluster, its tokens, and where one enrols."""

    def __init__(self, directory: Path) -> None:
        self.clock = Clock()
        self.authority = rpc.Authority.open(directory / "cluster")
        self.tokens = rpc.TokenStore(self.authority)
        self.identity = self.authority.identity("head")
        self.service = rpc.Enrolment(self.authority, self.tokens, clock=self.clock)
        self.server = rpc.Server([self.service], identity=self.identity, enrols=True)
        self.unix = f"unix:{directory}/head.sock"
        self.tcp = ""

    async def start(self) -> None:
        _, self.tcp = await self.server.start([self.unix, "127.0.0.1:0"])

    def channel(self) -> grpc.aio.Channel:
        """As a newcomer's."""
        roots = self.identity.certificate
        return Caller(identity=enrolment_identity(), peer="head", roots=roots).channel(self.tcp, ())


@pytest.fixture
async def head(tmp_path: Path) -> AsyncIterator[Head]:
    head = Head(tmp_path)
    await head.start()
    yield head
    await head.server.aclose()


def enrol(address: str, token: str | None) -> Any:
    return rpc.enrol(address, token, timeout_s=DEADLINE_S)


async def ending(call: Any) -> grpc.StatusCode:
    """Told after whatever comes before it is read."""
    async with asyncio.timeout(DEADLINE_S):
        try:
            while isinstance(await call.read(), bytes):
                pass
        except STREAM_ERRORS:
            pass
        return await call.code()


async def test_a_token_makes_a_member_over_tcp_and_this_user_needs_none(head: Head) -> None:
    token = head.tokens.new("for ada")
    here, there = await enrol(head.unix, None), await enrol(head.tcp, token)
    assert here.name != there.name
    for identity, token_id in ((here, ""), (there, rpc.JoinToken.parse(token).token_id)):
        assert rpc.Identity.from_message(identity.to_message()) == identity
        member = read_member(identity.certificate, read_certificate(head.authority.certificate))
        assert (member.name, member.token_id) == (identity.name, token_id)
        assert member.name.startswith("n-")


async def test_a_head_that_starts_later_is_waited_for(head: Head) -> None:
    address = head.tcp
    await head.server.aclose()
    enrolling = asyncio.create_task(enrol(address, head.tokens.default()))
    await asyncio.wait({enrolling}, timeout=0.1)
    server = rpc.Server([head.service], identity=head.authority.identity("head"), enrols=True)
    await server.start([address])
    assert (await enrolling).name
    await server.aclose()


async def test_nobody_there_is_an_error_after_the_deadline_that_says_why(head: Head) -> None:
    await head.server.aclose()
    with pytest.raises(TransportError, match=r"within 0\.2 s .*refused|within 0\.2 s .*Connect call failed"):
        await rpc.enrol(head.tcp, head.tokens.default(), timeout_s=0.2)


async def test_what_does_not_speak_tls_is_named(head: Head) -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(TransportError, match="does not speak TLS"):
        await enrol(address, head.tokens.default())
    server.close()


@pytest.mark.parametrize("token", [None, "", "tllm1.AAAA", "a password"])
async def test_without_a_token_nothing_is_sent(token: str | None) -> None:
    with pytest.raises(ConfigError, match="token"):
        await enrol("127.0.0.1:1", token)


async def test_a_wrong_secret_is_refused(head: Head, caplog: pytest.LogCaptureFixture) -> None:
    token = rpc.JoinToken.parse(head.tokens.default())
    wrong = replace(token, secret=bytes(16)).text
    unknown = replace(token, token_id="00000000").text
    for text in (wrong, unknown):
        with pytest.raises(ConfigError, match="not one of this cluster"):
            await enrol(head.tcp, text)
    refusals = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(refusals) == 2
    assert all("127.0.0.1" in record.getMessage() for record in refusals)


async def test_a_revoked_or_expired_token_is_refused_with_that_reason(head: Head) -> None:
    revoked = head.tokens.new()
    head.tokens.revoke(rpc.JoinToken.parse(revoked).token_id)
    with pytest.raises(ConfigError, match="is revoked"):
        await enrol(head.tcp, revoked)
    expired = rpc.TokenStore(head.authority, clock=lambda: 0.0).new(ttl_s=60)
    with pytest.raises(ConfigError, match="is expired"):
        await enrol(head.tcp, expired)


async def test_the_token_of_another_cluster_does_not_leave_this_machine(head: Head, tmp_path: Path) -> None:
    other = rpc.TokenStore(rpc.Authority.open(tmp_path / "other")).default()
    with pytest.raises(ConfigError, match="not the one that the join token is of"):
        await enrol(head.tcp, other)
    assert head.service.statistics()["num_failing"] == 0  # it never asked


async def test_a_recorded_proof_is_good_for_nothing_on_another_stream(head: Head) -> None:
    token = rpc.JoinToken.parse(head.tokens.default())
    request = new_signing_request(new_key())
    hello = pb.EnrolHello(protocol=rpc.PROTOCOL, version="1", token_id=token.token_id)

    async def ask(proof_of: Any) -> grpc.StatusCode:
        async with head.channel() as channel:
            call: Any = channel.stream_stream("/tllm.Enrolment/Enrol")()
            await call.write(pb.EnrolRequest(hello=hello).SerializeToString())
            nonce = pb.EnrolAnswer.FromString(await call.read()).challenge.nonce
            proof = pb.EnrolProof(signing_request=request, proof=proof_of(nonce))
            await call.write(pb.EnrolRequest(proof=proof).SerializeToString())
            return await ending(call)

    recorded: list[bytes] = []

    def right(nonce: bytes) -> bytes:
        recorded.append(hmac.new(token.secret, nonce + request, hashlib.sha256).digest())
        return recorded[-1]

    assert await ask(right) is grpc.StatusCode.OK
    assert await ask(lambda _nonce: recorded[0]) is grpc.StatusCode.UNAUTHENTICATED
    assert await ask(lambda _nonce: b"") is grpc.StatusCode.UNAUTHENTICATED


async def test_another_protocol_is_refused_with_both_numbers(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = enrolment._ask

    async def ask_as_from_the_future(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(enrolment, "PROTOCOL", 99)
            asking = asyncio.ensure_future(ask(*arguments))
            await asyncio.wait({asking}, timeout=0)
        return await asking

    monkeypatch.setattr(enrolment, "_ask", ask_as_from_the_future)
    with pytest.raises(TransportError, match=f"speaks protocol 99 and this head protocol {rpc.PROTOCOL}"):
        await enrol(head.tcp, head.tokens.default())


HELLO = pb.EnrolRequest(hello=pb.EnrolHello(protocol=rpc.PROTOCOL, token_id="00000000")).SerializeToString()
PROOF = pb.EnrolRequest(proof=pb.EnrolProof(signing_request=b"x", proof=b"y")).SerializeToString()


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], grpc.StatusCode.INVALID_ARGUMENT),
        ([b""], grpc.StatusCode.INVALID_ARGUMENT),
        ([b"\xff\xff"], grpc.StatusCode.INVALID_ARGUMENT),
        ([HELLO[:-3]], grpc.StatusCode.INVALID_ARGUMENT),
        ([PROOF], grpc.StatusCode.INVALID_ARGUMENT),
        ([HELLO], grpc.StatusCode.INVALID_ARGUMENT),
        ([HELLO, HELLO], grpc.StatusCode.INVALID_ARGUMENT),
        ([HELLO, PROOF], grpc.StatusCode.UNAUTHENTICATED),
        ([bytes(1 << 20)], grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_nonsense_is_refused(head: Head, messages: list[bytes], code: grpc.StatusCode) -> None:
    async with head.channel() as channel:
        call: Any = channel.stream_stream("/tllm.Enrolment/Enrol")()
        try:
            for message in messages:
                await call.write(message)
            await call.done_writing()
        except STREAM_ERRORS:
            pass  # it was refused before everything was sent
        assert await ending(call) is code


async def test_a_misshapen_signing_request_is_refused_even_on_this_machine(head: Head) -> None:
    async with grpc.aio.insecure_channel(head.unix) as channel:
        call: Any = channel.stream_stream("/tllm.Enrolment/Enrol")()
        await call.write(HELLO)
        await call.read()
        await call.write(PROOF)
        assert await ending(call) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_newcomer_that_says_nothing_is_refused_in_time(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "_PROOF_S", 0.1)
    async with head.channel() as channel:
        call: Any = channel.stream_stream("/tllm.Enrolment/Enrol")()
        assert await ending(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert head.service.statistics()["num_open"] == 0


async def test_one_machine_cannot_hold_every_place(head: Head) -> None:
    async with head.channel() as channel:
        calls: list[Any] = []
        for _ in range(8):
            calls.append(channel.stream_stream("/tllm.Enrolment/Enrol")())
            await calls[-1].write(HELLO)
            await calls[-1].read()
        ninth: Any = channel.stream_stream("/tllm.Enrolment/Enrol")()
        assert await ending(ninth) is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()


async def test_after_five_failures_a_machine_waits_even_with_the_right_token(head: Head) -> None:
    token = head.tokens.default()
    wrong = replace(rpc.JoinToken.parse(token), secret=bytes(16)).text
    for _ in range(5):
        with pytest.raises(ConfigError):
            await enrol(head.tcp, wrong)
    with pytest.raises(TransportError, match=r"too many enrolments from 127\.0\.0\.1 failed; .* in 30 s"):
        await enrol(head.tcp, token)
    assert (await enrol(head.unix, None)).name  # this machine's user is not a stranger
    head.clock.now_s = 30.0
    assert (await enrol(head.tcp, token)).name
    async with asyncio.timeout(5):  # the newcomer has its answer before the head's side of the call has ended
        while head.service.statistics()["num_open"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert head.service.statistics() == {"num_open": 0, "num_failing": 0, "num_refused": 0, "num_enrolled": 2}


# ---------------------------------------------------------------------------------------------- the rate limit

STEPS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.booleans()), max_size=60)


@given(steps=STEPS)
def test_an_address_is_refused_exactly_after_five_failures_within_a_minute(
    steps: list[tuple[str, int, bool]],
) -> None:
    clock = Clock()
    limiter = FailureLimiter(clock)
    failures: dict[str, list[float]] = {"a": [], "b": []}
    until = {"a": 0.0, "b": 0.0}
    for address, pause_s, fails in steps:
        clock.now_s += pause_s
        assert limiter.wait_s(address) == max(0.0, until[address] - clock.now_s)
        if fails and not limiter.wait_s(address):
            limiter.failed(address)
            failures[address].append(clock.now_s)
            if len([at for at in failures[address] if clock.now_s - at <= 60]) >= 5:
                failures[address] = []
                until[address] = clock.now_s + 30


@given(numbers=st.lists(st.integers(0, 100), max_size=300))
def test_the_limiter_forgets_the_oldest_and_never_grows(numbers: list[int]) -> None:
    limiter = FailureLimiter(Clock(), max_addresses=7)
    for number in numbers:
        limiter.failed(str(number))
        assert max(limiter.statistics()) <= 7
