"""The official Python client, blocking and not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from tests.api.fake_deployment import FakeDeployment, Script
from tests.api.serving import Server, wait_until
from tllm.cluster.deployment import DeploymentState
from tllm.core.errors import GenerationError, QueueFullError

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


def test_a_whole_answer_is_read(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="fake", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].token == "H"
    assert answer.usage.total_tokens == 35
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer._request_id.startswith("req_")


def test_a_stream_is_read_and_its_helper_joins_it(sdk: openai.OpenAI, deployment: FakeDeployment) -> None:
    deployment.say("Grüße 😀")
    options = {"include_usage": True}
    chunks = list(sdk.chat.completions.create(model="fake", messages=MESSAGES, stream=True, stream_options=options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Grüße 😀"
    assert chunks[-1].usage.completion_tokens == 13
    with sdk.chat.completions.stream(model="fake", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Grüße 😀"


def test_completions_and_models_are_read(sdk: openai.OpenAI) -> None:
    completion = sdk.completions.create(model="fake", prompt=["a", "b"], logprobs=1, echo=True, max_tokens=2)
    assert [choice.text for choice in completion.choices] == ["aHe", "bHe"]
    assert completion.choices[0].logprobs.token_logprobs[0] is None
    streamed = sdk.completions.create(model="fake", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Hello, world!"
    assert [model.id for model in sdk.models.list()] == ["fake", "org/fake-model"]
    assert sdk.models.retrieve("org/fake-model").id == "org/fake-model"


def test_closing_a_stream_frees_its_generation(sdk: openai.OpenAI, deployment: FakeDeployment) -> None:
    deployment.say("x" * 200, token_s=0.02)
    stream = sdk.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    next(stream)
    assert deployment.running
    stream.close()
    wait_until(lambda: not deployment.running, timeout_s=0.5)


def test_errors_have_their_classes(sdk: openai.OpenAI, deployment: FakeDeployment) -> None:
    def ask(**extra: object) -> None:
        sdk.chat.completions.create(**{"model": "fake", "messages": MESSAGES, **extra})

    with pytest.raises(openai.BadRequestError) as wrong:
        ask(temperature=3)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        ask(messages=[{"role": "user", "content": "x" * 300}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt-9")
    assert missing.value.code == "model_not_found"
    deployment.refusal = QueueFullError(9, 1)
    with pytest.raises(openai.RateLimitError):
        ask()
    deployment.refusal = None
    deployment.script = lambda request: Script(tokens=(), error=GenerationError("broken"))
    with pytest.raises(openai.InternalServerError):
        ask()
    deployment.state = DeploymentState.LOADING
    with pytest.raises(openai.InternalServerError) as loading:
        ask()
    assert loading.value.status_code == 503


def test_a_failure_in_mid_stream_is_an_api_error(sdk: openai.OpenAI, deployment: FakeDeployment) -> None:
    deployment.script = lambda request: Script(tokens=deployment.ids("ab"), error=GenerationError("Stage 2 is gone."))
    seen = []
    stream = sdk.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="Stage 2 is gone") as failure:
        seen.extend(chunk.choices[0].delta.content for chunk in stream)
    assert seen == ["", "a", "b"]
    assert failure.value.code == "generation_failed"


def test_a_wrong_key_is_an_authentication_error(serve: Callable[..., httpx.Client]) -> None:
    client = serve(api_keys=("right",))
    for key in ("right", "wrong"):
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0) as sdk:
            if key == "right":
                assert sdk.models.list().data
            else:
                with pytest.raises(openai.AuthenticationError):
                    sdk.models.list()


def test_the_sdk_comes_back_when_the_queue_was_full(server: Server, deployment: FakeDeployment) -> None:
    """It obeys retry-after-ms; the second attempt finds room."""
    refusals = [QueueFullError(9, 0.05)]
    submit = FakeDeployment.submit

    def once(request):  # type: ignore[no-untyped-def]
        if refusals:
            raise refusals.pop()
        return submit(deployment, request)

    deployment.submit = once  # type: ignore[method-assign]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=1) as sdk:
        answer = sdk.chat.completions.create(model="fake", messages=MESSAGES)
    del deployment.submit
    assert answer.choices[0].message.content == "Hello, world!"


async def test_many_at_once_each_get_their_own_answer(server: Server, deployment: FakeDeployment) -> None:
    deployment.max_model_len = 512
    deployment.script = lambda request: Script(tokens=request.prompt[7:-12], token_s=0.001)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:

        async def ask(index: int) -> str:
            messages = [{"role": "user", "content": f"number {index} " + "é" * index}]
            stream = await sdk.chat.completions.create(model="fake", messages=messages, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        answers = await asyncio.gather(*(ask(index) for index in range(32)))
    assert answers == [f"number {index} " + "é" * index for index in range(32)]
    assert not deployment.running
