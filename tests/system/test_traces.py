"""Traces of a head and two workers as real processes: parts that add up, and a table in the terminal."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.system.processes import Server, repository
from tllm.cli import app

NUM_TOKENS = 64
BODY = {
    "messages": [{"role": "user", "content": "tell me a story"}],
    "temperature": 0,
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "stream": True,
}


def stream(url: str, **headers: str) -> tuple[httpx.Headers, float]:
    """The answer's headers, and the seconds from asking to the last token."""
    with httpx.Client(timeout=60) as client:
        client.get(f"{url}/live")
        began_s = time.perf_counter()
        with client.stream("POST", f"{url}/v1/chat/completions", json=BODY, headers=headers) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if '"finish_reason":"length"' in line:
                    wall_s = time.perf_counter() - began_s
        return answer.headers, wall_s


def test_the_parts_of_a_request_add_up_to_what_its_client_waited(server: Server) -> None:
    headers, wall_s = stream(server.url, **{"x-tllm-trace": "1"})
    trace = httpx.get(f"{server.url}{headers['x-tllm-trace']}", timeout=20).json()
    summary = trace["tllm"]
    [account] = summary["accounts"]
    assert account["recorded_s"] == pytest.approx(account["wall_s"], rel=0.02)
    assert account["wall_s"] <= wall_s
    steps = {event["args"]["step"] for event in trace["traceEvents"] if event["name"] == "compute"}
    assert len(steps) >= NUM_TOKENS
    times = {(share["kind"], share["place"].rpartition(" ")[2]): share["num_parts"] for share in account["shares"]}
    layers = {layers for kind, layers in times if kind == "compute"}
    assert layers == {"0..3", "4..7"}
    assert all(times["compute", each] == NUM_TOKENS for each in layers)
    assert not summary["missing"]
    assert [clock["is_shared"] for clock in summary["clocks"]] == [True, True]  # one machine
    assert summary["moved_s"] == 0.0
    path = [event for event in trace["traceEvents"] if event["ph"] == "X" and "at" in event["args"]]
    assert sum(event["dur"] for event in path) / 1e6 == pytest.approx(account["wall_s"], rel=0.02)


@contextmanager
def under_load(url: str) -> Iterator[None]:
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            stream(url)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        ends.set()
        asking.join(60)


def test_a_window_is_shown_in_the_terminal_and_written(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    with under_load(server.url):
        result = CliRunner().invoke(
            app, ["trace", "--url", server.url, "--seconds", "0.4", "--out", str(out)], env={"COLUMNS": "120"}
        )
    assert result.exit_code == 0, result.output
    assert "(100.0 %)" in result.stdout
    assert result.stdout.count("the head's own") == 2
    events = json.loads(out.read_text())["traceEvents"]
    kinds = {event["name"] for event in events if event["ph"] == "X"}
    assert kinds == {"schedule", "serialize", "wire", "wait", "compute", "deliver"}


def test_the_guides_commands_work(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guide = (repository() / "docs" / "guides" / "traces.md").read_text()
    commands = [line.split()[1:] for line in guide.splitlines() if line.startswith("tllm trace ")]
    assert len(commands) == 3
    headers, _ = stream(server.url, **{"x-tllm-trace": "1"})
    for command in commands:
        asked = [headers["x-request-id"] if word.startswith("req_") else word for word in command]
        result = CliRunner().invoke(app, [*asked, "--url", server.url])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "trace.json").exists() != ("--summary" in command)
        (tmp_path / "trace.json").unlink(missing_ok=True)
