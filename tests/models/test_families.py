"""Specs from configs: those that transformers writes, those of old files, and those that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from tllm.core.errors import ModelError
from tllm.models.config import Config
from tllm.models.families import FAMILIES, find_family, read_spec
from tllm.models.spec import ActivationKind, LearnedPositions, MlpKind, ModelSpec, NormKind, Rope, RopeKind
from tllm.testing.checkpoints import tiny_config


def spec_of(fields: dict[str, Any]) -> ModelSpec:
    config = Config(path="config.json", fields=fields)
    return read_spec(config, find_family(config))


def saved(config: PretrainedConfig, directory: Path) -> dict[str, Any]:
    config.save_pretrained(directory)
    fields: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return fields


CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gpt2": GPT2Config,
}


def windows_of(config: PretrainedConfig) -> tuple[int | None, ...]:
    if isinstance(config, MistralConfig):
        return (config.sliding_window,) * config.num_hidden_layers if config.sliding_window else ()
    types = getattr(config, "layer_types", None) or []
    windows = tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def assert_same(spec: ModelSpec, config: PretrainedConfig) -> None:
    assert spec.family == config.model_type
    assert spec.num_layers == config.num_hidden_layers
    assert spec.hidden_size == config.hidden_size
    assert spec.num_heads == config.num_attention_heads
    assert spec.vocab_size == config.vocab_size
    assert spec.max_positions == config.max_position_embeddings
    assert spec.tied == config.tie_word_embeddings
    assert spec.windows == windows_of(config)
    if isinstance(config, GPT2Config):
        assert spec.intermediate_size == (config.n_inner or 4 * config.n_embd)
        assert spec.norm_eps == config.layer_norm_epsilon
        assert spec.num_kv_heads == spec.num_heads
        assert spec.head_dim == config.n_embd // config.n_head
        assert spec.positions == LearnedPositions(num_positions=config.n_positions)
    else:
        assert spec.intermediate_size == config.intermediate_size
        assert spec.norm_eps == config.rms_norm_eps
        assert spec.num_kv_heads == config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert spec.head_dim == head_dim
        theta = config.rope_parameters["rope_theta"]
        assert spec.positions == Rope(kind=RopeKind.DEFAULT, theta=theta, dim=head_dim)
    assert spec.attention_scale == spec.head_dim**-0.5


@pytest.mark.parametrize("family", CONFIGS)
def test_absent_fields_mean_what_transformers_means_by_them(family: str) -> None:
    assert_same(spec_of({"model_type": family}), CONFIGS[family]())


@pytest.mark.parametrize("family", CONFIGS)
def test_a_config_saved_by_transformers_is_read_as_it_was(family: str, tmp_path: Path) -> None:
    config = CONFIGS[family](
        vocab_size=1000,
        hidden_size=96,
        num_hidden_layers=5,
        num_attention_heads=6,
        max_position_embeddings=333,
        tie_word_embeddings=family != "gpt2",
    )
    if family != "gpt2":
        config.intermediate_size = 200
        config.num_key_value_heads = 3
        config.rms_norm_eps = 3e-6
        config.rope_parameters["rope_theta"] = 1e6
    assert_same(spec_of(saved(config, tmp_path)), config)
    assert_same(spec_of(json.loads(json.dumps(config.to_dict()))), config)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {"layer_types": ["full_attention"] * 4},
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_qwen_are_those_of_transformers(family: str, extra: dict[str, Any]) -> None:
    config = CONFIGS[family](num_hidden_layers=4, **extra)
    assert spec_of({"model_type": family, "num_hidden_layers": 4} | extra).windows == windows_of(config)


def test_mistral_has_its_window_on_every_layer_or_none() -> None:
    assert spec_of(tiny_config("mistral", layers=3)).windows == (24, 24, 24)
    assert spec_of(tiny_config("mistral") | {"sliding_window": None}).windows == ()


def test_head_dim_is_taken_as_given_and_derived_only_when_absent_or_null() -> None:
    given = tiny_config("mistral", hidden_size=64, heads=4, head_dim=32)
    assert spec_of(given).head_dim == 32
    assert spec_of(given | {"head_dim": None}).head_dim == 16
    del given["head_dim"]
    assert spec_of(given).head_dim == 16


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_null_kv_heads_mean_one_for_each_query_head(family: str) -> None:
    config = CONFIGS[family](num_key_value_heads=None, num_attention_heads=8)
    spec = spec_of({"model_type": family, "num_key_value_heads": None, "num_attention_heads": 8})
    assert spec.num_kv_heads == config.num_key_value_heads == 8


@pytest.mark.parametrize(
    ("family", "overrides", "biases"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("mistral", {"attention_bias": True}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {}, (False, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
        ("gpt2", {}, (True, True, True)),
    ],
)
def test_biases_are_those_of_the_family_and_its_flags(
    family: str, overrides: dict[str, object], biases: tuple[bool, bool, bool]
) -> None:
    spec = spec_of(tiny_config(family) | overrides)
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias) == biases


def test_kinds_follow_the_family() -> None:
    gpt2, qwen3 = spec_of(tiny_config("gpt2")), spec_of(tiny_config("qwen3"))
    assert (gpt2.norm, gpt2.mlp, gpt2.activation) == (NormKind.LAYER, MlpKind.PLAIN, ActivationKind.GELU_TANH)
    assert (qwen3.norm, qwen3.mlp, qwen3.activation) == (NormKind.RMS, MlpKind.GATED, ActivationKind.SILU)
    assert qwen3.qk_norm
    assert not gpt2.qk_norm


@pytest.mark.parametrize(
    ("name", "kind"),
    [("silu", ActivationKind.SILU), ("gelu", ActivationKind.GELU), ("gelu_pytorch_tanh", ActivationKind.GELU_TANH)],
)
def test_activations_are_read_by_name(name: str, kind: ActivationKind) -> None:
    assert spec_of(tiny_config("llama") | {"hidden_act": name}).activation is kind


def test_gpt2_may_leave_attention_unscaled_and_be_named_by_the_common_fields() -> None:
    assert spec_of(tiny_config("gpt2") | {"scale_attn_weights": False}).attention_scale == 1.0
    fields = {"model_type": "gpt2", "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 2}
    spec = spec_of(fields)
    assert (spec.num_layers, spec.hidden_size, spec.head_dim, spec.intermediate_size) == (3, 48, 24, 192)


def test_distilgpt2_is_read_from_its_published_fields() -> None:
    published = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
        "n_layer": 6, "n_positions": 1024, "layer_norm_epsilon": 1e-05, "activation_function": "gelu_new",
        "vocab_size": 50257, "_num_labels": 1, "summary_type": "cls_index", "attn_pdrop": 0.1,
    }  # fmt: skip
    spec = spec_of(published)
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.intermediate_size) == (6, 768, 12, 3072)
    assert spec.tied


def test_the_architecture_names_the_family_when_model_type_is_absent() -> None:
    fields = tiny_config("qwen3")
    del fields["model_type"]
    assert spec_of(fields).family == "qwen3"


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"model_type": "mamba"}, ["model_type 'mamba' is not supported", "llama (LlamaForCausalLM)", "gpt2"]),
        ({"architectures": ["T5Model"]}, ["architectures ['T5Model'] is not supported"]),
        ({}, ["architectures [] is not supported"]),
        (
            tiny_config("llama") | {"architectures": ["LlamaForSequenceClassification"]},
            ["architectures ['LlamaForSequenceClassification'] is not a text generator of model_type 'llama'"],
        ),
        (tiny_config("llama") | {"hidden_act": "relu"}, ["hidden_act 'relu' is not supported", "silu", "gelu_new"]),
        (tiny_config("gpt2") | {"activation_function": None}, ["activation_function None is not supported"]),
        (tiny_config("llama") | {"is_encoder_decoder": True}, ["is_encoder_decoder is true"]),
        (tiny_config("gpt2") | {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx is true"]),
        (tiny_config("gpt2") | {"add_cross_attention": True}, ["add_cross_attention is true"]),
        (tiny_config("llama") | {"hidden_size": 0}, ["hidden_size must be a positive integer, not 0"]),
        (tiny_config("llama") | {"hidden_size": 64.0}, ["hidden_size must be a positive integer, not 64.0"]),
        (
            tiny_config("llama") | {"num_hidden_layers": None},
            ["num_hidden_layers must be a positive integer, not null"],
        ),
        (tiny_config("llama") | {"rms_norm_eps": "x"}, ['rms_norm_eps must be a number above 0, not "x"']),
        (tiny_config("llama") | {"attention_bias": "no"}, ['attention_bias must be true or false, not "no"']),
        (tiny_config("llama") | {"architectures": "x"}, ['architectures must be a list of strings, not "x"']),
        (tiny_config("llama") | {"num_key_value_heads": 3}, ["4 attention heads cannot share 3 key-value heads"]),
        (
            tiny_config("llama", hidden_size=66) | {"head_dim": None},
            ["without head_dim, hidden_size 66 must be a multiple of the number of heads, 4"],
        ),
        (tiny_config("qwen3") | {"head_dim": None}, ["head_dim must be a positive integer, not null"]),
        (
            tiny_config("qwen2", layers=2) | {"layer_types": ["full_attention"]},
            ["layer_types must name full_attention or sliding_attention for each of 2 layers"],
        ),
        (
            tiny_config("qwen2", layers=2) | {"layer_types": ["chunked_attention"] * 2},
            ["layer_types must name full_attention or sliding_attention"],
        ),
        (
            tiny_config("qwen2", layers=1) | {"layer_types": ["sliding_attention"], "sliding_window": 8},
            ["layer_types has sliding_attention, but no sliding_window is in force"],
        ),
        (
            tiny_config("mistral", layers=2) | {"layer_types": ["sliding_attention", "full_attention"]},
            ["layer_types has full_attention beside sliding_window 24, but every layer of mistral has the window"],
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_field_and_value(fields: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        spec_of(fields)
    for message in ["config.json", *messages]:
        assert message in str(caught.value)


def test_every_family_has_a_tiny_checkpoint_and_a_row() -> None:
    assert [row.name for row in FAMILIES] == list(CONFIGS)
