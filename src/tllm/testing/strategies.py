"""Hypothesis strategies for everything that crosses a link: valid messages within given limits.

This file does not know how messages are encoded.
"""

from __future__ import annotations

from typing import TypeVar

from hypothesis import strategies as st

from tllm.core.types import (
    Activation,
    BlockCopy,
    BlockId,
    Chunk,
    DType,
    Epoch,
    Logprob,
    Sampled,
    SamplingParams,
    SamplingState,
    Score,
    Scored,
    Scoring,
    SequenceFailed,
    SequenceId,
    Step,
    StepFailed,
    StepId,
    StepResult,
    TokenId,
)
from tllm.transport.base import MAX_TOP, FrameLimits, StageMessage, StepFrame

T = TypeVar("T")

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
LOGPROBS = st.floats(allow_nan=False)
REASONS = st.text(max_size=40)


def limits() -> st.SearchStrategy[FrameLimits]:
    """Small ones, so that their edges are met."""
    return st.builds(
        FrameLimits,
        epoch=U64.map(Epoch),
        hidden_size=st.integers(1, 8),
        dtype=st.sampled_from(DType),
        max_tokens=st.integers(1, 12),
        max_chunks=st.integers(1, 6),
        max_blocks=st.integers(1, 5),
        vocab_size=st.integers(1, 300),
    )


def tokens(agreed: FrameLimits, *, min_size: int = 0, max_size: int = 8) -> st.SearchStrategy[tuple[TokenId, ...]]:
    token = st.integers(0, agreed.vocab_size - 1).map(TokenId)
    return st.lists(token, min_size=min_size, max_size=max_size).map(tuple)


def pairs(agreed: FrameLimits, values: st.SearchStrategy[T]) -> st.SearchStrategy[tuple[tuple[TokenId, T], ...]]:
    """At most one value for each of some token ids."""
    ids = st.integers(0, agreed.vocab_size - 1).map(TokenId)
    return st.dictionaries(ids, values, max_size=6).map(lambda values: tuple(values.items()))


def token_sets(agreed: FrameLimits) -> st.SearchStrategy[tuple[TokenId, ...]]:
    return tokens(agreed).map(lambda ids: tuple(dict.fromkeys(ids)))


def sampling_params(agreed: FrameLimits) -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        SamplingParams,
        temperature=NUMBERS,
        top_k=U32,
        top_p=NUMBERS,
        min_p=NUMBERS,
        presence_penalty=NUMBERS,
        frequency_penalty=NUMBERS,
        repetition_penalty=NUMBERS,
        logit_bias=pairs(agreed, NUMBERS),
        allowed_ids=st.none() | token_sets(agreed),
        seed=U64,
        max_tokens=U32,
        min_tokens=U32,
        stop_ids=token_sets(agreed),
        logprobs=st.none() | st.integers(0, MAX_TOP),
    )


def sampling_states(agreed: FrameLimits) -> st.SearchStrategy[SamplingState]:
    return st.builds(
        SamplingState,
        params=sampling_params(agreed),
        position=U32,
        counts=pairs(agreed, U32),
        prompt_ids=token_sets(agreed),
        banned_ids=token_sets(agreed),
    )


@st.composite
def chunks(draw: st.DrawFn, agreed: FrameLimits, seq: int, num_tokens: int) -> Chunk:
    blocks = st.lists(U32.map(BlockId), min_size=1, max_size=agreed.max_blocks).map(tuple)
    scoring = None
    if draw(st.booleans()):
        num_targets = draw(st.integers(num_tokens - 1, num_tokens))
        targets = draw(tokens(agreed, min_size=num_targets, max_size=num_targets))
        scoring = Scoring(targets=targets, top=draw(st.integers(0, MAX_TOP)))
    return Chunk(
        seq=SequenceId(seq),
        start=draw(U32),
        tokens=draw(tokens(agreed, min_size=num_tokens, max_size=num_tokens)),
        blocks=draw(blocks),
        sampling=draw(st.none() | sampling_states(agreed)),
        scoring=scoring,
    )


@st.composite
def step_frames(draw: st.DrawFn, agreed: FrameLimits) -> StepFrame:
    room = agreed.max_tokens
    parts = []
    for seq in draw(st.lists(U64, max_size=agreed.max_chunks, unique=True)):
        if room == 0:
            break
        num_tokens = draw(st.integers(1, room))
        room -= num_tokens
        parts.append(draw(chunks(agreed, seq, num_tokens)))
    copy = st.builds(BlockCopy, source=U32.map(BlockId), target=U32.map(BlockId), length=U32)
    step = Step(
        id=StepId(draw(U64)),
        epoch=agreed.epoch,
        copies=tuple(draw(st.lists(copy, max_size=agreed.max_chunks))),
        chunks=tuple(parts),
    )
    hidden = None
    if draw(st.booleans()):
        num_bytes = step.num_tokens * agreed.hidden_size * agreed.dtype.num_bytes
        data = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
        hidden = Activation(data=data, dtype=agreed.dtype, shape=(step.num_tokens, agreed.hidden_size))
    return StepFrame(step=step, hidden=hidden)


def alternatives(agreed: FrameLimits) -> st.SearchStrategy[tuple[Logprob, ...]]:
    token = st.integers(0, agreed.vocab_size - 1).map(TokenId)
    return st.lists(st.builds(Logprob, token=token, logprob=LOGPROBS), max_size=MAX_TOP).map(tuple)


def samples(agreed: FrameLimits) -> st.SearchStrategy[Sampled]:
    seq, token = U64.map(SequenceId), st.integers(0, agreed.vocab_size - 1).map(TokenId)
    return st.builds(Sampled, seq=seq, token=token) | st.builds(
        Sampled, seq=seq, token=token, logprob=LOGPROBS, top=alternatives(agreed)
    )


@st.composite
def step_results(draw: st.DrawFn, agreed: FrameLimits) -> StepResult:
    score = st.builds(Score, logprob=LOGPROBS, top=alternatives(agreed))
    room = agreed.max_tokens
    scored = []
    for seq in draw(st.lists(U64, max_size=agreed.max_chunks)):
        scores = tuple(draw(st.lists(score, max_size=room)))
        room -= len(scores)
        scored.append(Scored(seq=SequenceId(seq), start=draw(U32), scores=scores))
    failed = st.builds(SequenceFailed, seq=U64.map(SequenceId), reason=REASONS)
    return StepResult(
        step=StepId(draw(U64)),
        epoch=agreed.epoch,
        sampled=tuple(draw(st.lists(samples(agreed), max_size=agreed.max_chunks))),
        scored=tuple(scored),
        failed=tuple(draw(st.lists(failed, max_size=agreed.max_chunks))),
    )


@st.composite
def step_failures(draw: st.DrawFn, agreed: FrameLimits) -> StepFailed:
    first_layer = draw(st.integers(0, 2**32 - 2))
    last_layer = draw(st.integers(first_layer + 1, 2**32 - 1))
    return StepFailed(
        step=StepId(draw(U64)), epoch=agreed.epoch, layers=(first_layer, last_layer), reason=draw(REASONS)
    )


def messages(agreed: FrameLimits) -> st.SearchStrategy[StageMessage]:
    """Any message that a link with these limits must carry."""
    return st.one_of(step_frames(agreed), step_results(agreed), step_failures(agreed))


def limited_messages() -> st.SearchStrategy[tuple[FrameLimits, StageMessage]]:
    """Limits, and a message within them."""
    return limits().flatmap(lambda agreed: st.tuples(st.just(agreed), messages(agreed)))
