"""Which weights of a checkpoint are quantized, by its config and its tensors.

    MLX, tllm   config "quantization"; a matrix X.weight is quantized if there is X.scales
    GPTQ, AWQ   config "quantization_config" with this quant_method; X.qweight stands in the place of X.weight
    gguf        tensors of ggml's block types, under the names that safetensors have (`gguf_file.py`)

Bits and groups are read off the tensors' shapes; a config that says something else is refused. What is not quantized
in such a checkpoint is a plain tensor as ever.

This file does not know how bytes become weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from tllm.core.errors import ModelError
from tllm.models.config import Config
from tllm.models.headers import BLOCKS, TensorInfo
from tllm.models.layouts import BLOCK_FORMATS, AwqWeight, BlockWeight, GptqWeight, StoredWeight, WordWeight
from tllm.models.spec import GroupedFormat

QUANTIZED_FIELDS: Final = frozenset({"quantization", "quantization_config"})  # of a config
FLOATS: Final = ("F32", "F16", "BF16")
_SUFFIX: Final = ".weight"
_INTERLEAVED: Final = "interleaved"  # our own word in a config made from a GGUF file
_BITS: Final = (4, 8)


class Method(StrEnum):
    MLX = "MLX"
    GPTQ = "GPTQ"
    AWQ = "AWQ"
    GGUF = "GGUF"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What a config says about quantized weights."""

    method: Method
    config: Config  # the section
    interleaved: bool = False  # rows of the projections to queries and keys

    def logical_names(self, tensors: Collection[str]) -> set[str]:
        """The stored tensors, and those in whose place a quantized form is stored."""
        names = set(tensors)
        if self.method in (Method.GPTQ, Method.AWQ):
            names |= {name.removesuffix("qweight") + "weight" for name in tensors if name.endswith(".qweight")}
        return names


def read_scheme(config: Config) -> Scheme | None:
    """None: the config says nothing of the kind. Raises ModelError for a method that is not supported."""
    if (section := config.section("quantization")) is not None:
        return _mlx_scheme(section)
    section = config.section("quantization_config")
    if section is None:
        return None
    match method := section.text("quant_method"):
        case None if {"bits", "group_size"} <= section.fields.keys():
            return _mlx_scheme(section)
        case "gptq":
            section.refuse_unless("checkpoint_format", _gptq_format(section), "there are gptq and gptq_v2")
            return Scheme(method=Method.GPTQ, config=section)
        case "awq":
            section.refuse_unless("version", "gemm", "only that layout is supported")
            return Scheme(method=Method.AWQ, config=section)
        case "gguf":
            return Scheme(method=Method.GGUF, config=section, interleaved=section.flag(_INTERLEAVED, default=False))
        case _:
            raise ModelError(
                f"{section.path}: quant_method {method!r} is not supported; weights may be float32, bfloat16 or "
                "float16, or quantized as by MLX, GPTQ, AWQ, in a GGUF file, or by `tllm quantize`."
            )


def gguf_section(*, interleaved: bool) -> dict[str, object]:
    """The `quantization_config` of a config made from a GGUF file."""
    return {"quant_method": "gguf", _INTERLEAVED: interleaved}


def find_quantized(
    scheme: Scheme, matrices: Mapping[str, tuple[int, int]], tensors: Mapping[str, TensorInfo], directory: Path
) -> dict[str, StoredWeight]:
    """Those of the matrices, given as name -> (outputs, inputs), that are stored quantized.

    Raises ModelError naming the tensor that is missing, misshapen, of a wrong type or of bits that are not supported.
    """
    found = {}
    for name, shape in matrices.items():
        module = _Module(scheme.config, name.removesuffix(_SUFFIX), shape, tensors, directory)
        weight = _FINDERS[scheme.method](module)
        if weight is not None:
            found[name] = weight
    return found


@dataclass(frozen=True, slots=True)
class _Module:
    """One matrix of the model: its name without `.weight`, and where its tensors are looked for."""

    config: Config
    name: str
    shape: tuple[int, int]
    tensors: Mapping[str, TensorInfo]
    directory: Path

    def get(self, part: str) -> TensorInfo | None:
        return self.tensors.get(f"{self.name}.{part}")

    def require(self, part: str, shape: tuple[int, ...] | None, dtypes: Collection[str]) -> TensorInfo:
        info = self.get(part)
        if info is None:
            raise self.error(part, "is missing from the checkpoint")
        if info.dtype not in dtypes:
            raise self.error(part, f"is stored as {info.dtype}; supported are {', '.join(dtypes)}")
        if shape is None and len(info.shape) != 2:
            raise self.error(part, f"has shape {info.shape}, not that of a matrix")
        if shape is not None and info.shape != shape:
            raise self.error(part, f"has shape {info.shape}; its neighbours and config.json ask for {shape}")
        return info

    def error(self, part: str, what: str) -> ModelError:
        return ModelError(f"{self.directory}: the tensor {self.name}.{part} {what}.")

    def bits(self, part: str, num_words: int, word_bits: int = 32) -> int:
        """Of each code, when so many words hold all of an output's."""
        bits, rest = divmod(num_words * word_bits, self.shape[1])
        if rest or bits not in _BITS:
            raise self.error(part, f"has {num_words * word_bits / self.shape[1]:g} bits per weight; supported are 4, 8")
        return bits

    def group(self, part: str, num_groups: int) -> int:
        group, rest = divmod(self.shape[1], num_groups) if num_groups else (0, 1)
        if rest:
            raise self.error(part, f"divides {self.shape[1]} inputs into {num_groups} groups, which are not equal")
        if group % 16 and num_groups > 1:
            raise self.error(part, f"has groups of {group} inputs; supported are multiples of 16")
        return group

    def check(self, bits: int, group: int) -> None:
        """Raises ModelError when the config says something else, for all or for this module."""
        own = self.config.fields.get(self.name)
        fields = own if isinstance(own, dict) else self.config.fields
        said = fields.get("bits")
        if own is False or (type(said) is int and said != bits):
            what = "it is not quantized" if own is False else f"it has {said} bits"
            raise ModelError(f"{self.config.path} says of {self.name} that {what}; its tensors have {bits}.")
        said = fields.get("group_size")
        if type(said) is int and said not in (-1, group):
            raise ModelError(
                f"{self.config.path} says of {self.name} that its groups are of {said}; its tensors have {group}."
            )


def _mlx_scheme(section: Config) -> Scheme:
    for name in ("mode", *section.fields):
        value = section.fields.get(name)
        mode = value.get("mode") if isinstance(value, dict) else value if name == "mode" else None
        if mode not in (None, "affine", "symmetric"):
            raise ModelError(f"{section.path}: mode {mode!r} is not supported; there are affine and symmetric.")
    return Scheme(method=Method.MLX, config=section)


def _gptq_format(section: Config) -> str:
    return "gptq_v2" if section.text("checkpoint_format") == "gptq_v2" else "gptq"


def _find_mlx(module: _Module) -> StoredWeight | None:
    if module.get("scales") is None:
        return None
    num_outputs, num_inputs = module.shape
    weight = module.require("weight", None, ("U32", "U8"))
    scales = module.require("scales", None, FLOATS)
    word_bits = 32 if weight.dtype == "U32" else 8
    bits = module.bits("weight", weight.shape[1], word_bits)
    group = module.group("scales", scales.shape[1])
    module.check(bits, group)
    module.require("weight", (num_outputs, num_inputs * bits // word_bits), ("U32", "U8"))
    module.require("scales", (num_outputs, num_inputs // group), FLOATS)
    names = [f"{module.name}.weight", f"{module.name}.scales"]
    if module.get("biases") is not None:
        module.require("biases", scales.shape, (scales.dtype,))
        names.append(f"{module.name}.biases")
    return WordWeight(
        names=tuple(names),
        shape=module.shape,
        format=GroupedFormat(bits=bits, group=group, symmetric=len(names) == 2, scale_dtype=scales.dtype),
        word_codes=word_bits // bits,
    )


def _find_gptq(module: _Module) -> StoredWeight | None:
    if module.get("qweight") is None:
        return None
    num_outputs, num_inputs = module.shape
    words = module.require("qweight", None, ("I32",))
    bits = module.bits("qweight", words.shape[0])
    scales = module.require("scales", None, FLOATS)
    group = module.group("scales", scales.shape[0])
    module.check(bits, group)
    per_word = 32 // bits
    if num_outputs % per_word:
        raise module.error("qweight", f"has {num_outputs} outputs, not a multiple of {per_word}")
    module.require("qweight", (num_inputs // per_word, num_outputs), ("I32",))
    module.require("scales", (num_inputs // group, num_outputs), FLOATS)
    module.require("qzeros", (num_inputs // group, num_outputs // per_word), ("I32",))
    names = [f"{module.name}.{part}" for part in ("qweight", "scales", "qzeros")]
    if module.get("g_idx") is not None:
        module.require("g_idx", (num_inputs,), ("I32",))
        names.append(f"{module.name}.g_idx")
    symmetric = module.config.flag("sym", default=False)
    return GptqWeight(
        names=tuple(names),
        shape=module.shape,
        # A scale times a zero point needs more bits than the scale has.
        format=GroupedFormat(
            bits=bits, group=group, symmetric=symmetric, scale_dtype=scales.dtype if symmetric else "F32"
        ),
        stored_scale_dtype=scales.dtype,
        zero_shift=1 if _gptq_format(module.config) == "gptq" else 0,
        ordered=module.config.flag("desc_act", default=False),
    )


def _find_awq(module: _Module) -> StoredWeight | None:
    if module.get("qweight") is None:
        return None
    num_outputs, num_inputs = module.shape
    words = module.require("qweight", None, ("I32",))
    bits, rest = divmod(words.shape[1] * 32, num_outputs)
    if bits != 4 or rest:
        raise module.error("qweight", f"has {words.shape[1] * 32 / num_outputs:g} bits per weight; AWQ has 4")
    scales = module.require("scales", None, FLOATS)
    group = module.group("scales", scales.shape[0])
    module.check(bits, group)
    module.require("qweight", (num_inputs, num_outputs // 8), ("I32",))
    module.require("scales", (num_inputs // group, num_outputs), FLOATS)
    module.require("qzeros", (num_inputs // group, num_outputs // 8), ("I32",))
    return AwqWeight(
        names=tuple(f"{module.name}.{part}" for part in ("qweight", "scales", "qzeros")),
        shape=module.shape,
        format=GroupedFormat(bits=bits, group=group, symmetric=False, scale_dtype="F32"),
        stored_scale_dtype=scales.dtype,
    )


def _find_gguf(module: _Module) -> StoredWeight | None:
    info = module.get("weight")
    if info is None or info.dtype not in BLOCKS:
        return None
    module.require("weight", module.shape, tuple(BLOCKS))
    return BlockWeight(
        names=(f"{module.name}.weight",),
        shape=module.shape,
        format=BLOCK_FORMATS[info.dtype],
        dtype=info.dtype,
    )


_FINDERS: Final = {
    Method.MLX: _find_mlx,
    Method.GPTQ: _find_gptq,
    Method.AWQ: _find_awq,
    Method.GGUF: _find_gguf,
}
