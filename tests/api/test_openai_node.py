"""The official JavaScript client, which AnythingLLM and most front ends are built on."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from tests.api.fake_deployment import FakeDeployment
from tests.api.node_client import observe
from tests.api.serving import wait_until


def test_openai_node_reads_answers_streams_and_errors(
    serve: Callable[..., httpx.Client], new_deployment: FakeDeployment
) -> None:
    new_deployment.say("Grüße, 世界 😀")
    new_deployment.max_model_len = 1024
    client = serve(api_keys=("secret",))
    seen = observe(f"{client.base_url}/v1", "secret", "fake")
    text = "Grüße, 世界 😀"
    num_tokens = len(text.encode()) + 1
    assert seen["whole"]["text"] == text
    assert seen["whole"]["finish"] == "stop"
    assert seen["whole"]["usage"]["completion_tokens"] == num_tokens
    for streamed in (seen["streamed"], seen["withUsage"]):
        assert streamed["text"] == text
        assert streamed["roles"] == ["assistant"]
        assert streamed["finish"] == ["stop"]
        assert streamed["ids"] == 1
        assert streamed["timings"]["predicted_n"] == num_tokens
    assert seen["streamed"]["usage"] is None
    assert seen["withUsage"]["usage"]["completion_tokens"] == num_tokens
    assert seen["joined"] == {"text": text, "finish": "stop"}
    assert seen["completion"] == {"text": "Grüße,", "finish": "length"}
    assert seen["models"] == ["fake"]
    assert seen["oneModel"] == "fake"
    assert seen["abandoned"]["isAborted"]
    errors = seen["errors"]
    assert (errors["model"]["kind"], errors["model"]["code"]) == ("NotFoundError", "model_not_found")
    assert (errors["parameter"]["kind"], errors["parameter"]["param"]) == ("BadRequestError", "temperature")
    assert (errors["context"]["kind"], errors["context"]["code"]) == ("BadRequestError", "context_length_exceeded")
    assert (errors["key"]["kind"], errors["key"]["code"]) == ("AuthenticationError", "invalid_api_key")
    wait_until(lambda: not new_deployment.running)
