"""Opening checkpoints: every weight is found where transformers finds it, and what is wrong is said by name."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tllm.core.errors import ModelError
from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint, end_ids, generation_defaults
from tllm.models.headers import sample_ranges
from tllm.models.spec import Shard, TensorSlice
from tllm.testing.checkpoints import FAMILIES, tiny_checkpoint


def whole(checkpoint: Checkpoint) -> Shard:
    return Shard(first_layer=0, last_layer=checkpoint.spec.num_layers, embed=True, head=True)


def read_slice(checkpoint: Checkpoint, part: TensorSlice) -> NDArray[np.float32]:
    """The array that an engine would load, read from the bytes that the checkpoint points to."""
    info = checkpoint.tensors[part.source]
    assert info.dtype == "F32"
    stored = np.memmap(info.file, "<f4", "r", info.offset, info.shape)
    array = stored[(slice(None),) * part.dim + (slice(part.start, part.stop),)]
    assert array.nbytes == part.num_bytes
    array = array.T if part.transpose else array
    assert array.shape == part.shape
    return np.asarray(array)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def rewrite(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Replace all weight files by one with these tensors."""
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


# Canonical name -> path of the module's parameter within a transformers model, for families of the Llama kind.
LLAMA_PATHS = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
GPT2_PATHS = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}


def transformers_weight(model: torch.nn.Module, family: str, target: str, hidden_size: int) -> torch.Tensor:
    """The parameter of a transformers model that a canonical target stands for, as (outputs, inputs)."""
    name, kind = target.rsplit(".", 1)
    ends = {
        "embed": "transformer.wte" if family == "gpt2" else "model.embed_tokens",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f" if family == "gpt2" else "model.norm",
        "head": "lm_head",
    }
    if name in ends:
        return model.get_parameter(f"{ends[name]}.{kind}")
    _, layer, part = name.split(".")
    if family != "gpt2":
        return model.get_parameter(f"model.layers.{layer}.{LLAMA_PATHS[part]}.{kind}")
    if part in ("q", "k", "v"):
        fused = model.get_parameter(f"transformer.h.{layer}.attn.c_attn.{kind}")
        third = fused.split(hidden_size, dim=-1)["qkv".index(part)]
        return third.T if third.ndim == 2 else third
    parameter = model.get_parameter(f"transformer.h.{layer}.{GPT2_PATHS[part]}.{kind}")
    return parameter.T if parameter.ndim == 2 else parameter


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_hold_the_weights_that_transformers_loads(family: str, tied: bool, shards: int, tmp_path: Path) -> None:
    overrides = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    tiny_checkpoint(tmp_path, family, layers=2, tied=tied, shards=shards, overrides=overrides)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading

    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.spec.tied == tied
    parts = checkpoint.slices(whole(checkpoint))
    assert len({part.target for part in parts}) == len(parts)
    num_elements = 0
    for part in parts:
        theirs = transformers_weight(model, family, part.target, checkpoint.spec.hidden_size).detach().numpy()
        np.testing.assert_array_equal(read_slice(checkpoint, part), theirs)
        num_elements += theirs.size
    assert num_elements == sum(parameter.numel() for parameter in model.parameters())
    assert checkpoint.weight_bytes(whole(checkpoint), DType.BFLOAT16) == 2 * num_elements


def test_opening_reads_only_samples_of_the_weights(tmp_path: Path) -> None:
    before = Checkpoint.open(tiny_checkpoint(tmp_path))
    for path in tmp_path.glob("*.safetensors"):
        infos = [info for info in before.tensors.values() if info.file == path]
        data = path.read_bytes()
        samples = sample_ranges(infos)
        assert sum(map(len, samples)) <= 3 * 64 * len(infos)
        start = 8 + int.from_bytes(data[:8], "little")
        with path.open("r+b") as file:
            file.truncate(start)
            file.truncate(len(data))  # the same size, all zeros
            for part in samples:
                file.seek(part.start)
                file.write(data[part.start : part.stop])
    assert Checkpoint.open(tmp_path) == before


def test_the_fingerprint_is_of_config_headers_and_samples(tmp_path: Path) -> None:
    one = Checkpoint.open(tiny_checkpoint(tmp_path / "a"))
    same = Checkpoint.open(tiny_checkpoint(tmp_path / "b"))
    assert len(one.fingerprint) == 64
    assert one.fingerprint == same.fingerprint
    others = [
        Checkpoint.open(tiny_checkpoint(tmp_path / "c", overrides={"rms_norm_eps": 1e-4})),
        Checkpoint.open(tiny_checkpoint(tmp_path / "d", dtype=DType.BFLOAT16)),
        Checkpoint.open(tiny_checkpoint(tmp_path / "e", shards=2)),
        Checkpoint.open(tiny_checkpoint(tmp_path / "f", seed=1)),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_tensor_of_a_finetune_changes_the_fingerprint(place: float, tmp_path: Path) -> None:
    before = Checkpoint.open(tiny_checkpoint(tmp_path))
    info = before.tensors["model.layers.2.mlp.up_proj.weight"]
    with info.file.open("r+b") as file:
        file.seek(info.offset + int(place * (info.num_bytes - 1)))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert Checkpoint.open(tmp_path).fingerprint != before.fingerprint


@pytest.mark.parametrize("dtype", DType)
def test_the_dtype_is_that_of_most_bytes(dtype: DType, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, dtype=dtype)
    assert Checkpoint.open(tmp_path).dtype is dtype
    tensors = tensors_of(tmp_path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float32)
    assert Checkpoint.open(rewrite(tmp_path, tensors)).dtype is dtype


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_base_models_without_the_outer_prefix_are_the_same(family: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, family, tied=True, shards=1)
    before = Checkpoint.open(tmp_path)
    rewrite(tmp_path, {name.split(".", 1)[1]: tensor for name, tensor in tensors_of(tmp_path).items()})
    after = Checkpoint.open(tmp_path)
    assert after.spec == before.spec
    assert [part.target for part in after.slices(whole(after))] == [p.target for p in before.slices(whole(before))]
    assert after.sources["norm.weight"].name in ("norm.weight", "ln_f.weight")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("qwen2", "model.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.1.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
    ],
)
def test_tables_and_masks_of_old_files_are_left_out(family: str, name: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, family)
    before = Checkpoint.open(tmp_path)
    after = Checkpoint.open(rewrite(tmp_path, tensors_of(tmp_path) | {name: torch.ones(3, dtype=torch.uint8)}))
    assert name not in after.tensors
    assert after.weight_bytes(whole(after), DType.FLOAT32) == before.weight_bytes(whole(before), DType.FLOAT32)


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_used_as_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_checkpoint(tmp_path, tied=True)
    tensors = tensors_of(tmp_path)
    with caplog.at_level(logging.INFO):
        checkpoint = Checkpoint.open(rewrite(tmp_path, tensors | {"lm_head.weight": torch.randn(259, 64)}))
    assert not checkpoint.spec.tied
    assert checkpoint.sources["head.weight"].name == "lm_head.weight"
    assert "lm_head.weight is stored beside the embedding" in caplog.text
    # transformers 5 unties them too, when they differ.
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_tied_embeddings_may_be_stored_under_the_heads_name_alone(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, tied=True)
    tensors = tensors_of(tmp_path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    checkpoint = Checkpoint.open(rewrite(tmp_path, tensors))
    assert checkpoint.spec.tied
    assert checkpoint.sources["embed.weight"] == checkpoint.sources["head.weight"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.model.embed_tokens.weight, tensors["lm_head.weight"])


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    tensors = tensors_of(tmp_path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"the tensor model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        Checkpoint.open(rewrite(tmp_path, tensors))
    del tensors["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight and 1 others are missing"):
        Checkpoint.open(rewrite(tmp_path, tensors))


def test_a_missing_head_is_explained_by_the_flag_that_asks_for_it(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    tensors = tensors_of(tmp_path)
    del tensors["lm_head.weight"]
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing .*\(tie_word_embeddings is false\)"):
        Checkpoint.open(rewrite(tmp_path, tensors))


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight", (32, 64)),
        ("llama", "model.embed_tokens.weight", (259, 64)),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight", (16,)),
        ("qwen2", "model.layers.0.self_attn.v_proj.bias", (32,)),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", (64, 192)),
        ("gpt2", "transformer.h.0.mlp.c_proj.weight", (256, 64)),
        ("gpt2", "transformer.wpe.weight", (128, 64)),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    family: str, name: str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    tiny_checkpoint(tmp_path, family)
    tensors = tensors_of(tmp_path) | {name: torch.zeros(5, 7)}
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(rewrite(tmp_path, tensors))
    assert f"the tensor {name} has shape (5, 7); config.json asks for {expected}" in str(caught.value)


def test_a_tensor_in_a_type_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    tensors = tensors_of(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    with pytest.raises(ModelError, match=f"{name} is stored as I8; supported are F32, BF16, F16"):
        Checkpoint.open(rewrite(tmp_path, tensors))


def test_a_tensor_without_a_use_is_refused_rather_than_left_out(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64), "score.weight": torch.zeros(2)}
    with pytest.raises(ModelError, match=r"q_proj\.bias and 1 others, which a llama with this config\.json has no use"):
        Checkpoint.open(rewrite(tmp_path, tensors_of(tmp_path) | extra))


def test_a_path_that_is_no_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"config\.json is not a JSON object"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ModelError, match="is a file; give the directory"):
        Checkpoint.open(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": [5, 3, 5]}, {"eos_token_id": 1}, (5, 3)),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, (0,)),
        ({}, {"eos_token_id": [1, 2]}, (1, 2)),
        ({"eos_token_id": None}, {"eos_token_id": 1}, (1,)),
        (None, {"eos_token_id": 1}, (1,)),
        (None, {}, ()),
    ],
)
def test_end_ids_come_from_the_generation_config_first(
    generation: dict[str, object] | None, config: dict[str, object], ids: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_ids(tmp_path) == ids


@pytest.mark.parametrize("value", ["</s>", -1, [1, "x"], 2.0, True])
def test_end_ids_that_are_no_ids_are_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ModelError, match="eos_token_id must be a token id or a list of them"):
        end_ids(tmp_path)


def test_generation_defaults_are_those_the_publisher_set(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps(
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1, "min_p": None}
        )
    )
    assert generation_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    path.write_text(json.dumps({"repetition_penalty": 1.1, "min_p": 0.05}))
    assert generation_defaults(tmp_path) == {"repetition_penalty": 1.1, "min_p": 0.05}


def test_a_publisher_who_says_not_to_sample_means_greedy(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    assert generation_defaults(tmp_path)["temperature"] == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature must be between 0.0 and inf, not -1.0"),
        ({"top_p": 1.5}, "top_p must be between 0.0 and 1.0, not 1.5"),
        ({"top_k": -2}, "top_k must be an integer from 0 on, not -2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, not 0"),
        ({"min_p": "x"}, 'min_p must be a number or null, not "x"'),
    ],
)
def test_generation_defaults_out_of_range_are_refused(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError) as caught:
        generation_defaults(tmp_path)
    assert message in str(caught.value)
