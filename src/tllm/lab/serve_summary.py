"""What a server did under load, concluded from every request's times. Pure: outcomes in, figures out.

    due ───────── sent ───────── first token ── ... ── last token
     ├────────────── TTFT ────────────┤                      │      queueing included, on both sides
     ├───────────────────────── E2E ─────────────────────────┤
                                      ├──── (n - 1) TPOT ────┤      ITL: each gap in it

Rules:
    Times count from when a request was due: in an open loop from its scheduled arrival, however late it was sent, for
    a client that waits hides what its users would have waited (coordinated omission); in a closed loop from when the
    answer before it had ended. How late the client itself was is said.
    Latencies are of requests that were answered in full; throughput is of their tokens over the whole duration.
    Tokens are what the server counts: usage, else ids in frames. Where it counts nothing, frames are counted, and that
    is said.
    A gap between tokens is known only where every frame brings one, or says how many. Else gaps are between frames.

This file does not know HTTP, clocks or how anything is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from tllm.core.errors import ConfigError
from tllm.core.units import parse_seconds
from tllm.lab import statistics
from tllm.lab.client import FailureKind, Reply
from tllm.lab.workload import Planned

DEFAULT_PERCENTILES = (95.0, 99.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request: when it was due, when the client took it up, and what became of it. Seconds of one clock."""

    planned: Planned
    due_s: float
    begun_s: float  # later than `due_s` only by the client's own lateness
    reply: Reply

    @property
    def is_complete(self) -> bool:
        return self.reply.failure is None

    @property
    def ttft_s(self) -> float:
        return self.reply.frames[0].at_s - self.due_s

    @property
    def e2e_s(self) -> float:
        """To the last token."""
        return self.reply.frames[-1].at_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """None where one token or one frame is all there was."""
        first, last = self.reply.frames[0], self.reply.frames[-1]
        return (last.at_s - first.at_s) / (self.num_tokens - 1) if last is not first and self.num_tokens > 1 else None

    @property
    def num_tokens(self) -> int:
        if self.reply.usage is not None:
            return self.reply.usage.num_answer_tokens
        return sum(1 if frame.num_tokens is None else frame.num_tokens for frame in self.reply.frames)

    @property
    def num_prompt_tokens(self) -> int:
        """By usage, else as planned: exact for prompts of ids, about right for words."""
        return self.planned.num_prompt_tokens if self.reply.usage is None else self.reply.usage.num_prompt_tokens

    def frame_gaps_s(self) -> Iterator[float]:
        frames = self.reply.frames
        return (after.at_s - before.at_s for before, after in pairwise(frames))

    def token_gaps_s(self) -> Iterator[float] | None:
        """A frame's gap shared by its tokens; None where it is not known how many tokens frames had."""
        frames = self.reply.frames
        if self.is_a_token_a_frame:
            return self.frame_gaps_s()
        if any(frame.num_tokens is None for frame in frames):
            return None
        return (
            gap_s / (frame.num_tokens or 1)
            for gap_s, frame in zip(self.frame_gaps_s(), frames[1:], strict=True)
            for _ in range(frame.num_tokens or 1)
        )

    @property
    def is_a_token_a_frame(self) -> bool:
        """By the frames' own counts, or because there are as many of them as tokens."""
        if all(frame.num_tokens == 1 for frame in self.reply.frames):
            return True
        return self.reply.usage is not None and self.num_tokens == len(self.reply.frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    mean: float
    median: float
    percentiles: tuple[tuple[float, float], ...]  # percent and value


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One row of the table. `name` is for people, `key` for records."""

    name: str
    key: str
    values_s: tuple[float, ...]
    over: Distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureCount:
    kind: FailureKind
    num: int
    example: str


class Measure(StrEnum):
    """What a limit can be put on."""

    TTFT = "ttft"
    TPOT = "tpot"
    E2E = "e2e"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    measure: Measure
    at_most_s: float

    def is_met(self, outcome: Outcome) -> bool:
        """An answer of one token meets any limit on the time between tokens."""
        match self.measure:
            case Measure.TTFT:
                return outcome.ttft_s <= self.at_most_s
            case Measure.TPOT:
                return (outcome.tpot_s or 0.0) <= self.at_most_s
            case Measure.E2E:
                return outcome.e2e_s <= self.at_most_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Requests that met every limit. One that failed met none."""

    limits: tuple[Limit, ...]
    num_good: int
    share: float
    requests_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    num_requests: int
    num_completed: int
    failures: tuple[FailureCount, ...]
    duration_s: float
    peak_concurrency: int
    num_prompt_tokens: int
    num_answer_tokens: int
    num_cached_tokens: int
    requests_per_s: float
    answer_tokens_per_s: float
    total_tokens_per_s: float
    latencies: tuple[Latency, ...]
    goodput: Goodput | None
    # In an open loop: how late the client took requests up, and how long it then kept them, below its cap on
    # concurrency or until they were connected.
    lateness: Distribution | None
    client_queue: Distribution | None
    notes: tuple[str, ...]

    def latency(self, key: str) -> Latency | None:
        return next((each for each in self.latencies if each.key == key), None)

    def metrics(self) -> Mapping[str, float]:
        """Every figure under a name that carries its unit."""
        made: dict[str, float] = {
            "num_requests": self.num_requests,
            "num_completed": self.num_completed,
            "duration_s": self.duration_s,
            "peak_concurrency": self.peak_concurrency,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_answer_tokens": self.num_answer_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "requests_per_s": self.requests_per_s,
            "answer_tokens_per_s": self.answer_tokens_per_s,
            "total_tokens_per_s": self.total_tokens_per_s,
            **{f"num_failed_{each.kind}": each.num for each in self.failures},
        }
        for latency in self.latencies:
            made |= _named(latency.key, latency.over)
        if self.lateness is not None:
            made |= _named("lateness", self.lateness)
        if self.client_queue is not None:
            made |= _named("client_queue", self.client_queue)
        if self.goodput is not None:
            made |= {"goodput_requests_per_s": self.goodput.requests_per_s, "goodput_share": self.goodput.share}
        return made


def parse_limits(text: str) -> tuple[Limit, ...]:
    """`ttft:200ms tpot:50ms e2e:2s`, any of them. Raises ConfigError."""
    limits = []
    for part in text.replace(",", " ").split():
        name, _, value = part.partition(":")
        if name not in list(Measure) or not value:
            allowed = ", ".join(f"{measure}:TIME" for measure in Measure)
            raise ConfigError(f"{part!r} is not a limit. Write any of {allowed}, such as ttft:200ms.")
        limits.append(Limit(measure=Measure(name), at_most_s=parse_seconds(value)))
    if len({limit.measure for limit in limits}) < len(limits):
        raise ConfigError(f"{text!r} has two limits on the same measure. Write each at most once.")
    return tuple(limits)


def summarise(
    outcomes: Sequence[Outcome],
    *,
    duration_s: float,
    is_open_loop: bool = False,
    percentiles: Sequence[float] = DEFAULT_PERCENTILES,
    limits: Sequence[Limit] = (),
) -> Summary:
    """`duration_s` is from the start to the end of the last request."""
    done = [outcome for outcome in outcomes if outcome.is_complete]
    num_prompt_tokens = sum(outcome.num_prompt_tokens for outcome in done)
    num_answer_tokens = sum(outcome.num_tokens for outcome in done)
    num_good = sum(all(limit.is_met(outcome) for limit in limits) for outcome in done)
    return Summary(
        num_requests=len(outcomes),
        num_completed=len(done),
        failures=_failures(outcomes),
        duration_s=duration_s,
        peak_concurrency=peak_concurrency(outcomes),
        num_prompt_tokens=num_prompt_tokens,
        num_answer_tokens=num_answer_tokens,
        num_cached_tokens=sum(outcome.reply.usage.num_cached_tokens for outcome in done if outcome.reply.usage),
        requests_per_s=len(done) / duration_s,
        answer_tokens_per_s=num_answer_tokens / duration_s,
        total_tokens_per_s=(num_prompt_tokens + num_answer_tokens) / duration_s,
        latencies=tuple(_latencies(done, percentiles)),
        goodput=Goodput(
            limits=tuple(limits),
            num_good=num_good,
            share=num_good / len(outcomes) if outcomes else 0.0,
            requests_per_s=num_good / duration_s,
        )
        if limits
        else None,
        lateness=_over([outcome.begun_s - outcome.due_s for outcome in outcomes], percentiles)
        if is_open_loop and outcomes
        else None,
        client_queue=_over([outcome.reply.sent_s - outcome.begun_s for outcome in outcomes], percentiles)
        if is_open_loop and outcomes
        else None,
        notes=tuple(_notes(done)),
    )


def peak_concurrency(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were with the server at the same time."""
    changes = sorted(
        change for outcome in outcomes for change in ((outcome.reply.sent_s, 1), (outcome.reply.ended_s, -1))
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _latencies(done: Sequence[Outcome], percentiles: Sequence[float]) -> Iterator[Latency]:
    if not done:
        return
    rows: list[tuple[str, str, list[float]]] = [
        ("TTFT", "ttft", [outcome.ttft_s for outcome in done]),
        ("TPOT", "tpot", [tpot_s for outcome in done if (tpot_s := outcome.tpot_s) is not None]),
    ]
    by_token = [outcome.token_gaps_s() for outcome in done]
    if all(outcome.is_a_token_a_frame for outcome in done):
        rows.append(("ITL", "itl", [gap_s for outcome in done for gap_s in outcome.frame_gaps_s()]))
    else:
        rows.append(("ITL per frame", "itl_frame", [gap_s for outcome in done for gap_s in outcome.frame_gaps_s()]))
        if None not in by_token:
            rows.append(("ITL per token", "itl", [gap_s for gaps_s in by_token if gaps_s for gap_s in gaps_s]))
    rows.append(("E2E", "e2e", [outcome.e2e_s for outcome in done]))
    for name, key, values_s in rows:
        if values_s:
            yield Latency(name=name, key=key, values_s=tuple(values_s), over=_over(values_s, percentiles))


def _over(values: Sequence[float], percentiles: Sequence[float]) -> Distribution:
    return Distribution(
        mean=sum(values) / len(values),
        median=statistics.median(values),
        percentiles=tuple((percent, statistics.percentile(values, percent)) for percent in percentiles),
    )


def _failures(outcomes: Sequence[Outcome]) -> tuple[FailureCount, ...]:
    """The most frequent first, each with what was said the first time."""
    failures = [outcome.reply.failure for outcome in outcomes if outcome.reply.failure is not None]
    examples = {failure.kind: failure.message for failure in reversed(failures)}
    counted = Counter(failure.kind for failure in failures).most_common()
    return tuple(FailureCount(kind=kind, num=num, example=examples[kind]) for kind, num in counted)


def _notes(done: Sequence[Outcome]) -> Iterator[str]:
    """What a reader has to know to read the figures right."""
    uncounted = [outcome for outcome in done if outcome.reply.usage is None]
    if unknown := sum(any(frame.num_tokens is None for frame in outcome.reply.frames) for outcome in uncounted):
        yield f"Tokens of {unknown} answers are counted as frames: the server sent neither usage nor token ids."
    if uncounted and len(uncounted) > unknown:
        yield f"Tokens of {len(uncounted) - unknown} answers are counted by their ids: the server sent no usage."
    if guessed := sum(bool(outcome.planned.prompt.text) for outcome in uncounted):
        yield f"Lengths of {guessed} prompts are a guess of one token a word: the server sent no usage."
    coalesced = [outcome for outcome in done if not outcome.is_a_token_a_frame and outcome.reply.usage is not None]
    if coalesced:
        frames = sum(len(outcome.reply.frames) for outcome in coalesced)
        tokens = sum(outcome.num_tokens for outcome in coalesced)
        yield (
            f"{len(coalesced)} answers came in other pieces than tokens: {frames} frames for {tokens} tokens. "
            "ITL per frame is what a reader sees; TPOT counts tokens."
        )
    if short := sum(outcome.num_tokens < outcome.planned.num_answer_tokens for outcome in done):
        yield f"{short} answers ended before the length that was asked for; --ignore-eos keeps them going."
    prompts = [outcome for outcome in done if outcome.reply.usage is not None]
    if off := [o for o in prompts if o.num_prompt_tokens != o.planned.num_prompt_tokens]:
        asked, got = sum(o.planned.num_prompt_tokens for o in off), sum(o.num_prompt_tokens for o in off)
        yield f"{len(off)} prompts had another length than planned: {got} tokens in all, planned were {asked}."
    if cached := sum(o.reply.usage.num_cached_tokens for o in prompts if o.reply.usage):
        yield f"The server took {cached} prompt tokens from its cache of prefixes."


def _named(key: str, over: Distribution) -> dict[str, float]:
    return {
        f"{key}_mean_s": over.mean,
        f"{key}_median_s": over.median,
        **{f"{key}_p{percent:g}_s": value for percent, value in over.percentiles},
    }
