"""Model families as rows of a table: which config fields a family has, and what its tensors are called.

A family is one `Family` in `FAMILIES`; nothing else in tllm names one. A field that is absent from config.json has the
default of the family's config class in `transformers`, because that is what its absence means to who wrote the file.
A value that would change the answer and that tllm does not honour is refused, never skipped.

This file does not know files, shards, or how anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from tllm.core.errors import ModelError
from tllm.models.config import Config
from tllm.models.rope_config import read_rope
from tllm.models.spec import ActivationKind, LearnedPositions, MlpKind, ModelSpec, NormKind, Rope

Sizes = Mapping[str, int]  # what has been read so far, by the names of ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeField:
    """A positive integer of the config: its names (the first is the usual one), and what absence and null mean.

    `derive` gives the value for null; where there is no `default` it also stands in for an absent field, and for one
    that the family does not have (no names).
    """

    names: tuple[str, ...] = ()
    default: int | None = None
    derive: Callable[[Sizes], int] | None = None


class Windows(Enum):
    """Which layers attend through the config's sliding_window."""

    NONE = auto()
    ALL = auto()
    SOME = auto()  # layer_types, else those from max_window_layers on, if use_sliding_window


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A tensor of the checkpoint, and the canonical weights it holds, one after the other along their outputs.

    `{i}` stands for the layer. `transpose`: on disk it is (inputs, outputs).
    """

    source: str
    targets: tuple[str, ...]
    transpose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row. A flag given as a string is the name of a bool in the config, absent meaning False."""

    name: str  # the config's model_type, and ModelSpec.family
    architectures: tuple[str, ...]
    sizes: Mapping[str, SizeField]  # by the names of ModelSpec, in the order in which they depend on each other
    norm: NormKind
    norm_eps: tuple[str, float]
    mlp: MlpKind
    activation: tuple[str, str]
    tied: bool  # when the config does not say
    windows: Windows = Windows.NONE
    window: int | None = None  # sliding_window when absent
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    rotary: bool = True
    scale_flag: str | None = None  # a bool of the config: False leaves attention unscaled
    must_be: Mapping[str, object] = field(default_factory=dict)  # the only value honoured, also meant by absence
    prefixes: tuple[str, ...]  # of every stored name but the head's: the first that the checkpoint has
    weights: tuple[StoredWeight, ...]
    head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()  # regular expressions of stored names that carry no weights


def find_family(config: Config) -> Family:
    """The row for a config, by model_type, else by architecture.

    Raises ModelError naming what was found and what is supported.
    """
    model_type, architectures = config.text("model_type"), config.texts("architectures")
    supported = f"Supported are {', '.join(f'{row.name} ({row.architectures[0]})' for row in FAMILIES)}."
    for row in FAMILIES:
        if row.name == model_type or (model_type is None and any(name in row.architectures for name in architectures)):
            break
    else:
        what = f"model_type {model_type!r}" if model_type else f"architectures {list(architectures)}"
        raise ModelError(f"{config.path}: {what} is not supported. {supported}")
    if architectures and not any(name in row.architectures for name in architectures):
        raise ModelError(
            f"{config.path}: architectures {list(architectures)} is not a text generator of model_type {row.name!r}. "
            + supported
        )
    return row


def read_spec(config: Config, family: Family) -> ModelSpec:
    """The numbers of a config. Raises ModelError naming the field, its value and what is supported."""
    config.refuse_unless("is_encoder_decoder", False, "only decoder-only models are supported")
    for name, value in family.must_be.items():
        config.refuse_unless(name, value, "other values are not supported")

    sizes: dict[str, int] = {}
    for name, wanted in family.sizes.items():
        sizes[name] = _size(config, wanted, sizes)
    num_heads, num_kv_heads, head_dim = sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"]
    if num_heads % num_kv_heads:
        raise ModelError(f"{config.path}: {num_heads} attention heads cannot share {num_kv_heads} key-value heads.")

    def flag(given: bool | str) -> bool:
        return config.flag(given, default=False) if isinstance(given, str) else given

    scaled = family.scale_flag is None or config.flag(family.scale_flag, default=True)
    max_positions = sizes["max_positions"]
    positions: Rope | LearnedPositions = LearnedPositions(num_positions=max_positions)
    if family.rotary:
        positions, max_positions = read_rope(config, head_dim, max_positions)
    eps_name, eps_default = family.norm_eps
    return ModelSpec(
        family=family.name,
        num_layers=sizes["num_layers"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=sizes["vocab_size"],
        max_positions=max_positions,
        norm=family.norm,
        norm_eps=config.positive_number(eps_name, default=eps_default),
        positions=positions,
        mlp=family.mlp,
        activation=_activation(config, *family.activation),
        attention_scale=head_dim**-0.5 if scaled else 1.0,
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        tied=config.flag("tie_word_embeddings", default=family.tied),
        windows=_windows(config, family, sizes["num_layers"]),
    )


def _size(config: Config, wanted: SizeField, sizes: Sizes) -> int:
    name = next((name for name in wanted.names if name in config.fields), next(iter(wanted.names), ""))
    if wanted.derive is not None and config.fields.get(name, wanted.default) is None:
        return wanted.derive(sizes)
    return config.size(name, default=wanted.default)


_ACTIVATIONS: Final[Mapping[str, ActivationKind]] = {
    "silu": ActivationKind.SILU,
    "swish": ActivationKind.SILU,
    "gelu": ActivationKind.GELU,
    # Four spellings of one formula, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    "gelu_new": ActivationKind.GELU_TANH,
    "gelu_fast": ActivationKind.GELU_TANH,
    "gelu_accurate": ActivationKind.GELU_TANH,
    "gelu_pytorch_tanh": ActivationKind.GELU_TANH,
}


def _activation(config: Config, name: str, default: str) -> ActivationKind:
    value = config.fields.get(name, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise ModelError(f"{config.path}: {name} {value!r} is not supported; there are {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[value]


def _windows(config: Config, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Per layer; empty when no layer has one."""
    if family.windows is Windows.NONE:
        return ()
    if family.windows is Windows.SOME and not config.flag("use_sliding_window", default=False):
        window = None
    else:
        window = config.optional_size("sliding_window", default=family.window)
    types = config.texts("layer_types") if config.fields.get("layer_types") is not None else None
    if types is None and family.windows is Windows.ALL:
        types = ("sliding_attention" if window else "full_attention",) * num_layers
    elif types is None:
        first = config.count("max_window_layers", default=28)
        types = tuple("sliding_attention" if window and i >= first else "full_attention" for i in range(num_layers))

    if len(types) != num_layers or not {"full_attention", "sliding_attention"}.issuperset(types):
        raise ModelError(
            f"{config.path}: layer_types must name full_attention or sliding_attention for each of {num_layers} "
            f"layers; it is {list(types)}."
        )
    if "sliding_attention" in types and window is None:
        raise ModelError(f"{config.path}: layer_types has sliding_attention, but no sliding_window is in force.")
    if family.windows is Windows.ALL and window is not None and "full_attention" in types:
        raise ModelError(
            f"{config.path}: layer_types has full_attention beside sliding_window {window}, but every layer of "
            f"{family.name} has the window."
        )
    if "sliding_attention" not in types:
        return ()
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _head_dim(sizes: Sizes) -> int:
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise ModelError(
            f"config.json: without head_dim, hidden_size {sizes['hidden_size']} must be a multiple of "
            f"the number of heads, {sizes['num_heads']}."
        )
    return sizes["hidden_size"] // sizes["num_heads"]


def _num_heads(sizes: Sizes) -> int:
    return sizes["num_heads"]


def _llama_sizes(
    *, intermediate_size: int, max_positions: int, vocab_size: int, kv_heads: int | None, head_dim: SizeField
) -> Mapping[str, SizeField]:
    return {
        "num_layers": SizeField(names=("num_hidden_layers",), default=32),
        "hidden_size": SizeField(names=("hidden_size",), default=4096),
        "intermediate_size": SizeField(names=("intermediate_size",), default=intermediate_size),
        "num_heads": SizeField(names=("num_attention_heads",), default=32),
        "num_kv_heads": SizeField(names=("num_key_value_heads",), default=kv_heads, derive=_num_heads),
        "head_dim": head_dim,
        "vocab_size": SizeField(names=("vocab_size",), default=vocab_size),
        "max_positions": SizeField(names=("max_position_embeddings",), default=max_positions),
    }


_DERIVED_HEAD_DIM: Final = SizeField(names=("head_dim",), derive=_head_dim)


def _same(*pairs: tuple[str, str], transpose: bool = False) -> tuple[StoredWeight, ...]:
    return tuple(StoredWeight(source=a, targets=(b,), transpose=transpose) for a, b in pairs)


_LLAMA_WEIGHTS: Final = _same(
    ("embed_tokens.weight", "embed.weight"),
    ("layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    ("layers.{i}.self_attn.q_proj.weight", "layers.{i}.q.weight"),
    ("layers.{i}.self_attn.q_proj.bias", "layers.{i}.q.bias"),
    ("layers.{i}.self_attn.k_proj.weight", "layers.{i}.k.weight"),
    ("layers.{i}.self_attn.k_proj.bias", "layers.{i}.k.bias"),
    ("layers.{i}.self_attn.v_proj.weight", "layers.{i}.v.weight"),
    ("layers.{i}.self_attn.v_proj.bias", "layers.{i}.v.bias"),
    ("layers.{i}.self_attn.o_proj.weight", "layers.{i}.o.weight"),
    ("layers.{i}.self_attn.o_proj.bias", "layers.{i}.o.bias"),
    ("layers.{i}.self_attn.q_norm.weight", "layers.{i}.q_norm.weight"),
    ("layers.{i}.self_attn.k_norm.weight", "layers.{i}.k_norm.weight"),
    ("layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm.weight"),
    ("layers.{i}.mlp.gate_proj.weight", "layers.{i}.gate.weight"),
    ("layers.{i}.mlp.gate_proj.bias", "layers.{i}.gate.bias"),
    ("layers.{i}.mlp.up_proj.weight", "layers.{i}.up.weight"),
    ("layers.{i}.mlp.up_proj.bias", "layers.{i}.up.bias"),
    ("layers.{i}.mlp.down_proj.weight", "layers.{i}.down.weight"),
    ("layers.{i}.mlp.down_proj.bias", "layers.{i}.down.bias"),
    ("norm.weight", "norm.weight"),
)

# Linears are Conv1D, stored (inputs, outputs); query, key and value are one.
_GPT2_WEIGHTS: Final = (
    *_same(
        ("wte.weight", "embed.weight"),
        ("wpe.weight", "positions.weight"),
        ("h.{i}.ln_1.weight", "layers.{i}.attention_norm.weight"),
        ("h.{i}.ln_1.bias", "layers.{i}.attention_norm.bias"),
        ("h.{i}.attn.c_proj.bias", "layers.{i}.o.bias"),
        ("h.{i}.ln_2.weight", "layers.{i}.mlp_norm.weight"),
        ("h.{i}.ln_2.bias", "layers.{i}.mlp_norm.bias"),
        ("h.{i}.mlp.c_fc.bias", "layers.{i}.up.bias"),
        ("h.{i}.mlp.c_proj.bias", "layers.{i}.down.bias"),
        ("ln_f.weight", "norm.weight"),
        ("ln_f.bias", "norm.bias"),
    ),
    *_same(
        ("h.{i}.attn.c_proj.weight", "layers.{i}.o.weight"),
        ("h.{i}.mlp.c_fc.weight", "layers.{i}.up.weight"),
        ("h.{i}.mlp.c_proj.weight", "layers.{i}.down.weight"),
        transpose=True,
    ),
    StoredWeight(
        source="h.{i}.attn.c_attn.weight",
        targets=("layers.{i}.q.weight", "layers.{i}.k.weight", "layers.{i}.v.weight"),
        transpose=True,
    ),
    StoredWeight(
        source="h.{i}.attn.c_attn.bias",
        targets=("layers.{i}.q.bias", "layers.{i}.k.bias", "layers.{i}.v.bias"),
    ),
)

_ROTARY_TABLES: Final = (r".*rotary_emb\.inv_freq",)  # saved by old versions of transformers; recomputed
_CAUSAL_MASKS: Final = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)

FAMILIES: Final = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
        sizes=_llama_sizes(
            intermediate_size=11008, max_positions=2048, vocab_size=32000, kv_heads=None, head_dim=_DERIVED_HEAD_DIM
        ),
        norm=NormKind.RMS,
        norm_eps=("rms_norm_eps", 1e-6),
        mlp=MlpKind.GATED,
        activation=("hidden_act", "silu"),
        tied=False,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        prefixes=("model.", ""),
        weights=_LLAMA_WEIGHTS,
        ignored=_ROTARY_TABLES,
    ),
    Family(
        name="mistral",
        architectures=("MistralForCausalLM",),
        sizes=_llama_sizes(
            intermediate_size=14336, max_positions=131072, vocab_size=32000, kv_heads=8, head_dim=_DERIVED_HEAD_DIM
        ),
        norm=NormKind.RMS,
        norm_eps=("rms_norm_eps", 1e-6),
        mlp=MlpKind.GATED,
        activation=("hidden_act", "silu"),
        tied=False,
        windows=Windows.ALL,
        window=4096,
        prefixes=("model.", ""),
        weights=_LLAMA_WEIGHTS,
        ignored=_ROTARY_TABLES,
    ),
    Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM",),
        sizes=_llama_sizes(
            intermediate_size=22016, max_positions=32768, vocab_size=151936, kv_heads=32, head_dim=_DERIVED_HEAD_DIM
        ),
        norm=NormKind.RMS,
        norm_eps=("rms_norm_eps", 1e-6),
        mlp=MlpKind.GATED,
        activation=("hidden_act", "silu"),
        tied=False,
        windows=Windows.SOME,
        window=4096,
        qkv_bias=True,
        prefixes=("model.", ""),
        weights=_LLAMA_WEIGHTS,
        ignored=_ROTARY_TABLES,
    ),
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        sizes=_llama_sizes(
            intermediate_size=22016,
            max_positions=32768,
            vocab_size=151936,
            kv_heads=32,
            head_dim=SizeField(names=("head_dim",), default=128),
        ),
        norm=NormKind.RMS,
        norm_eps=("rms_norm_eps", 1e-6),
        mlp=MlpKind.GATED,
        activation=("hidden_act", "silu"),
        tied=False,
        windows=Windows.SOME,
        window=4096,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        prefixes=("model.", ""),
        weights=_LLAMA_WEIGHTS,
        ignored=_ROTARY_TABLES,
    ),
    Family(
        name="gpt2",
        architectures=("GPT2LMHeadModel",),
        sizes={
            "num_layers": SizeField(names=("n_layer", "num_hidden_layers"), default=12),
            "hidden_size": SizeField(names=("n_embd", "hidden_size"), default=768),
            "intermediate_size": SizeField(names=("n_inner",), derive=lambda sizes: 4 * sizes["hidden_size"]),
            "num_heads": SizeField(names=("n_head", "num_attention_heads"), default=12),
            "num_kv_heads": SizeField(derive=_num_heads),
            "head_dim": SizeField(derive=_head_dim),
            "vocab_size": SizeField(names=("vocab_size",), default=50257),
            "max_positions": SizeField(names=("n_positions", "max_position_embeddings"), default=1024),
        },
        norm=NormKind.LAYER,
        norm_eps=("layer_norm_epsilon", 1e-5),
        mlp=MlpKind.PLAIN,
        activation=("activation_function", "gelu_new"),
        tied=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        rotary=False,
        scale_flag="scale_attn_weights",
        must_be={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        prefixes=("transformer.", ""),
        weights=_GPT2_WEIGHTS,
        ignored=_CAUSAL_MASKS,
    ),
)
