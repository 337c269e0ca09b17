"""`tllm doctor`: what this machine has for tllm, what is missing, and what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util

import typer

from tllm.core.config import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT
from tllm.core.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `remedy` says what to do where something is wrong; `needed`: not without it."""

    what: str
    found: str
    remedy: str = ""
    needed: bool = False


def doctor() -> None:
    """Check engines, memory, ports and the network's settings. Exit status 1 when something needed is missing."""
    findings = [finding for check in _CHECKS for finding in check()]
    for finding in findings:
        mark = "ok " if not finding.remedy else "NO " if finding.needed else "-- "
        print(f"{mark} {finding.what:<12} {finding.found}")
        if finding.remedy:
            print(f"{'':16} {finding.remedy}")
    if any(finding.needed and finding.remedy for finding in findings):
        raise typer.Exit(1)


def _python() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    remedy = "" if sys.version_info >= (3, 11) else "tllm needs Python 3.11 or newer."
    return [Finding(what="python", found=version, remedy=remedy, needed=True)]


def _torch() -> list[Finding]:
    if util.find_spec("torch") is None:
        remedy = "pip install 'tllm[torch]', or let this machine only be a head: tllm serve --no-local"
        return [Finding(what="torch", found="not installed", remedy=remedy, needed=True)]
    from tllm.engines.torch.device import describe_devices

    return [Finding(what="torch", found=f"{metadata.version('torch')}: {line}") for line in describe_devices()]


def _compiler() -> list[Finding]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    remedy = "" if found else "Only needed for compiled kernels; install g++ or clang++ for them."
    return [Finding(what="compiler", found=found or "none", remedy=remedy)]


def _memory() -> list[Finding]:
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(os.path.expanduser("~"))
    return [
        Finding(what="memory", found=f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"),
        Finding(what="disk", found=f"{format_bytes(disk.free)} free of {format_bytes(disk.total)}"),
    ]


def _ports() -> list[Finding]:
    findings = []
    for what, flag, port in (
        ("HTTP port", "--port", DEFAULT_HTTP_PORT),
        ("gRPC port", "--grpc-port", DEFAULT_GRPC_PORT),
    ):
        try:
            with socket.create_server(("127.0.0.1", port)):
                findings.append(Finding(what=what, found=f"{port} is free"))
        except OSError as error:
            remedy = f"Something uses it, tllm perhaps. Choose another: tllm serve {flag} PORT"
            findings.append(Finding(what=what, found=f"{port}: {error.strerror}", remedy=remedy))
    return findings


def _proxies() -> list[Finding]:
    names = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    bypass = os.environ.get("no_proxy", "") + os.environ.get("NO_PROXY", "")
    if not names or "localhost" in bypass or "127.0.0.1" in bypass:
        return [Finding(what="proxy", found="does not catch localhost")]
    remedy = "Clients on this machine may send localhost to the proxy: export NO_PROXY=localhost,127.0.0.1"
    return [Finding(what="proxy", found=", ".join(names), remedy=remedy)]


_CHECKS: tuple[Callable[[], list[Finding]], ...] = (_python, _torch, _compiler, _memory, _ports, _proxies)
