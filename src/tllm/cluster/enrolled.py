"""Who this machine is in the clusters that it has joined, kept across restarts so that a node stays the same node.

    STATE/nodes/0/lock              held by the agent that has this place: two agents on one machine are two nodes
    STATE/nodes/0/<head's pin>      the identity: certificate, key and authority, readable by this user alone

This file does not know how an identity is had from a head (`transport/trust.py` does).
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from google.protobuf.message import DecodeError

from tllm.core.config import state_directory
from tllm.core.errors import ConfigError, TransportError
from tllm.transport import rpc
from tllm.transport import wire_pb2 as pb

_MAX_AGENTS = 256  # on one machine
_RENEW = timedelta(days=30)  # before its end


class Place:
    """One agent's directory of identities."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, pin: str, token_id: str | None = None) -> rpc.Identity | None:
        """The identity that the head with this pin once gave, by that token if one is named; None when there is none,
        or it ends soon."""
        try:
            identity = rpc.Identity.from_message(pb.Identity.FromString((self._directory / pin).read_bytes()))
        except (FileNotFoundError, DecodeError, TransportError):
            return None
        if token_id is not None and rpc.token_id_of(identity) != token_id:
            return None
        return identity if identity.expires - datetime.now(UTC) > _RENEW else None

    def keep(self, pin: str, identity: rpc.Identity) -> None:
        with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:  # mode 0600
            file.write(identity.to_message().SerializeToString())
        os.replace(file.name, self._directory / pin)


@contextmanager
def place() -> Iterator[Place]:
    """The first place of this machine that no other agent holds, until the context is left."""
    for number in range(_MAX_AGENTS):
        directory = state_directory() / "nodes" / str(number)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (directory / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield Place(directory)
            return
    raise ConfigError(f"{_MAX_AGENTS} nodes run on this machine already.")
