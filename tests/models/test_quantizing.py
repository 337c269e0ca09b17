"""Writing a checkpoint anew with quantized weights: it holds what the quantization made, and is there whole or not at
all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.models.test_quantized import Reader, read_piece, whole
from tllm.core.errors import ModelError
from tllm.core.types import DType, Quantization
from tllm.models import quantizing
from tllm.models.checkpoint import Checkpoint, end_ids
from tllm.models.grouped import Grouped, narrowed, widened
from tllm.models.layouts import Band, read_band
from tllm.models.quantizing import write_quantized
from tllm.models.spec import GroupedFormat
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.testing.quantized import quantized_checkpoint


def by_absmax(rows: NDArray[np.float32], held: GroupedFormat) -> Grouped:
    """A stand-in for an engine's arithmetic: the simplest that makes such a format."""
    groups = rows.reshape(len(rows), -1, held.group)
    if held.symmetric:
        largest = np.abs(groups).max(axis=2) / np.float32(127)
        scale, offset = widened(narrowed(largest, held.scale_dtype), held.scale_dtype), None
        codes = np.rint(groups / scale[:, :, None]) + 128
    else:
        low = groups.min(axis=2)
        offset = widened(narrowed(low, "BF16"), "BF16")
        scale = widened(narrowed((groups.max(axis=2) - low) / 15, "BF16"), "BF16")
        codes = np.rint((groups - offset[:, :, None]) / scale[:, :, None]).clip(0, 15)
    return Grouped(
        codes=codes.astype(np.uint8).reshape(rows.shape),
        bits=held.bits,
        group=held.group,
        scale=scale,
        offset=offset,
        scale_dtype=held.scale_dtype,
    )


@pytest.mark.parametrize("quantize", ["int8", "int4", "int4-g32"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_what_is_written_is_what_the_quantization_made(
    family: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "_RUN_BYTES", 10_000)  # several runs of rows to a matrix
    original = Checkpoint.open(tiny_checkpoint(tmp_path / "plain", family, layers=2, dtype=DType.BFLOAT16))
    quantization = Quantization.parse(quantize)
    seen: list[tuple[int, int]] = []
    write_quantized(original, tmp_path / "made", quantization, by_absmax, lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == max(done for done, _ in seen)

    made = Checkpoint.open(tmp_path / "made")
    assert (made.spec, made.dtype) == (original.spec, DType.BFLOAT16)
    shard = whole(made)
    assert made.weight_bytes(shard, DType.BFLOAT16) == original.weight_bytes(shard, DType.BFLOAT16, quantization)
    plain = {piece.target: piece for piece in original.slices(shard)}
    for piece in made.slices(shard):
        info = original.tensors[plain[piece.target].source]
        columns = info.shape[1] if len(info.shape) == 2 else info.shape[0]
        band = Band(name=piece.source, rows=range(info.shape[0] if len(info.shape) == 2 else 1), columns=range(columns))
        stored = widened(read_band(info, band, Reader()), "BF16").reshape(info.shape)
        source = plain[piece.target]
        rows = stored[(slice(None),) * source.dim + (slice(source.start, source.stop),)]
        rows = np.ascontiguousarray(rows.T if source.transpose else rows)
        if piece.grouped is not None:
            rows = by_absmax(rows, piece.grouped).dequantized()
            np.testing.assert_array_equal(read_piece(made, piece), rows)
        else:
            assert len(piece.shape) == 1 or piece.target == "positions.weight"
            assert made.tensors[piece.source].dtype == "BF16"
    kinds = {piece.target.split(".")[-2]: piece.grouped for piece in made.slices(shard) if len(piece.shape) == 2}
    assert kinds["embed"] == GroupedFormat(bits=8, group=64, symmetric=True, scale_dtype="F32")
    group = {"int8": 64, "int4": 64, "int4-g32": 32}[quantize]
    assert kinds["q"] is not None
    assert (kinds["q"].bits, kinds["q"].group) == (quantization.bits, group)


def test_the_small_files_come_along_and_the_answers_ends_stay(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "plain", dtype=DType.BFLOAT16)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (source / "LICENSE").write_text("free")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    write_quantized(Checkpoint.open(source), tmp_path / "made", Quantization.parse("int4"), by_absmax)
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
        "LICENSE", "additional_chat_templates",
    }  # fmt: skip
    assert end_ids(tmp_path / "made") == end_ids(source)
    assert (tmp_path / "made" / "additional_chat_templates" / "tool_use.jinja").read_text() == "x"
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o777 & ~quantizing._umask()
    section = json.loads((tmp_path / "made" / "config.json").read_text())["quantization"]
    assert section["bits"] == 4
    assert section["lm_head"] == {"group_size": None, "bits": 8, "mode": "symmetric"}
    assert section["model.layers.0.mlp.down_proj"]["group_size"] == 16  # its 144 inputs are no multiple of 64


def test_a_large_model_lies_in_several_files(tmp_path: Path) -> None:
    original = Checkpoint.open(tiny_checkpoint(tmp_path / "plain", dtype=DType.BFLOAT16))
    write_quantized(original, tmp_path / "one", Quantization.parse("int8"), by_absmax)
    write_quantized(original, tmp_path / "many", Quantization.parse("int8"), by_absmax, file_bytes=40_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    for a, b in zip(one.slices(whole(one)), many.slices(whole(many)), strict=True):
        if a.grouped is not None:
            np.testing.assert_array_equal(read_piece(one, a), read_piece(many, b))


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    original = Checkpoint.open(tiny_checkpoint(tmp_path / "plain", dtype=DType.BFLOAT16))

    def fails(rows: NDArray[np.float32], held: GroupedFormat) -> Grouped:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_quantized(original, tmp_path / "made", Quantization.parse("int8"), fails)
    assert os.listdir(tmp_path) == ["plain"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    plain = Checkpoint.open(tiny_checkpoint(tmp_path / "plain"))
    int8 = Quantization.parse("int8")
    with pytest.raises(ModelError, match="plain exists; give a directory that does not"):
        write_quantized(plain, tmp_path / "plain", int8, by_absmax)
    quantized_checkpoint(tmp_path / "awq", "awq", hidden_size=64, intermediate_size=128)
    with pytest.raises(ModelError, match=r"awq is quantized already \(AWQ\)"):
        write_quantized(Checkpoint.open(tmp_path / "awq"), tmp_path / "made", int8, by_absmax)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="cannot be written"):
        write_quantized(plain, tmp_path / "file" / "made", int8, by_absmax)
    assert sorted(os.listdir(tmp_path)) == ["awq", "file", "plain"]
