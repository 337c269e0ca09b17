"""Write a model of a published shape with random weights, to serve and to measure where nothing can be downloaded.

    python scripts/make_checkpoint.py llama-3.2-1b --out /tmp/llama-1b
    tllm serve /tmp/llama-1b

It takes the time, the memory and the bytes on the wire of the real one; what it says is noise. The tokenizer is the
embedded model's, so most of the vocabulary has no text. Weights are drawn tensor by tensor: memory stays small.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

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

DTYPES = {"bf16": DType.BFLOAT16, "fp16": DType.FLOAT16, "fp32": DType.FLOAT32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def llama3(factor: float) -> dict[str, object]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


PRESETS: Mapping[str, Mapping[str, object]] = {
    "llama-3.2-1b": tiny_config(
        "llama", layers=16, hidden_size=2048, intermediate_size=8192, heads=32, kv_heads=8, head_dim=64,
        vocab_size=128256, max_positions=131072, tied=True, rope=llama3(32.0), rope_theta=500000.0,
    ),
    "llama-3.2-3b": tiny_config(
        "llama", layers=28, hidden_size=3072, intermediate_size=8192, heads=24, kv_heads=8, head_dim=128,
        vocab_size=128256, max_positions=131072, tied=True, rope=llama3(32.0), rope_theta=500000.0,
    ),
    "llama-3.1-8b": tiny_config(
        "llama", layers=32, hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, head_dim=128,
        vocab_size=128256, max_positions=131072, tied=False, rope=llama3(8.0), rope_theta=500000.0,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-file-bytes", type=int, default=1 << 30, help="a new file is begun beyond that")
    arguments = parser.parse_args()
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"{arguments.out} exists already and is not an empty directory")

    started = time.monotonic()
    dtype = DTYPES[arguments.dtype]
    arguments.out.mkdir(parents=True, exist_ok=True)
    ends = copy_tokenizer(arguments.out)
    config = dict(PRESETS[arguments.preset]) | {"dtype": dtype.value} | ends
    write_config(arguments.out, config)
    tensors = list(checkpoint_tensors(config))
    files = cut_by_bytes(tensors, dtype, arguments.max_file_bytes)
    write_random_checkpoint(arguments.out, files, dtype=dtype, seed=arguments.seed)
    num_elements = sum(tensor.num_elements for tensor in tensors)
    print(
        f"{arguments.out}: {arguments.preset}, {num_elements:,} parameters, "
        f"{num_elements * dtype.num_bytes / 1e9:.2f} GB of {dtype} in {len(files)} files, "
        f"{time.monotonic() - started:.0f} s"
    )


def copy_tokenizer(out: Path) -> dict[str, object]:
    """Write the embedded model's tokenizer, or one of bytes where there is none; the ids of its ends."""
    try:
        embedded = resolve_model(EMBEDDED)
    except ModelError:
        write_byte_tokenizer(out)
        return {}
    for name in TOKENIZER_FILES:
        shutil.copyfile(embedded / name, out / name)
    config = json.loads((embedded / "config.json").read_bytes())
    return {name: config[name] for name in ("bos_token_id", "eos_token_id")}


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


if __name__ == "__main__":
    main()
