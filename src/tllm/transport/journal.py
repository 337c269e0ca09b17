"""When each of the last steps passed each point of this process: what traces are made of.

    worker   ARRIVED ▸ DECODED ▸ BEGAN ▸ ENDED ▸ ENCODING ▸ ENCODED ▸ WRITTEN
    head     SCHEDULING ▸ SCHEDULED ▸ ENCODING ▸ ENCODED ▸ WRITTEN   ...   ARRIVED ▸ DECODED ▸ COMPLETING ▸ COMPLETED
             ▸ DELIVERED

It is always on: a mark costs less than a microsecond, and a new step takes the place of the oldest.

This file does not know clocks of other processes, nor what becomes of the record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from enum import IntEnum

from tllm.core.types import Epoch, StepId
from tllm.transport.base import StageMessage, StepFrame

CAPACITY = 4096  # steps


class Point(IntEnum):
    """Where a step may be, in the order in which a process sees it. A worker knows those up to WRITTEN."""

    ARRIVED = 0  # the last byte of its frame is here
    DECODED = 1  # and it is a message
    BEGAN = 2  # to be computed
    ENDED = 3
    ENCODING = 4  # becomes a frame
    ENCODED = 5  # and is written from now on
    WRITTEN = 6  # handed to the network, which may still hold some of it
    SCHEDULING = 7  # the scheduler is asked for it
    SCHEDULED = 8
    COMPLETING = 9  # its result is taken
    COMPLETED = 10
    DELIVERED = 11  # its tokens are where their readers look


NUM_STAGE_POINTS = Point.WRITTEN + 1
UNKNOWN = math.nan

Chunks = tuple[tuple[int, int], ...]
"""Sequence and number of tokens of each chunk."""


class Row:
    """One step's times, in seconds of `time.perf_counter`, by Point; UNKNOWN where it did not pass, or not yet."""

    __slots__ = ("chunks", "epoch", "step", "times_s")

    def __init__(self, epoch: Epoch, step: StepId) -> None:
        self.epoch = epoch
        self.step = step
        self.chunks: Chunks = ()  # known to the head alone
        self.times_s = [UNKNOWN] * len(Point)


class Journal:
    """The last `capacity` steps. Marks may come from any thread; what is older than what a place holds is dropped."""

    def __init__(self, capacity: int = CAPACITY, *, clock: Callable[[], float] = time.perf_counter) -> None:
        assert capacity >= 1
        self._rows: list[Row | None] = [None] * capacity
        self._clock = clock

    def now_s(self) -> float:
        return self._clock()

    def mark(self, epoch: Epoch, step: StepId, point: Point, at_s: float | None = None) -> None:
        """The step is at `point` now, or was at `at_s`."""
        place = step % len(self._rows)
        row = self._rows[place]
        if row is None or row.step != step or row.epoch != epoch:
            if row is not None and (epoch, step) < (row.epoch, row.step):
                return
            row = self._rows[place] = Row(epoch, step)
        row.times_s[point] = self._clock() if at_s is None else at_s

    def mark_message(self, message: StageMessage, point: Point, at_s: float | None = None) -> None:
        """The step that a message is about."""
        if isinstance(message, StepFrame):
            self.mark(message.step.epoch, message.step.id, point, at_s)
        else:
            self.mark(message.epoch, message.step, point, at_s)

    def describe(self, epoch: Epoch, step: StepId, chunks: Chunks) -> None:
        """What is in a step that has been marked."""
        row = self._rows[step % len(self._rows)]
        if row is not None and row.step == step and row.epoch == epoch:
            row.chunks = chunks

    @property
    def is_full(self) -> bool:
        """Whether there may have been steps before the oldest."""
        return all(row is not None for row in self._rows)

    def rows(self) -> Iterator[Row]:
        """All there are, oldest first. They are still written to."""
        return iter(sorted((row for row in self._rows if row is not None), key=lambda row: (row.epoch, row.step)))
