"""The generated files are those of the wire.proto beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["wire_pb2.py", "wire_pb2.pyi"])
def test_generated_files_are_current(tmp_path: Path, name: str) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["sh", ROOT / "scripts" / "proto.sh", tmp_path], env=environment, check=True, timeout=60)
    committed = ROOT / "src" / "tllm" / "transport" / name
    assert committed.read_text() == (tmp_path / name).read_text(), "wire.proto changed: run `make proto`"
