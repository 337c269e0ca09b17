"""Traces over HTTP: which request is meant, who may see it, and why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from tests.api.fake_cluster import FakeCluster
from tests.api.fake_deployment import FakeDeployment
from tllm.api.state import ApiState
from tllm.api.traced import MAX_REQUESTS, TracedRequests
from tllm.core.types import StepId

Serve = Callable[..., httpx.Client]
CHAT = {"messages": [{"role": "user", "content": "the secret word is xylophone"}], "max_tokens": 4}
TRACED = {"x-tllm-trace": "1"}


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def client(serve: Serve, cluster: FakeCluster) -> httpx.Client:
    return serve(cluster=cluster)


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/completions", {"prompt": "xylophone", "max_tokens": 4}),
    ],
)
def test_a_request_with_the_header_is_told_where_its_trace_is(client, path, body):
    answer = client.post(path, json=body, headers=TRACED)
    assert answer.status_code == 200
    place = answer.headers["x-tllm-trace"]
    assert place == f"/tllm/v1/traces/{answer.headers['x-request-id']}"
    trace = client.get(place)
    assert trace.status_code == 200, trace.text
    [account] = trace.json()["tllm"]["accounts"]
    assert account["recorded_s"] == pytest.approx(account["wall_s"])
    own_id = json.loads(answer.text.removeprefix("data: ").splitlines()[0])["id"]
    assert client.get(f"/tllm/v1/traces/{own_id}").json()["tllm"] == trace.json()["tllm"]


def test_a_trace_covers_the_request_from_its_arrival_to_its_end(client, cluster, new_deployment: FakeDeployment):
    new_deployment.say("Hello, world!", first_token_s=0.05)
    answer = client.post("/v1/chat/completions", json=CHAT, headers=TRACED)
    found = client.get(answer.headers["x-tllm-trace"]).json()["tllm"]
    [(began_s, ended_s)] = cluster.asked
    assert (began_s, ended_s) == (found["began_s"], found["ended_s"])
    assert 0.05 <= ended_s - began_s <= answer.elapsed.total_seconds()


def test_every_choice_has_its_own_path(client):
    answer = client.post("/v1/chat/completions", json={**CHAT, "n": 3}, headers=TRACED)
    accounts = client.get(answer.headers["x-tllm-trace"]).json()["tllm"]["accounts"]
    assert [account["title"].rpartition(", ")[2] for account in accounts] == ["choice 0", "choice 1", "choice 2"]


def test_nothing_that_was_said_is_in_a_trace(client):
    answer = client.post("/v1/chat/completions", json=CHAT, headers=TRACED)
    text = client.get(answer.headers["x-tllm-trace"]).text
    assert "xylophone" not in text
    assert answer.json()["choices"][0]["message"]["content"][:4] not in text


def test_an_id_with_a_slash_is_found_where_the_header_says(client):
    answer = client.post("/v1/chat/completions", json=CHAT, headers={**TRACED, "x-request-id": "a/b?c"})
    assert client.get(answer.headers["x-tllm-trace"]).status_code == 200


@pytest.mark.parametrize("header", [{}, {"x-tllm-trace": "0"}, {"x-tllm-trace": ""}])
def test_a_request_without_the_header_is_not_kept(client, header):
    answer = client.post("/v1/chat/completions", json=CHAT, headers=header)
    assert "x-tllm-trace" not in answer.headers
    response = client.get(f"/tllm/v1/traces/{answer.headers['x-request-id']}")
    assert refusal(response) == (404, "trace_not_found")
    assert "X-Tllm-Trace: 1" in response.text


def test_what_makes_no_answer_promises_no_trace(client):
    assert "x-tllm-trace" not in client.get("/v1/models", headers=TRACED).headers
    assert "x-tllm-trace" not in client.post("/v1/chat/completions", json={}, headers=TRACED).headers


def test_a_trace_whose_steps_were_overwritten_is_a_404_that_says_so(client, cluster):
    answer = client.post("/v1/chat/completions", json=CHAT, headers=TRACED)
    cluster.step = StepId(5000)
    response = client.get(answer.headers["x-tllm-trace"])
    assert refusal(response) == (404, "trace_overwritten")
    assert "overwritten by later steps" in response.text


def test_a_request_that_is_still_answered_has_no_trace_yet(client, new_deployment: FakeDeployment):
    new_deployment.say("a long story" * 20, token_s=0.02)
    body = {**CHAT, "max_tokens": 200, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body, headers=TRACED) as answer:
        lines = answer.iter_lines()  # kept: an iterator that is dropped closes the connection
        next(lines)
        url = str(client.base_url.join(answer.headers["x-tllm-trace"]))
        assert refusal(httpx.get(url)) == (409, "request_running")


def test_a_client_that_leaves_ends_its_request(client, new_deployment: FakeDeployment):
    new_deployment.say("a long story" * 20, token_s=0.02)
    body = {**CHAT, "max_tokens": 200, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body, headers=TRACED) as answer:
        next(answer.iter_lines())
        place = answer.headers["x-tllm-trace"]
    while (response := client.get(place)).status_code == 409:  # bounded by the test's own timeout
        pass
    assert response.status_code == 200


def test_a_window_lasts_as_long_as_was_asked_for(client, cluster):
    response = client.get("/tllm/v1/trace?seconds=0.05")
    assert response.status_code == 200
    [(began_s, ended_s)] = cluster.asked
    assert ended_s - began_s >= 0.05
    found = response.json()
    assert found["tllm"]["num_steps"] == 1
    assert found["tllm"]["clocks"] == [
        {
            "place": "mini layers 0..3",
            "is_shared": False,
            "offset_s": 1000.0,
            "error_s": pytest.approx(0.00012 + 50e-6 * ended_s),
        }
    ]
    assert {event["ph"] for event in found["traceEvents"]} == {"M", "X", "s", "t", "f"}


@pytest.mark.parametrize("seconds", ["0", "-1", "61", "nan", "inf", "soon", ""])
def test_a_window_that_is_none_is_refused(client, cluster, seconds):
    response = client.get(f"/tllm/v1/trace?seconds={seconds}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "seconds"
    assert not cluster.asked


@pytest.mark.parametrize("path", ["/tllm/v1/trace?seconds=0.01", "/tllm/v1/traces/x"])
def test_traces_need_the_key_and_a_cluster(serve: Serve, cluster: FakeCluster, path: str):
    closed = serve(cluster=cluster, api_keys=("k",))
    assert closed.get(path).status_code == 401
    assert not cluster.asked
    assert refusal(serve().get(path)) == (404, "no_cluster")


def test_the_oldest_of_too_many_requests_is_forgotten():
    requests = TracedRequests()
    for number in range(MAX_REQUESTS + 1):
        requests.call(requests.begin(f"r{number}", 0.0, []), f"answer{number}")
    assert requests.find("r0") is None
    assert requests.find("answer0") is None
    assert requests.find("answer1") is requests.find("r1") is not None
    again = requests.begin("r1", 5.0, [])
    assert requests.find("r1") is again


def test_a_refused_request_leaves_nothing_behind(serve: Serve, cluster: FakeCluster, new_deployment: FakeDeployment):
    new_deployment.max_model_len = 2
    client = serve(cluster=cluster)
    answer = client.post("/v1/chat/completions", json=CHAT, headers={**TRACED, "x-request-id": "r"})
    assert answer.status_code == 400
    assert refusal(client.get("/tllm/v1/traces/r")) == (404, "trace_not_found")


def test_states_of_their_own_have_records_of_their_own():
    first, second = (ApiState(version="1", deployments={}) for _ in range(2))
    assert first.traced is not second.traced
