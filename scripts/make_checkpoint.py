"""Write a model of a published shape with random weights, to serve and to measure where nothing can be downloaded.

    python scripts/make_checkpoint.py llama-3.2-1b --out /tmp/llama-1b
    tllm serve /tmp/llama-1b

It takes the time, the memory and the bytes on the wire of the real one; what it says is noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tllm.core.types import DType
from tllm.lab.models import MAX_FILE_BYTES, PRESETS, write_model

DTYPES = {"bf16": DType.BFLOAT16, "fp16": DType.FLOAT16, "fp32": DType.FLOAT32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-file-bytes", type=int, default=MAX_FILE_BYTES, help="a new file is begun beyond that")
    arguments = parser.parse_args()
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"{arguments.out} exists already and is not an empty directory")

    started = time.monotonic()
    dtype = DTYPES[arguments.dtype]
    written = write_model(
        arguments.out,
        PRESETS[arguments.preset],
        dtype=dtype,
        seed=arguments.seed,
        max_file_bytes=arguments.max_file_bytes,
    )
    print(
        f"{arguments.out}: {arguments.preset}, {written.num_parameters:,} parameters, "
        f"{written.num_parameters * dtype.num_bytes / 1e9:.2f} GB of {dtype} in {written.num_files} files, "
        f"{time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
