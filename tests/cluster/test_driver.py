"""The driver over fake stages: who gets which tokens when requests are aborted, poisoned, slow or many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from tllm.cluster.driver import Driver, Generation
from tllm.cluster.stage import run_stage
from tllm.core.errors import GenerationError, TransportError, UnavailableError
from tllm.core.types import DType, Epoch, FinishReason, SamplingParams, SequenceId, TokenId
from tllm.engines.base import EngineConfig
from tllm.scheduler.scheduler import Scheduler, SchedulerConfig, SequenceRequest
from tllm.testing.fake_engine import FAKE_SPEC, FakeBehaviour, FakeEngine, Faults, fake_checkpoint, fake_tokens
from tllm.testing.stages import cut
from tllm.transport.base import FrameLimits
from tllm.transport.local import local_link

BLOCK_SIZE, NUM_BLOCKS = 4, 64
POISON = TokenId(200)
LIMITS = FrameLimits(
    epoch=Epoch(1),
    hidden_size=FAKE_SPEC.hidden_size,
    dtype=DType.FLOAT32,
    max_tokens=32,
    max_chunks=64,
    max_blocks=NUM_BLOCKS,
    vocab_size=FAKE_SPEC.vocab_size,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    driver: Driver
    scheduler: Scheduler
    engines: tuple[FakeEngine, ...]

    def ask(self, *prompt: int, max_tokens: int = 8) -> Generation:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        return self.driver.submit(SequenceRequest(prompt=tuple(map(TokenId, prompt)), params=params))

    def is_quiet(self) -> bool:
        self.scheduler.check()
        statistics = self.scheduler.statistics()
        return statistics.num_held_blocks == 0 and not statistics.num_running and not statistics.num_waiting


@asynccontextmanager
async def pipeline(
    num_stages: int = 2, behaviour: FakeBehaviour | None = None, num_blocks: int = NUM_BLOCKS
) -> AsyncIterator[Rig]:
    """A driver over fake stages on links within this process, each with its own compute thread."""
    sizes = [FAKE_SPEC.num_layers // num_stages] * num_stages
    shards = cut(FAKE_SPEC.num_layers, sizes)
    engines = tuple(FakeEngine(EngineConfig(shard=shard, dtype=DType.FLOAT32), behaviour) for shard in shards)
    links, inboxes = zip(*(local_link(LIMITS) for _ in range(num_stages + 1)), strict=True)
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=num_blocks * BLOCK_SIZE,
            max_batch_tokens=LIMITS.max_tokens,
            max_steps_in_flight=num_stages,
        ),
        epoch=LIMITS.epoch,
    )
    driver = Driver(scheduler)
    tasks = [asyncio.create_task(driver.run(links[0], inboxes[-1]))]
    with ThreadPoolExecutor(max_workers=num_stages) as threads:
        for index, (engine, shard) in enumerate(zip(engines, shards, strict=True)):
            engine.load(fake_checkpoint(), lambda done, total: None)
            engine.allocate(num_blocks, BLOCK_SIZE)
            stage = run_stage(engine, shard, inboxes[index], links[index + 1], threads)
            tasks.append(asyncio.create_task(stage))
        try:
            yield Rig(driver=driver, scheduler=scheduler, engines=engines)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def tokens_of(generation: Generation) -> tuple[TokenId, ...]:
    return tuple([sampled.token async for output in generation for sampled in output.tokens])


def expected(prompt: tuple[int, ...], num_tokens: int = 8) -> tuple[TokenId, ...]:
    return fake_tokens(tuple(map(TokenId, prompt)), num_tokens)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
async def test_many_requests_at_once_each_get_their_own_tokens(num_stages):
    prompts = [tuple(range(number, number + 3 + number % 7)) for number in range(64)]
    async with pipeline(num_stages) as rig, asyncio.timeout(30):
        answers = await asyncio.gather(*(tokens_of(rig.ask(*prompt)) for prompt in prompts))
        assert answers == [expected(prompt) for prompt in prompts]
        assert rig.is_quiet()


async def test_a_poisoned_request_fails_alone():
    faults = Faults(poison_ids=frozenset({POISON}), error=ValueError)
    async with pipeline(2, FakeBehaviour(faults=faults)) as rig, asyncio.timeout(30):
        healthy = [rig.ask(number, 1, 2) for number in range(8)]
        poisoned = rig.ask(5, POISON, 7)
        with pytest.raises(GenerationError, match="ValueError"):
            await tokens_of(poisoned)
        assert [await tokens_of(generation) for generation in healthy] == [
            expected((number, 1, 2)) for number in range(8)
        ]
        assert rig.is_quiet()


async def test_a_sequence_whose_logits_are_broken_fails_alone_and_at_once():
    behaviour = FakeBehaviour(faults=Faults(failed_seqs=frozenset({SequenceId(1)})))
    async with pipeline(2, behaviour) as rig, asyncio.timeout(30):
        generations = {generation.seq: generation for generation in (rig.ask(1, 2, 3), rig.ask(4, 5, 6))}
        failing = generations.pop(SequenceId(1))
        (healthy,) = generations.values()
        with pytest.raises(GenerationError):
            await tokens_of(failing)
        assert len(await tokens_of(healthy)) == 8
        assert rig.is_quiet()


async def test_a_mass_abort_at_any_moment_leaves_nothing_and_the_survivor_is_right():
    async with pipeline(2) as rig, asyncio.timeout(30):
        doomed = [rig.ask(number, 3, 1, max_tokens=50) for number in range(40)]
        survivor = rig.ask(9, 9, 9, max_tokens=20)
        await anext(aiter(doomed[0]))
        for generation in doomed:
            generation.cancel()
            generation.cancel()
        assert rig.scheduler.statistics().num_running + rig.scheduler.statistics().num_waiting == 1
        assert await tokens_of(survivor) == expected((9, 9, 9), 20)
        assert all([len(await tokens_of(generation)) < 50 for generation in doomed])
        assert rig.is_quiet()


async def test_the_only_request_can_be_aborted_and_the_next_one_is_served():
    async with pipeline(2) as rig, asyncio.timeout(30):
        only = rig.ask(1, 2, max_tokens=200)
        await anext(aiter(only))
        only.cancel()
        assert rig.is_quiet()
        assert await tokens_of(rig.ask(7, 8)) == expected((7, 8))


async def test_a_reader_that_looks_late_gets_everything_at_once():
    async with pipeline(2) as rig, asyncio.timeout(30):
        late = rig.ask(3, 2, 1, max_tokens=30)
        assert await tokens_of(rig.ask(1, 1, 1, max_tokens=60)) == expected((1, 1, 1), 60)
        output = await anext(late)
        assert tuple(sampled.token for sampled in output.tokens) == expected((3, 2, 1), 30)
        assert output.finish is FinishReason.LENGTH


async def test_kv_that_is_lost_is_an_error_and_never_garbage():
    async with pipeline(2) as rig, asyncio.timeout(30):
        generation = rig.ask(1, 2, 3, max_tokens=100)
        await anext(aiter(generation))
        rig.engines[1].allocate(NUM_BLOCKS, BLOCK_SIZE)  # as a worker that restarted would have it
        with pytest.raises(GenerationError, match="MissingKVError"):
            await tokens_of(generation)


async def test_more_requests_than_blocks_are_preempted_and_still_right():
    prompts = [tuple(range(number, number + 6)) for number in range(12)]
    async with pipeline(2, num_blocks=12) as rig, asyncio.timeout(30):
        answers = await asyncio.gather(*(tokens_of(rig.ask(*prompt, max_tokens=20)) for prompt in prompts))
        assert answers == [expected(prompt, 20) for prompt in prompts]
        assert rig.scheduler.statistics().num_preemptions > 0
        assert rig.is_quiet()


async def test_a_new_pipeline_goes_on_where_the_broken_one_stopped():
    async with pipeline(2) as rig, asyncio.timeout(30):
        generation = rig.ask(1, 2, 3, max_tokens=40)
        first = [sampled.token for sampled in (await anext(aiter(generation))).tokens]
        driver, scheduler = rig.driver, rig.scheduler
    limits = FrameLimits(**{name: getattr(LIMITS, name) for name in LIMITS.__slots__} | {"epoch": Epoch(2)})
    shard = cut(FAKE_SPEC.num_layers, [FAKE_SPEC.num_layers])[0]
    engine = FakeEngine(EngineConfig(shard=shard, dtype=DType.FLOAT32))
    engine.load(fake_checkpoint(), lambda done, total: None)
    engine.allocate(NUM_BLOCKS, BLOCK_SIZE)
    (there, stage_inbox), (back, home) = local_link(limits), local_link(limits)
    driver.deliver(scheduler.reset(Epoch(2), NUM_BLOCKS))
    with ThreadPoolExecutor(max_workers=1) as thread:
        tasks = [
            asyncio.create_task(driver.run(there, home)),
            asyncio.create_task(run_stage(engine, shard, stage_inbox, back, thread)),
        ]
        async with asyncio.timeout(30):
            rest = await tokens_of(generation)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (*first, *rest) == expected((1, 2, 3), 40)


async def test_a_pipeline_that_breaks_ends_the_driver_and_leaves_generations_to_be_ended():
    link, stage_inbox = local_link(LIMITS)
    back, home = local_link(LIMITS)
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32), epoch=Epoch(1))
    driver = Driver(scheduler)
    running = asyncio.create_task(driver.run(link, home))
    generation = driver.submit(SequenceRequest(prompt=(TokenId(1),), params=SamplingParams()))
    await anext(aiter(stage_inbox))
    await back.aclose()
    with pytest.raises(TransportError, match="closed its stream"):
        await running
    driver.fail_all(UnavailableError("gone", state="degraded"))
    with pytest.raises(UnavailableError, match="gone"):
        await tokens_of(generation)
    assert scheduler.statistics().num_running == 0


async def test_usage_counts_ids_and_its_times_add_up():
    async with pipeline(1) as rig, asyncio.timeout(30):
        await tokens_of(rig.ask(1, 2, 3, 4, 5, 6, 7, 8, 9))
        again = rig.ask(1, 2, 3, 4, 5, 6, 7, 8, 1)
        await tokens_of(again)
        usage = again.usage()
    assert (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens) == (9, 8, 8)
    assert usage.queue_s >= 0
    assert usage.prefill_s > 0
    assert usage.decode_s > 0


async def test_a_request_whose_machines_are_lost_again_and_again_ends_with_an_error_and_others_go_on():
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32), epoch=Epoch(1))
    driver = Driver(scheduler)
    suspect = driver.submit(SequenceRequest(prompt=(TokenId(1),), params=SamplingParams()))
    driver.pipeline_lost()
    driver.pipeline_lost()
    newcomer = driver.submit(SequenceRequest(prompt=(TokenId(2),), params=SamplingParams()))
    driver.pipeline_lost()
    with pytest.raises(GenerationError, match="3 times"):
        await tokens_of(suspect)
    assert not newcomer.ended.is_set()
    assert scheduler.statistics().num_waiting == 1


async def test_a_bug_in_the_driver_is_not_taken_for_a_lost_pipeline():
    class Confused(Scheduler):
        def schedule(self):
            raise KeyError("a bug")

    link, _ = local_link(LIMITS)
    _, home = local_link(LIMITS)
    driver = Driver(Confused(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32), epoch=Epoch(1)))
    with pytest.raises(ExceptionGroup) as caught:
        await driver.run(link, home)
    assert caught.group_contains(KeyError)
