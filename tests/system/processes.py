"""Real `tllm` processes for system tests: started, waited for by a condition with a deadline, ended by their id."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

START_S = 60.0
T = TypeVar("T", bound="Tllm")


def poll(condition: Callable[[], bool], *, deadline_s: float, what: str) -> None:
    """Until the condition holds; fails, saying what did not come true, at the deadline."""
    give_up = time.monotonic() + deadline_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not come true within {deadline_s} s"
        pause.wait(0.02)


class Tllm:
    """A running `tllm` command and what it prints."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._queue.put(line)
        self._queue.put(None)

    def wait_for(self, pattern: str, *, deadline_s: float = START_S) -> re.Match[str]:
        """The first line (from the start) that matches; fails with everything printed at the deadline or at the end."""
        give_up = time.monotonic() + deadline_s
        while True:
            for line in self.lines:
                if match := re.search(pattern, line):
                    return match
            try:
                ended = self._queue.get(timeout=max(0.0, give_up - time.monotonic())) is None
            except queue.Empty:
                ended = True
            if ended and not any(re.search(pattern, line) for line in self.lines):
                raise AssertionError(f"no line matches {pattern!r}:\n" + "\n".join(self.lines))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def family(self) -> list[psutil.Process]:
        """The process and all its descendants."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.family() if "tllm.cluster.worker" in " ".join(process.cmdline())]

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


@contextmanager
def tllm(*arguments: str, kind: type[T] = Tllm, before: Sequence[str] = (), **environment: str) -> Iterator[T]:
    """`tllm ARGUMENTS`; every process of its family is gone when the context is left."""
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "tllm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "160", "PYTHONUNBUFFERED": "1", **environment},
    )
    command = kind(process)
    family = []
    try:
        yield command
    finally:
        if process.poll() is None:
            family = command.family()
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for member in family:
            if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:
                member.kill()


class Server(Tllm):
    """`tllm serve`, once it answers."""

    @property
    def url(self) -> str:
        return self.wait_for(r"API\s+(http://\S+)/v1")[1]

    @property
    def model(self) -> str:
        return self.wait_for(r"API\s+http\S+\s+model (\S+)")[1]

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = httpx.get(f"{self.url}/metrics").text
        values = re.findall(rf"^tllm:{name}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE)
        assert values, f"there is no metric tllm:{name}"
        return sum(map(float, values))


@contextmanager
def serve(*arguments: str, **environment: str) -> Iterator[Server]:
    """`tllm serve` on free ports, ready."""
    with tllm("serve", "--port", "0", "--grpc-port", "0", *arguments, kind=Server, **environment) as command:
        command.wait_for(r"API\s+http")
        yield command


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def repository() -> Path:
    return Path(__file__).parents[2]
