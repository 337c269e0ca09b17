"""Machines with a network between them that can be listened to, cut and slowed: real namespaces, real packets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.system.processes import START_S, Server, Tllm, poll, tllm
from tests.system.random_models import DEMO, remember_speed
from tests.system.recovery import Stream, follow, in_decode, request
from tllm.testing.namespaces import Rig, missing, network

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

KEY = "k-for-tests"
BOTH = ("--nodes", "2", "--use-all", "--threads", "1")
SECRET = "Zanzibar-4711-not-for-others"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with network(["desk", "attic"]) as rig:
        yield rig


@contextmanager
def head(rig: Rig, *arguments: str, state: Path) -> Iterator[Server]:
    remember_speed(state / "tllm", DEMO)
    with tllm(
        *("serve", "--host", rig.address("desk"), "--port", "8022", "--grpc-port", "25001", "--api-key", KEY),
        *("--dtype", "float32", *arguments),
        kind=Server,
        before=rig.command("desk"),
        XDG_STATE_HOME=str(state),
    ) as server:
        yield server


def join(rig: Rig, *arguments: str, state: Path) -> Tllm:
    remember_speed(state / "tllm", DEMO)
    return tllm("join", "--threads", "1", *arguments, before=rig.command("attic"), XDG_STATE_HOME=str(state))


def in_desk(rig: Rig, ask: Callable[[httpx.Client], object]) -> object:
    """Ask the head from its own machine."""
    headers = {"authorization": f"Bearer {KEY}"}

    def run() -> object:
        with httpx.Client(base_url=f"http://{rig.address('desk')}:8022", headers=headers, timeout=60) as client:
            return ask(client)

    return rig.call("desk", run)


def stages(rig: Rig) -> dict[str, int]:
    status = in_desk(rig, lambda client: client.get("/tllm/v1/cluster").json())
    assert isinstance(status, dict)
    return {node["name"]: len(node["stages"]) for node in status.get("nodes", [])}


def answer(rig: Rig, question: str) -> str:
    body = {**request(question, max_tokens=60), "stream": False}
    found = in_desk(rig, lambda client: client.post("/v1/chat/completions", json=body).json())
    assert isinstance(found, dict)
    return found["choices"][0]["message"]["content"]


def test_what_is_said_between_machines_shows_neither_prompt_nor_answer_nor_hidden_states(rig, tmp_path):
    """Every packet is looked at: nothing of the request is in it, and what there is cannot be compressed."""
    packets: list[bytes] = []
    with head(rig, *BOTH, state=tmp_path / "desk") as server:
        token = server.wait_for(r"tllm join \S+ --token (\S+)")[1]
        rig.listen_in(packets.append)
        with join(rig, f"{rig.address('desk')}:25001", "--token", token, state=tmp_path / "attic"):
            server.wait_for(r"API\s+http")
            assert stages(rig) == {"desk": 1, "attic": 1}
            text = answer(rig, f"Say {SECRET}.")
            rig.listen_in(None)
    said = b"".join(packets)
    assert len(said) > 100_000
    secret = token.partition(".")[2]
    for word in (SECRET, secret, KEY, text[:20], "tllm-demo", "num_hidden_layers"):
        assert word.encode() not in said, word
    # Hidden states are mostly numbers near zero, whose exponents repeat; cipher text has every byte alike.
    payload = b"".join(packet[60:] for packet in packets if len(packet) > 1000)
    shares = [payload.count(bytes([byte])) / len(payload) for byte in range(256)]
    assert max(shares) < 3 / 256
    assert min(shares) > 1 / 3 / 256


def test_a_machine_finds_the_head_by_itself_where_multicast_works(rig, tmp_path):
    with head(rig, "--no-local", "--cluster", "attic-club", state=tmp_path / "desk") as server:
        token = server.wait_for(r"tllm join \S+ --token (\S+)")[1]
        with join(rig, "--token", token, "--cluster", "somebody-else", state=tmp_path / "other") as stranger:
            assert stranger.process.wait(timeout=START_S) == 1
            assert stranger.wait_for("No head of cluster somebody-else answered")
        with join(rig, "--token", token, "--cluster", "attic-club", state=tmp_path / "attic") as joined:
            joined.wait_for(rf"Joined {re.escape(rig.address('desk'))}:25001")
            server.wait_for(r"API\s+http")
            assert answer(rig, "What is a layer?")


def test_a_cable_that_is_pulled_costs_a_pause_and_one_that_is_put_back_brings_the_node_back(rig, tmp_path):
    """No reset comes from a machine whose cable is out: connections are half open until somebody misses the other."""
    with head(rig, *BOTH, state=tmp_path / "desk") as server:
        token = server.wait_for(r"tllm join \S+ --token (\S+)")[1]
        with join(rig, f"{rig.address('desk')}:25001", "--token", token, state=tmp_path / "attic"):
            server.wait_for(r"API\s+http")
            body = request("tell me", max_tokens=100)

            def ask(strike: Callable[[], None] | None) -> Stream:
                stream = Stream()

                def struck(client: httpx.Client) -> None:
                    del client
                    follow(f"http://{rig.address('desk')}:8022", body, stream, key=KEY)

                if strike is None:
                    in_desk(rig, struck)
                    return stream
                with ThreadPoolExecutor(max_workers=1) as thread:
                    following = thread.submit(in_desk, rig, struck)
                    in_decode(strike)([stream])
                    following.result()
                return stream

            expected = ask(None)
            assert expected.done, expected.error
            found = ask(lambda: rig.edge("desk", "attic").set(up=False))
            assert found.error is None
            assert found.text == expected.text
            assert stages(rig).get("attic", 0) == 0
            rig.heal()
            poll(lambda: stages(rig).get("attic") == 1, deadline_s=START_S, what="the node has a part again")
            assert ask(None).text == expected.text


def test_a_head_that_others_can_reach_wants_a_key(rig, tmp_path, monkeypatch):
    monkeypatch.delenv("TLLM_API_KEY", raising=False)
    with tllm(
        *("serve", "--host", rig.address("desk")), before=rig.command("desk"), XDG_STATE_HOME=str(tmp_path)
    ) as command:
        assert command.process.wait(timeout=30) == 1
        command.wait_for("--api-key")
    assert "Traceback" not in "".join(command.lines)
