"""Chat completions as they stand on the wire."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import httpx
import pytest

from tests.api.fake_deployment import END, FakeDeployment, Script
from tests.api.serving import wait_until
from tllm.core.errors import GenerationError, UnavailableError

HELLO = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}


def frames(text: str) -> list[str]:
    assert text.endswith("\n\n")
    return [frame for frame in text[:-2].split("\n\n") if frame != ": ping"]


def events(text: str) -> list[dict]:
    parts = frames(text)
    assert all(part.startswith("data: ") for part in parts)
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part[6:]) for part in parts[:-1]]


def content(chunks: list[dict], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def test_an_answer_has_every_field_of_openai_and_nothing_empty(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=HELLO)
    assert response.status_code == 200
    answer = response.json()
    timings = answer.pop("timings")
    assert re.fullmatch(r"chatcmpl-[0-9a-f]+", answer.pop("id"))
    assert isinstance(answer.pop("created"), int)
    assert (
        answer
        == {
            "object": "chat.completion",
            "model": "fake",
            "system_fingerprint": "tllm-1.2.3",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                    "stop_reason": None,
                }
            ],
            "usage": {
                "prompt_tokens": 21,  # <|bos|><user>Hi<|end|><assistant>: a token for each byte and special token
                "completion_tokens": 14,  # thirteen bytes and the end
                "total_tokens": 35,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }
        or answer["usage"]["prompt_tokens"] == 21
    )
    assert timings["predicted_n"] == 14
    assert timings["predicted_per_second"] == pytest.approx(13 / 0.010)


def test_stream_frames_are_exact(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("Hé")
    response = client.post("/v1/chat/completions", json={**HELLO, "stream": True, "request_id": "me"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    chunks = events(response.text)
    created = chunks[0]["created"]
    head = (
        f'{{"id":"chatcmpl-me","object":"chat.completion.chunk","created":{created},"model":"fake",'
        '"system_fingerprint":"tllm-1.2.3","choices":['
    )
    exact = frames(response.text)
    plain = '"logprobs":null,"finish_reason":null}]}'
    assert exact[0] == f'data: {head}{{"index":0,"delta":{{"role":"assistant","content":""}},{plain}'
    assert exact[1] == f'data: {head}{{"index":0,"delta":{{"content":"H"}},{plain}'
    assert exact[2] == f'data: {head}{{"index":0,"delta":{{"content":"é"}},{plain}'
    end = '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}]'
    assert exact[3].startswith(f'data: {head}{end},"timings":{{')
    assert exact[4] == "data: [DONE]"
    assert len(exact) == 5
    assert all("usage" not in chunk for chunk in chunks)


def test_a_usage_frame_comes_only_when_asked_for(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.num_cached_tokens = 4
    chunks = events(
        client.post(
            "/v1/chat/completions", json={**HELLO, "stream": True, "stream_options": {"include_usage": True}}
        ).text
    )
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 14
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert chunks[-1]["timings"]["cache_n"] == 4
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in chunk and "timings" not in chunk for chunk in chunks[:-1])


def test_continuous_usage_is_on_every_frame_and_counts_up(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(client.post("/v1/chat/completions", json={**HELLO, "stream": True, "stream_options": options}).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 14


def test_a_stop_string_across_tokens_is_never_shown_and_frees_at_once(
    client: httpx.Client, deployment: FakeDeployment
) -> None:
    deployment.say("one END two", burst=3)
    body = {**HELLO, "stop": ["END", "nothing"]}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == "END"
    assert answer["usage"]["completion_tokens"] == 7
    assert deployment.num_cancelled == 1
    assert not deployment.running
    chunks = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    assert content(chunks) == "one "
    assert chunks[-1]["choices"][0]["stop_reason"] == "END"


def test_a_stop_string_is_shown_when_asked_for(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("one END two")
    body = {**HELLO, "stop": "END", "include_stop_str_in_output": True}
    assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == "one END"


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(
    client: httpx.Client, deployment: FakeDeployment
) -> None:
    deployment.say("the EN")
    for stream in (False, True):
        response = client.post("/v1/chat/completions", json={**HELLO, "stop": "END", "stream": stream})
        text = content(events(response.text)) if stream else response.json()["choices"][0]["message"]["content"]
        assert text == "the EN"


def test_a_stop_token_of_the_request_is_named_but_not_shown(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("abc;def")
    stop_id = deployment.ids(";")[0]
    choice = client.post("/v1/chat/completions", json={**HELLO, "stop_token_ids": [stop_id]}).json()["choices"][0]
    assert choice["message"]["content"] == "abc"
    assert choice["stop_reason"] == stop_id
    assert choice["finish_reason"] == "stop"


def test_half_a_character_never_comes_out_of_a_stream(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("a😀b多c")
    chunks = events(client.post("/v1/chat/completions", json={**HELLO, "stream": True}).text)
    deltas = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert deltas == ["", "a", "😀", "b", "多", "c", None]


def test_choices_are_interleaved_and_each_ends_once(client: httpx.Client, deployment: FakeDeployment) -> None:
    seeds = []

    def script(request: object) -> Script:
        seeds.append(request.params.seed)  # type: ignore[attr-defined]
        return Script(tokens=deployment.ids(f"choice {len(seeds)}"))

    deployment.script = script  # type: ignore[assignment]
    chunks = events(client.post("/v1/chat/completions", json={**HELLO, "stream": True, "n": 3, "seed": 5}).text)
    assert seeds == [5, 6, 7]
    assert [content(chunks, index) for index in range(3)] == ["choice 1", "choice 2", "choice 3"]
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order)
    ends = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(chunk["choices"][0]["index"] for chunk in ends) == [0, 1, 2]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    answer = client.post("/v1/chat/completions", json={**HELLO, "n": 3}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3 * 9
    assert len({request.params.seed for request in deployment.submitted[3:]}) == 3


def test_unset_seeds_differ_between_requests(client: httpx.Client, deployment: FakeDeployment) -> None:
    for _ in range(2):
        client.post("/v1/chat/completions", json=HELLO)
    assert len({request.params.seed for request in deployment.submitted}) == 2


def test_the_operator_can_set_the_seed_of_requests_that_bring_none(
    serve: Callable[..., httpx.Client], new_deployment: FakeDeployment
) -> None:
    client = serve(default_seed=42)
    for extra in ({}, {"n": 2}, {"seed": 0}):
        client.post("/v1/chat/completions", json={**HELLO, **extra})
    assert [request.params.seed for request in new_deployment.submitted] == [42, 42, 43, 0]


def test_logprobs_follow_the_text_in_both_modes(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("aé END")
    body = {**HELLO, "logprobs": True, "top_logprobs": 2, "stop": " END"}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert whole["message"]["content"] == "aé"
    entries = whole["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "aé"
    assert [len(entry["top_logprobs"]) for entry in entries] == [2, 2, 2]
    assert entries[0]["top_logprobs"][0] == {"token": "a", "logprob": -0.5, "bytes": [97]}
    chunks = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    streamed = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == entries


def test_the_end_token_has_a_logprob_but_no_text(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("ab")
    for stream in (False, True):
        response = client.post("/v1/chat/completions", json={**HELLO, "logprobs": True, "stream": stream})
        chunks = events(response.text) if stream else [response.json()]
        entries = [
            entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert [entry["token"] for entry in entries] == ["a", "b", END]
        assert entries[0]["top_logprobs"] == []


def test_parameters_arrive_as_they_were_sent(client: httpx.Client, deployment: FakeDeployment) -> None:
    body = {
        **HELLO,
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "logit_bias": {"3": -100, "4": 2.5}, "allowed_token_ids": [1, 2, 2], "seed": -1,
        "max_tokens": 9, "max_completion_tokens": 11, "min_tokens": 2, "stop_token_ids": [8], "logprobs": True,
        "top_logprobs": 3, "priority": -4, "cache_salt": "me",
    }  # fmt: skip
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    (request,) = deployment.submitted
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 7, 0.125)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert params.logit_bias == ((3, -100), (4, 2.5))
    assert params.allowed_ids == (1, 2)
    assert params.seed == 2**63 - 1
    assert (params.max_tokens, params.min_tokens, params.logprobs) == (11, 2, 3)
    assert params.stop_ids == (*deployment.end_ids, 8)
    assert (request.priority, request.salt, request.prompt_logprobs) == (-4, "me", None)


def test_defaults_are_the_models_then_openais(client: httpx.Client, deployment: FakeDeployment) -> None:
    client.post("/v1/chat/completions", json=HELLO)
    deployment.generation_defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    client.post("/v1/chat/completions", json={**HELLO, "temperature": 0, "top_k": -1})
    plain, modelled = (request.params for request in deployment.submitted)
    assert (plain.temperature, plain.top_k, plain.top_p, plain.logprobs) == (1.0, 0, 1.0, None)
    assert (modelled.temperature, modelled.top_k, modelled.top_p) == (0.0, 0, 0.95)
    assert plain.max_tokens == deployment.max_model_len - len(deployment.submitted[0].prompt)


def test_ignore_eos_leaves_only_the_stop_ids_of_the_request(client: httpx.Client, deployment: FakeDeployment) -> None:
    body = {**HELLO, "ignore_eos": True, "max_tokens": 40, "min_tokens": 40}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert deployment.submitted[0].params.stop_ids == ()
    assert answer["usage"]["completion_tokens"] == 40
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_limit_beyond_the_context_is_cut_to_it(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("x" * 1000)
    answer = client.post("/v1/chat/completions", json={**HELLO, "max_tokens": 100_000, "ignore_eos": True}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == deployment.max_model_len


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({}, "<|bos|><user>Hi<|end|><assistant>"),
        ({"add_generation_prompt": False}, "<|bos|><user>Hi"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<|bos|><user>Hi<|end|><assistant>[thinking=False]"),
        ({"reasoning_effort": "low"}, "<|bos|><user>Hi<|end|><assistant>[effort=low]"),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, "<|bos|><user>Hi<|end|><assistant>"),
        ({"truncate_prompt_tokens": 12}, "<|end|><assistant>"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "<|bos|><system>x<|end|><assistant>"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            "<|bos|><user>a\nb<|end|><assistant>",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "continue_final_message": True,
            },
            "<|bos|><user>a<|end|><assistant>b",
        ),
    ],
)
def test_the_prompt_is_what_the_template_makes_of_the_request(
    client: httpx.Client, deployment: FakeDeployment, extra: dict, prompt: str
) -> None:
    response = client.post("/v1/chat/completions", json={**HELLO, **extra})
    assert response.status_code == 200, response.text
    assert deployment.tokenizer.decode(deployment.submitted[0].prompt, skip_special_tokens=False) == prompt


def test_echo_repeats_what_the_assistant_had_begun(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("world")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Hello "}]
    body = {"messages": messages, "echo": True, "continue_final_message": True}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "Hello world"
    assert content(events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)) == "Hello world"


def test_token_ids_are_returned_when_asked_for(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("é")
    body = {**HELLO, "return_token_ids": True}
    answer = client.post("/v1/chat/completions", json=body).json()
    prompt = list(deployment.submitted[0].prompt)
    expected = [*deployment.ids("é"), deployment.end_ids[0]]
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == expected
    chunks = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    assert chunks[0]["prompt_token_ids"] == prompt
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == expected


def test_prompt_logprobs_have_vllms_shape(client: httpx.Client, deployment: FakeDeployment) -> None:
    answer = client.post("/v1/chat/completions", json={**HELLO, "prompt_logprobs": 1, "n": 2}).json()
    prompt = deployment.submitted[0].prompt
    assert len(answer["prompt_logprobs"]) == len(prompt)
    assert answer["prompt_logprobs"][0] is None
    assert answer["prompt_logprobs"][1] == {str(prompt[1]): {"logprob": -1.0, "rank": 1, "decoded_token": "<"}}
    assert [request.prompt_logprobs for request in deployment.submitted] == [1, None]


def test_a_failure_in_mid_stream_is_told_and_not_hidden(client: httpx.Client, deployment: FakeDeployment) -> None:
    error = GenerationError("Stage 2 was lost.")
    deployment.script = lambda request: Script(tokens=deployment.ids("abc"), error=error)
    response = client.post("/v1/chat/completions", json={**HELLO, "stream": True})
    assert response.status_code == 200
    parts = frames(response.text)
    assert json.loads(parts[-1][6:]) == {
        "error": {
            "message": "Stage 2 was lost.", "type": "server_error", "param": None, "code": "generation_failed",
        }
    }  # fmt: skip
    assert "[DONE]" not in response.text
    assert content([json.loads(part[6:]) for part in parts[:-1]]) == "abc"


def test_a_failure_before_the_answer_is_whole_has_its_status(client: httpx.Client, deployment: FakeDeployment) -> None:
    for error, status in (
        (GenerationError("x"), 500),
        (UnavailableError("No nodes left.", state="degraded", retry_after_s=7), 503),
    ):
        deployment.script = lambda request, error=error: Script(tokens=(), error=error)  # type: ignore[misc]
        response = client.post("/v1/chat/completions", json={**HELLO, "n": 2})
        assert response.status_code == status
        assert not deployment.running


def test_one_failed_choice_ends_the_others(client: httpx.Client, deployment: FakeDeployment) -> None:
    scripts = [
        Script(tokens=deployment.ids("x" * 200), token_s=0.05),
        Script(tokens=(), error=GenerationError("broken")),
    ]
    deployment.script = lambda request: scripts.pop(0)
    response = client.post("/v1/chat/completions", json={**HELLO, "n": 2, "stream": True})
    assert json.loads(frames(response.text)[-1][6:])["error"]["message"] == "broken"
    assert not deployment.running


def test_a_bug_in_mid_stream_is_reported_without_detail(client: httpx.Client, deployment: FakeDeployment) -> None:
    class StrangeError(Exception):
        pass

    deployment.script = lambda request: Script(tokens=(), error=StrangeError("secret"))  # type: ignore[arg-type]
    response = client.post("/v1/chat/completions", json={**HELLO, "stream": True})
    error = json.loads(frames(response.text)[-1][6:])["error"]
    assert error["code"] == "internal_error"
    assert response.headers["x-request-id"] in error["message"]
    assert "secret" not in response.text
    whole = client.post("/v1/chat/completions", json=HELLO)
    assert whole.status_code == 500
    assert whole.headers["x-should-retry"] == "false"
    assert "secret" not in whole.text


def test_an_idle_stream_says_that_it_lives(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("ab", first_token_s=0.3)
    text = client.post("/v1/chat/completions", json={**HELLO, "stream": True}).text
    assert text.count(": ping\n\n") >= 3
    assert content(events(text)) == "ab"


def test_a_reader_that_goes_away_frees_its_generations(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("x" * 200, token_s=0.05)
    with client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True, "n": 2}) as response:
        lines = response.iter_lines()
        next(lines)
        assert len(deployment.running) == 2
    wait_until(lambda: not deployment.running, timeout_s=0.5)
    assert deployment.num_cancelled == 2


def test_a_client_that_does_not_wait_for_a_whole_answer_frees_its_generations(
    client: httpx.Client, deployment: FakeDeployment
) -> None:
    deployment.say("x" * 200, token_s=0.05)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json={**HELLO, "n": 2}, timeout=0.2)
    wait_until(lambda: not deployment.running, timeout_s=0.5)
    assert deployment.num_cancelled == 2


def test_a_slow_reader_gets_every_token_and_holds_up_nobody(client: httpx.Client, deployment: FakeDeployment) -> None:
    text = "0123456789" * 30_000
    deployment.max_model_len = 2**20
    deployment.say(text, burst=100)
    with client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as slow:
        lines = slow.iter_lines()
        next(lines)
        with httpx.Client(base_url=client.base_url, timeout=10) as other:
            deployment.say("quick")
            assert other.post("/v1/chat/completions", json=HELLO).json()["choices"][0]["message"]["content"] == "quick"
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert content(rest) == text
