"""A server under test, as a user starts it: `tllm serve` in a process of its own, apart from the client that measures.

This file does not know what is measured.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tllm.core.errors import UnavailableError

_STOP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    url: str
    model: str


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[Server]:
    """`tllm serve ARGUMENTS` on free ports, from ready until the context is left.

    Raises UnavailableError, with what it printed, when it ends before it is ready.
    """
    command = [sys.executable, "-m", "tllm", "serve", *arguments, "--port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield _ready(process)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _ready(process: subprocess.Popen[str]) -> Server:
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if match := re.search(r"API\s+(http://\S+)/v1\s+model (\S+)", line):
            return Server(url=match[1], model=match[2])
    raise UnavailableError(f"The server ended before it was ready:\n{''.join(printed)}", state="failed")
