"""What cannot be done as asked is refused in one screen that names the flags."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from tllm.cli import app, options
from tllm.cli.serve import _how_to_join
from tllm.cluster.events import Listening
from tllm.core.config import ServeConfig
from tllm.core.errors import ConfigError


def refusal(*arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(app, arguments, env=environment)
    assert isinstance(result.exception, ConfigError), (result.exception, result.output)
    return str(result.exception)


@pytest.mark.parametrize(
    "option",
    [["--workers", "1"], ["--dtype", "float32"], ["--device", "cpu"], ["--threads", "2"], ["--max-model-len", "64"]],
)
def test_run_with_a_url_refuses_options_of_a_server_of_its_own(option):
    message = refusal("run", "--url", "http://127.0.0.1:9", *option)
    assert "--url" in message
    assert option[0] in message


@pytest.mark.parametrize(
    "option",
    [
        ["--workers", "2"],
        ["--threads", "2"],
        ["--memory", "1GiB"],
        ["--device", "cpu"],
        ["--pin"],
        ["--name", "one"],
    ],
)
def test_serve_without_a_local_node_refuses_options_of_that_node(option):
    message = refusal("serve", "--no-local", *option)
    assert "--no-local" in message
    assert option[0] in message


def test_all_options_without_effect_are_named():
    message = refusal("serve", "--no-local", "--pin", "--threads", "2")
    assert "--threads, --pin " in message


def test_the_environment_may_name_what_another_verb_needs():
    result = CliRunner().invoke(
        app, ["run", "--url", "http://127.0.0.1:9", "embedded", "hello"], env={"TLLM_WORKERS": "2"}
    )
    assert "No answer" in str(result.exception)


@pytest.mark.parametrize("port", ["99999", "65536", "-1"])
@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_ports_that_no_machine_has_are_refused(flag, port):
    message = refusal("serve", flag, port)
    assert message.startswith(f"{flag} is {port};")


def test_the_port_of_a_head_is_checked_too():
    assert "99999" in refusal("join", "10.0.0.1:99999")


def test_no_memory_at_all_is_refused():
    assert "--memory is 0" in refusal("serve", "--memory", "0")
    assert "--memory is 0" in refusal("join", "10.0.0.1", "--memory", "0")


def test_pinning_is_refused_where_there_is_none(monkeypatch):
    options.node_config(pin=sys.platform == "linux")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="--pin works on Linux only"):
        options.node_config(pin=True)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("gateway.example:25001", "tllm join gateway.example:25001 "),
        ("192.168.1.10:25001", "tllm join 192.168.1.10:25001 "),
        ("[fd00::5]:25001", "tllm join [fd00::5]:25001 "),
    ],
)
def test_a_head_may_listen_at_a_name(address, shown):
    config = ServeConfig(host="0.0.0.0", api_key="k")
    assert shown in _how_to_join(config, Listening(grpc_address=address, token="t"))


def test_an_unspecified_address_is_shown_as_the_host_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    config = ServeConfig(host="0.0.0.0", api_key="k")
    assert "tllm join here:25001 " in _how_to_join(config, Listening(grpc_address="0.0.0.0:25001", token="t"))


def test_run_without_a_url_refuses_the_key_of_another_server():
    message = refusal("run", "--api-key", "secret", "embedded", "hello")
    assert "--api-key would have no effect" in message
    assert "secret" not in message
