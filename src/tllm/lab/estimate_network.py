"""Which links a pipeline needs for a token and a first token in given times: a question in, a sheet of figures out.

Both rate and latency count. A hop has its share of the time that is left for the network; latency is taken off first,
and the bytes must arrive in what remains. Where nothing remains no rate is enough.

This file does not know where the figures come from, nor any formula: those are the planner's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tllm.core.errors import ConfigError
from tllm.core.units import Quantity, Unit, format_bits_per_s, format_seconds
from tllm.lab.sheet import Cell, Line, Section, Table, in_bytes, in_seconds
from tllm.planner.formats import grouped_bits
from tllm.planner.network import Edge, Path, hidden_bytes, num_hops, required_bytes_per_s
from tllm.planner.pipelines import (
    chunked_prefill_s,
    codec_share,
    least_codec_bytes_per_s,
    prefill_bytes_per_s,
)

IMPOSSIBLE = "impossible"
_INT8_BITS: Final = grouped_bits(8, 32, scale_bits=16)
_ROUTES: Final = (
    "ends: the first stage embeds, the last one samples; only ids leave and come home",
    "ring: the head embeds and projects, one hop more at either end",
    "star: every stage answers to the head, which sends on what it got",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkQuestion:
    """A pipeline of equal stages, what it is to reach, and how much of that its stages compute."""

    num_stages: int
    hidden_size: int
    element_bits: float = 16
    batch: int = 1  # rows of a decode step
    prompt: int = 1000
    target_tpot_s: float = 0.05
    target_ttft_s: float = 3.0
    tpot_compute_share: float = 0.8
    ttft_compute_share: float = 0.8
    latencies_s: tuple[float, ...] = (0.0, 0.2e-3, 0.5e-3, 1e-3)  # of a hop, ascending
    chunks: tuple[int, ...] = (1, 4, 16, 32)
    num_given_hops: int | None = None  # counted by somebody else, shown beside the three ways
    link: Edge | None = None  # what there is

    def __post_init__(self) -> None:
        if self.num_stages < 2:
            raise ConfigError(f"--pp is {self.num_stages}; a network needs at least 2 stages.")
        for flag, size in (("--hidden", self.hidden_size), ("--batch", self.batch), ("--prompt", self.prompt)):
            if size < 1:
                raise ConfigError(f"{flag} is {size}; it must be at least 1.")
        for flag, seconds in (("--target-tpot", self.target_tpot_s), ("--target-ttft", self.target_ttft_s)):
            if seconds <= 0:
                raise ConfigError(f"{flag} must be above 0.")
        for flag, share in (
            ("--compute-share", self.tpot_compute_share),
            ("--ttft-compute-share", self.ttft_compute_share),
        ):
            if not 0 <= share < 1:
                raise ConfigError(
                    f"{flag} is {share:g}; it must be at least 0 and less than 1: the rest is the network's."
                )
        if self.element_bits not in (16, 32):
            raise ConfigError(f"--bits is {self.element_bits:g}; hidden states that are not compressed have 16 or 32.")
        if self.num_given_hops is not None and self.num_given_hops < 1:
            raise ConfigError(f"--hops is {self.num_given_hops}; it must be at least 1.")
        if max(self.chunks) > self.prompt:
            raise ConfigError(f"A prompt of {self.prompt} tokens cannot be cut into {max(self.chunks)} chunks.")

    @property
    def tpot_network_s(self) -> float:
        return self.target_tpot_s * (1 - self.tpot_compute_share)

    @property
    def prefill_s(self) -> float:
        """That all stages together compute for the prompt."""
        return self.target_ttft_s * self.ttft_compute_share

    @property
    def stage_s(self) -> tuple[float, ...]:
        return (self.prefill_s / self.num_stages,) * self.num_stages

    def row_bytes(self, num_rows: int, bits: float) -> float:
        return hidden_bytes(num_rows, self.hidden_size, bits_per_element=bits)

    @property
    def routes(self) -> tuple[tuple[str, int], ...]:
        """Short names of ways that hidden states take, and their hops."""
        named = [(path.value, num_hops(self.num_stages, path)) for path in Path]
        return (*named, *([("as given", self.num_given_hops)] if self.num_given_hops else []))

    @property
    def codecs(self) -> tuple[tuple[str, float], ...]:
        return (("", self.element_bits), (", int8", _INT8_BITS))


def network_sections(question: NetworkQuestion) -> tuple[Section, ...]:
    return tuple(_sections(question))


def _sections(question: NetworkQuestion) -> Iterator[Section]:
    yield _token(question)
    yield _first_token(question)
    if question.link is not None:
        yield _on_link(question, question.link)


def _token(question: NetworkQuestion) -> Section:
    plain = question.row_bytes(question.batch, question.element_bits)
    packed = question.row_bytes(question.batch, _INT8_BITS)
    lines = (
        Line(
            label="left for the network",
            value=in_seconds(question.tpot_network_s),
            note="of each token, all hops together",
            formula=f"{format_seconds(question.target_tpot_s)} x (1 - {question.tpot_compute_share:.4g} computing)",
        ),
        Line(
            label="hidden states on a hop",
            value=in_bytes(plain),
            formula=f"{_count(question.batch, 'row')} x {question.hidden_size:,} x {question.element_bits:g} bits / 8",
        ),
        Line(
            label="the same as int8",
            value=in_bytes(packed),
            note=f"{plain / packed:.2f} times smaller; 32 share a scale of 16 bits",
            formula=f"{_count(question.batch, 'row')} x {question.hidden_size:,} x {_INT8_BITS:g} bits / 8",
        ),
    )
    rows = []
    for name, hops in question.routes:
        for codec, bits in question.codecs:
            num_bytes, budget_s = question.row_bytes(question.batch, bits), question.tpot_network_s / hops
            rates = [required_bytes_per_s(num_bytes, budget_s, latency_s=each) for each in question.latencies_s]
            rows.append((f"{name}{codec}", f"{hops}", in_seconds(budget_s), *map(_required, rates)))
    table = Table(
        columns=("rate that a hop needs", "hops", "time", *_latency_names(question)),
        rows=tuple(rows),
        formula="hidden states on a hop / (left for the network / hops - latency)",
    )
    return Section(
        title=f"A token every {format_seconds(question.target_tpot_s)} from {question.num_stages} stages, "
        f"hidden size {question.hidden_size:,}",
        lines=lines,
        tables=(table,),
        notes=_ROUTES,
    )


def _first_token(question: NetworkQuestion) -> Section:
    plain = question.row_bytes(question.prompt, question.element_bits)
    lines = (
        Line(
            label="computing, all stages",
            value=in_seconds(question.prefill_s),
            formula=f"{format_seconds(question.target_ttft_s)} x {question.ttft_compute_share:.4g} computing",
        ),
        Line(
            label="hidden states on a hop",
            value=in_bytes(plain),
            formula=f"{question.prompt:,} tokens x {question.hidden_size:,} x {question.element_bits:g} bits / 8",
        ),
    )
    tables = []
    for latency_s in sorted({question.latencies_s[0], question.latencies_s[-1]}):
        rows = []
        for name, hops in question.routes:
            for codec, bits in question.codecs:
                rates = [
                    prefill_bytes_per_s(
                        question.stage_s,
                        num_bytes=question.row_bytes(question.prompt, bits),
                        num_hops=hops,
                        num_chunks=chunks,
                        target_s=question.target_ttft_s,
                        latency_s=latency_s,
                    )
                    for chunks in question.chunks
                ]
                rows.append((f"{name}{codec}", f"{hops}", *map(_required, rates)))
        tables.append(
            Table(
                columns=(
                    f"rate with a latency of {_short_seconds(latency_s)}",
                    "hops",
                    *map(_chunks, question.chunks),
                ),
                rows=tuple(rows),
                formula="the least rate at which (computing + hops x X) / chunks + (chunks - 1) / chunks x "
                "max(computing / stages, X) + hops x latency is no more than the target, X = hidden states / rate",
            )
        )
    return Section(
        title=f"The first token of a prompt of {question.prompt:,} within {format_seconds(question.target_ttft_s)}",
        lines=lines,
        tables=tuple(tables),
        notes=("With one chunk a stage waits until the one before has all of the prompt; chunks overlap.",),
    )


def _on_link(question: NetworkQuestion, link: Edge) -> Section:
    compute_s = question.target_tpot_s * question.tpot_compute_share
    rows: list[tuple[Cell, ...]] = []
    for name, hops in question.routes:
        for codec, bits in question.codecs:
            hop_s = link.message_s(question.row_bytes(question.batch, bits))
            num_bytes, edges = question.row_bytes(question.prompt, bits), [link] * hops
            seconds = [
                chunked_prefill_s(question.stage_s, edges, num_bytes=num_bytes, num_chunks=num)
                for num in question.chunks
            ]
            tpot_s = compute_s + hops * hop_s
            rows.append(
                (
                    f"{name}{codec}",
                    in_seconds(hop_s),
                    in_seconds(tpot_s),
                    _met(tpot_s, question.target_tpot_s),
                    *map(in_seconds, seconds),
                    _met(min(seconds), question.target_ttft_s),
                )
            )
    plain = question.row_bytes(question.batch, question.element_bits)
    ratio = question.element_bits / _INT8_BITS
    lines = (
        Line(
            label="int8 saves of a decode hop",
            value=Quantity(codec_share(link, plain, ratio), Unit.RATIO),
            note="it makes fewer bytes; latency stays",
            formula=f"1 - {in_seconds(link.message_s(plain / ratio)).text()} / "
            f"{in_seconds(link.message_s(plain)).text()}",
        ),
        Line(
            label="a codec must encode and decode",
            value=Quantity(least_codec_bytes_per_s(link.bytes_per_s, ratio), Unit.BYTES_PER_S),
            note="or more, to pay on this link",
            formula=f"{Quantity(link.bytes_per_s, Unit.BYTES_PER_S).text()} / (1 - 1 / {ratio:.4g})",
        ),
    )
    return Section(
        title=f"On links of {format_bits_per_s(link.bytes_per_s)} with {_short_seconds(link.latency_s)} each way",
        lines=lines,
        tables=(
            Table(
                columns=(
                    "",
                    "a hop",
                    "a token",
                    f"in {format_seconds(question.target_tpot_s)}",
                    *(f"{'first token, ' * (index == 0)}{_chunks(num)}" for index, num in enumerate(question.chunks)),
                    f"in {format_seconds(question.target_ttft_s)}",
                ),
                rows=tuple(rows),
                formula="a token: computing + hops x (latency + bytes / rate)",
            ),
        ),
    )


def _latency_names(question: NetworkQuestion) -> Iterator[str]:
    for index, latency_s in enumerate(question.latencies_s):
        yield f"{'latency ' * (index == 0)}{_short_seconds(latency_s)}"


def _short_seconds(seconds: float) -> str:
    return "0" if seconds == 0 else format_seconds(seconds)


def _required(bytes_per_s: float | None) -> Cell:
    return IMPOSSIBLE if bytes_per_s is None else Quantity(bytes_per_s, Unit.BYTES_PER_S).as_bits()


def _chunks(count: int) -> str:
    return _count(count, "chunk")


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count > 1)}"


def _met(seconds: float, target_s: float) -> str:
    return "yes" if seconds <= target_s else "no"
