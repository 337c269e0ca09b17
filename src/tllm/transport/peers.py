"""Who calls a service, and whether they are of this cluster.

TLS has let a caller in because its certificate leads to a root that the server trusts. Where newcomers enrol, one of
those roots has a public key, with which anybody can sign a certificate for any name. So every call is looked at again:
the certificate must be issued by the cluster's authority itself, and be in force now, not just when the connection was
made.

This file does not know what services do, nor which member may do what.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio

from tllm.core.errors import TransportError
from tllm.transport.channels import is_unix
from tllm.transport.trust import Identity, Member, check_in_force, holder_of, read_certificate, read_member

if TYPE_CHECKING:  # generic in the stubs alone
    Context = grpc.aio.ServicerContext[bytes, bytes]
    Handler = grpc.RpcMethodHandler[bytes, bytes]

log = logging.getLogger(__name__)

_MAX_REMEMBERED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who calls, as checked."""

    address: str  # gRPC's name for where they are
    name: str  # as in the certificate; empty over a Unix socket: this machine's user
    token_id: str = ""  # by which they joined; empty: without one


class Gate:
    """Knows members from others. Certificates that were found good are remembered, for they come with every call."""

    def __init__(self, identity: Identity | None) -> None:
        self._authority = None if identity is None else read_certificate(identity.authority)
        self._members: dict[bytes, Member] = {}

    def peer(self, context: Context) -> Peer:
        """Raises TransportError, with a reason for a person, for a caller that is not a member of the cluster."""
        address = context.peer()
        if is_unix(address):
            return Peer(address=address, name="")
        member = self._member(b"".join(context.auth_context().get("x509_pem_cert", ())))
        check_in_force(member)
        return Peer(address=address, name=member.name, token_id=member.token_id)

    def _member(self, certificate: bytes) -> Member:
        if (known := self._members.get(certificate)) is not None:
            return known
        if self._authority is None or not certificate:
            raise TransportError("it showed no certificate")
        member = read_member(certificate, self._authority)
        if len(self._members) >= _MAX_REMEMBERED:
            self._members.clear()
        self._members[certificate] = member
        return member


def admitted(handler: Handler, gate: Gate, what: str) -> Handler:
    """The same handler, for members of the cluster only: it does not hear of anybody else."""

    async def admit(context: Context) -> None:
        try:
            gate.peer(context)
        except TransportError as error:
            await refuse(context, grpc.StatusCode.PERMISSION_DENIED, f"{what} is for members of the cluster: {error}")

    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(_guarded(handler.unary_unary, admit))
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(_guarded(handler.unary_stream, admit))
    assert handler.stream_stream is not None
    return grpc.stream_stream_rpc_method_handler(_guarded(handler.stream_stream, admit))


def _guarded(behaviour: Callable[..., Any], admit: Callable[[Context], Awaitable[None]]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(behaviour):

        async def guarded_answers(request: Any, context: Context) -> AsyncIterator[bytes]:
            await admit(context)
            async with contextlib.aclosing(behaviour(request, context)) as answers:
                async for answer in answers:
                    yield answer

        return guarded_answers

    async def answer(request: Any, context: Context) -> Any:
        await admit(context)
        return await behaviour(request, context)

    return answer


async def refuse(context: Context, code: grpc.StatusCode, why: str) -> NoReturn:
    """End the call with a reason, and say so in the log: never silently, and never with what a secret was."""
    log.warning("refused %s: %s", context.peer(), why)
    await context.abort(code, why)
    raise AssertionError("gRPC's abort raises")


def peer_of(context: Context) -> Peer:
    """Who calls, in a handler that only members reach: what their certificate says is true there."""
    address = context.peer()
    if is_unix(address):
        return Peer(address=address, name="")
    name, token_id = holder_of(read_certificate(b"".join(context.auth_context()["x509_pem_cert"])))
    return Peer(address=address, name=name, token_id=token_id)


def host_of(address: str) -> str:
    """The machine, or the network of one, behind gRPC's `ipv4:1.2.3.4:5` or `ipv6:%5Bfe80::1%5D:5`: a machine has as
    many IPv6 addresses as it likes, all with the same first half."""
    kind, _, rest = unquote(address).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    if kind != "ipv6":
        return host
    try:
        return str(IPv6Network((IPv6Address(host).packed[:8] + bytes(8), 64)))
    except ValueError:
        return host
