"""A chat with an OpenAI-compatible server, streamed, as the verbs need it: text as it comes, and how long it took.

What fails is one of our errors: TransportError when the server cannot be reached, is gone or speaks something else,
UnavailableError with its own words when it refuses.

This file does not know terminals, nor who serves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tllm.core.errors import ConfigError, TransportError, UnavailableError

_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    role: str
    content: str


@dataclass(slots=True, kw_only=True)
class Answer:
    """One streamed answer; `text()` yields its pieces, and afterwards the figures are complete."""

    response: httpx.Response
    began_s: float
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0
    finish_reason: str | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """From sending the request to the first piece of text."""
        return (self.first_s or self.began_s) - self.began_s

    @property
    def tokens_per_s(self) -> float:
        """After the first token; 0 when there was no second."""
        elapsed_s = (self.last_s or 0.0) - (self.first_s or 0.0)
        return (self.num_tokens - 1) / elapsed_s if self.num_tokens > 1 and elapsed_s > 0 else 0.0

    def text(self) -> Iterator[str]:
        """Raises UnavailableError when the server reports an error in mid-stream, TransportError for other nonsense."""
        for line in self.response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            frame = _parsed(self.response, line.removeprefix("data: "))
            if frame.get("error"):
                raise _refusal(self.response, frame)
            if frame.get("usage"):
                self.num_tokens = frame["usage"]["completion_tokens"]
            for choice in frame.get("choices") or ():
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                if piece := choice["delta"].get("content"):
                    self.last_s = time.perf_counter()
                    self.first_s = self.first_s or self.last_s
                    self.pieces.append(piece)
                    yield piece


@contextmanager
def connected(url: str, *, api_key: str | None = None, silence_s: float | None = None) -> Iterator[httpx.Client]:
    """A client of the server at `url`, with or without the `/v1` that servers print.

    `silence_s` is the longest wait for the next bytes; None, for a person who can press Ctrl-C, has no end.
    Raises ConfigError for a URL or a key that cannot be sent.
    """
    try:
        client = httpx.Client(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(silence_s, connect=_CONNECT_S),
        )
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is not a URL. Write it as the server prints it: http://HOST:PORT.") from error
    except UnicodeEncodeError as error:
        raise ConfigError("The API key has characters that HTTP cannot carry; it must be plain ASCII.") from error
    with client:
        yield client


def first_model(client: httpx.Client) -> str:
    """The first model that the server lists."""
    with _reached(client):
        response = client.get("/v1/models")
    listed = _parsed(response, response.text)
    if response.status_code != httpx.codes.OK:
        raise _refusal(response, listed)
    models = listed.get("data")
    if not models:
        raise UnavailableError(f"The server at {response.url.host} lists no model.", state="failed")
    return str(models[0]["id"])


@contextmanager
def ask(
    client: httpx.Client, *, model: str, turns: Sequence[Turn], options: dict[str, float | int]
) -> Iterator[Answer]:
    """One chat completion. Leaving the context before the end aborts it."""
    body = {
        "model": model,
        "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    began_s = time.perf_counter()
    with _reached(client), client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            response.read()
            raise _refusal(response, _parsed(response, response.text))
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise _nonsense(response)
        yield Answer(response=response, began_s=began_s)


@contextmanager
def _reached(client: httpx.Client) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise TransportError(
            f"No answer, or only a part of one, from {client.base_url}. "
            "Check the URL (http://HOST:PORT) and that the server runs."
        ) from error


def _parsed(response: httpx.Response, text: str) -> dict[str, Any]:
    """A JSON object as the server sent it."""
    try:
        made = json.loads(text)
    except ValueError:
        made = None
    if not isinstance(made, dict):
        raise _nonsense(response)
    return made


def _nonsense(response: httpx.Response) -> TransportError:
    return TransportError(
        f"{response.url} answered {response.status_code} {response.reason_phrase}, and not as the OpenAI API does. "
        "Check that the URL is that of a model server."
    )


def _refusal(response: httpx.Response, body: dict[str, Any]) -> UnavailableError:
    error = body.get("error")
    said = error.get("message") if isinstance(error, dict) else error or body.get("detail")
    what = f"{said or f'The server answered {response.status_code} {response.reason_phrase}.'}"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        what += " Give the server's key with --api-key or TLLM_API_KEY."
    return UnavailableError(what, state="failed")
