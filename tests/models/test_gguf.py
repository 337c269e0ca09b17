"""GGUF files: opened like a directory in the Hugging Face layout, every weight as the `gguf` package spells it out."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.test_quantized import Reader, read_piece, stored_name, whole
from tllm.core.errors import ModelError
from tllm.core.types import DType, Quantization
from tllm.models.checkpoint import Checkpoint, end_ids, generation_defaults
from tllm.models.layouts import BLOCK_FORMATS
from tllm.models.manifest import Manifest
from tllm.models.repository import find_local, resolve_model
from tllm.models.rope import inverse_frequencies
from tllm.models.spec import Rope, RopeKind, Shard
from tllm.testing.quantized import write_gguf

SMALL = {"layers": 2, "hidden_size": 64, "intermediate_size": 96, "heads": 4, "head_dim": 16, "kv_heads": 2}
LARGE = {"layers": 1, "hidden_size": 256, "intermediate_size": 512, "heads": 4, "head_dim": 64, "kv_heads": 2}


def assert_weights_are(checkpoint: Checkpoint, weights: dict[str, Any], shard: Shard) -> None:
    pieces = checkpoint.slices(shard)
    if shard.ranks == 1:
        assert {stored_name(piece.target) for piece in pieces} == set(weights)
    for piece in pieces:
        expected = weights[stored_name(piece.target)]
        expected = expected[(slice(None),) * piece.dim + (slice(piece.start, piece.stop),)]
        np.testing.assert_array_equal(read_piece(checkpoint, piece), expected, err_msg=piece.target)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *BLOCK_FORMATS])
def test_every_type_of_blocks_reads_back_as_the_package_has_it(kind: str, tmp_path: Path) -> None:
    sizes = LARGE if kind.endswith("_K") else SMALL
    twin, weights = write_gguf(tmp_path / "model.gguf", types=kind, **sizes)
    checkpoint = Checkpoint.open(tmp_path / "model.gguf")
    assert checkpoint.spec == Checkpoint.open(twin).spec
    assert_weights_are(checkpoint, weights, whole(checkpoint))
    assert checkpoint.quantized("layers.0.q.weight") == BLOCK_FORMATS.get(kind)
    assert checkpoint.dtype is {"F32": DType.FLOAT32, "F16": DType.FLOAT16}.get(kind, DType.BFLOAT16)
    for rank in range(2):
        shard = Shard(first_layer=0, last_layer=1, embed=True, head=True, rank=rank, ranks=2)
        assert_weights_are(checkpoint, weights, shard)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_architecture_is_the_model_it_was_made_from(family: str, tied: bool, tmp_path: Path) -> None:
    twin, weights = write_gguf(tmp_path / "model.gguf", family=family, tied=tied, types="Q8_0", **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "model.gguf")
    assert checkpoint.spec == Checkpoint.open(twin).spec
    assert checkpoint.spec.tied == tied
    assert_weights_are(checkpoint, weights, whole(checkpoint))


def test_biases_of_interleaved_projections_come_in_order_too(tmp_path: Path) -> None:
    biases = {"attention_bias": True, "mlp_bias": True}
    twin, weights = write_gguf(tmp_path / "model.gguf", types="Q4_0", overrides=biases, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "model.gguf")
    assert checkpoint.spec == Checkpoint.open(twin).spec
    assert_weights_are(checkpoint, weights, whole(checkpoint))


def test_runs_of_interleaved_rows_are_the_same_as_all_rows(tmp_path: Path) -> None:
    for kind in ("F16", "Q5_0"):
        write_gguf(tmp_path / f"{kind}.gguf", types=kind, **SMALL)
        checkpoint = Checkpoint.open(tmp_path / f"{kind}.gguf")
        piece = next(piece for piece in checkpoint.slices(whole(checkpoint)) if piece.target == "layers.1.q.weight")
        assert piece.interleaved == 16
        cuts = ((0, 5), (5, 40), (40, 64))
        if piece.grouped is None:
            parts = [checkpoint.read_rows(piece, Reader(), a, b) for a, b in cuts]
            np.testing.assert_array_equal(np.concatenate(parts), checkpoint.read_rows(piece, Reader()))
        else:
            made = [checkpoint.read_grouped(piece, Reader(), a, b).codes for a, b in cuts]
            np.testing.assert_array_equal(np.concatenate(made), checkpoint.read_grouped(piece, Reader()).codes)


def test_types_may_be_mixed_and_the_memory_is_that_of_each(tmp_path: Path) -> None:
    types = {"ffn_down": "Q6_K", "output": "Q6_K", "token_embd": "Q4_K", "attn_k": "F16", "": "Q4_K"}
    _, weights = write_gguf(tmp_path / "model.gguf", types=types, **LARGE)
    checkpoint = Checkpoint.open(tmp_path / "model.gguf")
    assert_weights_are(checkpoint, weights, whole(checkpoint))
    four = (259 + 256 + 128) * 256 + 2 * 512 * 256  # embedding, q, v, gate, up
    six = 256 * 512 + 259 * 256 + 256 * 256  # down, head, o: "attn_output" has "output" in it
    expected = four // 2 + four // 32 * 4 + six + six // 16 * 2 + (128 * 256 + 3 * 256) * 2
    assert checkpoint.weight_bytes(whole(checkpoint), DType.BFLOAT16) == expected
    checkpoint.check_quantization(Quantization.parse("int4"))


def test_a_manifest_carries_a_file_to_machines_without_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", types={"attn_q": "Q4_0", "": "Q8_0"}, **SMALL)
    original = Checkpoint.open(tmp_path / "model.gguf")
    (tmp_path / "manifests").mkdir()
    path = tmp_path / "manifests" / f"{original.fingerprint}.json"
    path.write_bytes(original.manifest().to_bytes())
    opened = Checkpoint.open(path)
    assert opened.fingerprint == original.fingerprint
    assert opened.slices(whole(opened)) == original.slices(whole(original))
    assert Manifest.read(path).tensors["model.layers.0.self_attn.q_proj.weight"].num_bytes == 64 * 64 // 32 * 18


def test_two_models_of_one_shape_have_different_fingerprints(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_gguf(tmp_path / f"{seed}.gguf", types="Q8_0", seed=seed, **SMALL)
    one, other = (Checkpoint.open(tmp_path / f"{seed}.gguf") for seed in (1, 2))
    assert one.fingerprint != other.fingerprint


def test_a_file_and_a_directory_with_only_it_are_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "a" / "model.gguf"
    path.parent.mkdir()
    write_gguf(path, **SMALL)
    for name in (str(path), str(tmp_path / "a")):
        assert Checkpoint.open(resolve_model(name)).directory == path
        assert find_local(name) == Path(name)
    path.with_name("other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=r"has several models: model.gguf, other.gguf. Give the path of one"):
        Checkpoint.open(tmp_path / "a")


def test_the_ends_of_a_text_are_those_the_file_names_and_tokens_that_mean_it(tmp_path: Path) -> None:
    tokenizer = {
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "<|eot_id|>", "b", "c"],
        "tokenizer.ggml.token_type": [1, 3, 1, 3, 3],
    }
    write_gguf(tmp_path / "model.gguf", tokenizer=tokenizer, **SMALL)
    assert end_ids(Checkpoint.open(tmp_path / "model.gguf").directory) == (3, 4, 1)
    assert generation_defaults(tmp_path / "model.gguf") == {}


def test_rope_of_every_kind_is_what_the_file_says(tmp_path: Path) -> None:
    def rope(name: str, **values: object) -> Rope:
        write_gguf(tmp_path / f"{name}.gguf", values={f"llama.rope.{key}": v for key, v in values.items()}, **SMALL)
        positions = Checkpoint.open(tmp_path / f"{name}.gguf").spec.positions
        assert isinstance(positions, Rope)
        return positions

    assert rope("plain", freq_base=500000.0).theta == 500000.0
    linear = rope("linear", **{"scaling.type": "linear", "scaling.factor": 2.0})
    assert (linear.kind, linear.factor) == (RopeKind.LINEAR, 2.0)
    yarn = rope("yarn", **{"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32})
    assert (yarn.kind, yarn.factor, yarn.original_max_positions) == (RopeKind.YARN, 4.0, 32)
    for refused in ({"scaling.type": "longrope"}, {"scaling.attn_factor": 2.0}, {"dimension_count": 8}):
        with pytest.raises(ModelError, match="rope"):
            rope("refused", **refused)


def test_frequencies_scaled_one_by_one_are_those_of_the_formula(tmp_path: Path) -> None:
    """rope_freqs.weight has the divisors that llama3's scaling makes."""
    llama3 = Rope(
        kind=RopeKind.LLAMA3,
        theta=10000.0,
        dim=16,
        factor=8.0,
        original_max_positions=32,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    wanted, _ = inverse_frequencies(llama3, 128)
    plain = [10000.0 ** (-i / 16) for i in range(0, 16, 2)]
    factors = np.array([p / w for p, w in zip(plain, wanted, strict=True)], "<f4")
    write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": factors}, **SMALL)
    positions = Checkpoint.open(tmp_path / "model.gguf").spec.positions
    assert isinstance(positions, Rope)
    for length in (16, 128):
        found, attention_factor = inverse_frequencies(positions, length)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert attention_factor == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": "gemma3"}, "the architecture 'gemma3' is not supported in GGUF; supported are llama"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window could change the answers"),
        ({"split.count": 3}, "one part of several; merge them first"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count must be a positive integer, not 0"),
        ({"llama.attention.head_count": "4"}, "head_count must be an integer from 0 on, not 4"),
        ({"llama.feed_forward_length": 100}, r"mlp.gate_proj.weight has shape \(96, 64\)"),
        ({"llama.block_count": 3}, r"model.layers.2.input_layernorm.weight and 8 others are missing"),
        ({"llama.block_count": 1}, r"has model.layers.1.input_layernorm.weight and 8 others"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(values: dict[str, object], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", values=values, **SMALL)
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(tmp_path / "model.gguf")


def test_a_type_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", types="Q8_0", **SMALL)
    data = (tmp_path / "model.gguf").read_bytes()
    name = b"blk.0.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert data[at : at + 4] == struct.pack("<I", 8)
    (tmp_path / "model.gguf").write_bytes(data[:at] + struct.pack("<I", 10) + data[at + 4 :])
    with pytest.raises(ModelError, match=r"blk.0.attn_v.weight is stored as Q2_K; supported are F32, F16, BF16, Q4_0"):
        Checkpoint.open(tmp_path / "model.gguf")


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, types="Q8_0", **{**SMALL, "layers": 1})
    data = path.read_bytes()
    for size in (0, 3, 4, 10, 23, 24, 30, 100, 500, 1000, 2000, len(data) // 2, len(data) - 1000):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"model\.gguf (is truncated|is not a GGUF file)"):
            Checkpoint.open(path)


def test_any_byte_of_a_header_may_be_wrong_and_nothing_but_our_error_is_raised(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, types="Q8_0", **{**SMALL, "layers": 1})
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(2)
    for _ in range(300):
        at, value = int(generator.integers(0, 1800)), int(generator.integers(0, 256))
        was, data[at] = data[at], value
        path.write_bytes(data)
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.slices(whole(checkpoint))
            end_ids(path)
        except ModelError:
            pass
        data[at] = was
