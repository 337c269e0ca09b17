"""Which requests asked to be traced, and which sequences they became.

This file does not know how a trace is made or asked for.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tllm.cluster.deployment import Generation

MAX_REQUESTS = 256  # remembered; the oldest is forgotten first


@dataclass(slots=True, kw_only=True)
class TracedChoice:
    index: int
    generation: Generation
    ended_s: float | None = None  # its last piece was handed to the connection


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """Times are `time.perf_counter`'s."""

    id: str
    arrived_s: float
    choices: tuple[TracedChoice, ...]

    @property
    def is_running(self) -> bool:
        return any(choice.ended_s is None for choice in self.choices)

    def end(self, index: int) -> None:
        """All that there will be of a choice is out. Idempotent."""
        choice = self.choices[index]
        if choice.ended_s is None:
            choice.ended_s = time.perf_counter()


class TracedRequests:
    """By the id of the request, or of its answer."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, TracedRequest] = OrderedDict()
        self._ids: dict[str, str] = {}  # of answers

    def begin(self, request_id: str, arrived_s: float, generations: Sequence[Generation]) -> TracedRequest:
        """Another request of the same id takes its place."""
        choices = tuple(TracedChoice(index=index, generation=each) for index, each in enumerate(generations))
        request = TracedRequest(id=request_id, arrived_s=arrived_s, choices=choices)
        self._requests.pop(request_id, None)
        self._requests[request_id] = request
        while len(self._requests) > MAX_REQUESTS:
            gone, _ = self._requests.popitem(last=False)
            self._ids = {answer: asked for answer, asked in self._ids.items() if asked != gone}
        return request

    def call(self, request: TracedRequest, answer_id: str) -> None:
        """The id of its answer means the request, too."""
        if request.id in self._requests:
            self._ids[answer_id] = request.id

    def find(self, name: str) -> TracedRequest | None:
        return self._requests.get(name) or self._requests.get(self._ids.get(name, ""))
