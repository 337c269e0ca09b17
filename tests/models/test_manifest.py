"""Manifests: a checkpoint without its weights is the same checkpoint, and a bad one is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import ModelError
from tllm.models.checkpoint import Checkpoint
from tllm.models.manifest import MANIFEST_FILE, Manifest, ManifestTensor, is_hash
from tllm.models.spec import Shard
from tllm.testing.checkpoints import FAMILIES, tiny_checkpoint


def put(store: Path, manifest: Manifest) -> Path:
    path = store / "manifests" / f"{manifest.fingerprint}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(manifest.to_bytes())
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_manifest_opens_as_the_checkpoint_it_was_made_of(family: str, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny_checkpoint(tmp_path / "model", family, tokenizer=False))
    manifest = original.manifest(model="m")
    name = next(iter(manifest.tensors))
    tensors = {**manifest.tensors, name: replace(manifest.tensors[name], sha256="ab" * 32)}
    opened = Checkpoint.open(put(tmp_path / "store", replace(manifest, tensors=tensors)))
    assert (opened.spec, opened.dtype, opened.fingerprint, opened.sources) == (
        original.spec,
        original.dtype,
        original.fingerprint,
        original.sources,
    )
    assert opened.manifest(model="m") == manifest
    shard = Shard(first_layer=0, last_layer=1, embed=True, head=False)
    assert opened.slices(shard) == original.slices(shard)
    assert set(opened.needed(shard)) == {part.source for part in original.slices(shard)}
    assert opened.tensors[name].file == tmp_path / "store" / "blobs" / ("ab" * 32)
    assert all(info.offset == 0 for info in opened.tensors.values())


def test_a_directory_with_a_manifest_in_the_place_of_weights_can_be_described(tmp_path: Path) -> None:
    original = Checkpoint.open(tiny_checkpoint(tmp_path, tokenizer=False))
    (tmp_path / MANIFEST_FILE).write_bytes(original.manifest().to_bytes())
    assert Checkpoint.open(tmp_path) == original  # its own files go first
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    opened = Checkpoint.open(tmp_path)
    assert (opened.directory, opened.fingerprint) == (tmp_path, original.fingerprint)
    assert not any(info.file.exists() for info in opened.tensors.values())


def test_a_manifest_of_another_model_under_this_fingerprint_is_damaged(tmp_path: Path) -> None:
    one = Checkpoint.open(tiny_checkpoint(tmp_path / "one", tokenizer=False)).manifest()
    two = Checkpoint.open(tiny_checkpoint(tmp_path / "two", tokenizer=False, seed=1)).manifest()
    with pytest.raises(ModelError, match="is damaged: its fingerprint is not that of its content"):
        Checkpoint.open(put(tmp_path / "store", replace(one, digest=two.digest)))


def change(*path: str, to: object) -> Callable[[dict[str, object]], None]:
    def edit(content: dict[str, object]) -> None:
        at = content
        for key in path[:-1]:
            inner = at[key]
            assert isinstance(inner, dict)
            at = inner
        at[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("version", to=2), "is not a manifest of this version"),
        (change("fingerprint", to="../../x"), "is not a fingerprint"),
        (change("fingerprint", to="AB" * 32), "is not a fingerprint"),
        (change("digest", to="xyz"), "its digest is not hex"),
        (change("tensors", "norm", to={"dtype": "F32", "shape": [1]}), "entry of norm lacks dtype, shape or sha256"),
        (change("tensors", "norm", "sha256", to="../blob"), "a hash that is not 64 hex digits"),
        (change("tensors", "norm", "sha256", to="a" * 64 + "\n"), "a hash that is not 64 hex digits"),
        (change("tensors", "norm", "dtype", to="F31"), "the unknown dtype 'F31'"),
        (change("tensors", "norm", "shape", to=[-1]), "a shape that no tensor has"),
        (change("tensors", "norm", "shape", to=[1 << 40, 1 << 40]), "a shape that no tensor has"),
        (change("tensors", "norm", "shape", to=[1] * 99), "a shape that no tensor has"),
        (change("tensors", "norm", "shape", to=[True]), "lacks dtype, shape or sha256"),
        (change("tensors", to=[]), "is not a manifest of this version"),
    ],
)
def test_a_bad_manifest_is_refused_by_what_is_wrong(
    edit: Callable[[dict[str, object]], None], message: str, tmp_path: Path
) -> None:
    tensors = {"norm": ManifestTensor(dtype="F32", shape=(2,))}
    manifest = Manifest(fingerprint="ab" * 32, config={}, digest=b"x", tensors=tensors)
    content = json.loads(manifest.to_bytes())
    edit(content)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        Manifest.read(path)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"[]", b"\xff"])
def test_what_is_no_manifest_at_all_is_a_model_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"not JSON|not a manifest"):
        Manifest.read(path)


def test_a_manifest_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ModelError, match="larger than a manifest may be"):
        Manifest.read(path)


@given(st.text(max_size=70))
def test_only_hashes_become_names_of_files(text: str) -> None:
    assert is_hash(text) == (len(text) == 64 and all(char in "0123456789abcdef" for char in text))
