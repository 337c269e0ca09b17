"""How a token is chosen from a row of logits: the definition, in numpy, that every engine must agree with.

The order of operations is vLLM's (`vllm/v1/sample/sampler.py`, the list at the head of the class), and within the
filters that of transformers (`generation/utils.py`, `_get_logits_processor`):

    1. Log-probabilities, if asked for, are the log-softmax of the raw logits.
    2. `allowed_ids`: all others become -inf. `banned_ids` become -inf. `logit_bias` is added.
    3. Repetition penalty r, over prompt and output: positive logits are divided by r, others multiplied (Keskar et
       al., 2019, arXiv:1909.05858, section 4.1). Then frequency penalty times the token's count in the output, and
       presence penalty once if it is there, are subtracted.
    4. The result is rounded to float32: the *values*. Steps 2 and 3 touch few ids, and are done here for all engines.
    5. Temperature 0: the greatest value wins.
    6. z = (value - greatest value) / temperature. Filters: top_k, then top_p of what top_k left (Holtzman et al.,
       2020, arXiv:1904.09751), then min_p relative to the most probable token (Nguyen et al., 2024,
       arXiv:2407.01082).
    7. The greatest z + noise wins: a draw from softmax(z) (Gumbel-max; Maddison et al., 2014, arXiv:1411.0030).

Rules:
    There is one order of tokens: greater value first, lower id first among equals. Greedy takes its first token;
    each filter keeps a prefix of it, never an empty one; `top` alternatives are its beginning in raw logits. (vLLM
    and transformers keep all tokens equal to the k-th; here top_k=1 is greedy, and top_k keeps k, always.)
    A token's noise is a function of (seed, position, token id): not of batch, filters, or size of vocabulary.
    All arithmetic after step 4 is float64.
    A row is decided by its logits and its state alone. NaN or +inf anywhere in a row fails it; -inf is a masked token.

An engine on an accelerator need not bring the whole row here: `choose_leading` and `choose_contender` decide from
the few tokens that can win, and say so when those do not suffice.

This file does not know any framework, nor batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tllm.core.errors import EngineError
from tllm.core.types import Logprob, SamplingParams, SamplingState, Score, TokenId

Ids = NDArray[np.int64]
Values = NDArray[np.float32]
Wide = NDArray[np.float64]
_Element = TypeVar("_Element", bound=np.generic)

# As many of the most probable tokens as are tried first for a filtered row.
NUM_LEADING = 1024

_MASK_32 = (1 << 32) - 1
_MASK_64 = (1 << 64) - 1
# Multipliers and shifts of the 32-bit finalizer `lowbias32` (Wellons, "Prospecting for Hash Functions", 2018).
MIX_SHIFTS = (16, 15, 16)
MIX_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


# Deciding ---------------------------------------------------------------------------------------------------------


def sample(logits_V: Values, state: SamplingState) -> TokenId:
    """Choose a token: steps 2 to 7. Does not write to `logits_V`.

    Raises EngineError when the logits are not finite, when no token is left to choose, or when the state names a
    token outside the vocabulary.
    """
    values_V = adjusted(logits_V, state)
    if values_V is not logits_V:
        check_finite(logits_V)
    return choose(values_V, state)


def choose(values_V: Values, state: SamplingState) -> TokenId:
    """Steps 5 to 7, for adjusted values. Raises EngineError as `sample` does."""
    best = int(values_V.argmax())  # the first of equals; the first NaN, if there is one
    peak = values_V[best]
    if not np.isfinite(peak):
        check_finite(values_V)  # raises
    if state.params.temperature == 0:
        return TokenId(best)
    if not is_filtered(state.params):
        return _draw(np.arange(len(values_V)), values_V, peak, state)
    num_leading = max(NUM_LEADING, state.params.top_k)
    if num_leading < len(values_V):
        ids_N = np.flatnonzero(values_V >= np.partition(values_V, -num_leading)[-num_leading])
        token = choose_leading(ids_N, values_V[ids_N], _mass(values_V, peak, state.params), state)
        if token is not None:
            return token
    token = choose_leading(np.arange(len(values_V)), values_V, None, state)
    assert token is not None  # the whole row suffices
    return token


@dataclass(frozen=True, slots=True, kw_only=True)
class Mass:
    """The sum of exp(z) over all of a row's tokens lies within these bounds."""

    low: float
    high: float


UNKNOWN_MASS = Mass(low=0.0, high=math.inf)


def choose_leading(ids_N: Ids, values_N: Values, mass: Mass | None, state: SamplingState) -> TokenId | None:
    """Steps 6 and 7 for a filtered row, decided from its most probable tokens.

    `ids_N` ascend; they must hold every token whose value is at least the least of `values_N`, hence the best one.
    `mass` is that of the whole row; None says that `ids_N` is the whole row. The answer is that of `choose`, or None
    when more tokens are needed to know it.
    """
    finite_N = values_N > -np.inf
    if not finite_N.all():
        mass = None  # what is missing is masked
    ids_N, values_N = ids_N[finite_N], values_N[finite_N]
    ordered_N = np.sort(values_N)[::-1]
    num_kept = _num_kept(_scaled(ordered_N, ordered_N[0], state.params), mass, state.params)
    if num_kept is None:
        return None
    threshold = ordered_N[num_kept - 1]
    kept_N = values_N > threshold
    ties = np.flatnonzero(values_N == threshold)
    kept_N[ties[: num_kept - int(kept_N.sum())]] = True
    return _draw(ids_N[kept_N], values_N[kept_N], ordered_N[0], state)


def _num_kept(z_N: Wide, mass: Mass | None, params: SamplingParams) -> int | None:
    """How many tokens the filters keep; `z_N` descends and is a beginning of the row, all of it if `mass` is None."""
    if 0 < params.top_k <= len(z_N):
        z_N, mass = z_N[: params.top_k], None  # what follows sees no others
    elif params.top_k > 0 and mass is not None:
        return None
    size = len(z_N)
    least: float = size if mass is None else math.inf  # bounds of the number, as far as it can be known from here
    most = least
    if params.top_p < 1:
        # A token stays while the mass before it is below its share of the whole.
        cumulative = np.cumsum(np.exp(z_N))
        low, high = (cumulative[-1], cumulative[-1]) if mass is None else (mass.low, mass.high)
        least = min(least, 1 + int(np.searchsorted(cumulative, params.top_p * low)))
        most = min(most, 1 + int(np.searchsorted(cumulative, params.top_p * high)))
    if params.min_p > 0:
        num_probable = int(np.searchsorted(-z_N, -math.log(params.min_p), side="right"))
        least = min(least, num_probable)
        most = min(most, num_probable) if num_probable < size else most
    return int(least) if least == most and least <= size else None


def choose_contender(
    ids_N: Ids, values_N: Values, peak: np.float32, least_delay: float, state: SamplingState
) -> TokenId | None:
    """Step 7 for a row without filters, decided from the tokens that can win.

    With w = exp(z) and u the uniform number of a token, z + noise = -log(-log(u) / w), and -log(u) >= 1 - u. The
    *delay* (1 - u) / w therefore bounds a token's chances from above, and costs no logarithm. `ids_N` ascend, `peak`
    is the greatest value of the row, and no token outside `ids_N` has a delay below `least_delay` (inf when there is
    none outside); it may be off by a relative 1e-3. The answer is that of `choose`, or None when more tokens are
    needed to know it.
    """
    z_N = _scaled(values_N, peak, state.params)
    score_N = z_N + noise(state.params.seed, state.position, ids_N)
    winner = int(score_N.argmax())
    if score_N[winner] <= 1e-3 - math.log(least_delay):
        return None
    return TokenId(int(ids_N[winner]))


def is_filtered(params: SamplingParams) -> bool:
    """Whether a filter may remove a token before the draw."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def needs_mass(params: SamplingParams) -> bool:
    """Whether `choose_leading` needs the mass of the row: top_p alone looks beyond the leading tokens."""
    return params.top_p < 1 and params.top_k == 0


def _mass(values_V: Values, peak: np.float32, params: SamplingParams) -> Mass:
    if not needs_mass(params):
        return UNKNOWN_MASS
    total = sum(float(np.exp(_scaled(values, peak, params)).sum()) for values in _blocks(values_V))
    # Another order of summation differs by at most the number of terms times 2**-53, relative.
    return Mass(low=total * (1 - 1e-9), high=total * (1 + 1e-9))


def _scaled(values: Values, peak: np.float32, params: SamplingParams) -> Wide:
    return (values.astype(np.float64) - np.float64(peak)) / params.temperature


def _draw(ids_N: Ids, values_N: Values, peak: np.float32, state: SamplingState) -> TokenId:
    best_score, winner = -np.inf, ids_N[0]
    for ids, values in zip(_blocks(ids_N), _blocks(values_N), strict=True):
        score = _scaled(values, peak, state.params) + noise(state.params.seed, state.position, ids)
        best = score.argmax()
        if score[best] > best_score:
            best_score, winner = score[best], ids[best]
    return TokenId(int(winner))


def _blocks(array: NDArray[_Element]) -> Iterator[NDArray[_Element]]:
    # A row of a large vocabulary is 1 MB in float64: in blocks, what is derived from it stays in the cache and is
    # taken from the heap, not from the kernel page by page (which is four times the work of the arithmetic).
    return (array[start : start + 8192] for start in range(0, len(array), 8192))


# Values -----------------------------------------------------------------------------------------------------------


def adjusted(logits_V: Values, state: SamplingState) -> Values:
    """The values of step 4; `logits_V` itself when nothing changes it. Raises EngineError for an id out of range."""
    ids = touched_ids(state, len(logits_V))
    if ids is None:
        return logits_V
    values_V = logits_V.copy() if state.params.allowed_ids is None else np.full_like(logits_V, -np.inf)
    values_V[ids] = adjust(logits_V[ids], ids, state)
    return values_V


def touched_ids(state: SamplingState, vocab_size: int) -> Ids | None:
    """The ascending ids whose values `adjust` must compute; None when every value is its logit.

    With `allowed_ids` these are the allowed ones, and all others are -inf. Raises EngineError for an id that is not
    in the vocabulary.
    """
    params = state.params
    named: list[Iterable[int]] = [(token for token, _ in params.logit_bias), state.banned_ids]
    if params.repetition_penalty != 1:
        named.append(state.prompt_ids)
    if params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0:
        named.append(token for token, _ in state.counts)
    if params.allowed_ids is not None:
        named.append(params.allowed_ids)
    ids: Ids = np.unique(np.fromiter((token for group in named for token in group), dtype=np.int64))
    if len(ids) and (ids[0] < 0 or ids[-1] >= vocab_size):
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise EngineError(f"token id {wrong} is outside the vocabulary of {vocab_size}")
    if params.allowed_ids is not None:
        return np.unique(_ids(params.allowed_ids))
    return ids if len(ids) else None


def adjust(logits_N: Values, ids_N: Ids, state: SamplingState) -> Values:
    """Steps 2 to 4 for the tokens `ids_N` (ascending), all of them allowed; `logits_N` are their raw logits."""
    params = state.params
    values_N = logits_N.astype(np.float64)
    here, which = _find(ids_N, state.banned_ids)
    values_N[here] = -np.inf
    here, which = _find(ids_N, [token for token, _ in params.logit_bias])
    np.add.at(values_N, here, np.array([bias for _, bias in params.logit_bias], dtype=np.float64)[which])

    here_counted, which = _find(ids_N, [token for token, _ in state.counts])
    if params.repetition_penalty != 1:
        here = np.union1d(_find(ids_N, state.prompt_ids)[0], here_counted)
        seen = values_N[here]
        values_N[here] = np.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    count = np.array([count for _, count in state.counts], dtype=np.float64)[which]
    values_N[here_counted] -= params.frequency_penalty * count
    values_N[here_counted] -= np.where(count > 0, params.presence_penalty, 0.0)
    return values_N.astype(np.float32)


def _find(ids_N: Ids, wanted: Sequence[int]) -> tuple[Ids, Ids]:
    """Places in `ids_N` of the wanted ids that are there, and the places of those in `wanted`."""
    wanted_ids = _ids(wanted)
    if not len(wanted_ids) or not len(ids_N):
        return wanted_ids[:0], wanted_ids[:0]
    places = np.minimum(np.searchsorted(ids_N, wanted_ids), len(ids_N) - 1)
    which = np.flatnonzero(ids_N[places] == wanted_ids)
    return places[which], which


def _ids(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int64)


# Noise ------------------------------------------------------------------------------------------------------------


def noise(seed: int, position: int, ids: Ids) -> Wide:
    """Standard Gumbel noise -log(-log(u)) of each id; u = (hash + 1/2) / 2**32 lies strictly between 0 and 1."""
    uniform = (noise_hash(seed, position, ids).astype(np.float64) + 0.5) / 2.0**32
    gumbel: Wide = -np.log(-np.log(uniform))
    return gumbel


def noise_hash(seed: int, position: int, ids: Ids) -> NDArray[np.uint32]:
    """The 32 random bits of each id: two rounds of `lowbias32`, each after the xor with a 32-bit key.

    For one seed and position this is a permutation: no two ids have the same noise.
    """
    first, second = noise_keys(seed, position)
    return _mix_32(_mix_32(ids.astype(np.uint32) ^ np.uint32(first)) ^ np.uint32(second))


def noise_keys(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys from the seed (any integer, taken modulo 2**64) and the position.

    Positions of one seed are steps of a `splitmix64` stream that starts at the mixed seed (Steele, Lea and Flood,
    "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), so that two of them never share both keys.
    """
    golden = 0x9E3779B97F4A7C15
    key = _mix_64(_mix_64(seed + golden) + (position + 1) * golden)
    return key >> 32, key & _MASK_32


def _mix_64(x: int) -> int:
    x &= _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def _mix_32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    x = x ^ (x >> np.uint32(MIX_SHIFTS[0]))
    x *= np.uint32(MIX_MULTIPLIERS[0])
    x ^= x >> np.uint32(MIX_SHIFTS[1])
    x *= np.uint32(MIX_MULTIPLIERS[1])
    x ^= x >> np.uint32(MIX_SHIFTS[2])
    return x


# Log-probabilities ------------------------------------------------------------------------------------------------


def score(logits_V: Values, target: TokenId, top: int) -> Score:
    """The log-probability of `target` and the `top` best tokens (fewer if the vocabulary is smaller), step 1.

    The target is among `top` when it is that good. Raises EngineError as `sample` does.
    """
    if not 0 <= target < len(logits_V):
        raise EngineError(f"token id {target} is outside the vocabulary of {len(logits_V)}")
    peak = check_finite(logits_V)
    normalizer = float(peak) + math.log(
        sum(float(np.exp(logits.astype(np.float64) - np.float64(peak)).sum()) for logits in _blocks(logits_V))
    )
    ids = leading_ids(logits_V, top)
    return Score(logprob=float(logits_V[target]) - normalizer, top=as_logprobs(ids, logits_V[ids], normalizer))


def as_logprobs(ids: Ids, logits: Values, normalizer: float) -> tuple[Logprob, ...]:
    """Tokens with their logits, as log-probabilities; `normalizer` is the log of the sum of exp over the row."""
    pairs = zip(ids.tolist(), logits.tolist(), strict=True)
    return tuple(Logprob(token=TokenId(token), logprob=logit - normalizer) for token, logit in pairs)


def leading_ids(values_V: Values, count: int) -> Ids:
    """The first `count` tokens in the order of tokens."""
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    size = len(values_V)
    count = min(count, size)
    threshold = np.partition(values_V, size - count)[size - count]
    ids = np.flatnonzero(values_V >= threshold)
    return ids[np.lexsort((ids, -values_V[ids]))][:count]


def check_finite(logits_V: Values) -> np.float32:
    """The greatest logit. Raises EngineError for a row with NaN or +inf, or of nothing but -inf."""
    peak = np.float32(logits_V.max())  # NaN if there is one
    if np.isfinite(peak):
        return peak
    num_nan, num_infinite = int(np.isnan(logits_V).sum()), int(np.isposinf(logits_V).sum())
    if num_nan or num_infinite:
        raise EngineError(f"logits are not finite ({num_nan} NaN and {num_infinite} +inf of {len(logits_V)})")
    raise EngineError(f"no token can be chosen: all {len(logits_V)} are masked (-inf)")
