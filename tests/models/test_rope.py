"""Rotary frequencies against those of transformers, for every kind and both spellings of a config."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tllm.core.errors import ModelError
from tllm.models.config import Config
from tllm.models.families import find_family, read_spec
from tllm.models.rope import inverse_frequencies
from tllm.models.spec import ModelSpec, Rope, RopeKind
from tllm.testing.checkpoints import ROPES, tiny_config

LONG = {"short_factor": [1.0 + 0.1 * i for i in range(32)], "long_factor": [1.0 + i for i in range(32)]}
SCALINGS: list[dict[str, object]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707,
     "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5},
    {"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096, **LONG},
    {"rope_type": "longrope", "original_max_position_embeddings": 4096, **LONG},
    {"rope_type": "longrope", "original_max_position_embeddings": 4096, "attention_factor": 1.25, **LONG},
]  # fmt: skip
NAMES = [f"{s['rope_type']}-{i}" for i, s in enumerate(SCALINGS)]
MAX_POSITIONS = 131072


def llama_spec(fields: dict[str, object]) -> ModelSpec:
    config = Config(path="config.json", fields=fields)
    return read_spec(config, find_family(config))


def rope_of(spec: ModelSpec) -> Rope:
    assert isinstance(spec.positions, Rope)
    return spec.positions


def reference(config: LlamaConfig, sequence_length: int | None = None) -> tuple[torch.Tensor, float]:
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=sequence_length)


def make_config(scaling: dict[str, object], *, theta: float = 500000.0, head_dim: int = 64) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_theta": theta} | scaling,
    )


def assert_equal(ours: tuple[tuple[float, ...], float], theirs: tuple[torch.Tensor, float]) -> None:
    # The reference computes in float32, with a rounded exponent: ln(theta) times 2**-24, a few units in the last place.
    torch.testing.assert_close(torch.tensor(ours[0]), theirs[0], rtol=2e-6, atol=0)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS, ids=NAMES)
def test_frequencies_equal_transformers_from_a_config_it_saved(scaling: dict[str, object], tmp_path: Path) -> None:
    config = make_config(scaling)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    saved = Config.read(tmp_path / "config.json")
    rope = rope_of(read_spec(saved, find_family(saved)))
    original = rope.original_max_positions or MAX_POSITIONS
    assert_equal(inverse_frequencies(rope, original), reference(config, original))
    assert_equal(inverse_frequencies(rope, 1), reference(config))
    assert_equal(inverse_frequencies(rope, 4 * MAX_POSITIONS), reference(config, 4 * MAX_POSITIONS))


@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=NAMES)
def test_the_old_spelling_means_what_the_new_one_does(scaling: dict[str, object], name: str) -> None:
    base: dict[str, object] = {
        "model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": MAX_POSITIONS,
    }  # fmt: skip
    kind = scaling["rope_type"]
    renamed = {name: kind} | {key: value for key, value in scaling.items() if key != "rope_type"}
    new = llama_spec(base | {"rope_parameters": {"rope_theta": 500000.0} | scaling})
    old = llama_spec(base | {"rope_theta": 500000.0, "rope_scaling": renamed})
    assert old == new
    assert rope_of(new).theta == 500000.0


@settings(max_examples=60, deadline=None)
@given(
    scaling=st.one_of(
        st.fixed_dictionaries({"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": st.floats(1.0, 64.0)}),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("yarn"),
                "factor": st.floats(1.0, 64.0),
                "original_max_position_embeddings": st.integers(16, 131072),
                "truncate": st.booleans(),
                "beta_fast": st.integers(8, 64),
                "beta_slow": st.integers(1, 7),
            }
        ),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("llama3"),
                "factor": st.floats(1.0, 64.0),
                "original_max_position_embeddings": st.integers(16, 131071),
                "low_freq_factor": st.floats(0.5, 2.0),
                "high_freq_factor": st.floats(2.5, 8.0),
            }
        ),
    ),
    theta=st.floats(100.0, 1e7),
    head_dim=st.sampled_from([8, 64, 80, 96, 128]),
    length=st.integers(1, 10 * MAX_POSITIONS),
)
def test_frequencies_equal_transformers_for_any_numbers(
    scaling: dict[str, object], theta: float, head_dim: int, length: int
) -> None:
    config = make_config(scaling, theta=theta, head_dim=head_dim)
    spec = llama_spec(json.loads(json.dumps(config.to_dict())))
    inverse, factor = inverse_frequencies(rope_of(spec), length)
    theirs, their_factor = reference(config, length)
    # A ramp's edge may fall on either side of a wavelength that float32 rounds: hence a looser bound than above.
    torch.testing.assert_close(torch.tensor(inverse), theirs, rtol=2e-5, atol=0)
    assert factor == pytest.approx(their_factor, rel=1e-9)


def test_dynamic_frequencies_do_not_depend_on_lengths_within_the_original() -> None:
    rope = Rope(kind=RopeKind.DYNAMIC, theta=10000.0, dim=16, factor=2.0, original_max_positions=100)
    plain = Rope(kind=RopeKind.DEFAULT, theta=10000.0, dim=16)
    assert inverse_frequencies(rope, 1) == inverse_frequencies(rope, 100) == inverse_frequencies(plain, 100)
    assert inverse_frequencies(rope, 101) != inverse_frequencies(rope, 100)


def test_longrope_takes_the_long_factors_exactly_beyond_the_original_length() -> None:
    scaling = dict(ROPES["longrope"])
    spec = llama_spec(tiny_config(rope=scaling, rope_theta=1.0 + 1e-9))
    rope = rope_of(spec)
    # With theta 1 a frequency is the inverse of its factor.
    assert inverse_frequencies(rope, 64)[0] == pytest.approx([1 / f for f in rope.short_factor])
    assert inverse_frequencies(rope, 65)[0] == pytest.approx([1 / f for f in rope.long_factor])


def test_yarn_with_an_explicit_original_length_serves_original_times_factor() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert llama_spec(tiny_config(max_positions=32, rope=scaling)).max_positions == 128
    assert llama_spec(tiny_config(max_positions=256, rope=scaling)).max_positions == 256
    del scaling["original_max_position_embeddings"]
    assert llama_spec(tiny_config(max_positions=32, rope=scaling)).max_positions == 32


def test_an_original_length_beside_the_scaling_goes_before_one_within() -> None:
    fields = tiny_config(rope=ROPES["llama3"]) | {"original_max_position_embeddings": 48}
    assert rope_of(llama_spec(fields)).original_max_positions == 48


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "su"}, "rope_type 'su' is not supported; there are default, linear, dynamic, llama3, yarn"),
        ({"rope_type": "linear"}, "factor must be a number above 0, and is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor must be a number above 0, not 0"),
        ({"rope_type": "linear", "factor": math.inf}, "factor must be a number above 0, not Infinity"),
        ({"rope_type": "dynamic", "factor": "2"}, 'factor must be a number above 0, not "2"'),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor must be a number above 0, and is missing"),
        (dict(ROPES["llama3"]) | {"low_freq_factor": 4.0}, "low_freq_factor 4.0 must be below high_freq_factor 4.0"),
        (dict(ROPES["longrope"]) | {"short_factor": [1.0]}, "short_factor has 1 numbers; a head_dim of 16 takes 8"),
        (dict(ROPES["longrope"]) | {"long_factor": None}, "long_factor must be a list of numbers above 0, not null"),
        ({"rope_type": "default", "mrope_section": [4, 2, 2]}, "mrope_section is not supported; known are"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported"),
        ({"rope_theta": None}, "rope_theta must be a number above 0, not null"),
    ],
)
def test_a_scaling_that_cannot_be_honoured_is_refused_by_name(rope: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        llama_spec(tiny_config(rope=rope))
    assert message in str(caught.value)


def test_a_head_of_odd_size_is_refused() -> None:
    with pytest.raises(ModelError, match="head_dim 15 is odd"):
        llama_spec(tiny_config(head_dim=15))


def test_partial_rotation_beside_the_scaling_is_refused() -> None:
    with pytest.raises(ModelError, match=r"partial_rotary_factor is 0\.25"):
        llama_spec(tiny_config() | {"partial_rotary_factor": 0.25})
    llama_spec(tiny_config() | {"partial_rotary_factor": 1.0})
