"""The script for true-shaped checkpoints: its presets have the published sizes, and what it writes can be opened."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig, AutoTokenizer

from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint, end_ids
from tllm.models.config import Config
from tllm.models.families import find_family, read_spec
from tllm.models.spec import Shard
from tllm.testing.checkpoints import checkpoint_tensors, tiny_config

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_checkpoint.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("preset", "num_parameters"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-0.6b", 596_049_920),
        ("distilgpt2", 81_912_576),
    ],
)
def test_presets_have_the_published_number_of_parameters(script: ModuleType, preset: str, num_parameters: int) -> None:
    config = script.PRESETS[preset]
    assert sum(tensor.num_elements for tensor in checkpoint_tensors(config)) == num_parameters
    spec = read_spec(Config(path="config.json", fields=config), find_family(Config(path="config.json", fields=config)))
    assert spec.max_positions == config.get("max_position_embeddings", config.get("n_positions"))


def test_the_half_gigabyte_preset_is_one(script: ModuleType) -> None:
    num_elements = sum(tensor.num_elements for tensor in checkpoint_tensors(script.PRESETS["tiny-500mb"]))
    assert abs(num_elements * DType.BFLOAT16.num_bytes - 500e6) < 10e6


def test_what_it_writes_opens_in_files_of_the_given_size_with_a_tokenizer(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "PRESETS", {"small": tiny_config(vocab_size=2000)})
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["make_checkpoint", "small", "--out", str(out), "--max-file-bytes", "300000"])
    script.main()
    checkpoint = Checkpoint.open(out)
    assert checkpoint.dtype is DType.BFLOAT16
    assert len({info.file for info in checkpoint.tensors.values()}) > 1
    shard = Shard(first_layer=0, last_layer=4, embed=True, head=True)
    assert f"{checkpoint.weight_bytes(shard, DType.BFLOAT16) // 2:,} parameters" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(out).vocab_size == 2000
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id in end_ids(out)
    assert tokenizer.decode([1999]) == ""


def test_it_does_not_write_over_anything(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("")
    monkeypatch.setattr(sys, "argv", ["make_checkpoint", "tiny-500mb", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
    assert "exists already and is not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_every_preset_is_json(script: ModuleType) -> None:
    assert json.loads(json.dumps(script.PRESETS)) == script.PRESETS
