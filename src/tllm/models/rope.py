"""Rotary positions: from a checkpoint's scaling to the numbers that rotate a head.

Position p turns the pair (x[i], x[i + dim/2]) of a head by the angle p * inverse_frequencies[i]; cosines and sines are
both multiplied by the attention factor. Sources: RoFormer (arXiv 2104.09864) for the base; YaRN (arXiv 2309.00071),
sections 3.1 to 3.4, for linear, dynamic NTK and yarn; LongRoPE (arXiv 2402.13753); the Llama 3.1 report for llama3.

Keys are cached after rotation, so the frequencies of a served model never change. The two kinds that depend on the
length of a text (dynamic, longrope) are therefore resolved once, from one length for the whole deployment, not from the
text at hand: a token's value must depend neither on how many follow it nor on chunking. With a length of at most
`original_max_positions` they equal the reference for every text up to it. With a longer one every text is rotated as
one of that length would be, and short texts differ from the reference, which turns them unscaled. That length must not
come from what memory happens to allow, or answers would depend on memory.

This file does not know configs, tensors or how angles are applied.
"""

from __future__ import annotations

import math
from typing import assert_never

from tllm.models.spec import Rope, RopeKind


def inverse_frequencies(rope: Rope, sequence_length: int) -> tuple[tuple[float, ...], float]:
    """Radians per position for each of the `rope.dim / 2` pairs, and the factor on cosines and sines.

    `sequence_length` is the longest text the deployment is meant for; only dynamic and longrope look at it. Every rank
    of every stage must be given the same one.
    """
    base = _powers(rope.theta, rope.dim)
    match rope.kind:
        case RopeKind.DEFAULT:
            return tuple(1 / power for power in base), 1.0
        case RopeKind.LINEAR:
            return tuple(1 / power / rope.factor for power in base), 1.0
        case RopeKind.DYNAMIC:
            return _dynamic(rope, sequence_length), 1.0
        case RopeKind.LLAMA3:
            return tuple(_llama3(1 / power, rope) for power in base), 1.0
        case RopeKind.YARN:
            return _yarn(rope, base), _yarn_attention_factor(rope)
        case RopeKind.LONGROPE:
            factors = rope.long_factor if sequence_length > _original(rope) else rope.short_factor
            return tuple(1 / (f * power) for f, power in zip(factors, base, strict=True)), _long_attention_factor(rope)
        case _:
            assert_never(rope.kind)


def _powers(theta: float, dim: int) -> tuple[float, ...]:
    """The wavelength of each pair in units of 2 pi: theta ** (2i / dim)."""
    return tuple(theta ** (i / dim) for i in range(0, dim, 2))


def _original(rope: Rope) -> int:
    assert rope.original_max_positions is not None, f"{rope.kind} without original_max_positions"
    return rope.original_max_positions


def _dynamic(rope: Rope, sequence_length: int) -> tuple[float, ...]:
    """Raise theta so that the slowest pair turns as little over the served length as over the original one."""
    original = _original(rope)
    stretch = rope.factor * max(sequence_length, original) / original - (rope.factor - 1)
    theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    return tuple(1 / power for power in _powers(theta, rope.dim))


def _llama3(frequency: float, rope: Rope) -> float:
    """Keep pairs that turn often within the original context, slow down the others, blend in between."""
    assert rope.low_freq_factor is not None
    assert rope.high_freq_factor is not None
    turns = _original(rope) * frequency / (2 * math.pi)
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    if turns > rope.high_freq_factor:
        return frequency
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - keep) * frequency / rope.factor + keep * frequency


def _yarn(rope: Rope, base: tuple[float, ...]) -> tuple[float, ...]:
    """Keep pairs above `beta_fast` turns in the original context, divide those below `beta_slow`, blend by index."""
    assert rope.beta_fast is not None
    assert rope.beta_slow is not None

    def pair_with(turns: float) -> float:
        return rope.dim * math.log(_original(rope) / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper bound is dim - 1 although there are only dim / 2 pairs: so it is in the reference.
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    frequencies = []
    for i, power in enumerate(base):
        slow = min(max((i - low) / width, 0.0), 1.0)
        frequencies.append(slow / (rope.factor * power) + (1 - slow) / power)
    return tuple(frequencies)


def _yarn_attention_factor(rope: Rope) -> float:
    """YaRN, section 3.4: 0.1 ln(factor) + 1; DeepSeek's two mscales divide one such term by another."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _long_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(rope.factor) / math.log(_original(rope))) if rope.factor > 1 else 1.0
