"""What peers are called and what they say is shown as it is, never read as markup."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from tllm.cli.serve import _invite
from tllm.cli.view import StartView
from tllm.cluster.events import Lost, NodeJoined, Planned, ShardLoading
from tllm.core.config import ServeConfig
from tllm.planner.profile import Load, ModelProfile, NodeProfile
from tllm.planner.search import place

NAMES = ["[/x]", "[fd00::5]", "[bold]", ":cat:"]


def console(width: int = 120) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def printed(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def node(name: str) -> NodeProfile:
    return NodeProfile(
        id=name, name=name, machine="m", host="", memory_bytes=10**9, num_threads=1, device=name, platform=name
    )


def model(name: str) -> ModelProfile:
    return ModelProfile(
        name=name, layer_bytes=(10, 10), embed_bytes=5, head_bytes=5, tied=False, kv_bytes_per_position=8
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_is_named_literally_when_it_joins(name):
    out = console()
    with StartView(out) as view:
        view(NodeJoined(node=node(name)))
    assert f"+ {name}: 1 threads" in printed(out)
    assert f", {name}, {name}" in printed(out)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_names_models_peers_and_who_is_left_out_literally(name):
    plan = place(model(name), [node(name), node("other"), node(name)], min_kv_positions=1)
    out = console()
    with StartView(out) as view:
        view(Planned(model=model(name), plan=plan, load=Load()))
    title, *rows = printed(out).splitlines()
    assert f"{name}: 2 layers" in title
    assert any(name in row and "0..0" in row for row in rows)
    assert f"not used: {name}: " in rows[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_bar_of_a_shard_names_its_peer_literally(name):
    plan = place(model(name), [node(name)], min_kv_positions=1)
    out = console()
    with StartView(out) as view:
        view(ShardLoading(stage=plan.stages[0], done_bytes=1, total_bytes=2))
    assert f"{name} layers 0..1" in printed(out)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_is_shown_literally(name):
    out = console()
    with StartView(out) as view:
        view(Lost(reason=f"the peer at {name} is gone"))
    assert f"Lost: the peer at {name} is gone" in printed(out)


def test_the_line_that_says_where_the_server_is_stays_one_line():
    name = "/models/[draft]/" + 100 * "x"
    service = SimpleNamespace(deployment=SimpleNamespace(names=(name,)), url="http://[fd00::5]:8022")
    out = console(width=80)
    _invite(out, ServeConfig(host="fd00::5", api_key="[/k]"), service)
    lines = printed(out).splitlines()
    assert f"API   http://[fd00::5]:8022/v1   model {name}" in lines
    assert any(
        line.startswith('curl http://[fd00::5]:8022/v1/chat/completions -H "Authorization: Bearer [/k]"')
        for line in lines
    )
