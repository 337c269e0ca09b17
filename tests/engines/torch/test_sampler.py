"""The torch sampler: the same tokens as the definition at the size of a real vocabulary, and rows that fail alone.

The device's way of choosing runs here on CPU tensors: it asks nothing of a device but float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tllm.core.errors import EngineError
from tllm.core.types import SamplingParams, SamplingState, Score, SequenceFailed, SequenceId, TokenId
from tllm.engines import sampling
from tllm.engines.torch import sampler

VOCAB_SIZE = 40_000
PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=3.0),
    "cold": SamplingParams(temperature=0.01),
    "top_p": SamplingParams(top_p=0.9),
    "top_k": SamplingParams(top_k=50),
    "great top_k": SamplingParams(top_k=3000, top_p=0.99),
    "min_p": SamplingParams(min_p=0.02),
    "all": SamplingParams(temperature=1.2, top_k=100, top_p=0.95, min_p=0.001),
    "top_p and min_p": SamplingParams(top_p=0.99, min_p=0.0001),
    "penalties": SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1, top_p=0.9),
    "bias": SamplingParams(logit_bias=((TokenId(7), 30.0), (TokenId(8), 30.5))),
    "few": SamplingParams(allowed_ids=tuple(TokenId(token) for token in range(50, 80)), top_k=40, top_p=0.9),
    "allowed": SamplingParams(allowed_ids=tuple(TokenId(token) for token in range(0, 900, 3))),
}


def logits(kind: str, num_rows: int) -> Tensor:
    """Rows like a trained model's (a few tokens stand out), flat ones, and ones with many equals as from bfloat16."""
    random = torch.Generator().manual_seed(1)
    row = torch.randn(num_rows, VOCAB_SIZE, generator=random)
    if kind == "flat":
        return row * 0.5
    row = row * 2 + 13 * (torch.rand(num_rows, VOCAB_SIZE, generator=random) < 0.001)
    return row if kind == "peaked" else row.bfloat16().float()


def states(num_rows: int, params: SamplingParams) -> list[SamplingState]:
    return [
        SamplingState(
            params=replace(params, seed=row // 4),
            position=row,
            counts=tuple((TokenId(token), 1 + token % 3) for token in range(row, row + 40)),
            prompt_ids=tuple(TokenId(token) for token in range(1000, 3000, 7)),
            banned_ids=(TokenId(0),),
        )
        for row in range(num_rows)
    ]


def seqs(num_rows: int) -> list[SequenceId]:
    return [SequenceId(100 + row) for row in range(num_rows)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("kind", ["peaked", "flat", "coarse"])
def test_host_and_device_choose_what_the_definition_chooses(kind: str, params: SamplingParams) -> None:
    logits_BV, states_B = logits(kind, 6), states(6, params)
    expected = [sampling.sample(row, state) for row, state in zip(logits_BV.numpy(), states_B, strict=True)]
    assert sampler.choose_on_host(logits_BV, states_B) == expected
    assert sampler.choose_on_device(logits_BV, states_B) == expected
    if params.temperature > 0.5:
        assert len(set(expected)) > 1


@pytest.mark.parametrize(
    "name", ["plain", "hot", "top_p", "top_k", "min_p", "all", "top_p and min_p", "penalties", "few"]
)
def test_device_moves_no_row_of_a_peaked_distribution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: object) -> TokenId:
        raise AssertionError("a whole row was moved")

    monkeypatch.setattr(sampler, "_choose_moved", moved)
    sampler.choose_on_device(logits("peaked", 40), states(40, PARAMS[name]))


@pytest.mark.parametrize("name", ["top_p", "top_k", "great top_k", "min_p", "top_p and min_p"])
def test_host_sorts_no_row_of_a_peaked_distribution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = sampling.choose_leading

    def decide_part(ids: sampling.Ids, *rest: Any) -> TokenId | None:
        assert len(ids) < VOCAB_SIZE, "a whole row was sorted"
        return decide(ids, *rest)

    monkeypatch.setattr(sampling, "choose_leading", decide_part)
    sampler.choose_on_host(logits("peaked", 40), states(40, PARAMS[name]))


@pytest.mark.parametrize("choose", [sampler.choose_on_host, sampler.choose_on_device])
def test_top_p_keeps_exactly_the_nucleus(
    choose: Callable[[Tensor, list[SamplingState]], list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last token of the nucleus wins if its noise is great enough, the first beyond it never does.
    logits_BV = logits("peaked", 10)
    for row, state in enumerate(states(10, SamplingParams(top_p=0.98, temperature=1.1))):
        order = logits_BV[row].argsort(descending=True)
        cumulative = (logits_BV[row].double() / 1.1).softmax(0)[order].cumsum(0)
        last = int((cumulative < 0.98).sum())
        assert 2 <= last < 1000
        for token, survives in ((int(order[last]), True), (int(order[last + 1]), False)):
            monkeypatch.setattr(sampling, "noise", lambda _, __, ids, token=token: np.where(ids == token, 1e6, 0.0))
            (chosen,) = choose(logits_BV[[row]], [replace(state, banned_ids=())])
            assert (chosen == token) == survives


def test_sampling_does_not_depend_on_the_other_rows() -> None:
    logits_BV = logits("peaked", len(PARAMS) * 2)
    states_B = [
        replace(state, params=replace(params, logprobs=2))
        for state, params in zip(states(len(logits_BV), SamplingParams()), [*PARAMS.values()] * 2, strict=True)
    ]
    together, failed = sampler.sample(logits_BV, states_B, seqs(len(logits_BV)))
    assert failed == []
    alone = [
        sampler.sample(logits_BV[[row]], [states_B[row]], [SequenceId(100 + row)])[0][0]
        for row in range(len(logits_BV))
    ]
    backwards, _ = sampler.sample(logits_BV.flip(0), states_B[::-1], seqs(len(logits_BV))[::-1])
    assert together == alone == backwards[::-1]  # log-probabilities to the last bit
    on_device = sampler.score_on_device(
        logits_BV, list(range(len(logits_BV))), [one.token for one in together], [2] * len(logits_BV)
    )
    for one, score in zip(together, on_device, strict=True):
        assert score.logprob == pytest.approx(one.logprob, abs=1e-12)
        assert [top.token for top in score.top] == [top.token for top in one.top]


def test_rows_of_a_view_are_sampled_as_rows_of_their_own() -> None:
    wide = logits("peaked", 8)
    view = wide[::2, 3:30_001]
    states_B = states(4, PARAMS["penalties"])
    assert sampler.sample(view, states_B, seqs(4)) == sampler.sample(view.contiguous(), states_B, seqs(4))
    assert sampler.choose_on_device(view, states_B) == sampler.choose_on_host(view, states_B)


def test_row_fails_alone_and_says_why() -> None:
    logits_BV, states_B = logits("peaked", 6), states(6, SamplingParams(logprobs=1))
    expected, _ = sampler.sample(logits_BV, states_B, seqs(6))
    logits_BV[1, 5] = math.nan
    logits_BV[2, 9] = math.inf
    logits_BV[2, 10:12] = math.nan
    logits_BV[4] = -math.inf
    states_B[5] = replace(states_B[5], banned_ids=(TokenId(VOCAB_SIZE),))
    for params in (SamplingParams(logprobs=1), SamplingParams(logprobs=1, top_p=0.9), PARAMS["greedy"]):
        mixed = [replace(state, params=params) if row not in (0, 3) else state for row, state in enumerate(states_B)]
        sampled, failed = sampler.sample(logits_BV, mixed, seqs(6))
        assert sampled == [expected[0], expected[3]]
        assert failed == [
            SequenceFailed(seq=SequenceId(101), reason="logits are not finite (1 NaN and 0 +inf of 40000)"),
            SequenceFailed(seq=SequenceId(102), reason="logits are not finite (2 NaN and 1 +inf of 40000)"),
            SequenceFailed(seq=SequenceId(104), reason="no token can be chosen: all 40000 are masked (-inf)"),
            SequenceFailed(seq=SequenceId(105), reason="token id 40000 is outside the vocabulary of 40000"),
        ]
        outcomes = sampler.choose_on_device(logits_BV, mixed)
        assert [outcomes[0], outcomes[3]] == [one.token for one in sampled]
        assert [str(outcomes[row]) for row in (1, 2, 4, 5)] == [one.reason for one in failed]


def test_logprobs_come_only_where_they_are_asked_for_and_from_raw_logits() -> None:
    logits_BV = logits("peaked", 3)
    params = SamplingParams(temperature=0.5, logit_bias=((TokenId(42), 100.0),))
    states_B = [SamplingState(params=replace(params, logprobs=logprobs), position=0) for logprobs in (None, 0, 3)]
    nothing, chosen, best = sampler.sample(logits_BV, states_B, seqs(3))[0]
    assert (nothing.token, chosen.token, best.token) == (42, 42, 42)
    assert (nothing.logprob, nothing.top) == (None, ())
    exact_BV = logits_BV.double().log_softmax(1)
    assert chosen.logprob == pytest.approx(float(exact_BV[1, 42]), abs=1e-12)
    assert chosen.top == ()
    assert best.logprob == pytest.approx(float(exact_BV[2, 42]), abs=1e-12)
    assert [one.token for one in best.top] == exact_BV[2].topk(3).indices.tolist()


def test_score_gives_each_target_its_logprob_and_leaves_further_rows_unread() -> None:
    logits_RV = logits("coarse", 5)
    logits_RV[4] = math.nan
    targets = [TokenId(token) for token in (0, 17, 39_999, 5)]
    scores = sampler.score(logits_RV, targets, 3)
    assert scores == tuple(
        sampling.score(row, target, 3) for row, target in zip(logits_RV.numpy()[:4], targets, strict=True)
    )
    assert sampler.score(logits_RV, [], 3) == ()
    device = sampler.score_on_device(logits_RV, [0, 1, 2, 3], targets, [3] * 4)
    for one, other in zip(scores, device, strict=True):
        assert_close(one, other)


def assert_close(one: Score, other: Score) -> None:
    assert other.logprob == pytest.approx(one.logprob, abs=1e-12)
    assert [top.token for top in other.top] == [top.token for top in one.top]
    assert [top.logprob for top in other.top] == pytest.approx([top.logprob for top in one.top], abs=1e-12)


def test_alternatives_among_many_equals_are_the_lowest_ids_on_a_device_too() -> None:
    row = torch.zeros(1, 1000)
    row[0, 900] = 1.0
    (score,) = sampler.score_on_device(row, [0], [TokenId(3)], [4])
    assert [one.token for one in score.top] == [900, 0, 1, 2]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_score_of_a_row_that_is_not_finite_raises(broken: float) -> None:
    logits_RV = logits("peaked", 2)
    logits_RV[1, 3] = broken
    for score in (
        lambda: sampler.score(logits_RV, [TokenId(1), TokenId(1)], 1),
        lambda: sampler.score_on_device(logits_RV, [0, 1], [TokenId(1)] * 2, [1] * 2),
    ):
        with pytest.raises(EngineError, match="logits are not finite"):
            score()


def test_target_outside_the_vocabulary_raises() -> None:
    for wrong in (-1, VOCAB_SIZE):
        with pytest.raises(EngineError, match="outside the vocabulary"):
            sampler.score(logits("peaked", 1), [TokenId(wrong)], 0)
        with pytest.raises(EngineError, match="outside the vocabulary"):
            sampler.score_on_device(logits("peaked", 1), [0], [TokenId(wrong)], [0])


def test_noise_on_a_device_is_that_of_the_definition_bit_by_bit() -> None:
    keys = [(0, 0), (2**32 - 1, 2**32 - 1), sampling.noise_keys(5, 6), sampling.noise_keys(-5, 2**40)]
    hashes = sampler.noise_hash(torch.tensor(keys), 70_000).numpy()
    assert hashes.min() >= 0
    assert hashes.max() < 2**32
    for seed, position in ((5, 6), (-5, 2**40)):
        row = keys.index(sampling.noise_keys(seed, position))
        np.testing.assert_array_equal(hashes[row], sampling.noise_hash(seed, position, np.arange(70_000)))


def test_nothing_to_sample_is_nothing() -> None:
    assert sampler.sample(torch.empty(0, 10), [], []) == ([], [])
    assert sampler.choose_on_device(torch.empty(0, 10), []) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_cuda_chooses_what_the_host_chooses(params: SamplingParams) -> None:
    for kind in ("peaked", "flat", "coarse"):
        logits_BV, states_B = logits(kind, 40), states(40, replace(params, logprobs=3))
        on_host, _ = sampler.sample(logits_BV, states_B, seqs(40))
        on_cuda, failed = sampler.sample(logits_BV.cuda(), states_B, seqs(40))
        assert failed == []
        assert [one.token for one in on_cuda] == [one.token for one in on_host]
        for one, other in zip(on_host, on_cuda, strict=True):
            assert other.logprob == pytest.approx(one.logprob, abs=1e-9)
            assert [top.token for top in other.top] == [top.token for top in one.top]
