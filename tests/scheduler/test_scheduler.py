"""The scheduler's decisions, one by one. What holds under any interleaving is in properties/test_scheduler.py.

This file does not know KV: a result here says whatever the test wants.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path

import pytest

from tllm.core.errors import ConfigError, ContextLengthError, QueueFullError, RequestError
from tllm.core.types import (
    BlockCopy,
    Epoch,
    FinishReason,
    Sampled,
    SamplingParams,
    Score,
    Scored,
    SequenceFailed,
    SequenceId,
    Step,
    StepFailed,
    StepResult,
    TokenId,
)
from tllm.scheduler import scheduler as scheduler_module
from tllm.scheduler.scheduler import Scheduler, SchedulerConfig, SequenceRequest, Update

STOP = TokenId(99)


def make(**limits: object) -> Scheduler:
    defaults: dict[str, object] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 128,
        "max_batch_tokens": 32,
        "mixed_prefill_tokens": 32,
        "watermark": 0.0,
    }
    return Scheduler(SchedulerConfig(**(defaults | limits)))  # type: ignore[arg-type]


def request(prompt: int | Iterable[int] = 4, max_tokens: int = 8, **more: object) -> SequenceRequest:
    """`prompt`: token ids, or how many, all different from those of any other length."""
    ids = range(1000 * prompt, 1000 * prompt + prompt) if isinstance(prompt, int) else prompt
    fields = {name: more.pop(name) for name in ("prompt_logprobs", "priority", "salt") if name in more}
    params = SamplingParams(max_tokens=max_tokens, **more)  # type: ignore[arg-type]
    return SequenceRequest(prompt=tuple(map(TokenId, ids)), params=params, **fields)  # type: ignore[arg-type]


def must(scheduler: Scheduler) -> Step:
    scheduler.check()
    step = scheduler.schedule()
    scheduler.check()
    assert step is not None
    return step


def answer(scheduler: Scheduler, step: Step, token: int = 7) -> tuple[Update, ...]:
    sampled = tuple(Sampled(seq=chunk.seq, token=TokenId(token)) for chunk in step.chunks if chunk.sampling is not None)
    scored = tuple(
        Scored(seq=each.seq, start=each.start, scores=tuple(Score(logprob=-float(t)) for t in each.scoring.targets))
        for each in step.chunks
        if each.scoring is not None
    )
    updates = scheduler.complete(StepResult(step=step.id, epoch=step.epoch, sampled=sampled, scored=scored))
    scheduler.check()
    return updates


def failure(step: Step, reason: str = "out of memory") -> StepFailed:
    return StepFailed(step=step.id, epoch=step.epoch, layers=(0, 4), reason=reason)


def finish(scheduler: Scheduler) -> list[Update]:
    """Answer one step at a time until nothing is left."""
    updates: list[Update] = []
    while (step := scheduler.schedule()) is not None:
        updates += answer(scheduler, step)
    assert scheduler.statistics().num_running == scheduler.statistics().num_waiting == 0
    return updates


def shape(step: Step) -> list[tuple[int, int, int]]:
    """Sequence, start, number of tokens of each chunk."""
    return [(chunk.seq, chunk.start, len(chunk.tokens)) for chunk in step.chunks]


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    scheduler = make(max_model_len=16)
    with pytest.raises(ContextLengthError, match="16 tokens, but the prompt has 16"):
        scheduler.add(request(16))
    scheduler.add(request(15))
    scheduler.add(request(16, max_tokens=0))  # only scored: needs no room


def test_a_prompt_that_never_fits_into_the_blocks_is_refused() -> None:
    scheduler = make(num_blocks=3)
    with pytest.raises(RequestError, match=r"13 tokens.*room for 12"):
        scheduler.add(request(13))
    scheduler.add(request(12))


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler = make(max_waiting=2)
    scheduler.add(request())
    scheduler.add(request())
    with pytest.raises(QueueFullError, match="2 requests are waiting") as caught:
        scheduler.add(request())
    assert caught.value.retry_after_s > 0
    must(scheduler)
    scheduler.add(request())


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        make().add(request([]))


@pytest.mark.parametrize(
    "wrong", [{"num_blocks": 0}, {"watermark": 1.0}, {"prefill_chunk": 0}, {"mixed_prefill_tokens": 0}]
)
def test_a_config_without_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make(**wrong)


# ---- batches -----------------------------------------------------------------------------------------------------


def test_a_decode_is_a_chunk_of_one_token() -> None:
    scheduler = make()
    seq = scheduler.add(request(6))
    step = must(scheduler)
    assert shape(step) == [(seq, 0, 6)]
    assert step.chunks[0].sampling is not None
    assert step.chunks[0].sampling.position == 6
    answer(scheduler, step, token=5)
    step = must(scheduler)
    assert shape(step) == [(seq, 6, 1)]
    assert step.chunks[0].tokens == (5,)
    assert step.chunks[0].sampling is not None
    assert step.chunks[0].sampling.position == 7


def test_only_the_chunk_that_ends_the_prompt_samples() -> None:
    scheduler = make(max_batch_tokens=8)
    seq = scheduler.add(request(20))
    chunks = []
    for _ in range(3):
        step = must(scheduler)
        chunks += step.chunks
        answer(scheduler, step)
    assert [(each.start, len(each.tokens)) for each in chunks] == [(0, 8), (8, 8), (16, 4)]
    assert [each.sampling is not None for each in chunks] == [False, False, True]
    assert all(each.seq == seq for each in chunks)


def test_decodes_come_before_prompts_and_prompts_share_what_is_left() -> None:
    scheduler = make(max_batch_tokens=8)
    old = scheduler.add(request(4))
    answer(scheduler, must(scheduler))
    big, small = scheduler.add(request(20)), scheduler.add(request(3))
    assert shape(must_and_answer(scheduler)) == [(old, 4, 1), (big, 0, 7)]
    assert shape(must_and_answer(scheduler)) == [(old, 5, 1), (big, 7, 7)]
    assert shape(must_and_answer(scheduler)) == [(old, 6, 1), (big, 14, 6), (small, 0, 1)]


def must_and_answer(scheduler: Scheduler) -> Step:
    step = must(scheduler)
    answer(scheduler, step)
    return step


def test_prompts_are_throttled_while_anybody_decodes() -> None:
    scheduler = make(max_batch_tokens=32, mixed_prefill_tokens=5)
    prompt = scheduler.add(request(30))
    assert shape(must_and_answer(scheduler)) == [(prompt, 0, 30)], "nobody decodes yet"
    other = scheduler.add(request(12))
    assert shape(must_and_answer(scheduler)) == [(prompt, 30, 1), (other, 0, 5)]


def test_prompts_that_are_only_scored_throttle_nobody() -> None:
    scheduler = make(max_batch_tokens=8, mixed_prefill_tokens=1, max_steps_in_flight=2)
    scheduler.add(request(8, max_tokens=1))
    scheduler.add(request(7, max_tokens=1))
    assert [must(scheduler).num_tokens, must(scheduler).num_tokens] == [8, 7]


def test_chunks_of_one_prompt_overlap_along_the_pipeline() -> None:
    scheduler = make(prefill_chunk=8, max_steps_in_flight=3)
    seq = scheduler.add(request(20))
    steps = [must(scheduler) for _ in range(3)]
    assert [shape(step) for step in steps] == [[(seq, 0, 8)], [(seq, 8, 8)], [(seq, 16, 4)]]
    assert scheduler.schedule() is None
    assert answer(scheduler, steps[0]) == answer(scheduler, steps[1]) == ()
    (update,) = answer(scheduler, steps[2])
    assert update.sampled


def test_a_sequence_decodes_in_one_step_at_a_time() -> None:
    scheduler = make(max_steps_in_flight=3)
    scheduler.add(request())
    step = must(scheduler)
    assert scheduler.schedule() is None
    answer(scheduler, step)
    must(scheduler)
    assert scheduler.schedule() is None


def test_decodes_are_spread_evenly_over_the_steps_in_flight() -> None:
    scheduler = make(max_steps_in_flight=4, max_batch_tokens=64)
    for _ in range(9):
        scheduler.add(request())
    answer(scheduler, must(scheduler))
    steps = [must(scheduler) for _ in range(4)]
    assert [len(step.chunks) for step in steps] == [3, 2, 2, 2]
    for _ in range(4):  # and stay so
        answer(scheduler, steps.pop(0))
        steps.append(must(scheduler))
    assert sorted(len(step.chunks) for step in steps) == [2, 2, 2, 3]


def test_groups_that_grew_uneven_become_even_again() -> None:
    scheduler = make(max_steps_in_flight=2, max_batch_tokens=64)
    for _ in range(2):
        scheduler.add(request(max_tokens=50))
    answer(scheduler, must(scheduler))
    first, second = must(scheduler), must(scheduler)
    for _ in range(6):
        scheduler.add(request(max_tokens=50))
    answer(scheduler, first)
    third = must(scheduler)  # one decode and six prompts
    answer(scheduler, second)
    fourth = must(scheduler)
    for _ in range(2):
        answer(scheduler, third)
        third = must(scheduler)
        answer(scheduler, fourth)
        fourth = must(scheduler)
    assert [len(third.chunks), len(fourth.chunks)] == [4, 4]


def test_at_most_so_many_sequences_run() -> None:
    scheduler = make(max_sequences=2)
    for _ in range(3):
        scheduler.add(request(2))
    assert len(must_and_answer(scheduler).chunks) == 2
    assert (scheduler.statistics().num_running, scheduler.statistics().num_waiting) == (2, 1)


# ---- who is served -----------------------------------------------------------------------------------------------


def test_small_requests_do_not_pass_a_big_one() -> None:
    scheduler = make(num_blocks=10)
    first = scheduler.add(request(24, max_tokens=2))
    answer(scheduler, must(scheduler))
    big = scheduler.add(request(30, max_tokens=1))
    small = scheduler.add(request(3, max_tokens=1))
    assert shape(must_and_answer(scheduler)) == [(first, 24, 1)]
    assert shape(must(scheduler)) == [(big, 0, 30), (small, 0, 2)]


def test_smaller_priority_runs_first_then_the_older() -> None:
    scheduler = make(max_sequences=1)
    late, b, c, urgent = (scheduler.add(request(max_tokens=1, priority=priority)) for priority in (5, 0, 0, -1))
    served = []
    while (step := scheduler.schedule()) is not None:
        served.append(step.chunks[0].seq)
        answer(scheduler, step)
    assert served == [urgent, b, c, late]


def test_admission_leaves_the_watermark_to_those_who_run() -> None:
    scheduler = make(num_blocks=10, watermark=0.2)
    scheduler.add(request(16))
    scheduler.add(request(17))  # 5 of the 6 blocks that are left
    assert len(must_and_answer(scheduler).chunks) == 1


def test_a_sequence_alone_may_use_the_watermark() -> None:
    scheduler = make(num_blocks=10, watermark=0.2, max_batch_tokens=64)
    seq = scheduler.add(request(40))
    assert shape(must(scheduler)) == [(seq, 0, 40)]


def test_the_youngest_gives_its_blocks_up_and_continues_where_it_was() -> None:
    scheduler = make(num_blocks=4, prefix_cache=False)
    old, young = scheduler.add(request(8, max_tokens=5)), scheduler.add(request(7, max_tokens=5))
    answer(scheduler, must(scheduler), token=1)
    step = must(scheduler)  # the old one needs a third block
    assert shape(step) == [(old, 8, 1)]
    assert scheduler.statistics().num_preemptions == 1
    updates = list(answer(scheduler, step, token=2))
    while len(updates) < 4:
        updates += answer(scheduler, must(scheduler), token=2)
    assert updates[-1].finish is FinishReason.LENGTH
    step = must(scheduler)
    assert shape(step) == [(young, 0, 8)]
    assert step.chunks[0].tokens[-1] == 1, "the token it had sampled is part of it"
    (update,) = answer(scheduler, step)
    assert update.num_preemptions == 1


def test_low_priority_is_preempted_before_the_young() -> None:
    scheduler = make(num_blocks=4, prefix_cache=False)
    low = scheduler.add(request(7, priority=1))
    answer(scheduler, must(scheduler))
    young = scheduler.add(request(8))
    assert shape(must_and_answer(scheduler)) == [(low, 7, 1), (young, 0, 8)]
    assert shape(must_and_answer(scheduler)) == [(young, 8, 1)]
    assert scheduler.statistics().num_preemptions == 1


def test_what_a_preempted_sequence_sampled_in_flight_is_sampled_again() -> None:
    scheduler = make(num_blocks=4, prefix_cache=False, max_steps_in_flight=2)
    old, young = scheduler.add(request(7, max_tokens=9)), scheduler.add(request(7, max_tokens=9))
    answer(scheduler, must(scheduler), token=1)
    first, second = must(scheduler), must(scheduler)
    assert [shape(first), shape(second)] == [[(old, 7, 1)], [(young, 7, 1)]]
    answer(scheduler, first, token=2)
    third = must(scheduler)  # the old one takes the young one's blocks while the young one is under way
    assert shape(third) == [(old, 8, 1)]
    assert scheduler.statistics().num_preemptions == 1
    assert answer(scheduler, second, token=2) == ()
    answer(scheduler, third)
    while (step := must(scheduler)).chunks[0].seq == old:
        answer(scheduler, step)
    assert shape(step) == [(young, 0, 8)]
    assert step.chunks[0].tokens[-1] == 1


# ---- how a sequence ends -----------------------------------------------------------------------------------------


def test_max_tokens_ends_with_length() -> None:
    scheduler = make()
    scheduler.add(request(max_tokens=3))
    updates = finish(scheduler)
    assert [update.finish for update in updates] == [None, None, FinishReason.LENGTH]
    assert [update.first_scheduled for update in updates] == [True, False, False]


def test_a_full_context_ends_with_length() -> None:
    scheduler = make(max_model_len=10)
    scheduler.add(request(8, max_tokens=50))
    assert [update.finish for update in finish(scheduler)] == [None, FinishReason.LENGTH]


def test_full_memory_ends_with_length() -> None:
    scheduler = make(num_blocks=2)
    scheduler.add(request(6, max_tokens=50))
    assert len(finish(scheduler)) == 3, "positions 6 and 7, and the last token is not computed"


def test_a_stop_id_ends_and_is_named() -> None:
    scheduler = make()
    scheduler.add(request(stop_ids=(STOP,)))
    answer(scheduler, must(scheduler))
    (update,) = answer(scheduler, must(scheduler), token=STOP)
    assert (update.finish, update.stop_id, update.sampled[0].token) == (FinishReason.STOP, STOP, STOP)
    assert scheduler.schedule() is None


def test_stop_ids_are_banned_before_min_tokens() -> None:
    scheduler = make()
    scheduler.add(request(stop_ids=(STOP,), min_tokens=2))
    banned = []
    for _ in range(3):
        step = must(scheduler)
        assert step.chunks[0].sampling is not None
        banned.append(step.chunks[0].sampling.banned_ids)
        answer(scheduler, step)
    assert banned == [(STOP,), (STOP,), ()]


def test_penalties_bring_counts_and_only_repetition_brings_the_prompt() -> None:
    scheduler = make()
    scheduler.add(request([3, 1, 3], repetition_penalty=1.2))
    scheduler.add(request([3, 1, 3], frequency_penalty=0.2))
    scheduler.add(request([3, 1, 3]))
    for token in (7, 8, 7):
        answer(scheduler, must(scheduler), token=token)
    states = [chunk.sampling for chunk in must(scheduler).chunks]
    assert [dict(state.counts) for state in states if state] == [{7: 2, 8: 1}, {7: 2, 8: 1}, {}]
    assert [state.prompt_ids for state in states if state] == [(1, 3), (), ()]


def test_scoring_alone_ends_after_the_prompt_and_samples_nothing() -> None:
    scheduler = make(max_batch_tokens=4)
    scheduler.add(request([10, 11, 12, 13, 14, 15], max_tokens=0, prompt_logprobs=2))
    step = must(scheduler)
    assert step.chunks[0].scoring is not None
    assert (step.chunks[0].scoring.targets, step.chunks[0].scoring.top) == ((11, 12, 13, 14), 2)
    assert answer(scheduler, step) == ()
    step = must(scheduler)
    assert step.chunks[0].sampling is None
    (update,) = answer(scheduler, step)
    assert (update.finish, update.sampled) == (FinishReason.LENGTH, ())
    assert update.scores == tuple(Score(logprob=-float(token)) for token in (11, 12, 13, 14, 15))


def test_scores_come_once_with_the_first_token() -> None:
    scheduler = make()
    scheduler.add(request([10, 11, 12], max_tokens=2, prompt_logprobs=0))
    updates = finish(scheduler)
    assert [update.scores is not None for update in updates] == [True, False]
    assert updates[0].sampled


def test_a_prompt_of_one_token_has_no_scores() -> None:
    scheduler = make()
    scheduler.add(request([10], max_tokens=1, prompt_logprobs=0))
    assert finish(scheduler)[0].scores == ()


def test_a_scored_prompt_is_computed_whole_but_may_be_shared() -> None:
    scheduler = make()
    for _ in range(2):
        scheduler.add(request(range(12), max_tokens=1, prompt_logprobs=0))
        assert finish(scheduler)[0].num_cached_tokens == 0
    scheduler.add(request(range(12), max_tokens=1))
    assert finish(scheduler)[0].num_cached_tokens == 11


def test_an_aborted_sequence_returns_its_blocks_at_once() -> None:
    scheduler = make(prefix_cache=False)
    seq = scheduler.add(request())
    waiting = scheduler.add(request(3))
    scheduler.abort(waiting)
    step = must(scheduler)
    assert shape(step) == [(seq, 0, 4)]
    scheduler.abort(seq)
    scheduler.abort(seq)
    scheduler.abort(SequenceId(12345))
    statistics = scheduler.statistics()
    assert statistics.num_free_blocks == statistics.num_blocks
    assert answer(scheduler, step) == ()
    assert scheduler.schedule() is None


# ---- the prefix tree ---------------------------------------------------------------------------------------------


def test_a_second_turn_finds_the_first_one_with_its_answer() -> None:
    scheduler = make()
    scheduler.add(request(range(6), max_tokens=4))
    finish(scheduler)  # 6 + 4 tokens, of which the last is not computed
    scheduler.add(request([*range(6), 7, 7, 7, 7, 50, 51], max_tokens=1))
    step = must(scheduler)
    (chunk,) = step.chunks
    assert (chunk.start, chunk.tokens) == (9, (7, 50, 51))
    assert step.copies == (BlockCopy(source=step.copies[0].source, target=chunk.blocks[2], length=1),)
    (update,) = answer(scheduler, step)
    assert update.num_cached_tokens == 9
    statistics = scheduler.statistics()
    assert (statistics.num_prefix_query_tokens, statistics.num_prefix_hit_tokens) == (18, 9)


def test_a_prompt_known_to_the_last_token_computes_only_that() -> None:
    scheduler = make()
    scheduler.add(request(range(8), max_tokens=4))
    finish(scheduler)
    scheduler.add(request(range(8), max_tokens=1))
    step = must(scheduler)
    assert (step.chunks[0].start, step.chunks[0].tokens) == (7, (7,))
    assert step.copies[0].length == 3


def test_nothing_that_is_not_confirmed_is_found() -> None:
    scheduler = make(max_steps_in_flight=2)
    scheduler.add(request(range(8)))
    step = must(scheduler)
    scheduler.add(request(range(8)))
    assert must(scheduler).chunks[0].start == 0
    scheduler.fail(failure(step))
    scheduler.add(request(range(8)))
    scheduler.check()


def test_twins_that_ran_side_by_side_end_up_with_one_copy() -> None:
    scheduler = make()
    for _ in range(3):
        scheduler.add(request(range(8), max_tokens=3))
    answer(scheduler, must(scheduler))
    assert scheduler.statistics().num_held_blocks == 2


def test_the_source_of_a_copy_is_held_until_the_copy_is_confirmed() -> None:
    scheduler = make(num_blocks=4, max_steps_in_flight=2)
    scheduler.add(request([1, 2, 3, 4, 5, 6], max_tokens=1))
    finish(scheduler)
    scheduler.add(request([1, 2, 3, 4, 5, 9], max_tokens=3))
    step = must(scheduler)
    assert step.copies
    assert scheduler.statistics().num_held_blocks == 3
    scheduler.fail(failure(step))
    scheduler.check()
    again = must(scheduler)
    assert again.copies == step.copies, "it is not known whether the copy was made"
    answer(scheduler, again)
    assert scheduler.statistics().num_held_blocks == 2
    assert not must(scheduler).copies


def test_only_the_first_of_overlapping_chunks_brings_the_copy() -> None:
    scheduler = make(prefill_chunk=4, max_steps_in_flight=2)
    scheduler.add(request(range(6), max_tokens=1))
    finish(scheduler)
    scheduler.add(request([*range(6), *range(50, 60)]))
    assert [len(must(scheduler).copies), len(must(scheduler).copies)] == [1, 0]


def test_a_hit_never_keeps_a_sequence_from_fitting() -> None:
    scheduler = make(num_blocks=3)
    scheduler.add(request(range(11), max_tokens=1))
    finish(scheduler)
    scheduler.add(request([0, 1, *range(50, 60)], max_tokens=1))  # needs all three blocks, one of them would be copied
    assert finish(scheduler)[0].finish is FinishReason.LENGTH


def test_without_the_cache_nothing_is_kept() -> None:
    scheduler = make(prefix_cache=False)
    for _ in range(2):
        scheduler.add(request(range(8)))
        assert finish(scheduler)[0].num_cached_tokens == 0
        statistics = scheduler.statistics()
        assert statistics.num_free_blocks == statistics.num_blocks


def test_salts_keep_tenants_apart() -> None:
    scheduler = make()
    for salt in ("alice", "bob", "bob"):
        scheduler.add(request(range(8), max_tokens=1, salt=salt))
        update = finish(scheduler)[0]
    assert scheduler.statistics().num_prefix_hit_tokens == update.num_cached_tokens == 7


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_poisoned_request_fails_alone() -> None:
    scheduler = make()
    good = [scheduler.add(request(max_tokens=3)) for _ in range(3)]
    poison = scheduler.add(request(5))
    good += [scheduler.add(request(max_tokens=3)) for _ in range(3)]
    ended: dict[SequenceId, Update] = {}
    num_steps = 0
    while (step := scheduler.schedule()) is not None:
        num_steps += 1
        is_bad = any(chunk.seq == poison for chunk in step.chunks)
        updates = scheduler.fail(failure(step, "bad weather")) if is_bad else answer(scheduler, step)
        scheduler.check()
        ended |= {update.seq: update for update in updates if update.finish is not None}
    assert ended[poison].finish is FinishReason.ERROR
    assert "bad weather" in ended[poison].reason
    assert all(ended[seq].finish is FinishReason.LENGTH for seq in good)
    assert num_steps < 15, "halves, not one by one"


def test_one_failure_of_a_lonely_sequence_is_forgiven() -> None:
    scheduler = make()
    scheduler.add(request(max_tokens=2))
    assert scheduler.fail(failure(must(scheduler))) == ()
    assert [update.finish for update in finish(scheduler)] == [None, FinishReason.LENGTH]


def test_a_second_failure_in_a_row_is_not() -> None:
    scheduler = make()
    seq = scheduler.add(request())
    assert scheduler.fail(failure(must(scheduler))) == ()
    (update,) = scheduler.fail(failure(must(scheduler), "again"))
    assert (update.seq, update.finish) == (seq, FinishReason.ERROR)
    assert "again" in update.reason
    assert scheduler.statistics().num_held_blocks == 0


def test_success_clears_suspicion() -> None:
    scheduler = make()
    scheduler.add(request(max_tokens=5))
    for _ in range(4):
        assert scheduler.fail(failure(must(scheduler))) == ()
        answer(scheduler, must(scheduler))


def test_the_chunks_behind_a_failed_one_are_void_and_no_evidence() -> None:
    scheduler = make(prefill_chunk=4, max_steps_in_flight=3)
    seq = scheduler.add(request(12, max_tokens=1))
    first, second, third = must(scheduler), must(scheduler), must(scheduler)
    assert scheduler.fail(failure(first)) == ()
    assert scheduler.fail(failure(second, "missing KV")) == ()
    assert answer(scheduler, third) == (), "computed from what was not there"
    step = must(scheduler)
    assert shape(step) == [(seq, 0, 4)]
    answer(scheduler, step)
    assert finish(scheduler)[-1].finish is FinishReason.LENGTH


def test_a_failure_that_follows_from_another_makes_nobody_a_suspect() -> None:
    scheduler = make(prefill_chunk=4, max_steps_in_flight=2)
    prompt = scheduler.add(request(8))
    first = must(scheduler)
    bystander = scheduler.add(request(3))
    second = must(scheduler)
    assert shape(second) == [(prompt, 4, 4), (bystander, 0, 3)]
    scheduler.fail(failure(first))
    scheduler.fail(failure(second, "missing KV"))
    other = scheduler.add(request(2))
    together = [{chunk.seq for chunk in must(scheduler).chunks} for _ in range(2)]
    assert {prompt} in together, "the only suspect is tried alone"
    assert {bystander, other} in together


def test_confirmed_chunks_before_a_failed_one_are_not_computed_again() -> None:
    scheduler = make(prefill_chunk=4, max_steps_in_flight=3)
    seq = scheduler.add(request(12))
    first, second, third = must(scheduler), must(scheduler), must(scheduler)
    answer(scheduler, first)
    scheduler.fail(failure(second))
    assert scheduler.schedule() is None, "the third step is spoilt, and comes home first"
    scheduler.fail(failure(third, "missing KV"))
    assert shape(must(scheduler)) == [(seq, 4, 4)]


def test_failures_that_follow_from_failures_do_not_go_on_for_ever() -> None:
    """Every stage refuses what goes on from missing KV; the prompts' chunks are always under way side by side."""
    scheduler = make(prefill_chunk=4, max_batch_tokens=12, mixed_prefill_tokens=12, max_steps_in_flight=4)
    poison, *good = (scheduler.add(request(length, max_tokens=4)) for length in (18, 19, 23, 30))
    written: Counter[SequenceId] = Counter()
    steps: deque[Step] = deque()
    ended: dict[SequenceId, FinishReason] = {}
    for _ in range(200):
        while (step := scheduler.schedule()) is not None:
            steps.append(step)
        if not steps:
            break
        step = steps.popleft()
        is_bad = any(chunk.start > written[chunk.seq] or (chunk.seq == poison and chunk.start) for chunk in step.chunks)
        for chunk in step.chunks:
            written[chunk.seq] = chunk.start + (0 if is_bad else len(chunk.tokens))
        updates = scheduler.fail(failure(step)) if is_bad else answer(scheduler, step)
        ended |= {update.seq: update.finish for update in updates if update.finish is not None}
    assert ended == {poison: FinishReason.ERROR} | dict.fromkeys(good, FinishReason.LENGTH)


def test_nobody_is_blamed_for_a_suspect_that_was_aborted_on_trial() -> None:
    scheduler = make()
    poison, good = scheduler.add(request(5)), scheduler.add(request(6, max_tokens=2))
    more = [scheduler.add(request(length)) for length in (2, 3)]
    scheduler.fail(failure(must(scheduler)))
    step = must(scheduler)
    assert [chunk.seq for chunk in step.chunks] == [poison, good]
    scheduler.abort(poison)
    assert scheduler.fail(failure(step)) == ()
    for seq in more:
        scheduler.abort(seq)
    assert [update.finish for update in finish(scheduler)] == [None, FinishReason.LENGTH]


def test_others_go_on_while_suspects_are_tried() -> None:
    scheduler = make(max_steps_in_flight=2)
    suspects = [scheduler.add(request(max_tokens=50)) for _ in range(2)]
    bad = must(scheduler)
    others = [scheduler.add(request(max_tokens=50)) for _ in range(2)]
    answer(scheduler, must(scheduler))
    scheduler.fail(failure(bad))
    steps = [must_and_answer(scheduler) for _ in range(4)]
    assert any({chunk.seq for chunk in step.chunks} & set(others) for step in steps[:2])
    assert any({chunk.seq for chunk in step.chunks} == set(suspects[:1]) for step in steps), "apart from all others"


def test_suspects_are_tried_although_there_is_always_other_work() -> None:
    scheduler = make(max_steps_in_flight=2)
    suspect = scheduler.add(request(max_tokens=50))
    bad = must(scheduler)
    for _ in range(2):
        scheduler.add(request(max_tokens=50))
    answer(scheduler, must(scheduler))
    scheduler.fail(failure(bad))
    steps = [must_and_answer(scheduler) for _ in range(3)]
    assert any(chunk.seq == suspect for step in steps for chunk in step.chunks)


def test_a_sequence_named_as_failed_ends_alone_and_leaves_nothing_in_the_tree() -> None:
    scheduler = make(max_batch_tokens=64)
    bad, good = scheduler.add(request(9)), scheduler.add(request(10))
    step = must(scheduler)
    result = StepResult(
        step=step.id,
        epoch=step.epoch,
        sampled=(Sampled(seq=good, token=TokenId(1)),),
        failed=(SequenceFailed(seq=bad, reason="logits are not finite"),),
    )
    by_seq = {update.seq: update for update in scheduler.complete(result)}
    scheduler.check()
    assert (by_seq[bad].finish, by_seq[bad].reason) == (FinishReason.ERROR, "logits are not finite")
    assert by_seq[good].finish is None
    scheduler.add(request(9, max_tokens=1))
    assert all(update.num_cached_tokens == 0 for update in finish(scheduler))


def test_chunks_confirmed_before_a_sequence_failed_leave_the_tree_too() -> None:
    scheduler = make(prefill_chunk=4)
    seq = scheduler.add(request(12))
    answer(scheduler, must(scheduler))
    assert scheduler.statistics().num_held_blocks == 3
    step = must(scheduler)
    scheduler.complete(
        StepResult(step=step.id, epoch=step.epoch, failed=(SequenceFailed(seq=seq, reason="not finite"),))
    )
    assert scheduler.statistics().num_free_blocks == 64


def test_a_missing_token_or_score_fails_its_sequence_alone() -> None:
    scheduler = make()
    unsampled, unscored, good = (
        scheduler.add(request()),
        scheduler.add(request(prompt_logprobs=0)),
        scheduler.add(request()),
    )
    step = must(scheduler)
    sampled = tuple(Sampled(seq=seq, token=TokenId(1)) for seq in (unscored, good))
    updates = scheduler.complete(StepResult(step=step.id, epoch=step.epoch, sampled=sampled))
    scheduler.check()
    assert {update.seq for update in updates if update.finish is FinishReason.ERROR} == {unsampled, unscored}


def test_results_of_no_step_in_flight_are_ignored_and_counted() -> None:
    scheduler = make()
    scheduler.add(request())
    step = must(scheduler)
    wrong = StepResult(step=step.id, epoch=Epoch(2))
    assert scheduler.complete(wrong) == ()
    answer(scheduler, step)
    assert answer(scheduler, step) == ()
    assert scheduler.fail(failure(step)) == ()
    assert scheduler.statistics().num_stale_results == 3


def test_a_result_without_the_one_before_it_is_not_believed() -> None:
    scheduler = make(prefill_chunk=4, max_steps_in_flight=2)
    seq = scheduler.add(request(8))
    first, second = must(scheduler), must(scheduler)
    assert answer(scheduler, second) == ()
    assert shape(must(scheduler)) == [(seq, 0, 4)]
    assert answer(scheduler, first) == ()


# ---- epochs ------------------------------------------------------------------------------------------------------


def test_after_a_reset_everything_goes_on_from_its_tokens() -> None:
    scheduler = make()
    seq = scheduler.add(request(4, max_tokens=4))
    answer(scheduler, must(scheduler), token=5)
    old = must(scheduler)
    assert scheduler.reset(Epoch(2)) == ()
    assert answer(scheduler, old) == ()
    step = must(scheduler)
    assert (step.epoch, shape(step)) == (2, [(seq, 0, 5)])
    assert step.id > old.id
    assert step.chunks[0].tokens[-1] == 5
    assert [len(update.sampled) for update in (*answer(scheduler, step), *finish(scheduler))] == [1, 1, 1]


def test_a_reset_to_less_memory_ends_what_no_longer_fits() -> None:
    scheduler = make(max_batch_tokens=64)
    talking, listening = scheduler.add(request(20)), scheduler.add(request(21))
    scheduler.add(request(3, max_tokens=50))
    answer(scheduler, must(scheduler))
    silent = scheduler.add(request(22))
    by_seq = {update.seq: update for update in scheduler.reset(Epoch(2), num_blocks=5)}
    scheduler.check()
    assert by_seq[talking].finish is by_seq[listening].finish is FinishReason.LENGTH
    assert by_seq[silent].finish is FinishReason.ERROR
    assert "22 tokens" in by_seq[silent].reason
    assert len(finish(scheduler)) == 21 - 4, "ends when the memory is full"
    with pytest.raises(RequestError):
        scheduler.add(request(21))


def test_a_reset_to_another_pipeline_takes_its_steps_and_chunks() -> None:
    scheduler = make(max_batch_tokens=16)
    scheduler.add(request(12))
    assert [shape(must(scheduler)), scheduler.schedule()] == [[(1, 0, 12)], None]
    scheduler.reset(Epoch(2), max_steps_in_flight=2, prefill_chunk=8)
    assert [shape(must(scheduler)), shape(must(scheduler))] == [[(1, 0, 8)], [(1, 8, 4)]]


def test_an_epoch_cannot_be_repeated() -> None:
    with pytest.raises(AssertionError):
        make().reset(Epoch(1))


# ---- purity ------------------------------------------------------------------------------------------------------


def test_the_scheduler_imports_nothing_but_words_and_containers() -> None:
    allowed = {"__future__", "bisect", "collections", "dataclasses", "heapq", "operator"}
    directory = Path(scheduler_module.__file__).parent
    for path in directory.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                is_ours = name.startswith(("tllm.core", "tllm.scheduler"))
                assert is_ours or name.split(".")[0] in allowed, f"{path.name} imports {name}"
    assert "tllm.scheduler.scheduler" in sys.modules


def test_equal_inputs_give_equal_steps() -> None:
    def run() -> list[Step]:
        scheduler, steps = make(num_blocks=12, max_steps_in_flight=2), list[Step]()
        for index in range(6):
            scheduler.add(request(5 + index % 3, max_tokens=6, priority=index % 2))
        while (step := scheduler.schedule()) is not None:
            steps.append(step)
            answer(scheduler, step)
        return steps

    assert run() == run()
