"""How fast one stream and a few are, in turns with a peer, beside what the memory bus allows.

    turn 1   tllm  transformers  http      turn 2   tllm  transformers  http      ...

Machines drift and are shared: systems are measured alternately within one run, and what is compared is the median of
the ratios of neighbouring turns, never two runs' absolute times.

This file does not know how a server is started; it is given one's URL.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from tllm.core.errors import TransportError, UnavailableError

_SILENCE_S = 300.0  # between two frames of a stream, or before the first


@dataclass(slots=True, kw_only=True)
class Series:
    """One system's rates over the turns, in units per second; higher is better."""

    name: str
    rates: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def ratio_to(self, other: Series) -> float:
        """Median over the turns of this rate divided by the other's in the same turn."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True))


def in_turns(
    systems: Sequence[tuple[str, Callable[[], float]]], *, num_turns: int, warm_up: bool = True
) -> list[Series]:
    """Call each system's measurement once a turn; each returns a rate. The first, uncounted turn warms caches up."""
    if warm_up:
        for _, measure in systems:
            measure()
    series = [Series(name=name) for name, _ in systems]
    for _ in range(num_turns):
        for line, (_, measure) in zip(series, systems, strict=True):
            line.rates.append(measure())
    return series


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """When one streamed answer was asked for, began and ended, in seconds of one clock."""

    asked_s: float
    first_s: float
    last_s: float


def stream_rate(url: str, model: str, *, prompt: Sequence[int], num_tokens: int) -> float:
    """Tokens per second of one stream over HTTP after its first token."""
    stream = _stream(url, model, prompt, num_tokens)
    return (num_tokens - 1) / (stream.last_s - stream.first_s)


def prefill_rate(url: str, model: str, *, prompt: Sequence[int]) -> float:
    """Tokens of the prompt over the seconds from the request to the first token. The prompt should be new to it."""
    stream = _stream(url, model, prompt, 1)
    return len(prompt) / (stream.last_s - stream.asked_s)


def aggregate_rate(url: str, model: str, *, prompt: Sequence[int], num_tokens: int, num_streams: int) -> float:
    """Tokens per second of all streams together, from the first request to the last token, prefill included.

    Every stream has its own variation of `prompt`, so that no prefix is shared.
    """
    prompts = [[(token + 7 * number) % 256 for token in prompt] for number in range(num_streams)]
    with ThreadPoolExecutor(max_workers=num_streams) as threads:
        streams = list(threads.map(lambda varied: _stream(url, model, varied, num_tokens), prompts))
    wall_s = max(stream.last_s for stream in streams) - min(stream.asked_s for stream in streams)
    return num_tokens * num_streams / wall_s


def _stream(url: str, model: str, prompt: Sequence[int], num_tokens: int) -> _Stream:
    """Raises UnavailableError unless all the tokens came: a shorter answer would pass for a faster one."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,  # a frame for every token, also for those that have no text
    }
    asked_s = time.perf_counter()
    arrived: list[tuple[float, str]] = []  # read as JSON afterwards, outside of what is measured
    try:
        with (
            httpx.Client(base_url=url, timeout=_SILENCE_S) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            if response.status_code != httpx.codes.OK:
                response.read()
                raise UnavailableError(f"{url} answered {response.status_code}: {response.text}", state="failed")
            arrived.extend((time.perf_counter(), line) for line in response.iter_lines() if line.startswith("data: {"))
    except httpx.HTTPError as error:
        raise TransportError(f"The stream from {url} broke: {error}") from error
    first_s = last_s = 0.0
    num_received = 0
    for at_s, line in arrived:
        frame = json.loads(line.removeprefix("data: "))
        if "error" in frame:
            raise UnavailableError(f"{url} failed in mid-stream: {frame['error']}", state="failed")
        if num_here := sum(len(choice.get("token_ids") or ()) for choice in frame["choices"]):
            num_received += num_here
            last_s = at_s
            first_s = first_s or at_s
    if num_received != num_tokens:
        raise UnavailableError(f"{url} sent {num_received} tokens instead of {num_tokens}.", state="failed")
    return _Stream(asked_s=asked_s, first_s=first_s, last_s=last_s)
