"""The seam between processes: messages to one peer, in order, at most once, with backpressure.

A link goes one way. Down the pipeline it carries `StepFrame`; the last stage's link home carries `StepResult`; a stage
that fails sends `StepFailed`, which the stages after it pass on untouched, so that the head hears of every step in
the order in which it sent them.

This file does not know sockets, encodings, models or what the messages are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tllm.core.types import Activation, DType, Epoch, Step, StepFailed, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFrame:
    """A step on its way: `hidden` is None only before the first stage."""

    step: Step
    hidden: Activation | None = None


StageMessage = StepFrame | StepResult | StepFailed

MAX_TOP = 32  # alternatives beside one token's log-probability
FRAME_HEADER_BYTES = 16
_MAX_METADATA_BYTES = 64 << 20
_POSITIONS_PER_BLOCK = 64  # for an estimate of how long a context is: the block size is not part of the limits


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLimits:
    """What two neighbours agreed on when a plan was rolled out. Whatever exceeds it is refused before it is read."""

    epoch: Epoch
    hidden_size: int
    dtype: DType
    max_tokens: int  # of a step
    max_chunks: int  # of a step
    max_blocks: int  # of a chunk: blocks of the longest context
    vocab_size: int

    @property
    def max_hidden_bytes(self) -> int:
        """The hidden states of a full step."""
        return self.max_tokens * self.hidden_size * self.dtype.num_bytes

    @property
    def max_metadata_bytes(self) -> int:
        """Everything else: ids, block tables, sampling, scores. An upper bound of what a scheduler can produce, up to
        64 MiB: a step whose penalty counts, biases and allowed ids take more than that is refused."""
        tokens = self.max_tokens * (2 * 10 + 16 * (1 + MAX_TOP))  # id, scoring target, and their alternatives
        tables = self.max_chunks * self.max_blocks * 5
        # A chunk carries each distinct id of its context at most twice: among the prompt's and among the counts.
        ids = self.max_chunks * 10 * min(self.vocab_size, _POSITIONS_PER_BLOCK * self.max_blocks)
        fixed = self.max_chunks * 16384 + 16 * self.vocab_size + 65536
        return min(tokens + tables + ids + fixed, _MAX_METADATA_BYTES)

    @property
    def max_frame_bytes(self) -> int:
        """An upper bound of any encoded message."""
        return FRAME_HEADER_BYTES + self.max_hidden_bytes + self.max_metadata_bytes


class Link(Protocol):
    """Messages to one peer."""

    async def send(self, message: StageMessage) -> None:
        """Hand a message over; waits while the peer is slow. Raises TransportError when the peer is gone, and then
        always: a link that broke stays broken. Raises FrameError, sending nothing, for what exceeds the limits."""

    async def aclose(self) -> None:
        """Close after what was handed over is sent, within a deadline. Idempotent, never raises."""
