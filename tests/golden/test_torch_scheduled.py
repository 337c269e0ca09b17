"""Scheduler and torch engine together: tokens equal transformers' whatever the cut, the chunks, the company, the cache.

One loop plays driver and links: steps go through all stages in order, and as many are in flight as the case allows.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tllm.core.types import Activation, DType, Epoch, FinishReason, SamplingParams, Step, StepResult, TokenId
from tllm.engines.base import EngineConfig
from tllm.engines.torch.engine import TorchEngine
from tllm.models.checkpoint import Checkpoint
from tllm.scheduler.scheduler import Scheduler, SchedulerConfig, SequenceRequest
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.testing.stages import cut

BLOCK_SIZE = 8
MAX_LEN = 96
NUM_TOKENS = 12
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")

Prompt = tuple[TokenId, ...]


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, max_positions=MAX_LEN)


def prompts() -> list[Prompt]:
    """Eight prompts of 1 to 50 tokens; some share their first tokens, two are equal."""
    source = random.Random(5)
    trunk = [source.randrange(256) for _ in range(40)]
    shared = [trunk[:n] + [source.randrange(256) for _ in range(extra)] for n, extra in ((40, 10), (33, 4), (19, 3))]
    others = [[source.randrange(256) for _ in range(n)] for n in (1, 9, 30)]
    return [tuple(map(TokenId, prompt)) for prompt in (*shared, *others, trunk, trunk)]


@pytest.fixture(scope="module")
def expected(directory) -> dict[Prompt, list[int]]:
    """Greedy continuations by transformers, each prompt alone, by full forwards without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    answers = {}
    for prompt in set(prompts()):
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1]
            best = logits.topk(2).values
            assert best[0] - best[1] > 1e-3, "a near tie proves nothing: choose another seed"
            ids.append(int(logits.argmax()))
        answers[prompt] = ids[len(prompt) :]
    return answers


@contextmanager
def stages(directory: Path, sizes: Sequence[int], num_blocks: int) -> Iterator[list[TorchEngine]]:
    checkpoint = Checkpoint.open(directory)
    engines = []
    for shard in cut(checkpoint.spec.num_layers, sizes):
        engine = TorchEngine(EngineConfig(shard=shard, dtype=DType.FLOAT32))
        engine.load(checkpoint, lambda done, total: None)
        engine.allocate(num_blocks, BLOCK_SIZE)
        engines.append(engine)
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()


def through(engines: list[TorchEngine], step: Step) -> StepResult:
    hidden: Activation | None = None
    for engine in engines:
        outcome = engine.forward(step, hidden)
        if isinstance(outcome, StepResult):
            return outcome
        hidden = outcome
    raise AssertionError("no stage has the head")


def run(
    directory: Path,
    asked: Sequence[Prompt],
    *,
    sizes: Sequence[int] = (4,),
    num_blocks: int = 200,
    max_batch_tokens: int = 64,
    prefix_cache: bool = True,
    max_sequences: int = 64,
) -> tuple[list[list[int]], Scheduler]:
    """All prompts at once; their tokens in the order of asking."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_LEN,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            max_steps_in_flight=len(sizes),
            prefix_cache=prefix_cache,
        ),
        epoch=Epoch(1),
    )
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    seqs = [scheduler.add(SequenceRequest(prompt=prompt, params=params)) for prompt in asked]
    tokens: dict[int, list[int]] = {seq: [] for seq in seqs}
    ended = 0
    flying: deque[Step] = deque()
    with stages(directory, sizes, num_blocks) as engines:
        while ended < len(seqs):
            while (step := scheduler.schedule()) is not None:
                flying.append(step)
            for update in scheduler.complete(through(engines, flying.popleft())):
                tokens[update.seq] += [sampled.token for sampled in update.sampled]
                assert update.finish in (None, FinishReason.LENGTH), update.reason
                ended += update.finish is not None
            scheduler.check()
    return [tokens[seq] for seq in seqs], scheduler


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 2), (1, 1, 2), (1, 1, 1, 1)], ids=str)
def test_every_cut_gives_the_reference_tokens(directory, expected, sizes):
    asked = prompts()
    answers, _ = run(directory, asked, sizes=sizes)
    assert answers == [expected[prompt] for prompt in asked]


@pytest.mark.parametrize("max_batch_tokens", [1, 3, 8, 512])
def test_every_chunking_gives_the_reference_tokens(directory, expected, max_batch_tokens):
    asked = prompts()
    answers, _ = run(directory, asked, sizes=(3, 1), max_batch_tokens=max_batch_tokens)
    assert answers == [expected[prompt] for prompt in asked]


def test_alone_and_in_company_the_tokens_are_the_same(directory, expected):
    for prompt in prompts():
        assert run(directory, [prompt])[0] == [expected[prompt]]


def test_a_prefix_that_was_found_changes_nothing(directory, expected):
    asked = prompts()
    found, scheduler = run(directory, asked, max_sequences=1)
    assert scheduler.statistics().num_prefix_hit_tokens >= 33 + 19 + 39
    computed, scheduler = run(directory, asked, max_sequences=1, prefix_cache=False)
    assert scheduler.statistics().num_prefix_hit_tokens == 0
    assert found == computed == [expected[prompt] for prompt in asked]


def test_forced_preemption_changes_nothing(directory, expected):
    asked = prompts()
    answers, scheduler = run(directory, asked, sizes=(2, 2), num_blocks=14, prefix_cache=False)
    assert scheduler.statistics().num_preemptions > 0
    assert answers == [expected[prompt] for prompt in asked]
