"""A loaded engine opened up for measuring: how long each kind of operation takes, and what it reads.

Objects that a decoder calls are replaced, while it is watched, by ones that look at the clock before and after; an
engine that is not watched is the one that everybody runs. This is the only file that reaches into the engine.

    step  = embed + layers x (qkv + attention + o + gate·up + down) + head + sampling + everything between

This file does not know who asks, nor what the machine allows.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from tllm.engines.torch.decoder import Decoder, DecoderWeights
from tllm.engines.torch.engine import TorchEngine
from tllm.engines.torch.linear import Linear, Table

SAMPLING = "sampling"
REST = "Python and the rest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One kind of operation within one step."""

    name: str
    seconds: float
    num_bytes: int  # of weights or KV that it reads; 0: next to nothing


def weights_of(engine: TorchEngine) -> DecoderWeights:
    weights = engine._weights
    assert weights is not None, "the engine is not loaded"
    return weights


def decoder_of(engine: TorchEngine) -> Decoder:
    decoder = engine._decoder
    assert decoder is not None, "the engine is not loaded"
    return decoder


def step_bytes(engine: TorchEngine) -> int:
    """Weights that one step reads, in the form they are held in: all but the embedding, of which it reads rows."""
    weights = weights_of(engine)
    ends = sum(end.num_bytes for end in (weights.norm, weights.head) if end is not None)
    return sum(layer.num_bytes for layer in weights.layers.values()) + ends


class Profile:
    """Seconds by kind of operation, step by step."""

    def __init__(self, num_bytes: dict[str, int]) -> None:
        self._num_bytes = num_bytes
        self._steps: list[dict[str, float]] = []
        self._now: defaultdict[str, float] = defaultdict(float)
        self._head_ended_s = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        self._now = defaultdict(float)
        began_s = time.perf_counter()
        yield
        ended_s = time.perf_counter()
        if "head" in self._now:
            self._now[SAMPLING] = ended_s - self._head_ended_s
        self._now[REST] = ended_s - began_s - sum(self._now.values())
        self._steps.append(dict(self._now))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            result = function(*args, **kwargs)
            ended_s = time.perf_counter()
            self._now[name] += ended_s - began_s
            if name == "head":
                self._head_ended_s = ended_s
            return result

        return wrapped

    def parts(self) -> list[Part]:
        """In the order of a step; of each kind the median over the steps."""
        assert self._steps, "no step was watched"
        return [
            Part(
                name=name,
                seconds=statistics.median(step[name] for step in self._steps),
                num_bytes=self._num_bytes.get(name, 0),
            )
            for name in sorted(self._steps[0], key=lambda name: [*self._num_bytes, SAMPLING, REST].index(name))
        ]


@contextmanager
def profiled(engine: TorchEngine, context: int) -> Iterator[Profile]:
    """The engine's steps leave their seconds in the profile. `context` is what bytes of KV are counted for."""
    decoder, weights = decoder_of(engine), weights_of(engine)
    layers = list(weights.layers.values())
    spec, shard = decoder._spec, engine._shard
    profile = Profile(
        {
            "embed": 0,
            "qkv": sum(layer.qkv.num_bytes for layer in layers),
            "attention": spec.kv_bytes_per_position(len(shard.layers), engine._config.dtype) * context,
            "o": sum(layer.o.num_bytes for layer in layers),
            "gate·up": sum(layer.up.num_bytes for layer in layers),
            "down": sum(layer.down.num_bytes for layer in layers),
            "head": 0 if weights.head is None else weights.head.num_bytes,
        }
    )
    watched = replace(
        weights,
        embed=None if weights.embed is None else cast(Table, _Watched(weights.embed, "embed", profile)),
        layers={
            number: replace(
                layer,
                qkv=_linear(layer.qkv, "qkv", profile),
                o=_linear(layer.o, "o", profile),
                up=_linear(layer.up, "gate·up", profile),
                down=_linear(layer.down, "down", profile),
            )
            for number, layer in weights.layers.items()
        },
        head=None if weights.head is None else _linear(weights.head, "head", profile),
    )
    before = decoder._attention
    decoder._weights, decoder._attention = watched, cast(Any, _WatchedAttention(before, profile))
    try:
        yield profile
    finally:
        decoder._weights, decoder._attention = weights, before


@contextmanager
def kept_logits(engine: TorchEngine) -> Iterator[list[Tensor]]:
    """Logits that the engine computes, (R, V) in fp32 each, in the order in which it does."""
    decoder = decoder_of(engine)
    kept: list[Tensor] = []
    compute = decoder.logits

    def logits(x_RM: Tensor) -> Tensor:
        kept.append(compute(x_RM).clone())
        return kept[-1].clone()  # whoever samples may write to it

    decoder.logits = logits  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        del decoder.logits


def _linear(linear: Linear, name: str, profile: Profile) -> Linear:
    return cast(Linear, _Watched(linear, name, profile))


class _Watched:
    """Whatever is called of it is timed under one name."""

    def __init__(self, inner: Any, name: str, profile: Profile) -> None:
        self._inner = inner
        self._call = profile.timed(name, inner) if callable(inner) else None
        self._timed = {
            method: profile.timed(name, getattr(inner, method))
            for method in ("add", "activated", "gated", "logits", "rows")
            if hasattr(inner, method)
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._call is not None
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._timed[name] if name in self._timed else getattr(self._inner, name)


class _WatchedAttention:
    def __init__(self, inner: Any, profile: Profile) -> None:
        self._inner = inner
        self._profile = profile

    def step(self, *args: Any) -> Any:
        timed_step = self._profile.timed("attention", self._inner.step)
        return self._profile.timed("attention", timed_step(*args))
