"""The sheet of `tllm estimate`: every explanation gives the figure it explains, and figures agree with each other."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.core.errors import ConfigError
from tllm.core.units import Quantity, Unit
from tllm.lab import sheet
from tllm.lab.estimate import Answer, Question
from tllm.lab.estimate_network import IMPOSSIBLE, NetworkQuestion, network_sections
from tllm.lab.estimate_sheet import estimate
from tllm.lab.sheet import Line, Section, Table
from tllm.planner.formats import FORMATS
from tllm.planner.hardware import PRESETS, Hardware
from tllm.planner.network import Edge
from tllm.planner.presets import SHAPES
from tllm.planner.roofline import Bound

FAST = Edge(latency_s=20e-6, bytes_per_s=12.5e9, measured=False)
SLOW = Edge(latency_s=0.5e-3, bytes_per_s=12.5e6, measured=False)


def question(name: str = "llama-3.1-8b", hardware: str = "a100-80gb", held: str = "bf16", **more: object) -> Question:
    plain = Question(
        shape=SHAPES[name],
        held=FORMATS[held],
        kv_element_bytes=2.0,
        activation_bytes=2.0,
        hardware=PRESETS[hardware],
    )
    return replace(plain, **more)  # type: ignore[arg-type]


NETWORK = NetworkQuestion(num_stages=8, hidden_size=8192, ttft_compute_share=2 / 3, num_given_hops=8, link=SLOW)
QUESTIONS = {
    "one machine": question(),
    "without arithmetic": question(hardware="m4", batches=(1, 16)),
    "a batch, quantized": question(held="int4", batches=(8, 64), context=500),
    "a pipeline": question("llama-3-70b", num_stages=4, link=SLOW, batches=(1, 9), prompt=1000),
    "a group": question("llama-3-70b", num_ranks=4, link=FAST, drafted=(3, 0.55)),
    "a pipeline of groups": question("llama-3-70b", num_stages=2, num_ranks=16, link=FAST, batches=(32,)),
    "experts": question("qwen3-30b-a3b", "h100", "mxfp4", batches=(1, 4)),
    "latent KV and a few dense layers": question("deepseek-v3", "h200", "fp8", num_stages=8, link=FAST),
    "learned positions, biases, tied": question("distilgpt2", "a100-40gb", "fp32", prompt=13, context=22),
    "the article's": question("kipply-52b", "a100-40gb", num_stages=4),
}


@cache
def sheet_of(name: str) -> tuple[Section, ...]:
    return estimate(QUESTIONS[name])


_SCALES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
_UNITS |= {scale + unit: factor for scale, factor in _SCALES.items() for unit in ("B", "B/s", "b/s", "FLOP", "FLOP/s")}
_NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?: ((?:[kMGTP]?(?:B/s|b/s|B|FLOP/s|FLOP)|ms|µs|s)\b))?")


def computed(formula: str) -> float:
    """The value of an explanation: numbers scaled by their units, words left out."""

    def number(match: re.Match[str]) -> str:
        return repr(float(match[1].replace(",", "")) * _UNITS[match[2] or "B"])

    without_remarks = re.sub(r"\([^()\d]*\)", "", formula)
    text = _NUMBER.sub(number, without_remarks)
    operators = {"x": "*", "floor": "floor", "ceil": "ceil"}
    text = re.sub(r"(?<![\d.])[^\W\d][\w-]*", lambda word: operators.get(word[0], ""), text).replace("^", "**")
    assert re.fullmatch(r"[\d.e+\-*/() ]|(floor|ceil|[\d.e+\-*/() ])*", text), text
    return float(eval(text, {"floor": math.floor, "ceil": math.ceil}))


def line(sections: tuple[Section, ...], label: str) -> Line:
    [found] = [each for section in sections for each in section.lines if each.label == label]
    return found


def number(sections: tuple[Section, ...], label: str) -> float:
    value = line(sections, label).value
    assert isinstance(value, Quantity), label
    return value.value


def table(sections: tuple[Section, ...], first_column: str) -> Table:
    [found] = [each for section in sections for each in section.tables if each.columns[0] == first_column]
    return found


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_explanation_gives_the_figure_it_explains(name: str) -> None:
    explained = [each for section in sheet_of(name) for each in section.lines if each.formula]
    assert len(explained) >= 9
    for each in explained:
        assert isinstance(each.value, Quantity)
        assert computed(each.formula) == pytest.approx(each.value.value, rel=2e-3, abs=1e-12), each


def test_every_explanation_of_a_network_gives_the_figure_it_explains() -> None:
    explained = [each for section in network_sections(NETWORK) for each in section.lines]
    assert len(explained) == 7
    for each in explained:
        assert isinstance(each.value, Quantity)
        assert computed(each.formula) == pytest.approx(each.value.value, rel=5e-3), each


def test_computed_reads_units_words_and_operators() -> None:
    assert computed("2 (k, v) x 32 layers x 8 KV heads x 128 x 2 B") == 131072
    assert computed("floor(3.9 tokens) x (1 - 1 / 2) + 16.38 MB / 1 GB/s") == pytest.approx(1.51638)
    assert computed("(1 - 0.5 ^ (1 + 1)) / 250 ms") == 3.0


def test_figures_of_the_article_and_of_published_models_are_on_the_sheet() -> None:
    llama = sheet_of("without arithmetic")
    assert number(llama, "in total") == 8_030_261_248
    assert number(llama, "read by a step of one token") == 7_504_924_672
    assert number(llama, "KV per token") == 131_072
    [model, memory, *_] = llama
    assert number((model,), "weights") == 16_060_522_496
    assert number((memory,), "KV tokens that fit") == 0
    assert line((memory,), "KV tokens that fit").note == "the weights do not fit"
    article = sheet_of("the article's")
    assert number(article, "batch that is bound by arithmetic") == pytest.approx(208)
    assert number(article, "KV per token") == 2_097_152


def test_a_token_takes_its_computing_and_its_way() -> None:
    sections = sheet_of("a pipeline")
    decode = next(section for section in sections if section.title.startswith("A decode step"))
    computing, way = number((decode,), "computing"), number((decode,), "on the way")
    assert number((decode,), "time per output token (TPOT)") == pytest.approx(computing + way)
    parts = decode.tables[0].rows
    assert sum(row[3].value for row in parts if isinstance(row[3], Quantity)) == pytest.approx(computing)


@pytest.mark.parametrize("name", QUESTIONS)
def test_stages_hold_every_layer_once_and_chunks_every_token(name: str) -> None:
    answer = Answer.of(QUESTIONS[name])
    assert [layer for stage in answer.stages for layer in stage] == list(range(answer.question.shape.num_layers))
    for num_chunks in answer.num_chunks:
        chunks = answer.cut(num_chunks)
        assert [token for chunk in chunks for token in chunk] == list(range(answer.question.prompt))
        assert len(chunks) == num_chunks
        assert all(chunks)


def test_a_slow_link_is_named_as_what_bounds() -> None:
    slow, fast = (
        Answer.of(question("llama-3.2-1b", num_stages=2, link=link, context=64, prompt=100))
        for link in (Edge(latency_s=20e-3, bytes_per_s=1e6, measured=False), FAST)
    )
    assert [answer.bound(1) for answer in (slow, fast)] == [Bound.LINK, Bound.MEMORY]
    assert [answer.bound(16) for answer in (slow, fast)] == [Bound.LINK, Bound.MEMORY]
    assert slow.prefill_bound() is Bound.LINK
    assert fast.prefill_bound() is not Bound.LINK


def test_the_chunks_that_are_called_best_are() -> None:
    rows = table(sheet_of("a pipeline"), "chunks of the prompt").rows
    seconds = [row[2].value for row in rows if isinstance(row[2], Quantity)]
    assert [row[4] for row in rows] == ["best" if each == min(seconds) else "" for each in seconds]
    assert seconds[0] > 1.5 * min(seconds)  # what overlap is for


@settings(max_examples=25, deadline=None)
@given(
    bandwidth=st.floats(1e10, 5e12),
    flop=st.floats(1e12, 1e15),
    memory=st.integers(10**9, 10**12),
    batch=st.integers(1, 64),
    factor=st.floats(1.0, 10.0),
)
def test_a_better_machine_is_never_slower_and_never_holds_less(
    bandwidth: float, flop: float, memory: int, batch: int, factor: float
) -> None:
    worse = Hardware(name="a", bytes_per_s=bandwidth, flop_per_s=flop, memory_bytes=memory)
    better = Hardware(
        name="b", bytes_per_s=bandwidth * factor, flop_per_s=flop * factor, memory_bytes=int(memory * factor)
    )
    left, right = (Answer.of(question("llama-3.2-1b", hardware="m4", context=64)) for _ in range(2))
    left, right = (
        Answer(question=replace(each.question, hardware=machine, prompt=64), stages=each.stages)
        for each, machine in ((left, worse), (right, better))
    )
    assert right.tpot_s(batch) <= left.tpot_s(batch) * (1 + 1e-9)
    assert right.prefill_s() <= left.prefill_s() * (1 + 1e-9)
    assert right.num_kv_tokens() >= left.num_kv_tokens()


def test_what_is_not_known_is_said_with_what_to_give() -> None:
    sections = sheet_of("without arithmetic")
    remedy = "The arithmetic of m4 is not known. Give it beside the name, such as m4,flops=4T."
    told = [section.title for section in sections if remedy in section.notes]
    assert [title.partition(" ")[0] for title in told] == ["Batches,", "A"]
    assert number(sections, "computing") > 0  # one token waits for memory on every machine
    row = next(row for row in table(sections, "batch").rows if row[0] == "16")
    assert row[1] == "not known"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 layers, which are at most as many stages; 33 given"):
        question(num_stages=33)
    with pytest.raises(ConfigError, match="32 query heads, which are at most as many ranks; 33 given"):
        question(num_ranks=33)
    with pytest.raises(ConfigError, match=r"2 machines need a link.*such as --link 1Gb/s,0.2ms"):
        question(hardware="m4", num_stages=2)
    with pytest.raises(ConfigError, match="--prompt is 0"):
        question(prompt=0)
    for flaw, message in (
        ({"num_stages": 1}, "--pp is 1"),
        ({"tpot_compute_share": 1.0}, "--compute-share is 1"),
        ({"chunks": (1, 2000)}, "cannot be cut into 2000 chunks"),
        ({"target_tpot_s": 0.0}, "--target-tpot must be above 0"),
        ({"element_bits": 8}, "--bits is 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(NETWORK, **flaw)  # type: ignore[arg-type]


def test_a_network_needs_what_the_arithmetic_says_and_latency_can_make_it_impossible() -> None:
    token, first, on_link = network_sections(NETWORK)
    rates = {str(row[0]): row[3:] for row in token.tables[0].rows}
    eight = [cell.value / 1e6 for cell in rates["as given"] if isinstance(cell, Quantity)]
    assert eight == pytest.approx([104.8576, 124.83, 174.76, 524.288], rel=1e-4)
    assert rates["star"][-1] == IMPOSSIBLE
    assert all(isinstance(cell, Quantity) and cell.unit is Unit.BITS_PER_S for cell in rates["ends"])
    ideal = {str(row[0]): row[2:] for row in first.tables[0].rows}
    chunked = [cell.value / 1e6 for cell in ideal["as given"] if isinstance(cell, Quantity)]
    assert chunked == pytest.approx([1048.576, 144.2, 65.54, 54.38], rel=1e-3)
    in_time = {row[0]: row[3] for row in on_link.tables[0].rows}  # at 100 Mb/s and 0.5 ms
    assert (in_time["ends"], in_time["ends, int8"], in_time["star, int8"]) == ("no", "yes", "no")
    impatient = network_sections(replace(NETWORK, target_tpot_s=0.005))
    assert {row[3] for row in impatient[2].tables[0].rows} == {"no"}


@pytest.mark.parametrize("name", QUESTIONS)
def test_programs_are_told_finite_numbers_with_units(name: str) -> None:
    told = json.loads(json.dumps(sheet.as_json(sheet_of(name)), allow_nan=False))
    units = {unit.value for unit in Unit}
    cells = [each for section in told for each in section["lines"]]
    cells += [cell for section in told for found in section["tables"] for row in found["rows"] for cell in row]
    assert len(cells) > 30
    for cell in cells:
        assert isinstance(cell["value"], str) or cell["unit"] in units


def test_text_is_aligned_short_and_explained_only_when_asked() -> None:
    section = Section(
        title="A title",
        lines=(
            Line(label="one", value=Quantity(5, Unit.BYTES), formula="2 x 2.5 B", note="a note"),
            Line(label="longer", value=Quantity(1.5, Unit.SECONDS)),
            Line(label="a word", value="none"),
        ),
        tables=(Table(columns=("batch", "TPOT"), rows=(("1", Quantity(0.25, Unit.SECONDS)),), formula="1 / 2"),),
        notes=("That is all.",),
    )
    assert list(sheet.text_lines([section])) == [
        "A title",
        "  one        5 B   a note",
        "  longer   1.5 s",
        "  a word       none",
        "",
        "  batch     TPOT",
        "  1       250 ms",
        "  That is all.",
    ]
    explained = list(sheet.text_lines([section], explain=True))
    assert explained[2] == "      2 x 2.5 B"
    assert explained[8] == "      1 / 2"
    told = "\n".join(sheet.markdown_lines([section]))
    assert "| one | 5 B | a note; `2 x 2.5 B` |" in told
    assert "| 1 | 250 ms |" in told
