"""`tllm quantize`, as the guide has it: the directory opens, and holds the weights that --quantize makes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.models.test_quantized import read_piece, whole
from tllm.cli import app
from tllm.core.errors import ConfigError, ModelError
from tllm.core.types import DType, Quantization
from tllm.engines.torch.rewriting import quantize_rows
from tllm.models.checkpoint import Checkpoint
from tllm.models.repository import resolve_model
from tllm.models.slicing import held_format

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "quantization.md").read_text()


def test_the_guides_command_writes_what_the_guide_says(tmp_path: Path) -> None:
    [command] = re.findall(r"^tllm (quantize .*)$", GUIDE, re.MULTILINE)
    target = tmp_path / "small"
    result = CliRunner().invoke(app, command.replace("/tmp/small", str(target)).split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert re.search(r"small: 2\.\d+ MB of weights, 3\.\d times less than the original's\.", result.stdout)
    [example] = re.findall(r"^```json\n(.*)\n```$", GUIDE, re.MULTILINE)
    assert json.loads((target / "config.json").read_text())["quantization"] == json.loads(example)

    original, made = Checkpoint.open(resolve_model("embedded")), Checkpoint.open(target)
    assert made.spec == original.spec
    int4 = Quantization.parse("int4")
    assert made.weight_bytes(whole(made), made.dtype) == original.weight_bytes(whole(made), DType.BFLOAT16, int4)
    checked = 0
    for piece, plain in zip(made.slices(whole(made)), original.slices(whole(made)), strict=True):
        wanted = held_format(plain.target, plain.shape[-1], int4)
        assert piece.grouped == wanted
        if wanted is None or checked > 8:
            continue
        info = original.tensors[plain.source]
        stored = np.memmap(info.file, "<u2", "r", info.offset, info.shape)
        rows = torch.from_numpy(np.array(stored)).view(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(read_piece(made, piece), quantize_rows(rows, wanted).dequantized())
        checked += 1
    assert checked > 8


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    def run(*arguments: str) -> None:
        CliRunner().invoke(app, ["quantize", *arguments], catch_exceptions=False)

    with pytest.raises(ModelError, match="exists; give a directory that does not"):
        run("embedded", "--to", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be quantized to 'int3'"):
        run("embedded", "--to", str(tmp_path / "x"), "--quantize", "int3")
    assert CliRunner().invoke(app, ["quantize", "embedded"]).exit_code == 2
    assert not (tmp_path / "x").exists()
