"""What the calculator says beside what is then measured. Prints tables for docs/lab/LOG.md.

    speed   decode at several batch sizes and the first token of several prompts, for models in several forms
    links   two one-core stages over emulated links: the first token with the prompt in 1 to 16 chunks, and the tokens
            after it

Measured is a pipeline of real workers (`lab/rig.py`). Predicted is the planner's arithmetic (`planner/predict.py`) from
what is measured of its parts: layers, head and attention of a model of zeros; links by echoes; and what a step costs
beside all that, on a small model. Parts and wholes are measured in turns, decodes before and after the parts because a
shared machine's memory changes its speed within seconds; errors are of medians over the turns, and beside each decode
stands what the memory's bandwidth allows.

Run from the repository's root, on a quiet machine: `python -m scripts.bench_predictions`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tllm.cluster.machine import processors
from tllm.core.config import EMBEDDED_MODEL
from tllm.core.types import DType, Quantization
from tllm.lab.forecast import Overhead
from tllm.lab.models import find_model
from tllm.lab.overhead import measure_overhead
from tllm.lab.rig import LinkShape, Rig, Stage, decode_rate, pipeline
from tllm.lab.system import ChildSystem

MODELS = ("llama-3.2-1b", "qwen3-0.6b", "distilgpt2")
FORMS = ("bfloat16", "int8")
BATCHES = (1, 4, 16)
PROMPTS = (32, 128, 512, 1024, 2048)
MBITS_PER_S = (10.0, 100.0, 1000.0)
DELAYS_S = (0.2e-3, 6.4e-3, 25e-3)
CHUNKS = (1, 2, 4, 8, 16)

CONTEXT = 64  # tokens of the prompts whose answers are timed
NUM_DECODED = 24
LINK_PROMPT = 512

MEDIAN_ASKED, WORST_ASKED = 0.10, 0.20  # of decode
TTFT_ASKED = 0.20
LINKS_ASKED = 0.15
CHOICE_ASKED = 0.05


@dataclass(slots=True, kw_only=True)
class Pair:
    """One figure, predicted and measured in turns."""

    name: str
    predicted: list[float]
    measured: list[float]

    @property
    def error(self) -> float:
        """Of the prediction's median, as a share of that of what was measured."""
        return statistics.median(self.predicted) / statistics.median(self.measured) - 1


def pairs(names: Sequence[str]) -> dict[str, Pair]:
    return {name: Pair(name=name, predicted=[], measured=[]) for name in names}


class Prompts:
    """Token ids that no cache knows, the same in every run."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def of(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(3, 256) for _ in range(num_tokens))


# Speed ----------------------------------------------------------------------------------------------------------------


async def speed_of(
    model: str, form: str, overhead: Overhead, turns: int, reader: ChildSystem
) -> tuple[list[Pair], ...]:
    """Decode at every batch size in tokens/s, and every prompt's first token in seconds. Prints their rows."""
    quantization = Quantization.parse(form) if form.startswith("int") else None
    dtype = DType.BFLOAT16 if quantization is not None else DType(form)
    directory = find_model(model, dtype=DType.BFLOAT16)
    threads = len(processors())
    decode, ttft = pairs([str(batch) for batch in BATCHES]), pairs([str(prompt) for prompt in PROMPTS])
    limits: list[float] = []
    prompts = Prompts()
    async with pipeline(directory, stages=[Stage(num_threads=threads)], dtype=dtype, quantization=quantization) as rig:
        longest = min(max(PROMPTS) + NUM_DECODED, rig.checkpoint.spec.max_positions)
        await rig.serve(max_sequences=max(BATCHES), max_model_len=longest)

        async def decode_once(*, counts: bool) -> None:
            for batch in BATCHES:
                answers = await rig.answers([prompts.of(CONTEXT) for _ in range(batch)], max_tokens=NUM_DECODED)
                if counts:
                    decode[str(batch)].measured.append(decode_rate(answers))

        for turn in range(-1, turns):
            await decode_once(counts=turn >= 0)
            await rig.measure_speeds()
            await decode_once(counts=turn >= 0)
            forecast = rig.forecast(overhead)
            bytes_per_s = reader.bandwidth(threads)
            if turn >= 0:
                for batch in BATCHES:
                    decode[str(batch)].predicted.append(forecast.tokens_per_s(batch, CONTEXT + NUM_DECODED / 2))
            if turn >= 0:
                limits.append(bytes_per_s / rig.model.read_bytes(0, rig.model.num_layers))
            for prompt in PROMPTS:
                if prompt >= longest:
                    continue
                answer = await rig.answer(prompts.of(prompt), max_tokens=1)
                if turn >= 0:
                    ttft[str(prompt)].measured.append(answer.ttft_s)
                    ttft[str(prompt)].predicted.append(forecast.ttft_s(prompt))
    limit = statistics.median(limits)
    for pair in decode.values():
        print_row(f"{model} {form}, decode, batch {pair.name} [tokens/s]", pair, limit=limit * int(pair.name))
    measured = [pair for pair in ttft.values() if pair.measured]
    for pair in measured:
        print_row(f"{model} {form}, first token of {pair.name} [ms]", pair, factor=1e3)
    return list(decode.values()), measured


async def speed(models: Sequence[str], forms: Sequence[str], turns: int) -> list[str]:
    overhead = await measure_overhead([Stage(num_threads=len(processors()))])
    print_overhead(overhead)
    print_head("figure")
    decode: list[Pair] = []
    ttft: list[Pair] = []
    with ChildSystem("memory", find_model(EMBEDDED_MODEL), DType.BFLOAT16, len(processors())) as reader:
        for model in models:
            for form in forms:
                some_decode, some_ttft = await speed_of(model, form, overhead, turns, reader)
                decode += some_decode
                ttft += some_ttft
    return [
        verdict("decode, median error", statistics.median(abs(pair.error) for pair in decode), MEDIAN_ASKED),
        verdict("decode, worst error", max(abs(pair.error) for pair in decode), WORST_ASKED),
        verdict("first token, worst error", max(abs(pair.error) for pair in ttft), TTFT_ASKED),
    ]


# Links ----------------------------------------------------------------------------------------------------------------


async def links(model: str, turns: int) -> list[str]:
    cpus = processors()
    stages = [Stage(num_threads=1, cpus=(cpus[index % len(cpus)],)) for index in range(2)]
    overhead = await measure_overhead(stages)
    print_overhead(overhead)
    print_head("link")
    errors: list[float] = []
    choices: list[float] = []
    async with pipeline(find_model(model, dtype=DType.BFLOAT16), stages=stages, with_links=True) as rig:
        for mbit_per_s in MBITS_PER_S:
            for delay_s in DELAYS_S:
                rig.shape([LinkShape(bytes_per_s=mbit_per_s * 1e6 / 8, delay_s=delay_s)] * 3)
                some, choice = await over(rig, f"{mbit_per_s:g} Mb/s, {delay_s * 1e3:g} ms", overhead, turns)
                errors += [abs(pair.error) for pair in some]
                choices.append(choice)
    return [
        verdict("over links, worst error", max(errors), LINKS_ASKED),
        verdict("over links, median error", statistics.median(errors), LINKS_ASKED),
        verdict("first token with the recommended chunks, beyond the best", max(choices), CHOICE_ASKED),
    ]


async def over(rig: Rig, name: str, overhead: Overhead, turns: int) -> tuple[list[Pair], float]:
    """The pairs, and how much later than with the best number of chunks the first token comes with the recommended."""
    prompts = Prompts()
    ttft, tpot = pairs([str(chunks) for chunks in CHUNKS]), Pair(name="TPOT", predicted=[], measured=[])
    chosen: list[int] = []
    for turn in range(-1, turns):
        await rig.rest()
        await rig.measure_links()
        if turn <= 0:
            await rig.measure_speeds()
        for chunks in CHUNKS:
            chunk = LINK_PROMPT // chunks
            await rig.serve(max_sequences=1, max_model_len=LINK_PROMPT + NUM_DECODED, prefill_chunk=chunk)
            await rig.answer(prompts.of(CONTEXT), max_tokens=2)  # a new stream has yet to find its pace
            answer = await rig.answer(prompts.of(LINK_PROMPT), max_tokens=NUM_DECODED)
            if turn >= 0:
                forecast = rig.forecast(overhead)
                ttft[str(chunks)].measured.append(answer.ttft_s)
                ttft[str(chunks)].predicted.append(forecast.ttft_s(LINK_PROMPT))
                tpot.measured.append(answer.tpot_s)
                tpot.predicted.append(forecast.decode_step_s(1, LINK_PROMPT + NUM_DECODED / 2))
                chosen.append(LINK_PROMPT // forecast.best_chunk(LINK_PROMPT))
    for pair in ttft.values():
        print_row(f"{name}, first token, {pair.name} chunks [ms]", pair, factor=1e3)
    print_row(f"{name}, a token [ms]", tpot, factor=1e3)
    measured_s = {chunks: statistics.median(ttft[str(chunks)].measured) for chunks in CHUNKS}
    chunks = statistics.mode(chosen)
    best = min(measured_s, key=lambda number: measured_s[number])
    beyond = measured_s[chunks] / measured_s[best] - 1
    print(f"| {name}: {chunks} chunks recommended, {best} were fastest | | | {beyond:+.1%} | |", flush=True)
    return [*ttft.values(), tpot], beyond


# Tables ---------------------------------------------------------------------------------------------------------------


def print_overhead(overhead: Overhead) -> None:
    parts = ", ".join(f"{1e3 * s:.2f} ms for {rows}" for rows, s in zip(overhead.rows, overhead.head_s, strict=True))
    more = (
        f"{1e3 * overhead.first_s:.2f} ms more for a first one, {1e3 * overhead.handover_s:.2f} ms at a further stage"
    )
    print(f"beside engines and links a step takes {parts} rows at the head, {more}")


def print_head(first: str) -> None:
    print(f"\n| {first} | predicted | measured (range) | error | limit |\n|---|---|---|---|---|", flush=True)


def print_row(name: str, pair: Pair, *, factor: float = 1.0, limit: float | None = None) -> None:
    values = [factor * each for each in pair.measured]
    measured = f"{statistics.median(values):.3g} ({min(values):.3g} .. {max(values):.3g})"
    predicted = f"{factor * statistics.median(pair.predicted):.3g}"
    possible = "" if limit is None else f"{limit:.3g}"
    print(f"| {name} | {predicted} | {measured} | {pair.error:+.1%} | {possible} |", flush=True)


def verdict(name: str, found: float, asked: float) -> str:
    return f"{name}: {found:.1%}, asked {asked:.0%}: {'met' if found <= asked else 'missed'}"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "links"), action="append", help="default: both")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="presets or directories, for speed")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), help="float32, bfloat16, int8, int4")
    parser.add_argument("--links-model", default="distilgpt2")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    verdicts: list[str] = []
    if "speed" in (arguments.part or ["speed"]):
        verdicts += await speed(arguments.models, arguments.forms, arguments.turns)
    if "links" in (arguments.part or ["links"]):
        verdicts += await links(arguments.links_model, arguments.turns)
    print("\n" + "\n".join(verdicts))


if __name__ == "__main__":
    asyncio.run(main())
