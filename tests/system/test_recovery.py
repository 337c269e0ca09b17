"""Whatever dies or hangs under open streams: they go on with exactly the text they would have had; nothing leaks.

In float32: in bfloat16 two tokens may be so close that it matters which other rows a step computes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.system.processes import START_S, Server, Tllm, alive, poll, serve, tllm
from tests.system.recovery import LONG_PROMPT, Footprint, Stream, follow, in_decode, in_prefill, request, streams

JOIN_LINE = r"tllm join \S+:(\d+)"
SERVE = ("--port", "0", "--grpc-port", "0")


@pytest.fixture(scope="module")
def three() -> Iterator[Server]:
    """A pipeline of three workers, whose prompts take several steps."""
    with serve("--workers", "3", "--dtype", "float32", "--max-batch-tokens", "64") as server:
        streams(server.url)  # whatever is made on first use
        yield server


def undisturbed(server: Server, prefix: str) -> list[str]:
    found = streams(server.url, prefix=prefix)
    assert all(stream.done for stream in found), [stream.error for stream in found]
    return [stream.text for stream in found]


def check(server: Server, found: list[Stream], expected: list[str], before: Footprint) -> None:
    assert [stream.error for stream in found] == [None] * len(found)
    assert [stream.text for stream in found] == expected
    poll(lambda: Footprint.of(server).is_like(before), deadline_s=15, what="everything given back")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_killed_worker_costs_a_pause_and_not_a_token(three, which, phase):
    """Prompts differ from test to test, or the prefix tree would leave little of a prefill to strike."""

    def act() -> None:
        three.workers()[which].kill()

    prefix = f"{which} {LONG_PROMPT}" if phase == "prefill" else ""
    strike = in_decode(act) if phase == "decode" else in_prefill(three, act)
    before = Footprint.of(three)
    found = streams(three.url, prefix=prefix, strike=strike)
    check(three, found, undisturbed(three, prefix), before)


@pytest.mark.parametrize("which", [0, 2], ids=["first", "last"])
def test_a_worker_that_stops_for_ever_is_replaced(three, which):
    expected, before = undisturbed(three, ""), Footprint.of(three)
    stopped: list[psutil.Process] = []

    def act() -> None:
        stopped.append(three.workers()[which])
        stopped[0].suspend()

    check(three, streams(three.url, strike=in_decode(act)), expected, before)
    assert alive([stopped[0].pid]) == []


def test_a_worker_that_stops_for_two_seconds_is_waited_for(three):
    expected, before = undisturbed(three, ""), Footprint.of(three)
    epoch, workers = three.metric("epoch"), {worker.pid for worker in three.workers()}

    def act() -> None:
        worker = three.workers()[1]
        worker.suspend()
        resumed = threading.Timer(2.0, worker.resume)
        resumed.start()
        resumed.join()

    check(three, streams(three.url, strike=in_decode(act)), expected, before)
    assert three.metric("epoch") == epoch
    assert {worker.pid for worker in three.workers()} == workers


def elsewhere(name: str) -> list[str]:
    """A prefix for a command that takes it for another machine."""
    prefix = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("a host name of its own needs unshare and the right to use it")
    return prefix


@pytest.fixture(scope="module")
def head() -> Iterator[Server]:
    """A head and its own two workers, all of whose nodes take part."""
    with serve("--workers", "2", "--use-all", "--dtype", "float32", "--max-batch-tokens", "64") as server:
        yield server


def join(head: Server, name: str) -> Tllm:
    port = head.wait_for(JOIN_LINE)[1]
    return tllm("join", f"127.0.0.1:{port}", "--name", name, before=elsewhere(name))


def takes_part(head: Server, name: str) -> bool:
    status = httpx.get(f"{head.url}/tllm/v1/cluster").json()
    return status["state"] == "serving" and any(node["name"] == name and node["stages"] for node in status["nodes"])


def wait_for_part(head: Server, name: str) -> None:
    poll(lambda: takes_part(head, name), deadline_s=START_S, what=f"{name} takes part")


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_whole_machine_that_is_gone_costs_a_pause_and_not_a_token(head, signal_number):
    expected = undisturbed(head, "")
    name = f"other-{int(signal_number)}"
    with join(head, name) as joined:
        wait_for_part(head, name)
        family = joined.family()

        def act() -> None:
            for process in family:  # the agent first: what it runs must not outlive it
                process.send_signal(signal_number)

        found = streams(head.url, strike=in_decode(act))
        assert [stream.error for stream in found] == [None] * len(found)
        assert [stream.text for stream in found] == expected
        assert not takes_part(head, name)
        for process in family:
            if process.is_running():
                process.kill()


def test_a_killed_agent_takes_its_workers_with_it_and_the_streams_go_on(head):
    expected = undisturbed(head, "")
    with join(head, "third") as joined:
        wait_for_part(head, "third")
        pids = [process.pid for process in joined.family()]
        found = streams(head.url, strike=in_decode(joined.process.kill))
        assert [stream.text for stream in found] == expected
        poll(lambda: alive(pids) == [], deadline_s=10, what="every process of the machine gone")


def test_a_control_stream_that_is_lost_does_not_stop_a_healthy_pipeline(head):
    """The agent stops; its worker, which computes, does not. When the agent goes on it is the same node again."""
    expected = undisturbed(head, "")
    with join(head, "fourth") as joined:
        wait_for_part(head, "fourth")
        epoch = head.metric("epoch")
        agent = psutil.Process(joined.process.pid)
        agent.suspend()
        try:
            poll(lambda: state_of(head, "fourth") == "unreachable", deadline_s=20, what="the head misses the agent")
            found = streams(head.url)
        finally:
            agent.resume()
        assert [stream.text for stream in found] == expected
        poll(lambda: state_of(head, "fourth") == "ready", deadline_s=20, what="the agent is back")
        assert head.metric("epoch") == epoch
        assert takes_part(head, "fourth")


def state_of(head: Server, name: str) -> str | None:
    nodes = httpx.get(f"{head.url}/tllm/v1/cluster").json()["nodes"]
    states = [node["state"] for node in nodes if node["name"] == name]
    assert len(states) <= 1, nodes
    return states[0] if states else None


def test_a_drained_node_is_left_out_without_a_lost_token_and_comes_back(head):
    expected = undisturbed(head, "")
    with join(head, "fifth") as joined:
        wait_for_part(head, "fifth")

        def act() -> None:
            assert httpx.post(f"{head.url}/tllm/v1/nodes/fifth/drain", timeout=60).status_code < 300

        found = streams(head.url, max_tokens=100, strike=in_decode(act))
        assert [stream.text for stream in found] == expected
        assert state_of(head, "fifth") == "draining"
        assert joined.workers() == []
        assert httpx.post(f"{head.url}/tllm/v1/nodes/fifth/undrain", timeout=60).status_code < 300
        wait_for_part(head, "fifth")
        assert joined.interrupt() == 0


def test_a_head_that_is_killed_and_started_again_finds_the_weights_loaded(tmp_path):
    """The agent keeps its workers, and the next head at the same address takes them as they are."""
    with tllm("serve", "--port", "0", "--grpc-port", "0", "--no-local", kind=Server) as first:
        port = first.wait_for(JOIN_LINE)[1]
        with join(first, "keeper") as joined:
            body = request("tell me", max_tokens=40)
            expected = follow(first.url, body, Stream()).text
            before = [worker.pid for worker in joined.workers()]
            assert before
            first.process.kill()
            joined.wait_for("The head is gone")
            with tllm("serve", "--port", "0", "--grpc-port", port, "--no-local", kind=Server) as second:
                assert follow(second.url, body, Stream()).text == expected
                assert [worker.pid for worker in joined.workers()] == before
                assert joined.interrupt() == 0


def test_restarts_of_a_node_leave_no_ghosts(head):
    """Every time it is the same node again. TLLM_RESTARTS=50 for a longer look."""
    ids = set()
    for _ in range(int(os.environ.get("TLLM_RESTARTS", "4"))):
        with join(head, "restless") as joined:
            ids.add(joined.wait_for(r"Joined .* as (\S+)\.")[1])
            poll(lambda: state_of(head, "restless") == "ready", deadline_s=20, what="the node is there")
            joined.process.kill()
    poll(lambda: state_of(head, "restless") != "ready", deadline_s=20, what="the node is gone")
    assert len(ids) == 1
    names = [node["name"] for node in httpx.get(f"{head.url}/tllm/v1/cluster").json()["nodes"]]
    assert names.count("restless") <= 1
