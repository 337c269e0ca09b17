"""Every golden number, worked out by the functions that the calculator and the planner use.

A case is a claim, the figure as it is written, with its unit, and how it comes about. Whole numbers must be equal;
others must be the same when they are written with as many digits. Where an early document printed something else, a
comment says what, and why that is wrong. The article is kipply's Transformer Inference Arithmetic (2022).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from tllm.core.units import Quantity, Unit
from tllm.planner.cost import (
    crossover_tokens,
    first_token_s,
    fit_line,
    free_bytes,
    intermediates,
    kv_tokens,
    least_width_per_chip,
    matmul_flop,
    mean_batch_latency_s,
    num_sequences,
    operator_s,
    tokens_of_equal_bytes,
)
from tllm.planner.formats import FORMATS, grouped_bits
from tllm.planner.hardware import PRESETS
from tllm.planner.network import (
    Edge,
    Path,
    break_even_all_reduce_s,
    fitted_edge,
    group_bytes,
    group_messages_s,
    hidden_bytes,
    num_hops,
    required_bytes_per_s,
)
from tllm.planner.pipelines import codec_share, prefill_bytes_per_s, speculative_tpot_s, tokens_per_pass
from tllm.planner.presets import SHAPES

_UNITS = {
    "B": (Unit.BYTES, 1),
    "GB": (Unit.BYTES, 1e9),
    "B/s": (Unit.BYTES_PER_S, 1),
    "GB/s": (Unit.BYTES_PER_S, 1e9),
    "Mb/s": (Unit.BITS_PER_S, 1e6),
    "FLOP": (Unit.FLOP, 1),
    "GFLOP/s": (Unit.FLOP_PER_S, 1e9),
    "s": (Unit.SECONDS, 1),
    "ms": (Unit.SECONDS, 1e-3),
    "µs": (Unit.SECONDS, 1e-6),
    "tokens": (Unit.TOKENS, 1),
    "tok/s": (Unit.TOKENS_PER_S, 1),
    "params": (Unit.PARAMETERS, 1),
    "sequences": (Unit.COUNT, 1),
    "hops": (Unit.COUNT, 1),
    "experts": (Unit.COUNT, 1),
    "outputs": (Unit.COUNT, 1),
    "layers": (Unit.LAYERS, 1),
    "%": (Unit.RATIO, 0.01),
    "times": (Unit.RATIO, 1),
}

A100 = PRESETS["a100-40gb"]
M4, M3_PRO = PRESETS["m4"], PRESETS["m3-pro"]
BF16, FP32, Q4 = FORMATS["bf16"], FORMATS["fp32"], FORMATS["q4_0"]

B52, B260, B13 = SHAPES["kipply-52b"], SHAPES["kipply-260b"], SHAPES["kipply-13b"]
LLAMA_1B, LLAMA_3B, LLAMA_8B, LLAMA_70B = (SHAPES[f"llama-{name}"] for name in ("3.2-1b", "3.2-3b", "3.1-8b", "3-70b"))
QWEN, QWEN_MOE, MIXTRAL = SHAPES["qwen3-0.6b"], SHAPES["qwen3-30b-a3b"], SHAPES["mixtral-8x7b"]
DEEPSEEK, GPT2 = SHAPES["deepseek-v3"], SHAPES["distilgpt2"]

B52_WEIGHTS, B260_WEIGHTS = 2 * 52_000_000_000, 2 * 260_000_000_000  # bytes: the article's round figures
B52_LAYERS = B52.num_layers * B52.layer_params()  # 12 L d^2
B52_KV = B52.kv_bytes_per_token()


def nbytes(value: float) -> Quantity:
    return Quantity(value, Unit.BYTES)


def flop(value: float) -> Quantity:
    return Quantity(value, Unit.FLOP)


def seconds(value: float) -> Quantity:
    return Quantity(value, Unit.SECONDS)


def tokens(value: float) -> Quantity:
    return Quantity(value, Unit.TOKENS)


def tokens_per_s(value: float) -> Quantity:
    return Quantity(value, Unit.TOKENS_PER_S)


def params(value: float) -> Quantity:
    return Quantity(value, Unit.PARAMETERS)


def count(value: float) -> Quantity:
    return Quantity(value, Unit.COUNT)


def ratio(value: float) -> Quantity:
    return Quantity(value, Unit.RATIO)


def rate(bytes_per_s: float | None) -> Quantity:
    assert bytes_per_s is not None
    return Quantity(bytes_per_s, Unit.BYTES_PER_S)


def bits(bytes_per_s: float | None) -> Quantity:
    return rate(bytes_per_s).as_bits()


def forward_s(num_tokens: int, num_gpus: int) -> float:
    """The 52B's layers on as many GPUs as there are, which share weights and arithmetic."""
    return operator_s(
        2 * B52_LAYERS / num_gpus,
        num_tokens * B52.forward_flop / num_gpus,
        bytes_per_s=A100.bytes_per_s,
        flop_per_s=A100.flop_per_s or 0,
    )


def b52_free(num_gpus: int) -> int:
    return free_bytes(memory_bytes=num_gpus * A100.memory, weight_bytes=B52_WEIGHTS)


def weights_s(num_bytes: float, bytes_per_s: float) -> float:
    return operator_s(num_bytes, 0, bytes_per_s=bytes_per_s, flop_per_s=1)


def arithmetic_s(num_flop: float) -> float:
    return operator_s(0, num_flop, bytes_per_s=1, flop_per_s=A100.flop_per_s or 0)


def article_sent_s(num_layers: int, hidden_size: int, batch: int) -> float:
    """The article's volume, which lacks (N - 1) / N: as if ranks were without number."""
    return group_bytes(num_layers, hidden_bytes(batch, hidden_size), 10**12) / A100.link


def slowest_stage(*num_layers: int) -> int:
    """Of Llama-3.2-1B in stages of so many layers, in parameters that a step reads, without the final norm."""
    *others, last = (num * LLAMA_1B.layer_params() for num in num_layers)
    return max(*others, last + LLAMA_1B.head_params)


def prefill_rate(num_hops: int, num_chunks: int) -> Quantity:
    """Links with which 1000 tokens are through 8 stages, 2 s of work in all, within 3 s."""
    return bits(
        prefill_bytes_per_s(
            [0.25] * 8,
            num_bytes=hidden_bytes(1000, 8192),
            num_hops=num_hops,
            num_chunks=num_chunks,
            target_s=3.0,
        )
    )


# Rows of 8192 elements at 16 bit, and milliseconds in all for them to go there and back.
NO_CODEC = {1: 14.06, 4: 29.90, 16: 76.97, 32: 137.06, 64: 262.04}
LZ4 = {1: 18.18, 4: 31.01, 16: 81.02, 32: 142.47, 64: 260.20}
ZLIB = {1: 15.91, 4: 42.56, 16: 109.84, 64: 339.92}
DECODE_STEPS_MS = (5.25, 4.85, 4.14, 4.68, 4.34, 4.60, 4.45, 4.36, 4.03)


def link_fit() -> tuple[float, float]:
    """Seconds, and seconds a row."""
    line = fit_line(list(NO_CODEC), [milliseconds / 1e3 for milliseconds in NO_CODEC.values()])
    return line.intercept, line.slope


def measured_edge() -> Edge:
    """The link of that fit, over bytes there and back."""
    sizes = [2 * hidden_bytes(rows, 8192) for rows in NO_CODEC]
    return fitted_edge(fit_line(sizes, [milliseconds / 1e3 for milliseconds in NO_CODEC.values()]))


def codec_cost(codec: dict[int, float], rows: int) -> Quantity:
    return ratio(codec[rows] / NO_CODEC[rows] - 1)


Case = tuple[str, str, Callable[[], Quantity]]

ARTICLE: tuple[Case, ...] = (
    ("52B: FLOP of a token's k and v", "17,179,869,184 FLOP", lambda: flop(B52.kv_flop)),
    ("52B: KV of a token", "2,097,152 B", lambda: nbytes(B52_KV)),
    ("52B: FLOP of a token's forward", "103,079,215,104 FLOP", lambda: flop(B52.forward_flop)),
    ("52B: 12 L d^2", "51,539,607,552 params", lambda: params(B52_LAYERS)),
    ("52B: one embedding", "536,870,912 params", lambda: params(B52.embed_params)),
    ("52B: all, untied", "52,613,349,376 params", lambda: params(B52.num_params)),
    # The article prints the quotient upside down.
    (
        "A100: crossover",
        "208 tokens",
        lambda: tokens(crossover_tokens(flop_per_s=312e12, bytes_per_s=A100.bytes_per_s)),
    ),
    (
        "A100: arithmetic against links",
        "1,040 outputs",
        lambda: count(least_width_per_chip(flop_per_s=312e12, link_bytes_per_s=A100.link)),
    ),
    ("52B: 208 tokens, 1 GPU", "68.72 ms", lambda: seconds(forward_s(208, 1))),
    ("52B: 1 token, 1 GPU", "68.72 ms", lambda: seconds(forward_s(1, 1))),
    ("52B: 208 tokens, 4 GPUs", "17.18 ms", lambda: seconds(forward_s(208, 4))),
    ("52B: 312 tokens", "103.1 ms", lambda: seconds(forward_s(312, 1))),
    ("52B: 312 tokens, of the crossover's time", "1.5 times", lambda: ratio(forward_s(312, 1) / forward_s(208, 1))),
    ("52B: 416 tokens", "137.4 ms", lambda: seconds(forward_s(416, 1))),
    ("52B: 416 tokens, of the crossover's time", "2.0 times", lambda: ratio(forward_s(416, 1) / forward_s(208, 1))),
    # The article and the reading notes multiply 52e12: the 12 should be a 9.
    ("52B: weights at 16 bit", "104,000,000,000 B", lambda: nbytes(B52_WEIGHTS)),
    # The article and the reading notes have 8000, from KV rounded to 0.002 GB.
    ("52B, 3 GPUs: KV fits", "7,629 tokens", lambda: tokens(kv_tokens(b52_free(3), B52_KV))),
    # They have 4: 8,192 tokens take 17.18e9 B, and 16e9 are free.
    (
        "52B, 3 GPUs: batch at 2048 tokens",
        "3 sequences",
        lambda: count(num_sequences(kv_tokens(b52_free(3), B52_KV), 2048)),
    ),
    # The reading notes ask why it is not 4 x 16: it is 160 less the weights.
    ("52B, 4 GPUs: free", "56,000,000,000 B", lambda: nbytes(b52_free(4))),
    # The article and the reading notes have 23000, which even with 0.002 GB would be 28000.
    ("52B, 4 GPUs: KV fits", "26,702 tokens", lambda: tokens(kv_tokens(b52_free(4), B52_KV))),
    ("52B: reading 208 cached tokens", "0.291 ms", lambda: seconds(weights_s(208 * B52_KV, A100.bytes_per_s))),
    ("52B: KV equals weights", "49,591 tokens", lambda: tokens(tokens_of_equal_bytes(B52_WEIGHTS, B52_KV))),
    ("260B, 16 GPUs: weights", "21.67 ms", lambda: seconds(weights_s(B260_WEIGHTS / 16, A100.bytes_per_s))),
    # The article's line has a stray factor of 2 in it, its result has not.
    ("260B: latency of messages", "2.56 ms", lambda: seconds(group_messages_s(B260.num_layers))),
    ("260B, 1 sequence: volume", "35.0 µs", lambda: seconds(article_sent_s(80, 16384, 1))),
    # The article's text also has 62 ms.
    ("260B, 512 sequences: compute", "53.3 ms", lambda: seconds(arithmetic_s(512 * B260_WEIGHTS / 16))),
    ("260B, 512 sequences: volume", "17.9 ms", lambda: seconds(article_sent_s(80, 16384, 512))),
    (
        "260B, 512 sequences: volume of 16 ranks",
        "16.8 ms",
        lambda: seconds(group_bytes(80, hidden_bytes(512, 16384), 16) / A100.link),
    ),
    ("52B, 4 GPUs, 256 sequences: compute", "21.33 ms", lambda: seconds(arithmetic_s(256 * B52_WEIGHTS / 4))),
    ("52B, 256 sequences: volume", "3.58 ms", lambda: seconds(article_sent_s(64, 8192, 256))),
    ("52B: latency of messages", "2.05 ms", lambda: seconds(group_messages_s(64))),
    ("52B, 512 sequences: volume", "7.16 ms", lambda: seconds(article_sent_s(64, 8192, 512))),
    # The article has 11 %, which no reading of its figures gives.
    (
        "52B, 512 sequences: latency's share of communication",
        "22 %",
        lambda: ratio(group_messages_s(64) / (group_messages_s(64) + article_sent_s(64, 8192, 512))),
    ),
    # The article has 5.4 %: it divides by 1 x 64 where arithmetic's share is 0.57 x 64.
    ("intermediates at d 8192, of matrices", "9.4 %", lambda: ratio(intermediates(8192).of_matrices)),
    ("intermediates at d 8192, of all", "8.6 %", lambda: ratio(intermediates(8192).of_total)),
    # The article has 0.1 %.
    ("attention at d 8192 and 2048 positions", "4.17 %", lambda: ratio(B52.attention_share(2048))),
    ("attention equals the rest at d 8192", "49,152 tokens", lambda: tokens(B52.context_of_equal_flop)),
    # The article has 18.5 and 9.5 for decode, from rounded inputs.
    ("13B decode, 1 GPU", "16.78 ms", lambda: seconds(weights_s(b13_layers(), A100.bytes_per_s))),
    ("13B decode, 2 GPUs", "8.39 ms", lambda: seconds(weights_s(b13_layers() / 2, A100.bytes_per_s))),
    (
        "13B decode, 1 GPU at 90 % of its bandwidth",
        "18.64 ms",
        lambda: seconds(weights_s(b13_layers(), replace(A100, bandwidth_efficiency=0.9).reached_bytes_per_s)),
    ),
    (
        "13B decode, 2 GPUs at 87 % of their bandwidth",
        "9.64 ms",
        lambda: seconds(weights_s(b13_layers() / 2, replace(A100, bandwidth_efficiency=0.87).reached_bytes_per_s)),
    ),
    ("13B: latency of messages", "1.28 ms", lambda: seconds(group_messages_s(40))),
    ("13B measured, 1 GPU", "22.04 ms", lambda: seconds((283.60 - 63.17) / 10 / 1e3)),
    ("13B measured, 2 GPUs", "13.54 ms", lambda: seconds((180.86 - 45.45) / 10 / 1e3)),
    ("13B prefill of 512 from decode, 1 GPU", "48.7 ms", lambda: seconds(22.0e-3 * 512 / reached_crossover())),
    ("13B prefill of 512 from decode, 2 GPUs", "29.9 ms", lambda: seconds(13.5e-3 * 512 / reached_crossover())),
    ("matmul 512 x 5120 x 20480", "344.1 µs", lambda: seconds(arithmetic_s(matmul_flop(512, 5120, 20480)))),
    ("matmul 512 x 5120 x 5120", "86.0 µs", lambda: seconds(arithmetic_s(matmul_flop(512, 5120, 5120)))),
)


def reached_crossover() -> float:
    """Of an A100 that reaches 90 % of its bandwidth: 231 tokens."""
    hardware = replace(A100, bandwidth_efficiency=0.9)
    return crossover_tokens(flop_per_s=hardware.reached_flop_per_s, bytes_per_s=hardware.reached_bytes_per_s)


SHAPE_CASES: tuple[Case, ...] = (
    ("Llama-3.2-1B", "1,235,814,400 params", lambda: params(LLAMA_1B.num_params)),
    ("Llama-3.2-1B: a layer", "60,821,504 params", lambda: params(LLAMA_1B.layer_params())),
    ("Llama-3.2-1B: the head", "262,668,288 params", lambda: params(LLAMA_1B.head_params)),
    ("Llama-3.2-1B: KV of a token", "32,768 B", lambda: nbytes(LLAMA_1B.kv_bytes_per_token())),
    ("Llama-3.2-3B", "3,212,749,824 params", lambda: params(LLAMA_3B.num_params)),
    ("Llama-3.2-3B: KV of a token", "114,688 B", lambda: nbytes(LLAMA_3B.kv_bytes_per_token())),
    ("Llama-3.1-8B", "8,030,261,248 params", lambda: params(LLAMA_8B.num_params)),
    ("Llama-3.1-8B: a step", "7,504,924,672 params", lambda: params(LLAMA_8B.step_params())),
    ("Llama-3.1-8B: KV of a token", "131,072 B", lambda: nbytes(LLAMA_8B.kv_bytes_per_token())),
    ("Llama-3.1-8B: KV of a block", "2,097,152 B", lambda: nbytes(16 * LLAMA_8B.kv_bytes_per_token())),
    ("Llama-3-70B", "70,553,706,496 params", lambda: params(LLAMA_70B.num_params)),
    ("Llama-3-70B: a step", "69,503,033,344 params", lambda: params(LLAMA_70B.step_params())),
    ("Llama-3-70B: KV of a token", "327,680 B", lambda: nbytes(LLAMA_70B.kv_bytes_per_token())),
    ("Llama-3-70B: KV of 8,192 tokens", "2.684 GB", lambda: nbytes(LLAMA_70B.kv_bytes(8192))),
    ("Qwen3-0.6B", "596,049,920 params", lambda: params(QWEN.num_params)),
    # 57,344 B where the head size is derived as d / h: it is given.
    ("Qwen3-0.6B: KV of a token", "114,688 B", lambda: nbytes(QWEN.kv_bytes_per_token())),
    ("Qwen3-0.6B: KV with a derived head size", "57,344 B", lambda: nbytes(derived_heads().kv_bytes_per_token())),
    ("Qwen3-30B-A3B", "30,532,122,624 params", lambda: params(QWEN_MOE.num_params)),
    ("Qwen3-30B-A3B: active", "3,041,867,776 params", lambda: params(QWEN_MOE.active_params())),
    (
        "Qwen3-30B-A3B: active with the embedding",
        "3,353,032,704 params",
        lambda: params(QWEN_MOE.active_params(embedding=True)),
    ),
    ("Qwen3-30B-A3B: experts of 1 token", "8.0 experts", lambda: count(touched(1))),
    ("Qwen3-30B-A3B: experts of 8 tokens", "51.6 experts", lambda: count(touched(8))),
    ("Qwen3-30B-A3B: experts of 32 tokens", "111.8 experts", lambda: count(touched(32))),
    ("Mixtral-8x7B", "46,702,792,704 params", lambda: params(MIXTRAL.num_params)),
    (
        "Mixtral-8x7B: active with the embedding",
        "12,879,925,248 params",
        lambda: params(MIXTRAL.active_params(embedding=True)),
    ),
    ("DeepSeek-V3: latent KV of a token", "70,272 B", lambda: nbytes(DEEPSEEK.kv_bytes_per_token())),
    ("distilgpt2", "81,912,576 params", lambda: params(GPT2.num_params)),
    ("distilgpt2: fp32", "327,650,304 B", lambda: nbytes(GPT2.weight_bytes(FP32))),
    ("distilgpt2: KV of a token", "36,864 B", lambda: nbytes(GPT2.kv_bytes_per_token(4))),
    ("distilgpt2: KV of 22 tokens", "811,008 B", lambda: nbytes(GPT2.kv_bytes(22, 4))),
    ("Llama-3.1-8B: prefill of 1000", "14,222,100,529,152 FLOP", lambda: flop(LLAMA_8B.prefill_flop(1000))),
    ("Llama-3.1-8B decode at 120e9 B/s", "125.1 ms", lambda: seconds(weights_s(LLAMA_8B.step_bytes(BF16), 120e9))),
    (
        "Llama-3.1-8B: two ranks pay below an all-reduce of",
        "0.977 ms",
        lambda: seconds(
            break_even_all_reduce_s(LLAMA_8B.step_bytes(BF16), num_ranks=2, num_layers=32, bytes_per_s=120e9)
        ),
    ),
    # The reading notes have N x d a layer; it is 4 (N - 1) / N x d for each rank.
    ("70B, two ranks: sent for a token", "2,621,440 B", lambda: nbytes(int(group_bytes(80, hidden_bytes(1, 8192), 2)))),
    ("70B: 160 all-reduces of 0.2 ms", "32 ms", lambda: seconds(2 * LLAMA_70B.num_layers * 0.2e-3)),
    ("70B: sent over a boundary of stages", "16,384 B", lambda: nbytes(int(hidden_bytes(1, LLAMA_70B.hidden_size)))),
    # An equal split forgets the head, which is worth 4.32 layers.
    ("Llama-1B, 8 + 8 layers: slowest stage", "749,240,320 params", lambda: params(slowest_stage(8, 8))),
    ("Llama-1B, 10 + 6 layers: slowest stage", "627,597,312 params", lambda: params(slowest_stage(10, 6))),
    ("Llama-1B, 10 + 6 layers: gain", "1.19 times", lambda: ratio(slowest_stage(8, 8) / slowest_stage(10, 6))),
    (
        "Llama-1B: the head's worth",
        "4.32 layers",
        lambda: Quantity(LLAMA_1B.head_params / LLAMA_1B.layer_params(), Unit.LAYERS),
    ),
)


def touched(num_tokens: int) -> float:
    assert QWEN_MOE.experts is not None
    return QWEN_MOE.experts.touched(num_tokens)


def derived_heads():
    return replace(QWEN, head_dim=QWEN.hidden_size // QWEN.num_heads)


NETWORK: tuple[Case, ...] = (
    ("a row at d 8192", "16,384 B", lambda: nbytes(int(hidden_bytes(1, 8192)))),
    ("a row at d 8192, int8 per 32", "8,704 B", lambda: nbytes(int(hidden_bytes(1, 8192, bits_per_element=int8())))),
    ("int8 per 32 makes smaller", "1.88 times", lambda: ratio(16 / int8())),
    # The first performance notes print the doubled payload's 26,214,400 and call 13 MB/s Mb/s.
    ("16,384 B x 8 hops in 10 ms", "13,107,200 B/s", lambda: rate(required_bytes_per_s(8 * 16384, 10e-3))),
    ("16,384 B x 8 hops in 10 ms, in bits", "104.9 Mb/s", lambda: bits(required_bytes_per_s(8 * 16384, 10e-3))),
    # The first roadmap calls these bytes bits: "26 Mbps".
    ("32,768 B x 8 hops in 10 ms", "26,214,400 B/s", lambda: rate(required_bytes_per_s(8 * 32768, 10e-3))),
    ("32,768 B x 8 hops in 10 ms, in bits", "209.7 Mb/s", lambda: bits(required_bytes_per_s(8 * 32768, 10e-3))),
    # The roadmap and the performance notes have 8, which is none of the three.
    ("8 stages, ends on stages", "7 hops", lambda: count(num_hops(8, Path.ENDS))),
    ("8 stages, a ring with the head", "9 hops", lambda: count(num_hops(8, Path.RING))),
    ("8 stages, a star", "16 hops", lambda: count(num_hops(8, Path.STAR))),
    ("16,384 B x 7 hops in 10 ms", "91.8 Mb/s", lambda: bits(required_bytes_per_s(7 * 16384, 10e-3))),
    # Both leave latency out.
    ("1.25 ms a hop, latency 0.5 ms", "174.8 Mb/s", lambda: bits(required_bytes_per_s(16384, 1.25e-3, latency_s=5e-4))),
    ("1.25 ms a hop, latency 1 ms", "524.3 Mb/s", lambda: bits(required_bytes_per_s(16384, 1.25e-3, latency_s=1e-3))),
    # Both call bytes bits: "131 Mbps". It is more than gigabit Ethernet gives.
    (
        "1000 tokens, 8 hops in 1 s",
        "131,072,000 B/s",
        lambda: rate(required_bytes_per_s(8 * hidden_bytes(1000, 8192), 1.0)),
    ),
    (
        "1000 tokens, 8 hops in 1 s, in bits",
        "1,048.6 Mb/s",
        lambda: bits(required_bytes_per_s(8 * hidden_bytes(1000, 8192), 1.0)),
    ),
    # Both name chunks that overlap, and neither says what they are worth.
    ("2 s of work in 3 s, 8 hops, 1 chunk", "1,048.6 Mb/s", lambda: prefill_rate(8, 1)),
    ("2 s of work in 3 s, 8 hops, 4 chunks", "144.2 Mb/s", lambda: prefill_rate(8, 4)),
    ("2 s of work in 3 s, 8 hops, 16 chunks", "65.5 Mb/s", lambda: prefill_rate(8, 16)),
    ("2 s of work in 3 s, 8 hops, 32 chunks", "54.4 Mb/s", lambda: prefill_rate(8, 32)),
    ("2 s of work in 3 s, 7 hops, 16 chunks", "62.7 Mb/s", lambda: prefill_rate(7, 16)),
    # The first roadmap: a ring doubles the speed. It is fewer hops, and the network's part only.
    ("a ring against a star", "1.78 times", lambda: ratio(num_hops(8, Path.STAR) / num_hops(8, Path.RING))),
    # "Twice as small, twice as fast": latency does not shrink.
    ("half the bytes of 1 row save", "12 %", lambda: ratio(codec_share(measured_edge(), 32768, 2))),
    ("half the bytes of 64 rows save", "48 %", lambda: ratio(codec_share(measured_edge(), 64 * 32768, 2))),
    ("fit of the uncompressed rows: latency", "12.77 ms", lambda: seconds(link_fit()[0])),
    ("fit of the uncompressed rows: a row", "3.90 ms", lambda: seconds(link_fit()[1])),
    # Its "MB/s" are MiB/s, of both directions together.
    ("fit of the uncompressed rows: rate", "67.2 Mb/s", lambda: bits(measured_edge().bytes_per_s)),
    ("fit of the uncompressed rows: rate in bytes", "0.00840 GB/s", lambda: rate(measured_edge().bytes_per_s)),
    # "Helps where data is large": it never did; and noise is the wrong thing to compress.
    *(
        (f"lz4, {rows} rows, costs", f"{text} %", lambda rows=rows: codec_cost(LZ4, rows))
        for rows, text in zip(LZ4, ("29.3", "3.7", "5.3", "3.9", "-0.7"), strict=True)
    ),
    *(
        (f"zlib, {rows} rows, costs", f"{text} %", lambda rows=rows: codec_cost(ZLIB, rows))
        for rows, text in zip(ZLIB, ("13.2", "42.3", "42.7", "29.7"), strict=True)
    ),
    ("PP 2, TP 1: the 1B's first token", "1.28 s", lambda: seconds(first_of_20(5.49, 8.04))),
    ("PP 2, TP 2: the 1B's first token", "0.96 s", lambda: seconds(first_of_20(5.66, 7.38))),
    ("PP 2, TP 1: the 3B's first token", "1.95 s", lambda: seconds(first_of_20(2.42, 3.01))),
    # Two ranks cannot be 3.5 times as fast as one: the table must be refused, not averaged.
    ("PP 2, TP 2: the 3B's first token", "0.56 s", lambda: seconds(first_of_20(2.46, 2.51))),
    ("PP 2, TP 2: the 3B's gain", "3.5 times", lambda: ratio(first_of_20(2.42, 3.01) / first_of_20(2.46, 2.51))),
)


def int8() -> float:
    return grouped_bits(8, 32, scale_bits=16)


def first_of_20(with_first: float, without_first: float) -> float:
    return first_token_s(20, tokens_per_s=with_first, decode_tokens_per_s=without_first)


def decode_rate(shape, held) -> float:
    """Tokens a second that the M4's memory allows one stream."""
    return M4.bytes_per_s / shape.step_bytes(held)


QUICK_START: tuple[Case, ...] = (
    ("M4: 1B at 4.5 bits", "172.6 tok/s", lambda: tokens_per_s(decode_rate(LLAMA_1B, Q4))),
    ("M4: 1B at 16 bit", "48.6 tok/s", lambda: tokens_per_s(decode_rate(LLAMA_1B, BF16))),
    ("M4: 8B at 4.5 bits", "28.4 tok/s", lambda: tokens_per_s(decode_rate(LLAMA_8B, Q4))),
    ("M4: 1B at 4.5 bits, reached", "57 %", lambda: ratio(98.10 / decode_rate(LLAMA_1B, Q4))),
    ("M4: 1B at 16 bit, reached", "73 %", lambda: ratio(35.45 / decode_rate(LLAMA_1B, BF16))),
    ("M4: 8B at 4.5 bits, reached", "73 %", lambda: ratio(20.68 / decode_rate(LLAMA_8B, Q4))),
    # The first quick start expects the M4's speed at best; it is slightly above.
    (
        "M4 and M3 Pro: halves of the 1B, no network",
        "53.9 tok/s",
        lambda: tokens_per_s(
            2
            / (
                weights_s(LLAMA_1B.step_bytes(BF16), M4.bytes_per_s)
                + weights_s(LLAMA_1B.step_bytes(BF16), M3_PRO.bytes_per_s)
            )
        ),
    ),
    ("1B: what the network adds to a token", "32.3 ms", lambda: seconds(1 / 16.33 - 1 / 34.54)),
    ("8B: what the network adds to a token", "23.3 ms", lambda: seconds(1 / 11.06 - 1 / 14.91)),
    ("8B at 16 bit", "16.06 GB", lambda: nbytes(LLAMA_8B.weight_bytes(BF16))),
)


EXPERIMENTS: tuple[Case, ...] = (
    ("nine steps", "40.70 ms", lambda: seconds(sum(DECODE_STEPS_MS) / 1e3)),
    # 21.05 mixes a prefill before any warm-up into the rate.
    ("ten tokens, the first included", "21.05 tok/s", lambda: tokens_per_s(10 / (434.26e-3 + 40.70e-3))),
    ("decode alone", "221.1 tok/s", lambda: tokens_per_s(9 / 40.70e-3)),
    # "Because attention is complete": no, because nothing was warm; later a whole request takes 157 ms.
    ("prefill, a token", "33.40 ms", lambda: seconds(434.26e-3 / 13)),
    ("prefill", "4.9 GFLOP/s", lambda: Quantity(GPT2.prefill_flop(13, num_sampled=13) / 434.26e-3, Unit.FLOP_PER_S)),
    ("decode", "35.9 GFLOP/s", lambda: Quantity((GPT2.forward_flop + GPT2.head_flop) / 4.52e-3, Unit.FLOP_PER_S)),
    ("read by a decode step", "324,504,576 B", lambda: nbytes(GPT2.step_bytes(FP32))),
    ("decode, bytes", "71.8 GB/s", lambda: rate(GPT2.step_bytes(FP32) / 4.52e-3)),
    ("a whole request later", "157 ms", lambda: seconds(2.509 / 16)),
    # 414.4, 856.9 and 703.7 count 526 tokens where there are at most 512.
    *(
        (f"16 x 32 tokens in {wall} s", f"{text} tok/s", lambda wall=wall: tokens_per_s(16 * 32 / wall))
        for wall, text in ((2.509, "204.1"), (1.269, "403.5"), (0.614, "833.9"), (0.747, "685.4"))
    ),
    ("tokens that 414.4 a second would be", "526 tokens", lambda: tokens(round(414.4 * 1.269))),
    ("batch 4: gain", "97.7 %", lambda: ratio(2.509 / 1.269 - 1)),
    ("batch 8: gain", "308.6 %", lambda: ratio(2.509 / 0.614 - 1)),
    # The table has service time only, where latency seems to grow with the batch: with the queue it falls.
    ("batch 1: mean latency", "1332.9 ms", lambda: seconds(mean_batch_latency_s(2.509, 16))),
    ("batch 4: mean latency", "793.1 ms", lambda: seconds(mean_batch_latency_s(1.269, 4))),
    ("batch 8: mean latency", "460.5 ms", lambda: seconds(mean_batch_latency_s(0.614, 2))),
    # "Waiting 10 ms costs 12 ms": single runs differ by more than that, in both directions.
    ("batch 1: waiting 10 ms costs", "-246 ms", lambda: seconds(2.263 - 2.509)),
    ("batch 8: waiting 10 ms costs", "133 ms", lambda: seconds(0.747 - 0.614)),
    ("acceptance 0.55, 3 drafted: tokens of a pass", "2.02 tokens", lambda: tokens(tokens_per_pass(0.55, 3))),
    ("acceptance 0.8, 4 drafted: tokens of a pass", "3.36 tokens", lambda: tokens(tokens_per_pass(0.8, 4))),
    (
        "a pass of 105 ms and 50 ms of hops",
        "76.8 ms",
        lambda: seconds(speculative_tpot_s(105e-3 + 50e-3, acceptance=0.55, num_drafted=3)),
    ),
)


def b13_layers() -> int:
    """Bytes of the layers at 16 bit: the article leaves the vocabulary out."""
    return 2 * B13.num_layers * B13.layer_params()


@pytest.mark.parametrize(
    ("text", "work_out"),
    [
        pytest.param(text, work_out, id=claim)
        for claim, text, work_out in (*ARTICLE, *SHAPE_CASES, *NETWORK, *QUICK_START, *EXPERIMENTS)
    ],
)
def test_golden(text: str, work_out: Callable[[], Quantity]):
    number, name = text.split(" ")
    unit, factor = _UNITS[name]
    found = work_out()
    assert found.unit is unit
    if re.fullmatch(r"-?[\d,]+", number) and factor == 1:
        assert found.value == int(number.replace(",", ""))
    else:
        _, _, decimals = number.partition(".")
        assert f"{found.value / factor:.{len(decimals)}f}" == number.replace(",", "")


@pytest.mark.parametrize("latency_ms", [1.25, 1.5, 10.0])
def test_a_hop_whose_latency_takes_the_budget_is_impossible_at_any_rate(latency_ms):
    assert required_bytes_per_s(16384, 1.25e-3, latency_s=latency_ms / 1e3) is None


def test_two_ranks_cannot_gain_as_much_as_the_early_table_says():
    most = 2.0  # a rank does half of the work at best, and sends beside that
    assert first_of_20(2.42, 3.01) / first_of_20(2.46, 2.51) > most


def test_the_early_rates_count_more_tokens_than_requests_may_have():
    assert [round(rate * wall) > 512 for rate, wall in ((414.4, 1.269), (856.9, 0.614), (703.7, 0.747))] == [True] * 3


def test_eight_billion_parameters_at_16_bit_do_not_fit_an_m4_of_16_gb():
    assert LLAMA_8B.weight_bytes(BF16) > M4.memory
    assert free_bytes(memory_bytes=M4.memory, weight_bytes=LLAMA_8B.weight_bytes(BF16)) == 0


def test_bits_and_bytes_cannot_be_added():
    with pytest.raises(TypeError, match="bytes/s and bits/s"):
        rate(13_107_200) + bits(13_107_200)


def test_a_rate_in_bits_is_eight_times_its_bytes():
    assert rate(13_107_200).as_bits() == Quantity(104_857_600, Unit.BITS_PER_S)
    with pytest.raises(TypeError, match="no bytes/s"):
        bits(13_107_200).as_bits()


def test_gb_and_gib_are_told_apart():
    assert nbytes(8192 * LLAMA_70B.kv_bytes_per_token()).text() == "2.684 GB"
    assert nbytes(8192 * LLAMA_70B.kv_bytes_per_token()).binary_text() == "2.5 GiB"
