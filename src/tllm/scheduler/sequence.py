"""The scheduler's mutable record of answering one request.

Its positions, from the first token on:

    0 ......... computed ......... scheduled ......... len(tokens)
    │ confirmed  │ in flight        │ to be issued      │

A sequence has nothing to issue while `scheduled == len(tokens)`: its next token is on its way. One token to issue is a
decode, more are a prompt, or tokens to be computed again after preemption: nothing tells the two apart.

This file does not know other sequences, nor who gives the blocks.
"""

from __future__ import annotations

from collections.abc import MutableSequence

from tllm.core.types import BlockCopy, BlockId, Chunk, SamplingState, Score, Scoring, SequenceId, TokenId
from tllm.scheduler.policy import SequenceRequest
from tllm.scheduler.prefix_tree import Node


class Sequence:
    """One request under way. The scheduler and its KV account write the fields; methods only read, unless they say so.

    `version` grows whenever chunks in flight become void: with a failure, a preemption, a reset, or the end.
    """

    __slots__ = (
        "blocks",
        "computed",
        "copy",
        "counts",
        "id",
        "is_decoding",
        "is_reported",
        "is_suspect",
        "limit",
        "node",
        "num_cached",
        "num_kept",
        "num_matched",
        "num_positions",
        "num_preemptions",
        "num_prompt",
        "order",
        "params",
        "prompt_ids",
        "queue",
        "salt",
        "samples",
        "scheduled",
        "score_top",
        "scores",
        "stop_ids",
        "tokens",
        "version",
        "was_admitted",
    )

    def __init__(self, seq: SequenceId, request: SequenceRequest, context_limit: int) -> None:
        params = request.params
        self.id = seq
        self.params = params
        self.order = (request.priority, seq)  # who is served first
        self.salt = request.salt
        self.tokens: list[TokenId] = list(request.prompt)  # prompt and output
        self.num_prompt = len(request.prompt)
        self.limit = 0  # tokens, at which it ends
        self.set_context_limit(context_limit)
        self.samples = params.max_tokens > 0
        self.stop_ids = frozenset(params.stop_ids)

        # Progress. See the head of this file.
        self.computed = 0
        self.scheduled = 0
        self.version = 0
        self.queue: MutableSequence[Sequence] | None = None  # the one it stands in, if any
        self.is_decoding = False  # all is computed but the token sampled last
        self.is_suspect = False  # a step with it failed, and it has not succeeded since
        self.was_admitted = False
        self.is_reported = False  # it has had an update
        self.num_cached = 0
        self.num_preemptions = 0

        # KV. Blocks 0 .. num_kept - 1 are full, confirmed, and the tree's own; `node` is the last of them.
        self.blocks: tuple[BlockId, ...] = ()
        self.num_positions = 0  # that the blocks have room for
        self.node: Node | None = None
        self.num_kept = 0
        self.num_matched = 0  # of these, those found in the tree when it was admitted
        self.copy: BlockCopy | None = None  # to be done with the first chunk; its source is held until that succeeds

        # What sampling needs of the past.
        penalizes_repetition = params.repetition_penalty != 1.0
        penalizes = penalizes_repetition or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self.counts: dict[TokenId, int] | None = {} if penalizes else None
        self.prompt_ids = tuple(sorted(set(request.prompt))) if penalizes_repetition else ()

        # Prompt log-probabilities: those of positions 1 .. computed, until they are delivered; then None.
        self.score_top = request.prompt_logprobs
        self.scores: list[Score] | None = None if request.prompt_logprobs is None else []

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_to_issue(self) -> int:
        return len(self.tokens) - self.scheduled

    def set_context_limit(self, context_limit: int) -> None:
        """Writes `limit`: the number of tokens at which the sequence ends with LENGTH."""
        self.limit = min(self.num_prompt + self.params.max_tokens, context_limit)

    def append(self, token: TokenId) -> None:
        """Writes: the sampled token is the sequence's next."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts[token] = self.counts.get(token, 0) + 1

    def chunk(self, num_tokens: int) -> Chunk:
        """Writes `scheduled`: the next `num_tokens` positions are in flight with the chunk that is returned."""
        start, tokens = self.scheduled, self.tokens
        self.scheduled = stop = start + num_tokens
        return Chunk(
            seq=self.id,
            start=start,
            tokens=(tokens[start],) if num_tokens == 1 else tuple(tokens[start:stop]),
            blocks=self.blocks,
            sampling=self._sampling() if stop == len(tokens) and self.samples else None,
            scoring=None if self.scores is None else self._scoring(start, stop),
        )

    def void(self) -> None:
        """Writes: nothing in flight counts any more, and what is not confirmed is to be issued again."""
        self.version += 1
        self.scheduled = self.computed

    def void_all(self) -> None:
        """Writes: nothing is computed any more; tokens are all that is left, and the scores that were delivered."""
        self.computed = 0
        self.is_decoding = self.is_suspect = False
        if self.scores is not None:
            self.scores.clear()
        self.void()

    def _sampling(self) -> SamplingState:
        tokens, params = self.tokens, self.params
        must_go_on = params.min_tokens > len(tokens) - self.num_prompt
        if self.counts is None and not must_go_on:
            return SamplingState(params=params, position=len(tokens))
        return SamplingState(
            params=params,
            position=len(tokens),
            counts=() if self.counts is None else tuple(self.counts.items()),
            prompt_ids=self.prompt_ids,
            banned_ids=params.stop_ids if must_go_on else (),
        )

    def _scoring(self, start: int, stop: int) -> Scoring | None:
        # Scores are delivered before the first output token, so all tokens are the prompt's here.
        targets = tuple(self.tokens[start + 1 : stop + 1])
        assert self.score_top is not None
        return Scoring(targets=targets, top=self.score_top) if targets else None
