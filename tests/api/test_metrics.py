"""What /metrics says after known requests."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.fake_deployment import FakeDeployment, Script
from tests.api.serving import wait_until
from tllm.api.metrics import Metrics
from tllm.core.errors import GenerationError

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def samples(client: httpx.Client) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and sorted label values."""
    page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }


@pytest.mark.parametrize("prefix", ["tllm", "vllm"])
def test_requests_leave_their_marks(
    serve: Callable[..., httpx.Client], new_deployment: FakeDeployment, prefix: str
) -> None:
    client = serve(metrics=Metrics(prefix=prefix))
    new_deployment.say("abc", token_s=0.002)
    client.post("/v1/chat/completions", json={**HELLO, "n": 2})
    client.post("/v1/chat/completions", json={**HELLO, "max_tokens": 2, "stream": True})
    new_deployment.script = lambda request: Script(tokens=(), error=GenerationError("x"))
    client.post("/v1/chat/completions", json=HELLO)
    new_deployment.say("x" * 200, token_s=0.02)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=HELLO, timeout=0.1)
    wait_until(lambda: not new_deployment.running)
    client.get("/nothing/here")
    client.get("/v1/models/fake")
    seen = samples(client)
    for reason, count in (("stop", 2), ("length", 1), ("error", 1), ("abort", 1)):
        assert seen[f"{prefix}:request_success_total", (reason, "fake")] == count, reason
    assert seen[f"{prefix}:time_to_first_token_seconds_count", ("fake",)] == 4
    assert seen[f"{prefix}:e2e_request_latency_seconds_count", ("fake",)] == 4
    assert seen[f"{prefix}:inter_token_latency_seconds_count", ("fake",)] >= 3
    assert seen[f"{prefix}:request_params_n_sum", ("fake",)] == 5
    assert seen[f"{prefix}:request_prompt_tokens_sum", ("fake",)] == 5 * 21
    assert seen[f"{prefix}:num_requests_running", ("fake",)] == 0
    assert seen[f"{prefix}:kv_cache_usage_perc", ("fake",)] == 0.25
    assert seen[f"{prefix}:prompt_tokens_total", ("fake",)] == 5 * 21
    assert seen[f"{prefix}:prefix_cache_hits_total", ("fake",)] == 0
    assert seen[f"{prefix}:cache_config_info", ("16", "fake", "64")] == 1
    assert seen[f"{prefix}:deployment_state", ("fake", "serving")] == 1
    chat = "/v1/chat/completions"
    assert seen["http_requests_total", (chat, "POST", "200")] == 2
    assert seen["http_requests_total", (chat, "POST", "500")] == 1
    assert seen["http_requests_total", (chat, "POST", "499")] == 1
    assert seen["http_requests_total", ("unmatched", "GET", "404")] == 1
    assert seen["http_requests_total", ("/v1/models/{model:path}", "GET", "200")] == 1
    assert seen["http_request_duration_seconds_count", (chat, "POST")] == 4


def test_labels_do_not_grow_with_what_clients_send(
    serve: Callable[..., httpx.Client], new_deployment: FakeDeployment
) -> None:
    client = serve()
    client.get("/metrics")
    num_before = len(samples(client))
    for index in range(20):
        client.get(f"/nothing/{index}")
        client.request(f"METHOD{index}", "/v1/models")
        client.post("/v1/completions", json={"model": f"model-{index}", "prompt": "x"})
        client.get(f"/v1/models/{index}")
    added = len(samples(client)) - num_before
    assert added < 130  # a histogram for each of a few routes and methods; twenty of each would be thousands


def test_the_first_token_is_timed_from_arrival(
    serve: Callable[..., httpx.Client], new_deployment: FakeDeployment
) -> None:
    new_deployment.say("ab", first_token_s=0.2)
    client = serve()
    client.post("/v1/chat/completions", json=HELLO)
    assert 0.2 <= samples(client)["tllm:time_to_first_token_seconds_sum", ("fake",)] < 2


def test_openmetrics_is_spoken_to_those_who_ask(client: httpx.Client) -> None:
    page = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    assert page.text.endswith("# EOF\n")
