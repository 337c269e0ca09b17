"""A checkpoint of a model's shape whose weights are all zero and take no disk: what a machine's speed is measured on.

The header is true for every tensor; the data behind it is a hole in a sparse file, read as zeros. How long a layer
takes does not depend on its weights' values, and every layer of a model takes as long as another, every token of the
vocabulary too: so a few of them stand for all.

This file does not know who measures, nor any framework.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Final

from tllm.core.types import DType
from tllm.models.config import Config
from tllm.models.families import Family, find_family, read_spec
from tllm.models.headers import SINGLE_FILE
from tllm.models.quantized import QUANTIZED_FIELDS
from tllm.models.slicing import embed_weights, head_weights, layer_weights
from tllm.models.spec import ModelSpec

_STORED: Final[Mapping[DType, str]] = {DType.FLOAT32: "F32", DType.BFLOAT16: "BF16", DType.FLOAT16: "F16"}


def shortened(config: Config, num_layers: int, vocab_size: int) -> Config:
    """The config of the model's first layers and tokens, its weights plain. Raises ModelError when it is none that tllm
    knows."""
    family = find_family(config)
    fields = {name: value for name, value in config.fields.items() if name not in QUANTIZED_FIELDS}
    for size, value in (("num_layers", num_layers), ("vocab_size", vocab_size)):
        names = family.sizes[size].names
        for name in [name for name in names if name in fields] or names[:1]:
            fields[name] = value
    if isinstance(types := fields.get("layer_types"), list):
        fields["layer_types"] = types[:num_layers]
    return Config(path=config.path, fields=fields)


def write_zeros(directory: Path, config: Config, dtype: DType) -> None:
    """Write config.json and a sparse model.safetensors that `Checkpoint.open` takes. Raises ModelError, OSError."""
    family = find_family(config)
    header: dict[str, object] = {}
    offset = 0
    for name, shape in stored_shapes(read_spec(config, family), family).items():
        stop = offset + math.prod(shape) * dtype.num_bytes
        header[name] = {"dtype": _STORED[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (directory / "config.json").write_text(json.dumps(config.fields))
    with (directory / SINGLE_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def stored_shapes(spec: ModelSpec, family: Family) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of the family has, by its name there, with its shape there."""
    layers = (layer_weights(spec, layer) for layer in range(spec.num_layers))
    every = chain(embed_weights(spec), chain.from_iterable(layers), head_weights(spec))
    shapes = {weight.target: weight.shape for weight in every}
    stored: dict[str, tuple[int, ...]] = {}
    for row in family.weights:
        for layer in range(spec.num_layers) if "{i}" in row.source else (0,):
            parts = [shapes[name] for target in row.targets if (name := target.format(i=layer)) in shapes]
            if parts:
                outputs, inputs = sum(shape[0] for shape in parts), parts[0][1:]
                name = family.prefixes[0] + row.source.format(i=layer)
                stored[name] = (*inputs, outputs) if row.transpose else (outputs, *inputs)
    if not spec.tied:
        stored[family.head] = shapes["head.weight"]
    return stored
