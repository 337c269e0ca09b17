"""What every request meets, whatever it asks: paths, ids, keys, foreign pages, and what may be seen without a key."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable

import httpx
import pytest

from tests.api.fake_deployment import FakeDeployment
from tllm.api.edge import canonical_path

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
KEYED = [
    ("GET", "/v1/models"), ("GET", "/v1/models/fake"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
    ("GET", "/metrics"), ("GET", "/version"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"), ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nothing"), ("GET", "/models"),
    ("POST", "/chat/completions"), ("POST", "//v1//chat/completions/"), ("GET", "/"), ("GET", "/v1/health"),
    ("GET", "/health/../metrics"), ("GET", "/%2fmetrics"), ("GET", "/METRICS"),
]  # fmt: skip


def test_every_path_but_health_needs_the_key(serve: Callable[..., httpx.Client]) -> None:
    client = serve(api_keys=("one", "two"))
    wrong = ({}, {"authorization": "Bearer three"}, {"authorization": "one"}, {"x-api-key": "ONE"})
    for (method, path), headers in itertools.product(KEYED, wrong):
        response = client.request(method, path, headers=headers)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.json()["error"]["type"] == "authentication_error"


def test_health_needs_no_key_and_any_spelling_of_a_key_will_do(serve: Callable[..., httpx.Client]) -> None:
    client = serve(api_keys=("one", "schlüssel"))
    for path in ("/health", "/live", "/ready", "/health/"):
        assert client.get(path).status_code == 200
    for headers in (
        {"authorization": "Bearer one"},
        {"authorization": "bearer one"},
        {"x-api-key": "one"},
        {"api-key": "one"},
        {"authorization": "Bearer wrong", "api-key": "one"},
        {b"x-api-key": "schlüssel".encode()},
    ):
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_without_configured_keys_any_key_passes(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"authorization": "Bearer whatever"}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/chat/completions/", "//v1/chat//completions", "/chat/completions"]
)
def test_a_path_is_served_however_it_is_written(client: httpx.Client, path: str) -> None:
    response = client.post(f"{client.base_url}".rstrip("/") + path, json=HELLO)
    assert response.status_code == 200
    assert not response.history


def test_models_are_listed_in_openais_shape_with_slashes_in_their_ids(client: httpx.Client) -> None:
    listed = client.get("/models/").json()
    assert [entry["id"] for entry in listed["data"]] == ["fake", "org/fake-model"]
    shown = {
        "id": "org/fake-model", "object": "model", "created": 1_700_000_000, "owned_by": "tllm",
        "root": "/models/fake", "parent": None, "max_model_len": 256,
    }  # fmt: skip
    assert listed["data"][1] == shown
    assert client.get("/v1/models/org/fake-model").json() == shown
    assert client.get("/v1/models/org%2Ffake-model").json() == shown


def test_models_answer_in_anthropics_shape_to_those_who_speak_it(client: httpx.Client) -> None:
    listed = client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert listed["has_more"] is False
    assert listed["data"][0] == {
        "type": "model", "id": "fake", "display_name": "fake", "created_at": "2023-11-14T22:13:20Z",
    }  # fmt: skip


def test_every_response_has_an_id_and_a_time(client: httpx.Client) -> None:
    given = client.post("/v1/chat/completions", json=HELLO, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    assert given.headers["openai-processing-ms"].isdigit()
    made = [client.get("/nothing", headers={"x-request-id": "a b"}).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", one) for one in made)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_rebound_name_is_refused_on_loopback(client: httpx.Client, host: str) -> None:
    response = client.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:5", "[::1]:80", "127.3.2.1", "me.localhost"])
def test_names_of_this_machine_are_served(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_the_operator_can_allow_a_host_and_an_origin(serve: Callable[..., httpx.Client]) -> None:
    client = serve(allowed_hosts=("models.lan",), cors_origins=("https://ui.example", "app://notes"))
    assert client.get("/v1/models", headers={"host": "models.lan:8000"}).status_code == 200
    response = client.get("/v1/models", headers={"origin": "https://ui.example"})
    assert response.headers["access-control-allow-origin"] == "https://ui.example"
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    assert client.get("/v1/models", headers={"origin": "app://notes"}).status_code == 200
    assert client.get("/v1/models", headers={"origin": "https://other.example"}).status_code == 403


def test_beyond_loopback_hosts_are_not_checked_unless_listed(serve: Callable[..., httpx.Client]) -> None:
    open_client = serve(bind_host="0.0.0.0", api_keys=("k",))
    headers = {"host": "any.example", "origin": "https://any.example", "api-key": "k"}
    assert open_client.get("/v1/models", headers=headers).status_code == 200
    listed = serve(bind_host="0.0.0.0", api_keys=("k",), allowed_hosts=("models.lan",))
    assert listed.get("/v1/models", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example", "http://[", "file://"]
)
def test_pages_of_other_sites_are_refused_on_loopback(client: httpx.Client, origin: str) -> None:
    response = client.post("/v1/chat/completions", json=HELLO, headers={"origin": origin})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in response.headers


def test_a_page_of_this_machine_may_ask_but_gets_no_cors_headers(client: httpx.Client) -> None:
    response = client.get("/v1/models", headers={"origin": "http://localhost:3000"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_preflights_are_answered_without_a_key(serve: Callable[..., httpx.Client]) -> None:
    client = serve(api_keys=("k",), cors_origins=("https://ui.example",))
    headers = {
        "origin": "https://ui.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    response = client.options("/v1/chat/completions", headers=headers)
    assert response.status_code == 204
    assert response.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in response.headers["access-control-allow-methods"]
    plain = client.options("/v1/chat/completions")
    assert plain.status_code == 204
    assert "access-control-allow-origin" not in plain.headers
    refused = client.get("/v1/models", headers={"origin": "https://ui.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://ui.example"  # so that the page can read why


def test_tokenize_and_detokenize_are_inverse(client: httpx.Client, deployment: FakeDeployment) -> None:
    made = client.post("/tokenize", json={"model": "fake", "prompt": "né<|end|>", "return_token_strs": True}).json()
    ids = list(deployment.ids("né<|end|>"))
    strings = ["n", "bytes:\\xc3", "bytes:\\xa9", "<|end|>"]
    assert made == {"tokens": ids, "count": 4, "max_model_len": 256, "token_strs": strings}
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "né<|end|>"}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert client.post("/detokenize", json={"tokens": chat["tokens"]}).json() == {
        "prompt": "<|bos|><user>Hi<|end|><assistant>"
    }
    assert client.post("/tokenize", json={}).status_code == 400
    assert client.post("/tokenize", json={"prompt": "a", "tools": [{}]}).json()["error"]["param"] == "tools"
    assert client.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()["tokens"] == []
    assert client.post("/detokenize", json={"tokens": [999]}).status_code == 400
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|eos|>"
    assert info["chat_template"].startswith("{{ bos_token }}")


def test_health_version_and_head_requests(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok", "models": {"fake": "serving", "org/fake-model": "serving"}}
    assert client.get("/version").json() == {"version": "1.2.3"}
    head = client.head("/health")
    assert (head.status_code, head.content) == (200, b"")


def test_the_openapi_document_describes_the_bodies(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schemas = document["components"]["schemas"]
    chat = schemas[body["$ref"].rsplit("/", 1)[1]]
    assert "messages" in chat["required"]
    for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)):
        assert reference.removeprefix("#/components/schemas/") in schemas
    assert "422" not in json.dumps(document)


def test_canonical_paths() -> None:
    assert canonical_path("/") == "/"
    assert canonical_path("//") == "/"
    assert canonical_path("/models/a/b/") == "/v1/models/a/b"
    assert canonical_path("/v1/models") == "/v1/models"
    assert canonical_path("/completions") == "/v1/completions"
    assert canonical_path("/tokenize/") == "/tokenize"
