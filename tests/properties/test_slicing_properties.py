"""Any cut of any family into stages and ranks gives every element of every tensor to whom it belongs, and only once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.models.config import Config
from tllm.models.headers import StoredTensors, TensorInfo
from tllm.models.slicing import divide, kv_bytes, max_ranks
from tllm.models.spec import ModelSpec, Shard, TensorSlice
from tllm.testing.checkpoints import FAMILIES, checkpoint_tensors, tiny_config


def opened(config: Mapping[str, object]) -> Checkpoint:
    """A checkpoint with the names and shapes that transformers writes, without its files."""
    tensors = {
        tensor.name: TensorInfo(
            file=Path("model.safetensors"), dtype="F32", shape=tensor.shape, offset=0, num_bytes=4 * tensor.num_elements
        )
        for tensor in checkpoint_tensors(config)
    }
    stored = StoredTensors(tensors=tensors, digest=b"")
    return Checkpoint.from_headers(Path("."), Config(path="config.json", fields=config), stored)


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    family = draw(st.sampled_from(FAMILIES))
    kv_heads = draw(st.integers(1, 6))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(1, 3))
    own = {} if family == "gpt2" else {"kv_heads": kv_heads, "head_dim": head_dim}
    config = tiny_config(
        family,
        layers=draw(st.integers(1, 5)),
        heads=heads,
        hidden_size=heads * head_dim if family == "gpt2" else draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(heads, 40)),
        vocab_size=draw(st.integers(heads, 50)),
        max_positions=7,
        tied=draw(st.booleans()),
        **own,
    )
    if family in ("llama", "qwen3"):
        config["attention_bias"] = draw(st.booleans())
    if family == "llama":
        config["mlp_bias"] = draw(st.booleans())
    return opened(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Stages of a checkpoint; the shards of one stage are its ranks in order."""

    checkpoint: Checkpoint
    stages: tuple[tuple[Shard, ...], ...]

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    checkpoint = draw(checkpoints())
    num_layers = checkpoint.spec.num_layers
    inner = draw(st.sets(st.integers(1, num_layers - 1), max_size=num_layers - 1)) if num_layers > 1 else set()
    bounds = [0, *sorted(inner), num_layers]
    stages = []
    for first, last in pairwise(bounds):
        ranks = draw(st.integers(1, max_ranks(checkpoint.spec)))
        stages.append(
            tuple(
                Shard(
                    first_layer=first,
                    last_layer=last,
                    embed=first == 0,
                    head=last == num_layers,
                    rank=rank,
                    ranks=ranks,
                )
                for rank in range(ranks)
            )
        )
    return Cut(checkpoint=checkpoint, stages=tuple(stages))


def region(part: TensorSlice) -> tuple[slice, ...]:
    return (slice(None),) * part.dim + (slice(part.start, part.stop),)


def counts(checkpoint: Checkpoint, parts: Sequence[TensorSlice]) -> dict[str, NDArray[np.int64]]:
    """How often each element of each stored tensor is read."""
    read = {name: np.zeros(info.shape, np.int64) for name, info in checkpoint.tensors.items()}
    for part in parts:
        read[part.source][region(part)] += 1
    return read


DIVIDED = ("q.", "o.weight", "gate.", "up.", "down.weight", "head.")


def is_divided(target: str) -> bool:
    return target.split(".", 2)[-1].startswith(DIVIDED) or target.startswith("head.")


@settings(max_examples=150, deadline=None)
@given(cut=cuts())
def test_ranks_of_a_stage_read_every_element_once_and_replicated_ones_once_each(cut: Cut) -> None:
    for stage in cut.stages:
        by_rank = [cut.checkpoint.slices(shard) for shard in stage]
        targets = {part.target for parts in by_rank for part in parts}
        whole = cut.checkpoint.slices(Shard(first_layer=stage[0].first_layer, last_layer=stage[0].last_layer,
                                            embed=stage[0].embed, head=stage[0].head))  # fmt: skip
        assert targets == {part.target for part in whole}
        for expected in whole:
            parts = [part for parts in by_rank for part in parts if part.target == expected.target]
            read = counts(cut.checkpoint, parts)[expected.source]
            inside = read[region(expected)]
            assert read.sum() == inside.sum(), "something outside of the weight was read"
            if expected.target.endswith(("o.bias", "down.bias")) or is_divided(expected.target):
                assert (inside == 1).all(), expected.target
            elif expected.target.split(".")[-2] in ("k", "v"):
                assert (inside >= 1).all()
                assert inside.sum() == sum(np.prod(part.shape) for part in parts)
                assert len(parts) == len(stage)
            else:
                assert (inside == len(stage)).all(), expected.target


@settings(max_examples=150, deadline=None)
@given(cut=cuts())
def test_stages_read_every_tensor_once_and_tied_embeddings_at_both_ends(cut: Cut) -> None:
    merged = [
        Shard(first_layer=s[0].first_layer, last_layer=s[0].last_layer, embed=s[0].embed, head=s[0].head)
        for s in cut.stages
    ]
    parts = [cut.checkpoint.slices(shard) for shard in merged]
    read = counts(cut.checkpoint, [part for stage in parts for part in stage])
    embedding = cut.checkpoint.sources["embed.weight"].name
    for name, count in read.items():
        ends = 2 if cut.spec.tied and name == embedding and len(cut.stages) > 1 else 1
        assert (count == ends).all(), name

    by_stage = [{part.target for part in stage} for stage in parts]
    for number, targets in enumerate(by_stage):
        first, last = number == 0, number == len(by_stage) - 1
        assert ("embed.weight" in targets) == first
        assert ("norm.weight" in targets) == last
        assert ("head.weight" in targets) == (last and not (cut.spec.tied and first))
        layers = {int(target.split(".")[1]) for target in targets if target.startswith("layers.")}
        assert layers == set(merged[number].layers)


@settings(max_examples=150, deadline=None)
@given(cut=cuts())
def test_every_query_of_a_rank_finds_its_keys_there_in_the_usual_order(cut: Cut) -> None:
    spec = cut.spec
    group = spec.num_heads // spec.num_kv_heads
    for stage in cut.stages:
        divisions = [divide(spec, shard.rank, shard.ranks) for shard in stage]
        assert [h for d in divisions for h in d.query_heads] == list(range(spec.num_heads))
        assert [i for d in divisions for i in d.mlp] == list(range(spec.intermediate_size))
        assert [i for d in divisions for i in d.vocab] == list(range(spec.vocab_size))
        for division in divisions:
            assert division.query_heads
            assert division.mlp
            assert division.vocab
            local_group, rest = divmod(len(division.query_heads), len(division.kv_heads))
            assert rest == 0
            for i, head in enumerate(division.query_heads):
                assert division.kv_heads[i // local_group] == head // group


@settings(max_examples=150, deadline=None)
@given(cut=cuts(), dtype=st.sampled_from(DType))
def test_slices_agree_with_themselves_and_with_the_memory_that_is_promised(cut: Cut, dtype: DType) -> None:
    for stage in cut.stages:
        for shard in stage:
            parts = cut.checkpoint.slices(shard)
            for part in parts:
                stored = cut.checkpoint.tensors[part.source]
                taken = np.zeros(stored.shape, np.uint8)[region(part)]
                assert part.shape == (taken.T.shape if part.transpose else taken.shape)
                assert 0 <= part.start < part.stop <= stored.shape[part.dim]
                assert part.num_bytes == taken.size * 4
            num_elements = sum(int(np.prod(part.shape)) for part in parts)
            assert cut.checkpoint.weight_bytes(shard, dtype) == num_elements * dtype.num_bytes
        # KV: the stage's whole, and once more for each rank beyond the first that shares a kv head.
        kv_heads = sum(len(divide(cut.spec, s.rank, s.ranks).kv_heads) for s in stage)
        per_head = 2 * len(stage[0].layers) * cut.spec.head_dim * 11 * dtype.num_bytes
        assert sum(kv_bytes(cut.spec, shard, 11, dtype) for shard in stage) == kv_heads * per_head
        assert kv_heads == max(cut.spec.num_kv_heads, len(stage))
