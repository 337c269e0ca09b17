"""A server under test, as a user starts it: `tllm serve` in a process of its own, apart from the client that measures.

This file does not know what is measured.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tllm.core.errors import UnavailableError

_READY_S = 300.0
_STOP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    url: str
    model: str


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[Server]:
    """`tllm serve ARGUMENTS` on free ports, from ready until the context is left.

    Raises UnavailableError, with what it printed, when it ends before it is ready, or is not ready in time.
    """
    command = [sys.executable, "-m", "tllm", "serve", *arguments, "--port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield _ready(process)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _ready(process: subprocess.Popen[bytes]) -> Server:
    assert process.stdout is not None
    give_up_s = time.monotonic() + _READY_S
    printed = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, give_up_s - time.monotonic())):
            piece = os.read(process.stdout.fileno(), 1 << 16)
            printed += piece
            text = printed.decode(errors="replace")
            if match := re.search(r"API\s+(http://\S+)/v1\s+model (.+)\n", text):
                return Server(url=match[1], model=match[2])
            if not piece:
                raise UnavailableError(f"The server ended before it was ready:\n{text}", state="failed")
    raise UnavailableError(
        f"The server was not ready after {_READY_S:.0f} s:\n{printed.decode(errors='replace')}", state="loading"
    )
