"""What only the torch engine does: devices, types, non-finite rows, one bit per cut, closeness across batches."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.core.errors import ConfigError, EngineError
from tllm.core.types import Activation, DType, Epoch, Scored, Step, StepId, StepResult
from tllm.engines.base import EngineConfig
from tllm.engines.torch import engine as engine_module
from tllm.engines.torch import linears
from tllm.engines.torch.attention import matmul
from tllm.engines.torch.engine import TorchEngine
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.testing.stages import GREEDY, Stages, chunk, cut

PROMPT = [(i * i * 7 + 3 * i) % 256 for i in range(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("model"), "mistral", layers=3, window=12))


def load(checkpoint: Checkpoint, shard: Shard, dtype: DType = DType.FLOAT32) -> TorchEngine:
    engine = TorchEngine(EngineConfig(shard=shard, dtype=dtype, num_threads=1))
    engine.load(checkpoint, lambda done, total: None)
    return engine


def whole(checkpoint: Checkpoint, dtype: DType = DType.FLOAT32) -> Stages:
    engines = [load(checkpoint, shard, dtype) for shard in cut(3, (3,))]
    return Stages(engines, num_blocks=40, block_size=4)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xpu", "meta", ""])
def test_a_device_that_is_not_there_is_a_config_error_that_says_so(device: str) -> None:
    (shard,) = cut(3, (3,))
    with pytest.raises(ConfigError, match="device"):
        TorchEngine(EngineConfig(shard=shard, dtype=DType.FLOAT32, device=device))


def test_more_than_one_rank_is_refused(checkpoint: Checkpoint) -> None:
    (shard,) = cut(3, (3,))
    with pytest.raises(EngineError, match="rank"):
        TorchEngine(EngineConfig(shard=dataclasses.replace(shard, ranks=2), dtype=DType.FLOAT32))


def test_more_positions_than_were_learned_are_refused(tmp_path: Path) -> None:
    gpt2 = Checkpoint.open(tiny_checkpoint(tmp_path, "gpt2", layers=1, max_positions=64))
    (shard,) = cut(1, (1,))
    engine = TorchEngine(EngineConfig(shard=shard, dtype=DType.FLOAT32, max_positions=65))
    with pytest.raises(EngineError, match="64"):
        engine.load(gpt2, lambda done, total: None)


@pytest.mark.parametrize("dtype", list(DType))
def test_a_cut_changes_not_one_bit_in_any_type(checkpoint: Checkpoint, dtype: DType) -> None:
    sizes = [(3,), (1, 2), (2, 1), (1, 1, 1)]
    answers = []
    for stages in (
        Stages([load(checkpoint, shard, dtype) for shard in cut(3, s)], num_blocks=12, block_size=4) for s in sizes
    ):
        first = stages.run([chunk(1, 0, PROMPT[:30], range(11), targets=PROMPT[1:31], top=3)])
        second = stages.run([chunk(1, 30, PROMPT[30:], range(11), targets=PROMPT[31:], top=3)])
        answers.append((first.scored, second.scored))
    assert all(answer == answers[0] for answer in answers)


@settings(max_examples=20, deadline=None)
@given(
    order=st.permutations(range(40)),
    cuts=st.sets(st.integers(1, len(PROMPT) - 1), max_size=5),
    mates=st.lists(st.integers(1, 9), max_size=3),
)
def test_logits_in_fp32_hardly_depend_on_chunks_blocks_and_batch_mates(
    checkpoint: Checkpoint, order: list[int], cuts: set[int], mates: list[int]
) -> None:
    (reference,) = whole(checkpoint).run([chunk(1, 0, PROMPT, range(10), targets=PROMPT[1:], top=5)]).scored
    stages = whole(checkpoint)
    table, rest = order[:10], order[10:]
    edges = [0, *sorted(cuts), len(PROMPT)]
    scores = []
    for start, stop in itertools.pairwise(edges):
        others = [chunk(2 + i, 0, [7 * i] * n, rest[3 * i : 3 * i + 3]) for i, n in enumerate(mates)]
        own = chunk(1, start, PROMPT[start:stop], table, targets=PROMPT[start + 1 : stop + 1], top=5)
        (scored,) = stages.run([*others[:1], own, *others[1:]]).scored
        scores.extend(scored.scores)
    for got, expected in zip(scores, reference.scores, strict=True):
        # The spread of the logits is about 6; the definition's 1e-5 is for logits of about 1.
        assert got.logprob == pytest.approx(expected.logprob, abs=6e-5)
        for a, b in zip(got.top, expected.top, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=6e-5)


def test_the_kernels_of_other_devices_give_the_same_answers(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = chunk(1, 0, PROMPT, range(10), targets=PROMPT[1:], top=1)
    fast = whole(checkpoint)
    (expected,) = fast.run([part]).scored
    monkeypatch.setattr(engine_module, "kernel_for", lambda device: matmul)
    monkeypatch.setattr(linears, "can_pack", lambda device, dtype: False)
    plain = whole(checkpoint)
    (got,) = plain.run([part]).scored
    for a, b in zip(got.scores, expected.scores, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=6e-5)
    assert plain.generate(PROMPT, 6, chunk_size=9) == fast.generate(PROMPT, 6)


def spoiled(hidden: Activation, row: int) -> Activation:
    x = torch.frombuffer(bytearray(hidden.data), dtype=torch.float32).view(hidden.shape)
    x[row] = float("nan")
    return dataclasses.replace(hidden, data=x.view(-1).view(torch.uint8).numpy().data)


def test_a_row_that_is_not_finite_fails_its_sequence_alone(checkpoint: Checkpoint) -> None:
    first, last = (load(checkpoint, shard) for shard in cut(3, (1, 2)))
    for engine in (first, last):
        engine.allocate(20, 4)
    chunks = (
        chunk(1, 0, PROMPT[:5], [0, 1], sample=GREEDY),
        chunk(2, 0, PROMPT[:6], [2, 3], sample=GREEDY),
        chunk(3, 0, PROMPT[:6], [4, 5], targets=PROMPT[1:6], sample=GREEDY),
        chunk(4, 0, PROMPT[:6], [6, 7], targets=PROMPT[1:6]),
    )
    step = Step(id=StepId(0), epoch=Epoch(1), chunks=chunks)
    hidden = first.forward(step, None)
    assert isinstance(hidden, Activation)
    good = last.forward(step, hidden)
    assert isinstance(good, StepResult)
    bad = last.forward(step, spoiled(spoiled(hidden, 3), 12))  # rows of sequences 1 and 3
    assert isinstance(bad, StepResult)
    assert {failure.seq for failure in bad.failed} == {1, 3}
    assert bad.sampled == tuple(s for s in good.sampled if s.seq == 2)
    assert bad.scored == tuple(s for s in good.scored if s.seq == 4)


def test_scoring_a_long_chunk_projects_few_rows_at_a_time(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = whole(checkpoint)
    part = chunk(1, 0, PROMPT, range(10), targets=PROMPT[1:], top=2)
    (at_once,) = stages.run([part]).scored
    monkeypatch.setattr(engine_module, "_ROWS_SCORED_AT_ONCE", 7)
    (in_slices,) = stages.run([part]).scored
    assert isinstance(at_once, Scored)
    assert (in_slices.seq, in_slices.start, len(in_slices.scores)) == (1, 0, len(PROMPT) - 1)
    for a, b in zip(in_slices.scores, at_once.scores, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=6e-5)


def test_an_activation_is_the_callers_to_keep(checkpoint: Checkpoint) -> None:
    first, _ = (load(checkpoint, shard) for shard in cut(3, (1, 2)))
    first.allocate(20, 4)
    one = first.forward(Step(id=StepId(0), epoch=Epoch(1), chunks=(chunk(1, 0, PROMPT, range(10)),)), None)
    assert isinstance(one, Activation)
    before = bytes(one.data)
    first.forward(Step(id=StepId(1), epoch=Epoch(1), chunks=(chunk(2, 0, PROMPT[::-1], range(10, 20)),)), None)
    first.close()
    assert bytes(one.data) == before
    assert len(before) == one.shape[0] * one.shape[1] * 4


def test_activations_of_16_bits_cross_as_they_are(checkpoint: Checkpoint) -> None:
    engine = load(checkpoint, cut(3, (1, 2))[0], DType.BFLOAT16)
    engine.allocate(20, 4)
    hidden = engine.forward(Step(id=StepId(0), epoch=Epoch(1), chunks=(chunk(1, 0, PROMPT, range(10)),)), None)
    assert isinstance(hidden, Activation)
    assert (hidden.dtype, hidden.shape) == (DType.BFLOAT16, (len(PROMPT), checkpoint.spec.hidden_size))
    assert memoryview(hidden.data).nbytes == 2 * hidden.shape[0] * hidden.shape[1]


def test_the_number_of_threads_asked_for_is_set(checkpoint: Checkpoint) -> None:
    torch.set_num_threads(2)
    load(checkpoint, cut(3, (3,))[0])
    assert torch.get_num_threads() == 1


def test_closing_gives_the_weights_and_the_kv_back(checkpoint: Checkpoint) -> None:
    stages = whole(checkpoint)
    (engine,) = stages.engines
    assert engine.statistics().weight_bytes > 0
    engine.close()
    statistics = engine.statistics()
    assert statistics.weight_bytes == statistics.kv_bytes == statistics.num_blocks == 0
