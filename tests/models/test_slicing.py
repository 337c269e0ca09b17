"""Slices of chosen shards, spelled out. Properties over all shards are in tests/properties."""

from __future__ import annotations

from pathlib import Path

import pytest

from tllm.core.errors import ModelError
from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.models.slicing import divide, kv_bytes, max_ranks
from tllm.models.spec import Shard, TensorSlice
from tllm.testing.checkpoints import tiny_checkpoint


def by_target(checkpoint: Checkpoint, shard: Shard) -> dict[str, TensorSlice]:
    return {part.target: part for part in checkpoint.slices(shard)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Width 64, 8 query heads on 2 kv heads of 8, MLP 144, vocabulary 259, all biases, bf16."""
    directory = tmp_path_factory.mktemp("llama")
    return Checkpoint.open(
        tiny_checkpoint(directory, heads=8, dtype=DType.BFLOAT16, overrides={"attention_bias": True, "mlp_bias": True})
    )


def test_a_middle_stage_has_its_layers_and_neither_end(llama: Checkpoint) -> None:
    targets = by_target(llama, Shard(first_layer=1, last_layer=3, embed=False, head=False))
    assert {name.split(".")[1] for name in targets} == {"1", "2"}
    assert all(name.startswith("layers.") for name in targets)
    assert len(targets) == 2 * (2 + 4 + 4 + 3 + 3)


def test_a_rank_of_two_has_half_of_what_is_divided(llama: Checkpoint) -> None:
    shard = Shard(first_layer=0, last_layer=4, embed=True, head=True, rank=1, ranks=2)
    parts = by_target(llama, shard)

    def cut(target: str) -> tuple[int, int, int, tuple[int, ...]]:
        part = parts[target]
        return part.dim, part.start, part.stop, part.shape

    assert cut("layers.0.q.weight") == (0, 32, 64, (32, 64))
    assert cut("layers.0.q.bias") == (0, 32, 64, (32,))
    assert cut("layers.0.k.weight") == (0, 8, 16, (8, 64))
    assert cut("layers.0.o.weight") == (1, 32, 64, (64, 32))
    assert cut("layers.0.gate.weight") == (0, 72, 144, (72, 64))
    assert cut("layers.0.up.bias") == (0, 72, 144, (72,))
    assert cut("layers.0.down.weight") == (1, 72, 144, (64, 72))
    assert cut("layers.0.mlp_norm.weight") == (0, 0, 64, (64,))
    assert cut("embed.weight") == (0, 0, 259, (259, 64))
    assert cut("head.weight") == (0, 129, 259, (130, 64))
    assert "layers.0.o.bias" not in parts
    assert "layers.0.down.bias" not in parts
    assert parts["layers.0.q.weight"].num_bytes == 32 * 64 * 2


def test_more_ranks_than_kv_heads_share_them(llama: Checkpoint) -> None:
    assert [list(divide(llama.spec, rank, 3).query_heads) for rank in range(3)] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert [list(divide(llama.spec, rank, 3).kv_heads) for rank in range(3)] == [[0], [1], [1]]
    assert [divide(llama.spec, rank, 8).kv_heads.start for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_gpt2s_fused_projection_is_cut_three_times(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, "gpt2"))
    parts = by_target(checkpoint, Shard(first_layer=0, last_layer=1, embed=False, head=False, rank=1, ranks=4))
    for number, name in enumerate("qkv"):
        part = parts[f"layers.0.{name}.weight"]
        assert (part.source, part.dim, part.transpose) == ("transformer.h.0.attn.c_attn.weight", 1, True)
        assert (part.start, part.stop, part.shape) == (64 * number + 16, 64 * number + 32, (16, 64))
        bias = parts[f"layers.0.{name}.bias"]
        assert (bias.dim, bias.start, bias.stop, bias.transpose) == (0, 64 * number + 16, 64 * number + 32, False)
    output = parts["layers.0.o.weight"]
    assert (output.dim, output.start, output.stop, output.shape) == (0, 16, 32, (64, 16))


def test_a_tied_head_alone_reads_the_embedding_and_one_that_embeds_does_not(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, tied=True))
    last = by_target(checkpoint, Shard(first_layer=2, last_layer=4, embed=False, head=True, rank=0, ranks=2))
    assert last["head.weight"].source == "model.embed_tokens.weight"
    assert (last["head.weight"].start, last["head.weight"].stop) == (0, 129)
    both = by_target(checkpoint, Shard(first_layer=0, last_layer=4, embed=True, head=True))
    assert "head.weight" not in both
    assert "embed.weight" in both


def test_kv_memory_is_that_of_the_ranks_own_heads(llama: Checkpoint) -> None:
    shard = Shard(first_layer=1, last_layer=4, embed=False, head=True)
    assert kv_bytes(llama.spec, shard, 100, DType.BFLOAT16) == 2 * 3 * 2 * 8 * 100 * 2
    assert kv_bytes(llama.spec, shard, 100, DType.BFLOAT16) == 100 * llama.spec.kv_bytes_per_position(3, DType.BFLOAT16)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (Shard(first_layer=2, last_layer=5, embed=False, head=True), r"Layers \[2, 5\) are not a run of the model's 4"),
        (Shard(first_layer=3, last_layer=2, embed=False, head=True), r"Layers \[3, 2\) are not"),
        (Shard(first_layer=-1, last_layer=2, embed=True, head=True), r"Layers \[-1, 2\) are not"),
        (Shard(first_layer=0, last_layer=2, embed=True, head=False, rank=2, ranks=2), "Rank 2 is not in a group of 2"),
        (Shard(first_layer=0, last_layer=2, embed=True, head=False, rank=8, ranks=9), "8 attention heads .* 9 ranks"),
    ],
)
def test_a_shard_that_is_no_part_of_the_model_is_refused(llama: Checkpoint, shard: Shard, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        llama.slices(shard)
    assert max_ranks(llama.spec) == 8
