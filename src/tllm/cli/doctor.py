"""`tllm doctor`: what this machine has for tllm, or what is between it and a head, and what to do about it.

This file does not know how machines join.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import platform
import shutil
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from typing import Annotated

import typer

from tllm.cli import options
from tllm.core.config import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT, is_loopback, join_address, split_address
from tllm.core.units import format_bytes, format_seconds

_CONNECT_S = 5.0
_MULTICAST_GROUP = "224.0.0.251"  # of mDNS


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `remedy` says what to do where something is wrong; `needed`: not without it."""

    what: str
    found: str
    remedy: str = ""
    needed: bool = False


def doctor(
    address: Annotated[
        str | None, typer.Argument(help="HOST:PORT of a head, for nodes: check the way there instead.")
    ] = None,
) -> None:
    """Check engines, memory, ports and the network's settings. Exit status 1 when something needed is missing."""
    if address is None:
        findings = [finding for check in _CHECKS for finding in check()]
    else:
        host, port = split_address(address, default_port=DEFAULT_GRPC_PORT)
        findings = check_way(host, options.checked_port("The port of ADDRESS", port))
    for finding in findings:
        mark = "ok " if not finding.remedy else "NO " if finding.needed else "-- "
        print(f"{mark} {finding.what:<12} {finding.found}")
        if finding.remedy:
            print(f"{'':16} {finding.remedy}")
    if any(finding.needed and finding.remedy for finding in findings):
        raise typer.Exit(1)


def check_way(host: str, port: int) -> list[Finding]:
    """From this machine to a head: its name, TCP, TLS. What follows the first that fails is not tried."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        remedy = f"This machine does not know the name {host}. Use the head's address, as its network settings show it."
        return [Finding(what="name", found=f"{host}: {reason}", remedy=remedy, needed=True)]
    endpoints = list(dict.fromkeys((entry[0], entry[4]) for entry in found))
    shown = ", ".join(str(endpoint[0]) for _, endpoint in endpoints)
    findings = [Finding(what="name", found=shown if shown == host else f"{host} is {shown}")]
    failures = []
    for family, endpoint in endpoints:
        place = join_address(str(endpoint[0]), port)
        began_s = time.perf_counter()
        try:
            with socket.socket(family, socket.SOCK_STREAM) as plain:
                plain.settimeout(_CONNECT_S)
                plain.connect(endpoint)
                took = format_seconds(time.perf_counter() - began_s)
                return [*findings, Finding(what="TCP", found=f"{place} answers in {took}"), _tls(plain, host, port)]
        except OSError as error:
            reason = error.strerror or "no answer"
            remedy = remedy_for(error, str(endpoint[0]), port, platform.system())
            failures.append(Finding(what="TCP", found=f"{place}: {reason}", remedy=remedy, needed=True))
    return findings + failures


def _tls(plain: socket.socket, host: str, port: int) -> Finding:
    """Whether a head answers, and who it says it is. Nothing is proved here: only a token can tell the right one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(plain, server_hostname=None if _is_address(host) else host) as secured:
            certificate = secured.getpeercert(binary_form=True)
    except OSError as error:
        remedy = (
            f"Something else listens at {port}, or a head's HTTP port. Nodes join at its gRPC port, as the head prints "
            f"it; {DEFAULT_GRPC_PORT} if nothing else was said."
        )
        return Finding(what="TLS", found=f"no TLS: {error.strerror or error}", remedy=remedy, needed=True)
    assert certificate is not None  # TLS servers have one
    from cryptography.x509 import load_der_x509_certificate

    from tllm.transport.trust import pin_of

    try:
        pin = pin_of(load_der_x509_certificate(certificate).public_key())
    except ValueError as error:
        return Finding(what="TLS", found=f"a certificate that is none: {error}", remedy="This is no head.", needed=True)
    return Finding(what="TLS", found=f"answers; fingerprint {pin.hex()[:16]}")


def remedy_for(error: OSError, host: str, port: int, system: str) -> str:
    """What to do about a head that TCP does not reach."""
    here = is_loopback(host)
    if isinstance(error, ConnectionRefusedError):
        beyond = (
            "" if here else " It listens for other machines only when started with --host and its address, or 0.0.0.0."
        )
        return f"The machine answers, but nothing listens at {port}. Is the head running, and is that its port?{beyond}"
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return (
            f"There is no way from here to {host}. Is it on, and in this network? Another subnet, a guest Wi-Fi or a "
            "VPN that is down have no route, or refuse to let machines speak to each other."
        )
    if isinstance(error, TimeoutError):
        return (
            f"Nothing came back: a firewall, another subnet, or a machine that is off. {firewall_hint(port, system)} "
            "On a guest Wi-Fi, machines often may not speak to each other."
        )
    return f"Check that {host} is the head's address and that nothing is between. {firewall_hint(port, system)}"


def firewall_hint(port: int, system: str) -> str:
    """How a firewall lets nodes in, on the head's machine; told for the system that this one runs."""
    match system:
        case "Linux":
            return (
                f"If the head runs Linux: sudo ufw allow {port}/tcp (Ubuntu, Debian), or sudo firewall-cmd "
                f"--add-port={port}/tcp --permanent && sudo firewall-cmd --reload (Fedora, RHEL)."
            )
        case "Darwin":
            return (
                "If the head is a Mac: System Settings, Network, Firewall, Options: allow incoming connections for "
                "python; and Privacy & Security, Local Network: allow the terminal."
            )
        case "Windows":
            return (
                "If the head runs Windows, as administrator: New-NetFirewallRule -DisplayName tllm -Direction Inbound "
                f"-Protocol TCP -LocalPort {port} -Action Allow; and the network must be a private one."
            )
        case _:
            return f"On the head's machine, let TCP port {port} in."


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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


def _kernels() -> list[Finding]:
    """Compiles them, as the first start would."""
    if util.find_spec("torch") is None:
        return []
    from tllm.engines.torch.kernels import build

    remedy = "" if build.library() else "Without them a CPU is slower, with quantized weights many times slower."
    what, _, found = build.status().partition(": ")
    return [Finding(what=what, found=found, remedy=remedy)]


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


def _addresses() -> list[Finding]:
    from tllm.cluster.discovery import reachable_addresses

    addresses = reachable_addresses("::")
    if not addresses:
        remedy = "Other machines cannot reach this one; alone it works. Connect it to a network for a cluster."
        return [Finding(what="addresses", found="none but its own", remedy=remedy)]
    return [Finding(what="addresses", found=f"others reach this machine at {', '.join(addresses)}")]


def _multicast() -> list[Finding]:
    """Whether heads can be found without their address; asked of the system, nothing is sent."""
    from tllm.cluster.discovery import reachable_addresses

    works = [address for address in reachable_addresses("0.0.0.0") if _takes_multicast(address)]
    if works:
        return [Finding(what="multicast", found=f"works at {', '.join(works)}, unless the network drops it")]
    remedy = "Heads are not found by themselves. Join by address: tllm join HOST:PORT"
    return [Finding(what="multicast", found="no interface has it", remedy=remedy)]


def _takes_multicast(address: str) -> bool:
    group = struct.pack("4s4s", socket.inet_aton(_MULTICAST_GROUP), socket.inet_aton(address))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
            receiver.connect((_MULTICAST_GROUP, 5353))  # only looks for a way out
    except OSError:
        return False
    return True


_CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _python,
    _torch,
    _kernels,
    _memory,
    _ports,
    _proxies,
    _addresses,
    _multicast,
)
