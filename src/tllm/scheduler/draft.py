"""A step being put together within its budgets.

This file does not know which sequences should be in it.
"""

from __future__ import annotations

from tllm.core.types import BlockCopy, Chunk, Epoch, Step, StepId
from tllm.scheduler.sequence import Sequence

# A chunk in flight, its sequence, and the sequence's version when it was issued: another version now means void.
Entry = tuple[Sequence, int, Chunk]


class Draft:
    """At most `num_tokens` in all; of them `num_prompt_tokens` of prompts, and of each prompt `prefill_chunk`."""

    __slots__ = ("_chunks", "_copies", "_num_prompt_tokens", "_num_tokens", "_prefill_chunk", "entries")

    def __init__(self, *, num_tokens: int, num_prompt_tokens: int, prefill_chunk: int) -> None:
        self._num_tokens = num_tokens  # that may still be added
        self._num_prompt_tokens = min(num_tokens, num_prompt_tokens)
        self._prefill_chunk = prefill_chunk
        self._copies: list[BlockCopy] = []
        self._chunks: list[Chunk] = []
        self.entries: list[Entry] = []

    @property
    def has_prompt_room(self) -> bool:
        return self._num_prompt_tokens > 0

    def add(self, seq: Sequence) -> bool:
        """Issue as many of the sequence's tokens as the budgets allow. False: none."""
        if seq.is_decoding:
            num = min(1, self._num_tokens)
        else:
            num = min(seq.num_to_issue, self._num_prompt_tokens, self._prefill_chunk)
            self._num_prompt_tokens -= num
        if num == 0:
            return False
        self._num_tokens -= num
        if self._num_prompt_tokens > self._num_tokens:
            self._num_prompt_tokens = self._num_tokens
        chunk = seq.chunk(num)
        if seq.copy is not None and chunk.start == seq.computed:  # its first chunk, or again after a failure
            self._copies.append(seq.copy)
        self._chunks.append(chunk)
        self.entries.append((seq, seq.version, chunk))
        return True

    def step(self, step: StepId, epoch: Epoch) -> Step:
        return Step(id=step, epoch=epoch, copies=tuple(self._copies), chunks=tuple(self._chunks))
