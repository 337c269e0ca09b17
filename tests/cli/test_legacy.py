"""The first version's commands mean what they meant, or say why they do not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.cli.http_server import answering
from tllm.cli import legacy
from tllm.core.config import NodeConfig, ServeConfig
from tllm.core.errors import ConfigError, TllmError, TransportError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "config.json"
JOIN = json.dumps({"cluster": "c", "grpc_port": 26000, "fingerprint": "00"})
Joined = tuple[str | None, str | None, NodeConfig]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    made: list[ServeConfig] = []
    monkeypatch.setattr("tllm.cli.serve.run_server", made.append, raising=False)
    return made


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[Joined]:
    made: list[Joined] = []
    monkeypatch.setattr("tllm.cli.join.run_node", lambda *arguments: made.append(arguments), raising=False)
    return made


def server(*arguments: str, **environment: str) -> None:
    _invoke(legacy._server_app, arguments, environment)


def client(*arguments: str, **environment: str) -> None:
    _invoke(legacy._client_app, arguments, environment)


def _invoke(app: object, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    cleared = {"TLLM_API_KEY": None, "TLLM_TOKEN": None, **environment}
    result = CliRunner().invoke(app, arguments, env=cleared)  # type: ignore[arg-type]
    if isinstance(result.exception, TllmError):
        raise result.exception
    assert result.exit_code == 0, result.output


def written(path: Path, document: object) -> str:
    (path / "config.json").write_text(json.dumps(document))
    return str(path / "config.json")


# ------------------------------------------------------------------------------------------------------ server


def test_local_parts_are_workers_of_this_machine(served):
    server("--model_path", "m", "--hostname", "localhost", "--is_local", "--client_size", "3")
    [config] = served
    assert (config.host, config.port, config.grpc_port) == ("127.0.0.1", 8022, 25001)
    assert config.model.model == "m"
    assert config.local_node == NodeConfig(num_workers=3)
    assert config.num_nodes is None
    assert not config.use_all


def test_without_is_local_the_head_waits_for_clients_and_computes_nothing(served):
    server("--model_path", "m", "--client_size", "2", "--http_port", "81", "--grpc_port", "82")
    server("--model_path", "m")
    two, one = served
    assert (two.local_node, two.num_nodes, two.port, two.grpc_port) == (None, 2, 81, 82)
    assert (one.local_node, one.num_nodes) == (None, 1)
    assert two.use_all


def test_a_file_decides_addresses_and_the_number_of_parts(served, monkeypatch):
    monkeypatch.setattr(legacy, "bind_host", {"mac-mini": "192.168.1.10"}.__getitem__)
    server("--model_path", "m", "--config", str(EXAMPLE), "--api-key", "k")
    [config] = served
    assert (config.host, config.port, config.grpc_port) == ("192.168.1.10", 8022, 25001)
    assert (config.local_node, config.num_nodes) == (None, 2)


@pytest.mark.parametrize(
    "option",
    [
        ["--hostname", "localhost"],
        ["--is_local"],
        ["--client_size", "2"],
        ["--http_port", "8022"],
        ["--grpc_port", "25001"],
    ],
)
def test_a_server_takes_no_flags_that_its_file_decides(served, option):
    with pytest.raises(ConfigError, match=f"^{option[0]} would have no effect beside --config"):
        server("--model_path", "m", "--config", str(EXAMPLE), *option)
    assert not served


def test_other_machines_may_only_come_with_a_key_or_if_that_is_said(served):
    beyond = ["--model_path", "m", "--hostname", "192.0.2.7"]
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7 can be reached.*--api-key.*TLLM_API_KEY.*--insecure"):
        server(*beyond)
    with pytest.raises(ConfigError, match="--insecure would have no effect beside an API key"):
        server(*beyond, "--insecure", "--api-key", "k")
    with pytest.raises(ConfigError, match="--insecure would have no effect: only this machine"):
        server("--model_path", "m", "--insecure")
    assert not served
    server(*beyond, "--api_key", "k")
    server(*beyond, TLLM_API_KEY="k")
    server(*beyond, "--insecure")
    assert [(config.host, config.api_key, config.insecure) for config in served] == [
        ("192.0.2.7", "k", False),
        ("192.0.2.7", "k", False),
        ("192.0.2.7", None, True),
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--client_size", "0"], "--client_size is 0"),
        (["--http_port", "70000"], "--http_port is 70000"),
        (["--grpc_port", "-1"], "--grpc_port is -1"),
        (["--hostname", "http://localhost:8022"], "takes a name or an address"),
        (["--hostname", "no-such-host.invalid"], "is not a name that this machine knows"),
    ],
)
def test_what_a_server_cannot_do_is_refused_in_its_own_words(served, option, message):
    with pytest.raises(ConfigError, match=message):
        server("--model_path", "m", *option)
    assert not served


@pytest.mark.parametrize(
    ("hostname", "host"),
    [
        ("localhost", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("[fd00::5]", "fd00::5"),
        ("0.0.0.0", "0.0.0.0"),
    ],
)
def test_a_server_binds_what_its_hostname_means(hostname, host):
    assert legacy.bind_host(hostname) == host


def test_a_name_is_resolved_and_must_not_mean_only_this_machine(monkeypatch):
    known = {"mini": ["127.0.1.1", "192.168.1.10"], "debian": ["127.0.1.1"]}

    def getaddrinfo(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in known[name]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert legacy.bind_host("mini") == "192.168.1.10"
    with pytest.raises(ConfigError, match=r"debian means 127\.0\.1\.1 .*no other machine reaches"):
        legacy.bind_host("debian")


# ------------------------------------------------------------------------------------------------------ client


def test_a_client_asks_the_http_port_where_to_join(joined):
    with answering(JOIN, kind="application/json") as url:
        client("--hostname", url)
        client("--hostname", url, "--token", "t")
        client("--master_addr", url, TLLM_TOKEN="u")
        client("--master_addr", url, "--hostname", "m3pro", "--grpc_port", "25002")
        client("--hostname", url.removeprefix("http://"))
    address = "127.0.0.1:26000"
    assert joined == [
        (address, None, NodeConfig()),
        (address, "t", NodeConfig()),
        (address, "u", NodeConfig()),
        (address, None, NodeConfig(advertised_host="m3pro", ports=range(25002, 25004))),
        (address, None, NodeConfig()),
    ]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("192.168.1.10", "http://192.168.1.10:8022"),
        ("http://mac-mini", "http://mac-mini:8022"),
        ("http://[fd00::5]:81/", "http://[fd00::5]:81"),
        ("https://gateway.example", "https://gateway.example:443"),
    ],
)
def test_a_server_is_found_however_its_address_is_written(given, url):
    assert legacy.head_url(given, None) == (url, None)
    assert legacy.head_url("me", given) == (url, "me")


def test_a_client_refuses_what_would_have_no_effect(joined):
    for arguments, message in (
        ([], "Which server"),
        (["--hostname", "http://a:1", "--master_addr", "http://b:1"], "both a server's URL"),
        (["--grpc_port", "25002", "--config", str(EXAMPLE)], "--grpc_port would have no effect beside --config"),
        (["--hostname", "http://a:1", "--index", "0"], "--index would have no effect without --config"),
        (["--hostname", "http://a:1", "--config", str(EXAMPLE)], "--hostname would have no effect beside --config"),
        (["--master_addr", "http://a:1", "--config", str(EXAMPLE)], "--master_addr would have no effect"),
        (["--hostname", "http://a:99999"], "99999"),
        (["--hostname", "http://a/b"], "without a path"),
    ):
        with pytest.raises(ConfigError, match=message):
            client(*arguments)
    assert not joined


@pytest.mark.parametrize(
    "answer",
    ["<html>", "[]", "{}", '{"grpc_port": 0}', '{"grpc_port": 65536}', '{"grpc_port": true}', '{"grpc_port": "25001"}'],
)
def test_a_server_that_does_not_say_where_to_join_is_an_error(joined, answer):
    with answering(answer) as url, pytest.raises(TransportError, match="does not say where nodes join"):
        client("--hostname", url)
    with answering(JOIN, status=404) as url, pytest.raises(TransportError, match="answered 404"):
        client("--hostname", url)
    assert not joined


def test_nobody_at_the_url_is_an_error_that_says_what_to_do(joined):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TransportError, match=r"tllm join HOST:25001"):
        client("--hostname", f"http://127.0.0.1:{port}")
    assert not joined


@pytest.mark.parametrize(
    ("arguments", "name", "port", "host"),
    [
        ([], "m3", 25003, "m3.lan"),
        (["--index", "0"], "m3pro", 25002, "elsewhere"),
        (["--client_idx", "1"], "m3", 25003, "elsewhere"),
    ],
)
def test_a_client_finds_itself_in_the_file(joined, monkeypatch, arguments, name, port, host):
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    client("--config", str(EXAMPLE), *arguments)
    assert joined == [("mac-mini:25001", None, NodeConfig(advertised_host=name, ports=range(port, port + 2)))]


def test_a_client_that_is_not_or_twice_in_the_file_must_say_which_it_is():
    entries = [legacy.ClientEntry(hostname=name, grpc_port=None) for name in ("m3pro", "m3", "M3.local")]
    with pytest.raises(ConfigError, match=r"no client of the file.*--index: 0: m3pro, 1: m3, 2: M3.local"):
        legacy.own_entry(entries, None, frozenset({"other"}))
    with pytest.raises(ConfigError, match="several clients of the file"):
        legacy.own_entry(entries, None, frozenset({"m3", "m3.local"}))
    with pytest.raises(ConfigError, match="--index is 3"):
        legacy.own_entry(entries, 3, frozenset())
    with pytest.raises(ConfigError, match="--index is -1"):
        legacy.own_entry(entries, -1, frozenset())
    assert legacy.own_entry(entries, None, frozenset({"m3.local"})) is entries[2]
    assert {"localhost", "127.0.0.1", socket.gethostname().lower()} <= legacy.own_names()


# -------------------------------------------------------------------------------------------------------- file


def test_the_example_is_read_whole():
    file = legacy.read_config(EXAMPLE)
    assert file.server == legacy.ServerEntry(hostname="mac-mini", http_port=8022, grpc_port=25001)
    assert [(entry.hostname, entry.grpc_port) for entry in file.clients] == [("m3pro", 25002), ("m3", 25003)]


@pytest.mark.parametrize("port", ["0", "65535", "-1"])
def test_ports_that_a_node_cannot_have_are_refused(joined, port):
    with answering(JOIN, kind="application/json") as url, pytest.raises(ConfigError, match=f"grpc_port is {port};"):
        client("--hostname", url, "--grpc_port", port)
    assert not joined


def test_clients_of_one_machine_need_ports_apart(tmp_path):
    def read(*entries: tuple[str, int]) -> legacy.ClusterFile:
        clients = [{"hostname": hostname, "grpc_port": port} for hostname, port in entries]
        return legacy.read_config(Path(written(tmp_path, {"server": {"hostname": "a"}, "client": clients})))

    assert len(read(("b", 25002), ("c", 25003), ("b", 25004)).clients) == 3
    with pytest.raises(ConfigError, match=r"client\[0\] and client\[1\] .* both b .* port 25003"):
        read(("b", 25002), ("b", 25003))
    with pytest.raises(ConfigError, match="grpc_port is 65535"):
        read(("b", 65535))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sever": {}}, r"has 'sever'; allowed are server, client"),
        (
            {"server": {"hostname": "a", "port": 1}},
            r"server in .* has 'port'; allowed are hostname, http_port, grpc_port",
        ),
        ({"server": {}}, "no 'hostname'"),
        ({"server": []}, "'server' of .* must be an object"),
        ({"server": {"hostname": "http://a:8022"}}, "must be a name or an address"),
        ({"server": {"hostname": ""}}, "must be a name or an address"),
        ({"server": {"hostname": "a", "http_port": "8022"}}, "'http_port' of server .* whole number from 1 to 65535"),
        ({"server": {"hostname": "a", "grpc_port": 0}}, "'grpc_port'"),
        ({"server": {"hostname": "a", "grpc_port": True}}, "'grpc_port'"),
        ({"client": []}, "at least one client"),
        ({"client": {}}, "at least one client"),
        ({"client": ["m3"]}, r"client\[0\] in .* must be an object"),
        ({"client": [{"hostname": "a"}, {"hostname": "b", "gpu": 1}]}, r"client\[1\] .* has 'gpu'"),
        ({"client": [{"grpc_port": 25002}]}, r"client\[0\] .* has no 'hostname'"),
        ({"client": [{"hostname": "a", "grpc_port": None}]}, "'grpc_port' of client"),
    ],
)
def test_a_wrong_file_is_refused_by_the_key_that_is_wrong(tmp_path, change, message):
    document = {"server": {"hostname": "a"}, "client": [{"hostname": "b"}], **change}
    with pytest.raises(ConfigError, match=message):
        legacy.read_config(Path(written(tmp_path, document)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["server", "client", "hostname", "grpc_port", "http_port", "x"]), inner)
    ),
    max_leaves=8,
)


@given(document=JSON)
def test_any_file_is_read_or_refused(tmp_path_factory, document):
    path = Path(written(tmp_path_factory.getbasetemp(), document))
    try:
        assert legacy.read_config(path).clients
    except ConfigError:
        pass


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read .*No such file"):
        legacy.read_config(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        legacy.read_config(tmp_path / "broken.json")


# ---------------------------------------------------------------------------------------------------- processes


def test_every_documented_command_is_understood(served, joined, monkeypatch):
    monkeypatch.setattr(legacy, "bind_host", lambda hostname: hostname.replace("localhost", "127.0.0.1"))
    monkeypatch.setattr(legacy, "ask_where_to_join", lambda url: f"{url}/")
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "guides" / "old-commands.md").read_text()
    commands = [
        shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()
    ]
    kinds = {"tllm.server": server, "tllm.client": client}
    run = [command for command in commands if command and command[0] in kinds]
    for name, *arguments in run:
        kinds[name](*arguments)
    assert len(run) >= 5
    assert len(served) + len(joined) == len(run)


@pytest.mark.parametrize(("module", "more"), [("tllm.server", ["--model_path", "m"]), ("tllm.client", [])])
def test_the_commands_are_modules_too(module, more):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--hostname" in shown.stdout
    refused = subprocess.run(
        [sys.executable, "-m", module, "--hostname", "http://a/b", *more], capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("tllm: ")
    assert len(refused.stderr.splitlines()) == 1


def test_a_local_server_of_the_first_version_answers(tmp_path):
    http_port, grpc_port = _free_ports(2)
    command = (
        "-m tllm.server --model_path embedded --hostname localhost --is_local --client_size 2 "
        f"--http_port {http_port} --grpc_port {grpc_port}"
    )
    process = subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
    )
    assert process.stdout is not None
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("API "):
                break
        assert f"API   http://127.0.0.1:{http_port}/v1" in "".join(said), "".join(said)
        body = {"model": "tllm-demo", "prompt": "Once", "max_tokens": 4}
        response = httpx.post(f"http://127.0.0.1:{http_port}/v1/completions", json=body, timeout=30, trust_env=False)
        assert response.json()["usage"]["completion_tokens"] == 4, response.text
        assert any("2 stage(s)" in line for line in said)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def _free_ports(num_ports: int) -> list[int]:
    """Ports that were free just now, all different."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num_ports)]
        return [listener.getsockname()[1] for listener in listeners]
