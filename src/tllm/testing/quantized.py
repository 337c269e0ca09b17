"""Tiny random checkpoints with quantized weights, in the layouts of MLX, GPTQ, AWQ and GGUF and in tllm's own.

Each is written from the formats' descriptions, element by element where that is plainest, and independently of how
tllm reads them. What is returned beside the files are the weights that they stand for, spelled out.

This file does not know how tllm reads a checkpoint, nor any framework. Only `write_gguf` needs the `gguf` package.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tllm.core.types import DType
from tllm.testing.checkpoints import tiny_checkpoint, to_stored, write_config, write_safetensors

Floats = NDArray[np.float32]
Weights = dict[str, Floats]  # by the names of the Hugging Face layout
Entry = tuple[str, NDArray[Any]]  # stored dtype, and the array as it lies on disk

METHODS = ("mlx-4", "mlx-8", "gptq-4", "gptq-8", "gptq-4-asymmetric", "gptq-4-ordered", "awq", "tllm-int8")

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantized_checkpoint(
    directory: Path, method: str, *, group: int = 32, source: Path | None = None, **tiny: object
) -> Weights:
    """Write `tiny_checkpoint(**tiny)`, or the plain one at `source`, quantized by one of `METHODS`; all its weights,
    spelled out.

    MLX and tllm quantize the embedding and the head too. All inputs must be multiples of `group`, which is -1 for
    one group to an output. Raises ValueError for a method that does not exist.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; there are {', '.join(METHODS)}")
    config, weights = _plain(directory, source, tiny)
    name, *rest = method.split("-")
    bits = 8 if "8" in rest or "int8" in rest else 4
    entries: dict[str, Entry] = {}
    for key, values in list(weights.items()):
        is_end = "embed" in key or "lm_head" in key
        if values.ndim < 2 or (is_end and name in ("gptq", "awq")):
            entries[key] = ("F16", values.astype("<f2"))
            weights[key] = values.astype("<f2").astype("<f4")
            continue
        base = key.removesuffix(".weight")
        match name:
            case "mlx":
                made, weights[key] = _mlx(values, bits, group)
            case "gptq":
                made, weights[key] = _gptq(values, bits, group, "asymmetric" in rest, "ordered" in rest)
            case "awq":
                made, weights[key] = _awq(values, group)
            case _:
                made, weights[key] = _per_output(values)
        entries |= {f"{base}.{part}": entry for part, entry in made.items()}
    write_config(directory, dict(config) | {"dtype": "float16"} | _section(name, bits, group, rest))
    _write(directory / "model.safetensors", entries)
    return weights


def plain_twin(directory: Path, quantized: Path, weights: Mapping[str, Floats]) -> Path:
    """The same model with all weights plain in float32: what a quantized checkpoint's answers are near to."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in quantized.iterdir():
        if path.suffix == ".json" and path.name != "config.json":
            (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((quantized / "config.json").read_text())
    for name in ("quantization", "quantization_config"):
        config.pop(name, None)
    write_config(directory, config)
    _write(directory / "model.safetensors", {name: ("F32", values.astype("<f4")) for name, values in weights.items()})
    return directory


def write_gguf(
    path: Path,
    *,
    types: Mapping[str, str] | str = "Q8_0",
    tokenizer: Mapping[str, object] | None = None,
    values: Mapping[str, object] | None = None,
    extra: Mapping[str, Floats] | None = None,
    source: Path | None = None,
    **tiny: object,
) -> tuple[Path, Weights]:
    """Write `tiny_checkpoint(**tiny)` of a llama, qwen2 or qwen3, or the plain one at `source`, as a GGUF file, and as
    a directory in float32 beside it, named as the file without its suffix; that directory, and the weights.

    `types` are the types of matrices, one for all or by parts of their GGUF names (the first that fits; "" fits all);
    blocks that the package cannot make are random bytes. `tokenizer` has values under tokenizer.*, `values` any
    others, `extra` more tensors. Returned weights are what the `gguf` package makes of the file.
    """
    import gguf

    plain = path.with_suffix("")
    config, weights = _plain(plain, source, tiny)
    architecture = str(config["model_type"])
    generator = np.random.default_rng(7)
    said = dict(values or {})
    writer = gguf.GGUFWriter(path, str(said.pop("general.architecture", architecture)))
    for key, value in (_gguf_numbers(config) | dict(tokenizer or {}) | said).items():
        _add_value(writer, key, value)
    num_heads, num_kv_heads = int(str(config["num_attention_heads"])), int(str(config["num_key_value_heads"]))
    for key, stored in list(weights.items()):
        name = _gguf_name(key)
        heads = {"attn_q": num_heads, "attn_k": num_kv_heads}.get(name.split(".")[-2], 0)
        if architecture != "llama":
            heads = 0
        kind = "F32"
        if stored.ndim == 2:
            kind = types if isinstance(types, str) else next(kind for part, kind in types.items() if part in name)
        data, back = _gguf_blocks(_interleave(stored, heads), kind, generator)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        weights[key] = _deinterleave(back, heads)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for old in [*plain.glob("*.safetensors"), *plain.glob("*.index.json")]:
        old.unlink()
    _write(plain / "model.safetensors", {name: ("F32", array.astype("<f4")) for name, array in weights.items()})
    return plain, weights


def gguf_tokenizer(directory: Path, pre: str) -> dict[str, object]:
    """The values under tokenizer.* for a directory's byte-level tokenizer.json; `pre` names how it divides text."""
    content = json.loads((directory / "tokenizer.json").read_text())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    added = {token["content"]: token for token in content["added_tokens"]}
    vocab: dict[str, int] = content["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    tokens = sorted(vocab, key=vocab.__getitem__)
    values: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1 if t not in added else 3 if added[t]["special"] else 4 for t in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]],
    }
    for name in ("bos", "eos"):
        token = config.get(f"{name}_token")
        if token is not None:
            values[f"tokenizer.ggml.{name}_token_id"] = vocab[token if isinstance(token, str) else token["content"]]
    if "chat_template" in config:
        values["tokenizer.chat_template"] = config["chat_template"]
    return values


def _plain(directory: Path, source: Path | None, tiny: Mapping[str, object]) -> tuple[dict[str, object], Weights]:
    """A plain checkpoint's files but for the weights in `directory`; its config, and its weights in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        made = source or tiny_checkpoint(Path(scratch), **{**tiny, "dtype": DType.FLOAT32})  # type: ignore[arg-type]
        weights: Weights = {}
        for path in sorted(made.glob("*.safetensors")):
            weights |= _read(path)
        directory.mkdir(parents=True, exist_ok=True)
        for path in made.glob("*.json"):
            if not path.name.endswith(".index.json"):
                (directory / path.name).write_bytes(path.read_bytes())
    config: dict[str, object] = json.loads((directory / "config.json").read_text())
    return config, weights


def _read(path: Path) -> Weights:
    """A safetensors file in float32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    weights = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
            array = np.frombuffer(data[start + begin : start + end], kind).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                array = (array.astype("<u4") << 16).view("<f4")
            weights[name] = array.astype("<f4")
    return weights


def _write(path: Path, entries: Mapping[str, Entry]) -> None:
    names = [(name, stored, array.shape) for name, (stored, array) in entries.items()]
    write_safetensors(path, names, ([np.ascontiguousarray(array)] for _, array in entries.values()))


def _section(name: str, bits: int, group: int, rest: Iterable[str]) -> dict[str, object]:
    match name:
        case "mlx":
            return {"quantization": {"group_size": group, "bits": bits}}
        case "tllm":
            return {"quantization": {"group_size": None, "bits": 8, "mode": "symmetric"}}
        case "gptq":
            ordered, symmetric = "ordered" in rest, "asymmetric" not in rest
            gptq = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered, "sym": symmetric}
            return {"quantization_config": gptq}
        case _:
            awq = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
            return {"quantization_config": awq}


def _affine(values: Floats, bits: int, group: int) -> tuple[NDArray[np.uint32], Floats, Floats]:
    """Codes (N, K), and scales and offsets (N, K / group), both exact in fp16."""
    groups = values.reshape(len(values), -1, group)
    low, high = groups.min(axis=2), groups.max(axis=2)
    scale = ((high - low) / (2**bits - 1)).astype("<f2").astype("<f4")
    offset = low.astype("<f2").astype("<f4")
    codes = np.rint((groups - offset[:, :, None]) / scale[:, :, None]).clip(0, 2**bits - 1)
    return codes.astype(np.uint32).reshape(values.shape), scale, offset


def _zero_points(values: Floats, bits: int, group: int, symmetric: bool) -> tuple[NDArray[np.uint32], Floats, Floats]:
    """Codes (N, K), scales exact in fp16 and zero points (N, K / group): value = scale * (code - zero)."""
    groups = values.reshape(len(values), -1, group)
    low, high = groups.min(axis=2), groups.max(axis=2)
    if symmetric:
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    scale = ((high - low) / (2**bits - 1)).astype("<f2").astype("<f4")
    middle = np.full_like(scale, 2 ** (bits - 1))
    zero = middle if symmetric else np.rint(-low / scale).clip(1, 2**bits - 1)
    codes = (np.rint(groups / scale[:, :, None]) + zero[:, :, None]).clip(0, 2**bits - 1)
    return codes.astype(np.uint32).reshape(values.shape), scale, zero


def _words(codes: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """32 / bits successive codes of a row to a word, the first lowest."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // per_word), np.uint32)
    for place in range(per_word):
        words |= codes[:, place::per_word] << np.uint32(bits * place)
    return words


def _mlx(values: Floats, bits: int, group: int) -> tuple[dict[str, Entry], Floats]:
    codes, scale, offset = _affine(values, bits, group)
    made = {
        "weight": ("U32", _words(codes, bits)),
        "scales": ("F16", scale.astype("<f2")),
        "biases": ("F16", offset.astype("<f2")),
    }
    return made, codes.astype("<f4") * np.repeat(scale, group, axis=1) + np.repeat(offset, group, axis=1)


def _per_output(values: Floats) -> tuple[dict[str, Entry], Floats]:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(values / scale).clip(-127, 127)
    made: dict[str, Entry] = {
        "weight": ("U32", _words((codes + 128).astype(np.uint32), 8)),
        "scales": ("F32", scale.astype("<f4")),
    }
    return made, codes * scale


def _gptq(values: Floats, bits: int, group: int, asymmetric: bool, ordered: bool) -> tuple[dict[str, Entry], Floats]:
    num_inputs = values.shape[1]
    group = num_inputs if group == -1 else group
    index = np.arange(num_inputs) // group
    if ordered:
        index = np.random.default_rng(3).permutation(index)
    together = np.argsort(index, kind="stable")
    codes, scale, zero = _zero_points(values[:, together], bits, group, not asymmetric)
    codes[:, together] = codes.copy()
    made = {
        "qweight": ("I32", _gptq_words(codes, bits)),
        "scales": ("F16", scale.T.astype("<f2")),
        "qzeros": ("I32", _words((zero.T - 1).astype(np.uint32), bits).view("<i4")),
        "g_idx": ("I32", index.astype("<i4")),
    }
    return made, scale[:, index] * (codes - zero[:, index])


def _gptq_words(codes: NDArray[np.uint32], bits: int) -> NDArray[np.generic]:
    """(K * bits / 32, N): successive codes along the inputs to a word."""
    return np.ascontiguousarray(_words(codes, bits).T).view("<i4")


def _awq(values: Floats, group: int) -> tuple[dict[str, Entry], Floats]:
    group = values.shape[1] if group == -1 else group
    codes, scale, zero = _zero_points(values, 4, group, False)
    made = {
        "qweight": ("I32", _awq_words(codes.T)),
        "scales": ("F16", scale.T.astype("<f2")),
        "qzeros": ("I32", _awq_words(zero.T.astype(np.uint32))),
    }
    return made, np.repeat(scale, group, axis=1) * (codes - np.repeat(zero, group, axis=1))


def _awq_words(columns: NDArray[np.uint32]) -> NDArray[np.generic]:
    words = np.zeros((columns.shape[0], columns.shape[1] // 8), np.uint32)
    for place, column in enumerate(_AWQ_ORDER):
        words |= columns[:, column::8] << np.uint32(4 * place)
    return words.view("<i4")


# --------------------------------------------------------------------------------------------------------- GGUF

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _gguf_name(key: str) -> str:
    module, kind = key.rsplit(".", 1)
    if module in _GGUF_NAMES:
        return f"{_GGUF_NAMES[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"


def _gguf_numbers(config: Mapping[str, object]) -> dict[str, object]:
    names = {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "context_length": "max_position_embeddings",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "rope.dimension_count": "head_dim",
        "vocab_size": "vocab_size",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }
    return {f"{config['model_type']}.{name}": config[field] for name, field in names.items()}


def _add_value(writer: Any, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _interleave(values: Floats, heads: int) -> Floats:
    """Of each head, the rows of both halves in turns: so llama's rotary positions turn neighbours."""
    if not heads:
        return values
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _deinterleave(values: Floats, heads: int) -> Floats:
    if not heads:
        return values
    pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _gguf_blocks(values: Floats, kind: str, generator: np.random.Generator) -> tuple[NDArray[Any], Floats]:
    """As stored, and what the package makes of that."""
    from gguf import GGMLQuantizationType, quants

    if kind == "BF16":
        data: NDArray[np.generic] = to_stored(values, DType.BFLOAT16).view(np.uint8)
        return data, np.asarray(quants.dequantize(data, GGMLQuantizationType.BF16), "<f4").reshape(values.shape)
    if kind in ("F32", "F16"):
        return (half := values.astype("<f4" if kind == "F32" else "<f2")), half.astype("<f4")
    if kind.endswith("_K"):
        data = random_blocks(kind, values.shape[0], values.shape[1], generator)
    else:
        data = quants.quantize(values, GGMLQuantizationType[kind])
    return data, np.asarray(quants.dequantize(data, GGMLQuantizationType[kind]), "<f4").reshape(values.shape)


# Of a block of 256: its bytes, and where its fp16 factors are.
_K_BLOCKS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}


def random_blocks(kind: str, rows: int, columns: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Any bytes are codes; the factors are such that weights are about as large as a model's."""
    num_bytes, factors = _K_BLOCKS[kind]
    blocks = generator.integers(0, 256, (rows, columns // 256, num_bytes), np.uint8)
    size = {"Q4_K": 3e-4, "Q5_K": 1.5e-4, "Q6_K": 1e-4}[kind]
    for at in factors:
        values = (size * generator.uniform(0.5, 1.5, (rows, columns // 256, 1))).astype("<f2")
        if kind != "Q6_K" and at == 2:
            values *= np.float16(7 if kind == "Q4_K" else 15)  # about centred
        blocks[:, :, at : at + 2] = values.view(np.uint8)
    return blocks.reshape(rows, -1)
