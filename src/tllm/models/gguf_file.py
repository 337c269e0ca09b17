"""GGUF files: one file with a model's numbers, tokenizer and weights (github.com/ggml-org/ggml, docs/gguf.md).

    "GGUF"  version u32  number of tensors u64  number of values u64
    value:  key, type u32, content                        a string: length u64, bytes
    tensor: name, number of dims u32, dims u64 (fastest first), type u32, offset u64
    padding to the alignment; the tensors' bytes, at their offsets from here

All of it little-endian. Such a file is opened as if it were a directory in the Hugging Face layout: its values become a
config.json, its tensors have that layout's names. Two things remain of what it is: the block types of quantized
tensors, and, in llama's, rows of queries and keys that lie interleaved.

A file is a stranger's: no count or offset in it is believed before it is compared with the file's size.

This file does not know how blocks become weights, nor tokenizers.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from tllm.core.errors import ModelError
from tllm.models.config import Config
from tllm.models.headers import (
    BLOCKS,
    HeaderFile,
    StoredTensors,
    TensorInfo,
    read_samples,
    store_tensors,
    tensor_bytes,
)
from tllm.models.manifest import MANIFEST_FILE
from tllm.models.quantized import gguf_section

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_TENSORS: Final = 1 << 20
_MAX_DIMS: Final = 4
_NUMBERS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 30: "BF16",
}  # fmt: skip
_SUPPORTED: Final = ("F32", "F16", "BF16", *BLOCKS)
_ARCHITECTURES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ROPE_FACTORS: Final = "rope_freqs.weight"

_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_END_NAME: Final = re.compile(r"(token_embd|output_norm|output)\.(weight|bias)")

# Values of an architecture that say nothing about its answers, or are looked at.
_KNOWN: Final = frozenset(
    {"block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"}
    | {"attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"}
    | {"attention.layer_norm_rms_epsilon", "attention.causal", "rope.dimension_count", "rope.freq_base"}
    | {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"}
    | {"rope.scaling.attn_factor", "rope.scale_linear", "expert_count", "expert_used_count", "tensor_data_layout"}
)

Value = object  # int, float, bool, str, or a list of one kind of them


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """A file's values and tensors, the tensors under their own names."""

    path: Path
    values: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    header: bytes  # all before the tensors' bytes
    num_bytes: int

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "must be a string")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """An integer from 0 on."""
        value = self.values.get(key, default)
        if type(value) is not int or value < 0:
            raise self.wrong(key, "must be an integer from 0 on")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "must be a number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """Empty when absent."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "must be a list of strings")
        return value

    def sizes(self, key: str) -> list[int]:
        """Empty when absent."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.wrong(key, "must be a list of integers")
        return value

    def wrong(self, key: str, what: str) -> ModelError:
        given = f"not {str(self.values[key])[:80]}" if key in self.values else "and is missing"
        return ModelError(f"{self.path}: {key} {what}, {given}.")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path leads to: itself, or the only one of a directory without other weights; else None.

    Raises ModelError for a directory with several.
    """
    if not path.is_dir():
        return path if path.suffix == ".gguf" and path.is_file() else None
    found = sorted(path.glob("*.gguf"))
    if not found or any(path.glob("*.safetensors")) or (path / MANIFEST_FILE).is_file():
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:8])
        raise ModelError(f"{path} has several models: {names}. Give the path of one of these files.")
    return found[0]


def read_gguf(path: Path) -> tuple[Config, StoredTensors]:
    """The model of a file as a config.json and tensors in the Hugging Face layout.

    Raises ModelError for a file that is damaged, and naming the architecture, value or tensor type that is not
    supported.
    """
    header = read_header(path)
    config = Config(path=str(path), fields=_config(header))
    for name, info in header.tensors.items():
        if info.dtype not in _SUPPORTED:
            raise ModelError(f"{path}: {name} is stored as {info.dtype}; supported are {', '.join(_SUPPORTED)}.")
    renamed = {_renamed(name): info for name, info in header.tensors.items() if name != _ROPE_FACTORS}
    file = HeaderFile(path=path, num_bytes=header.num_bytes, header=header.header, tensors=renamed)
    return config, store_tensors(path.parent, {}, [file], read_samples)


def gguf_end_ids(path: Path) -> tuple[int, ...]:
    """The tokens that end a text: those the values name, and control tokens whose text is such an end."""
    header = read_header(path)
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = [header.size(key) for key in keys if key in header.values]
    tokens, kinds = header.texts("tokenizer.ggml.tokens"), header.sizes("tokenizer.ggml.token_type")
    ids += [i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == 3 and token in _END_TEXTS]
    return tuple(dict.fromkeys(ids))


_END_TEXTS: Final = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>"})


def read_header(path: Path) -> GgufHeader:
    """Raises ModelError naming the file and what is wrong with it."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).header()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise ModelError(f"{path} is not a GGUF file: {error}.") from error


class _Parser:
    """Reads on from `_at`."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if self._take(4) != _MAGIC:
            raise ModelError(f"{self._path} is not a GGUF file.")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ModelError(f"{self._path} has version {version} of GGUF; supported are {_VERSIONS}, little-endian.")
        num_tensors, num_values = int(self._number("<Q")), int(self._number("<Q"))
        if num_tensors > _MAX_TENSORS or num_values > _MAX_TENSORS:
            raise ModelError(f"{self._path} is damaged: it claims {num_tensors} tensors and {num_values} values.")
        values = {}
        for _ in range(num_values):
            key = self._text()
            values[key] = self._value(int(self._number("<I")))
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise ModelError(f"{self._path} is damaged: its alignment is {alignment}.")
        start = -(-self._at // alignment) * alignment
        tensors = {name: self._tensor(name, shape, kind, start + offset) for name, shape, kind, offset in entries}
        if len(tensors) < len(entries):
            raise ModelError(f"{self._path} is damaged: two of its tensors have one name.")
        size = len(self._data)
        return GgufHeader(
            path=self._path, values=values, tensors=tensors, header=self._data[: min(start, size)], num_bytes=size
        )

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        dtype = _TYPES.get(kind, f"type {kind}")
        if dtype not in _SUPPORTED:
            return TensorInfo(file=self._path, dtype=dtype, shape=shape, offset=offset, num_bytes=0)
        if dtype in BLOCKS and (not shape or shape[-1] % BLOCKS[dtype][0]):
            raise ModelError(f"{self._path}: {name} has rows that are not whole blocks of {dtype}.")
        num_bytes = tensor_bytes(dtype, shape)
        if offset + num_bytes > len(self._data):
            raise ModelError(f"{self._path} is truncated: {name} ends at byte {offset + num_bytes} of it.")
        return TensorInfo(file=self._path, dtype=dtype, shape=shape, offset=offset, num_bytes=num_bytes)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        num_dims = int(self._number("<I"))
        if num_dims > _MAX_DIMS:
            raise ModelError(f"{self._path} is damaged: {name[:80]} has {num_dims} dims.")
        dims = [int(self._number("<Q")) for _ in range(num_dims)]
        if any(dim > 1 << 40 for dim in dims):
            raise ModelError(f"{self._path} is damaged: {name[:80]} has dims {dims}.")
        return name, tuple(reversed(dims)), int(self._number("<I")), int(self._number("<Q"))

    def _value(self, kind: int) -> Value:
        if kind == _FLOAT32:  # the number that was meant: 1e-5, not what is nearest to it
            return float(str(np.float32(self._number("<f"))))
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            item, count = int(self._number("<I")), int(self._number("<Q"))
            if item in _NUMBERS:
                code = _NUMBERS[item]
                data = self._take(count * struct.calcsize(code))
                return [value for (value,) in struct.iter_unpack(code, data)]
            if item == _STRING:
                return self._texts(count)
        raise ModelError(f"{self._path} is damaged: it has a value of the unknown type {kind}.")

    def _number(self, code: str) -> float:
        value: float = struct.unpack(code, self._take(struct.calcsize(code)))[0]
        return value

    def _text(self) -> str:
        return self._take(int(self._number("<Q"))).decode("utf-8", errors="replace")

    def _texts(self, count: int) -> list[str]:
        """Vocabularies have hundreds of thousands: this is `_text` so many times, and five times as fast."""
        data, at, size = self._data, self._at, len(self._data)
        unpack_from = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            if at + 8 > size:
                break
            start = at + 8
            at = start + unpack_from(data, at)[0]
            if at > size:
                break
            texts.append(data[start:at].decode("utf-8", errors="replace"))
        if len(texts) < count:
            raise ModelError(f"{self._path} is truncated: its header does not end.")
        self._at = at
        return texts

    def _take(self, num_bytes: int) -> bytes:
        start, stop = self._at, self._at + num_bytes
        if stop > len(self._data):
            raise ModelError(f"{self._path} is truncated: its header does not end.")
        self._at = stop
        return self._data[start:stop]


def _renamed(name: str) -> str:
    """By the Hugging Face layout's name, if it is a tensor that has one."""
    if match := _LAYER_NAME.fullmatch(name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_NAMES[part]}.{kind}" if part in _NAMES else name
    if match := _END_NAME.fullmatch(name):
        return f"{_NAMES[match[1]]}.{match[2]}"
    return name


def _config(header: GgufHeader) -> dict[str, object]:
    architecture = header.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ModelError(
            f"{header.path}: the architecture {architecture!r} is not supported in GGUF; supported are "
            f"{', '.join(_ARCHITECTURES)}."
        )
    if header.size("split.count", 1) > 1:
        raise ModelError(f"{header.path} is one part of several; merge them first (llama-gguf-split --merge).")
    prefix = f"{architecture}."
    unknown = sorted(key for key in header.values if key.startswith(prefix) and key.removeprefix(prefix) not in _KNOWN)
    if unknown:
        raise ModelError(f"{header.path}: {', '.join(unknown)} could change the answers and is not supported.")
    if header.size(prefix + "expert_count", 0):
        raise ModelError(f"{header.path} is a mixture of experts, which is not supported.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{header.path} has no token_embd.weight.")
    num_heads, hidden_size = header.size(prefix + "attention.head_count"), header.size(prefix + "embedding_length")
    if num_heads < 1:
        raise header.wrong(prefix + "attention.head_count", "must be a positive integer")
    head_dim = header.size(prefix + "attention.key_length", hidden_size // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if header.size(prefix + name, head_dim) != head_dim:
            raise header.wrong(prefix + name, f"must be the size of a head, {head_dim}")
    fields: dict[str, object] = {
        "model_type": architecture,
        "architectures": [_ARCHITECTURES[architecture]],
        "num_hidden_layers": header.size(prefix + "block_count"),
        "hidden_size": hidden_size,
        "intermediate_size": header.size(prefix + "feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": header.size(prefix + "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": header.size(prefix + "context_length"),
        "rms_norm_eps": header.number(prefix + "attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_theta": header.number(prefix + "rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "quantization_config": gguf_section(interleaved=architecture == "llama"),
    }
    biases = "blk.0.attn_q.bias" in header.tensors
    if architecture == "llama":
        fields |= {"attention_bias": biases, "mlp_bias": "blk.0.ffn_up.bias" in header.tensors}
    elif architecture == "qwen3":
        fields["attention_bias"] = biases
    if any(info.dtype in BLOCKS for info in header.tensors.values()):
        fields["dtype"] = "bfloat16"  # the file does not say; nearly every model was made in it, and none overflows
    if (scaling := _rope_scaling(header, prefix, head_dim)) is not None:
        fields["rope_scaling"] = scaling
    return fields


def _rope_scaling(header: GgufHeader, prefix: str, head_dim: int) -> dict[str, object] | None:
    """Frequencies scaled one by one (llama3's formula, applied when the file was made) become longrope's factors, the
    same for every length of a text."""
    kind = header.text(prefix + "rope.scaling.type") or "none"
    if header.number(prefix + "rope.scale_linear", 1.0) != 1.0:
        raise header.wrong(prefix + "rope.scale_linear", "is not supported")
    if header.number(prefix + "rope.scaling.attn_factor", 1.0) != 1.0:
        raise header.wrong(prefix + "rope.scaling.attn_factor", "is not supported")
    factors = header.tensors.get(_ROPE_FACTORS)
    if factors is not None:
        if kind != "none" or factors.dtype != "F32" or factors.shape != (head_dim // 2,):
            raise ModelError(f"{header.path}: {_ROPE_FACTORS} must be {head_dim // 2} numbers in F32 without scaling.")
        values = np.fromfile(header.path, "<f4", head_dim // 2, offset=factors.offset).tolist()
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": values,
            "long_factor": values,
        }
    match kind:
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": header.number(prefix + "rope.scaling.factor")}
        case "yarn":
            return {
                "rope_type": "yarn",
                "factor": header.number(prefix + "rope.scaling.factor"),
                "original_max_position_embeddings": header.size(prefix + "rope.scaling.original_context_length"),
            }
        case _:
            raise header.wrong(prefix + "rope.scaling.type", "must be none, linear or yarn")
