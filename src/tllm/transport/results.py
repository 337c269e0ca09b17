"""What comes home from a step as columns, and back.

This file does not know how a frame is framed, nor all that a result must satisfy.
"""

from __future__ import annotations

from tllm.core.errors import FrameError
from tllm.core.types import (
    Epoch,
    Logprob,
    Sampled,
    Score,
    Scored,
    SequenceFailed,
    SequenceId,
    StepFailed,
    StepId,
    StepResult,
    TokenId,
)
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import MAX_TOP, FrameLimits
from tllm.transport.checks import at_most
from tllm.transport.columns import (
    check_places,
    clean,
    cut,
    need,
    same_length,
    token_ids,
)


def fill_result(out: pb.StepResult, result: StepResult) -> None:
    out.step = result.step
    out.seqs.extend([sampled.seq for sampled in result.sampled])
    out.tokens.extend([sampled.token for sampled in result.sampled])
    for index, sampled in enumerate(result.sampled):
        if sampled.logprob is not None:
            out.logprob_rows.append(index)
            _append_score(out.logprobs, sampled.logprob, sampled.top)
        elif sampled.top:
            raise FrameError("a token has alternatives but no log-probability")
    for scored in result.scored:
        out.scored_seqs.append(scored.seq)
        out.scored_starts.append(scored.start)
        out.num_scores.append(len(scored.scores))
        for score in scored.scores:
            _append_score(out.scores, score.logprob, score.top)
    for failed in result.failed:
        out.failed_seqs.append(failed.seq)
        out.failed_reasons.append(clean(failed.reason))
    out.SetInParent()


def _append_score(out: pb.Scores, logprob: float, top: tuple[Logprob, ...]) -> None:
    out.logprobs.append(logprob)
    out.num_tops.append(len(top))
    if top:
        out.top_tokens.extend([other.token for other in top])
        out.top_logprobs.extend([other.logprob for other in top])


def fill_failed(out: pb.StepFailed, failed: StepFailed) -> None:
    out.step = failed.step
    out.first_layer, out.last_layer = failed.layers
    out.reason = clean(failed.reason)
    out.SetInParent()


def read_result(result: pb.StepResult, epoch: Epoch, limits: FrameLimits) -> StepResult:
    num_sampled = same_length("samples", limits.max_chunks, result.seqs, result.tokens)
    logprobs: list[Score | None] = [None] * num_sampled
    rows = check_places(result.logprob_rows, num_sampled)
    need(len(result.logprobs.logprobs) == len(rows), "log-probabilities without samples, or the reverse")
    for index, score in zip(rows, _scores(result.logprobs, len(rows)), strict=True):
        logprobs[index] = score
    sampled = tuple(
        Sampled(seq=SequenceId(seq), token=TokenId(token))
        if score is None
        else Sampled(seq=SequenceId(seq), token=TokenId(token), logprob=score.logprob, top=score.top)
        for seq, token, score in zip(result.seqs, result.tokens, logprobs, strict=True)
    )
    columns = (result.scored_seqs, result.scored_starts, result.num_scores)
    same_length("scored sequences", limits.max_chunks, *columns)
    scores = cut(_scores(result.scores, limits.max_tokens), result.num_scores)
    scored = tuple(
        Scored(seq=SequenceId(seq), start=start, scores=some)
        for seq, start, some in zip(result.scored_seqs, result.scored_starts, scores, strict=True)
    )
    same_length("failed sequences", limits.max_chunks, result.failed_seqs, result.failed_reasons)
    failed = tuple(
        SequenceFailed(seq=SequenceId(seq), reason=reason)
        for seq, reason in zip(result.failed_seqs, result.failed_reasons, strict=True)
    )
    return StepResult(
        step=StepId(result.step),
        epoch=epoch,
        sampled=sampled,
        scored=scored,
        failed=failed,
    )


def _scores(scores: pb.Scores, most: int) -> list[Score]:
    same_length("scores", most, scores.logprobs, scores.num_tops)
    at_most("alternatives", len(scores.top_tokens), most * MAX_TOP)
    need(len(scores.top_tokens) == len(scores.top_logprobs), "alternatives without log-probabilities, or the reverse")
    top = [
        Logprob(token=token, logprob=logprob)
        for token, logprob in zip(token_ids(scores.top_tokens), scores.top_logprobs, strict=True)
    ]
    return [
        Score(logprob=logprob, top=some)
        for logprob, some in zip(scores.logprobs, cut(top, scores.num_tops), strict=True)
    ]


def read_failed(failed: pb.StepFailed, epoch: Epoch) -> StepFailed:
    layers = (failed.first_layer, failed.last_layer)
    return StepFailed(step=StepId(failed.step), epoch=epoch, layers=layers, reason=failed.reason)
