"""Any message survives the wire, and no bytes survive it that are not a message."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations_with_replacement, product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tllm.core.errors import FrameError
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
from tllm.testing.strategies import limited_messages, limits, step_frames, step_results
from tllm.transport import wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FRAME_HEADER_BYTES, FrameLimits, StageMessage, StepFrame
from tllm.transport.checks import check

LIMITS = FrameLimits(
    epoch=Epoch(7), hidden_size=4, dtype=DType.FLOAT32, max_tokens=8, max_chunks=4, max_blocks=4, vocab_size=100
)
CHUNK = Chunk(
    seq=SequenceId(1),
    start=3,
    tokens=(TokenId(5),),
    blocks=(BlockId(0),),
    sampling=SamplingState(params=SamplingParams(), position=4),
)
HIDDEN = Activation(data=bytes(16), dtype=DType.FLOAT32, shape=(1, 4))
FRAME = StepFrame(step=Step(id=StepId(1), epoch=Epoch(7), chunks=(CHUNK,)), hidden=HIDDEN)


def framed(metadata: bytes, body: bytes = b"", epoch: int = LIMITS.epoch) -> bytes:
    return struct.pack("<QII", epoch, len(body), len(metadata)) + body + metadata


def decode_or_refuse(data: bytes, agreed: FrameLimits) -> StageMessage | None:
    """Everything that `decode` may do: a message that keeps the rules and can be sent on, or FrameError."""
    try:
        message = wire.decode(data, agreed)
    except FrameError:
        return None
    check(message, agreed)
    assert wire.decode(wire.encode(message), agreed) == message
    return message


@given(limited_messages())
def test_every_message_arrives_as_it_was_sent(given_: tuple[FrameLimits, StageMessage]) -> None:
    agreed, message = given_
    check(message, agreed)
    data = wire.encode(message)
    assert len(data) <= agreed.max_frame_bytes
    assert wire.decode(data, agreed) == message


@given(limits())
def test_limits_arrive_as_they_were_sent(agreed: FrameLimits) -> None:
    assert wire.decode_hello(wire.encode_hello(agreed)) == agreed


@given(limited_messages(), st.data())
def test_a_truncated_or_prolonged_frame_is_refused(
    given_: tuple[FrameLimits, StageMessage], data: st.DataObject
) -> None:
    agreed, message = given_
    frame = wire.encode(message)
    with pytest.raises(FrameError):
        wire.decode(frame[: data.draw(st.integers(0, len(frame) - 1))], agreed)
    with pytest.raises(FrameError):
        wire.decode(frame + data.draw(st.binary(min_size=1, max_size=20)), agreed)


@settings(max_examples=300)
@given(limited_messages(), st.data())
def test_a_damaged_frame_is_refused_or_still_within_the_limits(
    given_: tuple[FrameLimits, StageMessage], data: st.DataObject
) -> None:
    agreed, message = given_
    frame = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        bit = data.draw(st.integers(0, 8 * len(frame) - 1))
        frame[bit // 8] ^= 1 << bit % 8
    decode_or_refuse(bytes(frame), agreed)


@settings(max_examples=300)
@given(st.binary(max_size=200))
@example(b"")
def test_random_bytes_are_refused_or_within_the_limits(data: bytes) -> None:
    decode_or_refuse(data, LIMITS)
    decode_or_refuse(framed(data), LIMITS)
    decode_or_refuse(framed(data, bytes(16)), LIMITS)
    with pytest.raises(FrameError):
        wire.decode_hello(b"\xff" + data)


NUMBERS = st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), max_size=4)
DOUBLES = st.lists(st.floats(), max_size=4)
SCORES = st.builds(pb.Scores, logprobs=DOUBLES, num_tops=NUMBERS, top_tokens=NUMBERS, top_logprobs=DOUBLES)
PARAMS = st.builds(
    pb.SamplingParams,
    temperature=st.floats(),
    bias_ids=NUMBERS,
    bias_values=DOUBLES,
    has_allowed_ids=st.booleans(),
    allowed_ids=NUMBERS,
    logprobs=st.none() | st.integers(0, 100),
).map(pb.SamplingParams.SerializeToString)
SAMPLINGS = st.builds(
    pb.SamplingState, params=PARAMS | st.binary(max_size=8), count_ids=NUMBERS, count_values=NUMBERS, prompt_ids=NUMBERS
).map(pb.SamplingState.SerializeToString)
STEPS = st.builds(
    pb.StepFrame,
    **dict.fromkeys(("copy_sources", "copy_targets", "copy_lengths", "seqs", "starts", "num_tokens"), NUMBERS),
    **dict.fromkeys(("tokens", "num_blocks", "blocks", "sampling_chunks", "scoring_chunks"), NUMBERS),
    **dict.fromkeys(("scoring_tops", "num_targets", "targets"), NUMBERS),
    samplings=st.lists(SAMPLINGS | st.binary(max_size=8), max_size=3),
    hidden=st.none() | st.builds(pb.Activation, dtype=st.sampled_from(["float32", "no"]), rows=st.integers(0, 2)),
).map(lambda step: pb.Frame(step=step))
RESULTS = st.builds(
    pb.StepResult,
    **dict.fromkeys(("seqs", "tokens", "logprob_rows", "scored_seqs", "scored_starts", "num_scores"), NUMBERS),
    logprobs=SCORES,
    scores=SCORES,
    failed_seqs=NUMBERS,
    failed_reasons=st.lists(st.text(max_size=5), max_size=3),
).map(lambda result: pb.Frame(result=result))
FAILURES = st.builds(pb.StepFailed, first_layer=st.integers(0, 5), last_layer=st.integers(0, 5)).map(
    lambda failed: pb.Frame(failed=failed)
)


@settings(max_examples=500)
@given(STEPS | RESULTS | FAILURES, st.binary(max_size=64))
def test_well_formed_protobuf_that_contradicts_itself_is_refused(frame: pb.Frame, body: bytes) -> None:
    decode_or_refuse(framed(frame.SerializeToString(), body), LIMITS)


STATE = SamplingState(
    params=SamplingParams(), position=4, counts=((TokenId(1), 2),), prompt_ids=(TokenId(3),), banned_ids=(TokenId(4),)
)
SCORING = Scoring(targets=(TokenId(6), TokenId(7)), top=1)
RICH_STEP = StepFrame(
    step=Step(
        id=StepId(1),
        epoch=Epoch(7),
        copies=(BlockCopy(source=BlockId(1), target=BlockId(2), length=3),),
        chunks=(
            replace(CHUNK, sampling=STATE),
            replace(CHUNK, seq=SequenceId(2), tokens=(TokenId(5), TokenId(6)), scoring=SCORING),
        ),
    ),
)
SCORE = Score(logprob=-1.0)
RICH_RESULT = StepResult(
    step=StepId(1),
    epoch=Epoch(7),
    sampled=(
        Sampled(seq=SequenceId(1), token=TokenId(1), logprob=-2.0),
        Sampled(seq=SequenceId(2), token=TokenId(2)),
        Sampled(seq=SequenceId(3), token=TokenId(3), logprob=-3.0),
    ),
    scored=(Scored(seq=SequenceId(4), start=0, scores=(SCORE, replace(SCORE, logprob=-4.0))),),
    failed=(SequenceFailed(seq=SequenceId(5), reason="logits are not finite"),),
)
TOP = (Logprob(token=TokenId(1), logprob=-1.0),)
RICHER_RESULT = replace(
    RICH_RESULT,
    sampled=(replace(RICH_RESULT.sampled[0], top=TOP), *RICH_RESULT.sampled[1:]),
    scored=(replace(RICH_RESULT.scored[0], scores=(replace(SCORE, top=TOP),)),),
)
CHANGES: tuple[Callable[[list[Any]], list[Any]], ...] = (
    lambda entries: entries[:-1],
    lambda entries: entries * 2,
    lambda entries: [type(entry)() for entry in entries],
    lambda entries: entries[::-1],
)


def column_of(frame: pb.Frame, path: tuple[str, ...]) -> Any:
    place: Any = frame
    for name in path:
        place = getattr(place, name)
    return place


def columns_of(frame: pb.Frame) -> list[tuple[str, ...]]:
    """Paths of all columns that have entries."""
    part = frame.WhichOneof("message")
    assert part is not None
    inner = [field.name for field in getattr(frame, part).DESCRIPTOR.fields]
    tables = [(part,), *((part, name) for name in ("logprobs", "scores") if name in inner)]
    return [
        (*table, field.name)
        for table in tables
        for field in column_of(frame, table).DESCRIPTOR.fields
        if field.is_repeated and len(column_of(frame, (*table, field.name)))
    ]


@pytest.mark.parametrize("message", [RICH_STEP, RICH_RESULT, RICHER_RESULT], ids=["step", "result", "alternatives"])
def test_a_frame_with_any_two_columns_changed_is_refused_or_within_the_limits(message: StageMessage) -> None:
    encoded = wire.encode(message)
    assert wire.decode(encoded, LIMITS) == message
    whole = pb.Frame.FromString(encoded[FRAME_HEADER_BYTES:])
    num_refused = 0
    for two in combinations_with_replacement(product(columns_of(whole), CHANGES), 2):
        frame = pb.Frame()
        frame.CopyFrom(whole)
        for path, change in two:
            column = column_of(frame, path)
            entries = change(list(column))
            del column[:]
            column.extend(entries)
        num_refused += decode_or_refuse(framed(frame.SerializeToString()), LIMITS) is None
    assert num_refused


@given(
    limits().flatmap(lambda agreed: st.tuples(st.just(agreed), step_frames(agreed) | step_results(agreed))), limits()
)
def test_senders_and_receivers_refuse_the_same_messages(
    given_: tuple[FrameLimits, StageMessage], others: FrameLimits
) -> None:
    agreed, message = given_
    others = replace(others, epoch=agreed.epoch)  # else nearly all are refused for their epoch
    try:
        check(message, others)
    except FrameError:
        with pytest.raises(FrameError):
            wire.decode(wire.encode(message), others)
    else:
        assert wire.decode(wire.encode(message), others) == message


@pytest.mark.parametrize(
    "limits_of_another_plan",
    [
        replace(LIMITS, epoch=Epoch(8)),
        replace(LIMITS, hidden_size=5),
        replace(LIMITS, hidden_size=2),
        replace(LIMITS, dtype=DType.BFLOAT16),
        replace(LIMITS, vocab_size=5),
    ],
    ids=["epoch", "wider", "narrower", "dtype", "vocabulary"],
)
def test_a_frame_of_another_plan_is_refused(limits_of_another_plan: FrameLimits) -> None:
    assert wire.decode(wire.encode(FRAME), LIMITS) == FRAME
    with pytest.raises(FrameError):
        wire.decode(wire.encode(FRAME), limits_of_another_plan)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(FRAME, hidden=replace(HIDDEN, dtype=DType.FLOAT16)),
        replace(FRAME, hidden=replace(HIDDEN, shape=(2, 4))),
        replace(FRAME, hidden=replace(HIDDEN, shape=(4, 1))),
        replace(FRAME, hidden=replace(HIDDEN, data=bytes(12))),
        replace(FRAME, step=replace(FRAME.step, chunks=(CHUNK, replace(CHUNK, start=9))), hidden=None),
        replace(FRAME, step=replace(FRAME.step, chunks=(replace(CHUNK, tokens=()),)), hidden=None),
        replace(FRAME, step=replace(FRAME.step, chunks=(replace(CHUNK, blocks=()),)), hidden=None),
        replace(FRAME, step=replace(FRAME.step, chunks=(replace(CHUNK, blocks=CHUNK.blocks * 5),)), hidden=None),
        replace(FRAME, step=replace(FRAME.step, chunks=(replace(CHUNK, tokens=CHUNK.tokens * 9),)), hidden=None),
        StepFailed(step=StepId(1), epoch=Epoch(7), layers=(4, 4), reason="empty run"),
    ],
    ids=["dtype", "rows", "columns", "bytes", "twice", "no-tokens", "no-blocks", "blocks", "tokens", "layers"],
)
def test_a_message_that_contradicts_itself_or_the_limits_is_refused(wrong: StageMessage) -> None:
    with pytest.raises(FrameError):
        check(wrong, LIMITS)
    with pytest.raises(FrameError):
        wire.decode(wire.encode(wrong), LIMITS)


@pytest.mark.parametrize(
    ("num_body_bytes", "num_metadata_bytes"),
    [(LIMITS.max_hidden_bytes + 1, 0), (0, LIMITS.max_metadata_bytes + 1)],
)
def test_an_oversized_frame_is_refused_by_its_header_alone(num_body_bytes: int, num_metadata_bytes: int) -> None:
    with pytest.raises(FrameError, match="where at most"):
        wire.decode(framed(bytes(num_metadata_bytes), bytes(num_body_bytes)), LIMITS)
    with pytest.raises(FrameError, match="where at most"):
        wire.frame_length(struct.pack("<QII", LIMITS.epoch, num_body_bytes, num_metadata_bytes), LIMITS)


@pytest.mark.parametrize("message", [replace(FRAME, hidden=None), RICH_RESULT], ids=["step", "result"])
def test_bytes_that_no_message_speaks_of_are_refused(message: StageMessage) -> None:
    metadata = wire.encode(message)[FRAME_HEADER_BYTES:]
    assert wire.decode(framed(metadata), LIMITS) == message
    with pytest.raises(FrameError, match="hidden states"):
        wire.decode(framed(metadata, bytes(16)), LIMITS)


def test_id_lists_longer_than_the_vocabulary_are_refused() -> None:
    too_many = tuple(TokenId(0) for _ in range(LIMITS.vocab_size + 1))
    params = replace(STATE.params, allowed_ids=too_many)
    for state in (
        replace(STATE, params=params),
        replace(STATE, prompt_ids=too_many),
        replace(STATE, banned_ids=too_many),
        replace(STATE, counts=tuple((token, 1) for token in too_many)),
    ):
        frame = replace(FRAME, step=replace(FRAME.step, chunks=(replace(CHUNK, sampling=state),)))
        with pytest.raises(FrameError):
            check(frame, LIMITS)
        with pytest.raises(FrameError):
            wire.decode(wire.encode(frame), LIMITS)


def test_a_frame_that_claims_billions_of_tokens_takes_no_memory_for_them() -> None:
    step = pb.StepFrame(seqs=[1], starts=[0], num_tokens=[2**32 - 1], num_blocks=[2**32 - 1], num_targets=[2**32 - 1])
    step.scoring_chunks.append(0)
    step.scoring_tops.append(0)
    claims = [
        framed(pb.Frame(step=step).SerializeToString()),
        struct.pack("<QII", LIMITS.epoch, 2**32 - 1, 2**32 - 1),
    ]
    tracemalloc.start()
    try:
        for data in claims:
            with pytest.raises(FrameError):
                wire.decode(data, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_hidden_states_are_not_copied_on_the_way_in_and_are_aligned() -> None:
    data = wire.encode(FRAME)
    message = wire.decode(data, LIMITS)
    assert isinstance(message, StepFrame)
    assert message.hidden is not None
    view = message.hidden.data
    assert isinstance(view, memoryview)
    assert view.obj is data
    assert data[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + view.nbytes] == view
    assert FRAME_HEADER_BYTES % 16 == 0


def test_a_number_without_a_place_on_the_wire_is_refused_by_the_sender() -> None:
    negative = replace(FRAME, step=replace(FRAME.step, chunks=(replace(CHUNK, start=-1),)))
    with pytest.raises(FrameError):
        wire.encode(negative)
    with pytest.raises(FrameError):
        wire.encode(replace(FRAME, step=replace(FRAME.step, epoch=Epoch(-1))))


def test_a_reason_that_is_long_or_not_text_does_not_keep_a_failure_from_being_told() -> None:
    failed = StepFailed(step=StepId(1), epoch=Epoch(7), layers=(0, 4), reason="\udc80" + "x" * 1_000_000)
    message = wire.decode(wire.encode(failed), LIMITS)
    assert isinstance(message, StepFailed)
    assert message.reason.startswith("?xxx")


def test_another_protocol_is_refused_by_name() -> None:
    hello = pb.Hello.FromString(wire.encode_hello(LIMITS))
    hello.protocol += 1
    with pytest.raises(FrameError, match=f"protocol {wire.PROTOCOL + 1}.*protocol {wire.PROTOCOL}"):
        wire.decode_hello(hello.SerializeToString())
