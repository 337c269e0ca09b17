"""Streams that are open while something dies: their texts, the longest pause, and what is left afterwards.

Used by the tests of recovery and by `scripts/bench_recovery.py`, which prints the pauses.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import psutil

from tests.system.processes import Server, poll

QUESTIONS = ("tell me", "What is a layer?", "Why is it slow?", "How do I join?")
LONG_PROMPT = " ".join(f"word {number}" for number in range(150))


@dataclass(kw_only=True)
class Stream:
    """One streamed answer as its client saw it."""

    text: str = ""
    num_pieces: int = 0
    first_s: float = 0.0  # from the request to the first piece
    pause_s: float = 0.0  # the longest between two pieces
    error: str | None = None
    done: bool = False
    started: threading.Event = field(default_factory=threading.Event)  # its first piece came


def request(question: str, *, max_tokens: int) -> dict[str, object]:
    return {
        "model": "tllm-demo",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": max_tokens,
        "stream": True,
    }


def follow(
    url: str, body: dict[str, object], stream: Stream, *, timeout_s: float = 90, key: str | None = None
) -> Stream:
    last_s, began_s = None, time.monotonic()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with (
            httpx.Client(timeout=timeout_s, headers=headers) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
        ):
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    stream.done = True
                if not line.startswith("data: {"):
                    continue
                frame = json.loads(line[6:])
                if "error" in frame:
                    stream.error = frame["error"]["message"]
                    break
                piece = frame["choices"][0]["delta"].get("content") if frame["choices"] else None
                if not piece:
                    continue
                now_s = time.monotonic()
                stream.first_s = stream.first_s or now_s - began_s
                stream.pause_s = max(stream.pause_s, now_s - (last_s or now_s))
                last_s = now_s
                stream.text += piece
                stream.num_pieces += 1
                stream.started.set()
            if response.status_code != 200 and stream.error is None:
                stream.error = f"status {response.status_code}"
    except httpx.HTTPError as error:
        stream.error = f"{type(error).__name__}: {error}"
    finally:
        stream.started.set()
    return stream


def streams(
    url: str,
    *,
    prefix: str = "",
    max_tokens: int = 100,
    strike: Callable[[Sequence[Stream]], None] | None = None,
) -> list[Stream]:
    """One stream per question, all at once; `strike` runs beside them and gets them as they grow."""
    found = [Stream() for _ in QUESTIONS]
    bodies = [request(f"{prefix}{question}", max_tokens=max_tokens) for question in QUESTIONS]
    with ThreadPoolExecutor(max_workers=len(found)) as clients:
        following = [clients.submit(follow, url, body, stream) for body, stream in zip(bodies, found, strict=True)]
        if strike is not None:
            strike(found)
        for future in following:
            future.result()
    return found


def in_decode(act: Callable[[], None]) -> Callable[[Sequence[Stream]], None]:
    """Once every stream has got several pieces."""

    def strike(found: Sequence[Stream]) -> None:
        poll(lambda: all(s.num_pieces > 8 or s.error for s in found), deadline_s=60, what="all streams under way")
        act()

    return strike


def in_prefill(server: Server, act: Callable[[], None]) -> Callable[[Sequence[Stream]], None]:
    """Once the prompts are being computed."""

    def strike(found: Sequence[Stream]) -> None:
        poll(
            lambda: server.metric("num_requests_running") >= len(found) or any(s.num_pieces for s in found),
            deadline_s=60,
            what="prompts under way",
        )
        act()

    return strike


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a server holds while it is idle."""

    used_blocks: float
    num_running: float
    num_processes: int
    num_descriptors: int
    rss_bytes: int

    @classmethod
    def of(cls, server: Server) -> Footprint:
        head = psutil.Process(server.process.pid)
        return cls(
            used_blocks=server.metric("kv_cache_usage_perc"),
            num_running=server.metric("num_requests_running"),
            num_processes=len(server.family()),
            num_descriptors=head.num_fds(),
            rss_bytes=head.memory_info().rss,
        )

    def is_like(self, before: Footprint) -> bool:
        """Nothing leaked: a few descriptors of connections that the clients' side has yet to close are none."""
        return (
            self.used_blocks == before.used_blocks == 0
            and self.num_running == 0
            and self.num_processes <= before.num_processes
            and self.num_descriptors <= before.num_descriptors + 4
        )
