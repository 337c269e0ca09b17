"""Models with random weights are made when they are first asked for, once, and whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tllm.core.errors import ModelError
from tllm.core.types import DType
from tllm.lab import models
from tllm.lab.models import find_model
from tllm.models.checkpoint import Checkpoint
from tllm.testing.checkpoints import tiny_config


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A preset, and a place for what is made; where that is."""
    monkeypatch.setattr(models, "PRESETS", {"small": tiny_config("gpt2", vocab_size=1600)})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "tllm" / "lab" / "models"


def test_a_preset_is_made_once_for_each_type_of_weights(small: Path) -> None:
    made = find_model("small")
    weights = made / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert Checkpoint.open(made).dtype is DType.FLOAT32
    assert find_model("small") == find_model("small", dtype=DType.FLOAT32) == made
    assert weights.stat().st_mtime_ns == before
    assert Checkpoint.open(find_model("small", dtype=DType.BFLOAT16)).dtype is DType.BFLOAT16
    assert sorted(path.name for path in small.iterdir()) == ["small-bfloat16", "small-float32"]


def test_what_could_not_be_written_is_not_found_later(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(models, "write_random_checkpoint", half)
        with pytest.raises(OSError, match="no space left"):
            find_model("small")
    assert list(small.iterdir()) == []
    assert Checkpoint.open(find_model("small")).spec.num_layers == 4


def test_other_names_are_what_they_are_anywhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (find_model("embedded") / "config.json").is_file()
    with pytest.raises(ModelError, match=r"no model 'smal'.*The lab also makes small with random weights"):
        find_model("smal")
    own = tmp_path / "small"
    own.mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("small") == own  # a directory goes before a preset of its name
