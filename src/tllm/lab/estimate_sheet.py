"""The sheet of a question: what every figure is called, its unit, and its formula with the numbers put in.

In a formula every number is followed by what it is; `x` multiplies. What several machines add is in
estimate_parallel.py.

This file does not know how a sheet is shown, nor any formula of its own: figures are the planner's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Final

from tllm.core.units import Quantity, Unit
from tllm.lab.estimate import NOT_KNOWN, Answer, Question, crossover
from tllm.lab.estimate_parallel import (
    counted,
    experts_section,
    group_section,
    missing,
    pipeline_section,
    speculation_section,
)
from tllm.lab.sheet import Cell, Line, Section, Table, in_bytes, in_parameters, in_seconds, in_tokens_per_s
from tllm.planner.cost import num_sequences, tokens_of_equal_bytes
from tllm.planner.formats import FORMATS
from tllm.planner.roofline import StepCost
from tllm.planner.shape import Shape

_SIDE_BY_SIDE: Final = ("bf16", "fp8", "int8", "int4", "mxfp4")


def estimate(question: Question) -> tuple[Section, ...]:
    return tuple(_sections(question))


def _sections(question: Question) -> Iterator[Section]:
    answer = Answer.of(question)
    yield model_section(question)
    yield _memory_section(answer)
    yield _decode_section(answer)
    if len(question.batches) > 1:
        yield _batch_section(answer)
    ttft_s = {num: answer.prefill_s(num) for num in answer.num_chunks} if question.knows_arithmetic else {}
    yield _prefill_section(answer, ttft_s)
    if question.num_stages > 1:
        yield pipeline_section(answer, ttft_s)
    if question.num_ranks > 1:
        yield group_section(answer)
    yield _limits_section(question)
    if question.shape.experts:
        yield experts_section(question)
    if question.drafted is not None:
        yield speculation_section(answer, *question.drafted)
    yield _formats_section(answer)


def model_section(question: Question) -> Section:
    """What does not depend on any machine."""
    shape, held = question.shape, question.held
    lines = [
        Line(label="in total", value=in_parameters(shape.num_params), formula=_num_params_text(shape)),
        Line(
            label="read by a step of one token",
            value=in_parameters(shape.step_params()),
            formula=_step_params_text(shape),
        ),
    ]
    if shape.experts:
        lines.append(
            Line(
                label="active, as publishers count",
                value=in_parameters(shape.active_params(embedding=True)),
                formula=f"{shape.step_params():,} read by a step"
                + ("" if shape.tied else f" + {shape.embed_params:,} embedding"),
            )
        )
    lines += [
        Line(
            label="weights", value=in_bytes(shape.weight_bytes(held)), note=held.name, formula=_weights_text(question)
        ),
        Line(
            label="KV per token",
            value=in_bytes(shape.kv_bytes_per_token(question.kv_element_bytes)),
            formula=_kv_text(question),
        ),
        Line(
            label=f"KV of {counted(question.context, 'token')}",
            value=in_bytes(shape.kv_bytes(question.context, question.kv_element_bytes)),
            note="" if not shape.windows else "layers with a window keep no more than it",
        ),
    ]
    return Section(title=_title(question), lines=tuple(lines), notes=question.notes)


def _memory_section(answer: Answer) -> Section:
    question = answer.question
    if question.hardware.memory_bytes is None:
        return Section(title="Memory", notes=(missing(lambda: question.hardware.memory),))
    total = question.num_nodes * question.hardware.memory
    weights = sum(answer.held_bytes(index) for index in range(len(answer.stages)))
    tokens, rows = answer.num_kv_tokens(), max(question.prompt, *question.batches)
    activations = question.shape.activation_bytes(rows, max(question.batches))
    lines = [
        Line(
            label="memory",
            value=in_bytes(total),
            formula=f"{question.num_nodes} machine{'s' * (question.num_nodes > 1)} x {question.hardware.memory:,} B",
        ),
        Line(
            label="weights",
            value=in_bytes(weights),
            note="the first stage and the last each hold the embedding"
            if weights > question.shape.weight_bytes(question.held)
            else "",
            formula=" + ".join(f"{answer.held_bytes(index):,} B" for index in range(len(answer.stages))),
        ),
        Line(
            label="activations",
            value=in_bytes(activations),
            note=f"of {counted(rows, 'row')}, on every machine",
            formula=f"{counted(rows, 'row')} x (4 x {question.shape.hidden_size:,} + 3 x "
            f"{question.shape.intermediate_size:,}) x 2 B"
            f" + {counted(max(question.batches), 'row')} x {question.shape.vocab_size:,} logits x 4 B",
        ),
        _fitting_line(answer),
        Line(
            label=f"sequences of {counted(question.context, 'token')}",
            value=Quantity(num_sequences(tokens, question.context), Unit.COUNT),
            formula=f"floor({tokens:,} tokens / {question.context:,} tokens)",
        ),
    ]
    return Section(title=f"Memory of {_machines(question)}", lines=tuple(lines))


def _fitting_line(answer: Answer) -> Line:
    """Of a pipeline, by the stage that has the least room."""
    question, tokens = answer.question, answer.num_kv_tokens()
    index = min(range(len(answer.stages)), key=answer.stage_kv_tokens)
    copies = question.num_ranks / question.shape.kv_parts(question.num_ranks)
    kv_bytes = question.shape.layer_kv_elements * question.kv_element_bytes * copies
    if tokens:
        note = f"stage {index + 1} has the least room" if len(answer.stages) > 1 else ""
    else:
        note = "the weights do not fit" if _too_large(answer) else "nothing is left beside the weights"
    return Line(
        label="KV tokens that fit",
        value=Quantity(tokens, Unit.TOKENS),
        note=note,
        formula=f"floor({answer.free_bytes(index):,} B free / "
        f"({len(answer.stages[index])} layers x {kv_bytes:,.6g} B))",
    )


def _too_large(answer: Answer) -> bool:
    question = answer.question
    memory = question.num_ranks * question.hardware.memory
    return any(answer.held_bytes(index) > memory for index in range(len(answer.stages)))


def _decode_section(answer: Answer) -> Section:
    question, batch = answer.question, answer.question.batches[0]
    title = f"A decode step: {counted(batch, 'sequence')} with {counted(question.context, 'token')} each"
    if batch > 1 and not question.knows_arithmetic:
        return Section(title=title, notes=(missing(lambda: question.hardware.reached_flop_per_s),))
    step = answer.decode_step(batch)
    lines = [
        Line(
            label="computing",
            value=in_seconds(step.seconds),
            note=f"bound by {step.bound}",
            formula=" + ".join(f"{in_seconds(part.seconds).text()} {part.kind}" for part in step.parts),
        )
    ]
    if question.num_stages > 1:
        lines.append(_hops_line(answer, batch, batch))
    tpot_s = answer.tpot_s(batch)
    lines += [
        Line(label="time per output token (TPOT)", value=in_seconds(tpot_s), note=_in_flight(answer, batch)),
        Line(
            label="tokens per second",
            value=in_tokens_per_s(batch / tpot_s),
            formula=f"{batch} / {in_seconds(tpot_s).text()}",
        ),
    ]
    return Section(title=title, lines=tuple(lines), tables=(_parts_table(question, step),))


def _prefill_section(answer: Answer, by_chunks: Mapping[int, float]) -> Section:
    question = answer.question
    title = f"A prompt of {counted(question.prompt, 'token')}, and an answer of {question.answer:,}"
    if not question.knows_arithmetic:
        return Section(title=title, notes=(missing(lambda: question.hardware.reached_flop_per_s),))
    step = question.roofline.prefill(question.prompt)
    flop = question.shape.prefill_flop(question.prompt)
    ttft_s, tpot_s = min(by_chunks.values()), answer.tpot_s(1)
    lines = [
        Line(
            label="arithmetic",
            value=Quantity(flop, Unit.FLOP),
            formula=f"{question.prompt:,} tokens x {question.shape.forward_flop:,} in matrices + "
            f"{question.shape.attention_flop(question.prompt):,} attention + {question.shape.head_flop:,} head",
        ),
        Line(
            label="computing",
            value=in_seconds(step.seconds),
            note=f"bound by {step.bound}",
            formula=" + ".join(f"{in_seconds(part.seconds).text()} {part.kind}" for part in step.parts),
        ),
    ]
    if question.num_stages > 1:
        lines.append(_hops_line(answer, question.prompt, 1))
    lines += [
        Line(
            label="time to first token (TTFT)",
            value=in_seconds(ttft_s),
            note=f"in overlapping chunks, see below; bound by {answer.prefill_bound()}"
            if question.num_stages > 1
            else "while nothing waits",
        ),
        Line(
            label="the whole answer",
            value=in_seconds(ttft_s + (question.answer - 1) * tpot_s),
            note="one sequence alone",
            formula=f"{in_seconds(ttft_s).text()} + {question.answer - 1:,} tokens x {in_seconds(tpot_s).text()}",
        ),
    ]
    return Section(title=title, lines=tuple(lines), tables=(_parts_table(question, step),))


def _parts_table(question: Question, step: StepCost) -> Table:
    rows = [
        (
            str(part.kind),
            in_bytes(round(part.num_bytes)),
            Quantity(round(part.flop), Unit.FLOP) if part.flop else "",
            in_seconds(part.seconds),
            str(part.bound),
        )
        for part in step.parts
    ]
    memory = Quantity(question.hardware.reached_bytes_per_s, Unit.BYTES_PER_S).text()
    formula = f"time = max(bytes / {memory}"
    if question.knows_arithmetic:
        formula += f", FLOP / {Quantity(question.hardware.reached_flop_per_s, Unit.FLOP_PER_S).text()}"
    ranks = f", on each of {question.num_ranks} ranks" if question.num_ranks > 1 else ""
    columns = ("", "bytes", "arithmetic", "time", "bound by")
    return Table(columns=columns, rows=tuple(rows), formula=f"{formula}), operator by operator{ranks}")


def _hops_line(answer: Answer, num_tokens: int, num_sampled: int) -> Line:
    edge, size = answer.question.edge, answer.hop_bytes(num_tokens)
    rate, latency = Quantity(edge.bytes_per_s, Unit.BYTES_PER_S).text(), in_seconds(edge.latency_s).text()
    return Line(
        label="on the way",
        value=in_seconds(answer.hops_s(num_tokens, num_sampled)),
        note=f"{counted(answer.num_hops, 'hop')} of hidden states, and ids home",
        formula=f"{answer.num_hops} hops x ({latency} + {in_bytes(round(size)).text()} / {rate}) + "
        f"{in_seconds(answer.home_s(num_sampled)).text()} home",
    )


def _in_flight(answer: Answer, batch: int) -> str:
    if answer.question.num_stages == 1:
        return ""
    num_steps, bound = answer.num_steps(batch), f"; bound by {answer.bound(batch)}"
    if num_steps == 1:
        return f"one step in flight: the sum{bound}"
    rows = math.ceil(batch / num_steps)
    if num_steps * answer.slowest_s(rows) > answer.round_s(rows):
        return f"{num_steps} steps in flight: {num_steps} x the slowest stage or link{bound}"
    return f"{num_steps} steps in flight: the round trip of one{bound}"


def _batch_section(answer: Answer) -> Section:
    question = answer.question
    rows: list[tuple[Cell, ...]] = []
    for batch in question.batches:
        fits = _fits(answer, batch)
        kv = in_bytes(batch * question.shape.kv_bytes(question.context, question.kv_element_bytes))
        if batch > 1 and not question.knows_arithmetic:
            rows.append((f"{batch}", NOT_KNOWN, NOT_KNOWN, NOT_KNOWN, "", kv, fits))
            continue
        tpot_s = answer.tpot_s(batch)
        bound = str(answer.bound(batch))
        rows.append(
            (
                f"{batch}",
                in_seconds(tpot_s),
                in_tokens_per_s(1 / tpot_s),
                in_tokens_per_s(batch / tpot_s),
                bound,
                kv,
                fits,
            )
        )
    notes = () if question.knows_arithmetic else (missing(lambda: question.hardware.reached_flop_per_s),)
    return Section(
        title=f"Batches, {counted(question.context, 'token')} each",
        tables=(
            Table(
                columns=("batch", "TPOT", "each", "together", "bound by", "KV", "fits"),
                rows=tuple(rows),
                formula="together = batch / TPOT",
            ),
        ),
        notes=notes,
    )


def _fits(answer: Answer, batch: int) -> str:
    if answer.question.hardware.memory_bytes is None:
        return NOT_KNOWN
    return "yes" if batch * answer.question.context <= answer.num_kv_tokens() else "no"


def _limits_section(question: Question) -> Section:
    shape, held, hardware = question.shape, question.held, question.hardware
    lines = []
    if question.knows_arithmetic:
        lines.append(
            Line(
                label="batch that is bound by arithmetic",
                value=Quantity(crossover(question), Unit.TOKENS),
                note="or more; below, tokens cost one reading of the weights"
                if question.shape.experts is None
                else "or more, in matrices that every token goes through",
                formula=f"{Quantity(hardware.reached_flop_per_s, Unit.FLOP_PER_S).text()} x {held.matrix_bits:g} bits "
                f"/ 8 / (2 x {Quantity(hardware.reached_bytes_per_s, Unit.BYTES_PER_S).text()})",
            )
        )
    per_token, weights = shape.kv_bytes_per_token(question.kv_element_bytes), shape.step_bytes(held)
    lines += [
        Line(
            label="KV takes as long as weights from",
            value=Quantity(tokens_of_equal_bytes(weights, per_token), Unit.TOKENS),
            note="of all sequences together",
            formula=f"floor({weights:,} B / {per_token:,} B)",
        ),
        Line(
            label=f"attention after {counted(question.context, 'token')}",
            value=Quantity(shape.attention_share(question.context), Unit.RATIO),
            note="of the arithmetic of the layers' matrices",
            formula=f"{shape.attention_flop(1, cached=question.context - 1):,} / {shape.forward_flop:,}",
        ),
    ]
    if not shape.windows:
        lines.append(
            Line(
                label="attention computes as much from",
                value=Quantity(round(shape.context_of_equal_flop), Unit.TOKENS),
                formula=f"{shape.forward_flop:,} / ({shape.num_layers} layers x {shape.pair_flop:,})",
            )
        )
    return Section(title="Where one thing outweighs another", lines=tuple(lines))


def _formats_section(answer: Answer) -> Section:
    question = answer.question
    names = dict.fromkeys((question.held.name, *_SIDE_BY_SIDE))
    rows = []
    for name in names:
        held = question.held if name == question.held.name else FORMATS[name]
        other = Answer.of(replace(question, held=held))
        tpot_s = other.tpot_s(1)
        rows.append(
            (
                name,
                f"{held.matrix_bits:.4g}",
                in_bytes(question.shape.weight_bytes(held)),
                in_seconds(tpot_s),
                in_tokens_per_s(1 / tpot_s),
                _room(other),
                Quantity(crossover(other.question), Unit.COUNT) if question.knows_arithmetic else NOT_KNOWN,
            )
        )
    return Section(
        title="The same weights in other formats, one sequence",
        tables=(
            Table(
                columns=("format", "bits a weight", "weights", "TPOT", "rate", "KV that fits", "crossover batch"),
                rows=tuple(rows),
            ),
        ),
    )


def _room(answer: Answer) -> Cell:
    if answer.question.hardware.memory_bytes is None:
        return NOT_KNOWN
    tokens = answer.num_kv_tokens()
    return Quantity(tokens, Unit.TOKENS) if tokens else "none"


def _machines(question: Question) -> str:
    return f"{question.num_nodes} x {question.hardware.name}" if question.num_nodes > 1 else question.hardware.name


def _title(question: Question) -> str:
    return f"{question.shape.name}, {question.held.name}, on {_machines(question)}"


def _runs(num_layers: int, of_layer: Callable[[int], int]) -> str:
    """`3 layers x 100 + 58 layers x 200`"""
    runs = [(value, len(list(run))) for value, run in groupby(range(num_layers), key=of_layer)]
    return " + ".join(f"{count} layers x {value:,}" for value, count in runs)


def _num_params_text(shape: Shape) -> str:
    parts = [f"{shape.embed_params:,} embedding", _runs(shape.num_layers, shape.layer_params)]
    parts += _end_texts(shape, head=not shape.tied)
    return " + ".join(parts) + (" (the head is the embedding)" if shape.tied else "")


def _step_params_text(shape: Shape) -> str:
    parts = [_runs(shape.num_layers, shape.layer_step_params), *_end_texts(shape, head=True)]
    return " + ".join(parts) + " (of the embedding one row)"


def _end_texts(shape: Shape, *, head: bool) -> Iterator[str]:
    if shape.norm_params:
        yield f"{shape.norm_params:,} norm"
    if head:
        yield f"{shape.head_params:,} head"
    if shape.head_bias:
        yield f"{shape.vocab_size:,} bias of the head"


def _weights_text(question: Question) -> str:
    shape, held = question.shape, question.held
    if held.matrix_bits == held.end_bits == held.plain_bits:
        return f"{shape.num_params:,} parameters x {held.matrix_bits:g} bits / 8"
    matrices = sum(shape.matrix_params(layer) for layer in range(shape.num_layers))
    ends = shape.head_params * (1 if shape.tied else 2)
    rest = shape.num_params - matrices - ends
    return (
        f"({matrices:,} in matrices x {held.matrix_bits:g} bits + {ends:,} in embedding and head x "
        f"{held.end_bits:g} bits + {rest:,} others x {held.plain_bits:g} bits) / 8"
    )


def _kv_text(question: Question) -> str:
    shape, element = question.shape, f"{question.kv_element_bytes:g} B"
    if shape.latent:
        kept = f"{shape.latent.latent_size} latent + {shape.latent.rope_size} rotated"
        return f"{shape.num_layers} layers x ({kept}) x {element}"
    return f"2 (k, v) x {shape.num_layers} layers x {shape.num_kv_heads} KV heads x {shape.head_dim} x {element}"
