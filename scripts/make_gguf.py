"""Write a Hugging Face checkpoint of the Llama or Qwen3 family as a GGUF file of the same weights, for llama.cpp.

    python scripts/make_gguf.py .bench/llama-3.2-1b --out .bench/llama-3.2-1b.bf16.gguf

Matrices stay in the checkpoint's type, norms become fp32, as llama.cpp's own converter has it. It has no vocabulary:
texts are token ids. llama.cpp itself makes other formats from this file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
_NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_GGML = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_gguf(arguments.checkpoint, arguments.out)


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Written beside its place first, so that a file of that name is whole."""
    config = json.loads((checkpoint / "config.json").read_bytes())
    if config["model_type"] not in _ARCHITECTURES:
        raise SystemExit(f"{checkpoint} is a {config['model_type']}; only {', '.join(_ARCHITECTURES)} can be written")
    architecture = _ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    unfinished = out.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[architecture])
    _add_settings(writer, config)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, stored, values in _tensors(checkpoint):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        if values.ndim == 1:
            writer.add_tensor(target, _float32(values, stored))
            continue
        if config["model_type"] == "llama" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            num_heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            values = _interleaved(values, num_heads)
        bytes_of_rows = np.ascontiguousarray(values).view(np.uint8)
        writer.add_tensor(target, bytes_of_rows, raw_dtype=_GGML[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(out)


def _add_settings(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")


def _rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """What each pair's frequency is divided by; None: nothing. Llama 3's rule, from its reference implementation."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    match rope.get("rope_type", "default"):
        case "default":
            return None
        case "llama3":
            theta = float(rope.get("rope_theta") or config["rope_theta"])
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            factors = []
            for pair in range(config["head_dim"] // 2):
                wavelength = 2 * math.pi * theta ** (2 * pair / config["head_dim"])
                turns = rope["original_max_position_embeddings"] / wavelength
                smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
                factors.append(1.0 / ((1 - smooth) / rope["factor"] + smooth))
            return np.array(factors, dtype=np.float32)
        case other:
            raise SystemExit(f"rope_type {other} cannot be written")


def _tensors(checkpoint: Path) -> Iterator[tuple[str, str, NDArray[np.generic]]]:
    """(name, stored type, values; BF16 as its bit patterns), mapped from the files."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, stop = (start + offset for offset in entry["data_offsets"])
            yield name, entry["dtype"], data[first:stop].view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])


def _float32(values: NDArray[np.generic], stored: str) -> NDArray[np.float32]:
    if stored == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _interleaved(values: NDArray[np.generic], num_heads: int) -> NDArray[np.generic]:
    """Rows of each head in the order 0, n/2, 1, n/2 + 1, ...: llama.cpp turns neighbours, the checkpoint halves."""
    rows, columns = values.shape
    return values.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    main()
