"""What is asked of a server under test, and when: lengths, prompts and arrivals, all drawn from one seed.

Arrivals, lengths and prompts are drawn from separate streams of the seed, one after the other. So a longer run begins
as the shorter one did, another rate asks for the same prompts, and another tokenizer for the same lengths.

    arrivals   gaps from a gamma distribution of mean 1 / rate; burstiness 1 makes them exponential (Poisson arrivals),
               below 1 they come in bursts, above 1 more evenly
    lengths    fixed, uniform, or log-normal and clipped
    prompts    random tokens, or words where the server takes text only: two have no more than a few first tokens in
               common, so that no cache of prefixes answers for the model

This file does not know servers, requests or clocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from tllm.core.errors import ConfigError


def _require_range(low: int, high: int) -> None:
    if not 1 <= low <= high:
        raise ConfigError(
            f"A length from {low} to {high} tokens cannot be drawn. Give at least 1, and the smaller first."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Any length from `low` to `high`, both included; a fixed one where they are equal."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _require_range(self.low, self.high)

    def draw(self, random: Random) -> int:
        return random.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    """Many short lengths and a few long ones: exp of a normal distribution, what is outside set to the bound."""

    median: float
    sigma: float  # of the logarithm
    low: int
    high: int

    def __post_init__(self) -> None:
        _require_range(self.low, self.high)

    def draw(self, random: Random) -> int:
        return min(max(round(random.lognormvariate(math.log(self.median), self.sigma)), self.low), self.high)

    def __str__(self) -> str:
        return f"log-normal, median {self.median:g}, sigma {self.sigma:g}, clipped to {self.low}:{self.high}"


Lengths = Uniform | LogNormal

# A mixture like that of ShareGPT's conversations, not the conversations themselves. Clipped, the means are 158 and 342
# tokens; Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023), figure
# 11, gives 161 and 338 for the data set. The spreads are ours: the set's tails are long on both sides.
SHAREGPT_PROMPT = LogNormal(median=70, sigma=1.4, low=4, high=1024)
SHAREGPT_ANSWER = LogNormal(median=240, sigma=1.0, low=4, high=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Arrivals that do not wait for answers: an open loop."""

    requests_per_s: float  # inf: all at once
    burstiness: float = 1.0  # the shape of the gamma distribution of the gaps

    def __post_init__(self) -> None:
        if not self.requests_per_s > 0:
            raise ConfigError(
                f"The request rate is {self.requests_per_s:g} per second; it must be above 0, or inf for all at once. "
                "For requests that follow on answers give --concurrency instead."
            )
        if not (math.isfinite(self.burstiness) and self.burstiness > 0):
            raise ConfigError(f"The burstiness is {self.burstiness:g}; it must be above 0. 1 is Poisson.")

    def arrivals_s(self, seed: int) -> Iterator[float]:
        """Seconds from the start, rising, without end; 0 for ever at an infinite rate."""
        random = Random(f"arrivals {seed}")
        mean_s = 1 / self.requests_per_s
        at_s = 0.0
        while True:
            at_s += mean_s * random.gammavariate(self.burstiness, 1 / self.burstiness)
            yield at_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a request asks: token ids, or words where the server takes text."""

    ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    """Prompts of token ids from an alphabet that the server's tokenizer has."""

    alphabet: tuple[int, ...]

    def prompt(self, random: Random, num_tokens: int) -> Prompt:
        return Prompt(ids=tuple(random.choices(self.alphabet, k=num_tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Prompts of words, for servers that take text only. How many tokens they make is the server's to say."""

    tokens_per_word: float
    num_extra_tokens: float = 0.0  # that the server adds, such as those of a chat template

    def prompt(self, random: Random, num_tokens: int) -> Prompt:
        num_words = max(1, round((num_tokens - self.num_extra_tokens) / self.tokens_per_word))
        return Prompt(text=" ".join(random.choices(WORDS, k=num_words)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One request of a workload."""

    index: int
    due_s: float | None  # seconds from the start; None in a closed loop, where it follows on an answer
    num_prompt_tokens: int  # exact where the prompt is of ids, else what the words are meant to make
    num_answer_tokens: int  # at most
    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """An endless sequence of requests; the same for the same values."""

    seed: int
    prompt_lengths: Lengths
    answer_lengths: Lengths
    prompts: Ids | Words
    rate: Rate | None = None  # None: a closed loop

    def requests(self) -> Iterator[Planned]:
        lengths, prompts = Random(f"lengths {self.seed}"), Random(f"prompts {self.seed}")
        arrivals = self.rate.arrivals_s(self.seed) if self.rate else None
        index = 0
        while True:
            num_prompt_tokens = self.prompt_lengths.draw(lengths)
            yield Planned(
                index=index,
                due_s=next(arrivals) if arrivals else None,
                num_prompt_tokens=num_prompt_tokens,
                num_answer_tokens=self.answer_lengths.draw(lengths),
                prompt=self.prompts.prompt(prompts, num_prompt_tokens),
            )
            index += 1


def fixed(length: int) -> Uniform:
    return Uniform(low=length, high=length)


def around(middle: int, ratio: float) -> Uniform:
    """From `middle` less that share of it to `middle` and as much more. Raises ConfigError unless 0 <= ratio < 1."""
    if not 0 <= ratio < 1:
        raise ConfigError(f"The range ratio is {ratio:g}; it must be at least 0 and less than 1.")
    return Uniform(low=max(1, math.floor(middle * (1 - ratio))), high=math.ceil(middle * (1 + ratio)))


def parse_lengths(text: str) -> Uniform:
    """`128` or `64:256`. Raises ConfigError."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal()) or text.endswith(":"):
        raise ConfigError(f"{text!r} is not a length in tokens. Write a number such as 128, or a range such as 64:256.")
    return Uniform(low=int(low), high=int(high or low))


def alphabet(ids: Sequence[int]) -> tuple[int, ...]:
    """The different ids of a text, in order: ordinary tokens that a prompt may be made of."""
    return tuple(sorted(set(ids)))


_TEXT = """
about across after air along always animal answer area around autumn back bag bank beautiful bed begin below better
big black board body both boy bridge bring brown busy came car care cat center certain change city clean climb close
coast color common cook cost country cover cry cut dark deep different direct dog double draw dress drive early east
eat egg end enough every eye fact family farm father field find fire fish floor fly food forest forward free friend
fruit game gave give gold grass green group guess hand hard hear heavy high history home hot house idea interest
island join keep kind kitchen lady land large late lead leave letter life line listen long lost low main many mark
matter meet middle mind money moon mother mouth music nation need new nine note number offer often old open order
page pair park party past person piece plain plant point power press price problem push quick quite raise read real
red rest ride river rock round run sail same school sea second seem send serve shape ship short show sign simple
sister sleep small soft some soon south speak spring stand start station step stone store straight strong study
summer sure table talk teach test thick thing thousand through tired together touch train tree try twelve until
valley village voice walk want wash water weather weight wheel whole wife wind winter wonder word world yellow
"""
WORDS = tuple(_TEXT.split())
