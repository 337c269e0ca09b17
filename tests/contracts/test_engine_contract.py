"""What every engine promises, over every engine there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tllm.core.errors import EngineError, MissingKVError, ModelError
from tllm.core.types import (
    Activation,
    BlockCopy,
    BlockId,
    DType,
    Epoch,
    SamplingParams,
    SequenceId,
    Step,
    StepId,
    StepResult,
)
from tllm.engines.base import Engine, EngineConfig
from tllm.engines.torch.engine import TorchEngine
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.testing.fake_engine import FakeEngine
from tllm.testing.stages import GREEDY, Stages, chunk, cut

NUM_LAYERS = 4
BLOCK_SIZE = 8
NUM_BLOCKS = 24
PROMPT = [(i * i * 7 + 3 * i) % 256 for i in range(21)]
OTHER = [(i * 31 + 5) % 256 for i in range(13)]
CUTS = [(4,), (1, 3), (3, 1), (2, 1, 1), (1, 1, 1, 1)]

EngineFactory = Callable[[Shard], Engine]

ENGINES: dict[str, Callable[[EngineConfig], Engine]] = {"fake": FakeEngine, "torch": TorchEngine}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("contract"), layers=NUM_LAYERS))


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[EngineFactory]:
    """Makes loaded engines, and closes them."""
    made: list[Engine] = []

    def make(shard: Shard) -> Engine:
        new = ENGINES[request.param](EngineConfig(shard=shard, dtype=DType.FLOAT32, num_threads=1))
        made.append(new)
        new.load(checkpoint, lambda done, total: None)
        return new

    yield make
    for one in made:
        one.close()


def stages(engine: EngineFactory, sizes: Sequence[int] = (NUM_LAYERS,), *, num_blocks: int = NUM_BLOCKS) -> Stages:
    engines = [engine(shard) for shard in cut(NUM_LAYERS, sizes)]
    return Stages(engines, num_blocks=num_blocks, block_size=BLOCK_SIZE)


def step(*chunks: object, number: int = 0) -> Step:
    return Step(id=StepId(number), epoch=Epoch(1), chunks=chunks)  # type: ignore[arg-type]


# Answers do not depend on how they are computed ---------------------------------------------------------------------


def test_every_cut_into_stages_gives_the_same_tokens(engine: EngineFactory) -> None:
    answers = {sizes: stages(engine, sizes).generate(PROMPT, 8, blocks=[5, 2, 3, 9]) for sizes in CUTS}
    assert len(set(answers.values())) == 1, answers


def test_a_cut_alone_changes_not_one_bit_of_the_hidden_states(engine: EngineFactory) -> None:
    every: list[bytes] = []
    stages(engine, (1, 1, 1, 1)).run([chunk(1, 0, PROMPT, [5, 2, 3])], tap=lambda h: every.append(bytes(h.data)))
    assert len(set(every)) == 3
    for sizes in [(1, 3), (2, 2), (3, 1)]:
        seen: list[bytes] = []
        stages(engine, sizes).run([chunk(1, 0, PROMPT, [5, 2, 3])], tap=lambda h, seen=seen: seen.append(bytes(h.data)))
        assert seen == [every[sizes[0] - 1]]


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 8, 9, 20])
def test_every_chunking_of_the_prompt_gives_the_same_tokens(engine: EngineFactory, chunk_size: int) -> None:
    whole = stages(engine).generate(PROMPT, 6)
    assert stages(engine).generate(PROMPT, 6, chunk_size=chunk_size) == whole


def test_block_ids_and_their_order_do_not_matter(engine: EngineFactory) -> None:
    tables = ([0, 1, 2, 3], [3, 2, 1, 0], [23, 0, 7, 8], [4, 5, 1, 2])
    assert len({stages(engine).generate(PROMPT, 6, blocks=table) for table in tables}) == 1


def test_batch_mates_do_not_matter(engine: EngineFactory) -> None:
    alone = stages(engine).generate(PROMPT, 2, blocks=[0, 1, 2])
    other_alone = stages(engine).generate(OTHER, 2, blocks=[3, 4])
    both = stages(engine)
    first = both.run([chunk(1, 0, PROMPT[:10], [0, 1]), chunk(2, 0, OTHER, [3, 4], sample=GREEDY)])
    assert [(s.seq, s.token) for s in first.sampled] == [(2, other_alone[0])]
    # A prefill chunk and a decode in one step, decode first.
    second = both.run(
        [
            chunk(2, len(OTHER), other_alone[:1], [3, 4], sample=GREEDY),
            chunk(1, 10, PROMPT[10:], [0, 1, 2], sample=GREEDY),
        ]
    )
    assert [(s.seq, s.token) for s in second.sampled] == [(2, other_alone[1]), (1, alone[0])]
    third = both.run([chunk(1, len(PROMPT), alone[:1], [0, 1, 2], sample=GREEDY)])
    assert [s.token for s in third.sampled] == [alone[1]]


def test_sequences_that_share_the_blocks_of_a_prefix_answer_as_if_they_did_not(engine: EngineFactory) -> None:
    fork = [*PROMPT[:16], 1, 2, 3]
    expected = stages(engine).generate(fork, 4)
    shared = stages(engine)
    shared.run([chunk(1, 0, PROMPT, [4, 9, 1])])
    tokens = [s.token for s in shared.run([chunk(2, 16, fork[16:], [4, 9, 7], sample=GREEDY)]).sampled]
    for position in range(19, 22):
        step_result = shared.run([chunk(2, position, tokens[-1:], [4, 9, 7], sample=GREEDY)])
        tokens += [s.token for s in step_result.sampled]
    assert tuple(tokens) == expected
    # And the sequence that was there first goes on undisturbed.
    (again,) = shared.run([chunk(1, len(PROMPT), [65], [4, 9, 1], sample=GREEDY)]).sampled
    assert again.token == stages(engine).generate([*PROMPT, 65], 1)[0]


def test_a_copied_block_serves_up_to_the_token_where_prompts_part(engine: EngineFactory) -> None:
    fork = [*PROMPT[:13], 200, 201]
    expected = stages(engine, (2, 2)).generate(fork, 1)
    forked = stages(engine, (2, 2))
    forked.run([chunk(1, 0, PROMPT, [4, 9, 1])])
    copy = BlockCopy(source=BlockId(9), target=BlockId(0), length=5)
    (sampled,) = forked.run([chunk(2, 13, fork[13:], [4, 0], sample=GREEDY)], [copy]).sampled
    assert (sampled.token,) == expected


def test_a_rewritten_position_replaces_what_was_guessed_there(engine: EngineFactory) -> None:
    right = stages(engine).generate(PROMPT, 1)
    guessed = stages(engine)
    guessed.run([chunk(1, 0, [*PROMPT[:17], 9, 9, 9], [0, 1, 2])])
    (sampled,) = guessed.run([chunk(1, 17, PROMPT[17:], [0, 1, 2], sample=GREEDY)]).sampled
    assert (sampled.token,) == right


def test_a_seed_gives_the_same_tokens_in_any_cut_and_batch(engine: EngineFactory) -> None:
    params = SamplingParams(temperature=1.5, seed=11)
    alone = stages(engine).generate(PROMPT, 5, params=params)
    assert stages(engine, (1, 3)).generate(PROMPT, 5, params=params, chunk_size=6) == alone
    assert stages(engine).generate(PROMPT, 5, params=dataclasses.replace(params, seed=12)) != alone
    batch = stages(engine)
    mates = chunk(2, 0, OTHER, [5, 6], sample=SamplingParams(temperature=1.0, seed=3))
    result = batch.run([mates, chunk(1, 0, PROMPT, [0, 1, 2], sample=params)])
    assert [s.token for s in result.sampled if s.seq == 1] == [alone[0]]


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_are_the_same_in_one_chunk_and_in_many(engine: EngineFactory) -> None:
    whole = stages(engine).run([chunk(1, 0, PROMPT, [0, 1, 2], targets=PROMPT[1:], top=2)])
    (scored,) = whole.scored
    assert (scored.seq, scored.start, len(scored.scores)) == (1, 0, len(PROMPT) - 1)
    parts = stages(engine, (2, 2))
    first = parts.run([chunk(1, 0, PROMPT[:9], [0, 1], targets=PROMPT[1:10], top=2)])
    second = parts.run(
        [chunk(2, 0, OTHER, [5, 6]), chunk(1, 9, PROMPT[9:], [0, 1, 2], targets=PROMPT[10:], top=2, sample=GREEDY)]
    )
    assert second.scored[0].start == 9
    assert [s.seq for s in second.sampled] == [1]
    pieces = first.scored[0].scores + second.scored[0].scores
    for piece, one in zip(pieces, scored.scores, strict=True):
        assert piece.logprob == pytest.approx(one.logprob, abs=1e-4)
        assert [t.token for t in piece.top] == [t.token for t in one.top]


def test_only_chunks_that_ask_are_sampled_and_in_the_order_of_the_step(engine: EngineFactory) -> None:
    result = stages(engine).run(
        [
            chunk(7, 0, PROMPT[:4], [6], sample=GREEDY),
            chunk(2, 0, PROMPT[:5], [3]),
            chunk(5, 0, OTHER[:6], [4], sample=GREEDY),
        ]
    )
    assert [s.seq for s in result.sampled] == [7, 5]
    assert result.scored == result.failed == ()


def test_logprobs_come_only_when_asked_for(engine: EngineFactory) -> None:
    asked = SamplingParams(temperature=0.0, logprobs=3)
    result = stages(engine).run(
        [chunk(1, 0, PROMPT, [0, 1, 2], sample=asked), chunk(2, 0, PROMPT, [3, 4, 5], sample=GREEDY)]
    )
    with_logprobs, without = result.sampled
    assert with_logprobs.logprob is not None
    assert len(with_logprobs.top) == 3
    assert (without.logprob, without.top) == (None, ())
    assert with_logprobs.token == without.token


def test_a_result_names_its_step_and_epoch(engine: EngineFactory) -> None:
    one = engine(Shard(first_layer=0, last_layer=NUM_LAYERS, embed=True, head=True))
    one.allocate(4, BLOCK_SIZE)
    answer = one.forward(Step(id=StepId(41), epoch=Epoch(3), chunks=(chunk(1, 0, [1], [0]),)), None)
    assert isinstance(answer, StepResult)
    assert (answer.step, answer.epoch) == (41, 3)


# KV that is not there -------------------------------------------------------------------------------------------------


def test_reading_positions_nobody_wrote_is_an_error_and_changes_nothing(engine: EngineFactory) -> None:
    right = stages(engine).generate(PROMPT, 1)
    some = stages(engine)
    some.run([chunk(1, 0, PROMPT[:12], [0, 1])])
    with pytest.raises(MissingKVError, match="sequence 1"):
        some.run([chunk(1, 13, PROMPT[13:], [0, 1, 2], sample=GREEDY)])  # position 12 is missing
    with pytest.raises(MissingKVError):
        some.run([chunk(1, 12, PROMPT[12:], [0, 5, 2], sample=GREEDY)])  # another's block
    (sampled,) = some.run([chunk(1, 12, PROMPT[12:], [0, 1, 2], sample=GREEDY)]).sampled
    assert (sampled.token,) == right


def test_allocating_again_forgets_all_kv(engine: EngineFactory) -> None:
    one = engine(Shard(first_layer=0, last_layer=NUM_LAYERS, embed=True, head=True))
    one.allocate(4, BLOCK_SIZE)
    one.forward(step(chunk(1, 0, [1, 2, 3], [0])), None)
    one.allocate(4, BLOCK_SIZE)
    with pytest.raises(MissingKVError):
        one.forward(step(chunk(1, 3, [4], [0])), None)


def test_positions_behind_a_rewritten_one_are_gone(engine: EngineFactory) -> None:
    some = stages(engine)
    some.run([chunk(1, 0, PROMPT[:8], [0])])
    some.run([chunk(1, 4, [9], [0])])
    with pytest.raises(MissingKVError):
        some.run([chunk(1, 6, [9], [0, 1])])


def test_a_copy_of_kv_that_is_not_there_is_an_error(engine: EngineFactory) -> None:
    some = stages(engine)
    some.run([chunk(1, 0, PROMPT[:6], [0])])
    with pytest.raises(MissingKVError):
        some.run([], [BlockCopy(source=BlockId(0), target=BlockId(1), length=7)])
    some.run([], [BlockCopy(source=BlockId(0), target=BlockId(1), length=6)])
    some.run([chunk(2, 6, [1], [1])])


# What is refused, with everything as it was ---------------------------------------------------------------------------

MALFORMED = {
    "no tokens": chunk(9, 0, [], [8]),
    "too few blocks": chunk(9, 0, PROMPT, [8]),
    "block beyond the end": chunk(9, 0, [1], [NUM_BLOCKS]),
    "negative block": chunk(9, 0, [1], [-1]),
    "token beyond the vocabulary": chunk(9, 0, [100_000], [8]),
    "negative token": chunk(9, 0, [-1], [8]),
    "negative start": chunk(9, -1, [1], [8]),
    "more targets than rows": chunk(9, 0, [1], [8], targets=[1, 2]),
    "the same sequence twice": chunk(1, 0, [1], [8]),
    "a block another chunk writes": chunk(9, 0, [1], [1]),
    "its own block twice": chunk(9, 0, PROMPT[:9], [8, 8]),
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_chunk_is_refused_and_harms_nobody(engine: EngineFactory, malformed: object) -> None:
    right = stages(engine).generate(PROMPT, 1)
    some = stages(engine)
    some.run([chunk(1, 0, PROMPT[:10], [0, 1])])
    good = chunk(1, 10, PROMPT[10:], [0, 1, 2], sample=GREEDY)
    for order in ([malformed, good], [good, malformed]):
        with pytest.raises(EngineError):
            some.run(order)  # type: ignore[arg-type]
    (sampled,) = some.run([good]).sampled
    assert (sampled.token,) == right


def test_positions_beyond_the_model_are_refused(engine: EngineFactory, checkpoint: Checkpoint) -> None:
    max_positions = checkpoint.spec.max_positions
    some = stages(engine, num_blocks=max_positions // BLOCK_SIZE + 1)
    blocks = range(max_positions // BLOCK_SIZE + 1)
    some.run([chunk(1, 0, [1] * max_positions, blocks, sample=GREEDY)])
    with pytest.raises(EngineError, match="position"):
        some.run([chunk(1, max_positions, [1], blocks)])


def test_positions_beyond_what_is_served_are_refused(checkpoint: Checkpoint) -> None:
    (shard,) = cut(NUM_LAYERS, (NUM_LAYERS,))
    for make in ENGINES.values():
        one = make(EngineConfig(shard=shard, dtype=DType.FLOAT32, num_threads=1, max_positions=10))
        one.load(checkpoint, lambda done, total: None)
        one.allocate(4, BLOCK_SIZE)
        one.forward(step(chunk(1, 0, PROMPT[:10], [0, 1])), None)
        with pytest.raises(EngineError, match="position 10"):
            one.forward(step(chunk(1, 10, [1], [0, 1])), None)
        one.close()


def test_hidden_states_are_wanted_exactly_where_tokens_are_not_embedded(engine: EngineFactory) -> None:
    first, last = stages(engine, (2, 2)).engines
    one = step(chunk(1, 0, [1, 2], [0]))
    hidden = first.forward(one, None)
    assert isinstance(hidden, Activation)
    assert isinstance(last.forward(one, hidden), StepResult)
    with pytest.raises(EngineError, match="hidden"):
        first.forward(one, hidden)
    with pytest.raises(EngineError, match="hidden"):
        last.forward(one, None)


def test_hidden_states_of_another_shape_type_or_length_are_refused(engine: EngineFactory) -> None:
    first, last = stages(engine, (2, 2)).engines
    one = step(chunk(1, 0, [1, 2], [0]))
    hidden = first.forward(one, None)
    assert isinstance(hidden, Activation)
    rows, width = hidden.shape
    for wrong in (
        dataclasses.replace(hidden, shape=(rows + 1, width)),
        dataclasses.replace(hidden, shape=(rows, width // 2)),
        dataclasses.replace(hidden, data=bytes(hidden.data)[:-4]),
        dataclasses.replace(hidden, dtype=DType.BFLOAT16),
    ):
        with pytest.raises(EngineError, match="hidden"):
            last.forward(one, wrong)
    for data in (bytes(hidden.data), bytearray(hidden.data), memoryview(b"x" + bytes(hidden.data))[1:]):
        last.forward(one, dataclasses.replace(hidden, data=data))


def test_calls_out_of_order_are_errors(checkpoint: Checkpoint) -> None:
    for make in ENGINES.values():
        one = make(EngineConfig(shard=cut(NUM_LAYERS, (NUM_LAYERS,))[0], dtype=DType.FLOAT32, num_threads=1))
        with pytest.raises(EngineError, match="load"):
            one.allocate(1, BLOCK_SIZE)
        one.load(checkpoint, lambda done, total: None)
        with pytest.raises(EngineError, match="allocate"):
            one.forward(step(chunk(1, 0, [1], [0])), None)
        one.close()
        one.close()
        with pytest.raises(EngineError):
            one.forward(step(chunk(1, 0, [1], [0])), None)


def test_more_kv_than_there_is_memory_is_refused(engine: EngineFactory) -> None:
    one = engine(Shard(first_layer=0, last_layer=NUM_LAYERS, embed=True, head=True))
    with pytest.raises(EngineError, match="bytes"):
        one.allocate(1 << 40, BLOCK_SIZE)
    one.allocate(4, BLOCK_SIZE)
    one.forward(step(chunk(1, 0, [1], [0])), None)


# Becoming another shard -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Ends apart, ends tied, ends tied with learned positions and biases."""
    directory = tmp_path_factory.mktemp("reload")
    return {
        name: Checkpoint.open(tiny_checkpoint(directory / name, family, layers=NUM_LAYERS, tied=tied, tokenizer=False))
        for name, family, tied in (("llama", "llama", False), ("tied", "qwen3", True), ("gpt2", "gpt2", True))
    }


def loaded(make: Callable[[EngineConfig], Engine], checkpoint: Checkpoint, shard: Shard) -> Engine:
    one = make(EngineConfig(shard=shard, dtype=DType.FLOAT32, num_threads=1))
    one.load(checkpoint, lambda done, total: None)
    return one


def answers(one: Engine, shard: Shard, hidden: Sequence[Activation]) -> tuple[object, ...]:
    """Everything that the engine says of a prompt and one decode, to the last bit."""
    one.allocate(4, BLOCK_SIZE)
    asked = SamplingParams(temperature=0.0, logprobs=3)
    steps = (step(chunk(1, 0, PROMPT[:9], [2, 1], sample=asked)), step(chunk(1, 9, PROMPT[9:10], [2, 1], sample=asked)))
    said = (one.forward(each, None if shard.embed else x) for each, x in zip(steps, hidden, strict=True))
    return tuple(bytes(answer.data) if isinstance(answer, Activation) else answer for answer in said)


shards = st.builds(
    lambda ends, embed, head: Shard(first_layer=min(ends), last_layer=max(ends), embed=embed, head=head),
    st.sets(st.integers(0, NUM_LAYERS), min_size=1, max_size=2),  # a shard without layers is a shard
    st.booleans(),
    st.booleans(),
)


@pytest.mark.parametrize("engine_name", sorted(ENGINES))
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.lists(shards, min_size=2, max_size=3))
def test_a_reloaded_engine_is_a_fresh_one_that_read_only_what_it_lacked(
    checkpoints: dict[str, Checkpoint], name: str, engine_name: str, path: list[Shard]
) -> None:
    make, checkpoint = ENGINES[engine_name], checkpoints[name]
    start = loaded(make, checkpoint, Shard(first_layer=0, last_layer=1, embed=True, head=False))
    start.allocate(4, BLOCK_SIZE)
    prompt = (step(chunk(1, 0, PROMPT[:9], [2, 1])), step(chunk(1, 9, PROMPT[9:10], [2, 1])))
    hidden = [answer for each in prompt if isinstance(answer := start.forward(each, None), Activation)]
    one = loaded(make, checkpoint, path[0])
    held = {piece.target for piece in checkpoint.slices(path[0])}
    expected_bytes = one.statistics().read_bytes
    assert expected_bytes == sum(piece.num_bytes for piece in checkpoint.slices(path[0]))
    answers(one, path[0], hidden)
    for shard in path[1:]:
        seen: list[tuple[int, int]] = []
        one.reload(checkpoint, shard, lambda done, total, seen=seen: seen.append((done, total)))
        wanted = {piece.target: piece.num_bytes for piece in checkpoint.slices(shard)}
        missing = sum(size for target, size in wanted.items() if target not in held)
        assert seen == sorted(seen)
        assert seen[-1] == (missing, missing)
        held, expected_bytes = set(wanted), expected_bytes + missing
        statistics = one.statistics()
        assert statistics.read_bytes == expected_bytes
        assert statistics.weight_bytes == checkpoint.weight_bytes(shard, DType.FLOAT32)
        assert (statistics.kv_bytes, statistics.num_blocks) == (0, 0)
    fresh = loaded(make, checkpoint, path[-1])
    assert answers(one, path[-1], hidden) == answers(fresh, path[-1], hidden)
    for each in (start, one, fresh):
        each.close()
    assert one.statistics().weight_bytes == 0


def test_kv_is_forgotten_by_a_reload(engine: EngineFactory, checkpoint: Checkpoint) -> None:
    whole = Shard(first_layer=0, last_layer=NUM_LAYERS, embed=True, head=True)
    one = engine(whole)
    one.allocate(4, BLOCK_SIZE)
    one.forward(step(chunk(1, 0, [1, 2, 3], [0])), None)
    one.reload(checkpoint, whole, lambda done, total: None)
    with pytest.raises(EngineError, match="allocate"):
        one.forward(step(chunk(1, 3, [4], [0])), None)
    one.allocate(4, BLOCK_SIZE)
    with pytest.raises(MissingKVError):
        one.forward(step(chunk(1, 3, [4], [0])), None)


def test_what_cannot_be_reloaded_is_refused(checkpoints: dict[str, Checkpoint]) -> None:
    shard = Shard(first_layer=0, last_layer=2, embed=True, head=False)
    for make in ENGINES.values():
        one = make(EngineConfig(shard=shard, dtype=DType.FLOAT32, num_threads=1))
        with pytest.raises(EngineError, match="load comes before reload"):
            one.reload(checkpoints["llama"], shard, lambda done, total: None)
        one.load(checkpoints["llama"], lambda done, total: None)
        with pytest.raises(EngineError, match="another checkpoint"):
            one.reload(checkpoints["tied"], shard, lambda done, total: None)
        with pytest.raises(EngineError, match="whole layers"):
            one.reload(checkpoints["llama"], dataclasses.replace(shard, ranks=2), lambda done, total: None)
        beyond = Shard(first_layer=1, last_layer=NUM_LAYERS + 1, embed=False, head=False)
        with pytest.raises(ModelError, match="not a run"):
            one.reload(checkpoints["llama"], beyond, lambda done, total: None)
        assert one.statistics().weight_bytes == 0
        with pytest.raises(EngineError):
            one.allocate(1, BLOCK_SIZE)
        one.close()


# Accounts -------------------------------------------------------------------------------------------------------------


def test_a_step_may_be_copies_alone_or_nothing(engine: EngineFactory) -> None:
    result = stages(engine, (2, 2)).run([])
    assert result.sampled == ()


def test_statistics_count_steps_tokens_and_bytes(engine: EngineFactory, checkpoint: Checkpoint) -> None:
    one = engine(Shard(first_layer=1, last_layer=3, embed=False, head=False))
    assert one.statistics().num_blocks == one.statistics().kv_bytes == 0
    one.allocate(4, BLOCK_SIZE)
    statistics = one.statistics()
    assert statistics.num_blocks == 4
    assert statistics.kv_bytes == 4 * BLOCK_SIZE * checkpoint.spec.kv_bytes_per_position(2, DType.FLOAT32)
    whole = stages(engine).engines[0]
    whole.forward(step(chunk(SequenceId(1), 0, [1, 2, 3], [0])), None)
    whole.forward(step(chunk(SequenceId(1), 3, [1], [0])), None)
    assert (whole.statistics().num_steps, whole.statistics().num_tokens) == (2, 4)


def test_progress_of_loading_ends_at_the_total(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for make in ENGINES.values():
        seen: list[tuple[int, int]] = []
        one = make(EngineConfig(shard=cut(NUM_LAYERS, (2, 2))[1], dtype=DType.FLOAT32, num_threads=1))
        one.load(checkpoint, lambda done, total, seen=seen: seen.append((done, total)))
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1] > 0
        one.close()
