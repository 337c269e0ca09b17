"""Whatever a server does, a person reads one of our errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cli.http_server import answering
from tllm.cli.client import Turn, ask, connected, first_model
from tllm.core.errors import ConfigError, TransportError, UnavailableError

UNAUTHORIZED = json.dumps({"error": {"message": "Missing or wrong API key.", "type": "x", "param": None, "code": "y"}})
PIECE = 'data: {"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": null}]}\n\n'


def run(url: str, *arguments: str, said: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tllm", "run", "--url", url, *arguments], input=said, capture_output=True, text=True
    )


def answer(url: str) -> str:
    with (
        connected(url) as client,
        ask(client, model="any", turns=[Turn(role="user", content="Hi")], options={}) as streamed,
    ):
        return "".join(streamed.text())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:8022", "nonsense", "http://[", "http://127.0.0.1:x"])
def test_a_wrong_url_is_one_screen_without_a_traceback(url):
    shown = run(url, "embedded", "hello")
    assert shown.returncode == 1
    assert "Traceback" not in shown.stderr
    assert shown.stderr.startswith("tllm: ")
    assert "http://HOST:PORT" in shown.stderr
    assert len(shown.stderr.splitlines()) <= 2


def test_a_key_that_is_not_the_servers_is_asked_for():
    with answering(UNAUTHORIZED, status=401, kind="application/json") as url, connected(url) as client:
        with pytest.raises(UnavailableError, match=r"wrong API key.*--api-key"):
            first_model(client)
        with pytest.raises(UnavailableError, match=r"wrong API key.*--api-key"):
            answer(url)


@pytest.mark.parametrize("status", [200, 404, 502])
def test_a_page_instead_of_json_is_said_with_its_status(status):
    with answering("<html>Welcome</html>", status=status, kind="text/html") as url, connected(url) as client:
        with pytest.raises(TransportError, match=f"answered {status}"):
            first_model(client)
        with pytest.raises(TransportError, match=f"answered {status}"):
            answer(url)


def test_the_url_may_end_as_servers_print_it():
    with answering('{"data": [{"id": "one"}]}', kind="application/json") as url:
        for written in (url, f"{url}/", f"{url}/v1", f"{url}/v1/"):
            with connected(written) as client:
                assert str(client.base_url).rstrip("/") == url
                assert first_model(client) == "one"


def test_a_server_without_models_is_an_error():
    with (
        answering('{"data": []}', kind="application/json") as url,
        connected(url) as client,
        pytest.raises(UnavailableError, match="no model"),
    ):
        first_model(client)


def test_a_key_that_http_cannot_carry_is_refused():
    with pytest.raises(ConfigError, match="API key"), connected("http://127.0.0.1:9", api_key="schlüssel"):
        pass


def test_an_error_frame_is_raised():
    with (
        answering(PIECE + 'data: {"error": {"message": "out of nodes"}}\n\n') as url,
        pytest.raises(UnavailableError, match="out of nodes"),
    ):
        answer(url)


def test_a_frame_that_is_not_json_is_raised():
    with answering("data: {oops\n\n") as url, pytest.raises(TransportError):
        answer(url)


def test_a_server_that_drops_does_not_end_the_conversation():
    with answering(PIECE, missing=100) as url:
        shown = run(url, "any", said="one\ntwo\n/bye\n")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("Hel\n(No answer, or only a part of one") == 2
    assert "Traceback" not in shown.stderr
