"""The definition of sampling: against transformers' processors, against exact distributions, and its noise by itself.

About the statistical assertions: every draw is a pure function of fixed seeds and positions, so each test computes one
fixed number and either always passes or always fails; nothing is flaky. The bound (p > 1e-4) says that the number is an
unremarkable one for a sampler that is right; tests beside them show that a slightly wrong sampler is far beyond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tllm.core.errors import EngineError
from tllm.core.types import Logprob, SamplingParams, SamplingState, TokenId
from tllm.engines import sampling

Row = NDArray[np.float32]
FEW = np.array([0.3, 2.0, -1.0, 1.2, 0.0, 1.9, -2.5, 0.9, -0.4, 1.5, -2.0, 0.6], dtype=np.float32)


def ids(*tokens: int) -> tuple[TokenId, ...]:
    return tuple(TokenId(token) for token in tokens)


def random_row(size: int, scale: float, seed: int) -> Row:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def by_transformers(row: Row, params: SamplingParams, context: Sequence[int] = (0,)) -> NDArray[np.float64]:
    """The distribution after transformers' processors, in the order in which its `generate` applies them."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    scores = steps(torch.tensor([list(context)]), torch.from_numpy(row).double()[None])
    probabilities: NDArray[np.float64] = scores.softmax(-1)[0].numpy()
    return probabilities


def draws(row: Row, params: SamplingParams, count: int) -> NDArray[np.int64]:
    """How often each token is drawn: the positions of a few seeds, as in generation."""
    tokens = [
        sampling.sample(row, SamplingState(params=replace(params, seed=seed), position=position))
        for seed in range(10)
        for position in range(count // 10)
    ]
    return np.bincount(tokens, minlength=len(row))


def p_value(observed: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Pearson's test; every expected count in these tests is above 5, where its approximation is good."""
    possible = probabilities > 0
    assert observed[~possible].sum() == 0, "a removed token was drawn"
    expected = probabilities[possible] * observed.sum()
    assert expected.min() > 5
    if possible.sum() == 1:
        return 1.0
    return float(stats.chisquare(observed[possible], expected, sum_check=False).pvalue)


COMBINATIONS = [
    SamplingParams(),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.7),
    SamplingParams(top_k=4),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.5, top_k=7, top_p=0.85),
    SamplingParams(temperature=0.8, top_p=0.9, min_p=0.1),
    SamplingParams(temperature=1.3, top_k=9, top_p=0.95, min_p=0.05),
]


# Distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", COMBINATIONS, ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}")
def test_draws_follow_the_distribution_of_transformers(params: SamplingParams) -> None:
    assert p_value(draws(FEW, params, 6000), by_transformers(FEW, params)) > 1e-4


@pytest.mark.parametrize("wrong", [{"temperature": 0.9}, {"temperature": 1.12}])
def test_distribution_test_would_notice_a_slightly_wrong_temperature(wrong: dict[str, float]) -> None:
    observed = draws(FEW, SamplingParams(temperature=wrong["temperature"]), 6000)
    assert p_value(observed, by_transformers(FEW, SamplingParams())) < 1e-4


def test_draws_with_repetition_penalty_follow_the_distribution_of_transformers() -> None:
    params = SamplingParams(repetition_penalty=1.8, top_p=0.9)
    expected = by_transformers(FEW, params, context=(1, 2, 5))
    tokens = [
        sampling.sample(
            FEW, SamplingState(params=params, position=position, prompt_ids=ids(1, 2), counts=((TokenId(5), 3),))
        )
        for position in range(5000)
    ]
    assert p_value(np.bincount(tokens, minlength=len(FEW)), expected) > 1e-4


@pytest.fixture
def favourite(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Noise so great for one token that it wins if it survives the filters."""
    chosen = [0]
    monkeypatch.setattr(sampling, "noise", lambda seed, position, ids: np.where(ids == chosen[0], 1e6, 0.0))
    return chosen


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("params", COMBINATIONS[3:], ids=lambda p: f"k{p.top_k}-p{p.top_p}-m{p.min_p}")
def test_survivors_are_those_of_transformers(favourite: list[int], params: SamplingParams, seed: int) -> None:
    row = random_row(60, scale=0.5 + seed, seed=seed)  # no two alike
    expected = set(np.flatnonzero(by_transformers(row, params)).tolist())
    survivors = set()
    for token in range(len(row)):
        favourite[0] = token
        if sampling.sample(row, SamplingState(params=params, position=0)) == token:
            survivors.add(token)
    assert survivors == expected


# Filters among equals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(top_k=2), {1, 3}),  # not token 4, which is as good as 3
        (SamplingParams(top_p=0.5), {1, 3}),  # the mass before token 4 is exactly the half
        (SamplingParams(top_p=0.51), {1, 3, 4}),
        (SamplingParams(top_p=0.0), {1}),
        (SamplingParams(top_k=3, top_p=0.34), {1, 3}),  # of the three that top_k left
        (SamplingParams(min_p=1.0), {1, 3, 4, 6}),
    ],
)
def test_filters_keep_low_ids_among_equals(favourite: list[int], params: SamplingParams, expected: set[int]) -> None:
    row = np.array([-np.inf, 2, -np.inf, 2, 2, -np.inf, 2], dtype=np.float32)
    survivors = set()
    for token in range(len(row)):
        favourite[0] = token
        if sampling.sample(row, SamplingState(params=params, position=0)) == token:
            survivors.add(token)
    assert survivors == expected


def test_leading_tokens_do_not_decide_what_they_cannot_know() -> None:
    alike = np.zeros(20, dtype=np.float32)
    leading = np.arange(11)

    def decided(mass: sampling.Mass, params: SamplingParams) -> bool:
        state = SamplingState(params=params, position=0)
        token = sampling.choose_leading(leading, alike[:11], mass, state)
        assert token in (None, sampling.choose(alike, state))
        return token is not None

    exact = sampling.Mass(low=20.0, high=20.0)
    assert decided(exact, SamplingParams(top_p=0.5))
    assert decided(exact, SamplingParams(top_p=0.54))
    assert not decided(exact, SamplingParams(top_p=0.56))  # twelve tokens
    assert not decided(sampling.Mass(low=20.0, high=20.1), SamplingParams(top_p=0.5))  # ten or eleven
    assert decided(sampling.UNKNOWN_MASS, SamplingParams(top_k=11, top_p=0.5))
    assert not decided(exact, SamplingParams(top_k=12, top_p=0.5))  # half of the twelve, not of the row
    assert not decided(sampling.UNKNOWN_MASS, SamplingParams(min_p=0.5))  # perhaps all of the row


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    row = np.array([0, 5, 1, 5, 5], dtype=np.float32)
    assert sampling.sample(row, SamplingState(params=SamplingParams(temperature=0), position=9)) == 1


def test_very_low_temperature_is_greedy_and_overflows_nothing() -> None:
    row = random_row(1000, scale=10, seed=1)
    for temperature in (1e-300, 1e-30, 1e-6):
        state = SamplingState(params=SamplingParams(temperature=temperature, top_p=0.9), position=3)
        assert sampling.sample(row, state) == row.argmax()


# Values -----------------------------------------------------------------------------------------------------------


def values_of(row: Sequence[float], params: SamplingParams, **state: object) -> list[float]:
    full = SamplingState(params=params, position=0, **state)  # type: ignore[arg-type]
    return sampling.adjusted(np.array(row, dtype=np.float32), full).tolist()


def test_penalties_and_bias_apply_in_the_stated_order() -> None:
    params = SamplingParams(
        logit_bias=((TokenId(0), 2.0), (TokenId(3), -1.0)),
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    counts = ((TokenId(0), 3), (TokenId(1), 1))
    values = values_of([2.0, -1.0, 3.0, 0.5, 7.0], params, counts=counts, prompt_ids=ids(0, 3))
    assert values == [
        (2.0 + 2.0) / 2 - 0.5 * 3 - 0.25,  # bias, then the repetition penalty, then the counts
        -1.0 * 2 - 0.5 - 0.25,
        3.0,
        (0.5 - 1.0) * 2,  # negative only because of its bias; in the prompt alone: no counts
        7.0,
    ]


def test_repetition_penalty_is_that_of_transformers() -> None:
    row = random_row(50, scale=3, seed=4)
    seen = [1, 4, 9, 16, 25, 36, 49]
    expected = RepetitionPenaltyLogitsProcessor(1.37)(torch.tensor([seen]), torch.from_numpy(row)[None])[0].numpy()
    values = values_of(
        row.tolist(),
        SamplingParams(repetition_penalty=1.37),
        prompt_ids=ids(*seen[:5]),
        counts=tuple((TokenId(token), 2) for token in seen[3:]),
    )
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_counts_without_penalties_change_nothing() -> None:
    row = FEW.copy()
    state = SamplingState(params=SamplingParams(), position=0, counts=((TokenId(1), 5),), prompt_ids=ids(2))
    assert sampling.adjusted(row, state) is row


def test_bias_cannot_bring_back_a_banned_or_forbidden_token() -> None:
    params = SamplingParams(logit_bias=((TokenId(0), 100.0), (TokenId(1), 100.0)), allowed_ids=ids(1, 2))
    assert values_of([1, 1, 1, 1], params, banned_ids=ids(1)) == [-math.inf, -math.inf, 1, -math.inf]


def test_only_allowed_tokens_are_chosen() -> None:
    for position in range(200):
        state = SamplingState(params=SamplingParams(allowed_ids=ids(6, 2, 2), temperature=5), position=position)
        assert sampling.sample(FEW, state) in (2, 6)


def test_row_is_not_written_to() -> None:
    row = FEW.copy()
    row.setflags(write=False)
    params = SamplingParams(repetition_penalty=1.2, logit_bias=((TokenId(1), -5.0),), top_p=0.9)
    sampling.sample(row, SamplingState(params=params, position=0, prompt_ids=ids(0)))


# Failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(allowed_ids=ids(0))]
)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_row_that_is_not_finite_fails_even_where_the_token_is_masked(params: SamplingParams, broken: float) -> None:
    row = FEW.copy()
    row[7] = broken
    with pytest.raises(EngineError, match="logits are not finite"):
        sampling.sample(row, SamplingState(params=params, position=0))
    with pytest.raises(EngineError, match="logits are not finite"):
        sampling.score(row, TokenId(0), 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_without_a_token_left_fails(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, allowed_ids=ids(3), top_k=5)
    with pytest.raises(EngineError, match="no token can be chosen"):
        sampling.sample(FEW, SamplingState(params=params, position=0, banned_ids=ids(3)))
    with pytest.raises(EngineError, match="no token can be chosen"):
        sampling.sample(FEW, SamplingState(params=SamplingParams(allowed_ids=()), position=0))


@pytest.mark.parametrize("wrong", [-1, 12])
def test_token_outside_the_vocabulary_fails(wrong: int) -> None:
    token = TokenId(wrong)
    for state in (
        SamplingState(params=SamplingParams(logit_bias=((token, 1.0),)), position=0),
        SamplingState(params=SamplingParams(allowed_ids=(token, TokenId(1))), position=0),
        SamplingState(params=SamplingParams(repetition_penalty=2), position=0, prompt_ids=(token,)),
        SamplingState(params=SamplingParams(presence_penalty=2), position=0, counts=((token, 1),)),
        SamplingState(params=SamplingParams(), position=0, banned_ids=(token,)),
    ):
        with pytest.raises(EngineError, match=f"token id {wrong} is outside the vocabulary of 12"):
            sampling.sample(FEW, state)
    with pytest.raises(EngineError, match=f"token id {wrong} is outside"):
        sampling.score(FEW, token, 0)


# Log-probabilities ------------------------------------------------------------------------------------------------


def test_alternatives_are_best_first_with_low_ids_first_among_equals() -> None:
    row = np.array([1, 3, 2, 3, 2, 2, -np.inf], dtype=np.float32)
    score = sampling.score(row, TokenId(0), 4)
    assert [one.token for one in score.top] == [1, 3, 2, 4]
    normalizer = math.log(sum(math.exp(x) for x in row))
    assert score.logprob == pytest.approx(1 - normalizer)
    assert score.top[0].logprob == pytest.approx(3 - normalizer)
    assert sampling.score(row, TokenId(6), 0).logprob == -math.inf
    assert sampling.score(row, TokenId(1), 0).top == ()
    assert sampling.score(row, TokenId(1), 1).top == (Logprob(token=TokenId(1), logprob=score.top[0].logprob),)


# Noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_what_it_was() -> None:
    # A seed must give the same text after an upgrade, and on every engine.
    some = np.array([0, 1, 2, 127_999])
    assert sampling.noise_hash(0, 0, some).tolist() == [0xF9BFCB4C, 0x4013BCDC, 0x7342F994, 0x04C1FB5E]
    assert sampling.noise_hash(-1, 2**20, some).tolist() == [0x9441F06B, 0xED15D0A4, 0x7231B99C, 0x4975CE64]
    assert sampling.noise_hash(2**64 - 1, 2**20, some).tolist() == sampling.noise_hash(-1, 2**20, some).tolist()
    np.testing.assert_allclose(sampling.noise(42, 7, some[:3]), [-0.73179419, -1.29654034, 1.3833241], atol=1e-8)


def test_noise_of_extreme_hashes_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "noise_hash", lambda *_: np.array([0, 2**32 - 1], dtype=np.uint32))
    np.testing.assert_allclose(sampling.noise(0, 0, np.arange(2)), [-math.log(33 * math.log(2)), 33 * math.log(2)])


def test_no_two_tokens_share_their_noise() -> None:
    for position in range(3):
        assert len(np.unique(sampling.noise_hash(7, position, np.arange(200_000)))) == 200_000


def uniforms(hashes: NDArray[np.uint32]) -> NDArray[np.float64]:
    return (hashes.astype(np.float64) + 0.5) / 2.0**32


def hash_table(axis: str) -> NDArray[np.uint32]:
    """Noise bits of 512 neighbours along one axis times 512 token ids."""
    tokens = np.arange(512)
    match axis:
        case "position":
            return np.stack([sampling.noise_hash(3, position, tokens) for position in range(512)])
        case "seed":
            return np.stack([sampling.noise_hash(seed, 11, tokens) for seed in range(512)])
        case "high bits of the seed":
            return np.stack([sampling.noise_hash(seed << 55, 11, tokens) for seed in range(512)])
        case _:
            return np.stack([sampling.noise_hash(seed, 1000 - seed, tokens) for seed in range(512)])


AXES = ["position", "seed", "high bits of the seed", "seed against position"]


@pytest.mark.parametrize("axis", AXES)
def test_noise_is_uniform_in_its_high_and_low_bits(axis: str) -> None:
    hashes = hash_table(axis)
    for shift in (24, 12, 0):
        counts = np.bincount(((hashes >> np.uint32(shift)) & np.uint32(255)).ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    # Each token's own noise along the axis, and each row's along the tokens.
    for sums in (uniforms(hashes).mean(axis=0), uniforms(hashes).mean(axis=1)):
        assert stats.kstest((sums - 0.5) * math.sqrt(12 * 512), "norm").pvalue > 1e-4


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_have_unrelated_noise(axis: str) -> None:
    uniform = uniforms(hash_table(axis))
    for one, other in (
        (uniform[1:], uniform[:-1]),
        (uniform[:, 1:], uniform[:, :-1]),
        (uniform[1:, 1:], uniform[:-1, :-1]),
    ):
        # The correlation of n independent pairs is within 4.5 / sqrt(n) but for one case in 150,000.
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4.5 / math.sqrt(one.size)


@pytest.mark.parametrize("axis", AXES)
def test_pairs_of_neighbours_fill_the_square_evenly(axis: str) -> None:
    cells = (hash_table(axis) >> np.uint32(28)).astype(np.int64)
    for pairs in (cells[1:] * 16 + cells[:-1], cells[:, 1:] * 16 + cells[:, :-1]):
        # Every other pair along either axis, so that no number is counted twice.
        counts = np.bincount(pairs[::2, ::2].ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_one_bit_of_seed_position_or_token_changes_half_of_the_bits() -> None:
    tokens = np.arange(2000)
    base = sampling.noise_hash(12345, 678, tokens)
    changed = [sampling.noise_hash(12345 ^ 1 << bit, 678, tokens) for bit in range(64)]
    changed += [sampling.noise_hash(12345, 678 ^ 1 << bit, tokens) for bit in range(32)]
    changed += [sampling.noise_hash(12345, 678, tokens ^ 1 << bit) for bit in range(18)]
    for other in changed:
        flips = np.array([((base ^ other) >> np.uint32(bit) & 1).mean() for bit in range(32)])
        assert np.abs(flips - 0.5).max() < 0.5 * 5 / math.sqrt(2000)  # five standard deviations


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    noise = np.concatenate([sampling.noise(5, position, np.arange(2**15)) for position in range(16)])
    count = len(noise)
    assert abs(noise.mean() - np.euler_gamma) < 4.5 * math.pi / math.sqrt(6 * count)
    assert abs(noise.var() / (math.pi**2 / 6) - 1) < 4.5 * math.sqrt(4.4 / count)  # kurtosis of a Gumbel: 5.4
    assert stats.kstest(noise[:50_000], "gumbel_r").pvalue > 1e-4


def test_noise_does_not_depend_on_which_tokens_are_asked_for() -> None:
    everything = sampling.noise(9, 9, np.arange(50_000))
    some = np.array([3, 77, 4096, 49_999])
    np.testing.assert_array_equal(sampling.noise(9, 9, some), everything[some])
