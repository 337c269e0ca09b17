"""The torch engine against transformers, family by family: teacher-forced log-probabilities, then greedy tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tllm.core.types import DType, StepResult
from tllm.engines.base import EngineConfig
from tllm.engines.torch.engine import TorchEngine
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard
from tllm.testing.checkpoints import ROPES, tiny_checkpoint
from tllm.testing.stages import Stages, chunk, cut

BLOCK_SIZE = 8
NUM_PROMPT = 70
NUM_TOKENS = 6
TOLERANCE = 1e-4
BLOCKS = [11, 3, 4, 5, 0, 9, 8, 7, 6, 12]  # neither in order nor all apart

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tied": True}),
    "llama one kv head for all": ("llama", {"heads": 8, "kv_heads": 1}),
    "llama no grouping": ("llama", {"heads": 4, "kv_heads": 4}),
    "llama groups of 2": ("llama", {"heads": 8, "kv_heads": 4}),
    "llama heads wider than hidden / heads": ("llama", {"head_dim": 32}),
    "llama heads narrower and odd": ("llama", {"heads": 2, "kv_heads": 1, "head_dim": 10}),
    "llama biases": ("llama", {"overrides": {"attention_bias": True, "mlp_bias": True}}),
    "llama gelu": ("llama", {"overrides": {"hidden_act": "gelu_pytorch_tanh"}}),
    "llama old config": ("llama", {"config_style": "old", "rope": ROPES["llama3"]}),
    "llama one file": ("llama", {"shards": 1}),
    "llama stored in bf16": ("llama", {"dtype": DType.BFLOAT16}),
    "llama stored in fp16": ("llama", {"dtype": DType.FLOAT16}),
    "mistral window shorter than the prompt": ("mistral", {}),
    "mistral window of one block": ("mistral", {"window": 8}),
    "mistral window longer than the prompt": ("mistral", {"window": 100}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied, windowed upper layers": ("qwen2", {"tied": True, "window": 20}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3 tied, windowed": ("qwen3", {"tied": True, "window": 17}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tied": False}),
    **{f"llama rope {name}": ("llama", {"rope": rope}) for name, rope in ROPES.items()},
}


def prompt() -> list[int]:
    return torch.randint(0, 256, (NUM_PROMPT,), generator=torch.Generator().manual_seed(7)).tolist()


def oracle(directory: Path, tokens: list[int]) -> torch.Tensor:
    """(tokens, V) log-probabilities by transformers, in one forward, in fp32."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)


def load(checkpoint: Checkpoint, shard: Shard, dtype: DType = DType.FLOAT32) -> TorchEngine:
    engine = TorchEngine(EngineConfig(shard=shard, dtype=dtype, num_threads=1))
    engine.load(checkpoint, lambda done, total: None)
    return engine


def distributions(result: StepResult, vocab_size: int) -> torch.Tensor:
    (scored,) = result.scored
    rows = torch.full((len(scored.scores), vocab_size), float("nan"), dtype=torch.float64)
    for row, score in enumerate(scored.scores):
        rows[row, [t.token for t in score.top]] = torch.tensor([t.logprob for t in score.top], dtype=torch.float64)
    return rows


@pytest.mark.parametrize(("family", "arguments"), VARIANTS.values(), ids=VARIANTS.keys())
def test_family_equals_transformers(family: str, arguments: Mapping[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, family, **arguments))
    vocab_size, num_layers = checkpoint.spec.vocab_size, checkpoint.spec.num_layers
    tokens = prompt()

    # Three chunks, of which the first two are scored and the last is continued greedily; two stages.
    stages = Stages(
        [load(checkpoint, shard) for shard in cut(num_layers, (1, 3))], num_blocks=13, block_size=BLOCK_SIZE
    )
    pieces = []
    for start, stop in ((0, 29), (29, NUM_PROMPT - 1)):
        targets = tokens[start + 1 : stop + 1]
        part = chunk(1, start, tokens[start:stop], BLOCKS, targets=targets, top=vocab_size)
        pieces.append(distributions(stages.run([part]), vocab_size))
    generated = list(stages.generate(tokens, NUM_TOKENS, blocks=BLOCKS, chunk_size=33))

    expected = oracle(tmp_path, tokens + generated)
    difference = (torch.cat(pieces) - expected[: NUM_PROMPT - 1]).abs().max().item()
    assert difference < TOLERANCE
    rows = expected[NUM_PROMPT - 1 : NUM_PROMPT - 1 + NUM_TOKENS]
    best = rows.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 10 * TOLERANCE, "the checkpoint's margins are too small to tell"
    assert generated == rows.argmax(dim=1).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3"])
def test_bf16_stays_within_a_few_percent_of_fp32(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, family, dtype=DType.BFLOAT16, head_std=2.0))
    tokens = prompt()
    (shard,) = cut(checkpoint.spec.num_layers, (checkpoint.spec.num_layers,))
    stages = Stages([load(checkpoint, shard, DType.BFLOAT16)], num_blocks=13, block_size=BLOCK_SIZE)
    pieces = []
    for start, stop in ((0, 29), (29, 30), (30, NUM_PROMPT - 1)):
        part = chunk(
            1, start, tokens[start:stop], BLOCKS, targets=tokens[start + 1 : stop + 1], top=checkpoint.spec.vocab_size
        )
        pieces.append(distributions(stages.run([part]), checkpoint.spec.vocab_size))
    difference = (torch.cat(pieces) - oracle(tmp_path, tokens)[: NUM_PROMPT - 1]).abs()
    # Eight bits of mantissa through four layers; the spread of the logits is about 2.
    assert difference.mean() < 0.03
    assert difference.max() < 0.3
