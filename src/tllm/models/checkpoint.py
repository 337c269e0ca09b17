"""A checkpoint on disk: what its model is, where each weight lies, and what any shard of it needs.

Opening reads config.json and the headers of the safetensors files, and checks that every weight of the model is there
with the right shape and in a type that tllm loads. Of the weights a few bytes each are read, for the fingerprint.

A manifest (`models/manifest.py`) does instead of headers: then the tensors lie in a shard store, or nowhere yet.

This file does not know frameworks, devices, or who holds which shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Final

from tllm.core.errors import ModelError
from tllm.core.types import DType
from tllm.models.config import Config
from tllm.models.families import Family, find_family, read_spec
from tllm.models.headers import ELEMENT_BYTES, StoredTensors, TensorInfo, read_directory
from tllm.models.manifest import MANIFEST_FILE, Manifest, ManifestTensor
from tllm.models.slicing import (
    Source,
    Weight,
    embed_weights,
    head_weights,
    layer_weights,
    slices,
    weight_bytes,
)
from tllm.models.spec import ModelSpec, Shard, TensorSlice

__all__ = ["Checkpoint", "TensorInfo", "end_ids", "generation_defaults"]

logger = logging.getLogger(__name__)

STORED_TYPES: Final[Mapping[str, DType]] = {"F32": DType.FLOAT32, "BF16": DType.BFLOAT16, "F16": DType.FLOAT16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. Its files are expected to stay as they are."""

    directory: Path
    spec: ModelSpec
    dtype: DType  # in which most of the weights' bytes are stored
    fingerprint: str  # hex; equal for equal config.json, headers, file names, sizes and samples of the weights
    tensors: Mapping[str, TensorInfo]  # by stored name; those without weights (masks, tables) left out
    sources: Mapping[str, Source]  # where each canonical weight lies
    config: Mapping[str, object] = field(default_factory=dict)  # config.json
    digest: bytes = b""  # of the headers and samples

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """A directory in the Hugging Face layout, or a manifest of the shard store.

        A directory that has a manifest of its own in the place of weights can be opened and described, not loaded.
        Raises ModelError naming the file, field or tensor that is missing, wrong or not supported.
        """
        if path.suffix == ".json" and path.is_file() and path.name != "config.json":
            return cls.of_manifest(path, path.parent)
        directory = path
        config = _read_config(directory)
        if (directory / MANIFEST_FILE).is_file() and not any(directory.glob("*.safetensors")):
            return cls.of_manifest(directory / MANIFEST_FILE, directory)
        find_family(config)  # before the weights: whoever has no such model cares little about its files
        return cls.from_headers(directory, config, read_directory(directory))

    @classmethod
    def of_manifest(cls, path: Path, directory: Path) -> Checkpoint:
        """Raises ModelError also when the manifest's fingerprint is not that of what it says."""
        manifest = Manifest.read(path)
        checkpoint = cls.from_headers(directory, Config(path=str(path), fields=manifest.config), manifest.stored(path))
        if checkpoint.fingerprint != manifest.fingerprint:
            raise ModelError(f"{path} is damaged: its fingerprint is not that of its content. Remove it.")
        return checkpoint

    @classmethod
    def from_headers(cls, directory: Path, config: Config, stored: StoredTensors) -> Checkpoint:
        """The same from what was read already, here or on another machine; no file is touched."""
        family = find_family(config)
        spec = read_spec(config, family)
        tensors = {
            name: info
            for name, info in stored.tensors.items()
            if not any(re.fullmatch(pattern, name) for pattern in family.ignored)
        }
        spec, sources = _locate(spec, family, tensors, directory)
        _check_tensors(spec, sources, tensors, directory)
        config_digest = hashlib.sha256(json.dumps(config.fields, sort_keys=True).encode()).digest()
        return cls(
            directory=directory,
            spec=spec,
            dtype=_main_dtype(tensors),
            fingerprint=hashlib.sha256(config_digest + stored.digest).hexdigest(),
            tensors=tensors,
            sources=sources,
            config=config.fields,
            digest=stored.digest,
        )

    def manifest(self, *, model: str = "") -> Manifest:
        """Everything but the weights, and no hash of them."""
        return Manifest(
            fingerprint=self.fingerprint,
            config=self.config,
            digest=self.digest,
            tensors={name: ManifestTensor(dtype=info.dtype, shape=info.shape) for name, info in self.tensors.items()},
            model=model,
        )

    def needed(self, shard: Shard) -> tuple[str, ...]:
        """The stored tensors of which the shard reads at least a part, each once."""
        return tuple(dict.fromkeys(part.source for part in self.slices(shard)))

    def slices(self, shard: Shard) -> tuple[TensorSlice, ...]:
        """What the shard reads. Raises ModelError when it is no part of the model (see `models/slicing.py`)."""
        element_bytes = {name: ELEMENT_BYTES[info.dtype] for name, info in self.tensors.items()}
        return slices(self.spec, shard, self.sources, element_bytes)

    def weight_bytes(self, shard: Shard, dtype: DType) -> int:
        """Memory of the shard's weights once loaded as `dtype`, exactly."""
        return weight_bytes(self.slices(shard), dtype)


def end_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end a text: eos_token_id of generation_config.json, else of config.json; maybe none.

    Raises ModelError when the field is neither an id, a list of ids, nor null.
    """
    for config in (_read_generation_config(directory), _read_config(directory)):
        value = config.fields.get("eos_token_id") if config else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ModelError(f"{directory}: eos_token_id must be a token id or a list of them, not {value!r}.")
        return tuple(dict.fromkeys(ids))
    return ()


# What a publisher may set for sampling, and its range.
_SAMPLING_DEFAULTS: Final = (
    ("temperature", 0.0, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
)


def generation_defaults(directory: Path) -> dict[str, float | int]:
    """How the publisher wants the model sampled, by the names of SamplingParams; empty when nothing is said.

    `do_sample: false`, if said outright, is temperature 0. Fields of generation_config.json that SamplingParams does
    not have are left out. Raises ModelError for a value out of range.
    """
    config = _read_generation_config(directory)
    if config is None:
        return {}
    defaults: dict[str, float | int] = {}
    for name, low, high in _SAMPLING_DEFAULTS:
        value = config.optional_number(name)
        if value is not None and not low <= value <= high:
            raise ModelError(f"{config.path}: {name} must be between {low} and {high}, not {value}.")
        if value is not None:
            defaults[name] = value
    if config.fields.get("repetition_penalty") is not None:
        defaults["repetition_penalty"] = config.positive_number("repetition_penalty")
    if config.fields.get("top_k") is not None:
        defaults["top_k"] = config.count("top_k", default=0)
    if config.fields.get("do_sample") is not None and not config.flag("do_sample", default=True):
        defaults["temperature"] = 0.0
    return defaults


def _read_config(directory: Path) -> Config:
    if not directory.exists():
        raise ModelError(f"{directory} does not exist.")
    if not directory.is_dir():
        raise ModelError(f"{directory} is a file; give the directory that holds the model's config.json.")
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json, so it is not a model in the Hugging Face layout.")
    return Config.read(directory / "config.json")


def _read_generation_config(directory: Path) -> Config | None:
    path = directory / "generation_config.json"
    return Config.read(path) if path.is_file() else None


def _find_prefix(family: Family, tensors: Mapping[str, TensorInfo], directory: Path) -> str:
    """Base models are saved without the name of the part they are of a whole."""
    for prefix in family.prefixes:
        if any(name.startswith(prefix) for name in tensors):
            return prefix
    raise ModelError(f"{directory} has no tensor of a {family.name} model.")


def _locate(
    spec: ModelSpec, family: Family, tensors: Mapping[str, TensorInfo], directory: Path
) -> tuple[ModelSpec, dict[str, Source]]:
    """The source of every canonical weight, and the spec with `tied` as the stored tensors have it.

    As in transformers: with tied embeddings one of the two may be absent, whichever it is. A checkpoint that says tied
    and stores both is read as it is stored, untied, which gives the same answers if they are equal.
    """
    prefix = _find_prefix(family, tensors, directory)
    weights = {weight.target: weight for weight in _all_weights(spec)}
    sources: dict[str, Source] = {}
    for stored in family.weights:
        for layer in range(spec.num_layers) if "{i}" in stored.source else (0,):
            offset = 0
            for pattern in stored.targets:
                target = pattern.format(i=layer)
                if target in weights:
                    name = prefix + stored.source.format(i=layer)
                    sources[target] = Source(name=name, offset=offset, transpose=stored.transpose)
                    offset += weights[target].shape[0]
    sources["head.weight"] = Source(name=family.head)
    if spec.tied:
        has_embed, has_head = sources["embed.weight"].name in tensors, family.head in tensors
        if has_embed and has_head:
            logger.info("%s: %s is stored beside the embedding it is tied to; both are used", directory, family.head)
            spec = replace(spec, tied=False)
        elif has_head:
            sources["embed.weight"] = sources["head.weight"]
        else:
            sources["head.weight"] = sources["embed.weight"]
    return spec, sources


def _all_weights(spec: ModelSpec) -> Iterator[Weight]:
    layers = (layer_weights(spec, layer) for layer in range(spec.num_layers))
    return chain(embed_weights(spec), chain.from_iterable(layers), head_weights(spec))


def _check_tensors(
    spec: ModelSpec, sources: Mapping[str, Source], tensors: Mapping[str, TensorInfo], directory: Path
) -> None:
    """Every weight is stored, in the right shape and a type that can be loaded, and nothing else is."""
    expected = _expected_shapes(spec, sources)
    if missing := [name for name in expected if name not in tensors]:
        others = f" and {len(missing) - 1} others are" if len(missing) > 1 else " is"
        hint = " (tie_word_embeddings is false)" if missing == [sources["head.weight"].name] else ""
        raise ModelError(f"{directory}: the tensor {missing[0]}{others} missing from the checkpoint{hint}.")
    for name, shape in expected.items():
        info = tensors[name]
        if info.shape != shape:
            raise ModelError(f"{directory}: the tensor {name} has shape {info.shape}; config.json asks for {shape}.")
        if info.dtype not in STORED_TYPES:
            raise ModelError(
                f"{directory}: the tensor {name} is stored as {info.dtype}; supported are {', '.join(STORED_TYPES)}."
            )
    if extra := sorted(set(tensors) - set(expected)):
        others = f" and {len(extra) - 1} others" if len(extra) > 1 else ""
        raise ModelError(
            f"{directory}: the checkpoint has {extra[0]}{others}, which a {spec.family} with this config.json has no "
            "use for; leaving them out could change its answers."
        )


def _expected_shapes(spec: ModelSpec, sources: Mapping[str, Source]) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape on disk."""
    outputs: Counter[str] = Counter()
    inputs: dict[str, tuple[int, ...]] = {}
    for weight in _all_weights(spec):
        if weight.target == "head.weight" and spec.tied:
            continue  # the embedding's tensor, counted there
        name = sources[weight.target].name
        outputs[name] += weight.shape[0]
        inputs[name] = weight.shape[1:]
    transposed = {source.name for source in sources.values() if source.transpose}
    return {
        name: (*inputs[name], size) if name in transposed else (size, *inputs[name]) for name, size in outputs.items()
    }


def _main_dtype(tensors: Mapping[str, TensorInfo]) -> DType:
    num_bytes: Counter[str] = Counter()
    for info in tensors.values():
        num_bytes[info.dtype] += info.num_bytes
    return STORED_TYPES[num_bytes.most_common(1)[0][0]]
