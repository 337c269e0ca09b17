"""Published shapes by name.

From the models' own configurations; the article's as it counts them: no norms, no biases.

This file does not know machines: those are in hardware.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tllm.core.errors import ConfigError
from tllm.models.spec import NormKind
from tllm.planner.shape import Experts, Latent, Shape


def _gpt(name: str, num_layers: int, hidden_size: int, vocab_size: int) -> Shape:
    """As the article counts: heads of 128, an MLP of four times the width, no norms, no biases."""
    return Shape(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=hidden_size // 128,
        num_kv_heads=hidden_size // 128,
        head_dim=128,
        intermediate_size=4 * hidden_size,
        vocab_size=vocab_size,
        gated=False,
        norm=None,
    )


def _llama(name: str, layers: int, width: int, heads: int, head_dim: int, mlp: int, *, tied: bool = False) -> Shape:
    return Shape(
        name=name,
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=128256,
        tied=tied,
    )


_LLAMA_3_1_8B: Final = _llama("llama-3.1-8b", 32, 4096, 32, 128, 14336)
_QWEN3_06B: Final = Shape(
    name="qwen3-0.6b",
    num_layers=28,
    hidden_size=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,  # twice hidden_size / num_heads
    intermediate_size=3072,
    vocab_size=151936,
    tied=True,
    qk_norm=True,
)

SHAPES: Final = {
    each.name: each
    for each in (
        _llama("llama-3.2-1b", 16, 2048, 32, 64, 8192, tied=True),
        _llama("llama-3.2-3b", 28, 3072, 24, 128, 8192, tied=True),
        _LLAMA_3_1_8B,
        _llama("llama-3-70b", 80, 8192, 64, 128, 28672),
        _QWEN3_06B,
        replace(
            _QWEN3_06B,
            name="qwen3-30b-a3b",
            num_layers=48,
            hidden_size=2048,
            num_heads=32,
            num_kv_heads=4,
            intermediate_size=768,
            tied=False,
            experts=Experts(num_experts=128, per_token=8),
        ),
        replace(_LLAMA_3_1_8B, name="mixtral-8x7b", vocab_size=32000, experts=Experts(num_experts=8, per_token=2)),
        Shape(
            name="deepseek-v3",  # without the layer that predicts a second token, and the router's corrections
            num_layers=61,
            hidden_size=7168,
            num_heads=128,
            num_kv_heads=128,
            head_dim=128,
            intermediate_size=2048,
            vocab_size=129280,
            experts=Experts(num_experts=256, per_token=8, num_shared=1, num_dense_layers=3, dense_size=18432),
            latent=Latent(latent_size=512, rope_size=64, query_rank=1536),
        ),
        Shape(
            name="distilgpt2",
            num_layers=6,
            hidden_size=768,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            intermediate_size=3072,
            vocab_size=50257,
            gated=False,
            tied=True,
            norm=NormKind.LAYER,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            num_positions=1024,
        ),
        _gpt("kipply-52b", 64, 8192, 65536),
        _gpt("kipply-260b", 80, 16384, 65536),
        _gpt("kipply-13b", 40, 5120, 51200),
    )
}


def parse_shape(text: str) -> Shape:
    """A published shape by its name. Raises ConfigError."""
    if text not in SHAPES:
        raise ConfigError(f"{text!r} is no known shape; there are {', '.join(SHAPES)}.")
    return SHAPES[text]
