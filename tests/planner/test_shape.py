"""Shapes: the same counts as the tensors that a checkpoint has, and the same bytes as the slicer's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import ConfigError
from tllm.core.types import DType, Quantization
from tllm.models.config import Config
from tllm.models.families import find_family, read_spec
from tllm.models.slicing import embed_weights, head_weights, held_bytes, layer_weights, shard_weights
from tllm.models.spec import ModelSpec, Shard
from tllm.planner.cost import num_pairs
from tllm.planner.formats import FORMATS, WeightFormat, parse_format
from tllm.planner.presets import SHAPES, parse_shape
from tllm.planner.shape import Experts, Shape, model_profile
from tllm.testing.checkpoints import FAMILIES, tiny_config

WHOLE = {"first_layer": 0, "embed": True, "head": True}


def spec_of(family: str, **changes: object) -> ModelSpec:
    config = Config(path="config.json", fields=tiny_config(family) | changes)
    return read_spec(config, find_family(config))


SPECS = {
    **{family: spec_of(family) for family in FAMILIES},
    **{f"{family}, tied the other way": spec_of(family, tie_word_embeddings=family != "gpt2") for family in FAMILIES},
    "biases": spec_of("llama", attention_bias=True, mlp_bias=True),
    "a head of its own size": spec_of("qwen3", head_dim=32, num_attention_heads=6, num_key_value_heads=3),
    "a head with a bias": replace(spec_of("llama"), head_bias=True),
}


def counted(weights) -> int:
    return sum(math.prod(weight.shape) for weight in weights)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_shape_has_as_many_parameters_as_the_tensors_of_its_checkpoint(spec):
    shape = Shape.of(spec, "tiny")
    assert shape.num_params == counted(shard_weights(spec, Shard(last_layer=spec.num_layers, **WHOLE)))
    assert shape.layer_params() == counted(layer_weights(spec, 0))
    assert shape.embed_params == counted(embed_weights(spec))
    assert shape.step_params() == spec.num_layers * counted(layer_weights(spec, 0)) + counted(head_weights(spec))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "int4-g32", "int4-g128"])
def test_weights_take_as_many_bytes_as_the_slicer_says(family, quantization):
    # Widths that all groups divide, as those of published models.
    llama = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    spec = spec_of(family, **({"n_embd": 256, "n_inner": 512} if family == "gpt2" else llama))
    shape = Shape.of(spec, "tiny")
    held = FORMATS["bf16"] if quantization is None else parse_format(quantization)
    wanted = None if quantization is None else Quantization.parse(quantization)

    def sliced(weights) -> int:
        return sum(held_bytes(weight.target, weight.shape, DType.BFLOAT16, wanted) for weight in weights)

    assert shape.layer_bytes(held) == sliced(layer_weights(spec, 0))
    assert shape.embed_bytes(held) == sliced(embed_weights(spec))
    assert shape.head_bytes(held) == sliced(head_weights(spec))
    assert shape.weight_bytes(held) == sliced(shard_weights(spec, Shard(last_layer=spec.num_layers, **WHOLE)))
    assert shape.step_bytes(held) == spec.num_layers * shape.layer_bytes(held) + shape.head_bytes(held)


@pytest.mark.parametrize("dtype", DType)
def test_kv_takes_as_many_bytes_as_the_spec_says(dtype):
    for spec in SPECS.values():
        shape = Shape.of(spec, "tiny")
        assert shape.kv_bytes_per_token(dtype.num_bytes) == spec.kv_bytes_per_position(spec.num_layers, dtype)


def test_the_planner_sees_the_same_bytes():
    for shape in SHAPES.values():
        held = FORMATS["int8"]
        profile = model_profile(shape, held, kv_bytes_per_element=1, activation_bytes=4)
        assert profile.held_bytes(0, shape.num_layers) == pytest.approx(shape.weight_bytes(held), abs=1e6)
        assert profile.hidden_bytes == 4 * shape.hidden_size
        assert profile.kv_bytes_per_position * shape.num_layers == shape.kv_bytes_per_token(1)


def test_known_formats_have_their_published_bits():
    bits = {name: held.matrix_bits for name, held in FORMATS.items()}
    assert bits["mlx-4bit"] == bits["q4_0"] == 4.5
    assert (bits["q8_0"], bits["mxfp4"], bits["int4-g128"], bits["int8"]) == (8.5, 4.25, 4.25, 8.125)


def test_norms_and_biases_are_never_made_smaller():
    held = WeightFormat(name="", matrix_bits=4, end_bits=8)
    assert held.num_bytes(matrices=2, ends=3, plain=5) == 1 + 3 + 10


@given(st.integers(0, 40), st.integers(0, 40), st.none() | st.integers(1, 50))
def test_pairs_are_those_of_a_loop(num_tokens, cached, window):
    looked_at = (cached + i + 1 for i in range(num_tokens))
    assert num_pairs(num_tokens, cached, window) == sum(min(each, window or each) for each in looked_at)


@given(st.integers(1, 64), st.data())
def test_attention_of_a_prompt_is_that_of_its_chunks(num_tokens, data):
    first = data.draw(st.integers(0, num_tokens))
    shape = replace(SHAPES["qwen3-0.6b"], num_layers=2, windows=(16, None))
    parts = shape.attention_flop(first) + shape.attention_flop(num_tokens - first, cached=first)
    assert parts == shape.attention_flop(num_tokens)


@given(st.integers(1, 256), st.data())
def test_experts_touched_grow_with_tokens_up_to_all(num_experts, data):
    experts = Experts(num_experts=num_experts, per_token=data.draw(st.integers(1, num_experts)))
    touched = [experts.touched(num) for num in (1, 2, 8, 10_000)]
    assert touched[0] == pytest.approx(experts.per_token)
    assert touched == sorted(touched)
    assert touched[-1] <= num_experts


def test_all_experts_are_held_and_few_are_read():
    shape, held = SHAPES["mixtral-8x7b"], FORMATS["bf16"]
    assert shape.step_bytes(held, 1000) < shape.weight_bytes(held)
    assert shape.step_bytes(held, 1) < 0.3 * shape.weight_bytes(held)
    assert shape.step_params() == shape.active_params()


def test_a_layer_with_a_window_looks_at_no_more_than_it():
    shape = replace(SHAPES["qwen3-0.6b"], num_layers=2, windows=(16, None))
    assert shape.kv_bytes(10) == 10 * shape.kv_bytes_per_token()
    assert shape.kv_bytes(100) == (16 + 100) * shape.kv_bytes_per_token() // 2


def test_deepseek_v3_has_671_billion_parameters_of_which_37_are_active():
    shape = SHAPES["deepseek-v3"]
    assert round(shape.num_params / 1e9) == 671
    assert round(shape.active_params(embedding=True) / 1e9) in (37, 38)


@pytest.mark.parametrize(
    ("parse", "text", "known"), [(parse_shape, "llama-9", "llama-3.1-8b"), (parse_format, "int3", "q4_0")]
)
def test_an_unknown_name_is_answered_with_the_known_ones(parse, text, known):
    with pytest.raises(ConfigError, match=known):
        parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": 5}, "share"),
        ({"experts": Experts(num_experts=4, per_token=5)}, "experts"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(SHAPES["llama-3.2-1b"], **changes)
