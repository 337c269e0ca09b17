"""Quantized checkpoints: every weight reads back as the format's own arithmetic has it, whole, in parts and by ranks;
what contradicts itself is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tllm.core.errors import ModelError
from tllm.core.types import DType, Quantization
from tllm.models.checkpoint import Checkpoint
from tllm.models.grouped import Grouped, widened
from tllm.models.headers import TensorInfo
from tllm.models.manifest import MANIFEST_FILE
from tllm.models.spec import Shard, TensorSlice
from tllm.testing.quantized import METHODS, quantized_checkpoint

TINY = {"layers": 2, "hidden_size": 64, "intermediate_size": 128, "heads": 8, "head_dim": 16, "kv_heads": 2}


class Reader:
    """Reads what it is asked for, and counts it."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def __call__(self, info: TensorInfo) -> bytes:
        self.num_bytes += info.num_bytes
        with info.file.open("rb") as file:
            file.seek(info.offset)
            return file.read(info.num_bytes)


def whole(checkpoint: Checkpoint) -> Shard:
    return Shard(first_layer=0, last_layer=checkpoint.spec.num_layers, embed=True, head=True)


def read_piece(checkpoint: Checkpoint, piece: TensorSlice) -> NDArray[np.float32]:
    """What an engine gets for a slice, in fp32; exactly the bytes that the slice promises are read."""
    read = Reader()
    if piece.grouped is not None:
        made = checkpoint.read_grouped(piece, read)
        assert (made.bits, made.group, made.offset is None) == (
            piece.grouped.bits,
            piece.grouped.group,
            piece.grouped.symmetric,
        )
        assert made.codes.dtype == np.uint8
        assert made.codes.shape == piece.shape
        assert made.codes.max() < 1 << made.bits
        assert made.scale.shape == (piece.shape[0], piece.shape[1] // made.group)
        values = made.dequantized()
    elif piece.interleaved:
        values = widened(checkpoint.read_rows(piece, read), checkpoint.tensors[piece.source].dtype)
    else:
        info = checkpoint.tensors[piece.source]
        stored = np.frombuffer(read(info), {"F16": "<f2", "F32": "<f4", "BF16": "<u2"}[info.dtype]).reshape(info.shape)
        cut = stored[(slice(None),) * piece.dim + (slice(piece.start, piece.stop),)]
        read.num_bytes = cut.nbytes
        values = widened(cut.T if piece.transpose else cut, info.dtype)
    assert read.num_bytes == piece.num_bytes
    assert values.shape == piece.shape
    return values


LLAMA = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
}  # fmt: skip


def stored_name(target: str) -> str:
    *place, name, kind = target.split(".")
    return ".".join((*(("model", *place) if place else ()), LLAMA[name], kind))


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("method", METHODS)
def test_every_weight_reads_back_as_the_format_has_it(method: str, group: int, tmp_path: Path) -> None:
    if method.startswith("mlx") and group == -1:
        group = 64
    weights = quantized_checkpoint(tmp_path, method, group=group, **TINY)
    checkpoint = Checkpoint.open(tmp_path)
    pieces = checkpoint.slices(whole(checkpoint))
    assert {stored_name(piece.target) for piece in pieces} == set(weights)
    for piece in pieces:
        expected = weights[stored_name(piece.target)]
        np.testing.assert_allclose(read_piece(checkpoint, piece), expected, rtol=1e-6, atol=1e-6, err_msg=piece.target)
    linears = [piece for piece in pieces if piece.target.startswith("layers.") and len(piece.shape) == 2]
    bits = 8 if "8" in method else 4
    assert {piece.grouped.bits for piece in linears if piece.grouped is not None} == {bits}
    assert checkpoint.dtype is DType.FLOAT16
    assert checkpoint.needed(whole(checkpoint)) == tuple(dict.fromkeys(checkpoint.needed(whole(checkpoint))))
    assert set(checkpoint.needed(whole(checkpoint))) == set(checkpoint.tensors)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", [method for method in METHODS if "ordered" not in method])
def test_ranks_get_their_parts_of_quantized_weights(method: str, ranks: int, tmp_path: Path) -> None:
    weights = quantized_checkpoint(tmp_path, method, **TINY)
    checkpoint = Checkpoint.open(tmp_path)
    for rank in range(ranks):
        shard = Shard(first_layer=0, last_layer=2, embed=True, head=True, rank=rank, ranks=ranks)
        for piece in checkpoint.slices(shard):
            expected = weights[stored_name(piece.target)]
            expected = expected[(slice(None),) * piece.dim + (slice(piece.start, piece.stop),)]
            np.testing.assert_allclose(
                read_piece(checkpoint, piece), expected, rtol=1e-6, atol=1e-6, err_msg=piece.target
            )


def test_a_rank_that_begins_within_a_group_has_smaller_groups(tmp_path: Path) -> None:
    weights = quantized_checkpoint(tmp_path, "mlx-4", group=64, **TINY)
    checkpoint = Checkpoint.open(tmp_path)
    shard = Shard(first_layer=0, last_layer=1, embed=False, head=False, rank=1, ranks=4)
    [piece] = [piece for piece in checkpoint.slices(shard) if piece.target == "layers.0.o.weight"]
    assert piece.grouped is not None
    assert (piece.start, piece.stop, piece.grouped.group) == (32, 64, 32)
    expected = weights["model.layers.0.self_attn.o_proj.weight"][:, 32:64]
    np.testing.assert_allclose(read_piece(checkpoint, piece), expected, rtol=1e-6, atol=1e-6)


def test_ranks_that_would_cut_groups_too_small_are_refused(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path, "mlx-4", **{**TINY, "intermediate_size": 96})
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ModelError, match=r"mlp.down_proj.weight is quantized in groups of 32 inputs.*24 to 48.*fewer"):
        checkpoint.slices(Shard(first_layer=0, last_layer=1, embed=False, head=False, rank=1, ranks=4))


def test_inputs_in_activation_order_are_not_divided_among_ranks(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path, "gptq-4-ordered", **TINY)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ModelError, match="activation order"):
        checkpoint.slices(Shard(first_layer=0, last_layer=1, embed=False, head=False, rank=0, ranks=2))


@pytest.mark.parametrize("method", METHODS)
def test_runs_of_rows_are_the_same_as_all_rows(method: str, tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path, method, **TINY)
    checkpoint = Checkpoint.open(tmp_path)
    for piece in checkpoint.slices(whole(checkpoint)):
        if piece.grouped is None or not piece.target.startswith(("layers.1.q", "layers.1.down", "head")):
            continue
        read = Reader()
        at_once = checkpoint.read_grouped(piece, read)
        parts = [checkpoint.read_grouped(piece, Reader(), a, b) for a, b in ((0, 7), (7, 24), (24, piece.shape[0]))]
        for name in ("codes", "scale", "offset"):
            arrays = [getattr(part, name) for part in parts]
            if arrays[0] is not None:
                np.testing.assert_array_equal(np.concatenate(arrays), getattr(at_once, name))


def test_scales_of_16_bits_are_said_to_be_so(tmp_path: Path) -> None:
    for method, dtype in (("mlx-4", "F16"), ("gptq-4", "F16"), ("awq", "F32"), ("tllm-int8", "F32")):
        quantized_checkpoint(tmp_path / method, method, **TINY)
        checkpoint = Checkpoint.open(tmp_path / method)
        held = checkpoint.quantized("layers.0.q.weight")
        assert held is not None
        assert held.scale_dtype == dtype, method
        piece = next(piece for piece in checkpoint.slices(whole(checkpoint)) if piece.target == "layers.0.q.weight")
        made = checkpoint.read_grouped(piece, Reader())
        for values in (made.scale, made.offset):
            if values is not None and dtype == "F16":
                np.testing.assert_array_equal(values.astype("<f2").astype("<f4"), values)
    assert checkpoint.quantized("norm.weight") is None
    assert checkpoint.quantized("model.layers.0.self_attn.q_proj.weight") is not None


def test_activation_order_takes_codes_group_by_group(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path, "gptq-4-ordered", **TINY)
    checkpoint = Checkpoint.open(tmp_path)
    piece = next(piece for piece in checkpoint.slices(whole(checkpoint)) if piece.target == "layers.0.down.weight")
    made = checkpoint.read_grouped(piece, Reader())
    index = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
    assert made.input_order is not None
    np.testing.assert_array_equal(index[made.input_order], np.arange(128) // 32)


def test_stored_quantized_weights_take_their_own_memory_and_plain_ones_that_of_the_type(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path, "gptq-4", **TINY)
    checkpoint = Checkpoint.open(tmp_path)
    linears = 2 * (128 * 64 + 2 * 32 * 64 + 64 * 128 + 3 * 128 * 64)
    ends, norms = 2 * 259 * 64, 5 * 64
    plain = linears // 2 + linears // 32 * 2 + (ends + norms) * 2
    assert checkpoint.weight_bytes(whole(checkpoint), DType.FLOAT16) == plain
    int8_ends = ends + 2 * 259 * 4
    held = linears // 2 + linears // 32 * 2 + int8_ends + norms * 2
    assert checkpoint.weight_bytes(whole(checkpoint), DType.FLOAT16, Quantization(bits=4, group=64)) == held
    checkpoint.check_quantization(Quantization.parse("int4"))
    with pytest.raises(ModelError, match=r"quantized to 4 bits already \(GPTQ\); int8 cannot be made of it"):
        checkpoint.check_quantization(Quantization.parse("int8"))


@pytest.mark.parametrize("method", ["mlx-4", "gptq-4-ordered", "awq"])
def test_a_manifest_describes_a_quantized_checkpoint_too(method: str, tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "a", method, **TINY)
    original = Checkpoint.open(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    (tmp_path / "b" / MANIFEST_FILE).write_bytes(original.manifest().to_bytes())
    opened = Checkpoint.open(tmp_path / "b")
    assert opened.fingerprint == original.fingerprint
    assert opened.slices(whole(opened)) == original.slices(whole(original))
    assert opened.method == original.method


def test_gpt2s_fused_projection_may_be_quantized(tmp_path: Path) -> None:
    """In MLX's layout it is (outputs, inputs), whatever it is in plain."""
    tiny = {"family": "gpt2", "layers": 1, "hidden_size": 64, "heads": 4}
    quantized_checkpoint(tmp_path, "tllm-int8", **tiny)
    # `quantized_checkpoint` quantizes what is on disk, (inputs, outputs) there: turn these weights over.
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    generator = np.random.default_rng(1)
    expected = {}
    for part, shape in {
        "attn.c_attn": (192, 64),
        "attn.c_proj": (64, 64),
        "mlp.c_fc": (256, 64),
        "mlp.c_proj": (64, 256),
    }.items():
        base = f"transformer.h.0.{part}"
        codes = generator.integers(1, 256, shape, np.uint8)
        scale = generator.uniform(0.5, 1, (shape[0], 1)).astype("<f4")
        tensors[f"{base}.weight"], tensors[f"{base}.scales"] = codes.view("<u4"), scale
        expected[part] = (codes.astype("<f4") - 128) * scale
    save_file(tensors, path)
    checkpoint = Checkpoint.open(tmp_path)
    pieces = {piece.target: piece for piece in checkpoint.slices(whole(checkpoint))}
    for number, name in enumerate("qkv"):
        fused = expected["attn.c_attn"][64 * number : 64 * number + 64]
        np.testing.assert_array_equal(read_piece(checkpoint, pieces[f"layers.0.{name}.weight"]), fused)
    for name, part in (("o", "attn.c_proj"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
        np.testing.assert_array_equal(read_piece(checkpoint, pieces[f"layers.0.{name}.weight"]), expected[part])


def test_biases_that_gptq_makers_add_are_used(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path, "gptq-4", **TINY)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name.removesuffix("scales") + "bias"] = np.zeros(tensors[name].shape[1], "<f2")
    save_file(tensors, path)
    spec = Checkpoint.open(tmp_path).spec
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias) == (True, True, True)


def test_codes_are_read_as_mlx_writes_them(tmp_path: Path) -> None:
    """mlx_golden.json: three rows, as mlx 0.32.4 quantizes them in groups of 32 (mx.quantize) and spells them out."""
    golden = json.loads((Path(__file__).parent / "mlx_golden.json").read_text())
    for bits, case in golden.items():
        quantized_checkpoint(tmp_path / bits, f"mlx-{bits}", **TINY)
        path = tmp_path / bits / "model.safetensors"
        tensors = {name: array.copy() for name, array in load_file(path).items()}
        base = "model.layers.0.self_attn.k_proj"
        tensors[f"{base}.weight"][:3] = case["weight"]
        tensors[f"{base}.scales"][:3] = case["scales"]
        tensors[f"{base}.biases"][:3] = case["biases"]
        save_file(tensors, path)
        checkpoint = Checkpoint.open(tmp_path / bits)
        piece = next(piece for piece in checkpoint.slices(whole(checkpoint)) if piece.target == "layers.0.k.weight")
        np.testing.assert_allclose(read_piece(checkpoint, piece)[:3], case["dequantized"], atol=2e-5)


def damages() -> Iterator[Any]:
    """method, what is done to (tensors, config) of a checkpoint, the message."""
    q = "model.layers.0.self_attn.q_proj"

    def without(part: str) -> Any:
        return lambda tensors, config: tensors.pop(f"{q}.{part}")

    def replaced(part: str, array: Any) -> Any:
        return lambda tensors, config: tensors.update({f"{q}.{part}": array})

    def said(section: str, **fields: object) -> Any:
        return lambda tensors, config: config[section].update(fields)

    def section(**fields: object) -> Any:
        return lambda tensors, config: config.update(quantization_config=fields)

    yield "mlx-4", without("biases"), None  # symmetric then
    yield "mlx-4", without("scales"), r"q_proj.weight has shape \(128, 8\); config.json asks for \(128, 64\)"
    yield "mlx-4", replaced("biases", np.zeros((128, 1), "<f2")), r"q_proj.biases has shape \(128, 1\)"
    yield "mlx-4", replaced("biases", np.zeros((128, 2), "<f4")), r"q_proj.biases is stored as F32; supported are F16"
    yield "mlx-4", replaced("scales", np.zeros((128, 3), "<f2")), r"64 inputs into 3 groups, which are not equal"
    yield "mlx-4", replaced("scales", np.zeros((128, 8), "<f2")), r"groups of 8 inputs; supported are multiples of 16"
    yield (
        "mlx-4",
        replaced("weight", np.zeros((128, 6), "<u4")),
        r"q_proj.weight has 3 bits per weight; supported are 4, 8",
    )
    yield "mlx-4", replaced("weight", np.zeros((64, 8), "<u4")), r"q_proj.weight has shape \(64, 8\)"
    yield "mlx-4", said("quantization", bits=8), r"says of model.embed_tokens that it has 8 bits; its tensors have 4"
    yield "mlx-4", said("quantization", group_size=64), r"its groups are of 64; its tensors have 32"
    yield "mlx-4", said("quantization", **{q: {"bits": 8, "group_size": 32}}), rf"says of {q} that it has 8 bits"
    yield "mlx-4", said("quantization", **{q: False}), rf"says of {q} that it is not quantized"
    yield "mlx-4", said("quantization", mode="mxfp4"), r"mode 'mxfp4' is not supported"
    yield "gptq-4", without("qzeros"), r"q_proj.qzeros is missing from the checkpoint"
    yield "gptq-4", without("qweight"), r"the tensor model.layers.0.self_attn.q_proj.weight is missing"
    yield "gptq-4", without("g_idx"), None
    yield "gptq-4", replaced("g_idx", np.zeros(63, "<i4")), r"q_proj.g_idx has shape \(63,\)"
    yield "gptq-4", said("quantization_config", bits=3), r"it has 3 bits; its tensors have 4"
    yield "gptq-4", said("quantization_config", group_size=128), r"groups are of 128; its tensors have 32"
    yield "gptq-4", said("quantization_config", checkpoint_format="marlin"), r"checkpoint_format is \"marlin\""
    yield "awq", said("quantization_config", version="gemv"), r"version is \"gemv\", which is not supported"
    yield "awq", replaced("qweight", np.zeros((64, 32), "<i4")), r"q_proj.qweight has 8 bits per weight; AWQ has 4"
    yield (
        "awq",
        section(quant_method="bitsandbytes", load_in_4bit=True),
        r"quant_method 'bitsandbytes' is not supported",
    )
    yield "awq", section(bits=4), r"quant_method None is not supported"


@pytest.mark.parametrize(("method", "damage", "message"), list(damages()))
def test_what_contradicts_itself_is_refused_by_name(
    method: str, damage: Any, message: str | None, tmp_path: Path
) -> None:
    quantized_checkpoint(tmp_path, method, **{**TINY, "layers": 1})
    path = tmp_path / "model.safetensors"
    tensors = dict(load_file(path))
    config = json.loads((tmp_path / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message is None:
        Checkpoint.open(tmp_path)
        return
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(tmp_path)


def test_groups_of_unequal_size_and_zero_points_where_there_are_none_are_seen_when_read(tmp_path: Path) -> None:
    for change, message in (("g_idx", "does not put 32 inputs in each group"), ("qzeros", "has zero points")):
        quantized_checkpoint(tmp_path / change, "gptq-4-ordered", **{**TINY, "layers": 1})
        path = tmp_path / change / "model.safetensors"
        tensors = dict(load_file(path))
        tensors[f"model.layers.0.mlp.down_proj.{change}"].flat[5] += 1
        if change == "g_idx":
            tensors[f"model.layers.0.mlp.down_proj.{change}"][:] = 0
        save_file(tensors, path)
        checkpoint = Checkpoint.open(tmp_path / change)
        piece = next(piece for piece in checkpoint.slices(whole(checkpoint)) if piece.target == "layers.0.down.weight")
        with pytest.raises(ModelError, match=message):
            checkpoint.read_grouped(piece, Reader())


def test_a_row_of_codes_without_offsets_is_counted_from_the_middle() -> None:
    codes = np.array([[0, 128, 255, 129]], np.uint8)
    made = Grouped(codes=codes, bits=8, group=4, scale=np.array([[2.0]], "<f4"), offset=None, scale_dtype="F32")
    np.testing.assert_array_equal(made.dequantized(), [[-256, 0, 254, 2]])
