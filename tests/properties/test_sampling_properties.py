"""The definition of sampling against a plain second telling of it, and every fast way against the definition.

The second telling is written with Python numbers, loops and sorts, shares no code with the first, and also says by how
much its answer was decided. Cases decided by less than 1e-9 are passed over: there the last bits of exp and log count.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tllm.core.errors import EngineError
from tllm.core.types import SamplingParams, SamplingState, SequenceId, TokenId
from tllm.engines import sampling
from tllm.engines.torch import sampler

MARGIN = 1e-9
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# The second telling -----------------------------------------------------------------------------------------------


def mix_32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def mix_64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def told_hash(seed: int, position: int, token: int) -> int:
    golden = 0x9E3779B97F4A7C15
    start = mix_64((seed + golden) % 2**64)
    first, second = divmod(mix_64((start + (position + 1) * golden) % 2**64), 2**32)
    return mix_32(mix_32(token ^ first) ^ second)


def told_values(logits: list[float], state: SamplingState) -> list[float]:
    params, counts, values = state.params, dict(state.counts), []
    biases = dict(params.logit_bias)
    for token, logit in enumerate(logits):
        value = logit
        if params.allowed_ids is not None and token not in params.allowed_ids:
            value = -math.inf
        if token in state.banned_ids:
            value = -math.inf
        value += biases.get(TokenId(token), 0.0)
        if token in state.prompt_ids or token in counts:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts.get(TokenId(token), 0)
        value -= params.presence_penalty * (token in counts)
        values.append(float(np.float32(value)))
    return values


def told_choice(logits: list[float], state: SamplingState) -> tuple[int, float]:
    """The token and the margin by which it was decided. Some token must be left."""
    params = state.params
    values = told_values(logits, state)
    order = sorted((token for token in range(len(values)) if values[token] > -math.inf), key=lambda t: (-values[t], t))
    if params.temperature == 0:
        return order[0], math.inf
    margin = math.inf
    z = {token: (values[token] - values[order[0]]) / params.temperature for token in order}
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        total, before, kept = math.fsum(math.exp(z[token]) for token in order), 0.0, 0
        for token in order:
            margin = min(margin, abs(before / total - params.top_p)) if kept else margin
            if kept and before >= params.top_p * total:
                break
            before += math.exp(z[token])
            kept += 1
        order = order[:kept]
    if params.min_p > 0:
        margin = min([margin, *(abs(z[token] - math.log(params.min_p)) for token in order[1:])])
        order = [token for token in order if token == order[0] or z[token] >= math.log(params.min_p)]
    scores = {}
    for token in order:
        uniform = (told_hash(params.seed, state.position, token) + 0.5) / 2**32
        scores[token] = z[token] - math.log(-math.log(uniform))
    ranked = sorted(scores, key=lambda t: -scores[t])
    if len(ranked) > 1:
        margin = min(margin, scores[ranked[0]] - scores[ranked[1]])
    return ranked[0], margin


# Cases ------------------------------------------------------------------------------------------------------------


@st.composite
def rows(draw: st.DrawFn, size: int) -> NDArray[np.float32]:
    """Flat and peaked logits, in fine and in coarse steps (many equals, as from bfloat16), some masked."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    row = random.standard_normal(size) * draw(st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]))
    step = draw(st.sampled_from([0.0, 0.125, 2.0]))
    if step:
        row = np.round(row / step) * step
    if draw(st.booleans()):
        row[random.random(size) < 0.3] = -np.inf
        row[random.integers(size)] = 0.0
    return row.astype(np.float32)


@st.composite
def states(draw: st.DrawFn, size: int) -> SamplingState:
    tokens = st.integers(0, size - 1).map(TokenId)
    some = st.lists(tokens, max_size=8, unique=True).map(tuple)
    penalties = st.sampled_from([0.0, 0.0, 0.5, -1.5, 2.0])
    bias = st.lists(st.tuples(tokens, st.floats(-20, 20)), max_size=5, unique_by=lambda pair: pair[0]).map(tuple)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 20, 10_000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.0, 0.1, 0.53, 0.9, 0.99])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.013, 0.3, 1.0])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        logit_bias=draw(bias | st.just(())),
        allowed_ids=draw(st.none() | st.none() | st.lists(tokens, min_size=1, max_size=12).map(tuple)),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
    )
    return SamplingState(
        params=params,
        position=draw(st.integers(0, 2**31)),
        counts=tuple((token, draw(st.integers(1, 9))) for token in draw(some)),
        prompt_ids=draw(some),
        banned_ids=draw(some | st.just(())),
    )


@st.composite
def cases(
    draw: st.DrawFn, sizes: st.SearchStrategy[int] = st.integers(1, 120)
) -> tuple[NDArray[np.float32], SamplingState]:
    size = draw(sizes)
    return draw(rows(size)), draw(states(size))


def chosen(row: NDArray[np.float32], state: SamplingState) -> TokenId | str:
    try:
        return sampling.sample(row, state)
    except EngineError as error:
        return str(error)


def on_device(logits_BV: torch.Tensor, states_B: list[SamplingState]) -> list[TokenId | str]:
    outcomes = sampler.choose_on_device(logits_BV, states_B)
    return [str(outcome) if isinstance(outcome, EngineError) else outcome for outcome in outcomes]


# Claims -----------------------------------------------------------------------------------------------------------

EQUALS = np.zeros(4, dtype=np.float32)


@QUICK
@given(cases())
@example((EQUALS, SamplingState(params=SamplingParams(top_p=0.9), position=5)))
def test_definition_agrees_with_its_second_telling(case: tuple[NDArray[np.float32], SamplingState]) -> None:
    row, state = case
    values = told_values(row.tolist(), state)
    if max(values) == -math.inf:
        with pytest.raises(EngineError, match="no token can be chosen"):
            sampling.sample(row, state)
        return
    np.testing.assert_array_equal(sampling.adjusted(row, state), np.array(values, dtype=np.float32))
    token, margin = told_choice(row.tolist(), state)
    assume(margin > MARGIN)
    assert sampling.sample(row, state) == token


@QUICK
@given(cases(), st.sampled_from([1, 3, 8, 40]))
def test_leading_tokens_decide_as_the_whole_row_does(case: tuple[NDArray[np.float32], SamplingState], num: int) -> None:
    row, state = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "NUM_LEADING", 10**9)
        whole = chosen(row, state)
        patch.setattr(sampling, "NUM_LEADING", num)
        assert chosen(row, state) == whole


@QUICK
@given(cases(), st.sampled_from([1, 3, 8, 40]))
def test_device_narrowing_chooses_what_the_definition_chooses(
    case: tuple[NDArray[np.float32], SamplingState], num: int
) -> None:
    row, state = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "NUM_LEADING", num)
        assert on_device(torch.from_numpy(row)[None], [state]) == [chosen(row, state)]


FILTERED = SamplingParams(top_k=5, top_p=0.9, min_p=0.1)
FLAT = np.linspace(0, 1e-3, 30, dtype=np.float32)


@QUICK
@given(cases(), st.integers(1, 120), st.floats(0, 0.5))
@example((FLAT, SamplingState(params=FILTERED, position=1)), 3, 0.0)
@example((FLAT, SamplingState(params=replace(FILTERED, top_k=0), position=1)), 3, 0.0)
@example((FLAT, SamplingState(params=replace(FILTERED, top_k=0, min_p=0.0), position=1)), 27, 0.2)
def test_leading_tokens_decide_rightly_or_not_at_all(
    case: tuple[NDArray[np.float32], SamplingState], num: int, uncertainty: float
) -> None:
    row, state = case
    assume(sampling.is_filtered(state.params) and state.params.temperature > 0)
    row = sampling.adjusted(row, state)
    assume(row.max() > -np.inf)
    ids = np.flatnonzero(row >= np.sort(row)[-min(num, len(row))])
    total = math.fsum(np.exp((row.astype(np.float64) - float(row.max())) / state.params.temperature))
    mass = sampling.Mass(low=total * (1 - uncertainty - 1e-9), high=total * (1 + uncertainty + 1e-9))
    token = sampling.choose_leading(ids, row[ids], mass, state)
    if token is not None:
        assert token == sampling.choose(row, state)


@QUICK
@given(cases(), st.data())
def test_contenders_decide_rightly_or_not_at_all(
    case: tuple[NDArray[np.float32], SamplingState], data: st.DataObject
) -> None:
    row, state = case
    params = replace(
        state.params, temperature=data.draw(st.sampled_from([0.3, 1.0, 4.0])), top_k=0, top_p=1.0, min_p=0.0
    )
    state = replace(state, params=params)
    row = sampling.adjusted(row, state)
    assume(row.max() > -np.inf)
    everything = np.arange(len(row))
    uniform = (sampling.noise_hash(params.seed, state.position, everything) + 0.5) / 2**32
    with np.errstate(over="ignore"):
        delay = (1 - uniform) * np.exp((float(row.max()) - row.astype(np.float64)) / params.temperature)
    some = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))))
    assume(len(some))
    least = float(np.delete(delay, some).min(initial=math.inf)) * data.draw(st.floats(0.9991, 1.0009))
    token = sampling.choose_contender(some, row[some], row.max(), least, state)
    if token is not None:
        assert token == sampling.choose(row, state)
    if len(some) == len(row):
        assert token is not None


@QUICK
@given(st.data(), st.integers(1, 60), st.integers(1, 6))
def test_row_does_not_depend_on_its_batch(data: st.DataObject, size: int, num_rows: int) -> None:
    batch = [(data.draw(rows(size)), data.draw(states(size))) for _ in range(num_rows)]
    # Some rows are broken, so that they could break others.
    for row, _ in batch:
        if data.draw(st.integers(0, 9)) == 0:
            row[data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from([np.nan, np.inf]))
    batch = [
        (row, replace(s, params=replace(s.params, logprobs=data.draw(st.sampled_from([None, 0, 3])))))
        for row, s in batch
    ]
    alone = [
        sampler.sample(torch.from_numpy(row)[None], [state], [SequenceId(seq)])
        for seq, (row, state) in enumerate(batch)
    ]
    order = data.draw(st.permutations(range(num_rows)))
    logits = torch.from_numpy(np.stack([batch[i][0] for i in order]))
    before = logits.clone()
    states_B = [batch[i][1] for i in order]
    sampled, failed = sampler.sample(logits, states_B, [SequenceId(i) for i in order])
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    assert sampled == [one for i in order for one in alone[i][0]]
    assert failed == [one for i in order for one in alone[i][1]]
    assert on_device(logits, states_B) == [chosen(batch[i][0], batch[i][1]) for i in order]


@QUICK
@given(cases(), st.integers(0, 50))
def test_masked_padding_of_the_vocabulary_changes_nothing(
    case: tuple[NDArray[np.float32], SamplingState], num_padding: int
) -> None:
    row, state = case
    padded = np.concatenate([row, np.full(num_padding, -np.inf, dtype=np.float32)])
    outcome, with_padding = chosen(row, state), chosen(padded, state)
    assert outcome == with_padding or (isinstance(outcome, str) and isinstance(with_padding, str))


@QUICK
@given(cases())
def test_top_k_of_one_is_greedy_even_among_equals(case: tuple[NDArray[np.float32], SamplingState]) -> None:
    row, state = case
    greedy = replace(state, params=replace(state.params, temperature=0.0))
    for narrow in ({"top_k": 1, "top_p": 1.0, "min_p": 0.0}, {"top_k": 0, "top_p": 0.0, "min_p": 0.0}):
        params = replace(state.params, temperature=1.0, **narrow)  # type: ignore[arg-type]
        assert chosen(row, replace(state, params=params)) == chosen(row, greedy)


@QUICK
@given(cases(st.integers(1, 40)), st.integers(0, 45))
def test_scores_are_the_log_softmax_and_its_best(case: tuple[NDArray[np.float32], SamplingState], top: int) -> None:
    row = case[0]
    exact = torch.from_numpy(row).double().log_softmax(0)
    order = sorted(range(len(row)), key=lambda t: (-row[t], t))[:top]
    target = TokenId(int(np.flatnonzero(row > -np.inf)[-1]))
    for score in (
        sampling.score(row, target, top),
        sampler.score_on_device(torch.from_numpy(row)[None], [0], [target], [top])[0],
    ):
        assert score.logprob == pytest.approx(float(exact[target]), abs=1e-12)
        assert [one.token for one in score.top] == order
        assert [one.logprob for one in score.top] == pytest.approx([float(exact[t]) for t in order], abs=1e-12)
