"""The driver turns a scheduler's steps into messages and results into outputs, and keeps the pipeline full.

    submit ─▶ scheduler ─▶ send ─▶ link ═▶ stages ═▶ inbox ─▶ receive ─▶ scheduler ─▶ each reader's own outbox
                  ▲                                                          │
                  └──────────────────────── wake ◀───────────────────────────┘

Every sequence has an outbox of its own that merges what its reader has not fetched, so that a slow reader holds up
nobody and loses nothing; it is bounded by the sequence's own length.

This file does not know text, HTTP, or which machines compute.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from tllm.core.errors import FrameError, GenerationError, TllmError, TransportError
from tllm.core.types import FinishReason, Sampled, Score, SequenceId, Step, StepFailed, StepId, StepResult, TokenId
from tllm.scheduler.scheduler import Scheduler, SequenceRequest, Update
from tllm.transport.base import Link, StepFrame
from tllm.transport.journal import Journal, Point
from tllm.transport.rpc import Inbox

log = logging.getLogger(__name__)

_MAX_LOSSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOutput:
    """What happened since the reader last looked. `finish` is set on the last one and only there."""

    tokens: tuple[Sampled, ...] = ()
    prompt_scores: tuple[Score, ...] | None = None  # of prompt tokens 1, 2, ...; once, before the first token
    finish: FinishReason | None = None
    stop_id: TokenId | None = None  # the stop id that ended it; it is also the last of `tokens`


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationUsage:
    """Counted on token ids; times in seconds of the head's clock."""

    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, found in the prefix tree
    num_output_tokens: int
    num_preemptions: int
    queue_s: float  # arrival to first scheduling
    prefill_s: float  # first scheduling to first token
    decode_s: float  # first token to last token


class Generation:
    """One sequence as its reader sees it: an asynchronous iterator of outputs.

    Ends after the output with `finish`. Raises GenerationError or UnavailableError, after everything that was sampled
    before it has been delivered, when the sequence cannot go on.
    """

    def __init__(self, driver: Driver, seq: SequenceId, num_prompt_tokens: int, now_s: float) -> None:
        self._driver = driver
        self.seq = seq
        self._pending = GenerationOutput()  # all but its tokens, which are gathered in a list
        self._pending_tokens: list[Sampled] = []
        self._has_pending = False
        self._error: TllmError | None = None
        self._wake = asyncio.Event()
        self.ended = asyncio.Event()
        self._arrived_s = now_s
        self.first_step: StepId | None = None  # that it was in
        self._scheduled_s: float | None = None
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None
        self._num_prompt_tokens = num_prompt_tokens
        self._num_cached_tokens = 0
        self._num_output_tokens = 0
        self._num_preemptions = 0
        self.num_losses = 0  # pipelines lost since the last token; the driver's to count

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> GenerationOutput:
        while not self._has_pending:
            if self._error is not None:
                raise self._error
            if self.ended.is_set():
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        output = replace(self._pending, tokens=tuple(self._pending_tokens))
        self._pending, self._pending_tokens, self._has_pending = GenerationOutput(), [], False
        return output

    def cancel(self) -> None:
        """Stop computing: its blocks are free when this returns. Idempotent, and harmless after the end."""
        if not self.ended.is_set():
            self.ended.set()
            self._driver.abort(self.seq)
            self._wake.set()

    def usage(self) -> GenerationUsage:
        """So far; final once the iteration has ended."""
        scheduled_s = self._scheduled_s or self._arrived_s
        first_s = self._first_token_s or scheduled_s
        return GenerationUsage(
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=self._num_preemptions,
            queue_s=scheduled_s - self._arrived_s,
            prefill_s=first_s - scheduled_s,
            decode_s=(self._last_token_s or first_s) - first_s,
        )

    def deliver(self, update: Update, now_s: float) -> None:
        """The driver's side: what the scheduler said of this sequence."""
        if self.ended.is_set():
            return
        if update.sampled:
            self.num_losses = 0
            self._first_token_s = self._first_token_s or now_s
            self._last_token_s = now_s
            self._num_output_tokens += len(update.sampled)
        self._num_cached_tokens = update.num_cached_tokens
        self._num_preemptions = update.num_preemptions
        if update.finish is FinishReason.ERROR:
            self.fail(GenerationError(update.reason))
            return
        if update.finish is not None:
            self.ended.set()
        self._pending_tokens.extend(update.sampled)
        self._pending = GenerationOutput(
            prompt_scores=update.scores if update.scores is not None else self._pending.prompt_scores,
            finish=update.finish,
            stop_id=update.stop_id,
        )
        self._has_pending = True
        self._wake.set()

    @property
    def arrived_s(self) -> float:
        """When it was submitted, on the driver's clock."""
        return self._arrived_s

    def scheduled(self, now_s: float, step: StepId) -> None:
        """The driver's side: a chunk of it is on its way."""
        if self._scheduled_s is None:
            self._scheduled_s, self.first_step = now_s, step

    def fail(self, error: TllmError) -> None:
        """The driver's side: no more will come."""
        if not self.ended.is_set():
            self._error = error
            self.ended.set()
            self._wake.set()


class Driver:
    """One pipeline's requests. All methods belong to the event loop's thread."""

    def __init__(
        self, scheduler: Scheduler, *, clock: Callable[[], float] = time.perf_counter, journal: Journal | None = None
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._journal = journal or Journal(1, clock=clock)
        self._generations: dict[SequenceId, Generation] = {}
        self._work = asyncio.Event()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_steps = 0

    async def run(self, link: Link, inbox: Inbox) -> NoReturn:
        """Until cancelled, or TransportError: a neighbour is gone. Open generations are left as they are."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send(link), name="driver send")
                tasks.create_task(self._receive(link, inbox), name="driver receive")
        except ExceptionGroup as group:
            _, bugs = group.split(TransportError)
            if bugs is not None:
                raise
            raise TransportError("; ".join(str(error) for error in group.exceptions)) from group
        raise AssertionError("both tasks run for ever")

    def submit(self, request: SequenceRequest) -> Generation:
        """Raises what `Scheduler.add` raises; nothing is changed then."""
        seq = self._scheduler.add(request)
        generation = Generation(self, seq, len(request.prompt), self._clock())
        self._generations[seq] = generation
        self._num_prompt_tokens += len(request.prompt)
        self._work.set()
        return generation

    def abort(self, seq: SequenceId) -> None:
        """Forget a sequence at any moment; its blocks are free when this returns."""
        self._generations.pop(seq, None)
        self._scheduler.abort(seq)
        self._work.set()

    def fail_all(self, error: TllmError) -> None:
        """End every open generation with `error`."""
        for seq, generation in list(self._generations.items()):
            generation.fail(error)
            self.abort(seq)

    def pipeline_lost(self) -> None:
        """The pipeline broke: whoever has seen that happen too often without getting a token ends with an error."""
        for seq, generation in list(self._generations.items()):
            generation.num_losses += 1
            if generation.num_losses >= _MAX_LOSSES:
                reason = f"The machines that computed this request were lost {_MAX_LOSSES} times in a row."
                generation.fail(GenerationError(reason))
                self.abort(seq)

    async def idle(self) -> None:
        """Wait until no generation is open."""
        while self._generations:
            await next(iter(self._generations.values())).ended.wait()

    def statistics(self) -> DriverStatistics:
        return DriverStatistics(
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    async def _send(self, link: Link) -> None:
        while True:
            self._work.clear()
            await self._send_steps(link)
            await self._work.wait()

    async def _send_steps(self, link: Link) -> None:
        """All steps that can be made now. Links take messages in the order of the calls, so both tasks may do this."""
        while (step := self._schedule()) is not None:
            self._num_steps += 1
            try:
                await link.send(StepFrame(step=step))
            except FrameError as error:  # nothing was sent; the sequence to blame is found as for any failed step
                failed = StepFailed(step=step.id, epoch=step.epoch, layers=(0, 0), reason=str(error))
                self.deliver(self._scheduler.fail(failed))

    def _schedule(self) -> Step | None:
        began_s = self._clock()
        if (step := self._scheduler.schedule()) is None:
            return None
        now_s = self._clock()
        for chunk in step.chunks:
            if (generation := self._generations.get(chunk.seq)) is not None:
                generation.scheduled(now_s, step.id)
        self._journal.mark(step.epoch, step.id, Point.SCHEDULING, began_s)
        self._journal.mark(step.epoch, step.id, Point.SCHEDULED, now_s)
        self._journal.describe(step.epoch, step.id, tuple([(chunk.seq, len(chunk.tokens)) for chunk in step.chunks]))
        return step

    async def _receive(self, link: Link, inbox: Inbox) -> None:
        journal = self._journal
        async for message in inbox:
            journal.mark_message(message, Point.COMPLETING)
            if isinstance(message, StepResult):
                updates = self._scheduler.complete(message)
            elif isinstance(message, StepFailed):
                log.warning("step %d failed on layers %d..%d: %s", message.step, *message.layers, message.reason)
                updates = self._scheduler.fail(message)
            else:
                raise TransportError("The last stage sent a step instead of a result.")
            journal.mark_message(message, Point.COMPLETED)
            # The next step leaves before anybody reads of this one: cores wait for steps, people for tokens. What the
            # scheduler has counted is delivered in any case, or a stream that goes on elsewhere would miss it.
            try:
                await self._send_steps(link)
            finally:
                self.deliver(updates)
                journal.mark_message(message, Point.DELIVERED)
        raise TransportError("The last stage closed its stream.")

    def deliver(self, updates: tuple[Update, ...]) -> None:
        """Put what the scheduler said into the outboxes of those it concerns."""
        now_s = self._clock()
        for update in updates:
            self._num_output_tokens += len(update.sampled)
            if (generation := self._generations.get(update.seq)) is None:
                continue
            generation.deliver(update, now_s)
            if update.finish is not None:
                del self._generations[update.seq]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverStatistics:
    """Counters since the driver was made."""

    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
