"""A checkpoint on disk: what its model is, where each weight lies, and what any shard of it needs.

Opening reads config.json and the headers of the safetensors files, and checks that every weight of the model is there
with the right shape and in a type that tllm loads. Of the weights a few bytes each are read, for the fingerprint. A
GGUF file has all of that in one; it is opened as if it were such a directory.

A weight may lie there quantized, as several tensors: a slice names them all, and `read_grouped` reads them.

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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np

from tllm.core.errors import ModelError
from tllm.core.types import DType, Quantization
from tllm.models.config import Config
from tllm.models.families import Family, find_family, read_spec
from tllm.models.gguf_file import find_gguf, gguf_end_ids, read_gguf
from tllm.models.grouped import Grouped
from tllm.models.headers import StoredTensors, TensorInfo, read_directory
from tllm.models.layouts import Array, Band, BlockWeight, Read, StoredWeight, read_band, stored_rows, whole_heads
from tllm.models.manifest import MANIFEST_FILE, Manifest, ManifestTensor
from tllm.models.quantized import Method, Scheme, find_quantized, read_scheme
from tllm.models.slicing import (
    Source,
    Weight,
    embed_weights,
    head_weights,
    layer_weights,
    slices,
    weight_bytes,
)
from tllm.models.spec import GroupedFormat, ModelSpec, Shard, TensorSlice

__all__ = ["Checkpoint", "TensorInfo", "end_ids", "generation_defaults"]

logger = logging.getLogger(__name__)

STORED_TYPES: Final[Mapping[str, DType]] = {"F32": DType.FLOAT32, "BF16": DType.BFLOAT16, "F16": DType.FLOAT16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. Its files are expected to stay as they are."""

    directory: Path  # or the GGUF file
    spec: ModelSpec
    dtype: DType  # in which most of the weights' bytes are stored; of a quantized one, in which it wants to be computed
    fingerprint: str  # hex; equal for equal config.json, headers, file names, sizes and samples of the weights
    tensors: Mapping[str, TensorInfo]  # by stored name; those without weights (masks, tables) left out
    sources: Mapping[str, Source]  # where each canonical weight lies
    quantized_weights: Mapping[str, StoredWeight] = field(default_factory=dict)  # by the name of their codes
    method: Method | None = None  # by which they were made
    config: Mapping[str, object] = field(default_factory=dict)  # config.json
    digest: bytes = b""  # of the headers and samples

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """A directory in the Hugging Face layout, a GGUF file or a directory with one, a manifest of the shard store.

        A directory that has a manifest of its own in the place of weights can be opened and described, not loaded.
        Raises ModelError naming the file, field or tensor that is missing, wrong or not supported.
        """
        if path.suffix == ".json" and path.is_file() and path.name != "config.json":
            return cls.of_manifest(path, path.parent)
        if (gguf := find_gguf(path)) is not None:
            return cls.from_headers(gguf, *read_gguf(gguf))
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
        scheme = read_scheme(config)
        tensors = {
            name: info
            for name, info in stored.tensors.items()
            if not any(re.fullmatch(pattern, name) for pattern in family.ignored)
        }
        names = set(tensors) if scheme is None else scheme.logical_names(tensors)
        if scheme is not None and scheme.method is Method.GPTQ:
            spec = _with_stored_biases(spec, _find_prefix(family, names, directory), names)
        spec, sources = _locate(spec, family, names, directory)
        quantized: Mapping[str, StoredWeight] = {}
        if scheme is not None:
            sources, quantized = _quantized(spec, scheme, sources, tensors, directory)
        _check_tensors(spec, sources, tensors, quantized, directory)
        config_digest = hashlib.sha256(json.dumps(config.fields, sort_keys=True).encode()).digest()
        return cls(
            directory=directory,
            spec=spec,
            dtype=_main_dtype(tensors) if not quantized else _computed_dtype(config, tensors, quantized),
            fingerprint=hashlib.sha256(config_digest + stored.digest).hexdigest(),
            tensors=tensors,
            sources=sources,
            quantized_weights=quantized,
            method=scheme.method if scheme is not None and quantized else None,
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
        return tuple(dict.fromkeys(name for part in self.slices(shard) for name in (part.source, *part.others)))

    def slices(self, shard: Shard) -> tuple[TensorSlice, ...]:
        """What the shard reads. Raises ModelError when it is no part of the model (see `models/slicing.py`)."""
        return slices(self.spec, shard, self.sources, self.tensors, self.quantized_weights)

    def weight_bytes(self, shard: Shard, dtype: DType, quantization: Quantization | None = None) -> int:
        """Memory of the shard's weights once loaded, exactly: as `dtype`, and quantized where that is asked for or they
        are stored so."""
        return weight_bytes(self.slices(shard), dtype, quantization)

    def quantized(self, name: str) -> GroupedFormat | None:
        """How the weight of this canonical or stored name is quantized; None: it is plain."""
        source = self.sources.get(name)
        stored = self.quantized_weights.get(name if source is None else source.name)
        return None if stored is None else stored.format

    def check_quantization(self, quantization: Quantization) -> None:
        """Raises ModelError when the linears are stored quantized to other bits than these: that is not undone.

        Otherwise asking for it changes only what is stored plain.
        """
        bits: Counter[int] = Counter()
        for target, source in self.sources.items():
            if target.startswith("layers.") and (stored := self.quantized_weights.get(source.name)) is not None:
                bits[stored.format.bits] += 1
        if bits and (held := bits.most_common(1)[0][0]) != quantization.bits:
            raise ModelError(
                f"{self.directory} is quantized to {held} bits already ({self.method}); {quantization} cannot be made "
                "of it. Leave out --quantize, or take the model with plain weights."
            )

    def rows_are_runs(self, piece: TensorSlice) -> bool:
        """Whether some rows of a quantized slice can be read without reading all around them."""
        return self.quantized_weights[piece.source].rows_are_runs

    def read_grouped(self, piece: TensorSlice, read: Read, first: int = 0, stop: int | None = None) -> Grouped:
        """Rows `[first, stop)` of a slice that is quantized.

        `read` gives the `num_bytes` at `offset` of `file` of any part of a tensor that it is asked for; in all, that
        is `piece.num_bytes` for all rows. Where `rows_are_runs` is false read them all at once. Raises ModelError for
        contents that contradict each other.
        """
        stored = self.quantized_weights[piece.source]
        rows, columns = range(stored.shape[0]), range(stored.shape[1])
        if piece.dim == 0:
            rows = range(piece.start, piece.stop)
        else:
            columns = range(piece.start, piece.stop)
        return stored.read(self.tensors, rows[first:stop], columns, read)

    def read_rows(self, piece: TensorSlice, read: Read, first: int = 0, stop: int | None = None) -> Array:
        """Rows `[first, stop)` of a plain slice whose rows are interleaved, in order; bfloat16 as its bits."""
        assert piece.interleaved, piece
        assert piece.grouped is None, piece
        info = self.tensors[piece.source]
        rows = range(piece.start, piece.stop)[first:stop]
        lying = whole_heads(rows, piece.interleaved)
        if len(info.shape) == 1:
            row = read_band(info, Band(name=piece.source, rows=range(1), columns=lying), read)
            return np.ascontiguousarray(row[0][stored_rows(rows, piece.interleaved)])
        band = Band(name=piece.source, rows=lying, columns=range(info.shape[1]))
        return np.ascontiguousarray(read_band(info, band, read)[stored_rows(rows, piece.interleaved)])


def end_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end a text: eos_token_id of generation_config.json, else of config.json; maybe none.

    Raises ModelError when the field is neither an id, a list of ids, nor null.
    """
    gguf = find_gguf(directory)
    if gguf is not None and not (directory.is_dir() and (directory / "config.json").is_file()):
        return gguf_end_ids(gguf)
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
    path = (directory.parent if directory.is_file() else directory) / "generation_config.json"
    return Config.read(path) if path.is_file() else None


def _find_prefix(family: Family, names: Collection[str], directory: Path) -> str:
    """Base models are saved without the name of the part they are of a whole."""
    for prefix in family.prefixes:
        if any(name.startswith(prefix) for name in names):
            return prefix
    raise ModelError(f"{directory} has no tensor of a {family.name} model.")


def _with_stored_biases(spec: ModelSpec, prefix: str, names: Collection[str]) -> ModelSpec:
    """Some makers of GPTQ checkpoints store a bias with every linear, of zeros where the model has none."""
    layer = f"{prefix}layers.0."
    qkv, output = f"{layer}self_attn.q_proj.bias" in names, f"{layer}self_attn.o_proj.bias" in names
    mlp = f"{layer}mlp.down_proj.bias" in names
    return replace(
        spec,
        qkv_bias=spec.qkv_bias or qkv,
        output_bias=spec.output_bias or output,
        mlp_bias=spec.mlp_bias or mlp,
    )


def _locate(
    spec: ModelSpec, family: Family, names: Collection[str], directory: Path
) -> tuple[ModelSpec, dict[str, Source]]:
    """The source of every canonical weight, and the spec with `tied` as the stored tensors have it.

    As in transformers: with tied embeddings one of the two may be absent, whichever it is. A checkpoint that says tied
    and stores both is read as it is stored, untied, which gives the same answers if they are equal.
    """
    prefix = _find_prefix(family, names, directory)
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
        has_embed, has_head = sources["embed.weight"].name in names, family.head in names
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


def _quantized(
    spec: ModelSpec,
    scheme: Scheme,
    sources: Mapping[str, Source],
    tensors: Mapping[str, TensorInfo],
    directory: Path,
) -> tuple[dict[str, Source], dict[str, StoredWeight]]:
    """The sources, with those of quantized weights where their codes lie, and these weights by the same names."""
    transposed = {source.name for source in sources.values() if source.transpose}
    shapes = _expected_shapes(spec, sources)
    matrices = {
        name: (shape[1], shape[0]) if name in transposed else (shape[0], shape[1])
        for name, shape in shapes.items()
        if len(shape) == 2
    }
    found = find_quantized(scheme, matrices, tensors, directory)
    interleaved = spec.head_dim if scheme.interleaved else 0
    placed: dict[str, Source] = {}
    quantized: dict[str, StoredWeight] = {}
    for target, source in sources.items():
        heads = interleaved if re.fullmatch(r"layers\.\d+\.[qk]\.(weight|bias)", target) else 0
        weight = found.get(source.name)
        if weight is None:
            placed[target] = replace(source, interleaved=heads)
            continue
        if isinstance(weight, BlockWeight):
            weight = replace(weight, interleaved=heads)
        placed[target] = replace(source, name=weight.names[0], transpose=False, interleaved=heads)
        quantized[weight.names[0]] = weight
    return placed, quantized


def _check_tensors(
    spec: ModelSpec,
    sources: Mapping[str, Source],
    tensors: Mapping[str, TensorInfo],
    quantized: Mapping[str, StoredWeight],
    directory: Path,
) -> None:
    """Every weight is stored, in the right shape and a type that can be loaded, and nothing else is.

    Quantized ones are, or they would not have been found.
    """
    shapes = _expected_shapes(spec, sources)
    expected = {name: shape for name, shape in shapes.items() if name not in quantized}
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
    parts = {name for weight in quantized.values() for name in weight.names}
    if extra := sorted(set(tensors) - set(expected) - parts):
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


def _computed_dtype(config: Config, tensors: Mapping[str, TensorInfo], quantized: Mapping[str, StoredWeight]) -> DType:
    """What the config says; else the type of most of what is plain, or of the scales where nothing is."""
    for name in ("dtype", "torch_dtype"):
        said = config.fields.get(name)
        if isinstance(said, str) and said in set(DType):
            return DType(said)
    parts = {name for weight in quantized.values() for name in weight.names}
    plain = {name: info for name, info in tensors.items() if name not in parts}
    return _main_dtype(plain or {name: info for name, info in tensors.items() if info.dtype in STORED_TYPES})
