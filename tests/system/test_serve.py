"""A head and two workers as real processes: right answers, and nothing left behind whatever happens to requests."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Callable

import httpx
import openai
import psutil
import pytest

from tests.system.processes import Server, alive, poll, repository, serve, tllm
from tllm.core.config import state_directory
from tllm.transport.tokens import JoinToken
from tllm.transport.trust import Authority

JOIN_LINE = r"tllm join \S+:(\d+)"
GOLDEN = json.loads((repository() / "src/tllm/demo/golden.json").read_text())


def body(question: str, **options: object) -> dict[str, object]:
    return {"model": "tllm-demo", "messages": [{"role": "user", "content": question}], "temperature": 0, **options}


def quiet(server: Server) -> bool:
    return server.metric("kv_cache_usage_perc") == 0 and server.metric("num_requests_running") == 0


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["question"])
def test_two_workers_give_the_pinned_answers(server, golden):
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body(golden["question"]), timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == golden["answer"]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_the_head_never_loads_torch_and_each_worker_holds_its_own_layers(server):
    rows = [line for line in server.lines if line.startswith("│")]
    assert len(rows) == len(server.workers()) == 2, server.output
    maps = f"/proc/{server.process.pid}/maps"
    with open(maps) as file:
        assert "libtorch" not in file.read()
    for worker in server.workers():
        with open(f"/proc/{worker.pid}/maps") as file:
            assert "libtorch" in file.read()


def test_sixty_four_clients_all_progress(server):
    async def one(client: httpx.AsyncClient, number: int) -> str:
        question = GOLDEN[number % len(GOLDEN)]["question"]
        answer = await client.post(f"{server.url}/v1/chat/completions", json=body(question))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    async def all_of_them() -> list[str]:
        async with httpx.AsyncClient(timeout=90, limits=httpx.Limits(max_connections=64)) as client:
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    answers = asyncio.run(all_of_them())
    assert answers == [GOLDEN[number % len(GOLDEN)]["answer"] for number in range(64)]
    poll(lambda: quiet(server), deadline_s=5, what="all blocks free")


def test_a_mass_abort_neither_freezes_nor_leaks(server):
    async def start_and_leave(client: httpx.AsyncClient, number: int) -> None:
        request = body(f"question {number}", stream=True, ignore_eos=True, max_tokens=400)
        async with client.stream("POST", f"{server.url}/v1/chat/completions", json=request) as response:
            async for line in response.aiter_lines():
                if '"content"' in line:
                    return  # leaving the context closes the connection in mid-answer

    async def all_at_once() -> None:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=48)) as client:
            await asyncio.gather(*(start_and_leave(client, number) for number in range(48)))

    asyncio.run(all_at_once())
    poll(lambda: quiet(server), deadline_s=5, what="all blocks free after the mass abort")
    assert server.metric("num_requests_waiting") == 0
    golden = GOLDEN[0]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body(golden["question"]), timeout=20).json()
    assert answer["choices"][0]["message"]["content"] == golden["answer"]


def test_a_client_that_disconnects_frees_its_blocks_at_once(server):
    request = body("tell me", stream=True, ignore_eos=True, max_tokens=1500)
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=request) as response,
    ):
        lines = response.iter_lines()
        for line in lines:
            if '"content":"' in line and '"content":""' not in line:
                break
        assert server.metric("num_requests_running") == 1
    left_s = time.monotonic()
    poll(lambda: quiet(server), deadline_s=2, what="blocks of the disconnected client free")
    assert time.monotonic() - left_s < 2
    steps = server.metric("steps_total")
    window = threading.Event()
    window.wait(0.3)
    assert server.metric("steps_total") == steps, "stages still compute for a client that is gone"


def test_a_slow_reader_slows_nobody_and_loses_nothing(server):
    """One stream is read at 100 ms a frame while others run to their end at full speed."""
    golden = GOLDEN[0]
    slow_text: list[str] = []

    def read_slowly() -> None:
        pause = threading.Event()
        with (
            httpx.Client(timeout=60) as client,
            client.stream(
                "POST", f"{server.url}/v1/chat/completions", json=body(golden["question"], stream=True)
            ) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    slow_text.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
                    pause.wait(0.1)

    def fast() -> float:
        began = time.monotonic()
        for golden in GOLDEN[1:4]:
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body(golden["question"]), timeout=30)
            assert answer.json()["choices"][0]["message"]["content"] == golden["answer"]
        return time.monotonic() - began

    alone_s = fast()
    reader = threading.Thread(target=read_slowly)
    reader.start()
    beside_s = fast()
    reader.join(timeout=60)
    assert "".join(slow_text) == golden["answer"]
    # Not a benchmark: a reader that held the others up would cost a tenth of a second for every one of their tokens.
    assert beside_s < alone_s + 0.1 * 20


def test_an_idle_server_rests(server):
    """Head and workers together use less than 2 % of a core each while nobody asks anything."""
    poll(lambda: quiet(server), deadline_s=10, what="nothing running")
    family = server.family()
    before = [sum(process.cpu_times()[:2]) for process in family]
    window = threading.Event()
    window.wait(4)
    used = [sum(process.cpu_times()[:2]) - start for process, start in zip(family, before, strict=True)]
    assert all(seconds / 4 < 0.02 for seconds in used), dict(zip((p.name() for p in family), used, strict=True))


def test_openai_python_streams_and_maps_errors(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    golden = GOLDEN[0]
    stream = client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": golden["question"]}], temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == golden["answer"]
    assert [model.id for model in client.models.list()] == [server.model]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=server.model, messages=[{"role": "user", "content": "hi"}], temperature=9)


def test_ctrl_c_ends_everything_with_status_0():
    with serve("--workers", "2") as server:
        family = [process.pid for process in server.family()]
        assert len(family) == 3
        assert server.interrupt() == 0
        poll(lambda: not alive(family), deadline_s=5, what="every process gone")


def test_a_killed_head_takes_its_workers_with_it():
    with serve("--workers", "2") as server:
        workers = [process.pid for process in server.workers()]
        server.process.kill()
        poll(lambda: not alive(workers), deadline_s=10, what="workers gone with their agent")


LONG = {"stream": True, "ignore_eos": True, "max_tokens": 300}


@pytest.mark.parametrize("which", [0, 1], ids=["first", "last"])
def test_a_killed_worker_pauses_a_stream_that_then_goes_on_token_exact(which):
    request = body("tell me", **LONG)
    with serve("--workers", "2") as server:
        undisturbed = _text(server, request)
        assert _text_struck(server, request, lambda: server.workers()[which].kill()) == undisturbed
        assert server.metric("epoch") == 2
        poll(lambda: quiet(server), deadline_s=5, what="all blocks free")
        assert len(server.workers()) == 2


def test_a_machine_that_vanishes_pauses_a_stream_that_goes_on_with_those_that_are_left():
    request = body("tell me", **LONG)
    with tllm("serve", "--port", "0", "--grpc-port", "0", "--nodes", "2", "--use-all", kind=Server) as server:
        port = server.wait_for(JOIN_LINE)[1]
        with tllm("join", f"127.0.0.1:{port}", "--name", "other") as joined:

            def strike() -> None:
                for process in joined.family():
                    process.kill()

            undisturbed = _text(server, request)
            assert _text_struck(server, request, strike) == undisturbed


def _text_struck(server: Server, request: dict[str, object], strike: Callable[[], None]) -> str:
    """The text of a stream in the middle of which `strike` is called, once; no frame is an error."""
    text, struck = "", False
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=request) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("data: {"):
                assert "error" not in json.loads(line[6:]), line
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if len(text) > 40 and not struck:
                struck = True
                strike()
    assert struck
    return text


def _text(server: Server, request: dict[str, object]) -> str:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**request, "stream": False}, timeout=60).json()
    return answer["choices"][0]["message"]["content"]


def test_without_any_node_left_streams_end_with_an_error_and_new_requests_are_refused_until_one_returns():
    with tllm("serve", "--port", "0", "--grpc-port", "0", "--no-local", "--nodes", "1", kind=Server) as server:
        port = server.wait_for(JOIN_LINE)[1]
        with tllm("join", f"127.0.0.1:{port}") as joined:
            request = body("tell me", stream=True, ignore_eos=True, max_tokens=1500)
            with (
                httpx.Client(timeout=30) as client,
                client.stream("POST", f"{server.url}/v1/chat/completions", json=request) as response,
            ):
                lines = response.iter_lines()
                for line in lines:
                    if '"content":"' in line and '"content":""' not in line:
                        break
                for process in joined.family():
                    process.kill()
                rest = list(lines)
            assert any('"error"' in line for line in rest)
            assert "data: [DONE]" not in rest
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=body("hi"))
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        with tllm("join", f"127.0.0.1:{port}"):
            poll(
                lambda: httpx.get(f"{server.url}/health").status_code == 200,
                deadline_s=30,
                what="service with the node that returned",
            )
            assert _text(server, body(GOLDEN[0]["question"])) == GOLDEN[0]["answer"]


def test_a_machine_that_joins_serves_for_a_head_without_layers():
    with tllm("serve", "--port", "0", "--grpc-port", "0", "--no-local", "--nodes", "1") as head:
        port = head.wait_for(JOIN_LINE)[1]
        with tllm("join", f"127.0.0.1:{port}", "--name", "other", "--workers", "2") as joined:
            joined.wait_for("Joined")
            url = head.wait_for(r"API\s+(http://\S+)/v1")[1]
            golden = GOLDEN[0]
            answer = httpx.post(f"{url}/v1/chat/completions", json=body(golden["question"]), timeout=30).json()
            assert answer["choices"][0]["message"]["content"] == golden["answer"]
            assert head.wait_for(r"│\s*other\s+│ 0\.\.")
            assert joined.interrupt() == 0


def test_a_wrong_token_is_refused_with_a_reason():
    with tllm("serve", "--port", "0", "--grpc-port", "0", "--no-local") as head:
        port = head.wait_for(JOIN_LINE)[1]
        wrong = JoinToken(token_id="0" * 8, secret=bytes(16), pin=Authority.open(state_directory() / "cluster").pin)
        for token, words in (("wrong", "the join token is not one"), (wrong.text, "token")):
            with tllm("join", f"127.0.0.1:{port}", "--token", token) as joined:
                assert joined.process.wait(timeout=30) == 1
                joined.wait_for(words)
                assert wrong.text not in joined.output
                assert "Traceback" not in joined.output


def test_a_missing_model_is_one_screen_of_what_why_and_what_to_do():
    with tllm("serve", "/nowhere/at-all") as command:
        assert command.process.wait(timeout=30) == 1
        command.wait_for("/nowhere/at-all")
        assert "Traceback" not in command.output
        assert len(command.lines) < 10


def test_the_demo_answers_and_ends_by_itself():
    with tllm("demo") as command:
        assert command.process.wait(timeout=60) == 0
        text = command.output
    assert GOLDEN[0]["answer"].split(".")[0] in text.replace("\n", " ")
    assert "TTFT" in text
    assert "tokens/s" in text
    assert "worker 1" in text
    assert "worker 2" in text


def test_a_node_on_another_machine_is_reached_over_tcp():
    """Another host name makes another machine, as far as tllm can tell: no Unix sockets are shared with it."""
    elsewhere = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"]
    if subprocess.run([*elsewhere, "true"], capture_output=True).returncode != 0:
        pytest.skip("a host name of its own needs unshare and the right to use it")
    with tllm("serve", "--port", "0", "--grpc-port", "0", "--nodes", "2", "--use-all", kind=Server) as server:
        port = server.wait_for(JOIN_LINE)[1]
        with tllm("join", f"127.0.0.1:{port}", before=elsewhere) as joined:
            assert _text(server, body(GOLDEN[0]["question"])) == GOLDEN[0]["answer"]
            assert server.wait_for(r"│\s*elsewhere\s+│ [0-9]")
            (worker,) = joined.workers()
            listening = [c for c in worker.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            established = [c for c in worker.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
            assert len(listening) == 1
            assert len(established) == 2  # steps in, results home
