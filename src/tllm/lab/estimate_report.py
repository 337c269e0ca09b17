"""A sheet as a report: report.md with every formula, and pictures beside it.

    roofline.png     what the machine allows over FLOP per byte, and where decode and prefill of the model lie
    batch.png        time per token and tokens a second over sequences decoded at once
    chunks.png       time to the first token over the chunks of a prompt, one curve for each kind of link

This file does not know how figures come about; curves are the sheet's own arithmetic at more points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tllm.core.units import format_bits_per_s, format_seconds
from tllm.lab.estimate import Answer, Question, crossover
from tllm.lab.estimate_network import NetworkQuestion
from tllm.lab.pictures import COLOURS, figure
from tllm.lab.sheet import Section, markdown_lines
from tllm.planner.network import Edge, num_hops
from tllm.planner.network import Path as Route
from tllm.planner.pipelines import chunked_prefill_s
from tllm.planner.roofline import StepCost

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_GREY = "#777777"
_CHUNKS = (1, 2, 4, 8, 16, 32, 64)
_INTENSITIES = tuple(2.0**power for power in range(-2, 14))  # FLOP per byte
_RATES_BYTES_PER_S = (12.5e6, 125e6, 1250e6)


def write_report(directory: Path, sections: Sequence[Section], draw: Callable[[Path], tuple[str, ...]]) -> Path:
    """The path of report.md in `directory`, which is made if it has to be. `draw` puts pictures there and names them.
    Raises ConfigError where pictures cannot be drawn; nothing is written then."""
    pictures = draw(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lines = [*markdown_lines(sections[:1], level=1), *markdown_lines(sections[1:])]
    lines += [line for name in pictures for line in (f"![{name.removesuffix('.png')}]({name})", "")]
    path = directory / "report.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def draw_model(question: Question, directory: Path) -> tuple[str, ...]:
    """Names of the pictures: those that the known figures allow."""
    answer = Answer.of(question)
    if not question.knows_arithmetic:
        return ()
    _roofline(answer, directory / "roofline.png")
    _batches(answer, directory / "batch.png")
    if question.num_stages == 1:
        return ("roofline.png", "batch.png")
    _chunks(answer, directory / "chunks.png")
    return ("roofline.png", "batch.png", "chunks.png")


def draw_network(question: NetworkQuestion, directory: Path) -> tuple[str, ...]:
    links = [Edge(latency_s=question.latencies_s[0], bytes_per_s=rate, measured=False) for rate in _RATES_BYTES_PER_S]
    if question.link is not None:
        links = _among(question.link, links)
    counts = [count for count in _CHUNKS if count <= question.prompt]
    num_bytes = question.row_bytes(question.prompt, question.element_bits)
    with figure(
        directory / "chunks.png",
        title=f"First token of {question.prompt:,} tokens, {question.num_stages} stages",
        x_label="chunks of the prompt",
        y_label="seconds",
        x_log=True,
        y_log=True,
    ) as axes:
        for colour, link in zip(COLOURS, links, strict=False):
            edges = [link] * num_hops(question.num_stages, Route.ENDS)
            seconds = [
                chunked_prefill_s(question.stage_s, edges, num_bytes=num_bytes, num_chunks=count) for count in counts
            ]
            axes.plot(counts, seconds, color=colour, marker="o", markersize=4, label=_name(link))
        axes.axhline(question.target_ttft_s, label="target", color=_GREY, linestyle=":")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    return ("chunks.png",)


def _roofline(answer: Answer, path: Path) -> None:
    question = answer.question
    hardware = question.hardware
    knee = hardware.reached_flop_per_s / hardware.reached_bytes_per_s
    xs = sorted((*_INTENSITIES, knee))
    with figure(
        path,
        title=f"{question.shape.name}, {question.held.name}, on {hardware.name}",
        x_label="FLOP for each byte read",
        y_label="TFLOP/s",
        x_log=True,
        y_log=True,
    ) as axes:
        roof = [min(x * hardware.reached_bytes_per_s, hardware.reached_flop_per_s) / 1e12 for x in xs]
        axes.plot(xs, roof, color="#444444", linewidth=1.4, label="what the machine allows")
        steps = [(f"decode, batch {batch}", answer.decode_step(batch)) for batch in (1, 16, 256)]
        steps.append((f"prompt of {question.prompt:,}", question.roofline.prefill(question.prompt)))
        for colour, (name, step) in zip(COLOURS, steps, strict=False):
            flop, num_bytes = _sums(step)
            rate = flop / step.seconds / 1e12
            axes.plot([flop / num_bytes], [rate], "o", markersize=6, color=colour, label=name)


def _sums(step: StepCost) -> tuple[float, float]:
    """FLOP, and bytes from memory."""
    parts = [part for part in step.parts if part.flop]
    return sum(part.flop for part in parts), sum(part.num_bytes for part in parts)


def _batches(answer: Answer, path: Path) -> None:
    question = answer.question
    batches = sorted({*_BATCHES, *question.batches})
    seconds = [answer.tpot_s(batch) for batch in batches]
    with figure(
        path,
        title=f"{question.shape.name}, {question.held.name}, {question.context:,} tokens each, on "
        f"{question.num_nodes} x {question.hardware.name}",
        x_label="sequences decoded at once",
        y_label="ms per token of each sequence",
        x_log=True,
    ) as axes:
        axes.plot(batches, [1e3 * each for each in seconds], color=COLOURS[0], marker="o", markersize=4, label="TPOT")
        axes.set_ylim(bottom=0)
        axes.set_xticks(_BATCHES, [str(batch) for batch in _BATCHES])
        axes.minorticks_off()
        axes.axvline(
            question.num_stages * crossover(question),
            label="bound by arithmetic from here on",
            color=_GREY,
            linestyle=":",
        )
        if question.hardware.memory_bytes is not None and (fits := answer.num_kv_tokens() // question.context):
            axes.axvline(fits, label=f"KV of {fits} fits", color=COLOURS[1], linewidth=1.2, linestyle="-.")


def _chunks(answer: Answer, path: Path) -> None:
    question = answer.question
    links = [replace(question.edge, bytes_per_s=rate) for rate in _RATES_BYTES_PER_S]
    links = _among(question.edge, links)
    with figure(
        path,
        title=f"First token of {question.prompt:,} tokens, {question.shape.name}, {question.num_stages} stages",
        x_label="chunks of the prompt",
        y_label="seconds",
        x_log=True,
        y_log=True,
    ) as axes:
        for colour, link in zip(COLOURS, links, strict=False):
            other = Answer(question=replace(question, link=link), stages=answer.stages)
            counts = other.num_chunks
            seconds = [other.prefill_s(count) for count in counts]
            axes.plot(counts, seconds, color=colour, marker="o", markersize=4, label=_name(link))
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()


def _among(link: Edge, others: Sequence[Edge]) -> list[Edge]:
    """Slowest first; of two alike in rate the first argument."""
    kept = [other for other in others if other.bytes_per_s != link.bytes_per_s]
    return sorted([link, *kept], key=lambda each: each.bytes_per_s)


def _name(link: Edge) -> str:
    """`1 Gb/s, 200 µs`"""
    rate = format_bits_per_s(link.bytes_per_s)
    return f"{rate}, {format_seconds(link.latency_s)}" if link.latency_s else rate
