"""Narrowed rows: the tokens and log-probabilities of the definition, which is then seldom asked about a whole row."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.core.errors import EngineError
from tllm.core.types import SamplingParams, SamplingState, SequenceId, TokenId
from tllm.engines import sampling
from tllm.engines.torch import sampler
from tllm.engines.torch.kernels import build
from tllm.engines.torch.kernels.rows import KernelRows

pytestmark = pytest.mark.skipif(build.library() is None, reason=str(build.unavailable()))

PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=3.0),
    "cold": SamplingParams(temperature=0.01),
    "top_p": SamplingParams(top_p=0.9),
    "top_k": SamplingParams(top_k=50),
    "top_k 1": SamplingParams(top_k=1),
    "great top_k": SamplingParams(top_k=3000, top_p=0.99),
    "min_p": SamplingParams(min_p=0.02),
    "all": SamplingParams(temperature=1.2, top_k=100, top_p=0.95, min_p=0.001),
    "penalties": SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, top_p=0.9),
    "bias": SamplingParams(logit_bias=((TokenId(1), 30.0), (TokenId(2), 30.5))),
    "few": SamplingParams(allowed_ids=tuple(TokenId(token) for token in range(2, 16)), top_k=40, top_p=0.9),
    "allowed": SamplingParams(allowed_ids=tuple(TokenId(token) for token in range(0, 16, 3))),
}


def kernels() -> KernelRows:
    library = build.library()
    assert library is not None
    return KernelRows(library)


def logits(kind: str, shape: tuple[int, int], seed: int) -> sampling.Values:
    """A trained model's (a few tokens stand out), flat ones, ones with many equals, ones of which most are masked."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal(shape, dtype=np.float32)
    match kind:
        case "flat":
            return rows * np.float32(0.5)
        case "peaked":
            return rows * 2 + 13 * (random.random(shape) < 0.001).astype(np.float32)
        case "coarse":
            return np.round(rows * 4) * np.float32(0.5)
        case "equal":
            return np.full_like(rows, 1.5)
        case _:
            rows[random.random(shape) < 0.95] = -np.inf
            rows[:, 3] = 1.0
            return rows


def states(num_rows: int, params: SamplingParams) -> list[SamplingState]:
    return [
        SamplingState(
            params=replace(params, seed=row // 2),
            position=row,
            counts=tuple((TokenId(token), 1 + token % 3) for token in range(row, row + 4)),
            prompt_ids=(TokenId(3), TokenId(9)),
            banned_ids=(TokenId(0),) if row % 2 else (),
        )
        for row in range(num_rows)
    ]


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(["flat", "peaked", "coarse", "equal", "masked"]),
    name=st.sampled_from(sorted(PARAMS)),
    size=st.sampled_from([17, 128, 259, 5000, 40_000]),
    seed=st.integers(0, 2**32),
)
def test_a_token_is_the_one_that_the_definition_chooses(kind: str, name: str, size: int, seed: int) -> None:
    logits_BV = logits(kind, (5, size), seed)
    states_B = states(5, PARAMS[name])
    expected = [sampling.sample(row, state) for row, state in zip(logits_BV, states_B, strict=True)]
    assert kernels().choose(logits_BV, states_B) == expected


@pytest.mark.parametrize("name", sorted(set(PARAMS) - {"great top_k"}))
def test_no_whole_row_of_a_peaked_distribution_is_asked_about(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(*_: Any) -> TokenId:
        raise AssertionError("the definition saw a whole row")

    monkeypatch.setattr(sampling, "choose", whole)
    kernels().choose(logits("peaked", (40, 40_000), 1), states(40, PARAMS[name]))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["flat", "peaked", "coarse", "equal", "masked"]),
    top=st.sampled_from([0, 1, 5, 20, 1000]),
    size=st.sampled_from([17, 128, 259, 5000, 40_000]),
    seed=st.integers(0, 2**32),
)
def test_scores_are_those_of_the_definition(kind: str, top: int, size: int, seed: int) -> None:
    logits_RV = logits(kind, (3, size), seed)
    targets = [TokenId(token) for token in (5, 0, size - 1)]
    scores = kernels().score(list(logits_RV), targets, [top] * 3)
    for score, row, target in zip(scores, logits_RV, targets, strict=True):
        expected = sampling.score(row, target, top)
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-12)
        assert [one.token for one in score.top] == [one.token for one in expected.top]
        assert [one.logprob for one in score.top] == pytest.approx([one.logprob for one in expected.top], abs=1e-12)


def test_rows_fail_alone_and_in_the_definitions_words() -> None:
    logits_BV = logits("peaked", (6, 3000), 0)
    logits_BV[1, 5] = math.nan
    logits_BV[2, 2999] = math.inf
    logits_BV[4] = -math.inf
    for params in (PARAMS["greedy"], PARAMS["plain"], PARAMS["top_p"], PARAMS["bias"]):
        states_B = states(6, params)
        states_B[5] = replace(states_B[5], banned_ids=(TokenId(3000),))
        outcomes = kernels().choose(logits_BV, states_B)
        assert outcomes[0] == sampling.sample(logits_BV[0], states_B[0])
        assert outcomes[3] == sampling.sample(logits_BV[3], states_B[3])
        for row in (1, 2, 4, 5):
            with pytest.raises(EngineError) as caught:
                sampling.sample(logits_BV[row], states_B[row])
            assert str(outcomes[row]) == str(caught.value)
    for row in (1, 2, 4):
        with pytest.raises(EngineError):
            kernels().score([logits_BV[0], logits_BV[row]], [TokenId(1), TokenId(1)], [2, 2])
    with pytest.raises(EngineError):
        kernels().score([logits_BV[0]], [TokenId(3000)], [2])


def test_the_sampler_takes_them_where_it_is_given_them() -> None:
    logits_BV = torch.from_numpy(logits("peaked", (6, 9000), 3))[:, 3:8003]  # rows of a view
    states_B = states(6, replace(PARAMS["all"], logprobs=2))
    seqs = [SequenceId(row) for row in range(6)]
    sampled, failed = sampler.sample(logits_BV, states_B, seqs, kernels())
    expected, _ = sampler.sample(logits_BV, states_B, seqs)
    assert failed == []
    assert [one.token for one in sampled] == [one.token for one in expected]
    assert [one.logprob for one in sampled] == pytest.approx([one.logprob for one in expected], abs=1e-12)
    assert sampler.score(logits_BV, [TokenId(4)], 1, kernels())[0].top[0].token == int(logits_BV[0].argmax())
