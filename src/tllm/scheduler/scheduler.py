"""Who computes what next: requests in, steps out, results in, updates out.

    add ─▶ waiting ──admit──▶ prompts ──▶ (in flight) ──▶ decodes ◀─▶ (in flight) ──▶ finished
              ▲                  │                            │
              └──── preempt ─────┴────────────────────────────┘        a failed step: its sequences ─▶ trials

Rules:
    Steps are computed in the order in which they were made, on every stage; results come home in that order.
    A decode needs the token before it, so a sequence decodes in one step at a time. Chunks of one prompt may be in
    several steps: the later one reads what the earlier one wrote. Only the last one samples.
    A result counts only for chunks that are not void. Failure, preemption, reset and the end of a sequence make its
    chunks in flight void; what an earlier life of a sequence sampled is dropped, and sampled again, the same.
    Waiting sequences are admitted in the order of (priority, arrival), and nobody passes the first: small requests
    cannot starve a big one. Out of blocks, the last in that order gives its own up. The first always advances.
    A failed step is evidence against its sequences. They are tried again apart from all others, half by half, until
    the one that fails alone is found: it ends with ERROR, everybody else goes on. A sequence alone in a step that
    failed is tried alone once more.
    A step in flight that goes on from a failed one is spoilt: the KV it reads may be missing, so its failure is no
    evidence. Nothing is issued until all spoilt steps are home; otherwise they might spoil each other for ever.

This file does not know time, arrays, text, nor how many stages there are.
"""

from __future__ import annotations

from dataclasses import replace

from tllm.core.errors import ContextLengthError, QueueFullError, RequestError
from tllm.core.types import (
    Chunk,
    Epoch,
    FinishReason,
    Sampled,
    Score,
    Scored,
    SequenceId,
    Step,
    StepFailed,
    StepId,
    StepResult,
    TokenId,
)
from tllm.scheduler.draft import Draft, Entry
from tllm.scheduler.kv import KVAccount
from tllm.scheduler.policy import SchedulerConfig, SchedulerStatistics, SequenceRequest, Update
from tllm.scheduler.queues import Queues, order_of
from tllm.scheduler.sequence import Sequence

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerStatistics", "SequenceRequest", "Update"]

RETRY_AFTER_S = 1.0  # what a refused client is told to wait


class Scheduler:
    """All sequences of one pipeline. Not thread-safe; every method returns at once."""

    def __init__(self, config: SchedulerConfig, epoch: Epoch = Epoch(1)) -> None:
        self._config = config
        self._epoch = epoch
        self._num_sequences = 0  # ever; the next id
        self._num_steps = 0  # ever; the next id
        self._sequences: dict[SequenceId, Sequence] = {}  # all that have not ended
        self._running: dict[SequenceId, Sequence] = {}  # those that hold blocks
        self._queues = Queues()
        self._num_decoding = 0  # running, with their prompt behind them
        self._is_trial_next = True
        self._in_flight: dict[StepId, list[Entry]] = {}
        self._spoilt: set[StepId] = set()  # of these
        self._refused: tuple[SequenceId, int] | None = None  # who was not admitted, with how many blocks available
        self._num_evicted = 0  # in former epochs
        self._num_queries = self._num_hits = 0
        self._num_preemptions = self._num_failed_steps = self._num_stale_results = 0
        self._open_account(config.num_blocks)

    # ---- requests ----------------------------------------------------------------------------------------------

    def add(self, request: SequenceRequest) -> SequenceId:
        """Queue a request. Nothing is changed when it raises.

        Raises ContextLengthError when the prompt leaves no room for a token (one that is only scored needs none),
        RequestError when it can never fit into the blocks, QueueFullError when `max_waiting` wait already.
        """
        num_prompt, max_tokens = len(request.prompt), request.params.max_tokens
        if num_prompt < 1:
            raise RequestError("The prompt is empty. Give at least one token.", param="prompt")
        if max_tokens < 0:
            raise RequestError(f"max_tokens is {max_tokens}, but must be at least 0.", param="max_tokens")
        if num_prompt + min(max_tokens, 1) > self._config.max_model_len:
            raise ContextLengthError(num_prompt, self._config.max_model_len)
        if num_prompt > self._num_positions:
            raise RequestError(
                f"The prompt has {num_prompt} tokens, but the memory for keys and values has room for "
                f"{self._num_positions}. Shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        if len(self._queues.waiting) >= self._config.max_waiting:
            raise QueueFullError(len(self._queues.waiting), RETRY_AFTER_S)
        self._num_sequences += 1
        seq = Sequence(SequenceId(self._num_sequences), request, self._context_limit)
        self._sequences[seq.id] = seq
        self._queues.wait(seq)
        return seq.id

    def abort(self, seq: SequenceId) -> None:
        """Forget a sequence, at any moment; its blocks are available when this returns, and no update follows.

        Unknown and ended ids are ignored.
        """
        record = self._sequences.get(seq)
        if record is not None:
            self._kv.release(record)
            self._end(record)

    # ---- steps out ---------------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step to send; it is in flight from now on.

        None when nothing can be done now: nothing to do, everything in flight, `max_steps_in_flight` reached, or spoilt
        steps on their way. Only `add`, `complete`, `fail`, `reset` and (for blocks) `abort` can change that.
        """
        if self._spoilt or len(self._in_flight) >= self._config.max_steps_in_flight:
            return None
        config = self._config
        draft = Draft(
            num_tokens=config.max_batch_tokens,
            num_prompt_tokens=config.mixed_prefill_tokens if self._num_decoding else config.max_batch_tokens,
            prefill_chunk=config.prefill_chunk or config.max_batch_tokens,
        )
        self._is_trial_next = not self._is_trial_next  # suspects and the others take turns
        if self._is_trial_next:
            self._draft_trial(draft)
        if not draft.entries:
            self._draft_ordinary(draft)
        if not draft.entries:
            self._draft_trial(draft)
        if not draft.entries:
            return None
        self._num_steps += 1
        step = draft.step(StepId(self._num_steps), self._epoch)
        self._in_flight[step.id] = draft.entries
        return step

    def _draft_ordinary(self, draft: Draft) -> None:
        """Decodes first, then prompts that are under way, then those that wait."""
        for seq in self._next_decodes():
            draft.add(seq)
        for seq in tuple(self._queues.prompts):
            if not draft.add(seq):
                return
            if seq.num_to_issue == 0:
                self._queues.leave(seq)
        while draft.has_prompt_room and (admitted := self._admit_first()) is not None:
            draft.add(admitted)
            if admitted.num_to_issue == 0:
                self._queues.leave(admitted)

    def _draft_trial(self, draft: Draft) -> None:
        """The next group of suspects, alone; those that do not fit stay a group. Their blocks are there already."""
        while self._queues.trials and not draft.entries:
            remaining: list[Sequence] = []
            for seq in self._queues.trials.popleft():
                if draft.add(seq):
                    seq.queue = None
                else:
                    remaining.append(seq)
            if remaining:
                self._queues.try_again(remaining)

    def _next_decodes(self) -> list[Sequence]:
        """The decodes of this step, each with a block for its position.

        With `m` steps allowed, at most 1/m of all that decode: steps stay even, and every stage is busy. Those that
        are here now are divided among the steps that may still go out now. First come, first served, so whoever is
        left over leads the next step.
        """
        config, decodes = self._config, self._queues.decodes
        num_free_steps = config.max_steps_in_flight - len(self._in_flight)
        picked: list[Sequence] = []
        while decodes and not picked:  # again, when all that were picked have been preempted
            num = min(
                config.max_batch_tokens,
                -(-len(decodes) // num_free_steps),
                -(-self._num_decoding // config.max_steps_in_flight),
            )
            picked = [decodes.popleft() for _ in range(num)]
            for seq in picked:
                seq.queue = None
            picked = self._give_room(picked)
        return picked

    def _give_room(self, picked: list[Sequence]) -> list[Sequence]:
        """One more block for those that are full, at the price of preemptions; returns who is left of them."""
        growing = [seq for seq in picked if seq.scheduled >= seq.num_positions]
        while len(growing) > self._kv.num_available:
            victim = max(self._running.values(), key=order_of)
            self._preempt(victim)
            picked = [seq for seq in picked if seq is not victim]
            growing = [seq for seq in growing if seq is not victim]
        for seq in growing:
            self._kv.grow(seq)
        return picked

    def _admit_first(self) -> Sequence | None:
        """The first that waits gets its blocks and becomes a prompt under way; None when it must wait on."""
        if not self._queues.waiting or len(self._running) >= self._config.max_sequences:
            return None
        seq = self._queues.waiting[0]
        if self._refused is not None and self._refused[0] == seq.id and self._kv.num_available <= self._refused[1]:
            return None  # as before: looking its prefix up again would cost, and change nothing
        if not self._kv.admit(seq, num_spare=self._num_spare if self._running else 0):
            assert self._running, "a sequence alone does not fit"
            self._refused = (seq.id, self._kv.num_available)
            return None
        self._refused = None
        self._queues.leave(seq)
        self._running[seq.id] = seq
        self._queues.resume(seq)
        if not seq.was_admitted:
            seq.was_admitted = True
            seq.num_cached = seq.computed
            self._num_queries += len(seq.tokens)
            self._num_hits += seq.computed
        return seq

    # ---- results in --------------------------------------------------------------------------------------------

    def complete(self, result: StepResult) -> tuple[Update, ...]:
        """Every stage did its part of a step. Results of no step in flight are ignored and counted."""
        entries = self._in_flight.pop(result.step, None) if result.epoch == self._epoch else None
        if entries is None:
            self._num_stale_results += 1
            return ()
        self._spoilt.discard(result.step)
        sampled = {each.seq: each for each in result.sampled}
        scored = {each.seq: each for each in result.scored}
        failed = {each.seq: each.reason for each in result.failed}
        updates: list[Update] = []
        for seq, version, chunk in entries:
            if seq.version != version:
                continue
            if chunk.start != seq.computed:  # the result of a chunk before it never came
                self._roll_back(result.step, [(seq, version, chunk)])
                self._queues.resume(seq)
                continue
            if seq.id in failed:
                updates.append(self._fail_sequence(seq, failed[seq.id]))
                continue
            update = self._confirm(seq, chunk, sampled.get(seq.id), scored.get(seq.id))
            if update is not None:
                updates.append(update)
        return tuple(updates)

    def _confirm(self, seq: Sequence, chunk: Chunk, sampled: Sampled | None, scored: Scored | None) -> Update | None:
        if chunk.scoring is not None:
            assert seq.scores is not None
            if scored is None or scored.start != chunk.start or len(scored.scores) != len(chunk.scoring.targets):
                return self._fail_sequence(seq, "The last stage did not score the prompt.")
            seq.scores += scored.scores
        num_tokens = len(chunk.tokens)
        seq.computed = computed = chunk.start + num_tokens
        if num_tokens > 1 or computed % self._config.block_size == 0 or seq.copy is not None:
            self._kv.confirm(seq)
        seq.is_suspect = False

        if chunk.sampling is None:
            if computed == len(seq.tokens):  # nothing was to be sampled
                return self._finish(seq, (), self._take_scores(seq), FinishReason.LENGTH, None)
            if seq.queue is None:
                self._queues.resume(seq)
            return None
        if sampled is None:
            return self._fail_sequence(seq, "The last stage returned no token.")
        token = sampled.token
        seq.append(token)
        scores = None if seq.scores is None else self._take_scores(seq)
        if token in seq.stop_ids:
            return self._finish(seq, (sampled,), scores, FinishReason.STOP, token)
        if len(seq.tokens) >= seq.limit:
            return self._finish(seq, (sampled,), scores, FinishReason.LENGTH, None)
        if not seq.is_decoding:
            seq.is_decoding = True
            self._num_decoding += 1
        self._queues.resume(seq)
        is_first = not seq.is_reported
        seq.is_reported = True
        return Update(
            seq=seq.id,
            sampled=(sampled,),
            scores=scores,
            num_cached_tokens=seq.num_cached,
            num_preemptions=seq.num_preemptions,
            first_scheduled=is_first,
        )

    def fail(self, failed: StepFailed) -> tuple[Update, ...]:
        """A stage could not compute a step: none of its sequences advanced. See the rules at the head of this file.

        Failures of no step in flight are ignored and counted.
        """
        entries = self._in_flight.pop(failed.step, None) if failed.epoch == self._epoch else None
        if entries is None:
            self._num_stale_results += 1
            return ()
        self._num_failed_steps += 1
        is_spoilt = failed.step in self._spoilt
        self._spoilt.discard(failed.step)
        live = self._roll_back(failed.step, entries)
        if is_spoilt:
            suspects = [seq for seq in live if seq.is_suspect]
            for seq in live:
                if not seq.is_suspect:
                    self._queues.resume(seq)
            if suspects:
                self._queues.try_again(suspects)
        elif len(entries) == len(live) == 1 and live[0].is_suspect:
            reason = f"The request could not be computed, also not alone: {failed.reason}"
            return (self._fail_sequence(live[0], reason),)
        else:
            for seq in live:
                seq.is_suspect = True
            half = (len(live) + 1) // 2
            self._queues.try_again(live[:half])
            if len(live) > 1:
                self._queues.try_again(live[half:])
        return ()

    # ---- the whole ---------------------------------------------------------------------------------------------

    def reset(
        self,
        epoch: Epoch,
        num_blocks: int | None = None,
        *,
        max_steps_in_flight: int | None = None,
        prefill_chunk: int | None = None,
    ) -> tuple[Update, ...]:
        """Begin a new epoch: all KV and all steps in flight are gone, tokens stay, everything is to be computed again.

        `num_blocks`, `max_steps_in_flight` and `prefill_chunk` are those of the new pipeline (None: as before).
        Sequences that have as many tokens as now fit end with LENGTH, prompts that do not fit with ERROR; those are the
        updates.
        """
        assert epoch > self._epoch, f"epoch {epoch} does not follow {self._epoch}"
        self._epoch = epoch
        self._config = replace(
            self._config,
            max_steps_in_flight=max_steps_in_flight or self._config.max_steps_in_flight,
            prefill_chunk=prefill_chunk or self._config.prefill_chunk,
        )
        self._in_flight.clear()
        self._spoilt.clear()
        self._refused = None
        self._num_evicted += self._kv.num_evicted
        for seq in list(self._running.values()):
            self._evacuate(seq)
        self._open_account(self._kv.pool.num_blocks if num_blocks is None else num_blocks)
        updates = []
        for seq in list(self._queues.waiting):
            if len(seq.tokens) <= self._num_positions:
                seq.set_context_limit(self._context_limit)
            elif seq.num_output > 0:
                updates.append(self._finish(seq, (), None, FinishReason.LENGTH, None))
            else:
                updates.append(
                    self._fail_sequence(
                        seq,
                        f"The prompt has {len(seq.tokens)} tokens, but after the loss of memory there is room for "
                        f"{self._num_positions}.",
                    )
                )
        return tuple(updates)

    def statistics(self) -> SchedulerStatistics:
        pool = self._kv.pool
        return SchedulerStatistics(
            num_running=len(self._running),
            num_waiting=len(self._queues.waiting),
            num_steps_in_flight=len(self._in_flight),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_held_blocks=pool.num_held,
            num_kept_blocks=pool.num_kept,
            num_prefix_query_tokens=self._num_queries,
            num_prefix_hit_tokens=self._num_hits,
            num_evicted_blocks=self._num_evicted + self._kv.num_evicted,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            num_stale_results=self._num_stale_results,
        )

    def check(self) -> None:
        """Assert that every account balances. Slow; for tests."""
        self._kv.check(self._running.values())
        self._queues.check()
        assert self._spoilt <= self._in_flight.keys()
        assert len(self._running) <= self._config.max_sequences
        assert len(self._in_flight) <= self._config.max_steps_in_flight
        assert self._running.keys() <= self._sequences.keys()
        assert self._num_decoding == sum(seq.is_decoding for seq in self._sequences.values())
        flying = [seq for entries in self._in_flight.values() for seq, version, _ in entries if seq.version == version]
        for seq in self._sequences.values():
            is_flying = seq in flying
            assert (seq.queue is self._queues.waiting) == (seq.id not in self._running)
            assert seq.queue is not None or is_flying, f"sequence {seq.id} is lost"
            assert seq.queue is not None or seq.num_to_issue == 0 or seq.is_suspect
            assert is_flying == (seq.computed < seq.scheduled)
            assert len(seq.tokens) < seq.limit or not seq.samples, f"sequence {seq.id} should have ended"
            assert seq.scores is None or len(seq.scores) == min(seq.computed, seq.num_prompt - 1)

    # ---- a sequence's life -------------------------------------------------------------------------------------

    def _open_account(self, num_blocks: int) -> None:
        config = self._config
        self._kv = KVAccount(num_blocks, config.block_size, prefix_cache=config.prefix_cache)
        self._num_positions = num_blocks * config.block_size
        self._num_spare = int(config.watermark * num_blocks)
        # The last token of a sequence is never computed, so it needs no position.
        self._context_limit = min(config.max_model_len, self._num_positions + 1)

    def _roll_back(self, step: StepId, entries: list[Entry]) -> list[Sequence]:
        """The step did nothing: later steps with its sequences are spoilt, and those of them that have not been voided
        since are to go on from what is confirmed. Returns these."""
        seqs = {seq.id for seq, _, _ in entries}
        for later, others in self._in_flight.items():
            if later > step and any(seq.id in seqs for seq, _, _ in others):
                self._spoilt.add(later)
        live = [seq for seq, version, _ in entries if seq.version == version]
        for seq in live:
            self._queues.leave(seq)
            seq.void()
        return live

    def _preempt(self, seq: Sequence) -> None:
        """Its blocks are available, its tokens wait in front of all that came later."""
        self._evacuate(seq)
        seq.num_preemptions += 1
        self._num_preemptions += 1

    def _evacuate(self, seq: Sequence) -> None:
        self._kv.release(seq)
        self._num_decoding -= seq.is_decoding
        seq.void_all()
        self._queues.leave(seq)
        del self._running[seq.id]
        self._queues.wait(seq)

    def _take_scores(self, seq: Sequence) -> tuple[Score, ...] | None:
        scores, seq.scores = seq.scores, None
        return None if scores is None else tuple(scores)

    def _finish(
        self,
        seq: Sequence,
        sampled: tuple[Sampled, ...],
        scores: tuple[Score, ...] | None,
        finish: FinishReason,
        stop_id: TokenId | None,
    ) -> Update:
        self._kv.release(seq)
        return self._end(seq, sampled=sampled, scores=scores, finish=finish, stop_id=stop_id)

    def _fail_sequence(self, seq: Sequence, reason: str) -> Update:
        """Only this sequence ends, and nobody will share what it computed."""
        self._kv.discard(seq)
        return self._end(seq, finish=FinishReason.ERROR, reason=reason)

    def _end(
        self,
        seq: Sequence,
        *,
        finish: FinishReason = FinishReason.ABORT,
        sampled: tuple[Sampled, ...] = (),
        scores: tuple[Score, ...] | None = None,
        stop_id: TokenId | None = None,
        reason: str = "",
    ) -> Update:
        self._queues.leave(seq)
        self._num_decoding -= seq.is_decoding
        seq.version += 1
        self._running.pop(seq.id, None)
        del self._sequences[seq.id]
        return Update(
            seq=seq.id,
            sampled=sampled,
            scores=scores,
            finish=finish,
            stop_id=stop_id,
            reason=reason,
            num_cached_tokens=seq.num_cached,
            num_preemptions=seq.num_preemptions,
            first_scheduled=not seq.is_reported,
        )
