"""The doctor finds what is wrong between here and a head, and says what to do about it."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from tests.cli.http_server import answering
from tllm.cli import doctor
from tllm.core.errors import ConfigError
from tllm.transport import rpc

app = typer.Typer()
app.command()(doctor.doctor)


def examined(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, ConfigError):
        raise result.exception
    return result.exit_code, result.stdout


async def test_a_head_answers_with_the_fingerprint_that_its_tokens_pin(tmp_path: Path) -> None:
    authority = rpc.Authority.open(tmp_path)
    enrolment = rpc.Enrolment(authority, rpc.TokenStore(authority))
    server = rpc.Server([enrolment], identity=authority.identity("head"), enrols=True)
    [address] = await server.start(["127.0.0.1:0"])
    try:
        process = await _run("doctor", address)
        assert process.returncode == 0, process.stdout
        name, tcp, tls = process.stdout.splitlines()
        assert name == "ok  name         127.0.0.1"
        assert tcp.startswith(f"ok  TCP          {address} answers in ")
        assert tls == f"ok  TLS          answers; fingerprint {authority.pin.hex()[:16]}"
    finally:
        await server.aclose()


async def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In another process; the server of this one goes on meanwhile."""
    return await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "tllm", *arguments], capture_output=True, text=True
    )


def test_an_http_port_is_told_from_a_grpc_port() -> None:
    with answering("{}") as url:
        status, said = examined(url)
    assert status == 1
    assert "ok  TCP" in said
    assert "NO  TLS" in said
    assert "gRPC port" in said


def test_a_port_that_nothing_listens_at_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    status, said = examined(f"127.0.0.1:{port}")
    assert status == 1
    assert f"NO  TCP          127.0.0.1:{port}: Connection refused" in said
    assert f"nothing listens at {port}" in said
    assert "TLS" not in said


def test_a_name_that_is_not_known_is_said() -> None:
    status, said = examined("no-such-host.invalid")
    assert status == 1
    assert said.startswith("NO  name         no-such-host.invalid: ")
    assert "TCP" not in said


def test_every_address_of_a_name_is_tried_until_one_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering("{}") as url:
        port = int(url.rpartition(":")[2])
        endpoints = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.9", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: endpoints)
        _, said = examined(f"mini:{port}")
    assert "ok  name         mini is 127.0.0.9, 127.0.0.1" in said
    assert f"127.0.0.1:{port} answers in" in said
    assert "Connection refused" not in said


@pytest.mark.parametrize("port", ["0", "99999"])
def test_ports_are_checked(port: str) -> None:
    if port == "99999":
        with pytest.raises(ConfigError, match="99999"):
            examined(f"127.0.0.1:{port}")
    else:
        assert examined(f"127.0.0.1:{port}")[0] == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), ["nothing listens at 25001", "--host"]),
        (TimeoutError("timed out"), ["firewall", "25001", "another subnet"]),
        (OSError(errno.EHOSTUNREACH, "No route to host"), ["no way from here to 192.0.2.7", "subnet"]),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), ["no way from here"]),
        (OSError(errno.EACCES, "denied"), ["25001"]),
    ],
)
def test_each_failure_has_its_own_remedy(error: OSError, words: list[str]) -> None:
    remedy = doctor.remedy_for(error, "192.0.2.7", 25001, "Linux")
    for word in words:
        assert word in remedy
    assert "--host" not in doctor.remedy_for(ConnectionRefusedError(), "127.0.0.1", 25001, "Linux")


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("Linux", ["sudo ufw allow 25001/tcp", "firewall-cmd --add-port=25001/tcp"]),
        ("Darwin", ["System Settings"]),
        ("Windows", ["New-NetFirewallRule", "-LocalPort 25001"]),
        ("Plan9", ["25001"]),
    ],
)
def test_each_system_has_its_own_firewall(system: str, words: list[str]) -> None:
    for word in words:
        assert word in doctor.firewall_hint(25001, system)


def test_addresses_and_multicast_are_part_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = examined()
    for what in ("python", "torch", "memory", "HTTP port", "proxy", "addresses", "multicast"):
        assert f" {what} " in said
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    _, said = examined()
    assert "--  addresses    none but its own" in said
    assert "--  multicast    no interface has it" in said
    assert "tllm join HOST:PORT" in said
