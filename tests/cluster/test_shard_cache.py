"""`tllm cache`: what it lists and removes is what is there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tllm.cli.cache import app
from tllm.cluster.shard_files import StoreFiles
from tllm.models.checkpoint import Checkpoint
from tllm.models.manifest import ManifestTensor
from tllm.testing.checkpoints import tiny_checkpoint


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreFiles:
    """A store with one checkpoint of which one tensor is there, and a stray blob of two days."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    files = StoreFiles(tmp_path / "tllm" / "shards")
    files.prepare()
    manifest = Checkpoint.open(tiny_checkpoint(tmp_path / "model", tokenizer=False)).manifest(model="org/[red]name")
    name, tensor = next(iter(manifest.tensors.items()))
    tensors = {**manifest.tensors, name: ManifestTensor(dtype=tensor.dtype, shape=tensor.shape, sha256="aa" * 32)}
    files.merge(type(manifest)(**{**{f: getattr(manifest, f) for f in manifest.__slots__}, "tensors": tensors}))
    files.blob("aa" * 32).write_bytes(bytes(tensor.num_bytes))
    files.blob("bb" * 32).write_bytes(bytes(1000))
    os.utime(files.blob("bb" * 32), (time.time() - 2 * 24 * 3600,) * 2)
    return files


def test_an_empty_store_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "nowhere"))
    assert "holds no weights" in run("ls")
    assert json.loads(run("ls", "--json"))["checkpoints"] == []
    assert "0 B freed by removing 0 files" in run("gc")
    assert "0 B freed by removing 0 files" in run("gc", "--all")
    assert not (tmp_path / "nowhere").exists()


def test_a_list_says_what_is_there_of_how_much(files: StoreFiles) -> None:
    [item] = json.loads(run("ls", "--json"))["checkpoints"]
    [kept] = files.checkpoints()
    assert item["held_bytes"] == kept.held_bytes == files.blob("aa" * 32).stat().st_size
    assert item["total_bytes"] > item["held_bytes"]
    text = run("ls")
    assert kept.fingerprint[:12] in text
    assert "[red]" in text  # a name is no markup


def test_what_would_go_is_said_before_it_goes(files: StoreFiles) -> None:
    stray = files.blob("bb" * 32)
    output = run("gc", "--dry-run")
    assert str(stray) in output.replace("\n", "")
    assert "1 KB would be freed by removing 1 files" in output
    assert stray.exists()
    assert "1 KB freed by removing 1 files" in run("gc")
    assert not stray.exists()
    assert files.blob("aa" * 32).exists()


def test_a_checkpoint_goes_when_it_was_not_used_for_as_long_as_given(files: StoreFiles) -> None:
    [kept] = files.checkpoints()
    os.utime(files.manifest_path(kept.fingerprint), (time.time() - 5 * 24 * 3600,) * 2)
    run("gc", "--older-than", "6")
    assert files.checkpoints()
    run("gc", "--older-than", "4")
    assert not files.checkpoints()
    assert not files.blob("aa" * 32).exists()
