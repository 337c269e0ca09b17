"""Sampling from torch logits: the definition in `engines/sampling`, brought to where the logits are.

On the host that definition is the code: numpy reads the rows in place, or kernels of ours narrow them first. A row on
an accelerator is not moved; the device narrows it to the few tokens that can win, and the host decides among them.
Where those turn out not to suffice (a very flat distribution, equal logits at the edge), the whole row is looked at.
Hence every token is exactly the one that the definition chooses, whatever the device, its libraries' last bits, and
the other rows.

Shapes: B rows to sample, R rows to score, V vocabulary, F rows with filters, P rows without, K tokens that may win.

This file does not know what the definition is, nor how logits came to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tllm.core.errors import EngineError
from tllm.core.types import Sampled, SamplingState, Score, SequenceFailed, SequenceId, TokenId
from tllm.engines import sampling
from tllm.engines.torch.kernels.rows import KernelRows

# Rows whose noise is computed at a time: 32 rows of 128k int64 are 32 MB for each intermediate result.
_ROWS_AT_A_TIME = 32
_NUM_CONTENDERS = 8
# Tokens taken beyond those asked for, so that equal logits at the edge are seen.
_NUM_SPARE = 16


def sample(
    logits_BV: Tensor, states: Sequence[SamplingState], seqs: Sequence[SequenceId], kernels: KernelRows | None = None
) -> tuple[list[Sampled], list[SequenceFailed]]:
    """Choose one token per row; both lists are in row order. `logits_BV` is float32 and is not written to.

    A row that cannot be sampled (its logits are not finite, every token is masked, its state names an id outside the
    vocabulary) fails alone. Raises nothing for what is in the rows or the states. `kernels` are for the host alone.
    """
    assert logits_BV.dtype == torch.float32, logits_BV.dtype
    assert len(logits_BV) == len(states) == len(seqs)
    logits_BV = _placed(logits_BV)
    if logits_BV.device.type != "cpu":
        outcomes = choose_on_device(logits_BV, states)
    elif kernels is not None:
        outcomes = kernels.choose(logits_BV.numpy(), states)
    else:
        outcomes = choose_on_host(logits_BV, states)

    chosen = {row: outcome for row, outcome in enumerate(outcomes) if not isinstance(outcome, EngineError)}
    tops = {row: top for row in chosen if (top := states[row].params.logprobs) is not None}
    targets = [chosen[row] for row in tops]
    scores = dict(zip(tops, _score_rows(logits_BV, list(tops), targets, list(tops.values()), kernels), strict=True))

    sampled, failed = [], []
    for row, (seq, outcome) in enumerate(zip(seqs, outcomes, strict=True)):
        if isinstance(outcome, EngineError):
            failed.append(SequenceFailed(seq=seq, reason=str(outcome)))
        elif row in scores:
            sampled.append(Sampled(seq=seq, token=outcome, logprob=scores[row].logprob, top=scores[row].top))
        else:
            sampled.append(Sampled(seq=seq, token=outcome))
    return sampled, failed


def score(
    logits_RV: Tensor, targets: Sequence[TokenId], top: int, kernels: KernelRows | None = None
) -> tuple[Score, ...]:
    """Log-probabilities of `targets[i]` and of the `top` best tokens in row `i`; rows beyond the targets are unread.

    Raises EngineError when a row is not finite or a target is outside the vocabulary.
    """
    assert logits_RV.dtype == torch.float32, logits_RV.dtype
    assert len(targets) <= len(logits_RV)
    rows = list(range(len(targets)))
    return tuple(_score_rows(_placed(logits_RV), rows, targets, [top] * len(targets), kernels))


def _placed(logits: Tensor) -> Tensor:
    # Apple's GPUs share the host's memory and have no float64: there, the definition itself is the fast way.
    return logits.detach().cpu() if logits.device.type == "mps" else logits.detach()


# Choosing ---------------------------------------------------------------------------------------------------------


def choose_on_host(logits_BV: Tensor, states: Sequence[SamplingState]) -> list[TokenId | EngineError]:
    """A token, or the reason why there is none, for each row of a tensor in the host's memory."""
    outcomes: list[TokenId | EngineError] = []
    for logits_V, state in zip(logits_BV.numpy(), states, strict=True):
        try:
            outcomes.append(sampling.sample(logits_V, state))
        except EngineError as error:
            outcomes.append(error)
    return outcomes


def choose_on_device(logits_BV: Tensor, states: Sequence[SamplingState]) -> list[TokenId | EngineError]:
    """The same, for any device that has float64. Moves a few thousand numbers per row, and seldom a row."""
    if not states:
        return []
    values_BV, outcomes = _adjusted(logits_BV, states)
    peak_B, best_B = values_BV.max(dim=1)  # NaN is the greatest; the first of equals
    greatest_2B = torch.stack([logits_BV.amax(dim=1), peak_B]).cpu().numpy()
    best = best_B.tolist()
    filtered, plain = [], []
    for row, state in enumerate(states):
        if row in outcomes or not np.isfinite(greatest_2B[:, row]).all():
            continue
        if state.params.temperature == 0:
            outcomes[row] = TokenId(best[row])
        elif sampling.is_filtered(state.params):
            filtered.append(row)
        else:
            plain.append(row)
    outcomes |= _choose_filtered(values_BV, peak_B, filtered, states)
    outcomes |= _choose_plain(values_BV, peak_B, plain, states)
    for row, state in enumerate(states):
        if row not in outcomes:
            outcomes[row] = _choose_moved(logits_BV[row], values_BV[row], state)
    return [outcomes[row] for row in range(len(states))]


def _choose_moved(logits_V: Tensor, values_V: Tensor, state: SamplingState) -> TokenId | EngineError:
    """The definition itself, for a row that is not finite or of which a few tokens do not suffice."""
    try:
        sampling.check_finite(logits_V.cpu().numpy())
        return sampling.choose(values_V.cpu().numpy(), state)
    except EngineError as error:
        return error


def _adjusted(logits_BV: Tensor, states: Sequence[SamplingState]) -> tuple[Tensor, dict[int, TokenId | EngineError]]:
    """Values of all rows, in new memory if any differs from its logits, and the rows that have none with the reason."""
    failed: dict[int, TokenId | EngineError] = {}
    vocab_size = logits_BV.shape[1]
    touched: dict[int, sampling.Ids] = {}
    for row, state in enumerate(states):
        try:
            ids = sampling.touched_ids(state, vocab_size)
        except EngineError as error:
            failed[row] = error
        else:
            if ids is not None:
                touched[row] = ids
    if not touched:
        return logits_BV, failed
    # One gather, the arithmetic on the host, one scatter.
    places = np.concatenate([row * vocab_size + ids for row, ids in touched.items()])
    places_N = torch.from_numpy(places).to(logits_BV.device)
    logits_N = logits_BV.reshape(-1)[places_N].cpu().numpy()
    values = np.empty_like(logits_N)
    start = 0
    for row, ids in touched.items():
        stop = start + len(ids)
        values[start:stop] = sampling.adjust(logits_N[start:stop], ids, states[row])
        start = stop
    values_BV = logits_BV.clone(memory_format=torch.contiguous_format)
    for row in touched:
        if states[row].params.allowed_ids is not None:
            values_BV[row] = -math.inf
    values_BV.view(-1)[places_N] = torch.from_numpy(values).to(logits_BV.device)
    return values_BV, failed


def _choose_filtered(
    values_BV: Tensor, peak_B: Tensor, rows: Sequence[int], states: Sequence[SamplingState]
) -> dict[int, TokenId | EngineError]:
    """Tokens of those rows that the leading tokens decide."""
    if not rows:
        return {}
    vocab_size = values_BV.shape[1]
    num_leading = min(vocab_size, 1 + sampling.NUM_LEADING)  # a greater top_k moves its row, and burdens no other
    leading = values_BV[rows].topk(num_leading, dim=1)
    values_FK, ids_FK = leading.values.cpu().numpy(), leading.indices.cpu().numpy()
    masses = _masses(values_BV, peak_B, [row for row in rows if sampling.needs_mass(states[row].params)], states)
    tokens: dict[int, TokenId | EngineError] = {}
    for row, values_K, ids_K in zip(rows, values_FK, ids_FK, strict=True):
        # Which of the tokens equal to the last one are here is up to the device: without them, it is all above it.
        everything = num_leading == vocab_size or values_K[-1] == -np.inf
        certain = values_K > (-np.inf if everything else values_K[-1])
        if not certain.any():
            continue
        ascending = np.argsort(ids_K[certain])
        ids_N, values_N = ids_K[certain][ascending], values_K[certain][ascending]
        mass = None if everything else masses.get(row, sampling.UNKNOWN_MASS)
        token = sampling.choose_leading(ids_N, values_N, mass, states[row])
        if token is not None:
            tokens[row] = token
    return tokens


def _masses(
    values_BV: Tensor, peak_B: Tensor, rows: Sequence[int], states: Sequence[SamplingState]
) -> dict[int, sampling.Mass]:
    if not rows:
        return {}
    totals = []
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        part = list(rows[start : start + _ROWS_AT_A_TIME])
        z_FV = (values_BV[part].double() - peak_B[part, None]) / _temperatures(part, states, values_BV.device)
        totals.append(z_FV.exp_().sum(dim=1))
    return {
        row: sampling.Mass(low=total * (1 - 1e-9), high=total * (1 + 1e-9))
        for row, total in zip(rows, torch.cat(totals).tolist(), strict=True)
    }


def _choose_plain(
    values_BV: Tensor, peak_B: Tensor, rows: Sequence[int], states: Sequence[SamplingState]
) -> dict[int, TokenId | EngineError]:
    """Tokens of those rows that the contenders decide."""
    tokens: dict[int, TokenId | EngineError] = {}
    vocab_size = values_BV.shape[1]
    num_contenders = min(vocab_size, 1 + _NUM_CONTENDERS)
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        part = list(rows[start : start + _ROWS_AT_A_TIME])
        keys = [sampling.noise_keys(states[row].params.seed, states[row].position) for row in part]
        hash_PV = noise_hash(torch.tensor(keys, device=values_BV.device), vocab_size)
        # The delay of `sampling.choose_contender`: (1 - u) / w.
        weight_PV = (peak_B[part, None] - values_BV[part]) / _temperatures(part, states, values_BV.device).float()
        delay_PV = ((2**32 - 1 - hash_PV).float() + 0.5) * weight_PV.exp_()
        least = delay_PV.topk(num_contenders, dim=1, largest=False)
        values_PK = values_BV[part].gather(1, least.indices).cpu().numpy()
        ids_PK, delay_PK = least.indices.cpu().numpy(), least.values.cpu().numpy() / np.float32(2**32)
        peak_P = peak_B[part].cpu().numpy()
        for i, row in enumerate(part):
            # The last one only says how good the others can be.
            known = slice(None, -1) if num_contenders < vocab_size else slice(None)
            least_delay = float(delay_PK[i, -1]) if num_contenders < vocab_size else math.inf
            ascending = np.argsort(ids_PK[i, known])
            ids_N, values_N = ids_PK[i, known][ascending], values_PK[i, known][ascending]
            token = sampling.choose_contender(ids_N, values_N, peak_P[i], least_delay, states[row])
            if token is not None:
                tokens[row] = token
    return tokens


def noise_hash(keys_P2: Tensor, vocab_size: int) -> Tensor:
    """`sampling.noise_hash` of all ids under P pairs of keys, shape (P, V): 32-bit arithmetic carried in int64."""
    ids_V = torch.arange(vocab_size, device=keys_P2.device)
    return _mix(_mix(ids_V ^ keys_P2[:, :1]) ^ keys_P2[:, 1:])


def _mix(x: Tensor) -> Tensor:
    low = (1 << 32) - 1
    for shift, multiplier in zip(sampling.MIX_SHIFTS, sampling.MIX_MULTIPLIERS, strict=False):
        x = x ^ (x >> shift)
        # As a signed 32-bit number, so that the product fits 64 bits: the low 32 bits are the same.
        x *= multiplier - (1 << 32) if multiplier >= 1 << 31 else multiplier
        x &= low
    return x ^ (x >> sampling.MIX_SHIFTS[-1])


def _temperatures(rows: Sequence[int], states: Sequence[SamplingState], device: torch.device) -> Tensor:
    return torch.tensor([[states[row].params.temperature] for row in rows], dtype=torch.float64, device=device)


# Scoring ----------------------------------------------------------------------------------------------------------


def _score_rows(
    logits_RV: Tensor,
    rows: Sequence[int],
    targets: Sequence[TokenId],
    tops: Sequence[int],
    kernels: KernelRows | None,
) -> list[Score]:
    if logits_RV.device.type == "cpu":
        logits = logits_RV.numpy()
        if kernels is not None:
            return kernels.score([logits[row] for row in rows], targets, tops)
        return [sampling.score(logits[row], target, top) for row, target, top in zip(rows, targets, tops, strict=True)]
    return score_on_device(logits_RV, rows, targets, tops)


def score_on_device(
    logits_RV: Tensor, rows: Sequence[int], targets: Sequence[TokenId], tops: Sequence[int]
) -> list[Score]:
    """`sampling.score` of some rows, for any device that has float64; the last bits are the device's own.

    Row by row, because how a device sums a row may depend on how many rows there are.
    """
    vocab_size = logits_RV.shape[1]
    for target in targets:
        if not 0 <= target < vocab_size:
            raise EngineError(f"token id {target} is outside the vocabulary of {vocab_size}")
    if not rows:
        return []
    num_leading = min(vocab_size, max(tops) + _NUM_SPARE)
    numbers, leading_values, leading_ids = [], [], []
    for row, target in zip(rows, targets, strict=True):
        logits_V = logits_RV[row]
        peak = logits_V.amax().double()
        normalizer = peak + (logits_V.double() - peak).exp_().sum().log()
        numbers.append(torch.stack([peak, normalizer, logits_V[target].double()]))
        leading = logits_V.topk(num_leading)
        leading_values.append(leading.values)
        leading_ids.append(leading.indices)
    numbers_R3 = torch.stack(numbers).tolist()
    values_RK = torch.stack(leading_values).cpu().numpy()
    ids_RK = torch.stack(leading_ids).cpu().numpy()

    scores = []
    for i, (row, top) in enumerate(zip(rows, tops, strict=True)):
        peak_value, normalizer_value, logit = numbers_R3[i]
        if not math.isfinite(peak_value):
            sampling.check_finite(logits_RV[row].cpu().numpy())  # raises, and says how many
        values_K, ids_K = values_RK[i], ids_RK[i]
        if 0 < top < num_leading < vocab_size and values_K[top - 1] == values_K[-1]:
            logits = logits_RV[row].cpu().numpy()
            ids = sampling.leading_ids(logits, top)
            values = logits[ids]
        else:
            order = np.lexsort((ids_K, -values_K))[:top]
            ids, values = ids_K[order], values_K[order]
        top_logprobs = sampling.as_logprobs(ids, values, normalizer_value)
        scores.append(Score(logprob=logit - normalizer_value, top=top_logprobs))
    return scores
