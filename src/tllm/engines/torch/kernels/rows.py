"""Sampling on a CPU where kernels are: C++ narrows a row of logits to the few tokens that can win (`rows.cpp`), the
definition decides among them, and gets the whole row where they do not suffice. So a token is the one that
`engines/sampling` chooses, always.

This file does not know what the definition is, nor how logits came to be.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tllm.core.errors import EngineError
from tllm.core.types import SamplingState, Score, TokenId
from tllm.engines import sampling

_NUM_LEADING = 256  # of a row that filters may cut anywhere
_NUM_CONTENDERS = 8
_ROOM = 8192  # leading tokens: equal ones may be many

# `Request` and `Answer` of rows.cpp.
_REQUEST = np.dtype(
    [
        ("values", np.uint64),
        ("temperature", np.float64),
        ("keys", np.uint32, 2),
        ("num_leading", np.int32),
        ("num_contenders", np.int32),
        ("wants_mass", np.int64),
    ]
)
_ANSWER = np.dtype(
    [
        ("mass", np.float64),
        ("peak", np.float32),
        ("best", np.int32),
        ("least_delay", np.float32),
        ("num_leading", np.int32),
        ("whole", np.int32),
        ("num_contenders", np.int32),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What is asked of a row."""

    values: sampling.Values  # (V,), contiguous
    temperature: float = 1.0
    keys: tuple[int, int] = (0, 0)
    num_leading: int = 0
    num_contenders: int = 0
    mass: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Narrowed:
    peak: np.float32
    best: int
    mass: float
    leading: sampling.Ids | None  # ascending; None: too many
    whole: bool  # no other token can be chosen
    contenders: sampling.Ids  # ascending
    least_delay: float


class KernelRows:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._narrow_rows = library.tllm_narrow_rows
        self._narrow_rows.restype = None
        self._narrow_rows.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64)

    def choose(self, logits_BV: NDArray[np.float32], states: Sequence[SamplingState]) -> list[TokenId | EngineError]:
        """What `sampling.sample` chooses for each row, or the reason why it does not."""
        values: dict[int, sampling.Values] = {}
        outcomes: dict[int, TokenId | EngineError] = {}
        for row, (logits_V, state) in enumerate(zip(logits_BV, states, strict=True)):
            try:
                values_V = sampling.adjusted(logits_V, state)
                if values_V is not logits_V:
                    sampling.check_finite(logits_V)
                values[row] = np.ascontiguousarray(values_V)
            except EngineError as error:
                outcomes[row] = error
        wanted = [_wanted(values_V, states[row]) for row, values_V in values.items()]
        for (row, values_V), narrowed in zip(values.items(), self._narrow(wanted), strict=True):
            try:
                token = _decide(values_V, narrowed, states[row])
                outcomes[row] = sampling.choose(values_V, states[row]) if token is None else token
            except EngineError as error:
                outcomes[row] = error
        return [outcomes[row] for row in range(len(states))]

    def score(
        self, logits_RV: Sequence[sampling.Values], targets: Sequence[TokenId], tops: Sequence[int]
    ) -> list[Score]:
        """What `sampling.score` says of each row, up to the last bits of a logarithm. Raises EngineError as it does."""
        wanted = [
            _Wanted(values=np.ascontiguousarray(logits_V), num_leading=top, mass=True)
            for logits_V, top in zip(logits_RV, tops, strict=True)
        ]
        scores = []
        for want, narrowed, target, top in zip(wanted, self._narrow(wanted), targets, tops, strict=True):
            logits_V = want.values
            if narrowed.leading is None or not np.isfinite(narrowed.peak) or not 0 <= target < len(logits_V):
                scores.append(sampling.score(logits_V, target, top))
                continue
            normalizer = float(narrowed.peak) + math.log(narrowed.mass)
            ids, values_N = narrowed.leading, logits_V[narrowed.leading]
            if len(ids) < min(top, len(logits_V)):  # the others are masked
                ids = sampling.leading_ids(logits_V, top)
            else:
                ids = ids[np.lexsort((ids, -values_N))][:top]
            top_logprobs = sampling.as_logprobs(ids, logits_V[ids], normalizer)
            scores.append(Score(logprob=float(logits_V[target]) - normalizer, top=top_logprobs))
        return scores

    def _narrow(self, wanted: Sequence[_Wanted]) -> list[_Narrowed]:
        """All rows have one size."""
        if not wanted:
            return []
        requests = np.array(
            [
                (
                    want.values.ctypes.data,
                    want.temperature,
                    want.keys,
                    want.num_leading,
                    want.num_contenders,
                    want.mass,
                )
                for want in wanted
            ],
            dtype=_REQUEST,
        )
        answers = np.empty(len(wanted), dtype=_ANSWER)
        leading = np.empty((len(wanted), _ROOM), dtype=np.int32)
        contenders = np.empty((len(wanted), _NUM_CONTENDERS), dtype=np.int32)
        self._narrow_rows(
            requests.ctypes.data,
            answers.ctypes.data,
            len(wanted),
            len(wanted[0].values),
            leading.ctypes.data,
            _ROOM,
            contenders.ctypes.data,
            _NUM_CONTENDERS,
        )
        return [
            _Narrowed(
                peak=answer["peak"],
                best=int(answer["best"]),
                mass=float(answer["mass"]),
                leading=None if answer["num_leading"] < 0 else leading_N[: answer["num_leading"]].astype(np.int64),
                whole=bool(answer["whole"]),
                contenders=contenders_N[: answer["num_contenders"]].astype(np.int64),
                least_delay=float(answer["least_delay"]),
            )
            for answer, leading_N, contenders_N in zip(answers, leading, contenders, strict=True)
        ]


def _wanted(values_V: sampling.Values, state: SamplingState) -> _Wanted:
    params = state.params
    if params.temperature == 0:
        return _Wanted(values=values_V)
    if not sampling.is_filtered(params):
        keys = sampling.noise_keys(params.seed, state.position)
        return _Wanted(values=values_V, temperature=params.temperature, keys=keys, num_contenders=_NUM_CONTENDERS)
    return _Wanted(
        values=values_V,
        temperature=params.temperature,
        num_leading=params.top_k or _NUM_LEADING,
        mass=sampling.needs_mass(params),
    )


def _decide(values_V: sampling.Values, narrowed: _Narrowed, state: SamplingState) -> TokenId | None:
    """None: the whole row is needed to know."""
    params = state.params
    if not np.isfinite(narrowed.peak):
        return None
    if params.temperature == 0:
        return TokenId(narrowed.best)
    if not sampling.is_filtered(params):
        ids = narrowed.contenders
        return sampling.choose_contender(ids, values_V[ids], narrowed.peak, narrowed.least_delay, state)
    if narrowed.leading is None:
        return None
    mass = sampling.UNKNOWN_MASS
    if sampling.needs_mass(params):
        mass = sampling.Mass(low=narrowed.mass * (1 - 1e-9), high=narrowed.mass * (1 + 1e-9))
    ids = narrowed.leading
    return sampling.choose_leading(ids, values_V[ids], None if narrowed.whole else mass, state)
