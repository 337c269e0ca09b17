"""`tllm plan`: a file of nodes becomes profiles, or a message that names the file, the entry and the field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.planner.test_exact import model
from tllm.cli.nodes_file import Cluster, read_nodes
from tllm.cli.plan import copied_bytes_per_s, multiplied_flop_per_s, plan
from tllm.core.errors import ConfigError
from tllm.core.types import HEAD

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "nodes-file.md"

NODE = '[[nodes]]\nname = "a"\nmemory = "1GB"\n'


def read(tmp_path: Path, text: str, name: str = "nodes.toml") -> Cluster:
    path = tmp_path / name
    path.write_text(text)
    return read_nodes(path, model([10] * 4))


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_guides_example_is_read_as_it_says(tmp_path):
    example = re.search(r"```toml nodes\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert example is not None
    cluster = read(tmp_path, example[1])
    desk, laptop = cluster.nodes
    assert desk.memory_bytes == 24 * 2**30
    assert laptop.speed is not None
    assert laptop.speed.layer_s == pytest.approx((0.0021, 0.0024, 0.018))
    assert laptop.speed.step_s == pytest.approx(0.0002)
    assert {(link.source, link.target) for link in cluster.links} == {("desk", "laptop"), ("laptop", "desk")}
    assert cluster.links[0].bytes_per_s == 125e6
    assert cluster.head_machine == "desk"
    assert cluster.notes == ("desk: rough, what its bandwidth and arithmetic allow at best",)


def test_the_guides_command_shows_plan_prediction_and_losers(tmp_path):
    example = re.search(r"```toml nodes\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    command = re.search(r"```shell\ntllm plan (.*?)\n```", GUIDE.read_text())
    assert example is not None
    assert command is not None
    path = tmp_path / "nodes.toml"
    path.write_text(example[1])
    shown = run(*(str(path) if word == "nodes.toml" else word for word in command[1].split()))
    assert "Predicted: " in shown
    assert "bound by" in shown
    assert "for 8 streams" in shown
    assert "not chosen" in shown


def test_json_is_for_programs_and_has_the_same_shape_as_toml(tmp_path):
    path = tmp_path / "nodes.json"
    path.write_text(json.dumps({"nodes": [{"name": "a", "memory": "1GB", "bandwidth_gb_per_s": 10}]}))
    shown = json.loads(run("embedded", "--nodes", str(path), "--json"))
    assert [stage["node"] for stage in shown["stages"]] == ["a"]
    assert shown["prediction"]["tokens_per_s"] == pytest.approx(1 / shown["prediction"]["tpot_s"])
    assert shown["load"]["streams"] == 1


def test_a_node_of_unknown_speed_gives_a_plan_without_a_prediction(tmp_path):
    path = tmp_path / "nodes.toml"
    path.write_text(NODE)
    assert "No prediction" in run("embedded", "--nodes", str(path))


def test_links_reach_the_head(tmp_path):
    link = '[[links]]\nbetween = ["head", "a"]\nrtt_ms = 2\nmbit_per_s = 80\n'
    (out, back) = read(tmp_path, NODE + link).links
    assert (out.source, out.target, back.source) == (HEAD, "a", "a")
    assert (out.rtt_s, out.bytes_per_s) == (0.002, 1e7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has none; it needs at least one"),
        ("[[nodes]\n", "is not TOML"),
        ("nodes = 3", "must be a list of tables"),
        ("nodes = [3]", "node 1 is 3; it must be a table"),
        (NODE + NODE, "two of the name a"),
        (NODE + "speeed = 3", "node 1 has speeed; allowed are .*speed"),
        ('[[nodes]]\nname = "a"\n', "node 1: memory must be a text"),
        (NODE + "threads = 0", "threads is 0; it must be a whole number"),
        (NODE + "workers = true", "workers is True"),
        (NODE + "bandwidth_gb_per_s = -1", "bandwidth_gb_per_s is -1; it must be a number above 0"),
        (NODE + "bandwidth_gb_per_s = nan", "bandwidth_gb_per_s is nan"),
        (NODE + "gflop_per_s = 5", "gflop_per_s needs bandwidth_gb_per_s"),
        (NODE + "speed = {rows = [4, 1], layer_ms = [1, 1], head_ms = [1, 1]}", "rows must be whole numbers that asc"),
        (NODE + "speed = {rows = [1], layer_ms = [1, 1], head_ms = [1]}", "as many numbers as rows"),
        (NODE + "speed = {rows = [1], layer_ms = [-1], head_ms = [1]}", "layer_ms must be a list of numbers, none neg"),
        (NODE + "bandwidth_gb_per_s = 1\nspeed = {}", "bandwidth_gb_per_s would have no effect beside speed"),
        (
            NODE + '[[links]]\nbetween = ["a", "b"]\nrtt_ms = 1\nmbit_per_s = 1',
            "link 1: between must be two of a, head",
        ),
        (NODE + '[[links]]\nbetween = ["a", "head"]\nmbit_per_s = 1', "link 1: rtt_ms is missing"),
        (f'head = "b"\n{NODE}', "head is 'b', which is no node's name: a"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.toml cannot be read: No such file"):
        read_nodes(tmp_path / "nothing.toml", model([1]))


def test_this_machine_can_be_probed():
    assert 1e6 < copied_bytes_per_s(1) < 1e13
    assert 1e6 < multiplied_flop_per_s() < 1e16
