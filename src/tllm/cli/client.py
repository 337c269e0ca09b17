"""A chat with an OpenAI-compatible server, streamed, as the verbs need it: text as it comes, and how long it took.

This file does not know terminals, nor who serves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from tllm.core.errors import UnavailableError


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
        """Raises UnavailableError when the server reports an error in mid-stream."""
        for line in self.response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            frame = json.loads(line.removeprefix("data: "))
            if frame.get("error"):
                raise UnavailableError(frame["error"]["message"], state="failed")
            if frame.get("usage"):
                self.num_tokens = frame["usage"]["completion_tokens"]
            for choice in frame["choices"]:
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                if piece := choice["delta"].get("content"):
                    self.last_s = time.perf_counter()
                    self.first_s = self.first_s or self.last_s
                    self.pieces.append(piece)
                    yield piece


@contextmanager
def ask(
    client: httpx.Client, *, model: str, turns: Sequence[Turn], options: dict[str, float | int]
) -> Iterator[Answer]:
    """One chat completion. Leaving the context before the end aborts it. Raises UnavailableError if refused."""
    body = {
        "model": model,
        "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    began_s = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            response.read()
            raise UnavailableError(response.json()["error"]["message"], state="failed")
        yield Answer(response=response, began_s=began_s)
