"""What a process can tell of the machine that it runs on, and how a child of it is made to end with its parent.

This file does not know heads, agents or workers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import sys
from pathlib import Path

import psutil

from tllm.core.config import split_address
from tllm.core.errors import TransportError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def num_processors() -> int:
    """Processors that this process may use; physical cores where the system does not tell."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count(logical=False) or 1


def processors() -> list[int]:
    """Their numbers, as `sched_setaffinity` takes them."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(num_processors()))


def free_bytes() -> int:
    """Memory that processes could still take without swapping."""
    return int(psutil.virtual_memory().available)


def machine_id() -> str:
    """The same for all processes of one machine since it started, and for no other machine's."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}-{boot.read_text().strip()}" if boot.exists() else socket.gethostname()


def platform_name() -> str:
    return f"{platform.system()} {platform.machine()}"


def local_host_towards(address: str) -> str:
    """The address of this machine's interface that faces `address`; empty when it is a Unix socket.

    Raises TransportError when there is no way there.
    """
    if address.startswith("unix:"):
        return ""
    host, port = split_address(address, default_port=1)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family[0], socket.SOCK_DGRAM) as probe:
            probe.connect(family[4])  # a datagram socket sends nothing; it only chooses the interface
            return str(probe.getsockname()[0])
    except OSError as error:
        raise TransportError(f"There is no way from this machine to {host}: {error.strerror}.") from error


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when `parent`, which started it, is gone, even while it is stopped.

    Only Linux can; elsewhere the end of a pipe has to do. A parent that is gone already ends it here.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
