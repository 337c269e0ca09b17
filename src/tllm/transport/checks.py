"""What a message between stages must satisfy, whoever made it: one list of rules for senders and receivers.

    every message   belongs to the epoch of the link
    step            at most max_chunks chunks and copies, max_tokens tokens, max_blocks blocks per chunk; chunks and
                    block tables are not empty; no sequence has two chunks; ids are of the vocabulary
    hidden states   (tokens of the step, hidden_size), of the agreed type, and as many bytes as that takes
    sampling        numbers are finite; no set of tokens is larger than the vocabulary
    result          at most max_chunks samples and max_tokens scores; alternatives only beside a log-probability
    failure         names a run of layers

This file does not know bytes on the wire, sockets, or block sizes: whether a table covers its positions is the
engine's to see.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, isnan

from tllm.core.errors import FrameError
from tllm.core.types import (
    Activation,
    Chunk,
    Codec,
    Epoch,
    Logprob,
    SamplingState,
    Scoring,
    StepFailed,
    StepResult,
)
from tllm.transport.base import MAX_TOP, FrameLimits, StageMessage, StepFrame


def check(message: StageMessage, limits: FrameLimits) -> None:
    """Raise FrameError when the message breaks a rule; the error names the rule, never tokens."""
    match message:
        case StepFrame():
            check_epoch(message.step.epoch, limits)
            _check_step(message, limits)
        case StepResult():
            check_epoch(message.epoch, limits)
            _check_result(message, limits)
        case StepFailed():
            check_epoch(message.epoch, limits)
            first_layer, last_layer = message.layers
            if not 0 <= first_layer < last_layer:
                raise FrameError(f"layers {first_layer}..{last_layer} are not a run of layers")


def check_epoch(epoch: Epoch, limits: FrameLimits) -> None:
    """Raise FrameError for another plan's message."""
    if epoch != limits.epoch:
        raise FrameError(f"a message of epoch {epoch} on a link of epoch {limits.epoch}")


def at_most(what: str, number: int, most: int) -> None:
    """Raise FrameError when there are more than agreed."""
    if number > most:
        raise FrameError(f"{number} {what}, where at most {most} were agreed")


def _check_step(frame: StepFrame, limits: FrameLimits) -> None:
    step = frame.step
    at_most("block copies", len(step.copies), limits.max_chunks)
    at_most("chunks", len(step.chunks), limits.max_chunks)
    for chunk in step.chunks:
        _check_chunk(chunk, limits)
    at_most("tokens", step.num_tokens, limits.max_tokens)
    if len({chunk.seq for chunk in step.chunks}) != len(step.chunks):
        raise FrameError("two chunks of one step belong to the same sequence")
    if frame.hidden is not None:
        _check_hidden(frame.hidden, step.num_tokens, limits)


def _check_chunk(chunk: Chunk, limits: FrameLimits) -> None:
    if not chunk.tokens or not chunk.blocks:
        raise FrameError("a chunk without tokens or without blocks")
    at_most("blocks of a chunk", len(chunk.blocks), limits.max_blocks)
    _check_ids(chunk.tokens, limits)
    if chunk.sampling is not None:
        _check_sampling(chunk.sampling, limits)
    if chunk.scoring is not None:
        _check_scoring(chunk.scoring, len(chunk.tokens), limits)


def _check_scoring(scoring: Scoring, num_rows: int, limits: FrameLimits) -> None:
    if not num_rows - 1 <= len(scoring.targets) <= num_rows:
        raise FrameError(f"{len(scoring.targets)} scoring targets for {num_rows} rows")
    at_most("alternatives", scoring.top, MAX_TOP)
    _check_ids(scoring.targets, limits)


def _check_sampling(state: SamplingState, limits: FrameLimits) -> None:
    params = state.params
    numbers = (
        params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
    )
    if not all(map(isfinite, numbers)) or not all(isfinite(bias) for _, bias in params.logit_bias):
        raise FrameError("a sampling parameter is not a finite number")
    if params.logprobs is not None:
        at_most("alternatives", params.logprobs, MAX_TOP)
    for pairs in (params.logit_bias, state.counts):
        if pairs:
            _check_set([token for token, _ in pairs], limits)
    for ids in (params.allowed_ids, params.stop_ids, state.prompt_ids, state.banned_ids):
        if ids:
            _check_set(ids, limits)


def _check_hidden(hidden: Activation, num_rows: int, limits: FrameLimits) -> None:
    if hidden.codec is not Codec.RAW:
        raise FrameError(f"hidden states are coded as {hidden.codec}, where raw was agreed")
    if hidden.dtype is not limits.dtype:
        raise FrameError(f"hidden states are {hidden.dtype}, where {limits.dtype} was agreed")
    if hidden.shape != (num_rows, limits.hidden_size):
        raise FrameError(f"hidden states of shape {hidden.shape} for {num_rows} tokens of {limits.hidden_size}")
    num_bytes = memoryview(hidden.data).nbytes
    if num_bytes != num_rows * limits.hidden_size * limits.dtype.num_bytes:
        raise FrameError(f"{num_bytes} bytes of hidden states do not fill {hidden.shape} of {hidden.dtype}")


def _check_result(result: StepResult, limits: FrameLimits) -> None:
    at_most("samples", len(result.sampled), limits.max_chunks)
    at_most("scored sequences", len(result.scored), limits.max_chunks)
    at_most("failed sequences", len(result.failed), limits.max_chunks)
    at_most("scores", sum(len(scored.scores) for scored in result.scored), limits.max_tokens)
    _check_ids([sampled.token for sampled in result.sampled], limits)
    for sampled in result.sampled:
        if sampled.logprob is not None:
            _check_logprob(sampled.logprob, sampled.top, limits)
        elif sampled.top:
            raise FrameError("a token has alternatives but no log-probability")
    for scored in result.scored:
        for score in scored.scores:
            _check_logprob(score.logprob, score.top, limits)


def _check_logprob(logprob: float, top: tuple[Logprob, ...], limits: FrameLimits) -> None:
    at_most("alternatives", len(top), MAX_TOP)
    if isnan(logprob) or any(isnan(other.logprob) for other in top):
        raise FrameError("a log-probability is not a number")
    _check_ids([other.token for other in top], limits)


def _check_set(ids: Sequence[int], limits: FrameLimits) -> None:
    at_most("ids in a set of tokens", len(ids), limits.vocab_size)
    _check_ids(ids, limits)


def _check_ids(ids: Sequence[int], limits: FrameLimits) -> None:
    if ids and (min(ids) < 0 or max(ids) >= limits.vocab_size):
        raise FrameError(f"a token id outside the vocabulary of {limits.vocab_size}")
