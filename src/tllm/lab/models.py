"""Models of published shapes with random weights: made on first use where nothing can be downloaded, then kept.

    STATE/lab/models/distilgpt2-float32/      config.json, model.safetensors, a tokenizer

They take the time, the memory and the bytes on the wire of the real ones; what they say is noise. The tokenizer is the
embedded model's, so most of the vocabulary has no text. Weights are drawn tensor by tensor: memory stays small.

This file does not know what is measured with a model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tllm.core.config import state_directory
from tllm.core.errors import ModelError
from tllm.core.types import DType
from tllm.models.repository import EMBEDDED, resolve_model
from tllm.testing.checkpoints import (
    RandomTensor,
    checkpoint_tensors,
    tiny_config,
    write_byte_tokenizer,
    write_config,
    write_random_checkpoint,
)

MAX_FILE_BYTES: Final = 1 << 30
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")


def _llama3(factor: float) -> dict[str, object]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


PRESETS: Final[Mapping[str, Mapping[str, object]]] = {
    "llama-3.2-1b": tiny_config(
        "llama", layers=16, hidden_size=2048, intermediate_size=8192, heads=32, kv_heads=8, head_dim=64,
        vocab_size=128256, max_positions=131072, tied=True, rope=_llama3(32.0), rope_theta=500000.0,
    ),
    "llama-3.2-3b": tiny_config(
        "llama", layers=28, hidden_size=3072, intermediate_size=8192, heads=24, kv_heads=8, head_dim=128,
        vocab_size=128256, max_positions=131072, tied=True, rope=_llama3(32.0), rope_theta=500000.0,
    ),
    "llama-3.1-8b": tiny_config(
        "llama", layers=32, hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, head_dim=128,
        vocab_size=128256, max_positions=131072, tied=False, rope=_llama3(8.0), rope_theta=500000.0,
    ),
    "qwen3-0.6b": tiny_config(
        "qwen3", layers=28, hidden_size=1024, intermediate_size=3072, heads=16, kv_heads=8, head_dim=128,
        vocab_size=151936, max_positions=40960, tied=True, rope_theta=1000000.0,
    ) | {"rms_norm_eps": 1e-6},
    "distilgpt2": tiny_config(
        "gpt2", layers=6, hidden_size=768, heads=12, vocab_size=50257, max_positions=1024,
    ),
    # No published shape: half a gigabyte in bf16, spread evenly over many layers, for tests of what loading takes.
    "tiny-500mb": tiny_config(
        "llama", layers=16, hidden_size=1024, intermediate_size=3840, heads=16, kv_heads=4, head_dim=64,
        vocab_size=8192, max_positions=4096, tied=False,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What lies in a directory now."""

    num_parameters: int
    num_files: int


def find_model(name: str, *, dtype: DType | None = None) -> Path:
    """The directory of a model: whatever `tllm serve` takes, or a preset, which is made with weights of `dtype`
    (None: float32) if it was not before.

    A directory goes before a preset of that name. Raises ModelError.
    """
    if name not in PRESETS or Path(name).is_dir():
        try:
            return resolve_model(name)
        except ModelError as error:
            raise ModelError(f"{error} The lab also makes {', '.join(PRESETS)} with random weights.") from error
    stored = dtype or DType.FLOAT32
    target = state_directory() / "lab" / "models" / f"{name}-{stored}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as unfinished:
            made = Path(unfinished) / "model"
            write_model(made, PRESETS[name], dtype=stored)
            try:
                made.rename(target)
            except OSError:  # another process was faster; equal arguments give equal bytes
                if not target.is_dir():
                    raise
    return target


def write_model(
    out: Path, config: Mapping[str, object], *, dtype: DType, seed: int = 0, max_file_bytes: int = MAX_FILE_BYTES
) -> Written:
    """A random model of this config.json in `out`, which is made if need be. Equal arguments give equal bytes."""
    out.mkdir(parents=True, exist_ok=True)
    complete = dict(config) | {"dtype": dtype.value} | _copy_tokenizer(out)
    write_config(out, complete)
    tensors = list(checkpoint_tensors(complete))
    files = cut_by_bytes(tensors, dtype, max_file_bytes)
    write_random_checkpoint(out, files, dtype=dtype, seed=seed)
    return Written(num_parameters=sum(tensor.num_elements for tensor in tensors), num_files=len(files))


def cut_by_bytes(tensors: Iterable[RandomTensor], dtype: DType, max_bytes: int) -> list[list[RandomTensor]]:
    """Consecutive runs of at most `max_bytes`, save for a single tensor that is larger."""
    files: list[list[RandomTensor]] = [[]]
    used = 0
    for tensor in tensors:
        num_bytes = tensor.num_elements * dtype.num_bytes
        if files[-1] and used + num_bytes > max_bytes:
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += num_bytes
    return files


def _copy_tokenizer(out: Path) -> dict[str, object]:
    """Write the embedded model's tokenizer, or one of bytes where there is none; the ids of its ends."""
    try:
        embedded = resolve_model(EMBEDDED)
    except ModelError:
        write_byte_tokenizer(out)
        return {}
    for name in _TOKENIZER_FILES:
        shutil.copyfile(embedded / name, out / name)
    config = json.loads((embedded / "config.json").read_bytes())
    return {name: config[name] for name in ("bos_token_id", "eos_token_id")}
