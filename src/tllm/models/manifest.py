"""A checkpoint without its weights, as one JSON file: the config, every tensor's dtype, shape and hash, and the digest
that its fingerprint needs.

It stands in for the headers where the files are not: in a machine's shard store, whose tensors lie in files named by
their hash, and for a head that computes nothing and has only the small files of a model.

    STORE/manifests/<fingerprint>.json    beside    STORE/blobs/<sha256>
    MODEL/tllm.manifest.json              in the place of MODEL/*.safetensors

A manifest may come from another machine. What it says is checked as strictly as a header, and it holds no path:
hashes are 64 hex digits, and only they become names of files.

This file does not know who fills a store, nor networks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tllm.core.errors import ModelError
from tllm.models.headers import BLOCKS, ELEMENT_BYTES, StoredTensors, TensorInfo, tensor_bytes

MANIFEST_FILE: Final = "tllm.manifest.json"
MAX_MANIFEST_BYTES: Final = 64 << 20
MANIFESTS: Final = "manifests"
BLOBS: Final = "blobs"

_ABSENT: Final = "absent"  # where a tensor of which not even the hash is known would lie; no file has that name
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_MAX_TENSOR_BYTES: Final = 1 << 48
_MAX_DIMS: Final = 8
_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestTensor:
    """One tensor, row-major and little-endian wherever its bytes are. `sha256` is empty where nobody asked for it."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str = ""

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything of a checkpoint but its weights."""

    fingerprint: str
    config: Mapping[str, object]
    digest: bytes
    tensors: Mapping[str, ManifestTensor]
    model: str = ""  # what a person calls it; for lists, never a path to follow

    def __post_init__(self) -> None:
        """Raises ModelError for what no checkpoint has; that it is a model tllm knows is `Checkpoint`'s to check."""
        if not is_hash(self.fingerprint):
            raise ModelError(f"{self.fingerprint[:80]!r} is not a fingerprint: those are 64 hex digits.")
        for name, tensor in self.tensors.items():
            if tensor.dtype not in ELEMENT_BYTES and tensor.dtype not in BLOCKS:
                raise ModelError(f"A manifest gives {name[:200]} the unknown dtype {tensor.dtype[:80]!r}.")
            if len(tensor.shape) > _MAX_DIMS or not all(0 <= size <= _MAX_TENSOR_BYTES for size in tensor.shape):
                raise ModelError(f"A manifest gives {name[:200]} a shape that no tensor has.")
            if math.prod(tensor.shape) > _MAX_TENSOR_BYTES:
                raise ModelError(f"A manifest gives {name[:200]} a shape that no tensor has.")
            if tensor.dtype in BLOCKS and (not tensor.shape or tensor.shape[-1] % BLOCKS[tensor.dtype][0]):
                raise ModelError(f"A manifest gives {name[:200]} rows that are not whole blocks of {tensor.dtype}.")
            if tensor.sha256 and not is_hash(tensor.sha256):
                raise ModelError(f"A manifest gives {name[:200]} a hash that is not 64 hex digits.")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises ModelError when the file is missing, too large or no manifest."""
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise ModelError(f"{path} is larger than a manifest may be, {MAX_MANIFEST_BYTES} bytes.")
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not JSON: {error}.") from error
        match content:
            case {
                "version": 1,
                "fingerprint": str(fingerprint),
                "digest": str(digest),
                "config": dict(config),
                "tensors": dict(tensors),
                "model": str(model),
            }:
                pass
            case _:
                raise ModelError(f"{path} is not a manifest of this version of tllm; remove it, it is made anew.")
        try:
            return cls(
                fingerprint=fingerprint,
                config=config,
                digest=bytes.fromhex(digest),
                tensors={name: _tensor(path, name, entry) for name, entry in tensors.items()},
                model=model,
            )
        except ValueError as error:
            raise ModelError(f"{path} is not a manifest: its digest is not hex.") from error

    def to_bytes(self) -> bytes:
        """As `read` reads it. Raises ModelError when it is larger than that allows."""
        content = {
            "version": _VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "digest": self.digest.hex(),
            "config": dict(self.config),
            "tensors": {
                name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": tensor.sha256}
                for name, tensor in self.tensors.items()
            },
        }
        data = json.dumps(content, separators=(",", ":")).encode()
        if len(data) > MAX_MANIFEST_BYTES:
            raise ModelError(f"The manifest of {self.model or self.fingerprint} takes {len(data)} bytes, too many.")
        return data

    def stored(self, path: Path) -> StoredTensors:
        """The tensors where they lie for a manifest at `path`; whether they are there is not asked."""
        blobs = path.parent.parent / BLOBS
        tensors = {
            name: TensorInfo(
                file=blobs / (tensor.sha256 or _ABSENT),
                dtype=tensor.dtype,
                shape=tensor.shape,
                offset=0,
                num_bytes=tensor.num_bytes,
            )
            for name, tensor in self.tensors.items()
        }
        return StoredTensors(tensors=tensors, digest=self.digest)


def is_hash(text: str) -> bool:
    """Whether it is a SHA-256 in lower-case hex, and so a safe name for a file."""
    return _HASH.fullmatch(text) is not None


def _tensor(path: Path, name: str, entry: object) -> ManifestTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "sha256": str(sha256)} if all(type(n) is int for n in shape):
            return ManifestTensor(dtype=dtype, shape=tuple(shape), sha256=sha256)
        case _:
            raise ModelError(f"{path} is not a manifest: its entry of {name[:200]} lacks dtype, shape or sha256.")
