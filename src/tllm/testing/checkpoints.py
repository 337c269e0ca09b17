"""Tiny random checkpoints of every family, as files that tllm and `transformers` both load.

A checkpoint is made from a config.json in the publishers' own words (HF field and tensor names), independently of
`tllm.models`: a name or shape that the product gets wrong is wrong against this file, not with it.

The scale of the weights is chosen so that a random model is worth testing: attention is neither flat nor one-hot,
every layer changes the residual stream, and the best two logits of a row are rarely closer than 1e-3.
This file does not know how tllm reads a checkpoint, nor any framework.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tllm.core.types import DType

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")

# One example of each rotary scaling for `tiny_checkpoint(rope=...)`, sized for its default of 128 positions.
# Rotated dims are those of the default head_dim, 16; only longrope's lists depend on it.
ROPES: Mapping[str, Mapping[str, object]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.6],
        "long_factor": [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0],
    },
}

BOS_ID, EOS_ID, PAD_ID = 256, 257, 258  # of `write_byte_tokenizer`; ids below are the bytes themselves
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

_STORED = {DType.FLOAT32: "F32", DType.BFLOAT16: "BF16", DType.FLOAT16: "F16"}
_ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4, "I32": 4, "U8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTensor:
    """A tensor of a checkpoint to be drawn: normal with this mean and standard deviation."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def tiny_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    layers: int = 4,
    hidden_size: int = 64,
    intermediate_size: int | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int = 259,
    max_positions: int = 128,
    tied: bool | None = None,
    window: int | None = None,
    rope: Mapping[str, object] | None = None,
    rope_theta: float = 10000.0,
    config_style: str = "new",
    overrides: Mapping[str, object] | None = None,
    shards: int = 3,
    seed: int = 0,
    dtype: DType = DType.FLOAT32,
    head_std: float = 6.0,
    tokenizer: bool = True,
) -> Path:
    """Write a seeded random model of the family to `directory` (made if need be) and return it.

    `None` takes the family's usual value: kv_heads 2 (gpt2: heads), head_dim hidden_size / heads, tied only gpt2, a
    window of 24 in mistral alone. `rope` is one of `ROPES` or the like; `config_style` "new" writes it as
    `rope_parameters` (transformers 5), "old" as `rope_theta` and `rope_scaling`. `overrides` are set in config.json
    last, before weights are drawn, so biases asked for there exist. The weights lie in `shards` files of uneven size
    with an index, or with 1 in a single model.safetensors. `head_std` is about the spread of the logits.
    Equal arguments give equal bytes. Raises ValueError for what the family does not have.
    """
    config = tiny_config(
        family,
        layers=layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_positions=max_positions,
        tied=tied,
        window=window,
        rope=rope,
        rope_theta=rope_theta,
        config_style=config_style,
    )
    config |= {"dtype": dtype.value} | dict(overrides or {})
    directory.mkdir(parents=True, exist_ok=True)
    write_config(directory, config)
    tensors = list(checkpoint_tensors(config, head_std=head_std))
    write_random_checkpoint(directory, uneven_parts(tensors, shards), dtype=dtype, seed=seed)
    if tokenizer:
        write_byte_tokenizer(directory)
    return directory


def tiny_config(
    family: str = "llama",
    *,
    layers: int = 4,
    hidden_size: int = 64,
    intermediate_size: int | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int = 259,
    max_positions: int = 128,
    tied: bool | None = None,
    window: int | None = None,
    rope: Mapping[str, object] | None = None,
    rope_theta: float = 10000.0,
    config_style: str = "new",
) -> dict[str, object]:
    """The config.json of `tiny_checkpoint`, as a publisher would write it."""
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown; there are {', '.join(FAMILIES)}")
    if config_style not in ("new", "old"):
        raise ValueError(f"config_style is {config_style!r}; it may be new or old")
    ends: dict[str, object] = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "vocab_size": vocab_size}
    if family == "gpt2":
        if kv_heads not in (None, heads) or head_dim not in (None, hidden_size // heads) or window or rope:
            raise ValueError("gpt2 has neither kv_heads, head_dim, a window nor rope of its own")
        return ends | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": layers,
            "n_embd": hidden_size,
            "n_inner": intermediate_size,
            "n_head": heads,
            "n_positions": max_positions,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True if tied is None else tied,
        }
    config = ends | {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or 2 * hidden_size + 16,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or min(2, heads),
        "head_dim": head_dim or hidden_size // heads,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": bool(tied),
    }
    if family == "llama":
        if window is not None:
            raise ValueError("llama has no window")
        config |= {"attention_bias": False, "mlp_bias": False}
    elif family == "mistral":
        config["sliding_window"] = 24 if window is None else window
    else:
        # The first half of the layers sees everything, as `max_window_layers` says.
        config |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": layers // 2}
        if family == "qwen3":
            config["attention_bias"] = False
    scaling = dict(rope or ROPES["default"])
    if config_style == "new":
        return config | {"rope_parameters": {"rope_theta": rope_theta} | scaling}
    plain = scaling == ROPES["default"]
    return config | {"rope_theta": rope_theta, "rope_scaling": None if plain else scaling}


def checkpoint_tensors(config: Mapping[str, object], *, head_std: float = 6.0) -> Iterator[RandomTensor]:
    """Every tensor of the model that a config.json describes, in the order of the layers, under its HF name."""
    if config["model_type"] == "gpt2":
        yield from _gpt2_tensors(config, head_std)
    else:
        yield from _llama_tensors(config, head_std)


def _llama_tensors(config: Mapping[str, object], head_std: float) -> Iterator[RandomTensor]:
    family = config["model_type"]
    width, inner, vocab = _int(config, "hidden_size"), _int(config, "intermediate_size"), _int(config, "vocab_size")
    heads, kv_heads, head_dim = (_int(config, k) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    qkv_bias = family == "qwen2" or bool(config.get("attention_bias"))
    tied = bool(config["tie_word_embeddings"])

    def linear(name: str, outputs: int, inputs: int, *, gain: float, bias: bool) -> Iterator[RandomTensor]:
        yield RandomTensor(name=f"{name}.weight", shape=(outputs, inputs), std=gain * inputs**-0.5)
        if bias:
            yield RandomTensor(name=f"{name}.bias", shape=(outputs,), std=0.2)

    def norm(name: str, size: int) -> RandomTensor:
        return RandomTensor(name=f"{name}.weight", shape=(size,), mean=1.0, std=0.1)

    embed_std = head_std * width**-0.5 if tied else 1.0
    yield RandomTensor(name="model.embed_tokens.weight", shape=(vocab, width), std=embed_std)
    for i in range(_int(config, "num_hidden_layers")):
        layer = f"model.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        output_bias = family != "qwen2" and qkv_bias
        mlp_bias = bool(config.get("mlp_bias"))
        yield norm(f"{layer}.input_layernorm", width)
        yield from linear(f"{attention}.q_proj", heads * head_dim, width, gain=1.5, bias=qkv_bias)
        yield from linear(f"{attention}.k_proj", kv_heads * head_dim, width, gain=1.5, bias=qkv_bias)
        yield from linear(f"{attention}.v_proj", kv_heads * head_dim, width, gain=1.5, bias=qkv_bias)
        yield from linear(f"{attention}.o_proj", width, heads * head_dim, gain=1.0, bias=output_bias)
        if family == "qwen3":
            yield norm(f"{attention}.q_norm", head_dim)
            yield norm(f"{attention}.k_norm", head_dim)
        yield norm(f"{layer}.post_attention_layernorm", width)
        yield from linear(f"{mlp}.gate_proj", inner, width, gain=1.5, bias=mlp_bias)
        yield from linear(f"{mlp}.up_proj", inner, width, gain=1.0, bias=mlp_bias)
        yield from linear(f"{mlp}.down_proj", width, inner, gain=1.0, bias=mlp_bias)
    yield _final_norm("model.norm.weight", width, tied)
    if not tied:
        yield RandomTensor(name="lm_head.weight", shape=(vocab, width), std=head_std * width**-0.5)


def _gpt2_tensors(config: Mapping[str, object], head_std: float) -> Iterator[RandomTensor]:
    width, vocab = _int(config, "n_embd"), _int(config, "vocab_size")
    inner = 4 * width if config.get("n_inner") is None else _int(config, "n_inner")
    tied = bool(config["tie_word_embeddings"])

    def conv1d(name: str, inputs: int, outputs: int, *, gain: float) -> Iterator[RandomTensor]:
        yield RandomTensor(name=f"{name}.weight", shape=(inputs, outputs), std=gain * inputs**-0.5)
        yield RandomTensor(name=f"{name}.bias", shape=(outputs,), std=0.2)

    def norm(name: str) -> Iterator[RandomTensor]:
        yield RandomTensor(name=f"{name}.weight", shape=(width,), mean=1.0, std=0.1)
        yield RandomTensor(name=f"{name}.bias", shape=(width,), std=0.1)

    embed_std = head_std * width**-0.5 if tied else 1.0
    yield RandomTensor(name="transformer.wte.weight", shape=(vocab, width), std=embed_std)
    yield RandomTensor(name="transformer.wpe.weight", shape=(_int(config, "n_positions"), width), std=0.5)
    for i in range(_int(config, "n_layer")):
        layer = f"transformer.h.{i}"
        yield from norm(f"{layer}.ln_1")
        yield from conv1d(f"{layer}.attn.c_attn", width, 3 * width, gain=1.5)
        yield from conv1d(f"{layer}.attn.c_proj", width, width, gain=1.0)
        yield from norm(f"{layer}.ln_2")
        yield from conv1d(f"{layer}.mlp.c_fc", width, inner, gain=1.5)
        yield from conv1d(f"{layer}.mlp.c_proj", inner, width, gain=1.0)
    yield _final_norm("transformer.ln_f.weight", width, tied)
    yield RandomTensor(name="transformer.ln_f.bias", shape=(width,), std=0.1)
    if not tied:
        yield RandomTensor(name="lm_head.weight", shape=(vocab, width), std=head_std * width**-0.5)


def _final_norm(name: str, size: int, tied: bool) -> RandomTensor:
    """Tied: signs at random, or the logits would be about the input's own embedding and the model repeat itself."""
    return RandomTensor(name=name, shape=(size,), mean=0.0 if tied else 1.0, std=1.0 if tied else 0.1)


def uneven_parts(tensors: Sequence[RandomTensor], num_parts: int) -> tuple[tuple[RandomTensor, ...], ...]:
    """Consecutive parts whose sizes grow as 1 : 2 : 3 ..., none empty, cut without regard for layers."""
    if not 1 <= num_parts <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors cannot lie in {num_parts} files")
    total = num_parts * (num_parts + 1) // 2
    cuts = [max(i, len(tensors) * (i * (i + 1) // 2) // total) for i in range(num_parts)] + [len(tensors)]
    return tuple(tuple(tensors[a:b]) for a, b in itertools.pairwise(cuts))


def write_random_checkpoint(
    directory: Path, parts: Sequence[Sequence[RandomTensor]], *, dtype: DType, seed: int
) -> None:
    """Draw the tensors and write one safetensors file per part, and an index when there are several.

    Every tensor is drawn from a generator of its own (the seed and its place), so its values do not depend on the
    cut into files. One tensor is in memory at a time.
    """
    single = len(parts) == 1
    weight_map: dict[str, str] = {}
    place = 0
    for number, part in enumerate(parts, start=1):
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(parts):05}.safetensors"
        generators = [np.random.default_rng((seed, place + i)) for i in range(len(part))]
        place += len(part)
        write_safetensors(
            directory / file,
            [(tensor.name, _STORED[dtype], tensor.shape) for tensor in part],
            (draw(tensor, dtype, generator) for tensor, generator in zip(part, generators, strict=True)),
        )
        weight_map |= {tensor.name: file for tensor in part}
    if not single:
        num_bytes = sum(tensor.num_elements for part in parts for tensor in part) * dtype.num_bytes
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def draw(tensor: RandomTensor, dtype: DType, generator: np.random.Generator) -> Iterator[NDArray[np.generic]]:
    """Yield the tensor's values in pieces of at most 256 Ki elements, row-major, as they lie on disk."""
    piece = 1 << 18  # 1 MiB of float32: the passes over it stay in the processor's cache
    for start in range(0, tensor.num_elements, piece):
        size = min(piece, tensor.num_elements - start)
        values = generator.standard_normal(size, dtype=np.float32)
        values *= np.float32(tensor.std)
        values += np.float32(tensor.mean)
        yield to_stored(values, dtype)


def to_stored(values: NDArray[np.float32], dtype: DType) -> NDArray[np.generic]:
    """Round float32 to nearest even in the given type; bfloat16, which numpy lacks, as its uint16 bit pattern."""
    if dtype is DType.BFLOAT16:
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        rounded: NDArray[np.generic] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return rounded
    return values.astype("<f4" if dtype is DType.FLOAT32 else "<f2")


def write_safetensors(
    path: Path,
    entries: Sequence[tuple[str, str, tuple[int, ...]]],
    values: Iterable[Iterable[NDArray[np.generic]]],
) -> None:
    """Write (name, stored dtype, shape) entries and, in the same order, their values in pieces.

    Raises ValueError when the pieces of a tensor do not add up to its size; the file is then incomplete.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes = []
    offset = 0
    for name, stored, shape in entries:
        num_bytes = int(np.prod(shape, dtype=np.int64)) * _ELEMENT_BYTES[stored]
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        sizes.append(num_bytes)
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, _, _), num_bytes, pieces in zip(entries, sizes, values, strict=True):
            written = sum(file.write(piece.data.cast("B")) for piece in pieces)
            if written != num_bytes:
                raise ValueError(f"{name} takes {num_bytes} bytes, but {written} were given")


def write_config(directory: Path, config: Mapping[str, object]) -> None:
    """config.json, and a generation_config.json with the same ends."""
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    (directory / "generation_config.json").write_text(json.dumps(ends, indent=2))


def write_byte_tokenizer(directory: Path) -> None:
    """A tokenizer of one token per byte (id = byte), then begin, end and padding, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Byte-level tokenizers write each byte as one printable character: itself where it has one, else from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    vocab = {chr(byte if byte in printable else next(spare)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|begin|>", "<|end|>", "<|pad|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[0],
        "eos_token": names[1],
        "pad_token": names[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _int(config: Mapping[str, object], key: str) -> int:
    value = config[key]
    assert isinstance(value, int), (key, value)
    return value
