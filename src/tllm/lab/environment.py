"""On what something was measured: enough to tell two machines, or two states of the code, apart.

This file does not know what was measured.
"""

from __future__ import annotations

import platform
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil

import tllm
from tllm.cluster.machine import num_processors, platform_name
from tllm.core.units import format_bytes

UNKNOWN = "unknown"

_GIT_S = 10.0  # that git may take to look at a checkout


def environment() -> Mapping[str, str]:
    """Every key is always there; what cannot be found out is "unknown"."""
    return {
        "machine": socket.gethostname(),
        "processor": _processor(),
        "cores": str(num_processors()),
        "memory": format_bytes(psutil.virtual_memory().total),
        "os": f"{platform_name()}, {platform.release()}",
        "python": platform.python_version(),
        "torch": _installed("torch"),
        "tllm": tllm.__version__,
        "revision": revision(Path(tllm.__file__)),
    }


def revision(file: Path) -> str:
    """The commit of the checkout that `file` is part of, "-dirty" where anything is changed; "unknown" elsewhere.

    A file that lies in a checkout without belonging to it, as in a virtual environment, has no revision.
    """
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return UNKNOWN
    return _git(file, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12") or UNKNOWN


def _git(file: Path, *arguments: str) -> str | None:
    """What git says; None where it is missing, fails or takes too long."""
    command = ["git", "-C", str(file.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    match platform.system():
        case "Linux":
            return _cpuinfo(Path("/proc/cpuinfo"))
        case "Darwin":
            return _sysctl("machdep.cpu.brand_string")
        case _:
            return platform.processor() or UNKNOWN


def _cpuinfo(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or UNKNOWN  # ARM lists no model names


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=_GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return done.stdout.strip() or UNKNOWN


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return UNKNOWN
