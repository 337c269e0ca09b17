"""The shipped test checkpoints: transformers loads them, they are reproducible, their logits are worth comparing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.testing.checkpoints import (
    EOS_ID,
    FAMILIES,
    ROPES,
    RandomTensor,
    draw,
    tiny_checkpoint,
    to_stored,
    uneven_parts,
)

VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    **{f"{family}-tied": {"family": family, "tied": True} for family in FAMILIES},
    **{f"{kind}-{style}": {"rope": ROPES[kind], "config_style": style} for kind in ROPES for style in ("new", "old")},
    "untied-gpt2": {"family": "gpt2", "tied": False},
    "biases": {"overrides": {"attention_bias": True, "mlp_bias": True}},
    "window": {"family": "qwen3", "window": 16},
    "head-dim": {"head_dim": 32, "heads": 6, "kv_heads": 3, "hidden_size": 48},
    "bf16": {"family": "qwen2", "dtype": DType.BFLOAT16},
    "fp16-single": {"dtype": DType.FLOAT16, "shards": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_every_variant_without_a_complaint(variant: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, **VARIANTS[variant])
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    ids = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits[0].float()
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    assert 3 < logits.std() < 9
    assert (best - second).median() > 0.5
    assert (logits.argmax(-1) == ids[0]).float().mean() < 0.2, "the model only repeats its input"
    spec = Checkpoint.open(tmp_path).spec
    assert sum(p.numel() for p in model.parameters()) > 0
    assert spec.num_layers == model.config.num_hidden_layers


def test_equal_arguments_give_equal_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    one, same, other = (tiny_checkpoint(tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    for path in one.iterdir():
        assert path.read_bytes() == (same / path.name).read_bytes()
    weights = [path.name for path in one.glob("*.safetensors")]
    assert len(weights) == 3
    assert all((one / name).read_bytes() != (other / name).read_bytes() for name in weights)


def test_files_are_of_uneven_size_and_the_cut_does_not_change_the_weights(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "three", layers=2)
    tiny_checkpoint(tmp_path / "one", layers=2, shards=1)
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())["weight_map"]
    sizes = [list(index.values()).count(name) for name in sorted(set(index.values()))]
    assert len(set(sizes)) == 3
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("three", "one")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


@pytest.mark.parametrize("num_parts", range(1, 8))
def test_uneven_parts_cover_all_in_order_and_none_is_empty(num_parts: int) -> None:
    for size in range(num_parts, 20):
        tensors = [RandomTensor(name=str(i), shape=(1,), std=1.0) for i in range(size)]
        parts = uneven_parts(tensors, num_parts)
        assert [tensor for part in parts for tensor in part] == tensors
        assert all(parts)


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    values = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    values = np.concatenate([values, np.array([0.0, -0.0, 1.00390625, 1.01171875, 1e38, -1e-38], np.float32)])
    ours = torch.from_numpy(to_stored(values, DType.BFLOAT16).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours, torch.from_numpy(values).to(torch.bfloat16))


def test_large_tensors_are_drawn_in_pieces() -> None:
    tensor = RandomTensor(name="x", shape=(1 << 10, (1 << 9) + 1), std=2.0, mean=1.0)
    pieces = list(draw(tensor, DType.FLOAT32, np.random.default_rng(0)))
    assert [piece.size for piece in pieces] == [1 << 18, 1 << 18, 1 << 10]
    values = np.concatenate(pieces)
    assert abs(float(values.mean()) - 1.0) < 0.03  # ten standard errors of the mean of half a million normals
    assert abs(float(values.std()) - 2.0) < 0.03


def test_the_byte_tokenizer_has_a_token_per_byte_and_a_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint(tmp_path))
    text = "héllo 🙂\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|end|>") == [97, EOS_ID]
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|begin|>[user]hi\n[assistant]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "mamba"}, "family 'mamba' is unknown; there are llama, mistral"),
        ({"family": "gpt2", "kv_heads": 2}, "gpt2 has neither kv_heads"),
        ({"family": "llama", "window": 8}, "llama has no window"),
        ({"config_style": "newer"}, "config_style is 'newer'"),
        ({"shards": 1000}, "tensors cannot lie in 1000 files"),
    ],
)
def test_what_a_family_does_not_have_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_checkpoint(tmp_path, **arguments)
