"""A node on another machine, as far as one machine can play two: a host name and a state directory of its own, and
links that can fail between it and everybody else.

    head ◀── link ── agent                  its one way to the head: control, weights, results of a last stage
    others ── links ──▶ agent, workers      it is advertised by an address where its links listen, on the same ports

The head's own workers have no advertised address: what a machine sends to them passes no link.
This file does not know what is asked of the cluster, nor when anything fails.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import psutil

from tests.system.processes import START_S, Tllm, tllm
from tllm.testing.links import EmulatedLink, emulated_link

_NUM_PORTS = 8  # of an agent and its workers; more than ever run at once, so that none has to be without a link
_FIRST_PORT, _LAST_PORT = 21000, 31000  # below those that systems give to whoever asks for any
_STOP_S = 20.0

_port_blocks = itertools.count(os.getpid() % 97)


@dataclass(kw_only=True)
class Machine:
    """`tllm join` behind links. It may live several times, one after the other, and is the same node each time."""

    name: str
    to_head: EmulatedLink
    to_it: tuple[EmulatedLink, ...]
    arguments: Sequence[str]
    environment: dict[str, str]
    lives: list[Tllm] = field(default_factory=list)
    _life: ExitStack = field(default_factory=ExitStack)

    @property
    def links(self) -> tuple[EmulatedLink, ...]:
        return (self.to_head, *self.to_it)

    @property
    def agent(self) -> psutil.Process:
        """Raises psutil.NoSuchProcess while it does not live."""
        return psutil.Process(self.lives[-1].process.pid)

    @property
    def lives_now(self) -> bool:
        return bool(self.lives) and self.lives[-1].process.poll() is None

    def family(self) -> list[psutil.Process]:
        try:
            return self.lives[-1].family() if self.lives_now else []
        except psutil.NoSuchProcess:
            return []

    def start(self) -> None:
        assert not self.lives_now
        self._life.close()
        self.lives.append(
            self._life.enter_context(tllm("join", *self.arguments, before=_elsewhere(self.name), **self.environment))
        )

    def joined(self) -> None:
        self.lives[-1].wait_for("Joined", deadline_s=START_S)

    def kill(self) -> None:
        """Every process at once, the agent first; nobody can say goodbye."""
        for process in self.family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.lives[-1].process.wait(timeout=_STOP_S)

    def leave(self) -> int:
        """Ctrl-C; the exit status."""
        return self.lives[-1].interrupt()

    def close(self) -> None:
        self._life.close()


def can_be_elsewhere() -> bool:
    """Whether processes here can get a host name of their own."""
    return subprocess.run([*_elsewhere("elsewhere"), "true"], capture_output=True).returncode == 0


def _elsewhere(name: str) -> list[str]:
    """A prefix for a command that takes it for another machine; the process that starts becomes the command."""
    return ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]


@contextmanager
def machine(name: str, number: int, *, head: tuple[str, int], token: str, log_level: str = "info") -> Iterator[Machine]:
    """Another machine, not started yet. `number` from 1 chooses the address by which others call it.

    When the context is left, its processes and links are gone.
    """
    advertised = f"127.0.0.{1 + number}"
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"tllm-{name}-"))
        first = stack.enter_context(_free_ports(advertised))
        to_head = stack.enter_context(emulated_link(target=head))
        to_it = tuple(
            stack.enter_context(emulated_link(target=("127.0.0.1", port), listen_host=advertised, listen_port=port))
            for port in range(first, first + _NUM_PORTS)
        )
        found = Machine(
            name=name,
            to_head=to_head,
            to_it=to_it,
            arguments=(
                to_head.address,
                *("--name", name, "--threads", "1"),
                *("--listen", "127.0.0.1", "--advertise", advertised),
                *("--ports", f"{first}-{first + _NUM_PORTS - 1}"),
                *("--log-level", log_level),
            ),
            environment={"XDG_STATE_HOME": state, "TLLM_TOKEN": token},
        )
        stack.callback(found.close)
        yield found


@contextmanager
def _free_ports(advertised: str) -> Iterator[int]:
    """The first of a run of ports that are free for a machine and for the links to it.

    Other tests that run now do not choose them: a UDP socket on the first, which nobody else wants, claims them all.
    """
    for block in itertools.islice(_port_blocks, 1000):
        first = _FIRST_PORT + block * _NUM_PORTS % (_LAST_PORT - _FIRST_PORT)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as claim:
            try:
                claim.bind(("127.0.0.1", first))
            except OSError:
                continue
            ports = range(first, first + _NUM_PORTS)
            if all(_is_free(host, port) for host in ("127.0.0.1", advertised) for port in ports):
                yield first
                return
    raise AssertionError("no free ports")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
