"""Every refusal: its status, its shape, the field it names, and what it tells a client to do."""

from __future__ import annotations

import inspect
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from tests.api.fake_deployment import FakeDeployment
from tests.api.serving import Server
from tllm.api.errors import reply_for
from tllm.api.state import Limits
from tllm.cluster.deployment import DeploymentState
from tllm.core import errors
from tllm.core.errors import QueueFullError, RequestError, TllmError, UnavailableError

HELLO = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "fake", "prompt": "Hi"}


def refused(response: httpx.Response, status: int, kind: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == kind
    if status in (400, 401, 403, 404, 405, 413):
        assert response.headers["x-should-retry"] == "false"
    return body["error"]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 51}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 4}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0]",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"model": 4}, "model"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "a"}, "seed"),
        ({"stop": 4}, "stop"),
        ({"stop": ["a", 4]}, "stop[1]"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 5000}, "stop"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ({"allowed_token_ids": [1] * 1025}, "allowed_token_ids"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [999]}, "allowed_token_ids"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": False, "stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"guided_regex": "a*"}, "guided_regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"request_id": "a b"}, "request_id"),
        ({"priority": 2**40}, "priority"),
    ],
)
def test_a_wrong_chat_parameter_is_a_400_that_names_it(client: httpx.Client, extra: dict, param: str) -> None:
    error = refused(client.post("/v1/chat/completions", json={**HELLO, **extra}), 400, "invalid_request_error")
    assert error["param"] == param
    assert param.split("[")[0].split(".")[0] in error["message"].replace(" ", "_") or param == "messages"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 4}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 101}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"prompt_embeds": "abc"}, "prompt_embeds"),
    ],
)
def test_a_wrong_completion_parameter_is_a_400_that_names_it(client: httpx.Client, extra: dict, param: str) -> None:
    error = refused(client.post("/v1/completions", json={**TEXT, **extra}), 400, "invalid_request_error")
    assert error["param"] == param


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "prediction": {"type": "content"}},
        {"verbosity": "low", "web_search_options": {}, "prompt_cache_key": "x", "safety_identifier": "y"},
        {"nobody_knows_this": [{"a": None}]},
        {"tools": [], "tool_choice": "auto", "functions": [], "function_call": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "chat_template": None},
        {
            "best_of": 1,
            "suffix": None,
            "bad_words": [],
            "length_penalty": 1,
            "guided_json": None,
            "use_beam_search": False,
        },
        {"stream_options": None, "stop": None, "stop_token_ids": None, "logit_bias": None, "n": None, "seed": None},
        {"stop": [], "top_logprobs": 0, "max_tokens": 10.0, "top_p": 0, "include_reasoning": False},
    ],
)
def test_what_asks_for_nothing_passes(client: httpx.Client, extra: dict) -> None:
    assert client.post("/v1/chat/completions", json={**HELLO, **extra}).status_code == 200


def test_an_ignored_field_is_logged_once(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="tllm.api"):
        for _ in range(3):
            client.post("/v1/chat/completions", json={**HELLO, "strange_option": "secret value"})
    lines = [record.getMessage() for record in caplog.records if "strange_option" in record.getMessage()]
    assert len(lines) == 1
    assert "secret value" not in caplog.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b"4", b'"x"', b"\xff", b"[" * 100_000, b'{"messages":' * 1000, b'{"a":1}{']
)
def test_a_body_that_is_no_json_object_is_a_400(client: httpx.Client, body: bytes) -> None:
    error = refused(client.post("/v1/chat/completions", content=body), 400, "invalid_request_error")
    assert error["code"] == "invalid_json"


def test_the_content_type_does_not_matter(client: httpx.Client) -> None:
    body = b'{"messages":[{"role":"user","content":"Hi"}]}'
    for content_type in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
        response = client.post("/v1/chat/completions", content=body, headers={"content-type": content_type})
        assert response.status_code == 200


def test_a_prompt_beyond_the_context_says_so_in_the_known_words(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 300}]}
    error = refused(client.post("/v1/chat/completions", json=body), 400, "invalid_request_error")
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in error["message"]
    assert error["param"] == "messages"


def test_an_unknown_model_is_a_404_with_the_names_there_are(client: httpx.Client) -> None:
    for response in (
        client.post("/v1/chat/completions", json={**HELLO, "model": "gpt-9"}),
        client.post("/v1/completions", json={**TEXT, "model": "gpt-9"}),
        client.get("/v1/models/gpt-9"),
    ):
        error = refused(response, 404, "not_found_error")
        assert error["code"] == "model_not_found"
        assert "'org/fake-model'" in error["message"]


def test_unknown_routes_and_wrong_methods_have_the_same_shape(client: httpx.Client) -> None:
    refused(client.get("/v1/nothing"), 404, "not_found_error")
    refused(client.get("/docs"), 404, "not_found_error")
    refused(client.get("/redoc"), 404, "not_found_error")
    wrong = client.get("/v1/chat/completions")
    refused(wrong, 405, "invalid_request_error")
    assert wrong.headers["allow"] == "POST"
    refused(client.delete("/v1/models"), 405, "invalid_request_error")


def test_a_full_queue_is_a_429_within_a_tenth_of_a_second(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.refusal = QueueFullError(1024, 2.5)
    client.get("/live")
    started_s = time.perf_counter()
    response = client.post("/v1/chat/completions", json={**HELLO, "stream": True})
    assert time.perf_counter() - started_s < 0.1
    refused(response, 429, "rate_limit_error")
    assert response.headers["retry-after"] == "3"
    assert response.headers["retry-after-ms"] == "2500"
    assert "x-should-retry" not in response.headers


def test_choices_admitted_before_the_queue_was_full_are_freed(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.refusal, deployment.num_admitted = QueueFullError(1024, 1), 2
    refused(client.post("/v1/chat/completions", json={**HELLO, "n": 4}), 429, "rate_limit_error")
    assert deployment.num_cancelled == 2
    assert not deployment.running


@pytest.mark.parametrize("state", [DeploymentState.LOADING, DeploymentState.DEGRADED, DeploymentState.DRAINING])
def test_a_deployment_that_cannot_answer_is_a_503(
    client: httpx.Client, deployment: FakeDeployment, state: DeploymentState
) -> None:
    deployment.state = state
    for path, body in (("/v1/chat/completions", HELLO), ("/v1/completions", TEXT)):
        response = client.post(path, json=body)
        error = refused(response, 503, "unavailable_error")
        assert error["code"] == 503
        assert response.headers["retry-after"] == "5"
    if state is DeploymentState.LOADING:
        assert error["message"] == "Loading model"
    assert client.get("/v1/models").status_code == 200
    assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200
    assert client.get("/health").status_code == 503
    assert client.get("/ready").json()["error"]["code"] == 503
    assert client.get("/live").status_code == 200


def test_a_draining_server_takes_nothing_new(client: httpx.Client, server: Server) -> None:
    server.state.draining = True
    refused(client.post("/v1/chat/completions", json=HELLO), 503, "unavailable_error")
    assert client.get("/health").status_code == 503


def test_a_body_over_the_limit_is_a_413_with_and_without_a_length(client: httpx.Client) -> None:
    def chunks(num_bytes: int):  # type: ignore[no-untyped-def]
        for _ in range(num_bytes // 1000):
            yield b" " * 1000

    for body in (b" " * 200_001, chunks(201_000), b" " * 4_000_000, chunks(4_000_000)):
        error = refused(client.post("/v1/chat/completions", content=body), 413, "invalid_request_error")
        assert "200000 bytes" in error["message"]
    assert client.post("/v1/chat/completions", json=HELLO).status_code == 200


def test_an_endless_body_is_answered_and_cut_off(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        num_sent = 0
        try:
            while num_sent < 100_000_000:
                connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
                num_sent += 0x10000
        except OSError:
            pass
        assert num_sent < 100_000_000


def test_a_body_that_does_not_come_is_a_408(serve: Callable[..., httpx.Client]) -> None:
    client = serve(limits=Limits(body_timeout_s=0.1))
    host, port = str(client.base_url).removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_deadline_ends_whole_answers_and_streams(
    serve: Callable[..., httpx.Client], new_deployment: FakeDeployment
) -> None:
    new_deployment.say("x" * 200, token_s=0.05)
    client = serve(limits=Limits(deadline_s=0.2))
    error = refused(client.post("/v1/chat/completions", json=HELLO), 504, "server_error")
    assert error["code"] == "deadline_exceeded"
    text = client.post("/v1/chat/completions", json={**HELLO, "stream": True}).text
    assert "deadline_exceeded" in text
    assert "[DONE]" not in text
    assert not new_deployment.running


def test_a_model_without_a_template_points_to_completions(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.template = None
    error = refused(client.post("/v1/chat/completions", json=HELLO), 400, "invalid_request_error")
    assert "/v1/completions" in error["message"]


def test_with_several_models_a_request_must_name_one(
    serve: Callable[..., httpx.Client], new_deployment: FakeDeployment
) -> None:
    other = FakeDeployment(tokenizer=new_deployment.tokenizer, names=("other",))
    client = serve(deployments={"fake": new_deployment, "other": other})
    error = refused(client.post("/v1/completions", json={"prompt": "x"}), 400, "invalid_request_error")
    assert error["param"] == "model"
    assert client.post("/v1/completions", json={"prompt": "x", "model": "other"}).json()["model"] == "other"


def test_without_any_model_the_server_says_that_it_loads(serve: Callable[..., httpx.Client]) -> None:
    client = serve(deployments={})
    refused(client.post("/v1/completions", json=TEXT), 503, "unavailable_error")
    assert client.get("/v1/models").json() == {"object": "list", "data": []}
    assert client.get("/health").status_code == 503


def _tree(root: type[TllmError]) -> list[type[TllmError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


def test_every_error_of_the_tree_has_a_reply() -> None:
    made = []
    for kind in _tree(TllmError):
        if kind.__module__ != errors.__name__ and not issubclass(kind, RequestError):
            continue
        parameters = inspect.signature(kind.__init__).parameters
        given = {"num_tokens": 9, "max_model_len": 8, "num_waiting": 3, "retry_after_s": 1.0, "name": "x"}
        given |= {"available": ("y",), "state": "loading"}
        known = {name: given[name] for name in parameters if name in given}
        error = kind(**known) if "message" not in parameters and known else kind("What went wrong.", **known)
        reply = reply_for(error)
        assert 400 <= reply.status < 600
        assert reply.message == str(error)
        made.append(kind)
    assert {UnavailableError, QueueFullError, TllmError} <= set(made)
