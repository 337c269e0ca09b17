"""One gRPC server for all that a process offers: it listens, speaks TLS on the network, and lets nobody but members of
the cluster through to its services.

This file does not know what the services do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import grpc
import grpc.aio

from tllm.transport.channels import (
    Liveness,
    grpc_options,
    is_unix,
    listen,
    remove_sockets,
    server_credentials,
    server_options,
)
from tllm.transport.enrolment import Enrolment
from tllm.transport.peers import Gate, admitted
from tllm.transport.trust import Identity

if TYPE_CHECKING:  # generic in the stubs alone
    Handler = grpc.RpcMethodHandler[bytes, bytes]

_STOP_S = 2.0  # for streams to end with a reason when the server closes
_MAX_CALLS = 1024


class Service(Protocol):
    """Some calls under one name. The server lets only members of the cluster through to them (but for `Enrolment`),
    so that no service can forget to look; `peers.peer_of` says which member calls."""

    name: str  # as in wire.proto, with the package
    max_message_bytes: int  # either way; a service that wants less than its neighbours checks that itself

    def handlers(self) -> Mapping[str, Handler]:
        """By the call's name, without (de)serialisers: bytes in, bytes out."""

    async def aclose(self) -> None:
        """End what is open, in order. Idempotent. Called by the server."""


class Server:
    """Several services on the same addresses."""

    def __init__(
        self,
        services: Sequence[Service],
        *,
        identity: Identity | None,
        liveness: Liveness | None = None,
        enrols: bool = False,
    ) -> None:
        """Without an `identity` it can listen on Unix sockets only. With `enrols`, callers who have no certificate yet
        get as far as `Enrolment` over the network."""
        self._services = tuple(services)
        self._identity = identity
        self._liveness = liveness or Liveness()
        self._enrols = enrols
        self._server: grpc.aio.Server | None = None
        self._addresses: tuple[str, ...] = ()

    async def start(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """Listen on `unix:/path` and `host:port` addresses; returns them with real ports. Once.

        Raises TransportError when one cannot be had; nothing listens then.
        """
        assert self._server is None
        assert self._identity is not None or all(map(is_unix, addresses)), "only Unix sockets need no identity"
        most = max(service.max_message_bytes for service in self._services)
        options = grpc_options(max_send_bytes=most, max_receive_bytes=most, liveness=self._liveness)
        server = grpc.aio.server(options=[*options, *server_options()], maximum_concurrent_rpcs=_MAX_CALLS)
        gate = Gate(self._identity)
        for service in self._services:
            handlers = dict(service.handlers())
            if not isinstance(service, Enrolment):
                handlers = {call: admitted(handler, gate, service.name) for call, handler in handlers.items()}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.name, handlers),))
        credentials = None
        if self._identity is not None:
            credentials = server_credentials(self._identity, enrols=self._enrols)
        self._addresses = await listen(server, addresses, credentials)
        self._server = server
        return self._addresses

    async def aclose(self) -> None:
        """Close the services, stop listening and end every stream, within a deadline. Idempotent."""
        for service in self._services:
            await service.aclose()
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(_STOP_S)
            remove_sockets(self._addresses)
