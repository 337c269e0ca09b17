"""How a machine that holds a join token becomes a member of a cluster.

    newcomer: enrol                                Enrolment: the head
        ── TLS, certificate unread ─▶              its leaf's key must be the token's pin: this is the right head
        ── mutual TLS, roots = that leaf ─▶        the newcomer shows the enrolment identity, which proves nothing
        ── hello: token id ─▶
        ◀─ challenge: nonce ──                     a new one for each stream, good for one proof
        ── proof: HMAC(secret, nonce + request) ─▶ the secret itself never travels
        ◀─ enrolled: certificate, authority ──     under a name that the head draws

Over a Unix socket the newcomer is this machine's user: no TLS, no token, an empty proof.
This file does not know what members do, or where identities are kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import os
import ssl
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, NoReturn, TypeVar

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from google.protobuf.message import DecodeError, Message

from tllm import __version__
from tllm.core.config import DEFAULT_GRPC_PORT, split_address
from tllm.core.errors import ConfigError, FrameError, TransportError
from tllm.core.types import HEAD
from tllm.transport import wire_pb2 as pb
from tllm.transport.channels import (
    STREAM_ERRORS,
    Caller,
    Failures,
    Liveness,
    deadline,
    first_ready,
    grpc_options,
    is_unix,
    reason,
)
from tllm.transport.peers import host_of, refuse
from tllm.transport.tokens import SECRET_BYTES, JoinToken, TokenStore
from tllm.transport.trust import (
    MAX_PEM_BYTES,
    Authority,
    Identity,
    enrolment_identity,
    key_to_pem,
    new_key,
    new_signing_request,
    pin_of,
    read_certificate,
    read_member,
    to_pem,
)
from tllm.transport.wire import PROTOCOL

if TYPE_CHECKING:  # generic in the stubs alone
    Context = grpc.aio.ServicerContext[bytes, bytes]
    Call = grpc.aio.StreamStreamCall[bytes, bytes]
    Handler = grpc.RpcMethodHandler[bytes, bytes]

log = logging.getLogger(__name__)

_CALL = "Enrol"
_MAX_MESSAGE_BYTES = 4 * MAX_PEM_BYTES
_NONCE_BYTES = 32
_PROOF_S = 10.0  # from the opening of a stream to its end
_MAX_OPEN = 64  # enrolments at a time
_MAX_OPEN_PER_HOST = 8
_RETRY_S = 0.2  # between attempts to reach a head that is not up yet

M = TypeVar("M", pb.EnrolRequest, pb.EnrolAnswer)


class FailureLimiter:
    """Who failed too often is refused for a while. Pure; remembers so many addresses and forgets the oldest first.

    after `most` failures within `window_s`: refused for `refusal_s`, and then from the beginning
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        most: int = 5,
        window_s: float = 60.0,
        refusal_s: float = 30.0,
        max_addresses: int = 1024,
    ) -> None:
        self._clock = clock
        self._most = most
        self._window_s = window_s
        self._refusal_s = refusal_s
        self._max_addresses = max_addresses
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()
        self._refused_until: OrderedDict[str, float] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """For how long it is still refused; 0: it is not."""
        left_s = self._refused_until.get(address, -math.inf) - self._clock()
        if left_s <= 0:
            self._refused_until.pop(address, None)
        return max(0.0, left_s)

    def failed(self, address: str) -> None:
        """Count a failure."""
        now = self._clock()
        times = self._failures.setdefault(address, deque(maxlen=self._most))
        self._failures.move_to_end(address)
        times.append(now)
        if len(times) == self._most and now - times[0] <= self._window_s:
            del self._failures[address]
            self._refused_until[address] = now + self._refusal_s
            self._refused_until.move_to_end(address)
        for kept in (self._failures, self._refused_until):
            while len(kept) > self._max_addresses:
                kept.popitem(last=False)

    def statistics(self) -> tuple[int, int]:
        """Addresses with failures, and addresses refused, as remembered."""
        return len(self._failures), len(self._refused_until)


class _RefusedError(Exception):
    """Of one enrolment; the reason is for the newcomer and the log."""

    def __init__(self, code: grpc.StatusCode, why: str) -> None:
        super().__init__(why)
        self.code = code


class Enrolment:
    """The service that gives certificates to those who prove a token."""

    name = "tllm.Enrolment"
    max_message_bytes = _MAX_MESSAGE_BYTES

    def __init__(
        self, authority: Authority, tokens: TokenStore, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._authority = authority
        self._tokens = tokens
        self._limiter = FailureLimiter(clock)
        self._open: Counter[str] = Counter()  # enrolments under way by host
        self._num_enrolled = 0

    def handlers(self) -> Mapping[str, Handler]:
        return {_CALL: grpc.stream_stream_rpc_method_handler(self._enrol)}

    async def aclose(self) -> None:
        """What is under way has its own deadline."""

    def statistics(self) -> Mapping[str, int]:
        """What is kept, and what was given."""
        num_failing, num_refused = self._limiter.statistics()
        return {
            "num_open": self._open.total(),
            "num_failing": num_failing,
            "num_refused": num_refused,
            "num_enrolled": self._num_enrolled,
        }

    async def _enrol(self, _requests: AsyncIterator[bytes], context: Context) -> None:
        address = context.peer()
        if is_unix(address):
            await self._answer(context, local=True)
            return
        host = host_of(address)
        if wait_s := self._limiter.wait_s(host):
            why = f"too many enrolments from {host} failed; it may try again in {math.ceil(wait_s)} s"
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        if self._open.total() >= _MAX_OPEN or self._open[host] >= _MAX_OPEN_PER_HOST:
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many enrolments at a time; try again")
        self._open[host] += 1
        enrolled = False
        try:
            await self._answer(context, local=False)
            enrolled = True
        finally:
            if not enrolled:
                self._limiter.failed(host)
            self._open[host] -= 1
            if not self._open[host]:
                del self._open[host]

    async def _answer(self, context: Context, *, local: bool) -> None:
        try:
            async with asyncio.timeout(_PROOF_S):
                await context.write(pb.EnrolAnswer(enrolled=await self._prove(context, local)).SerializeToString())
        except _RefusedError as refusal:
            await refuse(context, refusal.code, str(refusal))
        except FrameError as error:
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ConfigError as error:
            log.error("nobody can enrol: %s", error)
            await refuse(context, grpc.StatusCode.UNAVAILABLE, "the head cannot read its join tokens; see its log")
        except TimeoutError:
            await refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"no proof came within {_PROOF_S:g} s")

    async def _prove(self, context: Context, local: bool) -> pb.Enrolled:
        """Raises _RefusedError, FrameError, or ConfigError."""
        hello = (await _read_request(context, "hello")).hello
        if hello.protocol != PROTOCOL:
            raise _RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the newcomer speaks protocol {hello.protocol} and this head protocol {PROTOCOL}; "
                "install the same version of tllm on both",
            )
        nonce = os.urandom(_NONCE_BYTES)
        challenge = pb.EnrolAnswer(challenge=pb.EnrolChallenge(nonce=nonce))
        await context.write(challenge.SerializeToString())
        proof = (await _read_request(context, "proof")).proof
        token_id = "" if local else self._check_proof(hello.token_id, nonce, proof)
        name = f"n-{os.urandom(4).hex()}"
        certificate = self._authority.sign(name, proof.signing_request, token_id=token_id)
        self._num_enrolled += 1
        log.info("%s enrolled as %s%s", context.peer(), name, f" by token {token_id}" if token_id else "")
        identity = pb.Identity(name=name, certificate=certificate, authority=self._authority.certificate)
        return pb.Enrolled(identity=identity)

    def _check_proof(self, token_id: str, nonce: bytes, proof: pb.EnrolProof) -> str:
        """The id of the token that was proved. What is the matter with a token is said to its holders only."""
        token = self._tokens.find(token_id)
        # An unknown id costs the same time as a wrong secret.
        secret = os.urandom(SECRET_BYTES) if token is None else bytes.fromhex(token.secret)
        expected = _proof(secret, nonce, proof.signing_request)
        if not hmac.compare_digest(expected, proof.proof) or token is None:
            raise _RefusedError(grpc.StatusCode.UNAUTHENTICATED, "the join token is not one of this cluster")
        if (state := token.state(time.time())) != "valid":
            raise _RefusedError(
                grpc.StatusCode.PERMISSION_DENIED, f"the join token {token.id} is {state}; ask for a new one"
            )
        return token.id


async def enrol(address: str, token: str | None, *, timeout_s: float) -> Identity:
    """Become a member of the cluster of the head at `address`, under a name that the head gives. Over a Unix socket
    no token is needed, and one is not looked at.

    A head that is not up yet is waited for until `timeout_s` is over. Raises ConfigError when the token is the matter:
    it is none, another head's, wrong, expired or revoked; trying again will not help then. TransportError otherwise.
    """
    caller = Caller()
    failures = Failures()
    joining: JoinToken | None = None
    async with deadline(timeout_s, f"no head answered at {address}", failures):
        if not is_unix(address):
            if not token:
                raise ConfigError(
                    f"{address} is on the network, where joining needs a token. Give the one that `tllm serve` prints."
                )
            joining = JoinToken.parse(token)
            leaf = await _leaf(address, failures)
            _check_pin(leaf, joining, address)
            caller = Caller(identity=enrolment_identity(), peer=HEAD, roots=to_pem(leaf))
        channel, _ = await first_ready([address], _options(), caller, failures)
        try:
            call: Call = channel.stream_stream(f"/{Enrolment.name}/{_CALL}")()
            return await _ask(call, joining)
        except STREAM_ERRORS as error:
            _raise_refused(address, error)
        finally:
            await channel.close()


async def _ask(call: Call, joining: JoinToken | None) -> Identity:
    """Hello, proof, and a look at what comes: a head that gives what is not asked for is refused too."""
    token_id = joining.token_id if joining else ""
    hello = pb.EnrolHello(protocol=PROTOCOL, version=__version__, token_id=token_id)
    await call.write(pb.EnrolRequest(hello=hello).SerializeToString())
    nonce = (await _read_answer(call, "challenge")).challenge.nonce
    if len(nonce) != _NONCE_BYTES:
        raise FrameError(f"a challenge of {len(nonce)} bytes")
    key = new_key()
    request = new_signing_request(key)
    proof = pb.EnrolProof(signing_request=request, proof=_proof(joining.secret, nonce, request) if joining else b"")
    await call.write(pb.EnrolRequest(proof=proof).SerializeToString())
    given = (await _read_answer(call, "enrolled")).enrolled.identity
    try:
        member = read_member(given.certificate, read_certificate(given.authority))
    except TransportError as error:
        raise FrameError(f"the head gave an identity that is none: {error}") from error
    if member.name != given.name or member.public_key != key.public_key() or member.token_id != token_id:
        raise FrameError("the head gave an identity that is somebody else's")
    return Identity(name=given.name, certificate=given.certificate, key=key_to_pem(key), authority=given.authority)


async def _leaf(address: str, failures: Failures) -> x509.Certificate:
    """The certificate of whoever listens there, read without believing it. TLS 1.3 shows it before the server asks
    for ours."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    host, port = split_address(address, default_port=DEFAULT_GRPC_PORT)
    while True:
        try:
            _, writer = await asyncio.open_connection(host, port, ssl=context)
        except ssl.SSLError as error:
            raise TransportError(f"{address} does not speak TLS 1.3: it is not the port of a head for nodes") from error
        except OSError as error:
            failures.note(address, error.strerror or type(error).__name__)
            await asyncio.sleep(_RETRY_S)
            continue
        encoded: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        try:
            return x509.load_der_x509_certificate(encoded or b"")
        except ValueError as error:
            raise TransportError(f"{address} shows no certificate that can be read") from error


def _check_pin(leaf: x509.Certificate, joining: JoinToken, address: str) -> None:
    try:
        found = pin_of(leaf.public_key())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TransportError(f"{address} shows a certificate with an unknown kind of key") from error
    if not hmac.compare_digest(found, joining.pin):
        raise ConfigError(
            f"The head at {address} is not the one that the join token is of: its key is {found[:4].hex()}…, and the "
            f"token names {joining.pin[:4].hex()}…. Take the token that this very head prints; if it is the same, "
            "somebody else answers at that address."
        )


def _raise_refused(address: str, error: BaseException) -> NoReturn:
    if isinstance(error, grpc.aio.AioRpcError):
        refused = f"The head at {address} refused: {error.details() or 'no reason given'}"
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise ConfigError(refused) from error
        raise TransportError(refused) from error
    raise TransportError(f"{address} ended the enrolment: {reason(error)}") from error


def _proof(secret: bytes, nonce: bytes, signing_request: bytes) -> bytes:
    return hmac.new(secret, nonce + signing_request, hashlib.sha256).digest()


async def _read_request(context: Context, kind: str) -> pb.EnrolRequest:
    return _decode(await context.read(), pb.EnrolRequest, kind)


async def _read_answer(call: Call, kind: str) -> pb.EnrolAnswer:
    data = await call.read()
    if not isinstance(data, bytes) and (code := await call.code()) is not grpc.StatusCode.OK:
        raise TransportError(f"the head ended the enrolment: {await call.details()} ({code.name.lower()})")
    return _decode(data, pb.EnrolAnswer, kind)


def _decode(data: object, kind: type[M], expected: str) -> M:
    if not isinstance(data, bytes):
        raise FrameError(f"the enrolment ended where {expected} should come")
    if len(data) > _MAX_MESSAGE_BYTES:
        raise FrameError(f"an enrolment message of {len(data)} bytes, where at most {_MAX_MESSAGE_BYTES} are allowed")
    try:
        message: Message = kind.FromString(data)
    except DecodeError as error:
        raise FrameError(f"an enrolment message is not a {kind.__name__}") from error
    assert isinstance(message, kind)
    if message.WhichOneof("message") != expected:
        raise FrameError(f"an enrolment message without {expected}")
    return message


def _options() -> list[tuple[str, int]]:
    return grpc_options(max_send_bytes=_MAX_MESSAGE_BYTES, max_receive_bytes=_MAX_MESSAGE_BYTES, liveness=Liveness())
