"""A step as columns, and back.

Parameters of sampling do not change while a sequence lives, yet travel with each of its tokens: both ends remember the
encoded form of those they saw lately.

This file does not know how a frame is framed, nor all that a step must satisfy.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import cast

from google.protobuf.message import DecodeError

from tllm.core.errors import FrameError
from tllm.core.types import (
    Activation,
    BlockCopy,
    BlockId,
    Chunk,
    Epoch,
    SamplingParams,
    SamplingState,
    Scoring,
    SequenceId,
    Step,
    StepId,
)
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FrameLimits, StepFrame
from tllm.transport.checks import at_most
from tllm.transport.columns import (
    check_places,
    cut,
    need,
    parse_codec,
    parse_dtype,
    same_length,
    token_ids,
)

_MEMO_ENTRIES = 4096
_MEMO_MAX_BYTES = 512  # larger parameters are coded anew every time: they would fill the memo


def fill_step(out: pb.StepFrame, frame: StepFrame) -> None:
    step = frame.step
    out.id = step.id
    if step.copies:
        out.copy_sources.extend([copy.source for copy in step.copies])
        out.copy_targets.extend([copy.target for copy in step.copies])
        out.copy_lengths.extend([copy.length for copy in step.copies])
    chunks = step.chunks
    out.seqs.extend([chunk.seq for chunk in chunks])
    out.starts.extend([chunk.start for chunk in chunks])
    out.num_tokens.extend([len(chunk.tokens) for chunk in chunks])
    out.tokens.extend(list(chain.from_iterable([chunk.tokens for chunk in chunks])))
    out.num_blocks.extend([len(chunk.blocks) for chunk in chunks])
    out.blocks.extend(list(chain.from_iterable([chunk.blocks for chunk in chunks])))
    for index, chunk in enumerate(chunks):
        if chunk.sampling is not None:
            out.sampling_chunks.append(index)
            out.samplings.append(_encode_sampling(chunk.sampling))
        if chunk.scoring is not None:
            out.scoring_chunks.append(index)
            out.scoring_tops.append(chunk.scoring.top)
            out.num_targets.append(len(chunk.scoring.targets))
            out.targets.extend(chunk.scoring.targets)
    if (hidden := frame.hidden) is not None:
        rows, columns = hidden.shape
        out.hidden.dtype, out.hidden.rows, out.hidden.columns, out.hidden.codec = (
            hidden.dtype,
            rows,
            columns,
            hidden.codec,
        )
    out.SetInParent()


def _encode_sampling(state: SamplingState) -> bytes:
    params = state.params
    out = pb.SamplingState(
        params=_encode_params(params) if params.logit_bias or params.allowed_ids else _encode_small_params(params),
        position=state.position,
    )
    if state.counts:
        out.count_ids.extend([token for token, _ in state.counts])
        out.count_values.extend([count for _, count in state.counts])
    if state.prompt_ids:
        out.prompt_ids.extend(state.prompt_ids)
    if state.banned_ids:
        out.banned_ids.extend(state.banned_ids)
    return out.SerializeToString()


def _encode_params(params: SamplingParams) -> bytes:
    return pb.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        bias_ids=[token for token, _ in params.logit_bias],
        bias_values=[bias for _, bias in params.logit_bias],
        has_allowed_ids=params.allowed_ids is not None,
        allowed_ids=params.allowed_ids or (),
        seed=params.seed,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_ids=params.stop_ids,
        logprobs=params.logprobs,
    ).SerializeToString()


# A sequence sends the same parameters with every token; both ends remember the recent ones.
_encode_small_params = lru_cache(maxsize=_MEMO_ENTRIES)(_encode_params)


def read_step(step: pb.StepFrame, body: memoryview, epoch: Epoch, limits: FrameLimits) -> StepFrame:
    at_most("tokens", len(step.tokens), limits.max_tokens)
    num_chunks = same_length("chunks", limits.max_chunks, step.seqs, step.starts, step.num_tokens, step.num_blocks)
    samplings: list[SamplingState | None] = [None] * num_chunks
    scorings: list[Scoring | None] = [None] * num_chunks
    if step.sampling_chunks or step.samplings:
        same_length("sampled chunks", num_chunks, step.sampling_chunks, step.samplings)
        for index, state in zip(check_places(step.sampling_chunks, num_chunks), step.samplings, strict=True):
            samplings[index] = _sampling(state)
    if step.scoring_chunks or step.targets:
        same_length("scored chunks", num_chunks, step.scoring_chunks, step.scoring_tops, step.num_targets)
        at_most("scoring targets", len(step.targets), limits.max_tokens)
        targets = cut(token_ids(step.targets), step.num_targets)
        places = check_places(step.scoring_chunks, num_chunks)
        for index, top, some in zip(places, step.scoring_tops, targets, strict=True):
            scorings[index] = Scoring(targets=some, top=top)
    at_most("block ids", len(step.blocks), limits.max_chunks * limits.max_blocks)
    chunks = tuple(
        Chunk(seq=SequenceId(seq), start=start, tokens=tokens, blocks=blocks, sampling=sampling, scoring=scoring)
        for seq, start, tokens, blocks, sampling, scoring in zip(
            step.seqs,
            step.starts,
            cut(token_ids(step.tokens), step.num_tokens),
            cut(cast("list[BlockId]", list(step.blocks)), step.num_blocks),
            samplings,
            scorings,
            strict=True,
        )
    )
    same_length("block copies", limits.max_chunks, step.copy_sources, step.copy_targets, step.copy_lengths)
    copies = tuple(
        BlockCopy(source=BlockId(source), target=BlockId(target), length=length)
        for source, target, length in zip(step.copy_sources, step.copy_targets, step.copy_lengths, strict=True)
    )
    hidden = None
    if step.HasField("hidden"):
        sent = step.hidden
        hidden = Activation(
            data=body, dtype=parse_dtype(sent.dtype), shape=(sent.rows, sent.columns), codec=parse_codec(sent.codec)
        )
    else:
        need(not body, "a step with bytes of hidden states but no shape for them")
    return StepFrame(
        step=Step(id=StepId(step.id), epoch=epoch, copies=copies, chunks=chunks),
        hidden=hidden,
    )


def _sampling(data: bytes) -> SamplingState:
    try:
        state = pb.SamplingState.FromString(data)
        params = (_small_params if len(state.params) <= _MEMO_MAX_BYTES else _params)(state.params)
    except DecodeError as error:
        raise FrameError("a chunk's sampling state is damaged") from error
    need(len(state.count_ids) == len(state.count_values), "penalty counts without ids, or ids without counts")
    return SamplingState(
        params=params,
        position=state.position,
        counts=tuple(zip(token_ids(state.count_ids), state.count_values, strict=True)) if state.count_ids else (),
        prompt_ids=tuple(token_ids(state.prompt_ids)),
        banned_ids=tuple(token_ids(state.banned_ids)),
    )


def _params(data: bytes) -> SamplingParams:
    params = pb.SamplingParams.FromString(data)
    need(len(params.bias_ids) == len(params.bias_values), "logit biases without ids, or ids without biases")
    need(params.has_allowed_ids or not params.allowed_ids, "allowed ids where all are allowed")
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=tuple(zip(token_ids(params.bias_ids), params.bias_values, strict=True)),
        allowed_ids=tuple(token_ids(params.allowed_ids)) if params.has_allowed_ids else None,
        seed=params.seed,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_ids=tuple(token_ids(params.stop_ids)),
        logprobs=params.logprobs if params.HasField("logprobs") else None,
    )


_small_params = lru_cache(maxsize=_MEMO_ENTRIES)(_params)
