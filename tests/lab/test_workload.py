"""What is asked is a function of the seed, inside its bounds, and arrivals come as often as was asked."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tllm.core.errors import ConfigError
from tllm.lab.workload import (
    SHAREGPT_ANSWER,
    SHAREGPT_PROMPT,
    WORDS,
    Ids,
    Lengths,
    LogNormal,
    Planned,
    Rate,
    Uniform,
    Words,
    Workload,
    alphabet,
    around,
    fixed,
    parse_lengths,
)

IDS = Ids(alphabet=tuple(range(100, 400)))
SEEDS = st.integers(0, 2**31)
BOUNDS = st.tuples(st.integers(1, 300), st.integers(0, 300)).map(lambda pair: (pair[0], sum(pair)))
LENGTHS = BOUNDS.map(lambda bounds: Uniform(low=bounds[0], high=bounds[1])) | st.builds(
    lambda bounds, median, sigma: LogNormal(median=median, sigma=sigma, low=bounds[0], high=bounds[1]),
    BOUNDS,
    st.floats(1, 500),
    st.floats(0.01, 3),
)


def planned(
    num: int,
    *,
    seed: int = 0,
    prompts: Lengths = fixed(16),
    answers: Lengths = fixed(8),
    kind: Ids | Words = IDS,
    rate: Rate | None = None,
) -> tuple[Planned, ...]:
    work = Workload(seed=seed, prompt_lengths=prompts, answer_lengths=answers, prompts=kind, rate=rate)
    return tuple(islice(work.requests(), num))


@given(SEEDS, LENGTHS, LENGTHS, st.booleans())
def test_the_same_seed_asks_the_same(seed, prompts, answers, is_open):
    rate = Rate(requests_per_s=3, burstiness=0.5) if is_open else None
    first = planned(12, seed=seed, prompts=prompts, answers=answers, rate=rate)
    assert first == planned(12, seed=seed, prompts=prompts, answers=answers, rate=rate)
    assert first[:5] == planned(5, seed=seed, prompts=prompts, answers=answers, rate=rate)  # a longer run begins alike


def test_another_seed_asks_something_else():
    rate = Rate(requests_per_s=3)
    lengths = Uniform(low=10, high=500)
    one, other = (planned(8, seed=seed, prompts=lengths, answers=lengths, rate=rate) for seed in (1, 2))
    assert [each.prompt for each in one] != [each.prompt for each in other]
    assert [each.num_prompt_tokens for each in one] != [each.num_prompt_tokens for each in other]
    assert [each.due_s for each in one] != [each.due_s for each in other]


def test_the_rate_changes_when_and_not_what_is_asked():
    lengths = Uniform(low=10, high=500)
    slow, fast, closed = (
        planned(20, prompts=lengths, rate=rate) for rate in (Rate(requests_per_s=1), Rate(requests_per_s=4), None)
    )
    assert [each.prompt for each in slow] == [each.prompt for each in fast] == [each.prompt for each in closed]
    assert [each.due_s for each in slow] == pytest.approx([4 * (each.due_s or 0) for each in fast])
    assert all(each.due_s is None for each in closed)


@given(SEEDS, LENGTHS, LENGTHS)
def test_lengths_are_inside_their_bounds_and_prompts_have_them(seed, prompts, answers):
    for each in planned(30, seed=seed, prompts=prompts, answers=answers):
        assert prompts.low <= each.num_prompt_tokens <= prompts.high
        assert answers.low <= each.num_answer_tokens <= answers.high
        assert len(each.prompt.ids) == each.num_prompt_tokens
        assert set(each.prompt.ids) <= set(IDS.alphabet)


def test_a_mixture_has_the_median_that_it_says():
    """Of 4000 independent values, 2000 lie below the median, give or take 5 standard deviations of 32."""
    for mixture in (SHAREGPT_PROMPT, SHAREGPT_ANSWER):
        lengths = [each.num_prompt_tokens for each in planned(4000, prompts=mixture)]
        assert abs(sum(length < mixture.median for length in lengths) - 2000) < 160
        assert min(lengths) >= mixture.low
        assert max(lengths) == mixture.high  # a log-normal's tail is cut


def test_prompts_share_no_long_beginning():
    prompts = [each.prompt.ids for each in planned(200)]
    assert max(_num_common(*pair) for pair in pairwise(sorted(prompts))) < 5


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_between_arrivals_have_their_distribution(burstiness):
    """Kolmogorov-Smirnov on 10,000 gaps of a fixed seed: it passes or fails for good. It is fine enough to tell a scale
    that is a fifth too large, which the last line shows."""
    rate = Rate(requests_per_s=20, burstiness=burstiness)
    arrivals = [0.0, *islice(rate.arrivals_s(7), 10_000)]
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert min(gaps) >= 0
    expected = stats.gamma(burstiness, scale=1 / (20 * burstiness))
    assert stats.kstest(gaps, expected.cdf).pvalue > 0.01
    assert stats.kstest(gaps, stats.gamma(burstiness, scale=1.2 / (20 * burstiness)).cdf).pvalue < 1e-6


def test_an_infinite_rate_is_all_at_once():
    assert [each.due_s for each in planned(5, rate=Rate(requests_per_s=math.inf))] == [0.0] * 5


def test_words_are_as_many_as_make_the_tokens():
    kind = Words(tokens_per_word=2.0, num_extra_tokens=10)
    (each,) = planned(1, prompts=fixed(110), kind=kind)
    assert len(each.prompt.text.split()) == 50
    assert set(each.prompt.text.split()) <= set(WORDS)
    (shortest,) = planned(1, prompts=fixed(1), kind=kind)
    assert len(shortest.prompt.text.split()) == 1


def test_lengths_are_read_as_people_write_them():
    assert parse_lengths("128") == fixed(128)
    assert parse_lengths("64:256") == Uniform(low=64, high=256)
    assert around(100, 0.25) == Uniform(low=75, high=125)
    assert around(100, 0) == fixed(100)
    assert str(fixed(7)) == "7"
    assert str(Uniform(low=1, high=2)) == "1:2"


@pytest.mark.parametrize("text", ["", "x", "1.5", "-1", "0", "5:", ":5", "9:5", "1:2:3"])
def test_a_length_that_is_none_is_refused(text):
    with pytest.raises(ConfigError):
        parse_lengths(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rate(requests_per_s=0),
        lambda: Rate(requests_per_s=math.nan),
        lambda: Rate(requests_per_s=1, burstiness=0),
        lambda: around(10, 1.0),
        lambda: around(10, -0.1),
    ],
)
def test_what_cannot_be_drawn_is_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_an_alphabet_has_every_token_once():
    assert alphabet([5, 3, 5, 9]) == (3, 5, 9)


def _num_common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
