"""Any interleaving of requests, aborts, steps, failures and resets: every sequence's tokens are those it has alone.

The scheduler is run against a model of the pipeline in which the KV of a position is a hash of all tokens up to it. The
model's stages compute late and in order, fail, and remember garbage; each chunk must read exactly the history that its
sequence has, through shared blocks, copies, preemption and re-use. A sampled token is a function of what was read.

This file does not know real engines or links.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tllm.core.errors import ContextLengthError, QueueFullError, RequestError
from tllm.core.types import (
    BlockId,
    Chunk,
    Epoch,
    FinishReason,
    Sampled,
    SamplingParams,
    SamplingState,
    Score,
    Scored,
    SequenceFailed,
    SequenceId,
    Step,
    StepFailed,
    StepId,
    StepResult,
    TokenId,
)
from tllm.scheduler.scheduler import Scheduler, SchedulerConfig, SequenceRequest, Update

VOCAB = 6
STOP = TokenId(5)


def history(previous: int, token: int) -> int:
    return hash((previous, token, 0x5EED))


def beginning(salt: str) -> int:
    return sum(map(ord, salt)) + 1


def next_token(last: int, state: SamplingState) -> TokenId:
    """Depends on all that must not be lost: the whole history, the seed, the position and what is banned."""
    allowed = [token for token in range(VOCAB) if token not in state.banned_ids]
    return TokenId(allowed[hash((last, state.params.seed, state.position)) % len(allowed)])


def score(last: int, target: int) -> float:
    return -float(hash((last, target)) % 997)


@dataclass
class Client:
    """What the outside knows of one sequence."""

    request: SequenceRequest
    poison_at: int | None = None  # computing this position fails the step
    output: list[TokenId] = field(default_factory=list)
    scores: tuple[Score, ...] | None = None
    finish: FinishReason | None = None
    is_aborted: bool = False
    appeared: bool = False
    least_positions: int = 10**9  # the smallest memory during its life
    may_fail: bool = False  # its last result was spoilt on purpose, or its prompt no longer fits
    failed_steps: list[int] = field(default_factory=list)  # the number of chunks in each failed step it was in

    @property
    def tokens(self) -> list[TokenId]:
        return [*self.request.prompt, *self.output]

    @property
    def is_live(self) -> bool:
        return self.finish is None and not self.is_aborted


def solo(request: SequenceRequest, max_model_len: int) -> tuple[list[TokenId], FinishReason]:
    """What the sequence yields when it is alone and nothing ever goes wrong."""
    params, output = request.params, list[TokenId]()
    last = beginning(request.salt)
    for token in request.prompt:
        last = history(last, token)
    while len(output) < params.max_tokens and len(request.prompt) + len(output) < max_model_len:
        banned = params.stop_ids if len(output) < params.min_tokens else ()
        position = len(request.prompt) + len(output)
        output.append(next_token(last, SamplingState(params=params, position=position, banned_ids=banned)))
        last = history(last, output[-1])
        if output[-1] in params.stop_ids:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


class Pipeline:
    """Stages in a row with a queue before each and one at the end. KV that was never written does not exist."""

    def __init__(self, num_stages: int, block_size: int, clients: dict[SequenceId, Client], *, detects: bool) -> None:
        self.block_size = block_size
        self.clients = clients
        self.detects = detects  # a stage notices missing KV; if not, it computes nonsense
        self.kv: list[dict[tuple[BlockId, int], int]] = [{} for _ in range(num_stages)]
        self.queues: list[deque[Step | StepFailed]] = [deque() for _ in range(num_stages)]
        self.home: deque[StepResult | StepFailed] = deque()
        self.sent: dict[StepId, Step] = {}
        self.last_sent = 0
        self.num_missing = 0
        # Failed steps and the last step that had been sent when the scheduler heard of it: what it sent from the
        # failed step up to there with the same sequence is void, and may find anything in its blocks.
        self.failures: dict[StepId, int | None] = {}

    def send(self, step: Step) -> None:
        self.sent[step.id] = step
        self.last_sent = step.id
        self.queues[0].append(step)

    def place(self, chunk: Chunk, position: int) -> tuple[BlockId, int]:
        return chunk.blocks[position // self.block_size], position % self.block_size

    def is_void(self, step: Step, seq: SequenceId) -> bool:
        return any(
            failed < step.id
            and (heard is None or step.id <= heard)
            and any(chunk.seq == seq for chunk in self.sent[failed].chunks)
            for failed, heard in self.failures.items()
        )

    def advance(self, stage: int) -> None:
        """The stage handles the first message in its queue."""
        message = self.queues[stage].popleft()
        outcome = message if isinstance(message, StepFailed) else self.compute(stage, message)
        if isinstance(outcome, StepResult) or stage + 1 == len(self.queues):
            self.home.append(outcome)  # type: ignore[arg-type]
        else:
            self.queues[stage + 1].append(outcome)

    def fail(self, stage: int, step: Step, reason: str, *, copies: bool) -> StepFailed:
        """Nothing can be said of the positions the step would have written."""
        kv = self.kv[stage]
        if copies:
            self.copy(stage, step)
        for chunk in step.chunks:
            for position in range(chunk.start, chunk.start + len(chunk.tokens)):
                kv[self.place(chunk, position)] = hash(("garbage", step.id, position))
            self.clients[chunk.seq].failed_steps.append(len(step.chunks))
        self.failures[step.id] = None
        return StepFailed(step=step.id, epoch=step.epoch, layers=(stage, stage + 1), reason=reason)

    def copy(self, stage: int, step: Step) -> None:
        kv = self.kv[stage]
        for copy in step.copies:
            for offset in range(copy.length):
                assert (copy.source, offset) in kv, "a copy of KV that was never written"
                kv[copy.target, offset] = kv[copy.source, offset]

    def compute(self, stage: int, step: Step) -> Step | StepResult | StepFailed:
        kv = self.kv[stage]
        for chunk in step.chunks:
            poison_at = self.clients[chunk.seq].poison_at
            if poison_at is not None and chunk.start <= poison_at < chunk.start + len(chunk.tokens):
                return self.fail(stage, step, "poison", copies=False)
        self.copy(stage, step)
        is_missing = False
        for chunk in step.chunks:
            client = self.clients[chunk.seq]
            last = beginning(client.request.salt)
            for position, token in enumerate(client.tokens[: chunk.start]):
                last = history(last, token)
                if kv.get(self.place(chunk, position)) != last:
                    assert self.is_void(step, chunk.seq), f"wrong KV for sequence {chunk.seq} at position {position}"
                    is_missing = True
        self.num_missing += is_missing
        if is_missing and self.detects:
            return self.fail(stage, step, "missing KV", copies=False)
        sampled, scored = [], []
        for chunk in step.chunks:
            client = self.clients[chunk.seq]
            last = beginning(client.request.salt)
            if chunk.start > 0:
                last = kv.get(self.place(chunk, chunk.start - 1), 0)
            scores = []
            for row, token in enumerate(chunk.tokens):
                last = history(last, token)
                kv[self.place(chunk, chunk.start + row)] = last
                if chunk.scoring is not None and row < len(chunk.scoring.targets):
                    scores.append(Score(logprob=score(last, chunk.scoring.targets[row])))
            if chunk.sampling is not None:
                sampled.append(Sampled(seq=chunk.seq, token=next_token(last, chunk.sampling)))
            if chunk.scoring is not None:
                scored.append(Scored(seq=chunk.seq, start=chunk.start, scores=tuple(scores)))
        if stage + 1 < len(self.queues):
            return step
        return StepResult(step=step.id, epoch=step.epoch, sampled=tuple(sampled), scored=tuple(scored))


class World:
    """A scheduler, its pipeline, and everybody who may do something to them. `rng` decides all that is left open."""

    def __init__(self, rng: random.Random) -> None:
        self.config = SchedulerConfig(
            num_blocks=rng.randint(4, 24),
            block_size=rng.randint(1, 5),
            max_model_len=30,
            max_batch_tokens=rng.randint(1, 24),
            max_sequences=rng.randint(1, 8),
            max_waiting=10,
            max_steps_in_flight=rng.randint(1, 4),
            prefix_cache=rng.random() < 0.8,
            watermark=rng.choice([0.0, 0.1, 0.4]),
            prefill_chunk=rng.choice([None, rng.randint(1, 8)]),
            mixed_prefill_tokens=rng.randint(1, 12),
        )
        self.scheduler = Scheduler(self.config)
        self.epoch = 1
        self.num_blocks = self.config.num_blocks
        self.num_stages, self.detects = rng.randint(1, 3), rng.random() < 0.5
        self.clients: dict[SequenceId, Client] = {}
        self.pipeline = Pipeline(self.num_stages, self.config.block_size, self.clients, detects=self.detects)
        self.stale: list[StepResult | StepFailed] = []
        self.last_step = 0
        self.seen: Counter[str] = Counter()

    # ---- what may happen ---------------------------------------------------------------------------------------

    def add(self, rng: random.Random) -> None:
        prompt = tuple(TokenId(rng.randint(0, 2)) for _ in range(rng.randint(1, 24)))
        if self.clients and rng.random() < 0.6:  # another turn of something known
            old = self.clients[rng.choice(list(self.clients))].tokens
            prompt = (*old[: rng.randint(0, len(old))], *prompt[: rng.randint(1, 8)])
        penalty = rng.choice(["none"] * 3 + ["presence_penalty", "frequency_penalty", "repetition_penalty"])
        seed = rng.randint(0, 3)
        params = SamplingParams(
            max_tokens=rng.randint(0, 12),
            min_tokens=rng.choice([0, 0, 0, 3]),
            seed=seed,
            stop_ids=(STOP,) if seed else (),
            presence_penalty=1.5 if penalty == "presence_penalty" else 0.0,
            frequency_penalty=1.5 if penalty == "frequency_penalty" else 0.0,
            repetition_penalty=1.5 if penalty == "repetition_penalty" else 1.0,
        )
        request = SequenceRequest(
            prompt=prompt,
            params=params,
            prompt_logprobs=rng.choice([None, None, None, 0, 2]),
            priority=rng.choice([0, 0, 0, 1, -1]),
            salt=rng.choice(["", "", "", "other"]),
        )
        before = self.scheduler.statistics()
        try:
            seq = self.scheduler.add(request)
        except ContextLengthError:
            assert len(prompt) + min(params.max_tokens, 1) > self.config.max_model_len
        except QueueFullError:
            assert before.num_waiting >= self.config.max_waiting
        except RequestError:
            assert len(prompt) > self.num_positions
        else:
            assert len(prompt) <= self.num_positions
            assert before.num_waiting < self.config.max_waiting
            poison_at = rng.choice([None] * 9 + [0, 5, 14])
            self.clients[seq] = Client(request, poison_at=poison_at, least_positions=self.num_positions)
            return
        assert self.scheduler.statistics() == before

    def abort(self, rng: random.Random) -> None:
        """Anybody, also those that have ended."""
        if not self.clients:
            return
        seq = rng.choice(list(self.clients))
        before = self.scheduler.statistics()
        self.scheduler.abort(seq)
        if not self.clients[seq].is_live:
            assert self.scheduler.statistics() == before
        else:
            self.clients[seq].is_aborted = True

    def schedule(self, rng: random.Random) -> None:
        for _ in range(rng.randint(1, 3)):
            before = self.scheduler.statistics()
            step = self.scheduler.schedule()
            if step is None:
                if before.num_steps_in_flight == 0:
                    assert not any(client.is_live for client in self.clients.values()), "work is left, and none is done"
                return
            self.check_step(step, before.num_steps_in_flight)
            self.pipeline.send(step)

    def compute(self, rng: random.Random) -> None:
        for _ in range(rng.randint(1, 6)):
            if any(self.pipeline.queues):
                self.pipeline.advance(self.any_stage(rng))

    def break_a_step(self, rng: random.Random) -> None:
        if not any(self.pipeline.queues):
            return
        stage = self.any_stage(rng)
        message = self.pipeline.queues[stage].popleft()
        if isinstance(message, Step):
            message = self.pipeline.fail(stage, message, "broken", copies=rng.random() < 0.5)
        if stage + 1 == self.num_stages or rng.random() < 0.5:
            self.pipeline.home.append(message)  # it overtakes the results of steps before it
        else:
            self.pipeline.queues[stage + 1].append(message)

    def deliver(self, rng: random.Random) -> None:
        for _ in range(rng.randint(1, 4)):
            if self.pipeline.home:
                self.deliver_one(self.pipeline.home.popleft())

    def deliver_spoilt(self, rng: random.Random) -> None:
        """One sequence of a step failed: the last stage says so, or it has just nothing to say about it."""
        if not self.pipeline.home or isinstance(result := self.pipeline.home[0], StepFailed):
            return
        self.pipeline.home.popleft()
        chunk = rng.choice(self.pipeline.sent[result.step].chunks)
        is_named = chunk.sampling is None or rng.random() < 0.5
        self.clients[chunk.seq].may_fail = True
        spoilt = replace(
            result,
            sampled=tuple(each for each in result.sampled if each.seq != chunk.seq),
            failed=(SequenceFailed(seq=chunk.seq, reason="not finite"),) if is_named else (),
        )
        self.deliver_one(spoilt)
        self.clients[chunk.seq].may_fail = False

    def deliver_stale(self, rng: random.Random) -> None:
        if not self.stale:
            return
        message = rng.choice(self.stale)
        before = self.scheduler.statistics()
        if isinstance(message, StepResult):
            assert self.scheduler.complete(message) == ()
        else:
            assert self.scheduler.fail(message) == ()
        assert self.scheduler.statistics() == replace(before, num_stale_results=before.num_stale_results + 1)

    def reset(self, rng: random.Random) -> None:
        for step in self.pipeline.sent.values():
            self.stale.append(StepResult(step=step.id, epoch=step.epoch))
            self.stale.append(StepFailed(step=step.id, epoch=step.epoch, layers=(0, 1), reason="late"))
        self.epoch += 1
        num_blocks = rng.choice([None, rng.randint(3, 24)])
        self.num_blocks = num_blocks or self.num_blocks
        for client in self.clients.values():
            if client.is_live:
                client.least_positions = min(client.least_positions, self.num_positions)
                client.may_fail = not client.output and len(client.tokens) > self.num_positions
                client.failed_steps.clear()
        self.pipeline = Pipeline(self.num_stages, self.config.block_size, self.clients, detects=self.detects)
        self.take(self.scheduler.reset(Epoch(self.epoch), num_blocks))
        statistics = self.scheduler.statistics()
        assert statistics.num_steps_in_flight == statistics.num_held_blocks == statistics.num_kept_blocks == 0
        assert statistics.num_free_blocks == self.num_blocks

    def any_stage(self, rng: random.Random) -> int:
        return rng.choice([stage for stage, queue in enumerate(self.pipeline.queues) if queue])

    # ---- what must be true -------------------------------------------------------------------------------------

    @property
    def num_positions(self) -> int:
        return self.num_blocks * self.config.block_size

    def check(self) -> None:
        self.scheduler.check()
        statistics = self.scheduler.statistics()
        num_live = sum(client.is_live for client in self.clients.values())
        assert statistics.num_running + statistics.num_waiting == num_live

    def check_step(self, step: Step, num_in_flight: int) -> None:
        config = self.config
        assert step.epoch == self.epoch
        assert step.id > self.last_step
        assert num_in_flight < config.max_steps_in_flight
        self.last_step = step.id
        assert 0 < step.num_tokens <= config.max_batch_tokens
        assert len({chunk.seq for chunk in step.chunks}) == len(step.chunks)
        num_decodes = num_prefill = 0
        for chunk in step.chunks:
            client = self.clients[chunk.seq]
            assert client.is_live
            tokens, stop = client.tokens, chunk.start + len(chunk.tokens)
            assert list(chunk.tokens) == tokens[chunk.start : stop], "a chunk with other tokens than the sequence's"
            assert 0 < len(chunk.tokens) <= (config.prefill_chunk or config.max_batch_tokens)
            assert stop <= len(chunk.blocks) * config.block_size
            assert all(0 <= block < self.num_blocks for block in chunk.blocks)
            is_last = stop == len(tokens) and client.request.params.max_tokens > 0
            assert (chunk.sampling is not None) == is_last
            if chunk.sampling is not None:
                self.check_sampling(chunk.sampling, client)
            if chunk.scoring is not None:
                assert client.request.prompt_logprobs == chunk.scoring.top
                assert chunk.scoring.targets == client.request.prompt[chunk.start + 1 : stop + 1] != ()
            if client.output and len(chunk.tokens) == 1:
                num_decodes += 1
            else:
                num_prefill += len(chunk.tokens)
            if not client.appeared:  # nobody passes those that came before
                for seq, other in self.clients.items():
                    if other.is_live and not other.appeared and seq != chunk.seq:
                        assert (client.request.priority, chunk.seq) < (other.request.priority, seq)
                client.appeared = True
        if num_decodes:
            self.seen["mixed step" if num_prefill else "decode step"] += 1
            statistics = self.scheduler.statistics()
            # Otherwise some recompute a single token, or are tried in groups.
            if self.epoch == 1 and not statistics.num_preemptions and not statistics.num_failed_steps:
                num_decoding = sum(1 for each in self.clients.values() if each.is_live and each.output)
                assert num_prefill <= config.mixed_prefill_tokens
                assert num_decodes <= -(-num_decoding // config.max_steps_in_flight)
        if step.copies:
            self.seen["copy-on-write"] += 1

    def check_sampling(self, state: SamplingState, client: Client) -> None:
        params = client.request.params
        assert state.params is params
        assert state.position == len(client.tokens)
        counts = {token: client.output.count(token) for token in set(client.output)}
        penalizes = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        assert dict(state.counts) == (counts if penalizes else {})
        distinct = set(client.request.prompt) if params.repetition_penalty != 1.0 else set()
        assert sorted(state.prompt_ids) == sorted(distinct)
        assert state.banned_ids == (params.stop_ids if len(client.output) < params.min_tokens else ())

    def deliver_one(self, message: StepResult | StepFailed) -> None:
        self.stale.append(message)
        if isinstance(message, StepResult):
            self.take(self.scheduler.complete(message))
        else:
            self.pipeline.failures[message.step] = self.pipeline.last_sent
            self.take(self.scheduler.fail(message))

    def take(self, updates: tuple[Update, ...]) -> None:
        for update in updates:
            client = self.clients[update.seq]
            assert client.is_live, "an update after the end"
            request = client.request
            assert update.first_scheduled == (not client.output) or update.finish is not None
            assert update.num_cached_tokens < len(request.prompt) or not update.num_cached_tokens
            if request.prompt_logprobs is not None and client.scores is None and update.sampled:
                assert update.scores is not None, "scores come with the first token"
            if update.scores is not None:
                assert client.scores is None
                client.scores = update.scores
                last, expected = beginning(request.salt), []
                for token, target in zip(request.prompt, request.prompt[1:], strict=False):
                    last = history(last, token)
                    expected.append(Score(logprob=score(last, target)))
                assert list(update.scores) == expected
            client.output += [each.token for each in update.sampled]
            client.finish = update.finish
            if update.num_preemptions:
                self.seen["preempted"] += 1
            reference, finish = solo(request, self.config.max_model_len)
            assert client.output == reference[: len(client.output)], "not the tokens it would have alone"
            if update.finish is None:
                assert len(client.output) < len(reference)
            elif update.finish is FinishReason.ERROR:
                self.seen["failed"] += 1
                assert update.reason
                twice_and_alone = len(client.failed_steps) > 1 and client.failed_steps[-1] == 1
                assert client.may_fail or twice_and_alone, "failed for no good reason"
            elif len(client.output) < len(reference):
                assert update.finish is FinishReason.LENGTH
                assert len(client.tokens) > client.least_positions, "ended too early"
            else:
                assert update.finish is finish
                assert request.prompt_logprobs is None or client.scores is not None
                assert update.stop_id == (client.output[-1] if finish is FinishReason.STOP else None)

    def drain(self) -> None:
        """From now on nothing breaks but poison: everything ends, nothing is left."""
        live = [client for client in self.clients.values() if client.is_live]
        poisoned = [client for client in live if client.poison_at is not None and len(client.tokens) > client.poison_at]
        bound = 100 + 20 * sum(len(client.tokens) + client.request.params.max_tokens for client in live)
        for _ in range(bound):
            while (step := self.scheduler.schedule()) is not None:
                self.check_step(step, self.scheduler.statistics().num_steps_in_flight - 1)
                self.pipeline.send(step)
            self.scheduler.check()
            if not any(client.is_live for client in live):
                break
            for stage in reversed(range(self.num_stages)):
                if self.pipeline.queues[stage]:
                    self.pipeline.advance(stage)
            while self.pipeline.home:
                self.deliver_one(self.pipeline.home.popleft())
        assert not any(client.is_live for client in live), "somebody starves"
        for client in poisoned:
            cached = client.finish is not FinishReason.ERROR  # the poisoned position was computed by somebody else
            assert not cached or self.config.prefix_cache
        for stage in range(self.num_stages):  # void chunks of those that ended
            while self.pipeline.queues[stage]:
                self.pipeline.advance(stage)
        while self.pipeline.home:
            self.deliver_one(self.pipeline.home.popleft())
        self.scheduler.check()
        statistics = self.scheduler.statistics()
        assert statistics.num_running == statistics.num_waiting == statistics.num_steps_in_flight == 0
        assert statistics.num_held_blocks == 0
        assert statistics.num_free_blocks + statistics.num_kept_blocks == self.num_blocks


WEIGHTS = {
    World.add: 5,
    World.schedule: 10,
    World.compute: 10,
    World.deliver: 10,
    World.abort: 1,
    World.break_a_step: 1,
    World.deliver_spoilt: 0.3,
    World.deliver_stale: 0.3,
    World.reset: 0.3,
}


class SchedulerMachine(RuleBasedStateMachine):
    """Hypothesis chooses what happens, and shrinks it when it goes wrong."""

    RNG = st.randoms(use_true_random=False)

    @initialize(rng=RNG)
    def begin(self, rng: random.Random) -> None:
        self.world = World(rng)

    @rule(rng=RNG, act=st.sampled_from(list(WEIGHTS)))
    def happen(self, rng: random.Random, act: Callable[[World, random.Random], None]) -> None:
        act(self.world, rng)
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@given(rng=st.randoms(use_true_random=False), block_size=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_a_hit_is_exact_to_the_token_while_memory_lasts(rng: random.Random, block_size: int) -> None:
    """All that is confirmed of those that ended, the full blocks of those that run; never the last prompt token."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=500,
            block_size=block_size,
            max_model_len=99,
            mixed_prefill_tokens=99,
            prefill_chunk=rng.choice([5, 99]),
        )
    )
    tokens: dict[SequenceId, list[TokenId]] = {}
    confirmed: dict[SequenceId, int] = {}
    running: set[SequenceId] = set()

    def turn(newcomer: SequenceId | None) -> None:
        if (step := scheduler.schedule()) is None:
            return
        for chunk in step.chunks:
            if chunk.seq == newcomer:
                best = 0
                for seq, end in confirmed.items():
                    known = tokens[seq][: end // block_size * block_size if seq in running else end]
                    pairs = zip(known, tokens[newcomer][:-1], strict=False)
                    best = max(best, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
                assert chunk.start == best
        sampled = tuple(
            Sampled(seq=each.seq, token=TokenId(rng.randint(0, 1))) for each in step.chunks if each.sampling
        )
        for chunk in step.chunks:
            confirmed[chunk.seq] = chunk.start + len(chunk.tokens)
        for update in scheduler.complete(StepResult(step=step.id, epoch=step.epoch, sampled=sampled)):
            tokens[update.seq] += [each.token for each in update.sampled]
            if update.finish is not None:
                running.remove(update.seq)
        scheduler.check()

    for _ in range(rng.randint(1, 8)):
        prompt = tuple(TokenId(rng.randint(0, 1)) for _ in range(rng.randint(1, 16)))
        if tokens and rng.random() < 0.7:
            old = tokens[rng.choice(list(tokens))]
            prompt = (*old[: rng.randint(0, len(old))], *prompt[: rng.randint(1, 4)])
        params = SamplingParams(max_tokens=rng.randint(1, 9))
        seq = scheduler.add(SequenceRequest(prompt=prompt[:60], params=params))
        tokens[seq] = list(prompt[:60])
        running.add(seq)
        turn(seq)
        for _ in range(rng.randint(0, 12)):
            turn(None)
        if seq in running and rng.random() < 0.4:
            scheduler.abort(seq)
            running.remove(seq)


@pytest.mark.parametrize("breakage", ["whole", "broken"])
def test_long_runs_yield_every_sequence_its_own_tokens(breakage: str) -> None:
    """Breadth where the machine above has depth: weights that let sequences get old, from numbered seeds."""
    seen: Counter[str] = Counter()
    for seed in range(250):
        rng = random.Random(f"{breakage} {seed}")
        world = World(rng)
        acts = list(WEIGHTS)[: 5 if breakage == "whole" else None]
        for act in rng.choices(acts, [WEIGHTS[each] for each in acts], k=120):
            act(world, rng)
            world.check()
        world.drain()
        seen += world.seen
        seen["evicted"] += world.scheduler.statistics().num_evicted_blocks
        seen["missing KV"] += world.pipeline.num_missing
        seen["hit"] += world.scheduler.statistics().num_prefix_hit_tokens
    expected = {"mixed step", "decode step", "copy-on-write", "preempted", "evicted", "hit"}
    if breakage == "broken":
        expected |= {"failed", "missing KV"}
    assert expected <= {name for name, num in seen.items() if num > 100}, f"the test is idle: {seen}"
