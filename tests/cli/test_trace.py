"""`tllm trace` in the terminal: what is shown, what is written, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from tests.api.fake_cluster import FakeCluster
from tests.api.fake_deployment import FakeDeployment
from tests.api.serving import Server
from tests.cli.http_server import answering
from tllm.api.state import ApiState
from tllm.cli import trace
from tllm.cluster.tracing import Account, ClockStatement, Kind, Share, Summary
from tllm.core.errors import ConfigError, TllmError, TransportError, UnavailableError

app = typer.Typer()
app.command("trace")(trace.trace)

Start = Callable[..., str]
SUMMARY = Summary(
    began_s=10.0,
    ended_s=10.1,
    num_steps=2,
    accounts=(
        Account(
            title="request r, choice 0",
            wall_s=0.100,
            recorded_s=0.099,
            shares=(
                Share(kind=Kind.COMPUTE, place="desk layers 0..3", num_parts=2, seconds=0.075),
                Share(kind=Kind.WIRE, place="head", num_parts=2, seconds=0.024),
                Share(kind=Kind.UNRECORDED, place="head", num_parts=1, seconds=0.001),
            ),
        ),
    ),
    computing=(Share(kind=Kind.COMPUTE, place="desk layers 0..3", num_parts=4, seconds=0.08),),
    clocks=(
        ClockStatement(place="desk layers 0..3", is_shared=True, offset_s=0.0, error_s=0.0),
        ClockStatement(place="mini layers 4..7", is_shared=False, offset_s=1000.0, error_s=0.00012),
    ),
    moved_s=0.00008,
    missing=("old laptop, worker w-1: it did not answer within 2 s",),
)


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def start(cluster: FakeCluster, tmp_path: Path) -> Iterator[Start]:
    """A server before the cluster; returns its URL."""
    deployments = {"fake": FakeDeployment.in_directory(tmp_path)}
    with ExitStack() as stack:
        yield (
            lambda **options: (
                stack.enter_context(
                    Server(ApiState(version="1", deployments=deployments, cluster=cluster, **options))
                ).url
            )
        )


def tllm(*arguments: str) -> str:
    result: Result = CliRunner().invoke(app, arguments, env={"TLLM_API_KEY": None, "COLUMNS": "200"})
    if isinstance(result.exception, TllmError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def shown(summary: Summary) -> list[str]:
    file = io.StringIO()
    trace.show(Console(file=file, width=120, color_system=None), summary)
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


def test_the_table_says_where_the_time_went_and_whether_it_adds_up():
    assert shown(SUMMARY) == [
        "request r, choice 0",
        "part where times time share",
        "compute desk layers 0..3 2 75 ms 75.0 %",
        "wire head 2 24 ms 24.0 %",
        "unrecorded head 1 1 ms 1.0 %",
        "recorded parts sum to 99 ms of 100 ms (99.0 %)",
        "",
        "desk layers 0..3 computed for 80.0 % of 100 ms",
        "clock of desk layers 0..3: the head's own",
        "clock of mini layers 4..7: known ± 120 µs",
        "times moved by up to 80 µs, as the clocks were not known better",
        "not recorded: old laptop, worker w-1: it did not answer within 2 s",
    ]


def test_what_a_peer_calls_itself_cannot_command_the_terminal():
    clock = ClockStatement(place="\x1b[2Jmini", is_shared=True, offset_s=0.0, error_s=0.0)
    quiet = Summary(
        began_s=0,
        ended_s=1,
        num_steps=1,
        accounts=(),
        computing=(),
        clocks=(clock,),
        moved_s=0.0,
        missing=("\x07[bold]",),
    )
    text = "\n".join(shown(quiet))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]" in text


def test_a_window_is_written_and_summed_up(start, tmp_path):
    out = tmp_path / "some.json"
    said = tllm("--url", start(), "--seconds", "0.05", "--out", str(out))
    assert "1 steps, one after the other" in said
    assert "compute" in said
    assert f"wrote {out}" in said
    assert json.loads(out.read_text())["traceEvents"]


def test_a_request_is_found_by_its_id(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = start()
    body = {"messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-tllm-trace": "1", "x-request-id": "a/b"})
    assert answer.status_code == 200
    said = tllm("a/b", "--url", url, "--summary")
    assert "request a/b, choice 0" in said
    assert "(100.0 %)" in said
    assert not list(tmp_path.glob("*.json.*"))
    assert not (tmp_path / "trace.json").exists()


def test_an_unknown_request_is_refused_in_the_servers_words(start):
    with pytest.raises(UnavailableError, match="X-Tllm-Trace: 1"):
        tllm("nobody", "--url", start())


def test_a_missing_key_is_told_with_the_remedy(start):
    with pytest.raises(UnavailableError, match="--api-key"):
        tllm("--url", start(api_keys=("k",)), "--seconds", "0.01")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--seconds", "0"), "--seconds is 0"),
        (("--seconds", "61"), "at most 60"),
        (("r", "--seconds", "1"), "--seconds would have no effect"),
        (("--summary", "--out", "x.json"), "--out would have no effect"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        tllm("--url", "http://127.0.0.1:1", *arguments)


def test_a_file_that_cannot_be_written_is_told_as_such(start, tmp_path):
    with pytest.raises(ConfigError, match="Choose another --out"):
        tllm("--url", start(), "--seconds", "0.01", "--out", str(tmp_path / "no" / "trace.json"))


@pytest.mark.parametrize("body", ["{}", "[]", "not json", '{"tllm": {"began_s": 0}}'])
def test_another_program_at_that_address_is_told_as_such(body):
    with answering(body, kind="application/json") as url, pytest.raises(TransportError, match="version of tllm"):
        tllm("--url", url, "--seconds", "0.01")
