"""The cluster in the terminal: readable at any width, literal whatever peers are called, and honest when it fails."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from tests.api.fake_cluster import NODE, STATUS, FakeCluster
from tests.api.serving import Server
from tests.cli.http_server import answering
from tllm.api.state import ApiState
from tllm.cli import drain, nodes
from tllm.cluster.status import NodeState
from tllm.core.errors import ConfigError, TllmError, TransportError, UnavailableError

app = typer.Typer()
app.command("nodes")(nodes.nodes)
app.command("drain")(drain.drain)

Start = Callable[..., str]


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def start(cluster: FakeCluster) -> Iterator[Start]:
    """A server before the cluster; returns its URL."""
    with ExitStack() as stack:
        yield (
            lambda **options: (
                stack.enter_context(Server(ApiState(version="1", deployments={}, cluster=cluster, **options))).url
            )
        )


def tllm(*arguments: str, **environment: str) -> str:
    result: Result = CliRunner().invoke(app, arguments, env={"TLLM_API_KEY": None, "COLUMNS": "200", **environment})
    if isinstance(result.exception, TllmError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def shown(status=STATUS, width: int = 200) -> str:
    file = io.StringIO()
    nodes.show(Console(file=file, width=width, force_terminal=True, color_system=None), status)
    return file.getvalue()


def test_a_wide_terminal_shows_one_row_for_each_node(start):
    lines = tllm("nodes", "--url", start()).splitlines()
    [mini] = [line for line in lines if "mini" in line and "ready" in line]
    for cell in ("0..3", "3.5 GB of 12 GB", "8 threads, cpu", "41.5", "800 µs"):
        assert cell in mini
    [laptop, reason] = [line for line in lines if "old laptop/2" in line]
    assert laptop.count("–") == 3
    assert reason == "old laptop/2: it would make every token 40 % slower"
    assert "tllm-demo: serving, epoch 3, cluster tllm-demo" in lines
    assert "predicted: first token in 210 ms, 37.2 tokens/s; bound by memory bandwidth of mini" in lines
    assert lines[-1] == "06:24:15 serving in epoch 3"


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 120, 200])
def test_every_figure_is_readable_at_any_width(width):
    lines = shown(width=width).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for said in (*(node.name for node in STATUS.nodes), "0..3", "4..7", "3.5 GB of 12 GB", "41.5", "800 µs", "epoch 3"):
        assert said in text
    assert "…" not in text


def test_a_narrow_terminal_gets_no_torn_table():
    assert shown(width=80).split()[:3] == ["node", "state", "layers"]
    assert shown(width=60).split()[:3] == ["mini", "ready", "layers"]
    assert "memory 3.5 GB of 12 GB\n" in shown(width=60)


@pytest.mark.parametrize("name", ["[bold]", "[/x]", ":cat:", "a\x1b]0;owned\x07b", "x\ny", "\u202e"])
@pytest.mark.parametrize("width", [40, 200])
def test_what_peers_say_is_shown_literally_and_never_obeyed(name, width):
    node = replace(NODE, name=name, reason=name, device=name)
    text = shown(replace(STATUS, model=name, bound_by=name, events=(name,), nodes=(node,)), width=width)
    said = "".join(char if char.isprintable() else "\ufffd" for char in name)
    assert text.count(said) == (6 if width == 40 else 7)  # a reason has the node's name before it
    assert not set(text.replace("\n", "")) - {char for char in text if char.isprintable()}


def test_a_cluster_without_nodes_or_prediction_is_shown():
    text = shown(replace(STATUS, nodes=(), predicted_ttft_s=None, predicted_tokens_per_s=None, events=()))
    assert text.splitlines() == ["No node has joined.", "", "tllm-demo: serving, epoch 3, cluster tllm-demo"]


def test_a_stage_without_layers_is_named_by_its_ends():
    stage = replace(NODE.stages[0], first_layer=0, last_layer=0)
    assert nodes.layers_text(stage) == "embedding"
    assert nodes.layers_text(replace(stage, head=True)) == "embedding and head"


def test_json_is_what_the_server_says(start):
    document = json.loads(tllm("nodes", "--url", start(), "--json"))
    assert [node["name"] for node in document["nodes"]] == ["mini", "m3pro", "old laptop/2"]


def test_json_beside_watch_is_refused():
    with pytest.raises(ConfigError, match="--json would have no effect beside --watch"):
        tllm("nodes", "--watch", "--json")


def test_watching_goes_on_while_the_server_is_gone(start, cluster, monkeypatch):
    looks = 0

    def look_again() -> None:
        nonlocal looks
        looks += 1
        match looks:
            case 1:
                cluster.current = replace(STATUS, epoch=4)
            case 2:
                cluster.status = None  # type: ignore[method-assign]  # the server answers 500 from here on
            case 3:
                del cluster.status
                cluster.current = replace(STATUS, epoch=5)
            case 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(nodes, "_pause", look_again)
    text = tllm("nodes", "--url", start(), "--watch")
    assert looks == 4
    assert "epoch 5" in text


def test_the_key_comes_from_the_flag_or_the_environment(start):
    url = start(api_keys=("k",))
    for verb in (["nodes"], ["drain", "mini"]):
        with pytest.raises(UnavailableError, match=r"wrong API key.*--api-key or TLLM_API_KEY"):
            tllm(*verb, "--url", url)
        tllm(*verb, "--url", url, "--api-key", "k")
        tllm(*verb, "--url", url, TLLM_API_KEY="k")


def test_a_node_is_drained_and_comes_back(start, cluster):
    url = start()
    assert "old laptop/2 is out of every plan" in tllm("drain", "old laptop/2", "--url", f"{url}/v1")
    assert cluster.current.nodes[2].state is NodeState.DRAINING
    assert "can be planned with again" in tllm("drain", "old laptop/2", "--undo", "--url", url)
    assert cluster.current.nodes[2].state is NodeState.READY


def test_a_drain_that_is_refused_says_why(start, cluster):
    url = start()
    with pytest.raises(UnavailableError, match="no node 'nobody' here"):
        tllm("drain", "nobody", "--url", url)
    cluster.needed.add(NODE.id)
    with pytest.raises(UnavailableError, match="6 GB more"):
        tllm("drain", "mini", "--url", url)
    assert cluster.current == STATUS


@pytest.mark.parametrize("verb", [["nodes"], ["drain", "mini"]])
def test_nobody_or_somebody_else_at_the_url_is_one_of_our_errors(verb):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TransportError, match=r"No answer from .*--url http://HOST:PORT"):
        tllm(*verb, "--url", f"http://127.0.0.1:{port}")
    with answering("<html>", status=404, kind="text/html") as url, pytest.raises(TransportError, match="not as tllm"):
        tllm(*verb, "--url", url)


def test_a_server_of_another_version_is_said():
    with answering('{"nodes": 3}') as url, pytest.raises(TransportError, match="this version"):
        tllm("nodes", "--url", url)
    newer = json.dumps({**json.loads(nodes_json()), "added_later": 1})
    with answering(newer) as url:
        assert "mini" in tllm("nodes", "--url", url)


def nodes_json() -> bytes:
    from pydantic import TypeAdapter

    return TypeAdapter(type(STATUS)).dump_json(STATUS)
