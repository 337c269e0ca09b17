"""The fake must be as strict as it claims: right bookkeeping gives `fake_tokens`, wrong bookkeeping something else."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.core.errors import EngineError
from tllm.core.types import Activation, BlockCopy, BlockId, DType, Epoch, SamplingParams, Step, StepId, TokenId
from tllm.engines.base import EngineConfig
from tllm.models.spec import Shard
from tllm.testing.fake_engine import FAKE_SPEC, FakeBehaviour, FakeEngine, Faults, fake_checkpoint, fake_tokens
from tllm.testing.stages import GREEDY, Stages, chunk, cut

PROMPT = list(range(40, 59))


def engine(shard: Shard, behaviour: FakeBehaviour | None = None, dtype: DType = DType.FLOAT32) -> FakeEngine:
    new = FakeEngine(EngineConfig(shard=shard, dtype=dtype), behaviour)
    new.load(fake_checkpoint(), lambda done, total: None)
    return new


def stages(*sizes: int, dtype: DType = DType.FLOAT32) -> Stages:
    engines = [engine(shard, dtype=dtype) for shard in cut(FAKE_SPEC.num_layers, sizes or (FAKE_SPEC.num_layers,))]
    return Stages(engines, num_blocks=16, block_size=4)


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.lists(st.integers(0, FAKE_SPEC.vocab_size - 1), min_size=1, max_size=30),
    sizes=st.sampled_from([(4,), (1, 3), (2, 1, 1), (1, 1, 1, 1)]),
    chunk_size=st.integers(1, 30),
    blocks=st.permutations(range(16)),
    dtype=st.sampled_from(list(DType)),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_the_tokens_are_foretold_whatever_the_cut_chunks_blocks_and_wire_type(
    prompt: list[int], sizes: tuple[int, ...], chunk_size: int, blocks: list[int], dtype: DType, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, seed=5)
    got = stages(*sizes, dtype=dtype).generate(prompt, 5, blocks=blocks, chunk_size=chunk_size, params=params)
    assert got == fake_tokens([TokenId(t) for t in prompt], 5, params)


def expected() -> TokenId:
    return fake_tokens([TokenId(t) for t in PROMPT], 1)[0]


def test_a_wrong_block_with_kv_in_it_gives_a_wrong_token() -> None:
    some = stages()
    some.run([chunk(1, 0, PROMPT[:18], [0, 1, 2, 3, 4]), chunk(2, 0, PROMPT[::-1], [5, 6, 7, 8, 9])])
    (sampled,) = some.run([chunk(1, 18, PROMPT[18:], [0, 6, 2, 3, 4], sample=GREEDY)]).sampled
    assert sampled.token != expected()
    (sampled,) = some.run([chunk(1, 18, PROMPT[18:], [0, 1, 2, 3, 4], sample=GREEDY)]).sampled
    assert sampled.token == expected()


def test_two_exchanged_blocks_of_one_sequence_give_a_wrong_token() -> None:
    some = stages()
    some.run([chunk(1, 0, PROMPT[:18], [0, 1, 2, 3, 4])])
    (sampled,) = some.run([chunk(1, 18, PROMPT[18:], [1, 0, 2, 3, 4], sample=GREEDY)]).sampled
    assert sampled.token != expected()


def test_a_copy_of_the_wrong_block_gives_a_wrong_token() -> None:
    some = stages()
    some.run([chunk(1, 0, PROMPT, [0, 1, 2, 3, 4])])
    (sampled,) = some.run(
        [chunk(2, 18, PROMPT[18:], [0, 1, 2, 3, 9], sample=GREEDY)],
        [BlockCopy(source=BlockId(3), target=BlockId(9), length=2)],
    ).sampled
    assert sampled.token != expected()


def test_exchanged_rows_of_hidden_states_give_wrong_tokens() -> None:
    first, last = stages(2, 2).engines
    chunks = (chunk(1, 0, PROMPT[:1], [0], sample=GREEDY), chunk(2, 0, PROMPT[1:2], [1], sample=GREEDY))
    step = Step(id=StepId(0), epoch=Epoch(1), chunks=chunks)
    hidden = first.forward(step, None)
    assert isinstance(hidden, Activation)
    right = last.forward(step, hidden)
    half = len(bytes(hidden.data)) // 2
    exchanged = bytes(hidden.data)[half:] + bytes(hidden.data)[:half]
    wrong = last.forward(step, dataclasses.replace(hidden, data=exchanged))
    assert wrong != right


def test_a_skipped_stage_gives_a_wrong_token() -> None:
    first, _, last = stages(1, 2, 1).engines
    step = Step(id=StepId(0), epoch=Epoch(1), chunks=(chunk(1, 0, PROMPT, range(5), sample=GREEDY),))
    hidden = first.forward(step, None)
    assert isinstance(hidden, Activation)
    answer = last.forward(step, hidden)
    assert not isinstance(answer, Activation)
    assert answer.sampled[0].token != expected()


def test_damaged_hidden_states_are_noticed() -> None:
    first, last = stages(2, 2).engines
    step = Step(id=StepId(0), epoch=Epoch(1), chunks=(chunk(1, 0, PROMPT, range(5)),))
    hidden = first.forward(step, None)
    assert isinstance(hidden, Activation)
    damaged = bytearray(hidden.data)
    damaged[-1] ^= 1
    with pytest.raises(EngineError, match="hidden"):
        last.forward(step, dataclasses.replace(hidden, data=damaged))


def test_time_is_asked_for_by_step_and_token() -> None:
    slept: list[float] = []
    behaviour = FakeBehaviour(seconds_per_step=1.0, seconds_per_token=0.25, sleep=slept.append)
    (shard,) = cut(FAKE_SPEC.num_layers, (FAKE_SPEC.num_layers,))
    some = Stages([engine(shard, behaviour)], num_blocks=8, block_size=4)
    some.run([chunk(1, 0, [1, 2, 3], [0]), chunk(2, 0, [1], [1])])
    some.run([chunk(1, 3, [1], [0])])
    assert slept == [2.0, 1.25]


@pytest.mark.parametrize(
    "faults",
    [Faults(steps=frozenset({1})), Faults(seqs=frozenset({9})), Faults(poison_ids=frozenset({77}))],  # type: ignore[arg-type]
    ids=["by call", "by sequence", "by token"],
)
def test_faults_strike_where_told_and_the_next_step_is_served(faults: Faults) -> None:
    (shard,) = cut(FAKE_SPEC.num_layers, (FAKE_SPEC.num_layers,))
    some = Stages([engine(shard, FakeBehaviour(faults=faults))], num_blocks=16, block_size=4)
    some.run([chunk(1, 0, PROMPT[:18], [0, 1, 2, 3, 4])])
    with pytest.raises(EngineError, match="told"):
        some.run([chunk(1, 18, PROMPT[18:], [0, 1, 2, 3, 4]), chunk(9, 0, [77], [8])])
    (sampled,) = some.run([chunk(1, 18, PROMPT[18:], [0, 1, 2, 3, 4], sample=GREEDY)]).sampled
    assert sampled.token == expected()


def test_a_sequence_can_fail_alone() -> None:
    (shard,) = cut(FAKE_SPEC.num_layers, (FAKE_SPEC.num_layers,))
    faults = Faults(failed_seqs=frozenset({2}))  # type: ignore[arg-type]
    some = Stages([engine(shard, FakeBehaviour(faults=faults))], num_blocks=16, block_size=4)
    result = some.run([chunk(1, 0, PROMPT, range(5), sample=GREEDY), chunk(2, 0, [1], [9], sample=GREEDY)])
    assert [f.seq for f in result.failed] == [2]
    assert [s.token for s in result.sampled] == [expected()]


def test_allowed_and_banned_tokens_are_respected() -> None:
    params = SamplingParams(temperature=0.0, allowed_ids=(TokenId(3), TokenId(8)))
    tokens = fake_tokens([TokenId(t) for t in PROMPT], 12, params)
    assert set(tokens) == {3, 8}
    stopping = SamplingParams(temperature=0.0, stop_ids=(expected(),), min_tokens=1)
    assert fake_tokens([TokenId(t) for t in PROMPT], 1, stopping)[0] != expected()
