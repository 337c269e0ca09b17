"""Text completions as they stand on the wire, scoring included."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.api.fake_deployment import BOS, EOS, FakeDeployment, Script
from tests.api.test_chat import events


def complete(client: httpx.Client, **body: object) -> dict:
    response = client.post("/v1/completions", json={"model": "fake", **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_has_every_field_of_openai(client: httpx.Client) -> None:
    answer = complete(client, prompt="Hi", request_id="me")
    answer.pop("created")
    assert answer.pop("timings")["predicted_n"] == 14
    assert answer == {
        "id": "cmpl-me",
        "object": "text_completion",
        "model": "fake",
        "system_fingerprint": "tllm-1.2.3",
        "choices": [
            {"index": 0, "text": "Hello, world!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 14,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_sixteen_tokens_are_the_default(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("x" * 100)
    answer = complete(client, prompt="Hi")
    assert answer["choices"][0]["text"] == "x" * 16
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([[0, 1], [2]], None),
        ([5], None),
        ([5, 6], None),
    ],
)
def test_every_kind_of_prompt_makes_its_choices_in_order(
    client: httpx.Client, deployment: FakeDeployment, prompt: object, texts: list[str] | None
) -> None:
    deployment.script = lambda request: Script(tokens=request.prompt)
    answer = complete(client, prompt=prompt, n=2, add_special_tokens=False)
    prompts = [deployment.ids(text) for text in texts] if texts else [tuple(ids) for ids in _lists(prompt)]
    assert [request.prompt for request in deployment.submitted] == [ids for ids in prompts for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == 2 * sum(len(ids) + 1 for ids in prompts)


def _lists(prompt: object) -> list[list[int]]:
    assert isinstance(prompt, list)
    return prompt if isinstance(prompt[0], list) else [prompt]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front(client: httpx.Client, stream: bool) -> None:
    body = {"model": "fake", "prompt": ["Hé: ", "B: "], "echo": True, "stream": stream}
    response = client.post("/v1/completions", json=body)
    choices = [
        choice for chunk in (events(response.text) if stream else [response.json()]) for choice in chunk["choices"]
    ]
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in range(2)]
    assert texts == ["Hé: Hello, world!", "B: Hello, world!"]


def test_a_harness_scores_a_text_by_echo_with_one_token(client: httpx.Client, deployment: FakeDeployment) -> None:
    """lm-eval drops the last entry, which is the sampled token's: it must be there also when it ends the text."""
    deployment.say("")
    ids = list(deployment.ids("abc"))
    choice = complete(client, prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "abc"
    assert logprobs["tokens"][:3] == ["a", "b", "c"]
    assert len(logprobs["tokens"]) == 4
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"b": -0.5}
    assert logprobs["text_offset"] == [0, 1, 2, 3]


def test_no_tokens_and_an_echo_scores_the_prompt_alone(client: httpx.Client, deployment: FakeDeployment) -> None:
    for stream in (False, True):
        body = {"model": "fake", "prompt": "aé", "max_tokens": 0, "logprobs": 0, "echo": True, "stream": stream}
        response = client.post("/v1/completions", json=body)
        chunks = events(response.text) if stream else [response.json()]
        choice = chunks[0]["choices"][0]
        assert choice["text"] == "aé"
        assert choice["logprobs"]["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
        assert choice["logprobs"]["text_offset"] == [0, 1, 1]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert deployment.submitted[-1].params.max_tokens == 0
    answer = complete(client, prompt="ab", max_tokens=0, echo=True)
    assert answer["choices"][0]["text"] == "ab"
    assert answer["usage"]["completion_tokens"] == 0


def test_streamed_logprobs_join_to_those_of_a_whole_answer(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("né END x")
    body = {"model": "fake", "prompt": "ab", "logprobs": 2, "echo": True, "stop": " END"}
    whole = complete(client, **body)["choices"][0]
    chunks = events(client.post("/v1/completions", json={**body, "stream": True}).text)
    for key, values in whole["logprobs"].items():
        joined = [value for chunk in chunks for value in (chunk["choices"][0]["logprobs"] or {key: []})[key]]
        assert joined == values
    assert whole["text"] == "abné" == "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert whole["logprobs"]["text_offset"] == [0, 1, 2, 3, 3]
    assert [len(top or ()) for top in whole["logprobs"]["top_logprobs"]] == [0, 2, 2, 2, 2]


def test_a_stream_ends_with_its_reason_and_asked_usage(client: httpx.Client, deployment: FakeDeployment) -> None:
    body = {"model": "fake", "prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post("/v1/completions", json=body).text)
    assert all(chunk["object"] == "text_completion" for chunk in chunks)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 16
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)


def test_special_tokens_are_hidden_unless_asked_for(client: httpx.Client, deployment: FakeDeployment) -> None:
    bos = deployment.tokenizer.token_id(BOS)
    deployment.script = lambda request: Script(tokens=(bos, *deployment.ids("a")))  # type: ignore[arg-type]
    assert complete(client, prompt="x")["choices"][0]["text"] == "a"
    assert complete(client, prompt="x", skip_special_tokens=False)["choices"][0]["text"] == f"{BOS}a"


def test_tokens_can_be_named_by_their_ids(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("a")
    choice = complete(client, prompt="x", logprobs=0, return_tokens_as_token_ids=True)["choices"][0]
    end = deployment.end_ids[0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{deployment.ids('a')[0]}", f"token_id:{end}"]


def test_token_ids_and_prompt_logprobs_stand_at_their_choice(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.say("a")
    choices = complete(client, prompt=["xy", "z"], return_token_ids=True, prompt_logprobs=0)["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [list(deployment.ids("xy")), list(deployment.ids("z"))]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [2, 1]
    assert choices[0]["token_ids"] == [deployment.ids("a")[0], deployment.end_ids[0]]
    body = {"model": "fake", "prompt": "xy", "return_token_ids": True, "stream": True}
    chunks = events(client.post("/v1/completions", json=body).text)
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == choices[0]["token_ids"]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == list(deployment.ids("xy"))


def test_truncation_keeps_the_end_of_the_prompt(client: httpx.Client, deployment: FakeDeployment) -> None:
    complete(client, prompt="abcdef", truncate_prompt_tokens=2)
    complete(client, prompt="x" * 1000, truncate_prompt_tokens=-1, max_tokens=6)
    assert deployment.submitted[0].prompt == deployment.ids("ef")
    assert len(deployment.submitted[1].prompt) == deployment.max_model_len - 6
    assert deployment.submitted[1].params.max_tokens == 6


def test_one_prompt_too_many_submits_none(client: httpx.Client, deployment: FakeDeployment) -> None:
    response = client.post("/v1/completions", json={"model": "fake", "prompt": ["a", "b" * 300]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == "prompt"
    assert not deployment.submitted


def test_the_end_of_sequence_can_be_shown(client: httpx.Client, deployment: FakeDeployment) -> None:
    eos = deployment.tokenizer.token_id(EOS)
    deployment.script = lambda request: Script(tokens=(*deployment.ids("a"), eos))  # type: ignore[arg-type]
    shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert complete(client, prompt="x", **shown)["choices"][0]["text"] == f"a{EOS}"
    assert complete(client, prompt="x", skip_special_tokens=False)["choices"][0]["text"] == "a"


def test_frames_are_valid_json_whatever_the_text(client: httpx.Client, deployment: FakeDeployment) -> None:
    text = '"\\\n\r\t\x00\u2028\x7f</script>'
    deployment.say(text)
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        response = client.post(path, json={**body, "stream": True, "max_tokens": 50})
        joined = "".join(
            choice.get("text") or choice.get("delta", {}).get("content") or ""
            for chunk in events(response.text)
            for choice in chunk["choices"]
        )
        assert joined == text
        assert json.dumps(joined)
