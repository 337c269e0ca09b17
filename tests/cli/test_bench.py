"""What `tllm bench` prints of what was measured."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from tllm.cli.bench import _profile_lines, app
from tllm.core.types import DType
from tllm.lab.inside import Part
from tllm.testing.checkpoints import tiny_checkpoint


def test_a_profile_adds_up_and_is_compared_with_the_bus():
    parts = [
        Part(name="qkv", seconds=1e-3, num_bytes=10_000_000),
        Part(name="sampling", seconds=3e-3, num_bytes=0),
    ]
    _, _, qkv, sampling, step = (line.split() for line in _profile_lines(parts, 20e9))
    assert qkv == ["qkv", "1.000", "25.0%", "10.0", "10.0", "50%"]
    assert sampling == ["sampling", "3.000", "75.0%"]
    assert step == ["the", "step", "4.000", "100.0%", "10.0", "2.5", "12%"]


def test_the_accuracy_of_every_form_is_told(tmp_path: Path):
    model = tiny_checkpoint(tmp_path, hidden_size=128, shards=1, dtype=DType.BFLOAT16)
    result = CliRunner().invoke(app, ["accuracy", str(model), "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == ["int8", "int4-g32", "int4", "int4-g128"]
