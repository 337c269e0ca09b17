"""The heads of this machine and user, found without a network: one small file per running head.

    STATE/heads/<process id>        JSON: cluster, control (unix:...), pin and grpc address

This file does not know what is said to a head once it is found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil

from tllm.core.config import state_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalHead:
    """A head that runs on this machine."""

    cluster: str
    control: str  # unix:/...
    pin: str  # of its key, as tokens carry it
    grpc_address: str
    url: str  # of the HTTP API, as this machine reaches it


@contextmanager
def announced(head: LocalHead) -> Iterator[None]:
    """Other processes of this user find the head until the context is left."""
    directory = state_directory() / "heads"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / str(os.getpid())
    path.write_text(json.dumps(asdict(head)))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def local_heads(cluster: str | None = None) -> list[LocalHead]:
    """Those that run now, of that cluster where one is named. What a killed head left behind is removed."""
    found = []
    for path in sorted((state_directory() / "heads").glob("*")):
        if not path.name.isdecimal() or not psutil.pid_exists(int(path.name)):
            path.unlink(missing_ok=True)
            continue
        try:
            head = LocalHead(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # half written, or of another version
            continue
        if cluster in (None, head.cluster):
            found.append(head)
    return found
