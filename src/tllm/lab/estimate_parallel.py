"""What several machines, experts and drafts add to a sheet: stages and hops, ranks and all-reduces.

This file does not know how a sheet is shown, nor any formula of its own: figures are the planner's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tllm.core.errors import ConfigError
from tllm.core.units import Quantity, Unit
from tllm.lab.estimate import NOT_KNOWN, Answer, Question
from tllm.lab.sheet import Cell, Line, Section, Table, in_bytes, in_seconds
from tllm.planner.network import all_reduce_bytes, break_even_all_reduce_s, group_bytes
from tllm.planner.pipelines import bubble, saturating_steps, speculative_tpot_s, tokens_per_pass


def counted(count: int, noun: str) -> str:
    """`1 sequence`, `2,048 tokens`"""
    return f"{count:,} {noun}{'s' * (count > 1)}"


def missing(figure: Callable[[], float]) -> str:
    """What the hardware says of a figure that it lacks."""
    try:
        figure()
    except ConfigError as error:
        return str(error)
    raise AssertionError("a figure that is known")


def pipeline_section(answer: Answer, ttft_s: Mapping[int, float]) -> Section:
    """`ttft_s` by chunks of the prompt; empty where it is not known."""
    question, batch = answer.question, answer.question.batches[0]
    num_rows = math.ceil(batch / answer.num_steps(batch)) if question.knows_arithmetic else 1
    num_bytes, round_s, slowest_s = answer.hop_bytes(num_rows), answer.round_s(num_rows), answer.slowest_s(num_rows)
    rate = Quantity(question.edge.bytes_per_s, Unit.BYTES_PER_S).text()
    size = in_bytes(round(num_bytes)).text()
    lines = (
        Line(
            label="a hop of a decode step",
            value=in_seconds(question.edge.message_s(num_bytes)),
            note=f"{size} of {counted(num_rows, 'row')}",
            formula=f"{in_seconds(question.edge.latency_s).text()} + {size} / {rate}",
        ),
        Line(
            label="steps in flight that keep it full",
            value=Quantity(saturating_steps(slowest_s=slowest_s, round_s=round_s), Unit.COUNT),
            note="as long as the slowest stage or link has no pause",
            formula=f"ceil({in_seconds(round_s).text()} round trip / {in_seconds(slowest_s).text()} slowest)",
        ),
    )
    tables = [_stages_table(answer, num_rows)]
    if ttft_s:
        tables.append(_chunks_table(question, ttft_s))
    return Section(
        title=f"A pipeline of {question.num_stages} stages",
        lines=lines,
        tables=tuple(tables),
        notes=_link_notes(question),
    )


def _stages_table(answer: Answer, num_rows: int) -> Table:
    rows: list[tuple[Cell, ...]] = []
    has_memory = answer.question.hardware.memory_bytes is not None
    for index, (layers, cost) in enumerate(zip(answer.stages, answer.decode_stages(num_rows), strict=True)):
        ends = " + embedding" * (index == 0) + " + head" * answer.is_last(index)
        name = f"{index + 1}  layers {layers.start}..{layers.stop - 1}{ends}"
        room = Quantity(answer.stage_kv_tokens(index), Unit.TOKENS) if has_memory else NOT_KNOWN
        rows.append((name, in_bytes(answer.held_bytes(index)), room, in_seconds(cost.seconds), str(cost.bound)))
    return Table(columns=("stage", "weights", "KV that fits", "decode step", "bound by"), rows=tuple(rows))


def _chunks_table(question: Question, ttft_s: Mapping[int, float]) -> Table:
    best = min(ttft_s, key=lambda num: ttft_s[num])
    rows = tuple(
        (
            f"{num}",
            Quantity(math.ceil(question.prompt / num), Unit.TOKENS),
            in_seconds(seconds),
            Quantity(bubble(question.num_stages, num), Unit.RATIO),
            "best" if num == best else "",
        )
        for num, seconds in ttft_s.items()
    )
    stages = f"{question.num_stages} stages - 1"
    return Table(
        columns=("chunks of the prompt", "each", "TTFT", "idle", ""),
        rows=rows,
        formula="TTFT: chunk after chunk through stages and links in a row, each busy with one at a time\n"
        f"idle: ({stages}) / (chunks + {stages}), were links infinitely fast",
    )


def _link_notes(question: Question) -> tuple[str, ...]:
    if question.link is not None:
        return ()
    return ("The link is the data sheet's and has no latency here; --link RATE,LATENCY gives it one.",)


def group_section(answer: Answer) -> Section:
    """Of a decode step of the first batch, or of one row."""
    question = answer.question
    group = question.roofline.group
    assert group is not None
    rows = question.batches[0] if question.knows_arithmetic else 1
    ranks, num_layers, size = question.num_ranks, question.shape.num_layers, answer.hop_bytes(rows)
    rate, latency = Quantity(group.bytes_per_s, Unit.BYTES_PER_S).text(), in_seconds(group.latency_s).text()
    sent = Quantity(round(all_reduce_bytes(size, ranks)), Unit.BYTES)
    break_even_s = break_even_all_reduce_s(
        question.shape.step_bytes(question.held, rows),
        num_ranks=ranks,
        num_layers=num_layers,
        bytes_per_s=question.hardware.reached_bytes_per_s,
    )
    took_s = group.all_reduce_s(size)
    lines = (
        Line(
            label="an all-reduce",
            value=in_seconds(took_s),
            note="two in every layer",
            formula=f"2 x ({ranks} - 1) x {latency} + {sent.text()} / {rate}",
        ),
        Line(
            label="sent by each rank in a step",
            value=in_bytes(round(group_bytes(num_layers, size, ranks))),
            formula=f"{num_layers} layers x 4 x ({ranks} - 1) / {ranks} x {round(size):,} B",
        ),
        Line(
            label="all of a step's all-reduces",
            value=in_seconds(num_layers * group.layer_s(size)),
            formula=f"{num_layers} layers x 2 x {in_seconds(took_s).text()}",
        ),
        Line(
            label="pays while an all-reduce takes",
            value=in_seconds(break_even_s),
            note="or less" + (": it pays" if took_s < break_even_s else ": it does not pay"),
            formula=f"{in_bytes(question.shape.step_bytes(question.held, rows)).text()} x (1 - 1 / {ranks}) / "
            f"(2 x {num_layers} layers x {Quantity(question.hardware.reached_bytes_per_s, Unit.BYTES_PER_S).text()})",
        ),
    )
    return Section(
        title=f"Tensor parallelism over {ranks} ranks, {counted(rows, 'sequence')}",
        lines=lines,
        notes=_link_notes(question),
    )


def experts_section(question: Question) -> Section:
    shape, experts = question.shape, question.shape.experts
    assert experts is not None
    counts = sorted({1, 8, 32, 128, *question.batches})
    rows = tuple(
        (
            f"{count}",
            Quantity(experts.touched(count), Unit.COUNT),
            Quantity(experts.touched(count) / experts.num_experts, Unit.RATIO),
            in_bytes(shape.step_bytes(question.held, count)),
        )
        for count in counts
    )
    share = f"{experts.per_token} / {experts.num_experts}"
    return Section(
        title=f"Experts: {experts.per_token} of {experts.num_experts} for every token",
        tables=(
            Table(
                columns=("tokens in a step", "experts read", "of all", "weights read"),
                rows=rows,
                formula=f"{experts.num_experts} x (1 - (1 - {share}) ^ tokens), where routing is uniform",
            ),
        ),
    )


def speculation_section(answer: Answer, num_drafted: int, acceptance: float) -> Section:
    """Verifying a draft is a step of its tokens and one more."""
    question = answer.question
    title = f"Speculation: {num_drafted} tokens drafted, {acceptance:.0%} of them accepted"
    if not question.knows_arithmetic:
        return Section(title=title, notes=(missing(lambda: question.hardware.reached_flop_per_s),))
    tokens = tokens_per_pass(acceptance, num_drafted)
    rows = num_drafted + 1
    pass_s = question.roofline.prefill(rows, cached=question.context).seconds + answer.hops_s(rows, 1)
    tpot_s = speculative_tpot_s(pass_s, acceptance=acceptance, num_drafted=num_drafted)
    lines = (
        Line(
            label="tokens of one pass",
            value=Quantity(tokens, Unit.TOKENS),
            formula=f"(1 - {acceptance:g} ^ ({num_drafted} + 1)) / (1 - {acceptance:g})",
        ),
        Line(label="a pass", value=in_seconds(pass_s), note=f"of {rows} rows; drafting itself costs nothing here"),
        Line(
            label="TPOT",
            value=in_seconds(tpot_s),
            note=f"instead of {in_seconds(answer.tpot_s(1)).text()}",
            formula=f"{in_seconds(pass_s).text()} / {tokens:.4g} tokens",
        ),
    )
    return Section(title=title, lines=lines)
