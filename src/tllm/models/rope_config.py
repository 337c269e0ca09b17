"""From a config's words for rotary scaling to a `Rope`.

There are two spellings: `rope_theta` beside `rope_scaling` ("type" or "rope_type" inside), and transformers 5's
`rope_parameters` with everything inside. Where both stand in one file, `rope_scaling` counts, as there.

This file does not know what the numbers do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, assert_never

from tllm.core.errors import ModelError
from tllm.models.config import Config
from tllm.models.spec import Rope, RopeKind

# Every name that a scaling may have, whatever its kind; anything else might change the answer unseen.
_KNOWN: Final = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}
    | {"low_freq_factor", "high_freq_factor"}
    | {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "attention_factor", "finetuned"}
    | {"short_factor", "long_factor"}
)
_ORIGINAL: Final = "original_max_position_embeddings"


def read_rope(config: Config, head_dim: int, max_positions: int) -> tuple[Rope, int]:
    """The rotary positions of a config, and how long a text they are made for.

    That is `max_positions`, the config's own figure, except for yarn with an explicit original length: publishers
    leave the figure alone when they add the scaling, so it is original length x factor where that is longer.
    Raises ModelError naming the field, its value and what is supported.
    """
    scaling = config.section("rope_scaling") or config.section("rope_parameters")
    scaling = scaling or Config(path=config.path, fields={})
    if unknown := sorted(set(scaling.fields) - _KNOWN):
        raise ModelError(
            f"{scaling.path}: {', '.join(unknown)} is not supported; known are {', '.join(sorted(_KNOWN))}."
        )
    for section in (config, scaling):
        section.refuse_unless("partial_rotary_factor", 1.0, "heads are rotated whole")
    if head_dim % 2:
        raise ModelError(f"{config.path}: head_dim {head_dim} is odd, but rotary positions turn pairs.")

    theta = (scaling if "rope_theta" in scaling.fields else config).positive_number("rope_theta", default=10000.0)
    rope = Rope(kind=_kind(scaling), theta=theta, dim=head_dim)
    match rope.kind:
        case RopeKind.DEFAULT:
            return rope, max_positions
        case RopeKind.LINEAR:
            return replace(rope, factor=scaling.positive_number("factor")), max_positions
        case RopeKind.DYNAMIC:
            if head_dim == 2:
                raise ModelError(f"{config.path}: dynamic rope needs a head_dim above 2.")
            factor = scaling.positive_number("factor")
            return replace(rope, factor=factor, original_max_positions=max_positions), max_positions
        case RopeKind.LLAMA3:
            return _llama3(rope, config, scaling, max_positions), max_positions
        case RopeKind.YARN:
            rope = _yarn(rope, config, scaling, max_positions)
            explicit = config.fields.get(_ORIGINAL) or scaling.fields.get(_ORIGINAL)
            stretched = int((rope.original_max_positions or 0) * rope.factor) if explicit else 0
            return rope, max(max_positions, stretched)
        case RopeKind.LONGROPE:
            return _longrope(rope, config, scaling, max_positions), max_positions
        case _:
            assert_never(rope.kind)


def _kind(scaling: Config) -> RopeKind:
    name = scaling.text("rope_type") or scaling.text("type") or "default"
    if name not in {kind.value for kind in RopeKind}:
        raise ModelError(f"{scaling.path}: rope_type {name!r} is not supported; there are {', '.join(RopeKind)}.")
    return RopeKind(name)


def _original(config: Config, scaling: Config, max_positions: int) -> int:
    """Beside the scaling, else within it, else the config's figure for the whole context."""
    section = config if config.fields.get(_ORIGINAL) is not None else scaling
    return section.optional_size(_ORIGINAL, default=max_positions) or max_positions


def _llama3(rope: Rope, config: Config, scaling: Config, max_positions: int) -> Rope:
    low, high = scaling.positive_number("low_freq_factor"), scaling.positive_number("high_freq_factor")
    if low >= high:
        raise ModelError(f"{scaling.path}: low_freq_factor {low} must be below high_freq_factor {high}.")
    return replace(
        rope,
        factor=scaling.positive_number("factor"),
        original_max_positions=_original(config, scaling, max_positions),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: Rope, config: Config, scaling: Config, max_positions: int) -> Rope:
    original = _original(config, scaling, max_positions)
    if rope.theta <= 1:
        raise ModelError(f"{config.path}: yarn needs a rope_theta above 1, not {rope.theta}.")
    return replace(
        rope,
        factor=_factor_or_ratio(scaling, max_positions / original),
        original_max_positions=original,
        # Null and 0 both mean the paper's values to transformers.
        beta_fast=scaling.optional_number("beta_fast") or 32.0,
        beta_slow=scaling.optional_number("beta_slow") or 1.0,
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        truncate=scaling.flag("truncate", default=True),
        attention_factor=scaling.optional_number("attention_factor"),
    )


def _longrope(rope: Rope, config: Config, scaling: Config, max_positions: int) -> Rope:
    original = _original(config, scaling, max_positions)
    short, long = scaling.numbers("short_factor"), scaling.numbers("long_factor")
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != rope.dim // 2:
            raise ModelError(
                f"{scaling.path}: {name} has {len(factors)} numbers; a head_dim of {rope.dim} takes {rope.dim // 2}."
            )
    return replace(
        rope,
        factor=_factor_or_ratio(scaling, max_positions / original),
        original_max_positions=original,
        attention_factor=scaling.optional_number("attention_factor"),
        short_factor=short,
        long_factor=long,
    )


def _factor_or_ratio(scaling: Config, ratio: float) -> float:
    return ratio if scaling.fields.get("factor") is None else scaling.positive_number("factor")
