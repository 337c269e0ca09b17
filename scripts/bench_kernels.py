"""How fast the kernels' linears are beside what memory and oneDNN can do.

    python scripts/bench_kernels.py [--threads 2] [--shape 8192x2048] [--rows 1,8,64,512] [--forms bf16,int8,int4-g64]

Weights are streamed from memory: of each form as many as fill --bytes. Prints the best of interleaved repeats: bytes of
weights read in a second, what part of the read bandwidth measured beside it that is, and operations in a second. With
one thread the time is that thread's own, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tllm.engines.torch.kernels import build
from tllm.engines.torch.kernels.linear import KernelLinear, Part

Compute = Callable[[Tensor], Tensor]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def make(form: str, weight_NK: Tensor) -> tuple[Compute, int, torch.dtype]:
    """The product, its bytes, and the type of its rows."""
    if form == "onednn":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK, None)
        linear = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: linear(x, packed, None, "none", [], ""), weight_NK.nbytes, torch.bfloat16
    if form in DTYPES:
        part = Part.plain(weight_NK.to(DTYPES[form]))
        return KernelLinear([part]), part.num_bytes, DTYPES[form]
    bits, _, group = form.removeprefix("int").partition("-g")
    part = Part.quantize(weight_NK, int(bits), int(group) if group else None)
    return KernelLinear([part]), part.num_bytes, torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", default="8192x2048")
    parser.add_argument("--rows", default="1,4,8,16,64,256,512")
    parser.add_argument("--forms", default="onednn,bf16,int8,int8-g128,int4-g64,int4-g32,f32")
    parser.add_argument("--bytes", type=float, default=400e6)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    num_outputs, num_inputs = (int(n) for n in options.shape.split("x"))
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    print(build.status())
    library = build.library()
    assert library is not None
    read = library.tllm_read
    read.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    memory = Part.empty(8192, 16384, torch.bfloat16)  # 268 MB on the pages that weights have
    memory.fill(0, torch.ones(8192, 16384, dtype=torch.bfloat16))

    def seconds(run: Callable[[], object]) -> float:
        started = clock()
        run()
        return clock() - started

    print(f"{'form':10}{'rows':>6}{'us':>9}{'GB/s':>8}{'of read':>9}{'GFLOP/s':>9}")
    weight_NK = torch.randn(num_outputs, num_inputs, dtype=torch.bfloat16)
    for form in options.forms.split(","):
        compute, num_bytes, dtype = make(form, weight_NK)
        computes = [compute, *(make(form, weight_NK)[0] for _ in range(int(options.bytes / num_bytes)))]
        for num_rows in (int(n) for n in options.rows.split(",")):
            x = torch.randn(num_rows, num_inputs).to(dtype)
            used = computes if num_rows < 64 else computes[:3]

            def products(used: list[Compute] = used, x: Tensor = x) -> None:
                for compute in used:
                    compute(x)

            times, reads = [], []
            with torch.inference_mode():
                for _ in range(options.repeats):
                    reads.append(seconds(lambda: read(memory.struct.weight, 1 << 28)))
                    times.append(seconds(products) / len(used))
            best, bandwidth = min(times), (1 << 28) / min(reads)
            rate, flops = num_bytes / best, 2 * num_rows * num_outputs * num_inputs / best
            print(
                f"{form:10}{num_rows:6}{best * 1e6:9.0f}{rate / 1e9:8.1f}{rate / bandwidth:9.2f}{flops / 1e9:9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
