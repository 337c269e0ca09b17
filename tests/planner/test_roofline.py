"""What data sheets allow: against the parts added up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planner.brute_force import stage
from tllm.core.errors import ConfigError
from tllm.planner.cost import crossover_tokens, interpolate
from tllm.planner.formats import FORMATS
from tllm.planner.hardware import PRESETS, Hardware, parse_hardware
from tllm.planner.network import Group, hidden_bytes
from tllm.planner.predict import predict
from tllm.planner.presets import SHAPES
from tllm.planner.profile import Load, NodeProfile
from tllm.planner.roofline import Bound, Kind, Roofline
from tllm.planner.shape import model_profile

LLAMA, BF16, A100 = SHAPES["llama-3.1-8b"], FORMATS["bf16"], PRESETS["a100-40gb"]


def roofline(shape=LLAMA, held=BF16, hardware=A100, **more) -> Roofline:
    return Roofline(shape=shape, held=held, hardware=hardware, **more)


def kinds(cost) -> dict[Kind, Bound]:
    return {part.kind: part.bound for part in cost.parts}


def test_decoding_reads_weights_and_kv_once():
    found = roofline(step_s=1e-3).decode(4, 1000)
    num_bytes = LLAMA.step_bytes(BF16) + 4 * (1000 + 1) * LLAMA.kv_bytes_per_token()
    assert found.seconds == pytest.approx(1e-3 + num_bytes / A100.bytes_per_s)
    assert set(kinds(found).values()) == {Bound.MEMORY}
    assert found.bound is Bound.MEMORY


def test_a_long_prompt_is_arithmetic_but_for_its_one_sampled_row():
    found = roofline().prefill(2000)
    assert kinds(found) == {
        Kind.PROJECTIONS: Bound.COMPUTE,
        Kind.ATTENTION: Bound.COMPUTE,
        Kind.MLP: Bound.COMPUTE,
        Kind.HEAD: Bound.MEMORY,
    }
    assert found.bound is Bound.COMPUTE
    assert sum(part.flop for part in found.parts) == LLAMA.prefill_flop(2000)


def test_from_the_crossover_on_matrices_wait_for_arithmetic():
    crossover = crossover_tokens(flop_per_s=312e12, bytes_per_s=1.5e12)
    below, above = (kinds(roofline().decode(round(crossover) + each, 1)) for each in (-2, 2))
    assert below[Kind.PROJECTIONS] is Bound.MEMORY
    assert above[Kind.PROJECTIONS] is Bound.COMPUTE


@given(st.integers(1, 31), st.integers(1, 400), st.integers(0, 4000))
def test_stages_take_together_what_one_machine_takes(cut, batch, context):
    whole = roofline().decode(batch, context)
    first = roofline().decode(batch, context, layers=range(cut), head=False)
    last = roofline().decode(batch, context, layers=range(cut, 32))
    assert first.seconds + last.seconds == pytest.approx(whole.seconds)


@given(st.integers(1, 500), st.data())
def test_a_prompt_in_two_chunks_has_the_same_arithmetic(num_tokens, data):
    first = data.draw(st.integers(0, num_tokens))

    def flop(cost) -> float:
        return sum(part.flop for part in cost.parts)

    whole = roofline().prefill(num_tokens)
    chunks = flop(roofline().prefill(first, head=False)) + flop(roofline().prefill(num_tokens - first, cached=first))
    assert chunks == flop(whole)


def test_a_group_divides_the_work_and_adds_two_all_reduces_a_layer():
    group = Group(num_ranks=4, latency_s=1e-5, bytes_per_s=1e9)
    alone, shared = roofline().decode(8, 500), roofline(group=group).decode(8, 500)
    sent_s = 32 * group.layer_s(hidden_bytes(8, 4096))
    assert shared.seconds == pytest.approx(alone.seconds / 4 + sent_s)
    assert shared.part_s(Kind.ALL_REDUCE) == pytest.approx(sent_s)
    assert shared.bound is Bound.LINK


def test_ranks_beyond_the_kv_heads_hold_copies_of_them():
    eight, sixteen = (
        roofline(group=Group(num_ranks=num, latency_s=0, bytes_per_s=1e9)).decode(1, 100_000) for num in (8, 16)
    )
    assert eight.part_s(Kind.ATTENTION) == sixteen.part_s(Kind.ATTENTION)
    assert eight.part_s(Kind.MLP) == pytest.approx(2 * sixteen.part_s(Kind.MLP))


def test_experts_are_read_by_those_who_chose_them():
    mixtral = roofline(shape=SHAPES["mixtral-8x7b"])
    one, many = mixtral.decode(1, 0), mixtral.decode(64, 0)
    assert 3.5 < many.part_s(Kind.MLP) / one.part_s(Kind.MLP) < 4.1


def test_efficiencies_make_everything_slower():
    slow = replace(A100, bandwidth_efficiency=0.5, flop_efficiency=0.25)
    assert roofline(hardware=slow).decode(1, 0).seconds == pytest.approx(2 * roofline().decode(1, 0).seconds)
    kind = Kind.MLP
    slower = roofline(hardware=slow).prefill(2000).part_s(kind) / roofline().prefill(2000).part_s(kind)
    assert slower == pytest.approx(4)


def test_without_a_figure_of_arithmetic_only_single_tokens_are_told():
    m4 = roofline(hardware=PRESETS["m4"])
    assert m4.decode(1, 0).bound is Bound.MEMORY
    for refused in (lambda: m4.decode(2, 0), lambda: m4.prefill(2), m4.speed):
        with pytest.raises(ConfigError, match="m4,flops="):
            refused()


@pytest.mark.parametrize("num_rows", [1, 3, 100, 207, 209, 300, 1500, 2048, 5000])
def test_the_planner_is_told_the_same_seconds(num_rows):
    machine = roofline(step_s=1e-3)
    speed = machine.speed()
    layers_s = interpolate(speed.rows, speed.layer_s, num_rows) * LLAMA.num_layers
    found = speed.step_s + layers_s + interpolate(speed.rows, speed.head_s, num_rows)
    assert found == pytest.approx(machine.decode(num_rows, 0).seconds, rel=0.01)


def test_a_prediction_for_one_machine_is_its_roofline():
    machine = roofline()
    model = model_profile(LLAMA, BF16)
    node = NodeProfile(id="a", name="a", machine="a", host="", memory_bytes=1, num_threads=1, speed=machine.speed())
    load = Load(prompt=1000, answer=2, max_batch_tokens=1000)
    found = predict(model, [stage(model, node, 0, 32)], [], load, head_machine="a", head_step_s=0.0)
    assert found is not None
    assert found.stage_s[0] == pytest.approx(machine.decode(1, 1001).seconds, rel=1e-3)
    assert found.ttft_s == pytest.approx(machine.prefill(1000).seconds, rel=0.02)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_preset_is_found_by_its_name(preset):
    assert parse_hardware(preset.name.upper()) == preset


def test_figures_are_given_alone_or_beside_a_name():
    given_figures = parse_hardware("flops=312T, bandwidth=1.5TB/s, memory=40GB, link=300GB/s")
    assert replace(given_figures, name=A100.name) == A100
    assert parse_hardware("m4,flops=4T,bandwidth-efficiency=0.8") == replace(
        PRESETS["m4"], flop_per_s=4e12, bandwidth_efficiency=0.8
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b100", "a100-40gb"),
        ("flops=1T", "bandwidth="),
        ("m4,cores=3", "link="),
        ("m4,link=10", "10Gb/s|100Mb/s"),
        ("m4,bandwidth-efficiency=1.5", "at most 1"),
        ("m4,flop-efficiency=most", "such as 0.9"),
    ],
)
def test_what_is_no_hardware_is_refused_with_what_is(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_hardware(text)


def test_a_figure_that_nobody_published_is_asked_for():
    bare = Hardware(name="given", bytes_per_s=1e9)
    for figure, message in (("memory", "memory="), ("link", "link="), ("reached_flop_per_s", "flops=")):
        with pytest.raises(ConfigError, match=message):
            getattr(bare, figure)
